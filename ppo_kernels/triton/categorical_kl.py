"""categorical_kl_forward and categorical_kl_backward in Triton.

KL(a || b), with a the policy and b the reference, or the other way round. Each row of either is
summed against its running maximum, elements equal to it apart from the rest: log(sum) = log1p(rest)
keeps its relative accuracy where one token holds all the mass, as in ``csrc/math/logprob.h``. With
y = (u - maximum) / temperature, in units of log 2,

    slope = sum of 2^ya (ya - yb),    KL = slope / mass of a + log mass of b - log mass of a

so that equal rows give exactly 0. One program sums a row, every lane in order of the columns, and
the lanes are added in a fixed tree.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ..native import two_leading, two_leading_each
from . import _configs
from ._launch import as_bytes, launch, strides
from ._math import INF, LN2, LOG2E, expm1, log1p, nonzero, position, tree_sum

_UNSPECIALIZED = ("cols", "mask_b", "mask_t")


@triton.jit
def _raise(highest, top, gain):
    """A new maximum, and the logarithm of what sums against the old one are to be multiplied by.

    Before the first finite element there is nothing to rescale but a NaN.
    """
    new = tl.where(top > highest, top, highest)
    gap = tl.where(highest == -INF, 0.0, (highest - new) * gain)
    return new, gap


@triton.jit
def _log_sum(at_max, rest):
    return tl.where((at_max == 1.0) & (rest <= 1.0), log1p(rest), tl.log(at_max + rest))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    a, a_b, a_t, a_v, b, b_b, b_t, b_v, mask, mask_b, mask_t, kl, state,
    cols, vocab, gain: tl.float64, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per row. State: maximum and log of the sum, of a and of b."""
    i, row, col = position(tl.program_id(0), cols)
    state += 4 * i
    if mask is not None:  # noqa: SIM102  # not one condition: an absent mask is no operand
        if nonzero(tl.load(mask + row * mask_b + col * mask_t)) == 0:
            tl.store(kl + i, 0.0)
            for k in tl.static_range(4):
                tl.store(state + k, 0.0)
            return
    a += row * a_b + col * a_t
    b += row * b_b + col * b_t
    narrow_gain = gain.to(DTYPE)
    a_max = tl.full([], -INF, DTYPE)
    b_max = tl.full([], -INF, DTYPE)
    a_at_max = tl.zeros([BLOCK], DTYPE)
    b_at_max = tl.zeros([BLOCK], DTYPE)
    a_rest = tl.zeros([BLOCK], DTYPE)
    b_rest = tl.zeros([BLOCK], DTYPE)
    slope = tl.zeros([BLOCK], DTYPE)
    forbidden = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        columns = columns.to(tl.int64)
        u = tl.load(a + columns * a_v, mask=inside, other=-INF).to(DTYPE)
        v = tl.load(b + columns * b_v, mask=inside, other=-INF).to(DTYPE)
        a_top, b_top = tl.max(u, axis=0), tl.max(v, axis=0)
        if (a_top > a_max) | (b_top > b_max):
            a_new, a_gap = _raise(a_max, a_top, narrow_gain)
            b_new, b_gap = _raise(b_max, b_top, narrow_gain)
            a_weight, b_weight = tl.exp2(a_gap), tl.exp2(b_gap)
            slope = a_weight * (slope + (a_gap - b_gap) * (a_at_max + a_rest))
            a_rest = tl.where(a_new > a_max, a_weight * (a_at_max + a_rest), a_rest)
            b_rest = tl.where(b_new > b_max, b_weight * (b_at_max + b_rest), b_rest)
            a_at_max = tl.where(a_new > a_max, 0.0, a_at_max)
            b_at_max = tl.where(b_new > b_max, 0.0, b_at_max)
            a_max, b_max = a_new, b_new
        a_reference = tl.where(a_max == -INF, 0.0, a_max)
        b_reference = tl.where(b_max == -INF, 0.0, b_max)
        ya, yb = (u - a_reference) * narrow_gain, (v - b_reference) * narrow_gain
        ea, eb = tl.exp2(ya), tl.exp2(yb)
        a_equal, b_equal = u == a_reference, v == b_reference
        a_at_max += tl.where(a_equal, 1.0, 0.0)
        b_at_max += tl.where(b_equal, 1.0, 0.0)
        a_rest += tl.where(a_equal, 0.0, ea)
        b_rest += tl.where(b_equal, 0.0, eb)
        forbidden |= ((u > -INF) & (v == -INF)).to(tl.int32)
        slope += tl.where((ea == 0.0) | (v == -INF), 0.0, ea * (ya - yb))
    a_at, b_at = tl.sum(a_at_max, axis=0), tl.sum(b_at_max, axis=0)  # whole numbers: exact
    a_left, b_left = tree_sum(a_rest), tree_sum(b_rest)
    a_log, b_log = _log_sum(a_at, a_left), _log_sum(b_at, b_left)
    result = tree_sum(slope) * LN2 / (a_at + a_left) + (b_log - a_log)
    result += tl.where(tl.max(forbidden, axis=0) > 0, INF, 0.0)
    hopeless = (tl.abs(a_max) == INF) | (tl.abs(b_max) == INF)
    result = tl.where(hopeless, float("nan"), result)
    tl.store(kl + i, result)
    tl.store(state, a_max)
    tl.store(state + 1, a_log)
    tl.store(state + 2, b_max)
    tl.store(state + 3, b_log)


