"""logprob_forward and logprob_backward in Triton.

The formulas are those of ``csrc/math/logprob.h``: a row is summed without its target, and elements
equal to the maximum are counted apart from the rest. z = c u, with u the logits (or the capped
logits), and `gain` = c log2(e) in fp64.

A row is cut into segments of a fixed number of columns, from column 0 on. Within a segment every
lane of a block has sums of its own, all against the segment's running maximum; lanes are added in a
fixed tree, segments are merged in order. Few long rows give one program to each segment and merge
in a second kernel: the same device functions in the same order, hence the same bits.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks, _faults
from .._devices import processors
from ..native import two_leading, two_leading_each
from . import _configs
from ._launch import as_bytes, launch, strides
from ._math import (
    BAD_TEMPERATURE,
    BAD_TOKEN,
    INF,
    LN2,
    LOG2E,
    exp2_of_double,
    expm1,
    log1p,
    position,
    reciprocal,
    report_fault,
    sech2,
    tanh,
    tree_sum,
)

SKIPPED = tl.constexpr(0)
LIVE = tl.constexpr(1)

# Only strides of logits decide how wide loads are; anything else specialized is one JIT more.
UNSPECIALIZED = (
    "cols",
    "tokens_b",
    "tokens_t",
    "mask_b",
    "mask_t",
    "temperatures_b",
    "temperatures_t",
    "ignore_index",
)


@triton.jit
def read_row(
    row, col, vocab, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
    temperatures, temperatures_b, temperatures_t, ignore_index, gain,
):  # fmt: skip
    """What a position is (skipped, live, or its fault negated), its token and its gain."""
    kind = LIVE
    if mask is not None:
        kind = tl.where(tl.load(mask + row * mask_b + col * mask_t) != 0, kind, SKIPPED)
    token = tl.load(tokens + row * tokens_b + col * tokens_t).to(tl.int64)
    kind = tl.where(token == ignore_index, SKIPPED, kind)
    bad = (kind == LIVE) & ((token < 0) | (token >= vocab))
    kind = tl.where(bad, -BAD_TOKEN, kind)
    if temperatures is not None:
        t = tl.load(temperatures + row * temperatures_b + col * temperatures_t).to(tl.float64)
        bad = (kind == LIVE) & ~((t > 0.0) & (t < INF))
        kind = tl.where(bad, -BAD_TEMPERATURE, kind)
        gain = gain * reciprocal(t)
    return kind, token, gain


@triton.jit
def _transform(x, inner, outer, SOFTCAP: tl.constexpr):
    """Logits to u."""
    if SOFTCAP:
        x = tl.cast(outer, x.dtype) * tanh(x * tl.cast(inner, x.dtype))
    return x


@triton.jit
def _add(u, highest, at_max, rest, slope, gain, ENTROPY: tl.constexpr):
    """To the sums of each lane one more element, -inf for none; the slope is in units of log 2."""
    top = tl.max(u, axis=0)
    if top > highest:
        # Before the first finite element there is nothing to rescale but a NaN.
        gap = tl.where(highest == -INF, 0.0, (highest - top) * gain)
        weight = tl.exp2(gap)
        if ENTROPY:
            # gap * mass is 0 where the weight is: -inf * 0 cannot be.
            slope = tl.where(weight == 0.0, 0.0, weight * (slope + gap * (at_max + rest)))
            rest = weight * (at_max + rest)
            at_max = tl.zeros_like(at_max)
        else:
            rest = weight * rest
        highest = top
    reference = tl.where(highest == -INF, 0.0, highest)
    y = (u - reference) * gain
    e = tl.exp2(y)
    if ENTROPY:
        equal = u == reference
        at_max += tl.where(equal, 1.0, 0.0)
        rest += tl.where(equal, 0.0, e)
        slope += tl.where(e == 0.0, 0.0, e * y)
    else:
        rest += e
    return highest, at_max, rest, slope


@triton.jit
def _sum_segment(
    logits, stride, begin, end, token, gain, inner, outer,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Sums over columns [begin, end) but the target: see RowSums in csrc/math/logprob.h.

    The slope is in units of log 2. Without ENTROPY all mass is in `rest`.
    """
    narrow_gain = gain.to(DTYPE)
    highest = tl.full([], -INF, DTYPE)
    at_max = tl.zeros([BLOCK], DTYPE)
    rest = tl.zeros([BLOCK], DTYPE)
    slope = tl.zeros([BLOCK], DTYPE)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < end
        x = tl.load(logits + columns.to(tl.int64) * stride, mask=inside, other=-INF).to(DTYPE)
        u = _transform(x, inner, outer, SOFTCAP)
        u = tl.where(inside & (columns != token), u, -INF)
        highest, at_max, rest, slope = _add(u, highest, at_max, rest, slope, narrow_gain, ENTROPY)
    count = tl.sum(at_max, axis=0)  # whole numbers: exact in any order
    return highest, count, tree_sum(rest), tree_sum(slope)


