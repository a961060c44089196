"""Tokens picked by the covariance of their advantage and log-probability: clip-cov and kl-cov.

Torch picks them, on any device and without waiting for it; the tokens themselves are left to the
backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ._policy import Policy, PolicyInput, variant_of


class Selection(NamedTuple):
    """What is picked: a share of the live tokens; `low` and `high` bound their covariance."""

    share: float
    low: float
    high: float
    kl_coef: float
    generator: torch.Generator | None


def selection(
    cov_ratio: float,
    cov_low: float,
    cov_high: float,
    kl_coef: float,
    generator: torch.Generator | None,
) -> Selection:
    """Checks the settings."""
    _checks.number("cov_ratio", cov_ratio, low=0, high=1, open_low=True)
    _checks.number("cov_low", cov_low)
    _checks.number("cov_high", cov_high, low=cov_low)
    _checks.number("kl_coef", kl_coef, low=0)
    return Selection(cov_ratio, cov_low, cov_high, kl_coef, generator)


@torch.no_grad()
def clip_cov(tokens: PolicyInput, policy: Policy, how: Selection) -> Tensor:
    """The advantages, 0 for the picked tokens: so are then their loss and their gradient."""
    made = variant_of(policy).reference(tokens, policy)
    clipped = made.above_high | made.below_low | made.above_dual
    covariance = _covariance(tokens)
    candidates = tokens.batch.live & ~clipped & tokens.x.exp().isfinite()
    candidates &= (covariance > how.low) & (covariance < how.high)
    chance = torch.rand(
        covariance.shape, generator=how.generator, device=covariance.device, dtype=torch.float64
    )
    return torch.where(_largest(chance, candidates, tokens, how), 0.0, tokens.advantages)


def kl_cov(tokens: PolicyInput, how: Selection) -> Tensor:
    """What is added to the losses of the tokens."""
    picked = _largest(_covariance(tokens), tokens.batch.live, tokens, how)
    return torch.where(picked, how.kl_coef * tokens.x.abs(), 0.0)


@torch.no_grad()
def _covariance(tokens: PolicyInput) -> Tensor:
    count = tokens.batch.live.sum().clamp(min=1)
    a, b = (t.double() for t in (tokens.advantages, tokens.logprobs))
    return (a - a.sum() / count) * (b - b.sum() / count)


def _largest(key: Tensor, candidates: Tensor, tokens: PolicyInput, how: Selection) -> Tensor:
    """Which candidates have the largest keys, as many as are to be picked, but at least one."""
    count = (how.share * tokens.batch.live.sum().double()).floor().clamp(min=1)
    order = torch.where(candidates, key, -torch.inf).flatten().argsort(descending=True, stable=True)
    picked = torch.zeros_like(candidates).flatten()
    picked[order] = torch.arange(order.numel(), device=order.device) < count
    return picked.view(key.shape) & candidates