@triton.jit(do_not_specialize=(*_UNSPECIALIZED, "blocks", "g_b", "g_t"))
def backward_kernel(
    grad_kl, g_b, g_t, a, a_b, a_t, a_v, b, b_b, b_t, b_v, mask, mask_b, mask_t, kl, state, grad,
    blocks, cols, vocab, gain: tl.float64,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per block of a row: the gradient of a's logits, with REVERSE of b's."""
    program = tl.program_id(0)
    i, row, col = position(program // blocks, cols)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    grad += i * vocab + columns
    g = tl.load(grad_kl + row * g_b + col * g_t).to(DTYPE)
    asked = g != 0.0
    if mask is not None:
        asked = asked & nonzero(tl.load(mask + row * mask_b + col * mask_t))
    total = tl.load(kl + i)
    defined = tl.abs(total) < INF
    if ~(asked & defined):
        fill = tl.where(asked, float("nan"), 0.0)
        tl.store(grad, tl.full([BLOCK], 0.0, DTYPE) + fill, mask=inside)
        return
    state += 4 * i
    columns = columns.to(tl.int64)
    u = tl.load(a + row * a_b + col * a_t + columns * a_v, mask=inside, other=0.0).to(DTYPE)
    v = tl.load(b + row * b_b + col * b_t + columns * b_v, mask=inside, other=0.0).to(DTYPE)
    narrow_gain = gain.to(DTYPE)
    ya = (u - tl.load(state)) * narrow_gain
    yb = (v - tl.load(state + 2)) * narrow_gain
    a_log, b_log = tl.load(state + 1), tl.load(state + 3)
    p = tl.exp2(ya - a_log * LOG2E)
    gap = (ya - yb) * LN2 + (b_log - a_log)  # log p_a - log p_b
    if REVERSE:
        # p_b - p_a without the cancellation of nearly equal numbers.
        q = tl.exp2(yb - b_log * LOG2E)
        y = tl.where(gap > 0.0, p, -q) * expm1(-tl.abs(gap))
        y = tl.where((p == 0.0) & (q == 0.0), 0.0, y)
    else:
        y = tl.where(p == 0.0, 0.0, p * (gap - total))
    tl.store(grad, (g * (gain * LN2).to(DTYPE)) * y, mask=inside)


def _arguments(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, reverse: bool, temperature: float
) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """The rows as both kernels take them, and the settings."""
    first, second = (ref_logits, logits) if reverse else (logits, ref_logits)
    first, second = two_leading(first, 1), two_leading(second, 1)
    (mask,) = two_leading_each(as_bytes(mask))
    cols = max(logits.shape[-2], 1) if logits.dim() > 1 else 1
    rows = (first, *strides(first, 1), second, *strides(second, 1), mask, *strides(mask))
    return rows, (cols, logits.shape[-1], math.log2(math.e) / temperature)


def categorical_kl_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, reverse: bool, temperature: float
) -> tuple[Tensor, Tensor]:
    dtype = _checks.compute_dtype(logits, ref_logits)
    shape = logits.shape[:-1]
    kl = logits.new_empty(shape, dtype=dtype)
    state = logits.new_empty((*shape, 4), dtype=dtype)
    rows, settings = _arguments(logits, ref_logits, mask, reverse, temperature)
    wide = dtype == torch.float64
    config = (_configs.KL_FORWARD_FP64 if wide else _configs.KL_FORWARD).choose(logits.shape[-1])
    launch(
        forward_kernel, kl.numel(), *rows, kl, state, *settings,
        config=config, BLOCK=config.block, DTYPE=tl.float64 if wide else tl.float32,
    )  # fmt: skip
    return kl, state


def categorical_kl_backward(
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    kl: Tensor,
    state: Tensor,
    reverse: bool,
    temperature: float,
) -> Tensor:
    grad = logits.new_empty(logits.shape)
    rows, settings = _arguments(logits, ref_logits, mask, reverse, temperature)
    (grad_kl,) = two_leading_each(grad_kl)
    wide = kl.dtype == torch.float64
    config = (_configs.KL_BACKWARD_FP64 if wide else _configs.KL_BACKWARD).choose(logits.shape[-1])
    blocks = triton.cdiv(logits.shape[-1], config.block)
    launch(
        backward_kernel, kl.numel() * blocks, grad_kl, *strides(grad_kl), *rows, kl, state, grad,
        blocks, *settings, config=config, BLOCK=config.block, REVERSE=reverse,
        DTYPE=tl.float64 if wide else tl.float32,
    )  # fmt: skip
    return grad
