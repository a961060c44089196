"""masked_sum, masked_mean, moments, whiten_forward, whiten_apply and whiten_backward in Triton.

The formulas are those of ``csrc/math/moments.h``. All sums are made in fp64 over partitions that
follow from the logical shape alone, and merged in order. Tokens are counted in the flat order of
[B, T], whatever their strides: padded and packed tensors of the same tokens give the same bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ..native import two_leading_each
from . import _configs
from ._configs import Config
from ._launch import as_bytes, launch, strides
from ._math import INF, divide, nonzero, tree_sum

_TILE = 1024  # elements a program of sums_kernel has in hand


# ---- reading tokens ------------------------------------------------------------------------------


@triton.jit
def _offsets(i, cols, per_col, stride_b, stride_t, LINE: tl.constexpr):
    """Offsets of flat positions i (int64) of [B, T], or of a line with one stride.

    `position` divides in 32 bits, which tokens counted in blocks may exceed; dividing in 64 takes a
    call. The product with per_col = 1 / cols is off by one at most, below 2^52.
    """
    if LINE:
        offsets = i * stride_t
    else:
        row = (i.to(tl.float64) * per_col).to(tl.int64)
        row = tl.where(row * cols > i, row - 1, row)
        row = tl.where((row + 1) * cols <= i, row + 1, row)
        offsets = row * stride_b + (i - row * cols) * stride_t
    return offsets


@triton.jit
def _read(x, i, inside, cols, per_col, x_b, x_t, LINE: tl.constexpr, DTYPE: tl.constexpr):
    at = x + _offsets(i, cols, per_col, x_b, x_t, LINE)
    return tl.load(at, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _read_live(mask, i, inside, cols, per_col, mask_b, mask_t, LINE: tl.constexpr):
    """Which of the positions inside are live; an absent mask is live everywhere."""
    live = inside
    if mask is not None:
        at = mask + _offsets(i, cols, per_col, mask_b, mask_t, LINE)
        live = inside & nonzero(tl.load(at, mask=inside, other=0))
    return live


@triton.jit
def _positions(tokens, BLOCK: tl.constexpr):
    """Flat positions of this program's tokens, and which of them exist."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i < tokens


# ---- sums ----------------------------------------------------------------------------------------


@triton.jit
def _tree_sum_rows(x):
    """The sums of a block [2^k, n] over its rows, in one order: see `tree_sum`."""
    for _ in tl.static_range(20):
        if x.shape[0] > 1:
            halves = tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]])
            x = tl.sum(halves, axis=0)  # exactly one order: two terms
    return tl.sum(x, axis=0)  # exactly one order: one term


