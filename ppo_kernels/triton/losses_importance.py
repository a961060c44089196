"""importance_weights in Triton: as a loss of losses.py, with weights in the place of gradients."""

import triton
import triton.language as tl
from torch import Tensor

from ..metrics import IMPORTANCE_STATS
from ..native.losses import unscaled
from ._math import LOG2E, exp2_of_double, exponential, reciprocal, tree_sum
from ._tokens import load_live, load_mask, token_block
from .losses import (
    UNSPECIALIZED,
    block_count,
    block_sum,
    find_sequence,
    run,
    sequence_range,
    write_tokens,
)
from .losses_formulas import MASK_GEOMETRIC, TIS_GEOMETRIC, importance_weight

# TIS and ICEPOP of losses_formulas.py.
_OF_TOKEN = (0, 3)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def ratio_kernel(
    live, live_b, live_t, constant, constant_b, constant_t, target, target_b, target_t,
    mask, mask_b, mask_t, tokens, cols, offsets, offsets_t, length, sequences,
    sequence_counts, statistics,
    TARGET_PER_SEQUENCE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """One program per sequence: the product or geometric mean of the ratios of its live tokens."""
    k = tl.program_id(0)
    begin, end, count = sequence_range(
        k, tokens, offsets, offsets_t, length, sequences, sequence_counts
    )
    log_ratios = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        is_live = load_mask(mask, mask_b, mask_t, i, inside, cols, FLAT)
        old = load_live(live, live_b, live_t, i, inside, is_live, cols, FLAT, tl.float64)
        log_ratios += old - load_live(
            target, target_b, target_t, i, inside, is_live, cols, FLAT, tl.float64
        )
    log_ratio = tree_sum(log_ratios)
    if VARIANT == TIS_GEOMETRIC or VARIANT == MASK_GEOMETRIC:  # noqa: PLR1714, SIM109
        log_ratio *= reciprocal(tl.maximum(count, 1).to(tl.float64))
    tl.store(statistics + k, exp2_of_double(log_ratio * LOG2E, DTYPE))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def importance_kernel(
    live, live_b, live_t, constant, constant_b, constant_t, target, target_b, target_t,
    mask, mask_b, mask_t, tokens, cols, offsets, offsets_t, length, sequences, steps,
    sequence_counts, scale, gradient, partials, blocks, low: tl.float64, high: tl.float64,
    statistics,
    MEAN_PER_SEQUENCE: tl.constexpr, TARGET_PER_SEQUENCE: tl.constexpr, FLAT: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    i, inside = token_block(tokens, BLOCK)
    is_live = load_mask(mask, mask_b, mask_t, i, inside, cols, FLAT)
    x = load_live(live, live_b, live_t, i, inside, is_live, cols, FLAT, DTYPE)
    x -= load_live(target, target_b, target_t, i, inside, is_live, cols, FLAT, DTYPE)
    ratio, _, k3 = exponential(x)
    if statistics is not None:
        sequence = find_sequence(i, offsets, offsets_t, length, sequences, steps)
        found = is_live & (sequence < sequences)
        ratio = tl.load(statistics + sequence, mask=found, other=0.0)
    weight, outside = importance_weight(ratio, low.to(DTYPE), high.to(DTYPE), VARIANT)
    weight = tl.where(is_live, weight, 0.0)

    partials += tl.program_id(0)
    write_tokens(
        i, inside, is_live, weight, weight, offsets, offsets_t, length, sequences, steps,
        sequence_counts, scale, gradient, partials + 5 * blocks, MEAN_PER_SEQUENCE, DTYPE,
    )  # fmt: skip
    wide = weight.to(tl.float64)
    tl.store(partials, block_sum(wide))
    tl.store(partials + blocks, block_sum(wide * wide))
    tl.store(partials + 2 * blocks, block_count(is_live & outside))
    tl.store(partials + 3 * blocks, block_sum(0.0 - x))
    tl.store(partials + 4 * blocks, block_sum(k3))


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    kind: int,
    low: float,
    high: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _, stats, weights = run(
        importance_kernel,
        (old_logprobs, None, rollout_logprobs),
        False,
        (low, high),
        kind,
        None if kind in _OF_TOKEN else (ratio_kernel, ()),
        IMPORTANCE_STATS,
        *unscaled(mask, cu_seqlens),
    )
    return weights, stats
