"""categorical_kl_forward and categorical_kl_backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _checks
from . import Native, pointer, rows, rows_cols, two_leading, two_leading_each


def categorical_kl_forward(
    native: Native,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    reverse: bool,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    dtype = _checks.compute_dtype(logits, ref_logits)
    shape = logits.shape[:-1]
    kl = native.empty(shape, dtype)
    state = native.empty((*shape, 4), dtype)
    logits, ref_logits = two_leading(logits, 1), two_leading(ref_logits, 1)
    (mask,) = two_leading_each(mask)
    first, second = (ref_logits, logits) if reverse else (logits, ref_logits)
    native.module.categorical_kl_forward(
        rows(first, 1), rows(second, 1), rows(mask), *rows_cols(logits[..., 0]),
        logits.shape[-1], temperature, pointer(kl), pointer(state), native.target(),
    )  # fmt: skip
    return kl, state


def categorical_kl_backward(native: Native, *args: Any) -> Tensor:
    logits: Tensor = args[1]
    grad = native.empty_large(logits.shape, logits.dtype)
    _categorical_kl_backward(native, grad, *args)
    return grad


def categorical_kl_backward_(native: Native, *args: Any) -> None:
    """Over the logits, which are rows [N, V]."""
    _categorical_kl_backward(native, args[1], *args)


def _categorical_kl_backward(
    native: Native,
    grad: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    kl: Tensor,
    state: Tensor,
    reverse: bool,
    temperature: float,
) -> None:
    logits, ref_logits = two_leading(logits, 1), two_leading(ref_logits, 1)
    grad_kl, mask = two_leading_each(grad_kl, mask)
    first, second = (ref_logits, logits) if reverse else (logits, ref_logits)
    native.module.categorical_kl_backward(
        rows(grad_kl), rows(first, 1), rows(second, 1), rows(mask), pointer(kl), pointer(state),
        *rows_cols(grad_kl), logits.shape[-1], reverse, temperature,
        rows(two_leading(grad, 1), 1), native.target(),
    )  # fmt: skip
