"""The policy losses: their formulas, their settings and the checks of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks

# The arguments of every op that computes a policy loss, behind its tensors and before the frame.
SCHEMA = "float low, float high, float? dual, float? log_ratio_clamp, int variant, "


class Policy(NamedTuple):
    """The arguments of `SCHEMA`; `low` and `high` bound the ratio."""

    low: float
    high: float
    dual: float | None
    log_ratio_clamp: float | None
    code: int

    @property
    def variant(self) -> Variant:
        return _BY_CODE[self.code]


class PolicyTokens(NamedTuple):
    """What a variant makes of each token; the flags say which bound cut its gradient."""

    loss: Tensor
    above_high: Tensor
    below_low: Tensor
    above_dual: Tensor


class Variant(NamedTuple):
    """One policy loss. `code` is its enum PolicyVariant in csrc/kernels.h.

    Of the kind "token" loss and gradient of a token follow from that token alone.
    """

    code: int
    kind: str
    formula: str
    paper: str
    reference: Callable[[Tensor, Tensor, Policy], PolicyTokens]


def _clip(ratio: Tensor, advantages: Tensor, policy: Policy) -> PolicyTokens:
    above_high = (advantages > 0) & (ratio > policy.high)
    below_low = (advantages < 0) & (ratio < policy.low)
    above_dual = torch.zeros_like(above_high)
    if policy.dual is not None:
        above_dual = (advantages < 0) & (ratio > policy.dual)
    bounded = torch.where(above_high, policy.high, torch.where(below_low, policy.low, ratio))
    if policy.dual is not None:
        bounded = torch.where(above_dual, policy.dual, bounded)
    return PolicyTokens(-advantages * bounded, above_high, below_low, above_dual)


VARIANTS = {
    "clip": Variant(
        0,
        "token",
        "max(-A r, -A clip(r, 1 - low, 1 + high)); where A < 0 at most -A dual_clip",
        "Schulman et al. 2017, arXiv:1707.06347; dual clip: Ye et al. 2020, arXiv:1912.09729",
        _clip,
    ),
}
_BY_CODE = {variant.code: variant for variant in VARIANTS.values()}


def policy(
    variant: str,
    clip_low: float,
    clip_high: float | None,
    dual_clip: float | None,
    log_ratio_clamp: float | None,
) -> Policy:
    """Checks the settings that all functions with a policy loss share."""
    if variant not in VARIANTS:
        _checks.choice("variant", variant, VARIANTS)
    _checks.number("clip_low", clip_low, low=0)
    if clip_high is None:
        clip_high = clip_low
    else:
        _checks.number("clip_high", clip_high, low=0)
    if dual_clip is not None:
        _checks.number("dual_clip", dual_clip, low=1, open_low=True)
    if log_ratio_clamp is not None:
        _checks.number("log_ratio_clamp", log_ratio_clamp, low=0, open_low=True)
    return Policy(1 - clip_low, 1 + clip_high, dual_clip, log_ratio_clamp, VARIANTS[variant].code)


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
