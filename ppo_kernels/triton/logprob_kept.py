"""kept_logprob_forward and _backward in Triton, and the same from hidden states.

A program has a row: it gathers the set's logits a block of ids at a time, and sums and merges them
as those of a whole row. The gradient is zeros, and that of the sets is scattered into them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks, _faults
from .._kept import Sets, sets_of
from ..native import kept as host
from ..native import two_leading_each
from . import _configs
from ._launch import launch, strides
from ._math import INF, position, tree_sum
from .logprob import (
    LIVE,
    SKIPPED,
    UNSPECIALIZED,
    Rows,
    _add,
    _finish,
    _transform,
    gradient_of_columns,
    read_row,
    write_row,
    write_row_without_sums,
)

# Half of what the shortest rows take: ids and the search for the token need registers too.
_SETS = _configs.LOGPROB_FORWARD.choose(1)._replace(block=128)
_BAD_KEPT = tl.constexpr(_checks.BAD_KEPT)
_OF_SETS = ("begins_s", "ends_s", "ids_s", "count")


@triton.jit
def _read_set(i, kind, begins, begins_s, ends, ends_s, count):
    """What the position is now, where its set begins, and its size."""
    begin = tl.load(begins + i * begins_s).to(tl.int64)
    end = tl.load(ends + i * ends_s).to(tl.int64)
    bad = (begin < 0) | (end < begin) | (end > count)
    kind = tl.where(bad, -_BAD_KEPT, kind)
    return kind, begin, tl.where(kind == LIVE, end - begin, 0).to(tl.int32)


@triton.jit
def _load_ids(ids, ids_s, start, size, vocab, BLOCK: tl.constexpr):
    """A block of ids, which of them there are, and which are columns."""
    k = start + tl.arange(0, BLOCK)
    inside = k < size
    columns = tl.load(ids + k.to(tl.int64) * ids_s, mask=inside, other=0).to(tl.int64)
    return k, columns, inside, inside & (columns >= 0) & (columns < vocab)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, *_OF_SETS))
def forward_sets_kernel(
    logits, logits_b, logits_t, logits_v, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
    temperatures, temperatures_b, temperatures_t, begins, begins_s, ends, ends_s, ids, ids_s,
    values, logprobs, entropies, state, faults,
    count, cols, vocab, ignore_index, gain: tl.float64, inner: tl.float64, outer: tl.float64,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    i, row, col = position(tl.program_id(0), cols)
    kind, token, gain = read_row(
        row, col, vocab, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
        temperatures, temperatures_b, temperatures_t, ignore_index, gain,
    )  # fmt: skip
    kind, begin, size = _read_set(i, kind, begins, begins_s, ends, ends_s, count)
    logits += row * logits_b + col * logits_t
    ids += begin * ids_s
    narrow_gain = gain.to(DTYPE)
    highest = tl.full([], -INF, DTYPE)
    at_max = tl.zeros([BLOCK], DTYPE)
    rest = tl.zeros([BLOCK], DTYPE)
    slope = tl.zeros([BLOCK], DTYPE)
    target = tl.zeros([BLOCK], DTYPE)
    found = tl.zeros([BLOCK], tl.int32)
    outside = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        k, columns, inside, good = _load_ids(ids, ids_s, start, size, vocab, BLOCK)
        outside = tl.where(inside & ~good, 1, outside)
        x = tl.load(logits + columns * logits_v, mask=good, other=-INF).to(DTYPE)
        if values is not None:
            tl.store(values + begin + k, x, mask=good)
        u = _transform(x, inner, outer, SOFTCAP)
        hit = good & (columns == token)
        target = tl.where(hit, u, target)
        found = tl.where(hit, 1, found)
        u = tl.where(good & ~hit, u, -INF)
        highest, at_max, rest, slope = _add(u, highest, at_max, rest, slope, narrow_gain, ENTROPY)
    kind = tl.where(tl.max(outside, axis=0) > 0, -_BAD_KEPT, kind)
    if kind != LIVE:
        write_row_without_sums(i, kind, logprobs, entropies, state, faults, ENTROPY, DTYPE)
        return
    target = tl.sum(target, axis=0)  # exact in any order: one is not 0
    target = tl.where(tl.max(found, axis=0) > 0, target, -INF)
    tied = tl.sum(at_max, axis=0)  # whole numbers: exact in any order
    logprob, entropy, highest, log_sum, mean = _finish(
        highest, tied, tree_sum(rest), tree_sum(slope), target, gain, DTYPE
    )
    write_row(i, logprobs, entropies, state, logprob, entropy, highest, log_sum, mean, ENTROPY)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, *_OF_SETS, "g_b", "g_t", "h_b", "h_t"))
def backward_sets_kernel(
    grad_logprobs, g_b, g_t, grad_entropy, h_b, h_t,
    logits, logits_b, logits_t, logits_v, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
    temperatures, temperatures_b, temperatures_t, begins, begins_s, ends, ends_s, ids, ids_s,
    values, logprobs, state, grad_logits,
    count, cols, vocab, ignore_index, gain: tl.float64, inner: tl.float64, outer: tl.float64,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per row of grad_logits, which is contiguous and all zeros."""
    i, row, col = position(tl.program_id(0), cols)
    kind, token, gain = read_row(
        row, col, vocab, tokens, tokens_b, tokens_t, mask, mask_b, mask_t,
        temperatures, temperatures_b, temperatures_t, ignore_index, gain,
    )  # fmt: skip
    kind, begin, size = _read_set(i, kind, begins, begins_s, ends, ends_s, count)
    g = tl.full([], 0.0, DTYPE)
    h = tl.full([], 0.0, DTYPE)
    if grad_logprobs is not None:
        g = tl.load(grad_logprobs + row * g_b + col * g_t).to(DTYPE)
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row * h_b + col * h_t).to(DTYPE)
    if (kind == SKIPPED) | ((g == 0.0) & (h == 0.0)):
        return
    grad_logits += i * vocab
    ids += begin * ids_s
    found = tl.zeros([BLOCK], tl.int32)
    outside = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        _, columns, inside, good = _load_ids(ids, ids_s, start, size, vocab, BLOCK)
        outside = tl.where(inside & ~good, 1, outside)
        found = tl.where(good & (columns == token), 1, found)
    if (kind != LIVE) | (tl.max(outside, axis=0) > 0):
        for start in range(0, vocab, BLOCK):
            j = start + tl.arange(0, BLOCK)
            tl.store(grad_logits + j, tl.full([BLOCK], float("nan"), DTYPE), mask=j < vocab)
        return
    g = tl.where(tl.max(found, axis=0) > 0, g, 0.0)  # else -inf, whatever the logits
    highest = tl.load(state + 3 * i)
    log_sum = tl.load(state + 3 * i + 1)
    mean = tl.load(state + 3 * i + 2)
    logprob = tl.load(logprobs + i)
    for start in range(0, size, BLOCK):
        k, columns, inside, _ = _load_ids(ids, ids_s, start, size, vocab, BLOCK)
        if values is not None:
            x = tl.load(values + begin + k, mask=inside, other=0.0).to(DTYPE)
        else:
            at = logits + row * logits_b + col * logits_t + columns * logits_v
            x = tl.load(at, mask=inside, other=0.0).to(DTYPE)
        grad = gradient_of_columns(
            x, columns == token, g, h, grad_entropy is not None, logprob, highest, log_sum, mean,
            gain, inner, outer, SOFTCAP, DTYPE,
        )  # fmt: skip
        tl.store(grad_logits + columns, grad, mask=inside)


