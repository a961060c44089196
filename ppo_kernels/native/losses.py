"""clipped_loss, value_loss and scale_gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..metrics import POLICY_STATS, VALUE_STATS
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
        (logprobs, old_logprobs, advantages),
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
        (values, old_values, returns),
        (_or_inf(clip), _or_inf(huber_delta)),
        len(VALUE_STATS),
        *frame,
    )


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
    return low, high, _or_inf(dual), _or_inf(log_ratio_clamp)


def _or_inf(bound: float | None) -> float:
    return math.inf if bound is None else bound


def _run(
    native: Native,
    kernel: Any,
    tokens: tuple[Tensor, Tensor | None, Tensor],
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
    live = tokens[0]
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
