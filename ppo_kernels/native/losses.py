"""clipped_loss, value_loss, importance_weights and scale_gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..metrics import IMPORTANCE_STATS, POLICY_STATS, VALUE_STATS
from . import Native, rows, rows_cols


def clipped_loss(
    native: Native,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    dual: float | None,
    log_ratio_clamp: float | None,
    variant: int,
    *frame: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(
        native,
        native.module.clipped_loss,
        logprobs,
        (old_logprobs, advantages),
        (advantages.shape != logprobs.shape, variant, *numbers(low, high, dual, log_ratio_clamp)),
        len(POLICY_STATS),
        *frame,
    )


def value_loss(
    native: Native,
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    clip: float | None,
    huber_delta: float | None,
    *frame: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(
        native,
        native.module.value_loss,
        values,
        (old_values, returns),
        (or_inf(clip), or_inf(huber_delta)),
        len(VALUE_STATS),
        *frame,
    )


def importance_weights(
    native: Native,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    kind: int,
    low: float,
    high: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _, stats, weights = _run(
        native,
        native.module.importance_weights,
        old_logprobs,
        (rollout_logprobs,),
        (kind, low, high),
        len(IMPORTANCE_STATS),
        *unscaled(mask, cu_seqlens),
    )
    return weights, stats


def scale_gradient(
    native: Native, gradient: Tensor, upstream: Tensor, dtype: torch.dtype
) -> Tensor:
    scaled = native.empty(gradient.shape, dtype)
    _scale(native, gradient.contiguous(), upstream, scaled)
    return scaled


def scale_gradient_(native: Native, gradient: Tensor, upstream: Tensor) -> None:
    _scale(native, gradient, upstream, gradient)


def _scale(native: Native, gradient: Tensor, upstream: Tensor, to: Tensor) -> None:
    native.module.scale_gradient(
        rows(gradient.view(-1)), rows(upstream), to.numel(), rows(to.view(-1)), native.target()
    )


def numbers(
    low: float, high: float, dual: float | None, log_ratio_clamp: float | None
) -> tuple[float, float, float, float]:
    """What kernels are told of a policy's settings."""
    return low, high, or_inf(dual), or_inf(log_ratio_clamp)


def or_inf(bound: float | None) -> float:
    return math.inf if bound is None else bound


def unscaled(mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Any, ...]:
    """The frame of a sum of tokens: gradients are slopes, times 1."""
    return mask, cu_seqlens, 1, None, 1.0, None, True


def _run(
    native: Native,
    kernel: Any,
    live: Tensor,
    others: tuple[Tensor | None, ...],
    settings: tuple[Any, ...],
    stats_size: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    aggregation: int,
    denominator: Tensor | None,
    divisor: float | None,
    norm_length: float | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = (live, *others)
    dtype = torch.float32
    for t in tokens:
        if t is not None and t.dtype == torch.float64:
            dtype = torch.float64
    loss = native.empty((), dtype)
    stats = native.empty((stats_size,), torch.float64)
    gradient = native.empty(live.shape if needs_gradient else (0,), dtype)
    sequences = live.shape[0] if live.dim() == 2 else 0
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
    fault = kernel(
        *map(rows, tokens), *settings,
        rows(mask), rows(cu_seqlens), rows(denominator), *rows_cols(live), sequences,
        aggregation, -1.0 if divisor is None else divisor, norm_length or 1.0,
        rows(loss), rows(stats), rows(gradient) if needs_gradient else None,
        native.target(),
    )  # fmt: skip
    if fault is not None:
        assert cu_seqlens is not None
        _checks.cu_seqlens_contents(cu_seqlens, live.shape[0])
    return loss, stats, gradient
