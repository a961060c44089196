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
from . import _aggregation, _policy, _policy_selection
from ._aggregation import Batch, Frame
from ._policy import Policy, PolicyInput, PolicyTokens
from ._policy_selection import Selection


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
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    cov_ratio: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    kl_coef: float = 1.0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> ClippedLoss:
    r"""PPO's clipped policy loss with its metrics; one pass also makes the gradient.

    Or another policy loss: those of `variant` are listed in docs/variants.md. This one:

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
    sequences, but not under seq-mean-token-mean, gspo or gmpo. clip-cov and kl-cov compare the
    tokens of one call with each other: there parts are not the whole.

    Where samples come from an engine whose probabilities are not quite those of the old policy,
    `importance_weights` gives weights to multiply the advantages by.

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
        clip_low: The lower epsilon, at least 0; of gmpo a bound of the log-ratio. Without effect in
            sapo, gpg and kl-cov, as is clip_high.
        clip_high: The upper epsilon, at least 0; None for clip_low.
        dual_clip: c above, larger than 1, for clip, gspo and clip-cov; None for none.
        variant: clip, cispo, sapo, gpg, gspo, gmpo, clip-cov or kl-cov. With advantages per
            sequence and seq-mean-token-mean, gspo and gmpo are exactly what their papers define.
        aggregation: See the table.
        denominator: D in the table, a number or a 0-d tensor on the same device (never waited for).
            Where it is 0 the loss and its gradient are 0.
        norm_length: For seq-sum-norm, and only there.
        cu_seqlens: [S + 1] int32 or int64, the offsets of the sequences in packed tensors; needed
            where sequences matter. Zero-length sequences are legal.
        log_ratio_clamp: Bounds log r to [-c, c] before the exponential, everywhere below and in the
            metrics; no gradient flows outside, but in cispo and gpg, whose gradient is that of the
            log-probability. None for none.
        tau_pos: The temperature of sapo where A > 0, above 0.
        tau_neg: The other one.
        cov_ratio: The share of the live tokens that clip-cov and kl-cov pick, in (0, 1].
        cov_low: Of the covariances from which clip-cov picks, the lower bound.
        cov_high: And the upper one.
        kl_coef: The coefficient of kl-cov's penalty.
        generator: What clip-cov picks by, on the device of logprobs; None for torch's.
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
    policy = _policy.policy(
        variant, clip_low, clip_high, dual_clip, log_ratio_clamp, tau_pos, tau_neg,
        selections=True,
    )  # fmt: skip
    _policy.sequences(policy, "logprobs", logprobs, cu_seqlens)
    served_by = _LOSS.resolve(logprobs.device, backend)
    args = (logprobs, old_logprobs, advantages, policy, frame)
    if _policy.VARIANTS[variant].kind == "selection":
        how = _policy_selection.selection(cov_ratio, cov_low, cov_high, kl_coef, generator)
        loss, stats = _with_selection(variant, how, served_by, *args)
    else:
        loss, stats = _serve(served_by, *args)
    return ClippedLoss(loss, PolicyMetrics(stats))


def _serve(
    served_by: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    policy: Policy,
    frame: Frame,
) -> tuple[Tensor, Tensor]:
    if served_by == "torch":
        count("clipped_loss", "torch")
        return reference(logprobs, old_logprobs, advantages, policy, frame)
    loss, stats, _ = _LOSS(logprobs, old_logprobs, advantages, *policy, *frame, served_by)
    return loss, stats


def _with_selection(
    variant: str,
    how: Selection,
    served_by: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    policy: Policy,
    frame: Frame,
) -> tuple[Tensor, Tensor]:
    # Two gradients meet here, of which the sum is to be rounded to half precision, not each.
    dtype = _checks.compute_dtype(logprobs, old_logprobs, advantages)
    logprobs = logprobs.to(dtype)
    batch = Batch(logprobs, frame)
    tokens = _policy.inputs(batch, logprobs, old_logprobs, advantages, policy)
    if variant == "clip-cov":
        advantages = _policy_selection.clip_cov(tokens, policy, how)
        return _serve(served_by, logprobs, old_logprobs, advantages, policy, frame)
    loss, stats = _serve(served_by, logprobs, old_logprobs, advantages, policy, frame)
    penalty = _policy_selection.kl_cov(tokens, how)
    stats[list(POLICY_STATS).index("loss")] += penalty.detach().double().sum()
    return loss + batch.aggregate(penalty, frame), stats


def reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    policy: Policy,
    frame: Frame,
) -> tuple[Tensor, Tensor]:
    tokens = _policy.inputs(Batch(logprobs, frame), logprobs, old_logprobs, advantages, policy)
    made = _policy.variant_of(policy).reference(tokens, policy)
    return tokens.batch.aggregate(made.loss, frame), _stats(tokens, made)


@torch.no_grad()
def _stats(tokens: PolicyInput, made: PolicyTokens) -> Tensor:
    live, ratio = tokens.batch.live, tokens.x.exp()
    x, r = tokens.x.double(), torch.where(live, ratio, 0.0).double()
    k3 = torch.where(x.abs() < 1, torch.expm1(x) - x, ratio.double() - 1 - x)
    # A padded element keeps the extremes of an empty batch defined.
    extremes = [torch.where(live, s * ratio, -torch.inf).flatten() for s in (1.0, -1.0)]
    largest, negated_smallest = (
        torch.cat((e, e.new_full((1,), -torch.inf))).amax().double() for e in extremes
    )
    named = {
        "tokens": live.sum(),
        "sequences": tokens.batch.live_sequences(),
        "loss": made.loss.double().sum(),
        "unclipped_loss": (-tokens.advantages * ratio).double().sum(),
        "clipped_high": made.above_high.sum(),
        "clipped_low": made.below_low.sum(),
        "dual_clipped": made.above_dual.sum(),
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
