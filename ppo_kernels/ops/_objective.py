"""What the fused losses make of log-probabilities and entropies: one number, and its gradient.

    loss = loss_scale (policy loss + kl_coef KL - entropy_coef entropy)

each a sum over the live tokens with the weights of one aggregation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from . import _aggregation, _policy, clipped_loss, kl
from ._aggregation import Batch, Frame
from ._policy import Policy

# The last arguments of the fused ops.
SCHEMA: str = (
    "Tensor old_logprobs, Tensor advantages, Tensor? ref_logprobs, Tensor? loss_scale, "
    "bool entropy, float entropy_coef, float kl_coef, str kl_estimator, str kl_gradient, "
    + _policy.SCHEMA
    + _aggregation.FRAME
)


class Objective(NamedTuple):
    """The arguments of `SCHEMA`, those of `Policy` and `Frame` as one each."""

    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    loss_scale: Tensor | None
    entropy: bool
    entropy_coef: float
    kl_coef: float
    kl_estimator: str
    kl_gradient: str
    policy: Policy
    frame: Frame

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> Objective:
        """From the last arguments of an op, without its backend."""
        own = len(cls._fields) - 2
        policy, frame = len(Policy._fields), len(Frame._fields)
        first = len(arguments) - own - policy - frame
        settings: dict[str, Any] = dict(zip(cls._fields, arguments[first:][:own], strict=False))
        return cls(
            **settings,
            policy=Policy(*arguments[-policy - frame : -frame]),
            frame=Frame(*arguments[-frame:]),
        )

    @property
    def whole_sequences(self) -> bool:
        """Whether the loss of a token depends on other tokens."""
        return _policy.variant_of(self.policy).kind != "token"

    @property
    def kl_clamp(self) -> float:
        limit = self.policy.log_ratio_clamp
        return math.inf if limit is None else limit

    def by_tokens(self, tokens: Tensor) -> Objective:
        """With one advantage for each token."""
        batch = Batch(tokens, self.frame)
        return self._replace(advantages=batch.select(self.advantages, self.advantages.dtype))


def arguments(o: Objective) -> tuple[Any, ...]:
    """Those of `SCHEMA`. A function: torch 2.6 compiles no properties of named tuples."""
    *own, policy, frame = o
    return *own, *policy, *frame


def check(
    dtype: torch.dtype,
    tokens: Tensor,
    ignore_index: int,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    policy: Policy,
    aggregation: str,
    denominator: float | Tensor | None,
    norm_length: float | None,
    cu_seqlens: Tensor | None,
    entropy: bool,
    entropy_coef: float,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    kl_gradient: str | None,
    loss_scale: Tensor | None,
) -> Objective:
    """Checks what all fused losses share, and packs it. What follows is computed in `dtype`."""
    frame = _aggregation.frame(
        "tokens", tokens, mask, cu_seqlens, aggregation, denominator, norm_length
    )
    _policy.constants("tokens", tokens, old_logprobs, advantages, cu_seqlens)
    _policy.sequences(policy, "tokens", tokens, cu_seqlens)
    _checks.number("entropy_coef", entropy_coef, low=0)
    _checks.number("kl_coef", kl_coef, low=0)
    _checks.choice("kl_estimator", kl_estimator, kl.ESTIMATORS)
    if kl_gradient is None:
        kl_gradient = kl_estimator
    _checks.choice("kl_gradient", kl_gradient, kl.ESTIMATORS)
    if ref_logprobs is not None:
        _checks.tensor("ref_logprobs", ref_logprobs, _checks.FLOATS)
        _checks.shape("ref_logprobs", ref_logprobs, tokens.shape, "as tokens")
        _checks.device("ref_logprobs", ref_logprobs, tokens, "as tokens")
        _checks.constant("ref_logprobs", ref_logprobs)
    elif kl_coef:
        raise ValueError(f"ref_logprobs: expected a tensor, as kl_coef {kl_coef} needs, got None")
    if loss_scale is not None:
        _checks.tensor("loss_scale", loss_scale, _checks.FLOATS)
        _checks.shape("loss_scale", loss_scale, (), "one number")
        _checks.device("loss_scale", loss_scale, tokens, "as tokens")
        _checks.constant("loss_scale", loss_scale)
    old_logprobs, advantages = _not_wider(old_logprobs, dtype), _not_wider(advantages, dtype)
    if ref_logprobs is not None:
        ref_logprobs = _not_wider(ref_logprobs, dtype)
    live = tokens != ignore_index
    # Field by field: torch 2.6 compiles neither slices of named tuples nor their _replace.
    frame = Frame(
        live if mask is None else live & (mask != 0), frame.cu_seqlens, frame.aggregation,
        frame.denominator, frame.divisor, frame.norm_length, frame.needs_gradient,
    )  # fmt: skip
    return Objective(
        old_logprobs, advantages, ref_logprobs, loss_scale, bool(entropy or entropy_coef),
        float(entropy_coef), float(kl_coef), kl_estimator, kl_gradient, policy, frame,
    )  # fmt: skip


def _not_wider(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.dtype == torch.float64 else t


def reference(logprobs: Tensor, entropies: Tensor, o: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the stats of the policy loss, and its three terms without their coefficients."""
    batch = Batch(logprobs, o.frame)
    policy, stats = clipped_loss.reference(
        logprobs, o.old_logprobs, o.advantages, o.policy, o.frame
    )
    entropy = divergence = torch.zeros_like(policy)
    if o.entropy:
        entropy = batch.aggregate(entropies, o.frame)
    if o.ref_logprobs is not None:
        estimates = kl.reference(
            logprobs, o.ref_logprobs, o.frame.mask, o.kl_estimator, o.kl_gradient, o.kl_clamp
        )
        divergence = batch.aggregate(estimates, o.frame)
    return total(o, policy, entropy, divergence), stats, torch.stack((policy, entropy, divergence))


def total(o: Objective, policy: Tensor, entropy: Tensor, divergence: Tensor) -> Tensor:
    loss = policy
    if o.entropy_coef:
        loss = loss - o.entropy_coef * entropy
    if o.kl_coef:
        loss = loss + o.kl_coef * divergence
    return loss if o.loss_scale is None else loss * o.loss_scale.to(loss.dtype)
