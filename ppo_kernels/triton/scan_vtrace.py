"""V-trace in Triton: the scan of `scan_chunks` with a coefficient for each step."""

import triton
import triton.language as tl

from ._math import BAD_LAMBDA
from .scan_chunks import is_chunk_end, next_lane, scan_block, store_boundaries
from .scan_steps import UNSPECIALIZED, cuts, is_set, lambdas, lane_places, read, td_errors


@triton.jit
def _truncated(ratio, clip):
    """A NaN stays."""
    return tl.where(ratio > clip, clip, ratio)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def vtrace_kernel(
    logprobs, logprobs_b, logprobs_t, rollout_logprobs, rollout_logprobs_b, rollout_logprobs_t,
    rewards, rewards_b, rewards_t, values, values_b, values_t,
    next_values, next_values_b, next_values_t, bootstrap, bootstrap_s,
    rho_clip: tl.float64, c_clip: tl.float64, pg_rho_clip: tl.float64, advantages, returns, faults,
    sums, factors, indices, carries, slots,
    mask, mask_b, mask_t, terminated, terminated_b, terminated_t,
    truncated, truncated_b, truncated_t, lams, lams_s,
    offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
    search_steps, gamma: tl.float64, lam: tl.float64,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TRUNCATE: tl.constexpr,
):  # fmt: skip
    """Advantages and returns, or, given `sums`, what chunks hand on."""
    row, col, sequence, step, k, length, exists, written, lost = lane_places(
        offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
        search_steps, BLOCK, 1,
    )  # fmt: skip
    live = exists
    if mask is not None:
        live = is_set(mask, mask_b, mask_t, row, col, exists)
    ended, cut_short = cuts(
        terminated, terminated_b, terminated_t, truncated, truncated_b, truncated_t, row, col,
        live, BLOCK,
    )  # fmt: skip
    discount = tl.zeros([BLOCK], tl.float64) + gamma
    is_last = k == length - 1
    v, td_error = td_errors(
        rewards, rewards_b, rewards_t, values, values_b, values_t,
        next_values, next_values_b, next_values_t, bootstrap, bootstrap_s, mask, mask_b, mask_t,
        where, step, row, col, cols, sequence, exists, live, ended, cut_short, is_last, lost,
        discount, BLOCK, TRUNCATE,
    )  # fmt: skip
    c = discount * lambdas(lams, lams_s, lam, sequence, exists & ~lost, faults, BAD_LAMBDA, BLOCK)
    td_error = tl.where(lost | ~(c >= 0.0), float("nan"), td_error)
    ratio = tl.exp(
        read(logprobs, logprobs_b, logprobs_t, row, col, live)
        - read(rollout_logprobs, rollout_logprobs_b, rollout_logprobs_t, row, col, live)
    )
    cut = ended | cut_short | is_last | lost | ~exists | (discount == 0.0)
    x, factor = scan_block(
        _truncated(ratio, rho_clip) * td_error, c * _truncated(ratio, c_clip), cut,
        is_chunk_end(k, CHUNK, 1), step, carries, BLOCK, CHUNK, 1, True,
    )  # fmt: skip
    if sums is not None:
        store_boundaries(sums, factors, indices, x, factor, step, k, written, CHUNK, 1)
    else:
        token = row * cols + col
        beyond = tl.where(cut, 0.0, next_lane(x, tl.arange(0, BLOCK), 1, BLOCK))
        advantage = _truncated(ratio, pg_rho_clip) * tl.fma(discount, beyond, td_error)
        tl.store(advantages + token, tl.where(live, advantage, 0.0), mask=written)
        tl.store(returns + token, tl.where(live, x + v, 0.0), mask=written)