@triton.jit(do_not_specialize=("cols", "tiles", "chunks"))
def sums_kernel(
    x, x_o, x_b, x_t, x_i, mask, mask_o, mask_b, mask_t, mask_i, counts, out, out_counts,
    cols, per_col: tl.float64, reduced, inner, tiles, chunks, length,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr, MEAN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Sums and counts of [outer, reduced, inner] over chunks of `reduced`.

    One program for each chunk and each BLOCK neighbours in `inner`. A chunk is `length` long, whole
    ROWS or all there is. With `counts` x are sums of chunks of a former launch, and counts theirs.
    """
    program = tl.program_id(0)
    chunk = (program % chunks).to(tl.int64)
    run = program // chunks
    outer = (run // tiles).to(tl.int64)
    j = (run % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x += outer * x_o
    if mask is not None:
        mask += outer * mask_o
    if counts is not None:
        counts += outer * x_o
    begin = chunk * length
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    count = tl.zeros([ROWS, BLOCK], tl.float64)
    for start in range(begin, tl.minimum(begin + length, reduced), ROWS):
        k = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (k < reduced)[:, None] & (j < inner)[None, :]
        at = _offsets(k, cols, per_col, x_b, x_t, LINE)[:, None] + (j * x_i)[None, :]
        live = inside
        if mask is not None:
            where = _offsets(k, cols, per_col, mask_b, mask_t, LINE)[:, None] + (j * mask_i)[None]
            live = inside & nonzero(tl.load(mask + where, mask=inside, other=0))
        value = tl.load(x + at, mask=inside, other=0.0).to(DTYPE).to(tl.float64)
        total += tl.where(live, value, 0.0)
        if counts is not None:
            count += tl.load(counts + at, mask=inside, other=0.0)
        else:
            count += tl.where(live, 1.0, 0.0).to(tl.float64)
    sums = _tree_sum_rows(total)
    live_count = _tree_sum_rows(count)
    if MEAN:
        sums = divide(sums, tl.maximum(live_count, 1.0))
    to = (outer * chunks + chunk) * inner + j
    tl.store(out + to, sums, mask=j < inner)
    tl.store(out_counts + to, live_count, mask=j < inner)


# ---- moments -------------------------------------------------------------------------------------


@triton.jit
def _merge_block(count, mean, m2):
    """The moments of a block of moments; a live token is (1, x, 0), a dead one has count 0.

    Chan, Golub & LeVeque (1979) for many at once. The first sum is of distances to one of the
    means: means far from zero cost no accuracy, and equal ones give exactly that mean.
    """
    live = count > 0.0
    total = tree_sum(count)
    pivot = tl.max(tl.where(live, mean, -INF), axis=0)
    pivot = tl.where(total > 0.0, pivot, 0.0)
    gaps = tree_sum(tl.where(live, count * (mean - pivot), 0.0))
    merged = pivot + divide(gaps, tl.maximum(total, 1.0))
    gap = mean - merged
    return total, merged, tree_sum(tl.where(live, m2 + count * (gap * gap), 0.0))


@triton.jit
def _merge(a_count, a_mean, a_m2, b_count, b_mean, b_m2):
    count = a_count + b_count
    share = divide(b_count, tl.maximum(count, 1.0))
    gap = b_mean - a_mean
    mean = tl.where(a_count == 0.0, b_mean, a_mean + gap * share)
    m2 = tl.where(a_count == 0.0, b_m2, a_m2 + b_m2 + gap * gap * a_count * share)
    nothing = b_count == 0.0
    return count, tl.where(nothing, a_mean, mean), tl.where(nothing, a_m2, m2)


@triton.jit
def _write_moments(at, count, mean, m2):
    tl.store(at, count)
    tl.store(at + 1, mean)
    tl.store(at + 2, m2)


@triton.jit(do_not_specialize=("cols",))
def moments_kernel(
    x, x_b, x_t, mask, mask_b, mask_t, states, tokens, cols, per_col: tl.float64,
    BLOCK: tl.constexpr, LINE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens: its moments."""
    i, inside = _positions(tokens, BLOCK)
    live = _read_live(mask, i, inside, cols, per_col, mask_b, mask_t, LINE)
    value = _read(x, i, inside, cols, per_col, x_b, x_t, LINE, DTYPE).to(tl.float64)
    count, mean, m2 = _merge_block(
        tl.where(live, 1.0, 0.0).to(tl.float64), value, tl.zeros([BLOCK], tl.float64)
    )
    _write_moments(states + 3 * tl.program_id(0).to(tl.int64), count, mean, m2)


@triton.jit(do_not_specialize=("blocks",))
def merge_kernel(states, moments, blocks, BLOCK: tl.constexpr):
    """One program: the moments of all blocks, in order."""
    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        at = states + 3 * block.to(tl.int64)
        inside = block < blocks
        b_count, b_mean, b_m2 = _merge_block(
            tl.load(at, mask=inside, other=0.0),
            tl.load(at + 1, mask=inside, other=0.0),
            tl.load(at + 2, mask=inside, other=0.0),
        )
        count, mean, m2 = _merge(count, mean, m2, b_count, b_mean, b_m2)
    _write_moments(moments, count, mean, m2)


# ---- whitening -----------------------------------------------------------------------------------


@triton.jit
def _over_freedom(x, count, UNBIASED: tl.constexpr):
    """The quotient x / (count - 1), or x / count; 0 without any degree of freedom."""
    n = count - 1.0 if UNBIASED else count
    return tl.where(n > 0.0, divide(x, tl.maximum(n, 1.0)), 0.0)


@triton.jit
def _whitening(moments, eps, SHIFT_MEAN: tl.constexpr, UNBIASED: tl.constexpr):
    """Count, mean, scale and shift of y = (x - mean) scale + shift."""
    count = tl.load(moments)
    mean = tl.load(moments + 1)
    variance = _over_freedom(tl.load(moments + 2), count, UNBIASED)
    shift = 0.0 * mean if SHIFT_MEAN else mean
    return count, mean, 1.0 / tl.sqrt(variance + eps), shift


@triton.jit
def _center(x, mean):
    """The distance to the mean, in two parts: where x is near it, the first difference is exact."""
    high = mean.to(x.dtype)
    low = (mean - high.to(tl.float64)).to(x.dtype)
    return (x - high) - low


@triton.jit(do_not_specialize=("cols",))
def whiten_kernel(
    x, x_b, x_t, mask, mask_b, mask_t, moments, out, tokens, cols, per_col: tl.float64,
    eps: tl.float64, BLOCK: tl.constexpr, LINE: tl.constexpr, SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i, inside = _positions(tokens, BLOCK)
    live = _read_live(mask, i, inside, cols, per_col, mask_b, mask_t, LINE)
    value = _read(x, i, inside, cols, per_col, x_b, x_t, LINE, DTYPE)
    _, mean, scale, shift = _whitening(moments, eps, SHIFT_MEAN, UNBIASED)
    y = _center(value, mean) * scale.to(DTYPE) + shift.to(DTYPE)
    tl.store(out + i, tl.where(live, y, 0.0), mask=inside)


@triton.jit(do_not_specialize=("cols",))
def upstream_kernel(
    grad, grad_b, grad_t, x, x_b, x_t, mask, mask_b, mask_t, moments, sums,
    tokens, cols, per_col: tl.float64,
    BLOCK: tl.constexpr, LINE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens: its sums of g and of g (x - mean)."""
    i, inside = _positions(tokens, BLOCK)
    live = _read_live(mask, i, inside, cols, per_col, mask_b, mask_t, LINE)
    g = _read(grad, i, inside, cols, per_col, grad_b, grad_t, LINE, DTYPE).to(tl.float64)
    value = _read(x, i, inside, cols, per_col, x_b, x_t, LINE, DTYPE).to(tl.float64)
    sums += 2 * tl.program_id(0).to(tl.int64)
    tl.store(sums, tree_sum(tl.where(live, g, 0.0)))
    tl.store(sums + 1, tree_sum(tl.where(live, g * (value - tl.load(moments + 1)), 0.0)))


@triton.jit(do_not_specialize=("cols",))
def gradient_kernel(
    grad, grad_b, grad_t, x, x_b, x_t, mask, mask_b, mask_t, moments, sums, grad_x,
    tokens, cols, per_col: tl.float64, eps: tl.float64,
    BLOCK: tl.constexpr, LINE: tl.constexpr, SHIFT_MEAN: tl.constexpr, UNBIASED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """dL/dx = scale (g - mean of g) + shift + slope (x - mean)."""
    i, inside = _positions(tokens, BLOCK)
    live = _read_live(mask, i, inside, cols, per_col, mask_b, mask_t, LINE)
    g = _read(grad, i, inside, cols, per_col, grad_b, grad_t, LINE, DTYPE)
    value = _read(x, i, inside, cols, per_col, x_b, x_t, LINE, DTYPE)
    count, mean, scale, _ = _whitening(moments, eps, SHIFT_MEAN, UNBIASED)
    mean_g = divide(tl.load(sums), tl.maximum(count, 1.0))
    slope = -scale * scale * scale * _over_freedom(tl.load(sums + 1), count, UNBIASED)
    y = _center(g, mean_g) * scale.to(DTYPE) + _center(value, mean) * slope.to(DTYPE)
    if not SHIFT_MEAN:
        y += mean_g.to(DTYPE)
    tl.store(grad_x + i, tl.where(live, y, 0.0), mask=inside)


# ---- launching -----------------------------------------------------------------------------------


def _lines(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """All as one dimension if that takes no copy, else as two: a line needs no division."""
    try:
        return tuple(t if t is None else t.view(-1) for t in tensors)
    except RuntimeError:
        found: tuple[Tensor | None, ...] = two_leading_each(*tensors)
        return found


def _dtype(*tensors: Tensor) -> tl.dtype:
    wide = _checks.compute_dtype(*tensors) == torch.float64
    return tl.float64 if wide else tl.float32


class _Tokens:
    """What the kernels over blocks of tokens are told about their tensors."""

    def __init__(self, *tensors: Tensor, mask: Tensor | None, config: Config) -> None:
        lines = _lines(*tensors, as_bytes(mask))
        self.where = [part for t in lines for part in (t, *strides(t))]
        first = tensors[0]
        self.blocks = triton.cdiv(first.numel(), config.block)
        cols = max(first.shape[-1], 1) if first.dim() else 1
        self.sizes = (first.numel(), cols, 1.0 / cols)
        self.config = config
        self.constants = {
            "BLOCK": config.block,
            "LINE": all(t is None or t.dim() == 1 for t in lines),
            "DTYPE": _dtype(*tensors),
        }


def masked_sum(x: Tensor, mask: Tensor | None, dim: int | None) -> tuple[Tensor, Tensor]:
    return _masked_reduce(x, mask, dim, False)


def masked_mean(x: Tensor, mask: Tensor | None, dim: int | None) -> tuple[Tensor, Tensor]:
    return _masked_reduce(x, mask, dim, True)


def _masked_reduce(
    x: Tensor, mask: Tensor | None, dim: int | None, mean: bool
) -> tuple[Tensor, Tensor]:
    mask = as_bytes(mask)
    shape = x.shape
    cols, line = 1, True
    if dim is None:
        outer, reduced, inner = 1, x.numel(), 1
        cols = max(shape[-1], 1) if shape else 1
        tensors = _lines(x, mask)
        line = all(t is None or t.dim() == 1 for t in tensors)
        where = [part for t in tensors for part in (t, 0, *strides(t), 0)]
        shape = torch.Size(())
    else:
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        reduced = shape[dim] if shape else 1
        where = []
        for t in (x, mask):
            part = t if t is None else t.reshape(outer, reduced, inner)
            s = (0, 0, 0) if part is None else part.stride()
            where += [part, s[0], 0, s[1], s[2]]
        shape = shape[:dim] + shape[dim + 1 :]
    out = x.new_empty(shape, dtype=_checks.compute_dtype(x))
    count = x.new_empty(shape, dtype=torch.float64)
    config = _configs.REDUCE.choose(inner)
    chunks = max(triton.cdiv(reduced, config.segment), 1)
    sizes = (inner, triton.cdiv(inner, config.block))
    programs = outer * sizes[1]
    constants = {"ROWS": _TILE // config.block, "BLOCK": config.block}
    if chunks == 1:
        launch(
            sums_kernel, programs, *where, None, out, count, cols, 1.0 / cols, reduced, *sizes,
            1, reduced, config=config, LINE=line, MEAN=mean, DTYPE=_dtype(x), **constants,
        )  # fmt: skip
        return out, count
    sums, counts = x.new_empty((2, outer, chunks, inner), dtype=torch.float64)
    launch(
        sums_kernel, programs * chunks, *where, None, sums, counts, cols, 1.0 / cols, reduced,
        *sizes, chunks, config.segment,
        config=config, LINE=line, MEAN=False, DTYPE=_dtype(x), **constants,
    )  # fmt: skip
    launch(
        sums_kernel, programs, sums, chunks * inner, 0, inner, 1, None, 0, 0, 0, 0, counts, out,
        count, 1, 1.0, chunks, *sizes, 1, chunks,
        config=config, LINE=True, MEAN=mean, DTYPE=tl.float64, **constants,
    )  # fmt: skip
    return out, count


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    config = _configs.MOMENTS
    call = _Tokens(x, mask=mask, config=config)
    blocks = max(call.blocks, 1)
    states = x.new_empty((blocks, 3), dtype=torch.float64)
    launch(
        moments_kernel, blocks, *call.where, states, *call.sizes, config=config, **call.constants
    )
    if blocks == 1:
        return states[0]
    result = x.new_empty(3, dtype=torch.float64)
    merge = _configs.MERGE_MOMENTS
    launch(merge_kernel, 1, states, result, blocks, config=merge, BLOCK=merge.block)
    return result


def whiten_forward(
    x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float
) -> tuple[Tensor, Tensor]:
    state = moments(x, mask)
    return whiten_apply(x, mask, state, shift_mean, unbiased, eps), state


def whiten_apply(
    x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    out = x.new_empty(x.shape, dtype=_checks.compute_dtype(x))
    call = _Tokens(x, mask=mask, config=_configs.WHITEN)
    launch(
        whiten_kernel, call.blocks, *call.where, moments.contiguous(), out, *call.sizes, eps,
        config=call.config, SHIFT_MEAN=shift_mean, UNBIASED=unbiased, **call.constants,
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
    grad_x = x.new_empty(x.shape)
    call = _Tokens(grad, x, mask=mask, config=_configs.WHITEN)
    moments = moments.contiguous()
    parts = x.new_empty((call.blocks, 2), dtype=torch.float64)
    launch(
        upstream_kernel, call.blocks, *call.where, moments, parts, *call.sizes,
        config=call.config, **call.constants,
    )  # fmt: skip
    sums, _ = masked_sum(parts, None, 0)
    launch(
        gradient_kernel, call.blocks, *call.where, moments, sums, grad_x, *call.sizes, eps,
        config=call.config, SHIFT_MEAN=shift_mean, UNBIASED=unbiased, **call.constants,
    )  # fmt: skip
    return grad_x
