"""The policy losses: their formulas, their settings and the checks of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ._aggregation import Batch

# The arguments of every op that computes a policy loss, behind its tensors and before the frame.
SCHEMA = "float low, float high, float? dual, float? log_ratio_clamp, int variant, "


class Policy(NamedTuple):
    """The arguments of `SCHEMA`.

    `low` and `high` bound the ratio; of gmpo the log-ratio; of sapo they are tau_neg and tau_pos.
    """

    low: float
    high: float
    dual: float | None
    log_ratio_clamp: float | None
    code: int


def name_of(policy: Policy) -> str:
    """A function, as is `variant_of`: torch 2.6 compiles no properties of named tuples."""
    name, *_ = [name for name, variant in VARIANTS.items() if variant.code == policy.code]
    return name


def variant_of(policy: Policy) -> Variant:
    return VARIANTS[name_of(policy)]


class PolicyInput(NamedTuple):
    """The tokens of a batch, the masked ones 0; x = log ratio, clamped."""

    batch: Batch
    logprobs: Tensor
    x: Tensor
    advantages: Tensor


def inputs(
    batch: Batch, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, policy: Policy
) -> PolicyInput:
    dtype = _checks.compute_dtype(logprobs, old_logprobs, advantages)
    logprobs = batch.select(logprobs, dtype)
    x = logprobs - batch.select(old_logprobs, dtype)
    if policy.log_ratio_clamp is not None:
        limit = policy.log_ratio_clamp
        x = torch.where(x > limit, limit, x)
        x = torch.where(x < -limit, -limit, x)
    return PolicyInput(batch, logprobs, x, batch.select(advantages, dtype))


class PolicyTokens(NamedTuple):
    """What a variant makes of each token; the flags say which bound replaced the ratio."""

    loss: Tensor
    above_high: Tensor
    below_low: Tensor
    above_dual: Tensor


Reference = Callable[[PolicyInput, Policy], PolicyTokens]


class Variant(NamedTuple):
    """One policy loss. `code` is its enum PolicyVariant in csrc/kernels.h.

    Of the kind "token" the loss and gradient of a token follow from that token alone; of the kind
    "sequence" they need all tokens of its sequence; of the kind "selection" those of the batch,
    from which `_selection.py` picks some before the tokens are looked at.
    """

    code: int
    kind: str
    formula: str
    paper: str
    reference: Reference


def _clip_at(ratio: Tensor, flowing: Tensor, advantages: Tensor, policy: Policy) -> PolicyTokens:
    """`flowing` gives the ratio as what it is differentiated by, which may overflow where cut."""
    above_high = (advantages > 0) & (ratio > policy.high)
    below_low = (advantages < 0) & (ratio < policy.low)
    above_dual = torch.zeros_like(above_high)
    bound = torch.where(above_high, policy.high, torch.where(below_low, policy.low, ratio))
    if policy.dual is not None:
        above_dual = (advantages < 0) & (ratio > policy.dual)
        bound = torch.where(above_dual, policy.dual, bound)
    cut = above_high | below_low | above_dual
    bounded = torch.where(cut, bound, torch.where(cut, 0.0, flowing).exp())
    return PolicyTokens(-advantages * bounded, above_high, below_low, above_dual)


def _clip(tokens: PolicyInput, policy: Policy) -> PolicyTokens:
    return _clip_at(tokens.x.detach().exp(), tokens.x, tokens.advantages, policy)


def _cispo(tokens: PolicyInput, policy: Policy) -> PolicyTokens:
    ratio = tokens.x.detach().exp()
    above_high, below_low = ratio > policy.high, ratio < policy.low
    weight = torch.where(above_high, policy.high, torch.where(below_low, policy.low, ratio))
    loss = -weight * tokens.advantages * tokens.logprobs
    return PolicyTokens(loss, above_high, below_low, torch.zeros_like(above_high))


def _sapo(tokens: PolicyInput, policy: Policy) -> PolicyTokens:
    tau_neg = torch.full_like(tokens.x, policy.low)
    tau = torch.where(tokens.advantages > 0, policy.high, tau_neg)
    # Where the ratio overflows the gate is 1, and its gradient would be 0 * inf.
    open_gate = torch.expm1(tokens.x.detach()) == torch.inf
    z = tau * torch.expm1(torch.where(open_gate, 0.0, tokens.x))
    gate = torch.where(open_gate, 1.0, z.sigmoid())
    return _never_cut(-tokens.advantages * (4 * gate / tau))


def _gpg(tokens: PolicyInput, policy: Policy) -> PolicyTokens:
    return _never_cut(-tokens.advantages * tokens.logprobs)


def _gspo(tokens: PolicyInput, policy: Policy) -> PolicyTokens:
    mean = tokens.batch.sequence_means(tokens.x.detach())
    flowing = mean + (tokens.x - tokens.x.detach())
    return _clip_at(mean.exp(), flowing, tokens.advantages, policy)


def _gmpo(tokens: PolicyInput, policy: Policy) -> PolicyTokens:
    batch, x, advantages = tokens.batch, tokens.x, tokens.advantages
    above_high = (advantages > 0) & (x > policy.high)
    below_low = (advantages < 0) & (x < policy.low)
    x = torch.where(above_high, policy.high, torch.where(below_low, policy.low, x))
    loss = -batch.sequence_means(advantages) * batch.sequence_means(x).exp()
    return PolicyTokens(loss, above_high, below_low, torch.zeros_like(above_high))


def _never_cut(loss: Tensor) -> PolicyTokens:
    never = torch.zeros_like(loss, dtype=torch.bool)
    return PolicyTokens(loss, never, never, never)


VARIANTS = {
    "clip": Variant(
        0,
        "token",
        "max(-A r, -A clip(r, 1 - low, 1 + high)); where A < 0 at most -A dual_clip",
        "Schulman et al. 2017, arXiv:1707.06347; dual clip: Ye et al. 2020, arXiv:1912.09729; "
        "low != high (clip-higher): Yu et al. 2025, arXiv:2503.14476",
        _clip,
    ),
    "cispo": Variant(
        1,
        "token",
        "-sg[clip(r, 1 - low, 1 + high)] A log p",
        "MiniMax 2025, arXiv:2506.13585",
        _cispo,
    ),
    "sapo": Variant(
        2,
        "token",
        "-A (4 / tau) sigmoid(tau (r - 1)); tau = tau_pos where A > 0, else tau_neg",
        "Gao et al. 2025, arXiv:2511.20347",
        _sapo,
    ),
    "gpg": Variant(
        3,
        "token",
        "-A log p",
        "Chu et al. 2025, arXiv:2504.02546",
        _gpg,
    ),
    "gspo": Variant(
        4,
        "sequence",
        "clip at s p / sg[p] in the place of r; s = sg[exp(mean of log r over the sequence)]",
        "Zheng et al. 2025, arXiv:2507.18071",
        _gspo,
    ),
    "gmpo": Variant(
        5,
        "sequence",
        "-mean(A) exp(mean(x)); x = min(log r, high) where A > 0, max(log r, -low) where A < 0",
        "Zhao et al. 2025, arXiv:2507.20673",
        _gmpo,
    ),
    "clip-cov": Variant(
        0,
        "selection",
        "clip, but 0 for a random share cov_ratio of the tokens, among those that are not clipped "
        "and have cov_low < (A - mean A) (log p - mean log p) < cov_high",
        "Cui et al. 2025, arXiv:2505.22617",
        _clip,
    ),
    "kl-cov": Variant(
        0,
        "selection",
        "-A r, and + kl_coef |log r| for the share cov_ratio of the tokens with the largest "
        "(A - mean A) (log p - mean log p)",
        "Cui et al. 2025, arXiv:2505.22617",
        _clip,
    ),
}
_WITH_DUAL_CLIP = ("clip", "gspo", "clip-cov")


def policy(
    variant: str,
    clip_low: float,
    clip_high: float | None,
    dual_clip: float | None,
    log_ratio_clamp: float | None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    *,
    selections: bool = False,
) -> Policy:
    """Checks the settings that all functions with a policy loss share.

    With `selections` the caller picks the tokens of variants of that kind.
    """
    if variant not in VARIANTS:
        _checks.choice("variant", variant, VARIANTS)
    if VARIANTS[variant].kind == "selection" and not selections:
        raise ValueError(
            f"variant: expected another than {variant!r}, for which only clipped_loss picks tokens"
        )
    _checks.number("clip_low", clip_low, low=0)
    if clip_high is None:
        clip_high = clip_low
    else:
        _checks.number("clip_high", clip_high, low=0)
    if dual_clip is not None:
        _checks.number("dual_clip", dual_clip, low=1, open_low=True)
        if variant not in _WITH_DUAL_CLIP:
            raise ValueError(
                f"dual_clip: expected None, as only {', '.join(_WITH_DUAL_CLIP)} use it, "
                f"got {dual_clip}"
            )
    if log_ratio_clamp is not None:
        _checks.number("log_ratio_clamp", log_ratio_clamp, low=0, open_low=True)
    _checks.number("tau_pos", tau_pos, low=0, open_low=True)
    _checks.number("tau_neg", tau_neg, low=0, open_low=True)
    low, high = 1 - clip_low, 1 + clip_high
    if variant == "gmpo":
        low, high = -clip_low, clip_high
    elif variant == "sapo":
        low, high = tau_neg, tau_pos
    elif variant == "kl-cov":
        low, high = -math.inf, math.inf
    return Policy(low, high, dual_clip, log_ratio_clamp, VARIANTS[variant].code)


def sequences(policy: Policy, live_name: str, live: Tensor, cu_seqlens: Tensor | None) -> None:
    """Checks that there are sequences if the variant needs them."""
    if variant_of(policy).kind == "sequence" and live.dim() == 1 and cu_seqlens is None:
        raise ValueError(
            f"cu_seqlens: expected offsets, as variant {name_of(policy)!r} needs the sequences of "
            f"packed {live_name}, got None"
        )


def constants(
    live_name: str,
    live: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
) -> None:
    """Checks what the objective treats as constants, against tokens shaped as `live`."""
    like = f"as {live_name}"
    _checks.tensor("old_logprobs", old_logprobs, _checks.FLOATS)
    _checks.shape("old_logprobs", old_logprobs, live.shape, like)
    _checks.device("old_logprobs", old_logprobs, live, like)
    _checks.constant("old_logprobs", old_logprobs)
    _checks.tensor("advantages", advantages, _checks.FLOATS)
    if advantages.shape != live.shape:
        sequences = None
        if live.dim() == 2:
            sequences = live.shape[0]
        elif cu_seqlens is not None:
            sequences = cu_seqlens.shape[0] - 1
        if advantages.dim() != 1 or advantages.shape[0] != sequences:
            per_sequence = "" if sequences is None else f" or [{sequences}] (one per sequence)"
            raise ValueError(
                f"advantages: expected shape {list(live.shape)} ({like}){per_sequence}, "
                f"got {list(advantages.shape)}"
            )
    _checks.device("advantages", advantages, live, like)
    _checks.constant("advantages", advantages)
