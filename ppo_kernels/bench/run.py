"""Measure one job after the other: judge every contender first, then time those that are right."""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ppo_kernels

from .. import cpu, info, testing, triton
from .._op import refusal, use_backend
from ..testing import Inputs
from . import cases, memory
from .baselines.baseline import UnavailableError
from .cases import Job
from .results import FLOOR, OURS, PRODUCTS, Row
from .timing import (
    FLUSHED_FROM,
    Bandwidth,
    Call,
    Contestant,
    Times,
    seconds,
    settle_allocator,
    take_turns,
)

LONGEST_CALL = 2.0  # seconds, or what a contender has; a longer loop is extrapolated
SHORT_STEPS = 4096
# What another implementation may differ by and still count as computing the same, relative to the
# largest magnitude in the exact result. Ours are held to the tests' rule instead.
SAME = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


class WrongError(Exception):
    """What a contender computes differs from the exact result."""


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Attributes:
        executors: Ours, as `testing.executor` takes them; None for what `auto` would choose.
        baselines: Names to compare with; None for all.
        budget: Seconds of calls per contender and job, about.
        memory: Measure peak memory.
        timing: Measure times.
    """

    device: torch.device
    executors: Sequence[str] | None
    threads: Sequence[int]
    baselines: Sequence[str] | None = None
    budget: float = 2.0
    memory: bool = True
    timing: bool = True


@dataclass(frozen=True)
class Contender:
    """Ours on one executor, or (without one) the baseline of that name."""

    job: Job
    name: str
    executor: str = ""

    def load(self, device: torch.device) -> Callable[..., Any]:
        """The function to call. Raises UnavailableError with the reason."""
        if not self.executor:
            return self.job.benchmark.baselines[self.name].load(device)
        backend = self.executor.partition(":")[0]
        for op in info.functions()[self.job.benchmark.function]:
            reason = refusal(op, backend, device.type)
            if reason:
                raise UnavailableError(f"{self.executor}: {reason}")
        return self.job.benchmark.public

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return testing.executor(self.executor) if self.executor else contextlib.nullcontext()

    @property
    def question(self) -> dict[str, str]:
        """What `memory.Meter` needs to make it again."""
        return {"name": self.name, "executor": self.executor}


@dataclass
class Runner:
    """Everything one run shares between its jobs."""

    settings: Settings
    meter: memory.Meter = field(default_factory=memory.Meter)
    errors: dict[tuple[Any, ...], float | Exception] = field(default_factory=dict)

    @cached_property
    def bandwidth(self) -> Bandwidth:
        return Bandwidth(self.settings.device)

    def rows(self, jobs: Sequence[Job]) -> Iterator[list[Row]]:
        """The rows of each job, at each number of threads in turn."""
        before = torch.get_num_threads()
        settle_allocator()
        try:
            for threads in self.settings.threads:
                torch.set_num_threads(threads)
                read, copy = self.bandwidth.measure()
                shared = machine(self.settings.device) | {
                    "threads": threads,
                    "read_gbps": round(read / 1e9, 2),
                    "copy_gbps": round(copy / 1e9, 2),
                }
                for job in jobs:
                    yield self._measure(job, shared)
        finally:
            torch.set_num_threads(before)
            self.meter.close()

    def _measure(self, job: Job, shared: dict[str, Any]) -> list[Row]:
        shared = shared | {
            "function": job.benchmark.function,
            "variant": job.benchmark.variant,
            "size": job.size,
            "dtype": job.dtype_name,
            "direction": job.direction,
        }
        device = self.settings.device
        names = [n for n in job.benchmark.baselines if self._wanted(n)]
        ours = self.settings.executors or [default_executor(job.benchmark.function, device)]
        contenders = [Contender(job, OURS, e) for e in ours]
        contenders += [Contender(job, name) for name in names]

        def blank(name: str, executor: str = "", **columns: Any) -> Row:
            backend, _, isa = executor.partition(":")
            if device.type == "cpu" and not isa:
                isa = _torch_level()
            return Row(**shared, implementation=name, backend=backend, isa=isa, **columns)

        rows = {c: blank(c.name, c.executor) for c in contenders}
        inputs = job.inputs(device)
        calls: dict[Contender, Call] = {}
        factors: dict[Contender, float] = {}
        # Baselines first: theirs is the full-size result that ours is compared with besides.
        seen: tuple[str, list[Tensor]] | None = None
        for c in contenders[len(ours) :] + contenders:
            row = rows[c]
            if c in calls or row.status != "ok":
                continue
            try:
                row.max_error = self._error(c)
                function = c.load(device)
                used, factors[c] = self._shortened(c, function, inputs)
                call = make_call(job, function, used)
                with c.context():
                    result = call()
                if factors[c] == 1:
                    parts = [_sample(t) for t in result]
                    if seen is None and not c.executor:
                        seen = (c.name, parts)
                    elif seen is not None:
                        _agree(parts, *seen, job.dtype)
                calls[c] = call
            except UnavailableError as error:
                row.status, row.note = "skipped", str(error)
            except WrongError as error:
                row.status, row.note = "wrong", str(error)
            except Exception as error:
                row.status, row.note = "failed", f"{type(error).__name__}: {_first_line(error)}"
        floor: dict[str, Any] = {}
        if calls and self.settings.timing:
            floor = self._time(job, inputs, calls, factors, rows)
        if self.settings.memory:
            self._weigh(inputs, {c: call for c, call in calls.items() if factors[c] == 1}, rows)
        if not floor:
            return list(rows.values())
        return [*rows.values(), blank(PRODUCTS if job.benchmark.products else FLOOR, **floor)]

    def _wanted(self, name: str) -> bool:
        return self.settings.baselines is None or name in self.settings.baselines

    def _error(self, c: Contender) -> float:
        """`judged`, once for all sizes and numbers of threads."""
        key = (c.job.benchmark, c.job.dtype, c.job.backward, c.name, c.executor)
        if key not in self.errors:
            try:
                self.errors[key] = judged(c, c.load(self.settings.device), self.settings.device)
            except Exception as error:
                self.errors[key] = error
        found = self.errors[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _shortened(
        self, c: Contender, function: Callable[..., Any], inputs: Inputs
    ) -> tuple[Inputs, float]:
        """The arguments to time, and by what to multiply the time."""
        shorten = None if c.executor else c.job.benchmark.baselines[c.name].shorten
        steps = c.job.shape[-1]
        if shorten is None or steps <= SHORT_STEPS:
            return inputs, 1.0
        short = shorten(inputs, SHORT_STEPS)
        factor = steps / SHORT_STEPS
        once = seconds(make_call(c.job, function, short), 1, self.settings.device)
        longest = min(LONGEST_CALL, self.settings.budget)
        return (inputs, 1.0) if once * factor < longest else (short, factor)

    def _time(
        self,
        job: Job,
        inputs: Inputs,
        calls: dict[Contender, Call],
        factors: dict[Contender, float],
        rows: dict[Contender, Row],
    ) -> dict[str, Any]:
        """Fill in times and bandwidth; returns the columns of the floor, if timed."""
        device = self.settings.device
        first = next((c for c in calls if c.executor), next(iter(calls)))
        with first.context(), torch.set_grad_enabled(job.backward):
            outputs = testing.flatten(_tensors(first.load(device)(**_leaves(job, inputs))))
        read, written = job.traffic(inputs, outputs)
        del outputs
        contestants = {str(i): Contestant(calls[c], c.context) for i, c in enumerate(calls)}
        large = read >= FLUSHED_FROM
        products = job.benchmark.products
        limited = large and not products
        floor: Callable[[], object] | None = None
        if products:
            floor = products(inputs, job.backward)
        elif large:
            floor = self.bandwidth.floor(read, written)
        if floor:
            floor()
            contestants[FLOOR] = Contestant(floor, contextlib.nullcontext)
        flush = self.bandwidth.flush if large else None
        times = take_turns(contestants, budget=self.settings.budget, flush=flush, device=device)
        date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        cache = "flushed" if large else "warm"

        def timed(t: Times, factor: float = 1.0) -> dict[str, Any]:
            columns: dict[str, Any] = {
                "median_ms": t.median * factor * 1e3,
                "low_ms": t.low * factor * 1e3,
                "high_ms": t.high * factor * 1e3,
                "samples": t.samples,
                "cache": cache,
                "date": date,
                "bytes": read + written,
            }
            if limited:
                columns["gbps"] = (read + written) / (t.median * factor) / 1e9
                columns["bandwidth_percent"] = 100 * times[FLOOR].median / (t.median * factor)
            return columns

        for i, c in enumerate(calls):
            row = rows[c]
            row.set(**timed(times[str(i)], factors[c]))
            if factors[c] != 1:
                row.status = "extrapolated"
                row.note = f"from {SHORT_STEPS} steps"
        return timed(times[FLOOR]) if floor else {}

    def _weigh(
        self, inputs: Inputs, calls: dict[Contender, Call], rows: dict[Contender, Row]
    ) -> None:
        """Fill in peak memory, of large inputs."""
        if sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor)) < FLUSHED_FROM:
            return
        for c, call in calls.items():
            try:
                rows[c].peak_mib = self._peak(c, call) / 2**20
            except (RuntimeError, OSError) as error:
                rows[c].note = f"no peak memory: {_first_line(error)}"

    def _peak(self, c: Contender, call: Call) -> int:
        if self.settings.device.type == "cuda":
            with c.context():
                return memory.peak_on_cuda(call)
        job = {
            "function": c.job.benchmark.function,
            "variant": c.job.benchmark.variant,
            "shape": c.job.shape,
            "dtype": c.job.dtype_name,
            "direction": c.job.direction,
        }
        threads = torch.get_num_threads()
        return self.meter.ask({"job": job, "contender": c.question, "threads": threads})


def find_job(function: str, variant: str, shape: list[int], dtype: str, direction: str) -> Job:
    benchmark = cases.BENCHMARKS[function, variant]
    return Job(benchmark, tuple(shape), getattr(torch, dtype), direction)


# ---- calls and results --------------------------------------------------------------------------


def _leaves(job: Job, inputs: Inputs) -> Inputs:
    if not job.backward:
        return inputs
    grads = job.benchmark.grads
    return inputs | {k: inputs[k].detach().requires_grad_() for k in grads}


def _tensors(result: Any) -> Any:
    """A baseline's result without what it returns in a dict."""
    return tuple(r for r in result if not isinstance(r, dict)) if type(result) is tuple else result