@triton.jit
def _merge(
    a_max, a_at_max, a_rest, a_slope, b_max, b_at_max, b_rest, b_slope, gain, DTYPE: tl.constexpr
):
    a_high = a_max >= b_max
    highest, lowest = tl.where(a_high, a_max, b_max), tl.where(a_high, b_max, a_max)
    high_at_max, low_at_max = (
        tl.where(a_high, a_at_max, b_at_max), tl.where(a_high, b_at_max, a_at_max),
    )  # fmt: skip
    high_rest, low_rest = tl.where(a_high, a_rest, b_rest), tl.where(a_high, b_rest, a_rest)
    high_slope, low_slope = tl.where(a_high, a_slope, b_slope), tl.where(a_high, b_slope, a_slope)
    gap = tl.where(lowest == -INF, 0.0, (lowest.to(tl.float64) - highest.to(tl.float64)) * gain)
    weight = exp2_of_double(gap, DTYPE)
    gap = gap.to(DTYPE)
    mass = low_at_max + low_rest
    equal = lowest == highest
    at_max = high_at_max + tl.where(equal, low_at_max, 0.0)
    rest = high_rest + weight * (low_rest + tl.where(equal, 0.0, low_at_max))
    # gap * mass is 0 where the weight is: -inf * 0 cannot be.
    slope = high_slope + tl.where(weight == 0.0, 0.0, weight * (low_slope + gap * mass))
    return highest, at_max, rest, slope


@triton.jit
def _finish(o_max, o_at_max, o_rest, o_slope, target, gain, DTYPE: tl.constexpr):
    """Log p, entropy and the state (maximum, log of the sum, mean of z - maximum) of a row."""
    hopeless = (target == INF) | (o_max == INF) | ((target == -INF) & (o_max == -INF))
    target = tl.where(hopeless, float("nan"), target)
    mass = o_at_max + o_rest
    # The log-odds against the target, and their exponential by a way of its own: near p = 1 the
    # logarithm has no relative accuracy left to give.
    y = (o_max.to(tl.float64) - target.to(tl.float64)) * gain
    odds = mass * exp2_of_double(y, DTYPE)
    log_odds = (tl.log(mass).to(tl.float64) + y * LN2).to(DTYPE)
    unlikely = log_odds > 0.0
    small = tl.where(unlikely, tl.exp(-log_odds), odds)
    logprob = 0.0 - (tl.where(unlikely, log_odds, 0.0) + log1p(small))
    t_at_max = tl.where(target == -INF, 0.0, 1.0).to(DTYPE)
    t_rest = tl.where(tl.abs(target) <= INF, 0.0, target)  # NaN stays
    highest, at_max, rest, slope = _merge(
        o_max, o_at_max, o_rest, o_slope, target, t_at_max, t_rest, tl.full([], 0.0, DTYPE),
        gain, DTYPE,
    )  # fmt: skip
    alone = at_max == 1.0
    log_sum = tl.where(alone & (rest <= 1.0), log1p(rest), tl.log(at_max + rest))
    mean = slope * LN2 / (at_max + rest)
    return logprob, log_sum - mean, highest, log_sum, mean


