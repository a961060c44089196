"""The steps a scan runs over: where they are, what masks and flags say, and which exist.

They are those of padded rows, those between offsets, or, under the "carry" convention, a list of
the live ones.
"""

import triton
import triton.language as tl

from ._math import BAD_OFFSETS, report_fault

NOWHERE = tl.constexpr(2**62)
_MASKS = ("mask", "terminated", "truncated")
_NUMBERS = ("logprobs", "rollout_logprobs", "rewards", "values", "next_values", "ga", "gr")
UNSPECIALIZED = [
    *(f"{name}_b" for name in (*_MASKS, *_NUMBERS)), *(f"{name}_t" for name in _MASKS),
    "bootstrap_s", "lams_s", "value_lams_s", "padded", "rows", "cols", "blocks", "width",
    "rows_at_once", "own", "sequences", "search_steps", "slots",
]  # fmt: skip


@triton.jit
def read(t, t_b, t_t, row, col, wanted):
    """In fp64; 0 where not wanted, whatever is there."""
    x = tl.load(t + row * t_b + col * t_t, mask=wanted, other=0.0)
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def is_set(t, t_b, t_t, row, col, wanted):
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
def lane_places(
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
def neighbour(where, step, row, col, cols, exists, DISTANCE: tl.constexpr):
    """The column of the step before or after, in the same sequence."""
    if where is None:
        beside = col + DISTANCE
    else:
        beside = _token(where, step + DISTANCE, exists) - row * cols
    return beside


@triton.jit
def cuts(
    terminated, terminated_b, terminated_t, truncated, truncated_b, truncated_t, row, col, live,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Which live steps terminate, and which are truncated and do not."""
    ended = tl.arange(0, BLOCK) < 0
    if terminated is not None:
        ended = is_set(terminated, terminated_b, terminated_t, row, col, live)
    cut_short = tl.arange(0, BLOCK) < 0
    if truncated is not None:
        cut_short = is_set(truncated, truncated_b, truncated_t, row, col, live) & ~ended
    return ended, cut_short


@triton.jit
def lambdas(
    lams, stride, lam, sequence, exists, faults, FAULT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The lambda of every lane; NaN for a bad one, which is reported if `faults` are given."""
    value = tl.full([BLOCK], 0.0, tl.float64) + lam
    if lams is not None:
        value = read(lams, 0, stride, sequence, sequence, exists)
        bad = exists & ~((value >= 0.0) & (value <= 1.0))
        value = tl.where(bad, float("nan"), value)
        if faults is not None:
            first = tl.min(tl.where(bad, sequence, NOWHERE), axis=0)
            if first != NOWHERE:
                report_fault(faults, first, FAULT)
    return value


@triton.jit
def td_errors(
    rewards, rewards_b, rewards_t, values, values_b, values_t,
    next_values, next_values_b, next_values_t, bootstrap, bootstrap_s, mask, mask_b, mask_t,
    where, step, row, col, cols, sequence, exists, live, ended, cut_short, is_last, lost, discount,
    BLOCK: tl.constexpr, TRUNCATE: tl.constexpr,
):  # fmt: skip
    """The values, and r + gamma v' - v."""
    r = read(rewards, rewards_b, rewards_t, row, col, live)
    v = tl.zeros([BLOCK], tl.float64)
    following = v
    if values is not None:
        v = read(values, values_b, values_t, row, col, live)
        follows = exists & ~is_last & ~lost
        after = neighbour(where, step, row, col, cols, follows, 1)
        if mask is not None:
            follows = is_set(mask, mask_b, mask_t, row, after, follows)
        following = read(values, values_b, values_t, row, after, follows)
    if bootstrap is not None:
        used = is_last & (live if TRUNCATE else exists)
        following = tl.where(used, read(bootstrap, 0, bootstrap_s, row, sequence, used), following)
    if next_values is not None:
        following = tl.where(
            cut_short,
            read(next_values, next_values_b, next_values_t, row, col, cut_short),
            following,
        )
    following = tl.where(ended | (discount == 0.0), 0.0, following)
    delta = tl.fma(discount, following, r - v)
    return v, delta


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
    live = is_set(mask, mask_b, mask_t, row, col, exists)
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
        first = tl.min(tl.where(bad, i, NOWHERE), axis=0)
        if first != NOWHERE:
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