def make_call(job: Job, function: Callable[..., Any], inputs: Inputs) -> Callable[[], list[Tensor]]:
    """What is timed: outputs, and in the backward direction gradients too.

    The upstream gradient of a loss is 1, as in `loss.backward()`, otherwise uniform in [0.5, 1.5].
    """
    arguments = _leaves(job, inputs)
    if not job.backward:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return testing.flatten(_tensors(function(**arguments)))

        return forward
    wrt = [arguments[name] for name in job.benchmark.grads]
    upstream: list[Tensor] = []

    def forward_backward() -> list[Tensor]:
        outputs = testing.flatten(_tensors(function(**arguments)))
        live = [t for t in outputs if t.requires_grad]
        if not upstream:
            g = torch.Generator().manual_seed(1)
            upstream.extend(
                (torch.rand(t.shape, generator=g) + 0.5).to(t) if t.dim() else torch.ones_like(t)
                for t in live
            )
        return [*(t.detach() for t in live), *torch.autograd.grad(live, wrt, upstream)]

    return forward_backward


def judged(c: Contender, function: Callable[..., Any], device: torch.device) -> float:
    """The largest error at the benchmark's `check` shape, over outputs and gradients.

    Each relative to the largest magnitude in its exact result. Raises WrongError: ours are judged
    by the rule of `testing`, others by `SAME`.
    """
    job = c.job
    public = job.benchmark.public
    case = job.benchmark.case(job.backward)
    inputs = testing.arrange(case.inputs(torch.Generator().manual_seed(0)), job.dtype)
    upcast = testing.arrange(inputs, torch.float64)
    there = testing.arrange(inputs, None, device=str(device))

    def call(**arguments: Any) -> Any:
        return _tensors(function(**arguments))

    with c.context(), torch.set_grad_enabled(job.backward):
        outputs, grads = testing.run(case, there, grad=job.backward, call=call)
    got = [t.cpu() for t in outputs]
    got_grads = {k: t.cpu() for k, t in grads.items()}
    if c.executor:
        want = testing.reference(case, upcast, job.dtype, grad=job.backward, call=public)
        problem = testing.judge(want, got, got_grads)
        if problem:
            raise WrongError(problem)
    with use_backend("torch"):
        exact_outputs, exact_grads = testing.run(case, upcast, grad=job.backward, call=public)
    pairs = [*zip(got, exact_outputs, strict=False)]
    pairs += [(got_grads[k], exact_grads[k]) for k in exact_grads]
    for g, exact in pairs:
        _shapes(g, exact)
    worst = max(relative_error(g, exact) for g, exact in pairs)
    if not c.executor and worst > SAME[job.dtype]:
        raise WrongError(f"relative error {worst:.2g} at {job.benchmark.check}")
    return worst


