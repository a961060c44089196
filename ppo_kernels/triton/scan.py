"""scan_forward and scan_backward in Triton: x_t = d_t + c_t x_{t+1}, in fp64, and its adjoint.

Every sequence is cut into chunks of CHUNK steps, counted from its first step that exists. A program
scans a block of steps: those that it writes, and as many of those that the scan meets before them
as complete the first one's chunk. By doubling distances each step is combined with all that follow
it in its chunk, so a step's bits depend on its place in the sequence alone: not on where in a block
it lies, on what is packed beside it, or on padding.

What passes from chunk to chunk is a scan of the same kind over one element per inner boundary, that
is cut into chunks in turn, and so on: no program waits for another, and one long row or a million
short sequences fill the device alike. The boundaries of a sequence are CHUNK steps apart and those
of two sequences farther, so boundary i has the slot i // CHUNK to itself.

Lanes are in the order opposite to the scan's: what lane l needs is in the lanes above it. Under the
"carry" convention the scan runs over a list of the live steps.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks, _faults
from . import _configs
from ._launch import as_bytes, launch, strides
from ._math import BAD_LAMBDA, BAD_OFFSETS, BAD_VALUE_LAMBDA, report_fault

_SMALLEST = tl.constexpr(2.0**-1022)  # the smallest normal fp64 number
_NOWHERE = tl.constexpr(2**62)


# ---- one chunk -----------------------------------------------------------------------------------


@triton.jit
def _nearest(a, b):
    return tl.minimum(a, b)


@triton.jit
def _power_product(a, b):
    """Powers in (0, 1] stay normal numbers: an infinite carry times a power is still infinite."""
    both = a * b
    return tl.where(both < _SMALLEST, _SMALLEST, both)


@triton.jit
def _next_lane(x, lane, distance, BLOCK: tl.constexpr):
    return tl.gather(x, tl.minimum(lane + distance, BLOCK - 1), 0)


@triton.jit
def _scan(x, c, cut, chunk_end, step, carries, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
          DIRECTION: tl.constexpr):  # fmt: skip
    """The scan of every lane up to its chunk's end, or to the first cut, which may not be passed.

    Completed by what the next chunk carries in, if `carries` is given. Also the factor by which it
    enters at the chunk's far end: 0 if a cut lies before.
    """
    lane = tl.arange(0, BLOCK)
    cut = cut | (c == 0.0)
    mark = tl.where(cut, 2 * lane, tl.where(chunk_end, 2 * lane + 1, 2 * BLOCK))
    mark = tl.associative_scan(mark, 0, _nearest, reverse=True)
    last = mark >> 1
    carried = (mark & 1) != 0
    reach = last - lane + 1
    power = tl.full([BLOCK], 1.0, tl.float64)
    for level in tl.static_range(20):
        if (1 << level) < CHUNK:
            beyond = _next_lane(x, lane, 1 << level, BLOCK)
            x = tl.where(lane + (1 << level) <= last, tl.fma(c, beyond, x), x)
            power = tl.where(((reach >> level) & 1) != 0, _power_product(power, c), power)
            c = _power_product(c, c)
    power = tl.where(reach == CHUNK, c, power)
    if carries is not None:
        slot = (step + DIRECTION * reach) // CHUNK
        x = tl.where(carried, tl.fma(power, tl.load(carries + slot, mask=carried, other=0.0), x), x)
    return x, tl.where(carried, c, 0.0)


@triton.jit
def _is_chunk_end(k, CHUNK: tl.constexpr, DIRECTION: tl.constexpr):
    return k % CHUNK == (CHUNK - 1 if DIRECTION > 0 else 0)


@triton.jit
def _store_boundaries(
    sums, factors, indices, x, factor, step, k, written,
    CHUNK: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """What each chunk hands to the next one, and which of its sequence's boundaries it is."""
    if DIRECTION > 0:
        written = written & (k % CHUNK == 0) & (k > 0)
        index = k // CHUNK - 1
    else:
        written = written & (k % CHUNK == CHUNK - 1)
        index = k // CHUNK
    tl.store(sums + step // CHUNK, x, mask=written)
    tl.store(factors + step // CHUNK, factor, mask=written)
    tl.store(indices + step // CHUNK, index, mask=written)


@triton.jit(do_not_specialize=("blocks", "slots", "next_slots"))
def carries_kernel(
    sums, factors, indices, next_sums, next_factors, next_indices, carries, results,
    blocks, slots, next_slots,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """A scan over the boundaries of chunks: its `results`, or without them what it hands on."""
    program = tl.program_id(0)
    chain = program // blocks
    block = (program % blocks).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    own: tl.constexpr = BLOCK - CHUNK
    slot = block * own + lane if DIRECTION > 0 else (block + 1) * own - 1 - lane
    exists = (slot >= 0) & (slot < slots)
    x = tl.load(sums + chain * slots + slot, mask=exists, other=0.0)
    c = tl.load(factors + chain * slots + slot, mask=exists, other=0.0)
    k = tl.load(indices + chain * slots + slot, mask=exists, other=0)
    if carries is not None:
        carries += chain * next_slots
    x, factor = _scan(
        x, c, ~exists, _is_chunk_end(k, CHUNK, DIRECTION), slot, carries, BLOCK, CHUNK, DIRECTION
    )
    written = exists & (lane < own)
    if results is not None:
        tl.store(results + chain * slots + slot, x, mask=written)
    else:
        _store_boundaries(
            next_sums + chain * next_slots, next_factors + chain * next_slots,
            next_indices + chain * next_slots, x, factor, slot, k, written, CHUNK, DIRECTION,
        )  # fmt: skip


# ---- steps ---------------------------------------------------------------------------------------


@triton.jit
def _read(t, t_b, t_t, row, col, wanted):
    """In fp64; 0 where not wanted, whatever is there."""
    x = tl.load(t + row * t_b + col * t_t, mask=wanted, other=0.0)
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def _is_set(t, t_b, t_t, row, col, wanted):
    """Where wanted and not zero."""
    x = tl.load(t + row * t_b + col * t_t, mask=wanted, other=0)
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return wanted & (x != 0)


@triton.jit
def _row_places(
    program, rows, cols, blocks, width, rows_at_once, own,
    BLOCK: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """Row and column of every lane, whether it exists, and whether it is the program's own."""
    lane = tl.arange(0, BLOCK)
    inside = lane % width
    row = (program // blocks).to(tl.int64) * rows_at_once + lane // width
    block = (program % blocks).to(tl.int64)
    col = block * own + inside if DIRECTION > 0 else (block + 1) * own - 1 - inside
    exists = (lane // width < rows_at_once) & (row < rows) & (col >= 0) & (col < cols)
    return row, col, exists, exists & (inside < own)


@triton.jit
def _sequence_of(step, exists, offsets, sequences, search_steps):
    """The sequence that holds each step."""
    low = tl.zeros_like(step)
    high = low + (sequences - 1)
    for _ in range(search_steps):
        middle = (low + high) // 2
        after = tl.load(offsets + middle + 1, mask=exists, other=0) > step
        low = tl.where(after, low, tl.minimum(middle + 1, high))
        high = tl.where(after, middle, high)
    return low


@triton.jit
def _places(
    offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
    search_steps, BLOCK: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """Of every lane: row, column, sequence, number among all steps and in its sequence, its length.

    And whether the step exists, is the program's own, and is in no sequence (bad offsets).
    """
    program = tl.program_id(0)
    if offsets is None:
        row, col, exists, written = _row_places(
            program, rows, cols, blocks, width, rows_at_once, own, BLOCK, DIRECTION
        )
        sequence, step, k, length = row, row * cols + col, col, cols
        lost = tl.arange(0, BLOCK) < 0
    else:
        lane = tl.arange(0, BLOCK)
        if DIRECTION > 0:
            step = program.to(tl.int64) * own + lane
        else:
            step = (program.to(tl.int64) + 1) * own - 1 - lane
        exists = (step >= 0) & (step < (cols if limit is None else tl.load(limit)))
        written = exists & (lane < own)
        sequence = _sequence_of(step, exists, offsets, sequences, search_steps)
        start = tl.load(offsets + sequence, mask=exists, other=0)
        length = tl.load(offsets + sequence + 1, mask=exists, other=0) - start
        k = step - start
        lost = exists & ((k < 0) | (k >= length))
        row = sequence * padded
        col = _token(where, step, exists) - row * cols
    return row, col, sequence, step, k, length, exists, written, lost


@triton.jit
def _token(where, step, exists):
    """The flat position of a step."""
    if where is not None:
        step = tl.load(where + step, mask=exists, other=0).to(tl.int64)
    return step


@triton.jit
def _neighbour(where, step, row, col, cols, exists, DISTANCE: tl.constexpr):
    """The column of the step before or after, in the same sequence."""
    if where is None:
        beside = col + DISTANCE
    else:
        beside = _token(where, step + DISTANCE, exists) - row * cols
    return beside


@triton.jit
def _cuts(
    terminated, terminated_b, terminated_t, truncated, truncated_b, truncated_t, row, col, live,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Which live steps terminate, and which are truncated and do not."""
    ended = tl.arange(0, BLOCK) < 0
    if terminated is not None:
        ended = _is_set(terminated, terminated_b, terminated_t, row, col, live)
    cut_short = tl.arange(0, BLOCK) < 0
    if truncated is not None:
        cut_short = _is_set(truncated, truncated_b, truncated_t, row, col, live) & ~ended
    return ended, cut_short


@triton.jit
def _lambda(
    lams, stride, lam, sequence, exists, faults, FAULT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The lambda of every lane; NaN for a bad one, which is reported if `faults` are given."""
    value = tl.full([BLOCK], 0.0, tl.float64) + lam
    if lams is not None:
        value = _read(lams, 0, stride, sequence, sequence, exists)
        bad = exists & ~((value >= 0.0) & (value <= 1.0))
        value = tl.where(bad, float("nan"), value)
        if faults is not None:
            first = tl.min(tl.where(bad, sequence, _NOWHERE), axis=0)
            if first != _NOWHERE:
                report_fault(faults, first, FAULT)
    return value


_UNSPECIALIZED = [
    f"{name}_{axis}"
    for name in ("rewards", "values", "next_values", "mask", "terminated", "truncated", "ga", "gr")
    for axis in ("b", "t")
    if axis == "b" or name in ("mask", "terminated", "truncated")
] + [
    "bootstrap_s", "lams_s", "value_lams_s", "padded", "rows", "cols", "blocks", "width",
    "rows_at_once", "own", "sequences", "search_steps", "slots",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    rewards, rewards_b, rewards_t, values, values_b, values_t,
    next_values, next_values_b, next_values_t, bootstrap, bootstrap_s,
    advantages, returns, faults,
    sums, factors, indices, carries, slots,
    mask, mask_b, mask_t, terminated, terminated_b, terminated_t,
    truncated, truncated_b, truncated_t, lams, lams_s, value_lams, value_lams_s,
    offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
    search_steps, gamma: tl.float64, lam: tl.float64, value_lam: tl.float64,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TRUNCATE: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    """Advantages and returns, or, given `sums`, what chunks hand on."""
    row, col, sequence, step, k, length, exists, written, lost = _places(
        offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
        search_steps, BLOCK, 1,
    )  # fmt: skip
    live = exists
    if mask is not None:
        live = _is_set(mask, mask_b, mask_t, row, col, exists)
    ended, cut_short = _cuts(
        terminated, terminated_b, terminated_t, truncated, truncated_b, truncated_t, row, col,
        live, BLOCK,
    )  # fmt: skip
    discount = tl.zeros([BLOCK], tl.float64) + gamma
    is_last = k == length - 1
    r = _read(rewards, rewards_b, rewards_t, row, col, live)
    v = tl.zeros([BLOCK], tl.float64)
    following = v
    if values is not None:
        v = _read(values, values_b, values_t, row, col, live)
        follows = exists & ~is_last & ~lost
        after = _neighbour(where, step, row, col, cols, follows, 1)
        if mask is not None:
            follows = _is_set(mask, mask_b, mask_t, row, after, follows)
        following = _read(values, values_b, values_t, row, after, follows)
    if bootstrap is not None:
        used = is_last & (live if TRUNCATE else exists)
        following = tl.where(used, _read(bootstrap, 0, bootstrap_s, row, sequence, used), following)
    if next_values is not None:
        following = tl.where(
            cut_short,
            _read(next_values, next_values_b, next_values_t, row, col, cut_short),
            following,
        )
    following = tl.where(ended | (discount == 0.0), 0.0, following)
    delta = tl.fma(discount, following, r - v)
    cut = ended | cut_short | is_last | lost | ~exists
    chunk_end = _is_chunk_end(k, CHUNK, 1)
    c = discount * _lambda(lams, lams_s, lam, sequence, exists & ~lost, faults, BAD_LAMBDA, BLOCK)
    advantage, factor = _scan(
        tl.where(lost | ~(c >= 0.0), float("nan"), delta), c, cut, chunk_end, step, carries,
        BLOCK, CHUNK, 1,
    )  # fmt: skip
    target = advantage
    if sums is not None:
        _store_boundaries(sums, factors, indices, advantage, factor, step, k, written, CHUNK, 1)
    if CHAINS == 2:
        c = discount * _lambda(
            value_lams,
            value_lams_s,
            value_lam,
            sequence,
            exists & ~lost,
            faults,
            BAD_VALUE_LAMBDA,
            BLOCK,
        )
        if carries is not None:
            carries += slots
        target, factor = _scan(
            tl.where(lost | ~(c >= 0.0), float("nan"), delta), c, cut, chunk_end, step, carries,
            BLOCK, CHUNK, 1,
        )  # fmt: skip
        if sums is not None:
            _store_boundaries(
                sums + slots, factors + slots, indices + slots, target, factor, step, k, written,
                CHUNK, 1,
            )  # fmt: skip
    if sums is None:
        token = row * cols + col
        if advantages is not None:
            tl.store(advantages + token, tl.where(live, advantage, 0.0), mask=written)
        tl.store(returns + token, tl.where(live, target + v, 0.0), mask=written)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def backward_kernel(
    grad_advantages, ga_b, ga_t, grad_returns, gr_b, gr_t,
    grad_rewards, grad_values, grad_next_values, grad_bootstrap,
    sums, factors, indices, carries, slots,
    mask, mask_b, mask_t, terminated, terminated_b, terminated_t,
    truncated, truncated_b, truncated_t, lams, lams_s, value_lams, value_lams_s,
    offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
    search_steps, gamma: tl.float64, lam: tl.float64, value_lam: tl.float64,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TRUNCATE: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    """The gradients, or, given `sums`, what chunks hand on.

    D_t = dL/ddelta_t = g_t + c_{t-1} D_{t-1}; every gradient is one or two terms of D.
    """
    row, col, sequence, step, k, length, exists, written, lost = _places(
        offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
        search_steps, BLOCK, -1,
    )  # fmt: skip
    live = exists
    if mask is not None:
        live = _is_set(mask, mask_b, mask_t, row, col, exists)
    precedes = exists & (k > 0) & ~lost
    live_before = precedes
    before = _neighbour(where, step, row, col, cols, precedes, -1)
    if mask is not None:
        live_before = _is_set(mask, mask_b, mask_t, row, before, precedes)
    ended_before, cut_short_before = _cuts(
        terminated, terminated_b, terminated_t, truncated, truncated_b, truncated_t, row, before,
        live_before, BLOCK,
    )  # fmt: skip
    discount = tl.zeros([BLOCK], tl.float64) + gamma
    cut = ended_before | cut_short_before | ~precedes | (discount == 0.0)
    chunk_end = _is_chunk_end(k, CHUNK, -1)
    g = tl.where(lost, float("nan"), tl.zeros([BLOCK], tl.float64))
    to_returns = g
    if grad_advantages is not None:
        g += _read(grad_advantages, ga_b, ga_t, row, col, live)
    if grad_returns is not None:
        to_returns += _read(grad_returns, gr_b, gr_t, row, col, live)
    if CHAINS == 1:
        g += to_returns
    c = discount * _lambda(lams, lams_s, lam, sequence, exists & ~lost, None, BAD_LAMBDA, BLOCK)
    d, factor = _scan(g, c, cut, chunk_end, step, carries, BLOCK, CHUNK, -1)
    if sums is not None:
        _store_boundaries(sums, factors, indices, d, factor, step, k, written, CHUNK, -1)
    if CHAINS == 2:
        c = discount * _lambda(
            value_lams,
            value_lams_s,
            value_lam,
            sequence,
            exists & ~lost,
            None,
            BAD_VALUE_LAMBDA,
            BLOCK,
        )
        if carries is not None:
            carries += slots
        d_returns, factor = _scan(to_returns, c, cut, chunk_end, step, carries, BLOCK, CHUNK, -1)
        d += d_returns
        if sums is not None:
            _store_boundaries(
                sums + slots, factors + slots, indices + slots, d_returns, factor, step, k,
                written, CHUNK, -1,
            )  # fmt: skip
    if sums is None:
        token = row * cols + col
        ended, cut_short = _cuts(
            terminated, terminated_b, terminated_t, truncated, truncated_b, truncated_t, row, col,
            live, BLOCK,
        )  # fmt: skip
        through = tl.where(discount == 0.0, 0.0, discount * d)
        if grad_rewards is not None:
            tl.store(grad_rewards + token, tl.where(live, d, 0.0), mask=written)
        if grad_values is not None:
            # What the step before looked at was this value, unless it was cut.
            of_before = tl.where(cut, 0.0, _next_lane(through, tl.arange(0, BLOCK), 1, BLOCK))
            grad = (to_returns - d) + of_before
            tl.store(grad_values + token, tl.where(live, grad, 0.0), mask=written)
        if grad_next_values is not None:
            tl.store(grad_next_values + token, tl.where(cut_short, through, 0.0), mask=written)
        if grad_bootstrap is not None:
            used = (live if TRUNCATE else exists) & ~(ended | cut_short)
            tl.store(
                grad_bootstrap + sequence, tl.where(used, through, 0.0),
                mask=written & (k == length - 1),
            )  # fmt: skip


# ---- the steps that exist ------------------------------------------------------------------------


@triton.jit(do_not_specialize=("mask_b", "mask_t", "rows", "cols", "blocks", "width",
                               "rows_at_once", "own"))  # fmt: skip
def live_kernel(
    mask, mask_b, mask_t, rows, cols, blocks, width, rows_at_once, own, counts, before, where,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tokens of a block are live; or, given how many are `before` it, a list of them."""
    row, col, exists, _ = _row_places(
        tl.program_id(0), rows, cols, blocks, width, rows_at_once, own, BLOCK, 1
    )
    live = _is_set(mask, mask_b, mask_t, row, col, exists)
    if before is None:
        tl.store(counts + tl.program_id(0), tl.sum(live.to(tl.int32), axis=0))  # exact: counts
    else:
        rank = tl.cumsum(live.to(tl.int32), axis=0) - 1  # exact: counts
        step = tl.load(before + tl.program_id(0)) + rank
        tl.store(where + step, row * cols + col, mask=live)


@triton.jit(do_not_specialize=("n",))
def count_kernel(counts, before, n, BLOCK: tl.constexpr):
    """What precedes each of n counts, and the sum of all: one program."""
    total = tl.full([], 0, tl.int64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count = tl.load(counts + i, mask=i < n, other=0).to(tl.int64)
        tl.store(before + i, total + tl.cumsum(count, axis=0) - count, mask=i < n)  # exact: counts
        total += tl.sum(count, axis=0)  # exact: counts
    tl.store(before + n, total)


@triton.jit(do_not_specialize=("stride", "sequences", "tokens", "cols", "search_steps"))
def offsets_kernel(
    cu_seqlens, stride, where, limit, offsets, faults, sequences, tokens, cols, search_steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each sequence starts among the steps that exist. Bad offsets are reported, and cut."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = i <= sequences
    if cu_seqlens is None:
        start = i * cols
    else:
        start = tl.load(cu_seqlens + i * stride, mask=exists, other=0).to(tl.int64)
        least = tl.load(cu_seqlens + (i - 1) * stride, mask=exists & (i > 0), other=0).to(tl.int64)
        bad = exists & ((start < least) | ((i == 0) & (start != 0)))
        bad = bad | ((i == sequences) & (start != tokens))
        first = tl.min(tl.where(bad, i, _NOWHERE), axis=0)
        if first != _NOWHERE:
            report_fault(faults, first, BAD_OFFSETS)
        start = tl.minimum(tl.maximum(start, 0), tokens)
    if where is not None:
        low = tl.zeros_like(i)
        high = low + tl.load(limit)
        for _ in range(search_steps):
            middle = (low + high) // 2
            searching = exists & (low < high)
            earlier = tl.load(where + middle, mask=searching, other=0) < start
            low = tl.where(searching & earlier, middle + 1, low)
            high = tl.where(searching & ~earlier, middle, high)
        start = low
    tl.store(offsets + i, start, mask=i <= tl.maximum(sequences, 1))


# ---- host ----------------------------------------------------------------------------------------


class _Call:
    """What both kernels are told about a call, and how they are launched."""

    def __init__(
        self,
        like: Tensor,
        mask: Tensor | None,
        terminated: Tensor | None,
        truncated: Tensor | None,
        cu_seqlens: Tensor | None,
        lams: Tensor | None,
        value_lams: Tensor | None,
        gamma: float,
        lam: float,
        value_lam: float,
        convention: str,
        chains: int,
    ) -> None:
        self.config, self.like = _configs.SCAN, like
        block, self.chunk = self.config.block, self.config.segment
        self.tokens = like.numel()
        packed = cu_seqlens is not None
        rows, cols = (1, self.tokens) if packed else (like.shape[0], like.shape[1])
        self.sequences = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.slots = self.tokens // self.chunk + 1
        self.chains = chains
        # As many boundaries as the longest sequence can have.
        self.boundaries = max(cols - 1, 0) // self.chunk
        where = limit = offsets = None
        mask = as_bytes(mask)
        if self.tokens and mask is not None and convention == "carry":
            where, limit = self._live_steps(mask, rows, cols)
            mask = None
        if self.tokens and (packed or where is not None):
            offsets = self._offsets(like, cu_seqlens, where, limit, cols)
        self.programs, places = _blocks(rows, cols, block, block - self.chunk)
        if offsets is not None:
            self.programs = triton.cdiv(self.tokens, block - self.chunk)
            places = (1, block, 1, block - self.chunk)
        terminated, truncated = as_bytes(terminated), as_bytes(truncated)
        self.setting = (
            mask, *strides(mask), terminated, *strides(terminated), truncated, *strides(truncated),
            lams, _stride(lams), value_lams, _stride(value_lams),
            offsets, where, limit, int(not packed), rows, cols, *places,
            max(self.sequences, 1),
            self.sequences.bit_length(), gamma, lam, value_lam,
        )  # fmt: skip
        self.tiles = {"BLOCK": block, "CHUNK": self.chunk}
        self.constants = self.tiles | {"TRUNCATE": convention == "truncate", "CHAINS": chains}
        # Positions that no lane visits.
        self.leaves_gaps = where is not None

    def _live_steps(self, mask: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """The flat positions of the live tokens, in order, and their number."""
        block = self.config.block
        programs, places = _blocks(rows, cols, block, block)
        counts = mask.new_empty(programs, dtype=torch.int32)
        before = mask.new_empty(programs + 1, dtype=torch.int64)
        dtype = torch.int32 if self.tokens < 2**31 else torch.int64
        where = mask.new_empty(self.tokens, dtype=dtype)
        about = (mask, *strides(mask), rows, cols, *places)
        launch(live_kernel, programs, *about, counts, None, None, config=self.config, BLOCK=block)
        launch(count_kernel, 1, counts, before, programs, config=self.config, BLOCK=block)
        launch(live_kernel, programs, *about, None, before, where, config=self.config, BLOCK=block)
        return where, before[-1]

    def _offsets(
        self, like: Tensor, cu_seqlens: Tensor | None, where: Tensor | None,
        limit: Tensor | None, cols: int,
    ) -> Tensor:  # fmt: skip
        block = self.config.block
        # Without sequences (bad offsets, as there are tokens) an empty one.
        offsets = like.new_empty(max(self.sequences, 1) + 1, dtype=torch.int64)
        launch(
            offsets_kernel, triton.cdiv(offsets.numel(), block), cu_seqlens,
            _stride(cu_seqlens), where, limit, offsets, _faults.flag(like.device),
            self.sequences, self.tokens, cols, self.tokens.bit_length(),
            config=self.config, BLOCK=block,
        )  # fmt: skip
        return offsets

    def run(
        self, kernel: Any, direction: int, inputs: tuple[Any, ...], outputs: tuple[Any, ...]
    ) -> None:
        if not self.tokens:
            return
        carries = None
        if self.boundaries:
            sums, factors, indices = self._summaries(self.like, self.slots)
            launch(
                kernel, self.programs, *inputs, *(None,) * len(outputs),
                sums, factors, indices, None, self.slots, *self.setting,
                config=self.config, **self.constants,
            )  # fmt: skip
            carries = self._carries(sums, factors, indices, self.slots, self.boundaries, direction)
        launch(
            kernel, self.programs, *inputs, *outputs, None, None, None, carries, self.slots,
            *self.setting, config=self.config, **self.constants,
        )  # fmt: skip

    def _summaries(self, like: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Per slot: the value at a boundary, the factor of what is beyond, its number.

        The number is 0, which hands on nothing, where no boundary has the slot.
        """
        sums, factors = like.new_empty((2, self.chains, slots), dtype=torch.float64)
        return sums, factors, like.new_zeros((self.chains, slots), dtype=torch.int64)

    def _carries(
        self, sums: Tensor, factors: Tensor, indices: Tensor, slots: int, longest: int,
        direction: int,
    ) -> Tensor:  # fmt: skip
        """The scan of what chunks hand on; `longest` of them belong to one sequence."""
        blocks = triton.cdiv(slots, self.config.block - self.chunk)
        next_slots = slots // self.chunk + 1
        constants = self.tiles | {"DIRECTION": direction}
        carries = None
        if longest > self.chunk:
            upper = self._summaries(sums, next_slots)
            launch(
                carries_kernel, blocks * self.chains, sums, factors, indices, *upper, None, None,
                blocks, slots, next_slots, config=self.config, **constants,
            )  # fmt: skip
            carries = self._carries(*upper, next_slots, (longest - 1) // self.chunk, direction)
        results = torch.empty_like(sums)
        launch(
            carries_kernel, blocks * self.chains, sums, factors, indices, None, None, None,
            carries, results, blocks, slots, next_slots, config=self.config, **constants,
        )  # fmt: skip
        return results


def _blocks(rows: int, cols: int, block: int, own: int) -> tuple[int, tuple[int, ...]]:
    """Programs for [rows, cols]; blocks of a row, their width, rows of a program, columns it owns.

    Rows that fit into a block are never split.
    """
    if cols > block:
        blocks = triton.cdiv(cols, own)
        return rows * blocks, (blocks, block, 1, own)
    width = max(cols, 1)
    return triton.cdiv(rows, block // width), (1, width, block // width, width)


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def scan_forward(
    rewards: Tensor,
    values: Tensor | None,
    next_values: Tensor | None,
    bootstrap: Tensor | None,
    *setting: Any,
) -> tuple[Tensor, Tensor]:
    given = (t for t in (rewards, values, next_values, bootstrap) if t is not None)
    dtype = _checks.compute_dtype(*given)
    call = _Call(rewards, *setting)
    new = rewards.new_zeros if call.leaves_gaps else rewards.new_empty
    returns = new(rewards.shape, dtype=dtype)
    advantages = None if values is None else new(rewards.shape, dtype=dtype)
    inputs = (
        rewards, *strides(rewards), values, *strides(values), next_values, *strides(next_values),
        bootstrap, _stride(bootstrap),
    )  # fmt: skip
    call.run(forward_kernel, 1, inputs, (advantages, returns, _faults.flag(rewards.device)))
    return rewards.new_empty(0, dtype=dtype) if advantages is None else advantages, returns


def scan_backward(
    grad_advantages: Tensor | None, grad_returns: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    *setting, needs = args
    grad = grad_advantages if grad_advantages is not None else grad_returns
    assert grad is not None
    call = _Call(grad, *setting)
    new = grad.new_zeros if call.leaves_gaps else grad.new_empty
    results = [new(grad.shape) if needed else grad.new_empty(0) for needed in needs[:3]]
    results.append(grad.new_zeros(call.sequences if needs[3] else 0))
    inputs = (
        grad_advantages, *strides(grad_advantages), grad_returns, *strides(grad_returns)
    )  # fmt: skip
    outputs = tuple(t if needed else None for needed, t in zip(needs, results, strict=True))
    call.run(backward_kernel, -1, inputs, outputs)
    return tuple(results)
