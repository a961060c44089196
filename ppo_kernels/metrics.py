"""What a loss measured, as raw sums, so that micro-batches and ranks combine exactly.

A metrics object is one float64 tensor. Its properties are 0-d tensors: nothing waits for the device
until a number is read. Means over no token are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# What each entry of `stats` holds, and how two of them combine. The kernels write in this order.
POLICY_STATS = {
    "tokens": "sum",
    "sequences": "sum",
    "loss": "sum",
    "unclipped_loss": "sum",
    "clipped_high": "sum",
    "clipped_low": "sum",
    "dual_clipped": "sum",
    "k1": "sum",
    "k3": "sum",
    "ratio": "sum",
    "ratio_square": "sum",
    "ratio_max": "max",
    "ratio_min": "min",
}
IMPORTANCE_STATS = {
    "tokens": "sum",
    "sequences": "sum",
    "weight": "sum",
    "weight_square": "sum",
    "limited": "sum",
    "k1": "sum",
    "k3": "sum",
}
VALUE_STATS = {
    "tokens": "sum",
    "sequences": "sum",
    "loss": "sum",
    "clipped": "sum",
    "value": "sum",
    "return": "sum",
    "error": "sum",
    "error_square": "sum",
    "return_square": "sum",
}


class PolicyMetrics(NamedTuple):
    """What `clipped_loss` measured over the live tokens; r = exp(logprob - old_logprob), clamped.

    Without any live token, the ratio's mean, maximum and minimum and the effective sample size are
    those of equal policies: 1.
    """

    stats: Tensor

    @property
    def tokens(self) -> Tensor:
        """Live tokens."""
        return self._stat("tokens")

    @property
    def sequences(self) -> Tensor:
        """Sequences with a live token; 0 for packed tensors without cu_seqlens."""
        return self._stat("sequences")

    @property
    def loss(self) -> Tensor:
        """Token mean of the loss, whatever the aggregation."""
        return self._mean("loss")

    @property
    def unclipped_loss(self) -> Tensor:
        """Token mean of -A r, whatever the variant."""
        return self._mean("unclipped_loss")

    @property
    def clip_fraction(self) -> Tensor:
        """Share of tokens whose ratio a bound replaced: high + low, not dual.

        Where A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low; in cispo whatever A, in
        gspo with the ratio of the sequence for r, in gmpo with log r and its bounds. sapo, gpg and
        kl-cov have none.
        """
        return self._mean("clipped_high") + self._mean("clipped_low")

    @property
    def clip_fraction_high(self) -> Tensor:
        """Share of tokens that were above their bound: A > 0 and r > 1 + clip_high."""
        return self._mean("clipped_high")

    @property
    def clip_fraction_low(self) -> Tensor:
        """Share of tokens that were below their bound: A < 0 and r < 1 - clip_low."""
        return self._mean("clipped_low")

    @property
    def dual_clip_fraction(self) -> Tensor:
        """Share of tokens with A < 0 and r > dual_clip."""
        return self._mean("dual_clipped")

    @property
    def kl_k1(self) -> Tensor:
        """KL(old || new) by the mean of -log r over samples of old: unbiased, of either sign.

        This and `kl_k3`: Schulman 2020, http://joschu.net/blog/kl-approx.html.
        """
        return self._mean("k1")

    @property
    def kl_k3(self) -> Tensor:
        """KL(old || new) by the mean of r - 1 - log r over samples of old: unbiased, never < 0."""
        return self._mean("k3")

    @property
    def ratio_mean(self) -> Tensor:
        """Mean of r; its expectation over samples of old is 1."""
        return self._mean("ratio", empty=1.0)

    @property
    def ratio_max(self) -> Tensor:
        """Largest r."""
        return torch.where(self._stat("tokens") > 0, self._stat("ratio_max"), 1.0)

    @property
    def ratio_min(self) -> Tensor:
        """Smallest r."""
        return torch.where(self._stat("tokens") > 0, self._stat("ratio_min"), 1.0)

    @property
    def ess(self) -> Tensor:
        """Effective sample size (sum r)^2 / sum r^2 as a share of the tokens (Kish 1965)."""
        return _quotient(
            self._stat("ratio").square(),
            self._stat("ratio_square") * self._stat("tokens"),
            empty=1.0,
        )

    def as_dict(self) -> dict[str, Tensor]:
        """Every property by name."""
        return {name: getattr(self, name) for name in _properties(PolicyMetrics)}

    # Properties go through methods, not through each other: torch 2.6 traces the former only.
    def _stat(self, name: str) -> Tensor:
        return self.stats[_POLICY_INDEX[name]]

    def _mean(self, name: str, empty: float = 0.0) -> Tensor:
        return _quotient(self._stat(name), self._stat("tokens"), empty)


class ValueMetrics(NamedTuple):
    """What `value_loss` measured over the live tokens."""

    stats: Tensor

    @property
    def tokens(self) -> Tensor:
        """Live tokens."""
        return self._stat("tokens")

    @property
    def sequences(self) -> Tensor:
        """Sequences with a live token; 0 for packed tensors without cu_seqlens."""
        return self._stat("sequences")

    @property
    def loss(self) -> Tensor:
        """Token mean of the loss, whatever the aggregation."""
        return self._mean("loss")

    @property
    def clip_fraction(self) -> Tensor:
        """Share of tokens whose clipped error is strictly the larger one: they get no gradient."""
        return self._mean("clipped")

    @property
    def value_mean(self) -> Tensor:
        """Mean of the values."""
        return self._mean("value")

    @property
    def return_mean(self) -> Tensor:
        """Mean of the returns."""
        return self._mean("return")

    @property
    def error_mean(self) -> Tensor:
        """Mean of values - returns: the critic's bias."""
        return self._mean("error")

    @property
    def explained_variance(self) -> Tensor:
        """1 - Var(returns - values) / Var(returns).

        Where the returns do not vary (their variance is within the rounding, 1e-14, of their mean
        square) it is 1 if the errors do not vary either, else 0.
        """
        noise = 1e-14 * self._mean("return_square")
        spread = self._mean("return_square") - self._mean("return").square()
        error = (self._mean("error_square") - self._mean("error").square()).clamp(min=0)
        if_constant = torch.where(error <= noise, torch.inf, error)
        return 1 - error / torch.where(spread <= noise, if_constant, spread)

    def as_dict(self) -> dict[str, Tensor]:
        """Every property by name."""
        return {name: getattr(self, name) for name in _properties(ValueMetrics)}

    def _stat(self, name: str) -> Tensor:
        return self.stats[_VALUE_INDEX[name]]

    def _mean(self, name: str) -> Tensor:
        return _quotient(self._stat(name), self._stat("tokens"), 0.0)