def relative_error(got: Tensor, exact: Tensor) -> float:
    scale = exact.abs().max().item() if exact.numel() else 0.0
    worst = (got.double() - exact.double()).abs().max().item() if got.numel() else 0.0
    if math.isnan(worst):
        return math.inf
    return worst / scale if scale else worst


def _shapes(got: Tensor, expected: Tensor) -> None:
    if got.shape != expected.shape:
        raise WrongError(f"shape {list(got.shape)}, expected {list(expected.shape)}")


def _sample(t: Tensor) -> Tensor:
    """Some 65536 elements, spread by an odd stride over all rows and columns."""
    return t.detach().flatten()[:: (t.numel() >> 16) | 1].float().cpu()


def _agree(got: list[Tensor], other: str, seen: list[Tensor], dtype: torch.dtype) -> None:
    """At full size: an error that only large tensors show (an offset that overflows, say)."""
    for g, s in zip(got, seen, strict=False):
        _shapes(g, s)
        if not relative_error(g, s) <= 2 * SAME[dtype]:
            raise WrongError(f"differs from {other} at full size by {relative_error(g, s):.2g}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---- where it ran -------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if "model name" in x), model)
    return f"{model}, {torch.multiprocessing.cpu_count()} cores"


def commit() -> str:
    """Of the source tree this package runs from; with a + where kernels or package differ."""
    root = Path(__file__).parent.parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "ppo_kernels/__init__.py")
        changed = git("status", "--porcelain", "--", "ppo_kernels", "csrc", "CMakeLists.txt")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _torch_level() -> str:
    name = torch.backends.cpu.get_cpu_capability().lower()
    return "generic" if name in ("default", "no avx") else name


def machine(device: torch.device) -> dict[str, Any]:
    compiler = triton.version() if device.type == "cuda" else None
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__ + (f", triton {compiler}" if compiler else ""),
        "ppo_kernels": ppo_kernels.__version__,
        "commit": commit(),
    }


def default_executor(function: str, device: torch.device) -> str:
    """What `auto` would choose; of the cpu backend, the instruction set in use."""
    backend = info.functions()[function][0].resolve(device, "auto")
    return f"cpu:{cpu.isa()}" if backend == "cpu" else backend