def _where(sets: Sets) -> tuple[Any, ...]:
    return tuple(x for t in sets for x in (t, strides(t)[1]))


def forward_sets(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    sets: Sets,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    entropy: bool,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _checks.compute_dtype(logits)
    logprobs = logits.new_empty(tokens.shape, dtype=dtype)
    entropies = logits.new_empty(tokens.shape if entropy else (0,), dtype=dtype)
    state = logits.new_empty((*tokens.shape, 3), dtype=dtype)
    call = Rows(logits, tokens, mask, temperatures, temperature, softcap, logit_scale, ignore_index)
    launch(
        forward_sets_kernel, call.rows, *call.where, *_where(sets), values,
        logprobs, entropies, state, _faults.flag(logits.device), sets.ids.shape[0], *call.settings,
        config=_SETS, BLOCK=_SETS.block, ENTROPY=entropy, **call.constants,
    )  # fmt: skip
    return logprobs, entropies, state


def backward_sets(
    grad_logits: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor | None,
    values: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    sets: Sets,
    logprobs: Tensor,
    state: Tensor,
    *settings: Any,
) -> None:
    grad_logits.zero_()
    grad_logprobs, grad_entropy = two_leading_each(grad_logprobs, grad_entropy)
    like = grad_logits if logits is None else logits  # of which only values are read
    call = Rows(like, tokens, mask, temperatures, *settings)
    launch(
        backward_sets_kernel, call.rows, grad_logprobs, *strides(grad_logprobs), grad_entropy,
        *strides(grad_entropy), *call.where, *_where(sets), values, logprobs, state, grad_logits,
        sets.ids.shape[0], *call.settings, config=_SETS, BLOCK=_SETS.block, **call.constants,
    )  # fmt: skip


def kept_logprob_forward(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    offsets: Tensor,
    ids: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    sets = sets_of(offsets, ids)
    return forward_sets(logits, tokens, mask, temperatures, sets, *settings)


def kept_logprob_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    offsets: Tensor,
    ids: Tensor,
    *args: Any,
) -> Tensor:
    grad = logits.new_empty(logits.shape)
    backward_sets(
        grad, grad_logprobs, grad_entropy, logits, None, tokens, mask, temperatures,
        sets_of(offsets, ids), *args,
    )  # fmt: skip
    return grad


def hidden_kept_forward(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return host.forward(_rows(hidden), hidden, *args)


def hidden_kept_backward(
    g: Tensor | None, h: Tensor | None, hidden: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return host.backward(_rows(hidden), g, h, hidden, *args)


def _rows(hidden: Tensor) -> host.Rows:
    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    return host.Rows(forward_sets, backward_sets, empty)
