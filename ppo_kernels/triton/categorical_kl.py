"""categorical_kl_forward and categorical_kl_backward in Triton.

KL(a || b), with a the policy and b the reference, or the other way round. The formulas are those of
``csrc/math/categorical_kl.h``: each row is summed against its own maximum, elements equal to it
apart from the rest, and what is summed for the divergence is made of differences, so that equal
rows give exactly 0. With y = (u - maximum) / temperature, in units of log 2,

    slope = sum of 2^ya (ya - yb),    KL = slope / mass of a + log mass of b - log mass of a

A row is cut into segments of a fixed number of columns, as in ``logprob.py``. Within a segment
every lane of a block has sums of its own, in order of the columns; lanes are added in a fixed tree,
segments are merged in order. Few long rows give one program to each segment and merge in a second
kernel: the same device functions in the same order, hence the same bits.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from .._devices import processors
from ..native import two_leading, two_leading_each
from . import _configs
from ._launch import as_bytes, launch, strides
from ._math import (
    INF,
    LN2,
    LOG2E,
    exp2_of_double,
    expm1,
    log1p,
    nonzero,
    position,
    tree_sum,
)

_UNSPECIALIZED = ("cols", "mask_b", "mask_t")
# Logits are summed times a power of 2, which is exact: where -3e38 takes the place of -inf,
# differences of the logits themselves overflow, and their sums.
_SMALL = tl.constexpr(2.0**-24)


@triton.jit
def _live(mask, mask_b, mask_t, row, col):
    live = True
    if mask is not None:
        live = nonzero(tl.load(mask + row * mask_b + col * mask_t))
    return live


@triton.jit
def _raise(highest, top):
    """A new maximum, and by how much it is above the old one, negated.

    Before the first finite element there is nothing to rescale but a NaN.
    """
    new = tl.where(top > highest, top, highest)
    return new, tl.where(highest == -INF, 0.0, highest - new)


@triton.jit
def _sum_segment(
    a, a_v, b, b_v, begin, end, gain, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Sums over columns [begin, end), and the slope: inf where b alone forbids a token."""
    gain = gain.to(DTYPE)
    a_max = tl.full([], -INF, DTYPE)
    b_max = tl.full([], -INF, DTYPE)
    a_at_max = tl.zeros([BLOCK], DTYPE)
    b_at_max = tl.zeros([BLOCK], DTYPE)
    a_rest = tl.zeros([BLOCK], DTYPE)
    b_rest = tl.zeros([BLOCK], DTYPE)
    slope = tl.zeros([BLOCK], DTYPE)
    forbidden = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < end
        columns = columns.to(tl.int64)
        u = tl.load(a + columns * a_v, mask=inside, other=-INF).to(DTYPE) * _SMALL
        v = tl.load(b + columns * b_v, mask=inside, other=-INF).to(DTYPE) * _SMALL
        a_top, b_top = tl.max(u, axis=0), tl.max(v, axis=0)
        if (a_top > a_max) | (b_top > b_max):
            a_new, a_gap = _raise(a_max, a_top)
            b_new, b_gap = _raise(b_max, b_top)
            a_weight, b_weight = tl.exp2(a_gap * gain), tl.exp2(b_gap * gain)
            slope = a_weight * (slope + (a_gap - b_gap) * (a_at_max + a_rest))
            a_rest = tl.where(a_new > a_max, a_weight * (a_at_max + a_rest), a_rest)
            b_rest = tl.where(b_new > b_max, b_weight * (b_at_max + b_rest), b_rest)
            a_at_max = tl.where(a_new > a_max, 0.0, a_at_max)
            b_at_max = tl.where(b_new > b_max, 0.0, b_at_max)
            a_max, b_max = a_new, b_new
        da = u - tl.where(a_max == -INF, 0.0, a_max)
        db = v - tl.where(b_max == -INF, 0.0, b_max)
        ea, eb = tl.exp2(da * gain), tl.exp2(db * gain)
        a_at_max += tl.where(da == 0.0, 1.0, 0.0)
        b_at_max += tl.where(db == 0.0, 1.0, 0.0)
        a_rest += tl.where(da == 0.0, 0.0, ea)
        b_rest += tl.where(db == 0.0, 0.0, eb)
        forbidden |= ((u > -INF) & (v == -INF)).to(tl.int32)
        slope += tl.where((ea == 0.0) | (v == -INF), 0.0, ea * (da - db))
    a_at, b_at = tl.sum(a_at_max, axis=0), tl.sum(b_at_max, axis=0)  # whole numbers: exact
    total = tl.where(tl.max(forbidden, axis=0) > 0, INF, tree_sum(slope))
    return a_max, a_at, tree_sum(a_rest), b_max, b_at, tree_sum(b_rest), total


