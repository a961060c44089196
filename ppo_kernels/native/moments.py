"""masked_sum, masked_mean, moments, whiten_forward, whiten_apply and whiten_backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from . import Native, pointer, rows, rows_cols, two_leading_each


def masked_reduce(
    native: Native, x: Tensor, mask: Tensor | None, dim: int | None, *, mean: bool
) -> tuple[Tensor, Tensor]:
    shape = x.shape
    if dim is None:
        x, mask = two_leading_each(x, mask)
        outer, reduced, inner = *rows_cols(x), 1
        shape = torch.Size(())
    else:
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        reduced = shape[dim] if shape else 1
        x = x.reshape(outer, reduced, inner)
        mask = mask if mask is None else mask.reshape(outer, reduced, inner)
        shape = shape[:dim] + shape[dim + 1 :]
    out = native.empty(shape, _checks.compute_dtype(x))
    count = native.empty(shape, torch.float64)
    native.module.masked_reduce(
        rows(x), rows(mask), outer, reduced, inner, dim is None, mean, pointer(out),
        pointer(count), native.target(),
    )  # fmt: skip
    return out, count


def moments(native: Native, x: Tensor, mask: Tensor | None) -> Tensor:
    x, mask = two_leading_each(x, mask)
    result = native.empty((3,), torch.float64)
    native.module.moments(rows(x), rows(mask), *rows_cols(x), rows(result), native.target())
    return result


def whiten_forward(
    native: Native, x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float
) -> tuple[Tensor, Tensor]:
    state = native.empty((3,), torch.float64)
    return _whiten(native, x, mask, state, True, shift_mean, unbiased, eps), state


def whiten_apply(
    native: Native,
    x: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    return _whiten(native, x, mask, moments, False, shift_mean, unbiased, eps)


def _whiten(
    native: Native,
    x: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    find_moments: bool,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    out = native.empty(x.shape, _checks.compute_dtype(x))
    x, mask = two_leading_each(x, mask)
    native.module.whiten(
        rows(x), rows(mask), rows(moments), find_moments, *rows_cols(x), shift_mean, unbiased,
        eps, pointer(out), native.target(),
    )  # fmt: skip
    return out


def whiten_backward(
    native: Native,
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    grad_x = native.empty(x.shape, x.dtype)
    grad, x, mask = two_leading_each(grad, x, mask)
    native.module.whiten_backward(
        rows(grad), rows(x), rows(mask), rows(moments), *rows_cols(x), shift_mean,
        unbiased, eps, pointer(grad_x), native.target(),
    )  # fmt: skip
    return grad_x
