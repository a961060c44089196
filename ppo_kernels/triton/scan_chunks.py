"""A scan cut into chunks: x_t = d_t + c_t x_{t+1} within them, and what passes between them.

Every sequence is cut into chunks of CHUNK steps, counted from its first step that exists. A program
scans a block of steps: those that it writes, and as many of those that the scan meets before them
as complete the first one's chunk. By doubling distances each step is combined with all that follow
it in its chunk, so a step's bits depend on its place in the sequence alone: not on where in a block
it lies, on what is packed beside it, or on padding.

What passes from chunk to chunk is a scan of the same kind over one element per inner boundary, that
is cut into chunks in turn, and so on: no program waits for another, and one long row or a million
short sequences fill the device alike. The boundaries of a sequence are CHUNK steps apart and those
of two sequences farther, so boundary i has the slot i // CHUNK to itself.

Lanes are in the order opposite to the scan's: what lane l needs is in the lanes above it. They load
one element each: neighbours read neighbouring addresses, which the hardware joins, and loads are
one in a hundred of a scan's instructions.
"""

import triton
import triton.language as tl

_SMALLEST = tl.constexpr(2.0**-1022)  # the smallest normal fp64 number
_LARGEST = tl.constexpr(2.0**1023 * (2 - 2.0**-52))


@triton.jit
def _nearest(a, b):
    return tl.minimum(a, b)


@triton.jit
def _product(a, b):
    """Above 0 it stays a normal number: an infinite carry times it is still infinite."""
    both = a * b
    return tl.where(both < _SMALLEST, _SMALLEST, both)


@triton.jit
def next_lane(x, lane, distance, BLOCK: tl.constexpr):
    return tl.gather(x, tl.minimum(lane + distance, BLOCK - 1), 0)


@triton.jit
def scan_block(
    x, c, cut, chunk_end, step, carries,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, DIRECTION: tl.constexpr, VARYING: tl.constexpr,
):  # fmt: skip
    """The scan of every lane up to its chunk's end, or to the first cut, which may not be passed.

    Completed by what the next chunk carries in, if `carries` is given. Also the factor by which it
    enters at the chunk's far end: 0 if a cut lies before. Steps of a chunk have one coefficient c,
    or, if VARYING, each its own.
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
            beyond = next_lane(x, lane, 1 << level, BLOCK)
            inside = lane + (1 << level) <= last
            x = tl.where(inside, tl.fma(c, beyond, x), x)
            if VARYING:
                both = _product(c, next_lane(c, lane, 1 << level, BLOCK))
                both = tl.where(both > _LARGEST, _LARGEST, both)  # a carry of 0 stays 0
                c = tl.where(inside, both, c)
            else:
                power = tl.where(((reach >> level) & 1) != 0, _product(power, c), power)
                c = _product(c, c)
    power = c if VARYING else tl.where(reach == CHUNK, c, power)
    if carries is not None:
        slot = (step + DIRECTION * reach) // CHUNK
        x = tl.where(carried, tl.fma(power, tl.load(carries + slot, mask=carried, other=0.0), x), x)
    return x, tl.where(carried, c, 0.0)


@triton.jit
def is_chunk_end(k, CHUNK: tl.constexpr, DIRECTION: tl.constexpr):
    return k % CHUNK == (CHUNK - 1 if DIRECTION > 0 else 0)


@triton.jit
def store_boundaries(
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
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, DIRECTION: tl.constexpr, VARYING: tl.constexpr,
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
    x, factor = scan_block(
        x, c, ~exists, is_chunk_end(k, CHUNK, DIRECTION), slot, carries, BLOCK, CHUNK, DIRECTION,
        VARYING,
    )  # fmt: skip
    written = exists & (lane < own)
    if results is not None:
        tl.store(results + chain * slots + slot, x, mask=written)
    else:
        store_boundaries(
            next_sums + chain * next_slots, next_factors + chain * next_slots,
            next_indices + chain * next_slots, x, factor, slot, k, written, CHUNK, DIRECTION,
        )  # fmt: skip