@triton.jit
def _nothing(DTYPE: tl.constexpr):
    """The sums of no segment."""
    highest, sums = tl.full([], -INF, DTYPE), tl.full([], 0.0, DTYPE)
    return highest, sums, sums, highest, sums, sums, sums


@triton.jit
def _raised(highest, at_max, rest, new, gain, DTYPE: tl.constexpr):
    """The mass against a maximum at least as high, the difference to it, and the weight."""
    gap = tl.where(highest == -INF, 0.0, highest.to(tl.float64) - new.to(tl.float64))
    weight = exp2_of_double(gap * gain, DTYPE)
    same = highest == new
    return (
        tl.where(same, at_max, 0.0),
        weight * tl.where(same, rest, at_max + rest),
        gap.to(DTYPE),
        weight,
    )


@triton.jit
def _raised_slope(slope, mass, a_gap, a_weight, b_gap):
    raised = a_weight * (slope + (a_gap - b_gap) * mass)
    return tl.where(slope == INF, INF, tl.where(a_weight == 0.0, 0.0, raised))


@triton.jit
def _merge(
    xa_max, xa_at_max, xa_rest, xb_max, xb_at_max, xb_rest, x_slope,
    ya_max, ya_at_max, ya_rest, yb_max, yb_at_max, yb_rest, y_slope, gain, DTYPE: tl.constexpr,
):  # fmt: skip
    a_max = tl.where(xa_max >= ya_max, xa_max, ya_max)
    b_max = tl.where(xb_max >= yb_max, xb_max, yb_max)
    x_mass, y_mass = xa_at_max + xa_rest, ya_at_max + ya_rest
    xa_at_max, xa_rest, xa_gap, x_weight = _raised(xa_max, xa_at_max, xa_rest, a_max, gain, DTYPE)
    ya_at_max, ya_rest, ya_gap, y_weight = _raised(ya_max, ya_at_max, ya_rest, a_max, gain, DTYPE)
    xb_at_max, xb_rest, xb_gap, _ = _raised(xb_max, xb_at_max, xb_rest, b_max, gain, DTYPE)
    yb_at_max, yb_rest, yb_gap, _ = _raised(yb_max, yb_at_max, yb_rest, b_max, gain, DTYPE)
    slope = _raised_slope(x_slope, x_mass, xa_gap, x_weight, xb_gap) + _raised_slope(
        y_slope, y_mass, ya_gap, y_weight, yb_gap
    )
    return (
        a_max, xa_at_max + ya_at_max, xa_rest + ya_rest,
        b_max, xb_at_max + yb_at_max, xb_rest + yb_rest, slope,
    )  # fmt: skip


@triton.jit
def _log_sum(at_max, rest):
    return tl.where((at_max == 1.0) & (rest <= 1.0), log1p(rest), tl.log(at_max + rest))


