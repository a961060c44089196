"""What a step measured: metrics of its rollouts and updates, its time and its memory."""

import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ppo_kernels as pk
from ppo_kernels._files import atomic_file
from ppo_kernels.metrics import POLICY_STATS
from ppo_kernels.trainer.experience import Experience


class Update(NamedTuple):
    """What one minibatch tells about itself; without a policy update only of the values."""

    loss: Tensor
    entropy: Tensor | None
    policy: pk.PolicyMetrics | None
    value: pk.ValueMetrics


class Clock:
    """The seconds of each phase of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last call for a phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


def rollout_metrics(experience: Experience, kl_coef: float) -> dict[str, float]:
    """Metrics of a step's completions; rewards and divergences are means over completions."""
    mask, scores = experience.mask, experience.scores
    lengths = mask.sum(-1).float()
    divergence = float(pk.masked_sum(experience.kl, mask)) / len(mask)
    returns = experience.returns[mask]
    return {
        "reward/mean": float(scores.mean()),
        "reward/std": float(scores.std(unbiased=False)),
        "reward/min": float(scores.min()),
        "reward/max": float(scores.max()),
        "reward/total": float(pk.masked_sum(experience.rewards, mask)) / len(mask),
        "reward/kl": -kl_coef * divergence,
        "kl/per_completion": divergence,
        "kl/per_token": divergence * len(mask) / float(lengths.sum()),
        "kl/coef": kl_coef,
        "returns/mean": float(returns.mean()),
        "returns/std": float(returns.std(unbiased=False)),
        "completion/tokens": float(lengths.mean()),
        "completion/tokens_min": float(lengths.min()),
        "completion/tokens_max": float(lengths.max()),
        "completion/ended": float(experience.ended.float().mean()),
    }


def update_metrics(updates: Sequence[Update], norms: Sequence[Tensor]) -> dict[str, float]:
    """Metrics of a step's minibatches; those of a policy that did not learn are NaN."""
    policies = [u.policy for u in updates if u.policy is not None]
    if not policies:
        policies = [pk.PolicyMetrics(torch.full((len(POLICY_STATS),), torch.nan))]
    entropies = [float(u.entropy) for u in updates if u.entropy is not None]
    norm = torch.stack([*norms])
    return {
        "entropy": sum(entropies) / len(entropies) if entropies else math.nan,
        "loss": float(torch.stack([u.loss for u in updates]).mean()),
        "grad_norm": float(norm.mean()),
        "grad_norm/max": float(norm.max()),
        "ratio_first/max": float(policies[0].ratio_max),
        "ratio_first/min": float(policies[0].ratio_min),
        **_floats("policy", pk.reduce_metrics(policies)),
        **_floats("value", pk.reduce_metrics([u.value for u in updates])),
    }


def cost_metrics(clock: Clock, tokens: int) -> dict[str, float]:
    """Seconds and sampled tokens per second of each phase and of all, and the memory's peak."""
    if clock.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(clock.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **{f"time/{phase}": seconds for phase, seconds in clock.seconds.items()},
        **{f"time/{p}_tokens_per_second": tokens / s for p, s in clock.seconds.items()},
        "time/tokens_per_second": tokens / clock.total,
        "memory/peak_mb": peak / 1e6,
    }


@contextmanager
def profiled(path: Path, active: bool) -> Iterator[dict[str, float]]:
    """Write the time by operator of what runs within; the dict gets the share of our ops."""
    result: dict[str, float] = {}
    if not active:
        yield result
        return
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        yield result
        wall = 1e6 * (time.perf_counter() - start)
    outermost = [event for event in profiler.events() if _is_ours(event) and not _within(event)]
    table = profiler.key_averages()
    if on_gpu:
        ours = sum(event.device_time_total for event in outermost)
        wall = sum(event.self_device_time_total for event in table)
    else:
        ours = sum(event.cpu_time_total for event in outermost)
    result["time/share_of_ops"] = ours / wall
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    with atomic_file(path) as temporary:
        temporary.write_text(table.table(sort_by=order, row_limit=40), encoding="utf-8")


def _is_ours(event: Any) -> bool:
    return event.name.startswith("ppo_kernels::")


def _within(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (_is_ours(parent) or _within(parent))


def _floats(prefix: str, metrics: pk.PolicyMetrics | pk.ValueMetrics) -> dict[str, float]:
    return {f"{prefix}/{key}": float(value) for key, value in metrics.as_dict().items()}
