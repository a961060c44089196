"""masked_sum, masked_mean, moments, whiten_forward, whiten_apply and whiten_backward on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from . import _C, empty, pointer, rows, rows_cols, two_leading_each


def masked_reduce(
    x: Tensor, mask: Tensor | None, dim: int | None, *, mean: bool
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
    out = empty(shape, _checks.compute_dtype(x))
    count = empty(shape, torch.float64)
    _C.masked_reduce(
        rows(x), rows(mask), outer, reduced, inner, dim is None, mean, pointer(out),
        pointer(count), torch.get_num_threads(),
    )  # fmt: skip
    return out, count


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    x, mask = two_leading_each(x, mask)
    result = torch.empty(3, dtype=torch.float64)
    _C.moments(rows(x), rows(mask), *rows_cols(x), rows(result), torch.get_num_threads())
    return result


def whiten_forward(
    x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float
) -> tuple[Tensor, Tensor]:
    state = moments(x, mask)
    return whiten_apply(x, mask, state, shift_mean, unbiased, eps), state


def whiten_apply(
    x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    out = empty(x.shape, _checks.compute_dtype(x))
    x, mask = two_leading_each(x, mask)
    _C.whiten(
        rows(x), rows(mask), rows(moments), *rows_cols(x), shift_mean, unbiased, eps,
        pointer(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def whiten_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    moments: Tensor,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> Tensor:
    grad_x = empty(x.shape, x.dtype)
    grad, x, mask = two_leading_each(grad, x, mask)
    _C.whiten_backward(
        rows(grad), rows(x), rows(mask), rows(moments), *rows_cols(x), shift_mean,
        unbiased, eps, pointer(grad_x), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x