@triton.jit
def _write_row(
    i, kl, state, a_max, a_at_max, a_rest, b_max, b_at_max, b_rest, slope, gain,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """State: maximum and log of the sum, of a and of b."""
    a_log, b_log = _log_sum(a_at_max, a_rest), _log_sum(b_at_max, b_rest)
    result = slope / (a_at_max + a_rest) * (gain * LN2).to(DTYPE) + (b_log - a_log)
    hopeless = (tl.abs(a_max) == INF) | (tl.abs(b_max) == INF)
    tl.store(kl + i, tl.where(hopeless, float("nan"), result))
    tl.store(state + 4 * i, a_max * (1.0 / _SMALL))
    tl.store(state + 4 * i + 1, a_log)
    tl.store(state + 4 * i + 2, b_max * (1.0 / _SMALL))
    tl.store(state + 4 * i + 3, b_log)


@triton.jit
def _write_masked_row(i, kl, state):
    tl.store(kl + i, 0.0)
    for k in tl.static_range(4):
        tl.store(state + 4 * i + k, 0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    a, a_b, a_t, a_v, b, b_b, b_t, b_v, mask, mask_b, mask_t, kl, state,
    cols, vocab, gain: tl.float64,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    i, row, col = position(tl.program_id(0), cols)
    if not _live(mask, mask_b, mask_t, row, col):
        _write_masked_row(i, kl, state)
        return
    gain *= 1.0 / _SMALL
    a += row * a_b + col * a_t
    b += row * b_b + col * b_t
    a_max, a_at_max, a_rest, b_max, b_at_max, b_rest, slope = _nothing(DTYPE)
    for begin in range(0, vocab, SEGMENT):
        sa_max, sa_at_max, sa_rest, sb_max, sb_at_max, sb_rest, s_slope = _sum_segment(
            a, a_v, b, b_v, begin, tl.minimum(begin + SEGMENT, vocab), gain, BLOCK, DTYPE
        )
        a_max, a_at_max, a_rest, b_max, b_at_max, b_rest, slope = _merge(
            a_max, a_at_max, a_rest, b_max, b_at_max, b_rest, slope,
            sa_max, sa_at_max, sa_rest, sb_max, sb_at_max, sb_rest, s_slope, gain, DTYPE,
        )  # fmt: skip
    _write_row(
        i, kl, state, a_max, a_at_max, a_rest, b_max, b_at_max, b_rest, slope, gain, DTYPE
    )  # fmt: skip


@triton.jit(do_not_specialize=(*_UNSPECIALIZED, "segments"))
def segments_kernel(
    a, a_b, a_t, a_v, b, b_b, b_t, b_v, mask, mask_b, mask_t, sums, segments,
    cols, vocab, gain: tl.float64,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per segment: its sums, for merge_kernel."""
    program = tl.program_id(0)
    segment = program % segments
    i, row, col = position(program // segments, cols)
    if not _live(mask, mask_b, mask_t, row, col):
        return
    a += row * a_b + col * a_t
    b += row * b_b + col * b_t
    begin = segment * SEGMENT
    a_max, a_at_max, a_rest, b_max, b_at_max, b_rest, slope = _sum_segment(
        a, a_v, b, b_v, begin, tl.minimum(begin + SEGMENT, vocab), gain * (1.0 / _SMALL),
        BLOCK, DTYPE,
    )  # fmt: skip
    sums += 7 * (i * segments + segment)
    tl.store(sums, a_max)
    tl.store(sums + 1, a_at_max)
    tl.store(sums + 2, a_rest)
    tl.store(sums + 3, b_max)
    tl.store(sums + 4, b_at_max)
    tl.store(sums + 5, b_rest)
    tl.store(sums + 6, slope)


@triton.jit(do_not_specialize=(*_UNSPECIALIZED, "segments"))
def merge_kernel(
    mask, mask_b, mask_t, sums, segments, kl, state, cols, gain: tl.float64, DTYPE: tl.constexpr
):
    """One program per row, after segments_kernel."""
    i, row, col = position(tl.program_id(0), cols)
    if not _live(mask, mask_b, mask_t, row, col):
        _write_masked_row(i, kl, state)
        return
    gain *= 1.0 / _SMALL
    sums += 7 * i * segments
    a_max, a_at_max, a_rest, b_max, b_at_max, b_rest, slope = _nothing(DTYPE)
    for _ in range(0, segments):
        a_max, a_at_max, a_rest, b_max, b_at_max, b_rest, slope = _merge(
            a_max, a_at_max, a_rest, b_max, b_at_max, b_rest, slope,
            tl.load(sums), tl.load(sums + 1), tl.load(sums + 2), tl.load(sums + 3),
            tl.load(sums + 4), tl.load(sums + 5), tl.load(sums + 6), gain, DTYPE,
        )  # fmt: skip
        sums += 7
    _write_row(
        i, kl, state, a_max, a_at_max, a_rest, b_max, b_at_max, b_rest, slope, gain, DTYPE
    )  # fmt: skip


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
    asked = (g != 0.0) & _live(mask, mask_b, mask_t, row, col)
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
) -> tuple[tuple[object, ...], tuple[object, ...], tuple[int, int, float]]:
    """The rows, the mask and the settings, as the kernels take them."""
    first, second = (ref_logits, logits) if reverse else (logits, ref_logits)
    first, second = two_leading(first, 1), two_leading(second, 1)
    (mask,) = two_leading_each(as_bytes(mask))
    cols = max(logits.shape[-2], 1) if logits.dim() > 1 else 1
    rows = (first, *strides(first, 1), second, *strides(second, 1))
    return rows, (mask, *strides(mask)), (cols, logits.shape[-1], math.log2(math.e) / temperature)


def categorical_kl_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, reverse: bool, temperature: float
) -> tuple[Tensor, Tensor]:
    dtype = _checks.compute_dtype(logits, ref_logits)
    shape = logits.shape[:-1]
    kl = logits.new_empty(shape, dtype=dtype)
    state = logits.new_empty((*shape, 4), dtype=dtype)
    rows, live, settings = _arguments(logits, ref_logits, mask, reverse, temperature)
    cols, vocab, gain = settings
    wide = dtype == torch.float64
    config = (_configs.KL_FORWARD_FP64 if wide else _configs.KL_FORWARD).choose(vocab)
    tiles = {"SEGMENT": config.segment, "BLOCK": config.block}
    computed_in = tl.float64 if wide else tl.float32
    segments = triton.cdiv(vocab, config.segment)
    if segments == 1 or kl.numel() >= 2 * processors(logits.device):
        launch(
            forward_kernel, kl.numel(), *rows, *live, kl, state, *settings,
            config=config, **tiles, DTYPE=computed_in,
        )  # fmt: skip
    else:
        sums = logits.new_empty((kl.numel(), segments, 7), dtype=dtype)
        launch(
            segments_kernel, kl.numel() * segments, *rows, *live, sums, segments, *settings,
            config=config, **tiles, DTYPE=computed_in,
        )  # fmt: skip
        launch(
            merge_kernel, kl.numel(), *live, sums, segments, kl, state, cols, gain,
            config=_configs.ONE_WARP, DTYPE=computed_in,
        )  # fmt: skip
    return kl, state


def categorical_kl_backward(*args: Any) -> Tensor:
    logits: Tensor = args[1]
    grad = logits.new_empty(logits.shape)
    _categorical_kl_backward(grad, *args)
    return grad


def categorical_kl_backward_(*args: Any) -> None:
    """Over the logits, which are rows [N, V] without gaps."""
    _categorical_kl_backward(args[1], *args)


def _categorical_kl_backward(
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
    rows, live, settings = _arguments(logits, ref_logits, mask, reverse, temperature)
    (grad_kl,) = two_leading_each(grad_kl)
    wide = kl.dtype == torch.float64
    config = (_configs.KL_BACKWARD_FP64 if wide else _configs.KL_BACKWARD).choose(logits.shape[-1])
    blocks = triton.cdiv(logits.shape[-1], config.block)
    launch(
        backward_kernel, kl.numel() * blocks, grad_kl, *strides(grad_kl), *rows, *live, kl, state,
        grad, blocks, *settings, config=config, BLOCK=config.block, REVERSE=reverse,
        DTYPE=tl.float64 if wide else tl.float32,
    )  # fmt: skip
