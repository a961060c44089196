"""ppo_loss_from_logits and ppo_loss_from_hidden in Triton.

Of the kernels of rows and of tokens, and one that joins them: where a token's loss depends on that
token alone, the program that sums a row of logits makes the row's gradient too, while the row is in
the second-level cache. Fewer rows than fill the device are cut up between programs, and take two
passes.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import _faults
from .._devices import processors
from ..native import ppo_loss, two_leading
from ..native.kl import ESTIMATORS
from ..native.losses import numbers
from ..native.ppo_loss import Kernels, Tail
from ..ops._objective import Objective
from . import kl, logprob, losses, moments
from ._launch import launch, strides
from ._math import clamp, exponential, position
from .hidden import rows_of
from .kl import kl_slope
from .logprob import (
    LIVE,
    SKIPPED,
    UNSPECIALIZED,
    Rows,
    gradient_of_columns,
    read_row,
    score_row,
    write_row,
    write_row_without_sums,
)
from .losses_formulas import policy_loss


@triton.jit
def _load(x, x_b, x_t, row, col, DTYPE: tl.constexpr):
    return tl.load(x + row * x_b + col * x_t).to(DTYPE)


@triton.jit(
    do_not_specialize=(*UNSPECIALIZED, "old_b", "old_t", "a_b", "a_t", "ref_b", "ref_t", "w_b")
)
def rows_kernel(
    logits, logits_b, logits_t, logits_v, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
    temperatures, temperatures_b, temperatures_t, old, old_b, old_t, advantages, a_b, a_t,
    ref, ref_b, ref_t, weights, w_b, w_t, loss_scale, logprobs, entropies, state, faults,
    grad_logits, grad_b, grad_t, grad_v,
    cols, vocab, ignore_index, gain: tl.float64, inner: tl.float64, outer: tl.float64,
    low: tl.float64, high: tl.float64, dual: tl.float64, limit: tl.float64,
    kl_coef: tl.float64, entropy_coef: tl.float64,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr, ENTROPY_COEF: tl.constexpr,
    VARIANT: tl.constexpr, ESTIMATOR: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per row. grad_logits may be logits: a program reads, then writes."""
    i, row, col = position(tl.program_id(0), cols)
    kind, token, gain = read_row(
        row, col, vocab, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
        temperatures, temperatures_b, temperatures_t, ignore_index, gain,
    )  # fmt: skip
    grad_logits += row * grad_b + col * grad_t
    if kind != LIVE:
        write_row_without_sums(i, kind, logprobs, entropies, state, faults, ENTROPY, DTYPE)
        fill = tl.where(kind == SKIPPED, 0.0, float("nan"))
        for begin in range(0, vocab, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            to = grad_logits + columns.to(tl.int64) * grad_v
            tl.store(to, tl.full([BLOCK], 0.0, DTYPE) + fill, mask=columns < vocab)
        return
    logits += row * logits_b + col * logits_t
    logprob, entropy, highest, log_sum, mean = score_row(
        logits, logits_v, vocab, token, gain, inner, outer, SEGMENT, BLOCK, ENTROPY, SOFTCAP, DTYPE
    )  # fmt: skip
    write_row(i, logprobs, entropies, state, logprob, entropy, highest, log_sum, mean, ENTROPY)

    weight = _load(weights, w_b, w_t, row, col, DTYPE)
    advantage = _load(advantages, a_b, a_t, row, col, DTYPE)
    moved = logprob - _load(old, old_b, old_t, row, col, DTYPE)
    x = clamp(moved, limit.to(DTYPE))
    ratio, ratio_minus_one, _ = exponential(x)
    _, slope, _, _, _ = policy_loss(
        logprob, moved, x, ratio, ratio_minus_one, advantage, None,
        low.to(DTYPE), high.to(DTYPE), dual.to(DTYPE), limit.to(DTYPE), VARIANT,
    )  # fmt: skip
    g = slope * weight
    if ref is not None:
        d = logprob - _load(ref, ref_b, ref_t, row, col, DTYPE)
        clamped = (d > limit.to(DTYPE)) | (d < -limit.to(DTYPE))
        slope = tl.where(clamped, 0.0, kl_slope(d, ESTIMATOR))
        g += kl_coef.to(DTYPE) * slope * weight
    h = -entropy_coef.to(DTYPE) * weight
    if loss_scale is not None:
        scale = tl.load(loss_scale).to(DTYPE)
        g *= scale
        h *= scale
    idle = g == 0.0
    if ENTROPY_COEF:
        idle = idle & (h == 0.0)
    read = tl.where(idle, 0, vocab)
    for begin in range(0, vocab, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        from_here = logits + columns.to(tl.int64) * logits_v
        grad = gradient_of_columns(
            tl.load(from_here, mask=columns < read, other=0.0).to(DTYPE), columns == token,
            g, h, ENTROPY_COEF, logprob, highest, log_sum, mean, gain, inner, outer, SOFTCAP, DTYPE,
        )  # fmt: skip
        grad = tl.where(idle, 0.0, grad)
        tl.store(grad_logits + columns.to(tl.int64) * grad_v, grad, mask=columns < vocab)


def ppo_loss_from_logits(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return ppo_loss.from_logits(_kernels(logits), False, logits, *args)


def ppo_loss_from_logits_(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return ppo_loss.from_logits(_kernels(logits), True, logits, *args)


def ppo_loss_from_hidden(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return ppo_loss.from_hidden(_kernels(hidden), hidden, *args)


def _kernels(like: Tensor) -> Kernels:
    return Kernels(
        rows_of(like),
        logprob.logprob_backward_into,
        losses.clipped_loss,
        kl.kl_forward,
        kl.kl_backward,
        moments.masked_sum,
        _score_and_differentiate,
    )


def _score_and_differentiate(
    grad_logits: Tensor, logits: Tensor, labels: tuple[Any, ...], settings: tuple[Any, ...],
    o: Objective, tail: Tail,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Log-probabilities and entropies, and the gradient; None if rows are too few."""
    call = Rows(logits, *labels, *settings)
    if call.rows < 2 * processors(logits.device):
        return None
    tokens = labels[0]
    o = o.by_tokens(tokens)
    dtype = tail.weights.dtype
    logprobs = logits.new_empty(tokens.shape, dtype=dtype)
    entropies = logits.new_empty(tokens.shape if o.entropy else (0,), dtype=dtype)
    state = logits.new_empty((*tokens.shape, 3), dtype=dtype)
    config = logprob.forward_config(logits)
    where = (
        o.old_logprobs, o.advantages, o.ref_logprobs if o.kl_coef else None,
        tail.weights.expand(tokens.shape),
    )  # fmt: skip
    policy = numbers(*o.policy[:4])
    launch(
        rows_kernel, call.rows, *call.where, *(x for t in where for x in (t, *strides(t))),
        o.loss_scale, logprobs, entropies, state, _faults.flag(logits.device),
        two_leading(grad_logits, 1), *strides(two_leading(grad_logits, 1), 1), *call.settings,
        *policy, o.kl_coef, o.entropy_coef, config=config, SEGMENT=config.segment,
        BLOCK=config.block, ENTROPY=o.entropy, ENTROPY_COEF=o.entropy_coef != 0.0,
        VARIANT=o.policy.code, ESTIMATOR=ESTIMATORS.index(o.kl_gradient), **call.constants,
    )  # fmt: skip
    return logprobs, entropies
