"""Time calls in turn, and what the memory itself needs for the same bytes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[[], Any]
SHORTEST_SAMPLE = 3e-4  # seconds; shorter calls are timed in batches
MOST_SAMPLES = 300
FEWEST_SAMPLES = 5
FLUSHED_FROM = 1 << 20  # bytes; smaller inputs are timed while they are in the caches


class Times(NamedTuple):
    """Seconds per call: quartiles over the samples."""

    low: float
    median: float
    high: float
    samples: int


class Contestant(NamedTuple):
    """A call to time, and the context it runs in (outside the clock)."""

    call: Call
    context: Callable[[], AbstractContextManager[Any]]


def settle_allocator() -> None:
    """Free one large block, as every training process soon does.

    From the first of up to 32 MiB on, glibc keeps such blocks instead of giving them back to the
    system at once. Without it, smaller results would be page faults in most of their time.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def seconds(call: Call, times: int, device: torch.device) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def take_turns(
    contestants: Mapping[str, Contestant],
    *,
    budget: float,
    flush: Call | None,
    device: torch.device,
) -> dict[str, Times]:
    """Sample every call in turn (A B C A B C ...), so that a busy moment meets all of them.

    Args:
        contestants: By name; each has been called before.
        budget: Seconds for the calls of one contestant, about; slow ones take fewer samples.
        flush: Called before each sample.
        device: Where they run.
    """
    batches, wanted = {}, {}
    for name, (call, context) in contestants.items():
        with context():
            once = min(seconds(call, 1, device) for _ in range(2))
        batches[name] = 1 if flush else max(1, round(SHORTEST_SAMPLE / max(once, 1e-7)))
        samples = int(budget / (once * batches[name]))
        wanted[name] = min(max(samples, FEWEST_SAMPLES), MOST_SAMPLES)
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(max(wanted.values(), default=0)):
            for name, (call, context) in contestants.items():
                if turn < wanted[name]:
                    if flush:
                        flush()
                    with context():
                        taken[name].append(seconds(call, batches[name], device))
    finally:
        if collecting:
            gc.enable()
    return {name: quartiles(samples) for name, samples in taken.items()}


def quartiles(samples: list[float]) -> Times:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Times(low, median, high, len(samples))


class Bandwidth:
    """Plain reads and copies, by torch: what the other calls' bytes are held against."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._source = self._target = torch.empty(0, device=device)
        self._flushed = torch.ones(2 * last_level_cache(device) // 4, device=device)

    def floor(self, read: int, written: int) -> Call:
        """A call that reads and writes as many bytes: a copy, and a sum (or fill) of the rest."""
        both = min(read, written) // 8
        size = -(-max(read, written) // 8)
        if len(self._source) < size:
            self._source = self._target = torch.empty(0)  # frees the smaller ones first
            self._source = torch.ones(size, dtype=torch.int64, device=self.device)
            self._target = torch.ones_like(self._source)
        target, source = self._target[:both], self._source[:both]
        rest = (self._source if read > written else self._target)[both:size]

        def call() -> None:
            target.copy_(source)
            if len(rest):
                rest.sum() if read > written else rest.zero_()

        return call

    def flush(self) -> Tensor:
        """Read enough to leave nothing else in the caches; reading leaves nothing to write back."""
        return self._flushed.sum()

    def measure(self) -> tuple[float, float]:
        """Bytes per second of a one-pass read and of a copy (read + written), far out of cache."""
        size = max(4 * self._flushed.nbytes, 256 << 20)
        rates = []
        for read, written in ((size, 0), (size, size)):
            call = self.floor(read, written)
            call()
            fastest = min(seconds(call, 1, self.device) for _ in range(5))
            rates.append((read + written) / fastest)
        return rates[0], rates[1]


def last_level_cache(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(s.read_text().strip().rstrip("K")) << 10 for s in sizes), default=32 << 20)