class ImportanceMetrics(NamedTuple):
    """What `importance_weights` measured over the live tokens; r = exp(old - rollout logprob)."""

    stats: Tensor

    @property
    def tokens(self) -> Tensor:
        """Live tokens."""
        return self._stat("tokens")

    @property
    def sequences(self) -> Tensor:
        """Sequences with a live token; 0 for packed tensors without cu_seqlens."""
        return self._stat("sequences")

    @property
    def weight_mean(self) -> Tensor:
        """Mean weight; without any live token 1."""
        return self._mean("weight", empty=1.0)

    @property
    def limited_fraction(self) -> Tensor:
        """Share of tokens whose ratio, or that of their sequence, lies outside of [low, high]."""
        return self._mean("limited")

    @property
    def kl_k1(self) -> Tensor:
        """KL(rollout || old) by the mean of -log r over samples of rollout."""
        return self._mean("k1")

    @property
    def kl_k3(self) -> Tensor:
        """KL(rollout || old) by the mean of r - 1 - log r over samples of rollout: never < 0."""
        return self._mean("k3")

    @property
    def ess(self) -> Tensor:
        """Effective sample size (sum w)^2 / sum w^2 as a share of the tokens; 0 if all w are 0.

        Without any live token 1.
        """
        share = _quotient(
            self._stat("weight").square(), self._stat("weight_square") * self._stat("tokens"), 0.0
        )
        return torch.where(self._stat("tokens") > 0, share, 1.0)

    def as_dict(self) -> dict[str, Tensor]:
        """Every property by name."""
        return {name: getattr(self, name) for name in _properties(ImportanceMetrics)}

    def _stat(self, name: str) -> Tensor:
        return self.stats[_IMPORTANCE_INDEX[name]]

    def _mean(self, name: str, empty: float = 0.0) -> Tensor:
        return _quotient(self._stat(name), self._stat("tokens"), empty)


_POLICY_INDEX = {name: i for i, name in enumerate(POLICY_STATS)}
_VALUE_INDEX = {name: i for i, name in enumerate(VALUE_STATS)}
_IMPORTANCE_INDEX = {name: i for i, name in enumerate(IMPORTANCE_STATS)}
_STATS = {
    PolicyMetrics: POLICY_STATS,
    ValueMetrics: VALUE_STATS,
    ImportanceMetrics: IMPORTANCE_STATS,
}
M = TypeVar("M", PolicyMetrics, ValueMetrics, ImportanceMetrics)


def _quotient(total: Tensor, count: Tensor, empty: float) -> Tensor:
    return torch.where(count == 0, empty, total / torch.where(count == 0, 1.0, count))


def _properties(kind: type) -> list[str]:
    return [name for name, member in vars(kind).items() if isinstance(member, property)]


def reduce_metrics(metrics: Sequence[M], group: torch.distributed.ProcessGroup | None = None) -> M:
    """One metrics object for many micro-batches and, with `group`, for all its ranks.

    As if measured in one batch: sums and counts are added and extremes compared, in float64; no
    mean is ever averaged. Only the rounding of float64 sums may differ.

    Args:
        metrics: At least one object, all of one type.
        group: A process group; every rank must call, with the same type, and gets the same result.
            Costs two all-reduces of a dozen numbers.

    Raises:
        TypeError, ValueError: For mixed types, other objects, or nothing to reduce.
    """
    metrics = list(metrics)
    if not metrics:
        raise ValueError("metrics: expected at least one metrics object, got none")
    kinds = sorted({type(m).__name__ for m in metrics})
    if len(kinds) > 1 or type(metrics[0]) not in _STATS:
        raise TypeError(
            f"metrics: expected one of {', '.join(k.__name__ for k in _STATS)}, and the same "
            f"everywhere, got {', '.join(kinds)}"
        )
    kind = type(metrics[0])
    how = _STATS[kind].values()
    stats = torch.stack([m.stats for m in metrics])
    # One maximum serves both extremes.
    sign = torch.tensor([-1.0 if h == "min" else 1.0 for h in how]).to(stats)
    is_sum = torch.tensor([h == "sum" for h in how], device=stats.device)
    sums, extremes = stats.sum(0), (stats * sign).amax(0)
    if group is not None:
        # A rank's maximum may drop the NaN of another: they are counted apart.
        nan = extremes.isnan().to(stats)
        both = torch.stack((sums, nan))
        torch.distributed.all_reduce(both, group=group)
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
        sums, extremes = both[0], torch.where(both[1] > 0, torch.nan, extremes)
    return kind(torch.where(is_sum, sums, extremes * sign))
