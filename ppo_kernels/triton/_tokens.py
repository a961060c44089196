"""Kernels that walk over all tokens of [B, T] or packed [N] tensors, in row-major order."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import strides
from ._math import BAD_OFFSETS, position, report_fault


def _step(t: Tensor) -> int | None:
    """The stride from every token to the next, if it is one."""
    if t.dim() < 2:
        return strides(t)[1]
    (rows, cols), (outer, inner) = t.shape, t.stride()
    if cols == 1:
        return outer
    return inner if rows == 1 or outer == cols * inner else None


class Tokens:
    """How the token tensors of a call are addressed.

    Where one stride walks each of them they are `flat`: kernels then divide no position by `cols`,
    and load 128 bits at a time.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        given = [t for t in tensors if t is not None]
        self.count = given[0].numel()
        self.cols = max(given[0].shape[-1], 1) if given[0].dim() else 1
        self.flat = all(_step(t) is not None for t in given)

    def where(self, t: Tensor | None) -> tuple[Any, ...]:
        """A tensor and its strides, for a kernel."""
        if t is None:
            return None, 0, 0
        return (t, 0, _step(t)) if self.flat else (t, *strides(t))

    def programs(self, block: int) -> int:
        return -(-self.count // block)


@triton.jit
def token_block(tokens, BLOCK: tl.constexpr):
    """Flat positions of a program's tokens, in 64 bits if there are so many, and which exist."""
    i = (tl.program_id(0) + 0 * tokens) * BLOCK + tl.arange(0, BLOCK)
    return i, i < tokens


@triton.jit
def token_offset(i, cols, stride_b, stride_t, FLAT: tl.constexpr):
    if FLAT:
        offset = i.to(tl.int64) * stride_t
    else:
        _, row, col = position(i, cols)
        offset = row * stride_b + col * stride_t
    return offset


@triton.jit
def load_mask(mask, mask_b, mask_t, i, inside, cols, FLAT: tl.constexpr):
    """Which tokens are live; the mask is of any dtype, or None."""
    live = inside
    if mask is not None:
        x = tl.load(mask + token_offset(i, cols, mask_b, mask_t, FLAT), mask=inside, other=0)
        if x.dtype == tl.bfloat16:
            x = x.to(tl.float32)
        live = inside & (x != 0)
    return live


@triton.jit
def load_live(
    x, x_b, x_t, i, inside, live, cols, FLAT: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Tokens as DTYPE. The masked ones are loaded, in whole vectors, and selected away."""
    x = tl.load(x + token_offset(i, cols, x_b, x_t, FLAT), mask=inside, other=0.0).to(DTYPE)
    return tl.where(live, x, 0.0)


@triton.jit
def store_tokens(x, i, values, inside):
    """To a contiguous tensor of any dtype; from fp64 to half by way of fp32."""
    if x.dtype.element_ty.primitive_bitwidth < 32:
        values = values.to(tl.float32)
    tl.store(x + i, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_offset(offsets, stride, k, sequences, tokens):
    """Offset k of cu_seqlens, moved into [0, tokens], and whether it is the first to be wrong."""
    at = tl.load(offsets + k.to(tl.int64) * stride).to(tl.int64)
    before = tl.load(offsets + tl.maximum(k - 1, 0).to(tl.int64) * stride).to(tl.int64)
    wrong = (at < before) | ((k == 0) & (at != 0)) | ((k == sequences) & (at != tokens))
    return tl.minimum(tl.maximum(at, 0), tokens), wrong


@triton.jit
def load_sequence(offsets, stride, k, sequences, tokens, length, faults):
    """Begin and end of sequence k of `sequences`, and whether they are wrong.

    Without offsets, a row of `length`. With them, program `sequences` judges the last offset and
    has no tokens.
    """
    if offsets is None:
        begin = (k + 0 * tokens) * length
        end = begin + length
        wrong = k < 0
    else:
        begin, wrong = load_offset(offsets, stride, k, sequences, tokens)
        if wrong:
            report_fault(faults, k.to(tl.int64), BAD_OFFSETS)
        end, end_wrong = load_offset(
            offsets, stride, tl.minimum(k + 1, sequences), sequences, tokens
        )
        end = tl.maximum(begin, end)
        wrong = wrong | end_wrong
    return begin, end, wrong
