"""PPO's clipped policy objective, its metrics and its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..metrics import POLICY_STATS, PolicyMetrics
from ..native import losses as native
from ..triton import kernel as triton
from . import _aggregation, _policy
from ._aggregation import Batch, Frame
from ._policy import Policy, PolicyTokens


class ClippedLoss(NamedTuple):
    """The policy loss and what was measured on the way."""

    loss: Tensor
    metrics: PolicyMetrics


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    variant: str = "clip",
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    log_ratio_clamp: float | None = None,
    backend: str | None = None,
) -> ClippedLoss:
    r"""PPO's clipped policy loss with its metrics; one pass also makes the gradient.

    .. math::
        r_t &= \exp(\ell_t - \ell_t^{old}) \\
        l_t &= \max\bigl(-A_t r_t,\;
            -A_t\,\mathrm{clip}(r_t, 1 - \epsilon_{low}, 1 + \epsilon_{high})\bigr) \\
        L &= \sum_t w_t\, l_t

    and with `dual_clip` c, where A < 0: min(l, -A c). The weights w belong to `aggregation`:

    ===================  ====================================  ==================================
    aggregation          w of a live token                     D: denominator, or by default
    ===================  ====================================  ==================================
    token-mean           1 / D                                 tokens; the live ones here
    token-sum            1 / D                                 any divisor; 1
    seq-mean-token-sum   1 / D                                 sequences; those with a live token
    seq-mean-token-mean  1 / (D * live tokens of its sequence) sequences; those with a live token
    seq-sum-norm         1 / (D * norm_length)                 sequences; those with a live token
    ===================  ====================================  ==================================

    Give D whenever this call sees a part of a batch (micro-batches, data parallelism): the sum of
    the parts' losses, and of their gradients, then is that of the whole batch. Parts may cut
    sequences, but not under seq-mean-token-mean.

    Clipping (Schulman et al. 2017, arXiv:1707.06347), dual clip (Ye et al. 2020, arXiv:1912.09729),
    asymmetric bounds (DAPO, Yu et al. 2025, arXiv:2503.14476), seq-sum-norm (Dr. GRPO, Liu et al.
    2025, arXiv:2503.20783).

    Equivalent to::

        ratio = (logprobs - old_logprobs).exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        loss = torch.max(-advantages * ratio, -advantages * clipped)[mask].mean()

    Args:
        logprobs: [B, T] or packed [N], fp32, bf16, fp16 or fp64, any strides.
        old_logprobs: As logprobs, of the policy that made the samples; a constant.
        advantages: Per token, as logprobs; or per sequence, [B] or [S] (not expanded in memory); a
            constant. A packed [N] tensor is per token even if N = S.
        mask: As logprobs, any dtype, nonzero = use. What lies under it is never looked at.
        clip_low: The lower epsilon, at least 0.
        clip_high: The upper epsilon, at least 0; None for clip_low.
        dual_clip: c above, larger than 1; None for none.
        variant: A name in `VARIANTS`.
        aggregation: See the table.
        denominator: D in the table, a number or a 0-d tensor on the same device (never waited for).
            Where it is 0 the loss and its gradient are 0.
        norm_length: For seq-sum-norm, and only there.
        cu_seqlens: [S + 1] int32 or int64, the offsets of the sequences in packed tensors; needed
            where sequences matter. Zero-length sequences are legal.
        log_ratio_clamp: Bounds log r to [-c, c] before the exponential, everywhere below and in the
            metrics; no gradient flows outside. None for none.
        backend: See `use_backend`.

    Returns:
        ``ClippedLoss(loss, metrics)``: the 0-d loss, fp32 (fp64 if an input is), and
        `PolicyMetrics` of 0-d tensors. The gradient has logprobs' dtype, rounded once. It is 0
        where a bound is strictly active; at exact ties the unclipped branch is taken, so that
        at r = 1 the gradient is -A w. With no live token the loss is 0 and so is its gradient. A
        NaN in a live input gives NaN.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected.
    """
    _checks.tensor("logprobs", logprobs, _checks.FLOATS)
    frame = _aggregation.frame(
        "logprobs", logprobs, mask, cu_seqlens, aggregation, denominator, norm_length
    )
    _policy.constants("logprobs", logprobs, old_logprobs, advantages, cu_seqlens)
    policy = _policy.policy(variant, clip_low, clip_high, dual_clip, log_ratio_clamp)
    served_by = _LOSS.resolve(logprobs.device, backend)
    if served_by == "torch":
        count("clipped_loss", "torch")
        loss, stats = reference(logprobs, old_logprobs, advantages, policy, frame)
    else:
        loss, stats, _ = _LOSS(logprobs, old_logprobs, advantages, *policy, *frame, served_by)
    return ClippedLoss(loss, PolicyMetrics(stats))


def reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    policy: Policy,
    frame: Frame,
) -> tuple[Tensor, Tensor]:
    batch = Batch(logprobs, frame)
    dtype = _aggregation.result_dtype(logprobs, old_logprobs, advantages)
    log_ratio = batch.select(logprobs, dtype) - batch.select(old_logprobs, dtype)
    advantages = batch.select(advantages, dtype)
    if policy.log_ratio_clamp is not None:
        limit = policy.log_ratio_clamp
        log_ratio = torch.where(log_ratio > limit, limit, log_ratio)
        log_ratio = torch.where(log_ratio < -limit, -limit, log_ratio)
    with torch.no_grad():
        ratio = log_ratio.exp()
        tokens = policy.variant.reference(ratio, advantages, policy)
        stats = _stats(batch, log_ratio, ratio, advantages, tokens)
    # Where a bound cuts the gradient exp may have overflowed; its gradient would be 0 * inf.
    cut = tokens.above_high | tokens.below_low | tokens.above_dual
    flowing = torch.where(cut, 0.0, log_ratio).exp()
    token_loss = torch.where(cut, tokens.loss, -advantages * flowing)
    return batch.aggregate(token_loss, frame), stats


def _stats(
    batch: Batch, log_ratio: Tensor, ratio: Tensor, advantages: Tensor, tokens: PolicyTokens
) -> Tensor:
    live = batch.live
    x, r = log_ratio.double(), torch.where(live, ratio, 0.0).double()
    k3 = torch.where(x.abs() < 1, torch.expm1(x) - x, ratio.double() - 1 - x)
    # A padded element keeps the extremes of an empty batch defined.
    extremes = [torch.where(live, s * ratio, -torch.inf).flatten() for s in (1.0, -1.0)]
    largest, negated_smallest = (
        torch.cat((e, e.new_full((1,), -torch.inf))).amax().double() for e in extremes
    )
    named = {
        "tokens": live.sum(),
        "sequences": batch.live_sequences(),
        "loss": tokens.loss.double().sum(),
        "unclipped_loss": (-advantages * ratio).double().sum(),
        "clipped_high": tokens.above_high.sum(),
        "clipped_low": tokens.below_low.sum(),
        "dual_clipped": tokens.above_dual.sum(),
        "k1": -x.sum(),
        "k3": k3.sum(),
        "ratio": r.sum(),
        "ratio_square": r.square().sum(),
        "ratio_max": largest,
        "ratio_min": -negated_smallest,
    }
    return torch.stack([named[name].double() for name in POLICY_STATS])


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _aggregation.fake(len(POLICY_STATS), args[:3], args[-1])


_LOSS = Op(
    "clipped_loss",
    "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, "
    + _policy.SCHEMA
    + _aggregation.SCHEMA,
    function="clipped_loss",
    fake=_fake,
    autograd=lambda *args: _aggregation.autograd("clipped_loss", *args),
    cpu=cpu(native.clipped_loss),
    cuda=cuda(native.clipped_loss),
    triton=triton("losses", "clipped_loss"),
)
