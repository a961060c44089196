"""clipped_loss, value_loss and scale_gradient in Triton.

The formulas are those of ``csrc/math/losses.h``. Live tokens are counted first, in blocks and from
those in sequences; the weight of a token follows on the device. One pass over the tokens then makes
the final gradient and, per block, the sum of every term of the loss and the metrics, in fp64; the
last kernel adds the blocks in a fixed order. Bits follow from the order of the tokens alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks, _faults
from ..metrics import POLICY_STATS, VALUE_STATS
from ..native.losses import numbers, or_inf
from ..ops._aggregation import AGGREGATIONS
from . import _configs
from ._launch import as_bytes, launch, strides
from ._math import (
    INF,
    LOG2E,
    clamp,
    exp2_of_double,
    exponential,
    isnan,
    reciprocal,
    tree_sum,
)
from ._tokens import (
    Tokens,
    load_live,
    load_mask,
    load_offset,
    load_sequence,
    store_tokens,
    token_block,
)
from .losses_formulas import GMPO, bounded_log_ratio, clipped_value, policy_loss

# What the loss is divided by.
_GIVEN, _TOKENS, _SEQUENCES = 0, 1, 2
_LIVE_TOKENS = tl.constexpr(_TOKENS)
_LIVE_SEQUENCES = tl.constexpr(_SEQUENCES)
_DIVIDE_BY = {"token-mean": _TOKENS, "token-sum": _GIVEN}
# GSPO and GMPO of enum PolicyVariant.
_OF_SEQUENCE = (4, 5)
# Of the stats, the first two are counts.
_COUNTS = 2


# ---- live tokens ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("mask_b", "cols"))
def count_tokens_kernel(
    mask, mask_b, mask_t, tokens, cols, block_counts, FLAT: tl.constexpr, BLOCK: tl.constexpr
):
    i, inside = token_block(tokens, BLOCK)
    live = load_mask(mask, mask_b, mask_t, i, inside, cols, FLAT)
    count = tl.sum(live.to(tl.int32), axis=0)  # exact: whole numbers
    tl.store(block_counts + tl.program_id(0), count.to(tl.int64))


@triton.jit
def _count_range(mask, mask_b, mask_t, begin, end, cols, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """Live tokens in [begin, end), less than a block."""
    i = begin + tl.arange(0, BLOCK)
    live = load_mask(mask, mask_b, mask_t, i, i < end, cols, FLAT)
    return tl.sum(live.to(tl.int32), axis=0)  # exact: whole numbers


@triton.jit(do_not_specialize=("mask_b", "tokens", "cols", "length", "sequences"))
def count_sequences_kernel(
    mask, mask_b, mask_t, tokens, cols, block_counts, offsets, offsets_t, length, sequences,
    sequence_counts, faults, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence: its live tokens, -1 if its offsets are wrong."""
    k = tl.program_id(0)
    begin, end, wrong = load_sequence(offsets, offsets_t, k, sequences, tokens, length, faults)
    if mask is None:
        count = (end - begin).to(tl.int64)
    else:
        # Whole blocks are counted already.
        first, last = (begin + BLOCK - 1) // BLOCK, end // BLOCK
        head = tl.minimum(first * BLOCK, end)
        tail = tl.maximum(last * BLOCK, head)
        count = _count_range(mask, mask_b, mask_t, begin, head, cols, FLAT, BLOCK).to(tl.int64)
        count += _count_range(mask, mask_b, mask_t, tail, end, cols, FLAT, BLOCK)
        for start in range(first, last, BLOCK):
            at = start + tl.arange(0, BLOCK)
            whole = tl.load(block_counts + at, mask=at < last, other=0)
            count += tl.sum(whole, axis=0)  # exact: whole numbers
    tl.store(sequence_counts + k, tl.where(wrong, -1, count))