@triton.jit
def score_row(
    logits, logits_v, vocab, token, gain, inner, outer,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """See `_finish`; all segments of a row in order."""
    highest = tl.full([], -INF, DTYPE)
    at_max = tl.full([], 0.0, DTYPE)
    rest = tl.full([], 0.0, DTYPE)
    slope = tl.full([], 0.0, DTYPE)
    for begin in range(0, vocab, SEGMENT):
        s_max, s_at_max, s_rest, s_slope = _sum_segment(
            logits, logits_v, begin, tl.minimum(begin + SEGMENT, vocab), token, gain, inner, outer,
            BLOCK, ENTROPY, SOFTCAP, DTYPE,
        )  # fmt: skip
        highest, at_max, rest, slope = _merge(
            highest, at_max, rest, slope, s_max, s_at_max, s_rest, s_slope, gain, DTYPE
        )
    target = _transform(tl.load(logits + token * logits_v).to(DTYPE), inner, outer, SOFTCAP)
    return _finish(highest, at_max, rest, slope, target, gain, DTYPE)


@triton.jit
def write_row(
    i, logprobs, entropies, state, logprob, entropy, highest, log_sum, mean, ENTROPY: tl.constexpr
):
    tl.store(logprobs + i, logprob)
    if ENTROPY:
        tl.store(entropies + i, entropy)
    tl.store(state + 3 * i, highest)
    tl.store(state + 3 * i + 1, log_sum)
    tl.store(state + 3 * i + 2, mean)


@triton.jit
def write_row_without_sums(
    i, kind, logprobs, entropies, state, faults, ENTROPY: tl.constexpr, DTYPE: tl.constexpr
):
    """A skipped position gives 0, a faulty one NaN."""
    if kind < 0:
        report_fault(faults, i, (-kind).to(tl.int64))
    fill = tl.where(kind < 0, float("nan"), 0.0).to(DTYPE)
    write_row(i, logprobs, entropies, state, fill, fill, fill, fill, fill, ENTROPY)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    logits, logits_b, logits_t, logits_v, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
    temperatures, temperatures_b, temperatures_t, logprobs, entropies, state, faults,
    cols, vocab, ignore_index, gain: tl.float64, inner: tl.float64, outer: tl.float64,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    i, row, col = position(tl.program_id(0), cols)
    kind, token, gain = read_row(
        row, col, vocab, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
        temperatures, temperatures_b, temperatures_t, ignore_index, gain,
    )  # fmt: skip
    if kind != LIVE:
        write_row_without_sums(i, kind, logprobs, entropies, state, faults, ENTROPY, DTYPE)
        return
    logits += row * logits_b + col * logits_t
    logprob, entropy, highest, log_sum, mean = score_row(
        logits, logits_v, vocab, token, gain, inner, outer, SEGMENT, BLOCK, ENTROPY, SOFTCAP, DTYPE
    )  # fmt: skip
    write_row(i, logprobs, entropies, state, logprob, entropy, highest, log_sum, mean, ENTROPY)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "segments"))
