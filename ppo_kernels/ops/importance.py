"""Weights for samples of an engine whose probabilities are not those of the policy it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..metrics import IMPORTANCE_STATS, ImportanceMetrics
from ..native import losses as native
from ..triton import kernel as triton
from . import _aggregation
from ._aggregation import Batch, Frame


class ImportanceWeights(NamedTuple):
    """A weight for every token, and what was measured on the way."""

    weights: Tensor
    metrics: ImportanceMetrics


class Correction(NamedTuple):
    """One kind of weight: `weigh(ratio, low, high)` of the ratio that `log_ratio` makes."""

    formula: str
    paper: str
    log_ratio: Callable[[Batch, Tensor], Tensor]
    weigh: Callable[[Tensor, float, float], Tensor]


def _token(batch: Batch, x: Tensor) -> Tensor:
    return x


def _product(batch: Batch, x: Tensor) -> Tensor:
    return batch.spread(batch.sequence_sums(x))


def _geometric_mean(batch: Batch, x: Tensor) -> Tensor:
    return batch.sequence_means(x)


def _clamp(ratio: Tensor, low: float, high: float) -> Tensor:
    return ratio.clamp(low, high)


def _band(ratio: Tensor, low: float, high: float) -> Tensor:
    return torch.where(_outside(ratio, low, high), 0.0, ratio)


def _keep(ratio: Tensor, low: float, high: float) -> Tensor:
    kept = torch.where(ratio.isnan(), ratio, 1.0)
    return torch.where(_outside(ratio, low, high), 0.0, kept)


def _outside(ratio: Tensor, low: float, high: float) -> Tensor:
    return (ratio < low) | (ratio > high)


_TIS = "Yao et al. 2025, https://fengyao.notion.site/off-policy-rl"
_MASKS = "Liu et al. 2025, https://richardli.xyz/rl-collapse"
# In the order of enum Correction in csrc/kernels.h.
CORRECTIONS = {
    "tis": Correction("clip(r, low, high)", _TIS, _token, _clamp),
    "tis-sequence": Correction("clip(prod r, low, high)", _MASKS, _product, _clamp),
    "tis-geometric": Correction("clip(gmean r, low, high)", _MASKS, _geometric_mean, _clamp),
    "icepop": Correction(
        "r where low <= r <= high, else 0",
        "Ling Team 2025, arXiv:2510.18855",
        _token,
        _band,
    ),
    "mask-sequence": Correction("1 where low <= prod r <= high, else 0", _MASKS, _product, _keep),
    "mask-geometric": Correction(
        "1 where low <= gmean r <= high, else 0", _MASKS, _geometric_mean, _keep
    ),
}


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "tis",
    low: float = 0.0,
    high: float,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> ImportanceWeights:
    r"""Importance weights of tokens that were sampled by another engine than the policy's own.

    The ratio is that of the policy which is trained on the samples, as the trainer computes it, to
    the one that made them:

    .. math:: r_t = \exp(\ell_t^{old} - \ell_t^{rollout})

    ==============  ============================================  =================================
    kind            weight of a live token
    ==============  ============================================  =================================
    tis             r, at least low and at most high              truncated importance sampling
    tis-sequence    so the product of r over its sequence
    tis-geometric   so the geometric mean of r over its sequence
    icepop          r where low <= r <= high, else 0              IcePop
    mask-sequence   1 where low <= product <= high, else 0        a sequence is kept or not
    mask-geometric  1 where low <= geometric mean <= high, else 0
    ==============  ============================================  =================================

    Every policy loss is proportional to its advantages, but for the penalty of kl-cov. So weights
    are applied by multiplying the advantages, here for token-level ones::

        weights, measured = importance_weights(old_logprobs, rollout_logprobs, mask, high=2.0)
        loss, metrics = clipped_loss(logprobs, old_logprobs, advantages * weights, mask)

    Truncated importance sampling: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl.
    IcePop: Ling Team 2025, arXiv:2510.18855. Of sequences: Liu et al. 2025,
    https://richardli.xyz/rl-collapse.

    Equivalent to, for tis::

        weights = (old_logprobs - rollout_logprobs).exp().clamp(low, high)

    Args:
        old_logprobs: [B, T] or packed [N], fp32, bf16, fp16 or fp64, any strides; a constant.
        rollout_logprobs: As old_logprobs, from the engine that sampled; a constant.
        mask: As old_logprobs, any dtype, nonzero = use. What lies under it is never looked at.
        kind: See the table.
        low: The lower bound, at least 0.
        high: The upper bound, at least low. A sequence's product needs a wider band than a ratio.
        cu_seqlens: [S + 1] int32 or int64, the offsets of the sequences in packed tensors; needed
            for kinds of sequences.
        backend: See `use_backend`.

    Returns:
        ``ImportanceWeights(weights, metrics)``: weights shaped as old_logprobs, fp32 (fp64 if an
        input is), 0 under the mask, constants; and `ImportanceMetrics` of 0-d tensors. A NaN in a
        live input gives NaN, in all weights of its sequence where they depend on the sequence.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected.
    """
    _checks.tensor("old_logprobs", old_logprobs, _checks.FLOATS)
    frame = _aggregation.frame(
        "old_logprobs", old_logprobs, mask, cu_seqlens, "token-sum", None, None
    )
    _checks.tensor("rollout_logprobs", rollout_logprobs, _checks.FLOATS)
    _checks.shape("rollout_logprobs", rollout_logprobs, old_logprobs.shape, "as old_logprobs")
    _checks.device("rollout_logprobs", rollout_logprobs, old_logprobs, "as old_logprobs")
    for name, value in (("old_logprobs", old_logprobs), ("rollout_logprobs", rollout_logprobs)):
        _checks.constant(name, value)
    _checks.choice("kind", kind, CORRECTIONS)
    _checks.number("low", low, low=0)
    _checks.number("high", high, low=low)
    correction = CORRECTIONS[kind]
    by_sequence = correction.log_ratio is not _token
    if by_sequence and old_logprobs.dim() == 1 and cu_seqlens is None:
        raise ValueError(
            f"cu_seqlens: expected offsets, as kind {kind!r} needs the sequences of packed "
            "old_logprobs, got None"
        )
    served_by = _WEIGHTS.resolve(old_logprobs.device, backend)
    if served_by == "torch":
        count("importance_weights", "torch")
        weights, stats = _reference(old_logprobs, rollout_logprobs, correction, low, high, frame)
    else:
        code = list(CORRECTIONS).index(kind)
        weights, stats = _WEIGHTS(
            old_logprobs, rollout_logprobs, code, low, high, mask, cu_seqlens, served_by
        )
    return ImportanceWeights(weights, ImportanceMetrics(stats))


@torch.no_grad()
def _reference(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    correction: Correction,
    low: float,
    high: float,
    frame: Frame,
) -> tuple[Tensor, Tensor]:
    """In fp64, rounded once."""
    batch = Batch(old_logprobs, frame)
    wide = torch.float64
    x = batch.select(old_logprobs, wide) - batch.select(rollout_logprobs, wide)
    ratio = correction.log_ratio(batch, x).exp()
    weights = torch.where(batch.live, correction.weigh(ratio, low, high), 0.0)
    named = {
        "tokens": batch.live.sum(),
        "sequences": batch.live_sequences(),
        "weight": weights.sum(),
        "weight_square": weights.square().sum(),
        "limited": (batch.live & _outside(ratio, low, high)).sum(),
        "k1": -x.sum(),
        "k3": torch.where(x.abs() < 1, torch.expm1(x) - x, x.exp() - 1 - x).sum(),
    }
    stats = torch.stack([named[name].double() for name in IMPORTANCE_STATS])
    return weights.to(_checks.compute_dtype(old_logprobs, rollout_logprobs)), stats


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    _, stats, weights = _aggregation.fake(len(IMPORTANCE_STATS), args[:2], True)
    return weights, stats


_WEIGHTS = Op(
    "importance_weights",
    "(Tensor old_logprobs, Tensor rollout_logprobs, int kind, float low, float high, "
    "Tensor? mask, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    function="importance_weights",
    fake=_fake,
    cpu=cpu(native.importance_weights),
    cuda=cuda(native.importance_weights),
    triton=triton("losses_importance", "importance_weights"),
)