@triton.jit(do_not_specialize=("blocks", "tokens", "entries", "sequences", "divide_by"))
def scale_kernel(
    block_counts, blocks, tokens, sequence_counts, entries, sequences,
    denominator, divisor: tl.float64, divide_by, norm_length: tl.float64, scale, stats,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the counts of the metrics, and 1 / what the loss is divided by, or 0."""
    live = tl.full([], 0, tl.int64)
    wrong = tl.full([], 0, tl.int32)
    if block_counts is None:
        live += tokens
    else:
        for start in range(0, blocks, BLOCK):
            at = start + tl.arange(0, BLOCK)
            count = tl.load(block_counts + at, mask=at < blocks, other=0)
            live += tl.sum(count, axis=0)  # exact: whole numbers
    live_sequences = tl.full([], 0, tl.int64)
    if sequence_counts is None:
        live_sequences += sequences
    else:
        for start in range(0, entries, BLOCK):
            at = start + tl.arange(0, BLOCK)
            count = tl.load(sequence_counts + at, mask=at < entries, other=0)
            live_sequences += tl.sum((count > 0).to(tl.int32), axis=0)  # exact: whole numbers
            wrong += tl.sum((count < 0).to(tl.int32), axis=0)  # exact: whole numbers
    tl.store(stats, live.to(tl.float64))
    tl.store(stats + 1, live_sequences.to(tl.float64))
    if denominator is not None:
        divisor = tl.load(denominator).to(tl.float64)
    else:
        divisor = tl.where(divide_by == _LIVE_TOKENS, live.to(tl.float64), divisor)
        divisor = tl.where(divide_by == _LIVE_SEQUENCES, live_sequences.to(tl.float64), divisor)
    divisor = divisor * norm_length
    inverse = tl.where(divisor == 0.0, 0.0, 1.0 / tl.where(divisor == 0.0, 1.0, divisor))
    tl.store(scale, tl.where(wrong > 0, float("nan"), inverse))


# ---- the pass over the tokens --------------------------------------------------------------------


@triton.jit
def find_sequence(i, offsets, offsets_t, length, sequences, steps):
    """The sequence of each token, by bisection of the offsets in `steps` steps."""
    if offsets is None:
        low = (i // length).to(tl.int64)
    else:
        low = i.to(tl.int64) * 0
        high = low + (sequences - 1)
        for _ in range(0, steps):
            middle = (low + high) // 2
            end = tl.load(offsets + (middle + 1) * offsets_t)
            here = (end > i) | (low >= high)
            high = tl.where(here, middle, high)
            low = tl.where(here, low, middle + 1)
    return low


@triton.jit
def block_sum(x):
    return tree_sum(x.to(tl.float64))


@triton.jit
def block_count(condition):
    return tl.sum(condition.to(tl.int32), axis=0).to(tl.float64)  # exact: whole numbers


@triton.jit
def _largest(x):
    """NaN if any element is."""
    nan = tl.max(isnan(x).to(tl.int32), axis=0)
    return tl.where(nan > 0, float("nan"), tl.max(x, axis=0)).to(tl.float64)


@triton.jit
def write_tokens(
    i, inside, live, token_loss, slope, offsets, offsets_t, length, sequences, steps,
    sequence_counts, scale, gradient, weighted,
    MEAN_PER_SEQUENCE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient, and with MEAN_PER_SEQUENCE this block's part of the loss."""
    weight = tl.load(scale)
    if MEAN_PER_SEQUENCE:
        count = length
        if sequence_counts is not None:
            sequence = find_sequence(i, offsets, offsets_t, length, sequences, steps)
            count = tl.load(sequence_counts + sequence, mask=live, other=1)
        weight = weight * reciprocal(count.to(tl.float64))
        tl.store(weighted, block_sum(token_loss * weight.to(DTYPE)))
    if gradient is not None:
        store_tokens(gradient, i, tl.where(live, slope * weight.to(DTYPE), 0.0), inside)


# The rest decides how wide loads are; anything else specialized is one JIT more.
UNSPECIALIZED = (
    "live_b", "constant_b", "target_b", "mask_b", "cols", "offsets_t", "length", "sequences",
    "steps", "blocks",
)  # fmt: skip


@triton.jit
def sequence_range(k, tokens, offsets, offsets_t, length, sequences, sequence_counts):
    """Begin and end of sequence k, and how many of its tokens are live."""
    if offsets is None:
        begin = (k + 0 * tokens) * length
        end = begin + length
        count = length
    else:
        begin, _begin_wrong = load_offset(offsets, offsets_t, k, sequences, tokens)
        end, _end_wrong = load_offset(offsets, offsets_t, k + 1, sequences, tokens)
    if sequence_counts is not None:
        count = tl.load(sequence_counts + k)
    return begin, end, count


@triton.jit(do_not_specialize=UNSPECIALIZED)
def statistic_kernel(
    live, live_b, live_t, constant, constant_b, constant_t, target, target_b, target_t,
    mask, mask_b, mask_t, tokens, cols, offsets, offsets_t, length, sequences,
    sequence_counts, statistics, low: tl.float64, high: tl.float64, limit: tl.float64,
    TARGET_PER_SEQUENCE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """One program per sequence: what its tokens need of it, summed from its first token on."""
    k = tl.program_id(0)
    begin, end, count = sequence_range(
        k, tokens, offsets, offsets_t, length, sequences, sequence_counts
    )
    log_ratios = tl.zeros([BLOCK], tl.float64)
    advantages = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        is_live = load_mask(mask, mask_b, mask_t, i, inside, cols, FLAT)
        x = load_live(live, live_b, live_t, i, inside, is_live, cols, FLAT, DTYPE)
        x -= load_live(constant, constant_b, constant_t, i, inside, is_live, cols, FLAT, DTYPE)
        x = clamp(x, limit.to(DTYPE))
        if TARGET_PER_SEQUENCE:
            advantage = tl.where(is_live, tl.load(target + k * target_t).to(DTYPE), 0.0)
        else:
            advantage = load_live(target, target_b, target_t, i, inside, is_live, cols, FLAT, DTYPE)
        if VARIANT == GMPO:
            x, _above, _below = bounded_log_ratio(x, advantage, low.to(DTYPE), high.to(DTYPE))
        log_ratios += x.to(tl.float64)
        advantages += advantage.to(tl.float64)
    share = reciprocal(tl.maximum(count, 1).to(tl.float64))
    ratio = exp2_of_double(tree_sum(log_ratios) * share * LOG2E, DTYPE)
    if VARIANT == GMPO:
        ratio = 0.0 - (tree_sum(advantages) * share).to(DTYPE) * ratio
    tl.store(statistics + k, ratio)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def policy_kernel(
    live, live_b, live_t, constant, constant_b, constant_t, target, target_b, target_t,
    mask, mask_b, mask_t, tokens, cols, offsets, offsets_t, length, sequences, steps,
    sequence_counts, scale, gradient, partials, blocks,
    low: tl.float64, high: tl.float64, dual: tl.float64, limit: tl.float64, statistics,
    MEAN_PER_SEQUENCE: tl.constexpr, TARGET_PER_SEQUENCE: tl.constexpr, FLAT: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    i, inside = token_block(tokens, BLOCK)
    is_live = load_mask(mask, mask_b, mask_t, i, inside, cols, FLAT)
    logprob = load_live(live, live_b, live_t, i, inside, is_live, cols, FLAT, DTYPE)
    moved = logprob - load_live(
        constant, constant_b, constant_t, i, inside, is_live, cols, FLAT, DTYPE
    )
    if TARGET_PER_SEQUENCE:
        sequence = find_sequence(i, offsets, offsets_t, length, sequences, steps)
        found = is_live & (sequence < sequences)
        advantage = tl.load(target + sequence * target_t, mask=found, other=0.0).to(DTYPE)
    else:
        advantage = load_live(target, target_b, target_t, i, inside, is_live, cols, FLAT, DTYPE)
    of_sequence = None
    if statistics is not None:
        sequence = find_sequence(i, offsets, offsets_t, length, sequences, steps)
        found = is_live & (sequence < sequences)
        of_sequence = tl.load(statistics + sequence, mask=found, other=0.0)
    x = clamp(moved, limit.to(DTYPE))
    ratio, ratio_minus_one, k3 = exponential(x)
    token_loss, slope, above_high, below_low, above_dual = policy_loss(
        logprob, moved, x, ratio, ratio_minus_one, advantage, of_sequence,
        low.to(DTYPE), high.to(DTYPE), dual.to(DTYPE), limit.to(DTYPE), VARIANT,
    )  # fmt: skip

    partials += tl.program_id(0)
    write_tokens(
        i, inside, is_live, token_loss, slope, offsets, offsets_t, length, sequences, steps,
        sequence_counts, scale, gradient, partials + 11 * blocks, MEAN_PER_SEQUENCE, DTYPE,
    )  # fmt: skip
    live_ratio = tl.where(is_live, ratio, 0.0).to(tl.float64)
    tl.store(partials, block_sum(token_loss))
    tl.store(partials + blocks, block_sum(0.0 - advantage * ratio))
    tl.store(partials + 2 * blocks, block_count(above_high))
    tl.store(partials + 3 * blocks, block_count(below_low))
    tl.store(partials + 4 * blocks, block_count(above_dual))
    tl.store(partials + 5 * blocks, block_sum(0.0 - x))
    tl.store(partials + 6 * blocks, block_sum(k3))
    tl.store(partials + 7 * blocks, block_sum(live_ratio))
    tl.store(partials + 8 * blocks, block_sum(live_ratio * live_ratio))
    tl.store(partials + 9 * blocks, _largest(tl.where(is_live, ratio, -INF)))
    tl.store(partials + 10 * blocks, _largest(tl.where(is_live, -ratio, -INF)))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def value_kernel(
    live, live_b, live_t, constant, constant_b, constant_t, target, target_b, target_t,
    mask, mask_b, mask_t, tokens, cols, offsets, offsets_t, length, sequences, steps,
    sequence_counts, scale, gradient, partials, blocks, clip: tl.float64, huber_delta: tl.float64,
    MEAN_PER_SEQUENCE: tl.constexpr, TARGET_PER_SEQUENCE: tl.constexpr, FLAT: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i, inside = token_block(tokens, BLOCK)
    is_live = load_mask(mask, mask_b, mask_t, i, inside, cols, FLAT)
    value = load_live(live, live_b, live_t, i, inside, is_live, cols, FLAT, DTYPE)
    old = tl.zeros_like(value)
    if constant is not None:
        old = load_live(constant, constant_b, constant_t, i, inside, is_live, cols, FLAT, DTYPE)
    target = load_live(target, target_b, target_t, i, inside, is_live, cols, FLAT, DTYPE)
    token_loss, slope, clipped = clipped_value(
        value, old, target, clip.to(DTYPE), huber_delta.to(DTYPE)
    )

    partials += tl.program_id(0)
    write_tokens(
        i, inside, is_live, token_loss, slope, offsets, offsets_t, length, sequences, steps,
        sequence_counts, scale, gradient, partials + 7 * blocks, MEAN_PER_SEQUENCE, DTYPE,
    )  # fmt: skip
    error = (value - target).to(tl.float64)
    tl.store(partials, block_sum(token_loss))
    tl.store(partials + blocks, block_count(clipped))
    tl.store(partials + 2 * blocks, block_sum(value))
    tl.store(partials + 3 * blocks, block_sum(target))
    tl.store(partials + 4 * blocks, block_sum(error))
    tl.store(partials + 5 * blocks, block_sum(error * error))
    tl.store(partials + 6 * blocks, block_sum(target.to(tl.float64) * target.to(tl.float64)))


@triton.jit(do_not_specialize=("blocks",))
def finish_kernel(
    partials, blocks, scale, loss, stats,
    MEAN_PER_SEQUENCE: tl.constexpr, SUMS: tl.constexpr, EXTREMES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sum or extreme. The last extreme is a minimum, kept as minus a maximum."""
    k = tl.program_id(0)
    partials += k * blocks
    lanes = tl.arange(0, BLOCK)
    is_sum = (k < SUMS) | (k >= SUMS + EXTREMES)
    if is_sum:
        sums = tl.zeros([BLOCK], tl.float64)
        for start in range(0, blocks, BLOCK):
            sums += tl.load(partials + start + lanes, mask=start + lanes < blocks, other=0.0)
        total = tree_sum(sums)
    else:
        largest = tl.full([BLOCK], -INF, tl.float64)
        for start in range(0, blocks, BLOCK):
            x = tl.load(partials + start + lanes, mask=start + lanes < blocks, other=-INF)
            largest = tl.where((x > largest) | isnan(x), x, largest)
        total = _largest(largest)
        total = tl.where(k == SUMS + EXTREMES - 1, -total, total)
    if k < SUMS + EXTREMES:
        tl.store(stats + k, total)
    if k == (SUMS + EXTREMES if MEAN_PER_SEQUENCE else 0):
        factor = tl.load(scale)
        if not MEAN_PER_SEQUENCE:  # whose parts are weighted
            total *= factor
        tl.store(loss, tl.where(factor == 0.0, 0.0, total).to(loss.dtype.element_ty))


@triton.jit
def scale_gradient_kernel(
    gradient, upstream, scaled, tokens,
    INPLACE: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Exact zeros, such as masked tokens have, stay: whatever they are multiplied by."""
    i, inside = token_block(tokens, BLOCK)
    by = tl.load(upstream).to(DTYPE)
    if INPLACE:
        inside = i < tl.where(by == 1.0, 0, tokens)  # nothing is read where nothing changes
    g = tl.load(gradient + i, mask=inside, other=0.0).to(DTYPE)
    store_tokens(scaled, i, tl.where(g == 0.0, 0.0, g * by), inside)


# ---- calls ---------------------------------------------------------------------------------------


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    dual: float | None,
    log_ratio_clamp: float | None,
    variant: int,
    *frame: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = numbers(low, high, dual, log_ratio_clamp)
    of_sequence = (statistic_kernel, (low, high, settings[-1]))
    return run(
        policy_kernel,
        (logprobs, old_logprobs, advantages),
        advantages.shape != logprobs.shape,
        settings,
        variant,
        of_sequence if variant in _OF_SEQUENCE else None,
        POLICY_STATS,
        *frame,
    )


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    clip: float | None,
    huber_delta: float | None,
    *frame: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return run(
        value_kernel,
        (values, old_values, returns),
        False,
        (or_inf(clip), or_inf(huber_delta)),
        None,
        None,
        VALUE_STATS,
        *frame,
    )


def scale_gradient(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = gradient.new_empty(gradient.shape, dtype=dtype)
    _scale(gradient.contiguous(), upstream, scaled)
    return scaled


def scale_gradient_(gradient: Tensor, upstream: Tensor) -> None:
    _scale(gradient, upstream, gradient)


def _scale(gradient: Tensor, upstream: Tensor, to: Tensor) -> None:
    config = _config(gradient.dtype)
    launch(
        scale_gradient_kernel, triton.cdiv(to.numel(), config.block), gradient, upstream, to,
        to.numel(), config=config, INPLACE=to is gradient, BLOCK=config.block,
        DTYPE=tl.float64 if gradient.dtype == torch.float64 else tl.float32,
    )  # fmt: skip


def _config(dtype: torch.dtype) -> _configs.Config:
    return _configs.TOKENS_FP64 if dtype == torch.float64 else _configs.TOKENS


def run(
    kernel: Any,
    inputs: tuple[Tensor, Tensor | None, Tensor],
    target_per_sequence: bool,
    settings: tuple[Any, ...],
    variant: int | None,
    of_sequence: tuple[Any, tuple[float, ...]] | None,
    names: dict[str, str],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    aggregation: int,
    denominator: Tensor | None,
    divisor: float | None,
    norm_length: float | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All launches of a loss; `of_sequence`: the kernel of its statistics, and its settings."""
    live, constant, target = inputs
    dtype = _checks.compute_dtype(*(t for t in inputs if t is not None))
    loss = live.new_empty((), dtype=dtype)
    stats = live.new_empty(len(names), dtype=torch.float64)
    gradient = live.new_empty(live.shape if needs_gradient else (0,), dtype=dtype)

    mask = as_bytes(mask)
    tokens = Tokens(live, constant, mask, None if target_per_sequence else target)
    size = (tokens.count, tokens.cols)
    sequences = live.shape[0] if live.dim() == 2 and tokens.count else 0
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
    where_mask = tokens.where(mask)

    counting = _configs.COUNTS
    tile = {"BLOCK": counting.block}
    block_counts = sequence_counts = None
    blocks = tokens.programs(counting.block)
    entries = sequences + (cu_seqlens is not None)
    if mask is not None:
        block_counts = live.new_empty(blocks, dtype=torch.int64)
        launch(
            count_tokens_kernel, blocks, *where_mask, *size, block_counts,
            config=counting, FLAT=tokens.flat, **tile,
        )  # fmt: skip
    if entries and (mask is not None or cu_seqlens is not None):
        sequence_counts = live.new_empty(entries, dtype=torch.int64)
        launch(
            count_sequences_kernel, entries, *where_mask, *size, block_counts,
            cu_seqlens, strides(cu_seqlens)[1], tokens.cols, sequences, sequence_counts,
            _faults.flag(live.device), config=counting, FLAT=tokens.flat, **tile,
        )  # fmt: skip
    scale = live.new_empty((), dtype=torch.float64)
    name = AGGREGATIONS[aggregation]
    launch(
        scale_kernel, 1, block_counts, blocks, tokens.count, sequence_counts, entries, sequences,
        denominator, 1.0 if divisor is None else divisor,
        _DIVIDE_BY.get(name, _SEQUENCES) if divisor is None else _GIVEN,
        1.0 if norm_length is None else norm_length, scale, stats, config=counting, **tile,
    )  # fmt: skip

    config = _config(dtype)
    blocks = tokens.programs(config.block)
    mean_per_sequence = {"MEAN_PER_SEQUENCE": name == "seq-mean-token-mean"}
    rows = len(names) - _COUNTS
    sums = sum(how == "sum" for how in names.values()) - _COUNTS
    partials = live.new_empty((rows + name.count("mean-token-mean"), blocks), dtype=torch.float64)
    where_target = (target, 0, target.stride(0)) if target_per_sequence else tokens.where(target)
    where = (
        *tokens.where(live), *tokens.where(constant), *where_target, *where_mask, *size,
        cu_seqlens, strides(cu_seqlens)[1], tokens.cols, sequences,
    )  # fmt: skip
    shared: dict[str, Any] = {
        "TARGET_PER_SEQUENCE": target_per_sequence, "FLAT": tokens.flat,
        "BLOCK": config.block, "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    if variant is not None:
        shared["VARIANT"] = variant
        statistics = None
        if of_sequence is not None:
            statistic, of_statistic = of_sequence
            statistics = live.new_empty(sequences, dtype=dtype)
            launch(
                statistic, sequences, *where, sequence_counts, statistics, *of_statistic,
                config=config, **shared,
            )  # fmt: skip
        settings = (*settings, statistics)
    launch(
        kernel, blocks, *where, max(sequences - 1, 0).bit_length(), sequence_counts, scale,
        gradient if needs_gradient else None, partials, blocks, *settings, config=config,
        **shared, **mean_per_sequence,
    )  # fmt: skip
    launch(
        finish_kernel, partials.shape[0], partials, blocks, scale, loss, stats[_COUNTS:],
        config=counting, SUMS=sums, EXTREMES=rows - sums, **tile, **mean_per_sequence,
    )  # fmt: skip
    return loss, stats, gradient