def segments_kernel(
    logits, logits_b, logits_t, logits_v, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
    temperatures, temperatures_b, temperatures_t, sums, segments,
    cols, vocab, ignore_index, gain: tl.float64, inner: tl.float64, outer: tl.float64,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per segment: its sums, for merge_kernel."""
    program = tl.program_id(0)
    segment = program % segments
    i, row, col = position(program // segments, cols)
    kind, token, gain = read_row(
        row, col, vocab, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
        temperatures, temperatures_b, temperatures_t, ignore_index, gain,
    )  # fmt: skip
    if kind != LIVE:
        return
    logits += row * logits_b + col * logits_t
    begin = segment * SEGMENT
    highest, at_max, rest, slope = _sum_segment(
        logits, logits_v, begin, tl.minimum(begin + SEGMENT, vocab), token, gain, inner, outer,
        BLOCK, ENTROPY, SOFTCAP, DTYPE,
    )  # fmt: skip
    sums += 4 * (i * segments + segment)
    tl.store(sums, highest)
    tl.store(sums + 1, at_max)
    tl.store(sums + 2, rest)
    tl.store(sums + 3, slope)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "segments"))
def merge_kernel(
    logits, logits_b, logits_t, logits_v, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
    temperatures, temperatures_b, temperatures_t, sums, segments, logprobs, entropies, state,
    faults, cols, vocab, ignore_index, gain: tl.float64, inner: tl.float64, outer: tl.float64,
    ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per row, after segments_kernel."""
    i, row, col = position(tl.program_id(0), cols)
    kind, token, gain = read_row(
        row, col, vocab, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
        temperatures, temperatures_b, temperatures_t, ignore_index, gain,
    )  # fmt: skip
    if kind != LIVE:
        write_row_without_sums(i, kind, logprobs, entropies, state, faults, ENTROPY, DTYPE)
        return
    logits += row * logits_b + col * logits_t
    sums += 4 * i * segments
    highest = tl.full([], -INF, DTYPE)
    at_max = tl.full([], 0.0, DTYPE)
    rest = tl.full([], 0.0, DTYPE)
    slope = tl.full([], 0.0, DTYPE)
    for _ in range(0, segments):
        highest, at_max, rest, slope = _merge(
            highest, at_max, rest, slope,
            tl.load(sums), tl.load(sums + 1), tl.load(sums + 2), tl.load(sums + 3), gain, DTYPE,
        )  # fmt: skip
        sums += 4
    target = _transform(tl.load(logits + token * logits_v).to(DTYPE), inner, outer, SOFTCAP)
    logprob, entropy, highest, log_sum, mean = _finish(
        highest, at_max, rest, slope, target, gain, DTYPE
    )
    write_row(i, logprobs, entropies, state, logprob, entropy, highest, log_sum, mean, ENTROPY)


@triton.jit
def gradient_of_columns(
    x, target, g, h, ENTROPY: tl.constexpr, logprob, highest, log_sum, mean,
    gain, inner, outer, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of logits x; `target` says which of them is the token."""
    u = _transform(x, inner, outer, SOFTCAP)
    c = (gain * LN2).to(DTYPE)
    y = (u - highest) * gain.to(DTYPE)
    p = tl.where(target, tl.exp(logprob), tl.exp2(y - log_sum * LOG2E))
    grad = -(g * c) * tl.where(target, expm1(logprob), p)
    if ENTROPY:
        grad += tl.where(p == 0.0, 0.0, (h * c) * (p * (mean - y * LN2)))
    if SOFTCAP:
        grad *= tl.cast(inner * outer, DTYPE) * sech2(x * tl.cast(inner, DTYPE))
    return grad


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "blocks", "g_b", "g_t", "h_b", "h_t"))
def backward_kernel(
    grad_logprobs, g_b, g_t, grad_entropy, h_b, h_t, logits, logits_b, logits_t, logits_v,
    tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
    temperatures, temperatures_b, temperatures_t, logprobs, state,
    grad_logits, grad_b, grad_t, grad_v,
    blocks, cols, vocab, ignore_index, gain: tl.float64, inner: tl.float64, outer: tl.float64,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per block of a row. grad_logits may be logits: a program reads, then writes."""
    program = tl.program_id(0)
    block = program % blocks
    i, row, col = position(program // blocks, cols)
    kind, token, gain = read_row(
        row, col, vocab, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
        temperatures, temperatures_b, temperatures_t, ignore_index, gain,
    )  # fmt: skip
    g = tl.full([], 0.0, DTYPE)
    h = tl.full([], 0.0, DTYPE)
    if grad_logprobs is not None:
        g = tl.load(grad_logprobs + row * g_b + col * g_t).to(DTYPE)
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row * h_b + col * h_t).to(DTYPE)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    grad_logits += row * grad_b + col * grad_t + columns.to(tl.int64) * grad_v
    asked = (kind != SKIPPED) & ~((g == 0.0) & (h == 0.0))
    if (kind != LIVE) | ~asked:
        fill = tl.where(asked, float("nan"), 0.0)
        tl.store(grad_logits, tl.full([BLOCK], 0.0, DTYPE) + fill, mask=inside)
        return
    logits += row * logits_b + col * logits_t + columns.to(tl.int64) * logits_v
    x = tl.load(logits, mask=inside, other=0.0).to(DTYPE)
    highest = tl.load(state + 3 * i)
    log_sum = tl.load(state + 3 * i + 1)
    mean = tl.load(state + 3 * i + 2)
    logprob = tl.load(logprobs + i)
    grad = gradient_of_columns(
        x, columns == token, g, h, grad_entropy is not None, logprob, highest, log_sum, mean,
        gain, inner, outer, SOFTCAP, DTYPE,
    )  # fmt: skip
    tl.store(grad_logits, grad, mask=inside)


class Rows:
    """What all kernels are told about a call: positions [B, T], their labels, and the transform."""

    def __init__(
        self,
        logits: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        temperatures: Tensor | None,
        temperature: float,
        softcap: float,
        logit_scale: float,
        ignore_index: int,
    ) -> None:
        tokens, mask, temperatures = two_leading_each(tokens, mask, temperatures)
        self.logits = two_leading(logits, 1)
        self.rows = tokens.numel()
        self.vocab = logits.shape[-1]
        # u = outer tanh(inner x) and c = 1 / temperature; or u = x and c = scale / temperature.
        c = (1.0 if softcap else logit_scale) / temperature
        mask = as_bytes(mask)
        self.where = (
            self.logits, *strides(self.logits, 1), tokens, *strides(tokens), mask, *strides(mask),
            temperatures, *strides(temperatures),
        )  # fmt: skip
        self.settings = (
            max(tokens.shape[-1], 1) if tokens.dim() else 1, self.vocab, ignore_index,
            c * math.log2(math.e), logit_scale / softcap if softcap else 1.0, softcap,
        )  # fmt: skip
        self.constants = {
            "SOFTCAP": softcap > 0.0,
            "DTYPE": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        }


def forward_config(logits: Tensor) -> _configs.Config:
    wide = logits.dtype == torch.float64
    table = _configs.LOGPROB_FORWARD_FP64 if wide else _configs.LOGPROB_FORWARD
    return table.choose(logits.shape[-1])


def logprob_forward(logits: Tensor, tokens: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *settings, entropy, _ = args
    dtype = _checks.compute_dtype(logits)
    logprobs = logits.new_empty(tokens.shape, dtype=dtype)
    entropies = logits.new_empty(tokens.shape if entropy else (0,), dtype=dtype)
    state = logits.new_empty((*tokens.shape, 3), dtype=dtype)
    call = Rows(logits, tokens, *settings)
    config = forward_config(logits)
    constants = call.constants | {"ENTROPY": entropy}
    tiles = {"SEGMENT": config.segment, "BLOCK": config.block}
    results = (logprobs, entropies, state, _faults.flag(logits.device))
    segments = triton.cdiv(call.vocab, config.segment)
    if segments == 1 or call.rows >= 2 * processors(logits.device):
        launch(
            forward_kernel, call.rows, *call.where, *results, *call.settings,
            config=config, **tiles, **constants,
        )  # fmt: skip
    else:
        sums = logits.new_empty((call.rows, segments, 4), dtype=dtype)
        launch(
            segments_kernel, call.rows * segments, *call.where, sums, segments, *call.settings,
            config=config, **tiles, **constants,
        )  # fmt: skip
        launch(
            merge_kernel, call.rows, *call.where, sums, segments, *results, *call.settings,
            config=_configs.ONE_WARP, **constants,
        )  # fmt: skip
    return logprobs, entropies, state


def logprob_backward(*args: Any) -> Tensor:
    logits: Tensor = args[2]
    grad = logits.new_empty(logits.shape)
    logprob_backward_into(grad, *args)
    return grad


def logprob_backward_(*args: Any) -> None:
    logprob_backward_into(args[2], *args)


def logprob_backward_into(
    grad_logits: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    logprobs: Tensor,
    state: Tensor,
    *settings: Any,
) -> None:
    call = Rows(logits, tokens, mask, temperatures, *settings)
    if logits.dim() > 3:  # in place, a copy would lose the gradient
        grad_logits = grad_logits.view(-1, *logits.shape[-2:])
    grad_logprobs, grad_entropy = two_leading_each(grad_logprobs, grad_entropy)
    wide = logits.dtype == torch.float64
    table = _configs.LOGPROB_BACKWARD_FP64 if wide else _configs.LOGPROB_BACKWARD
    config = table.choose(call.vocab)
    blocks = triton.cdiv(call.vocab, config.block)
    launch(
        backward_kernel, call.rows * blocks, grad_logprobs, *strides(grad_logprobs), grad_entropy,
        *strides(grad_entropy), *call.where, logprobs, state, grad_logits,
        *strides(grad_logits, 1), blocks, *call.settings,
        config=config, BLOCK=config.block, **call.constants,
    )  # fmt: skip
