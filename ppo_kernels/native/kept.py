"""kept_logprob_forward and _backward, and the same from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _faults, _kept
from .._head import Head
from .._kept import Sets, sets_of
from . import Native, rows, rows_cols, two_leading, two_leading_each
from .logprob_hidden import Gradients, _at, _flat, _without_faults


def forward_sets(
    native: Native,
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
    """Into `values`, if given, the logits of the sets."""
    dtype, shape = _checks.compute_dtype(logits), tokens.shape
    logprobs = native.empty(shape, dtype)
    entropies = native.empty(shape if entropy else (0,), dtype)
    state = native.empty((*shape, 3), dtype)
    logits = two_leading(logits, 1)
    tokens, mask, temperatures = two_leading_each(tokens, mask, temperatures)
    fault = native.module.kept_forward(
        rows(logits, 1), rows(tokens), rows(mask), rows(temperatures),
        rows(sets.begins), rows(sets.ends), rows(sets.ids), *rows_cols(tokens), logits.shape[-1],
        sets.ids.shape[0], ignore_index, temperature, softcap, logit_scale,
        rows(two_leading(logprobs)), rows(two_leading(entropies)) if entropy else None,
        rows(two_leading(state, 1), 1), rows(values), native.target(),
    )  # fmt: skip
    if fault is not None:
        if fault[0] == _checks.BAD_KEPT:
            _checks.raise_kept_fault(fault[1], logits.shape[-1], *sets)
        _checks.raise_row_fault(fault, logits.shape[-1], tokens, temperatures)
    return logprobs, entropies, state


def backward_sets(
    native: Native,
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
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
) -> None:
    """Into the contiguous `grad_logits`, from the logits or their values."""
    vocab = grad_logits.shape[-1]
    grad_logits, state = two_leading(grad_logits, 1), two_leading(state, 1)
    logits = logits if logits is None else two_leading(logits, 1)
    tokens, mask, temperatures, logprobs, grad_logprobs, grad_entropy = two_leading_each(
        tokens, mask, temperatures, logprobs, grad_logprobs, grad_entropy
    )
    native.module.kept_backward(
        rows(grad_logprobs), rows(grad_entropy), rows(logits, 1), rows(values), rows(tokens),
        rows(mask), rows(temperatures), rows(sets.begins), rows(sets.ends), rows(sets.ids),
        rows(logprobs), rows(state, 1), *rows_cols(tokens), vocab, sets.ids.shape[0],
        ignore_index, temperature, softcap, logit_scale, rows(grad_logits, 1), native.target(),
    )  # fmt: skip


# ---- from logits ---------------------------------------------------------------------------------


def kept_logprob_forward(
    native: Native,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    offsets: Tensor,
    ids: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    sets = sets_of(offsets, ids)
    return forward_sets(native, logits, tokens, mask, temperatures, sets, *settings)


def kept_logprob_backward(
    native: Native,
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
    grad = native.empty_large(logits.shape, logits.dtype)
    backward_sets(
        native, grad, grad_logprobs, grad_entropy, logits, None, tokens, mask, temperatures,
        sets_of(offsets, ids), *args,
    )  # fmt: skip
    return grad


# ---- from hidden states --------------------------------------------------------------------------


class Rows(NamedTuple):
    """forward_sets and backward_sets of a backend, and how it makes large tensors."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., None]
    empty_large: Callable[..., Tensor]


def hidden_kept_forward(native: Native, *args: Any) -> tuple[Tensor, ...]:
    return forward(_rows(native), *args)


def hidden_kept_backward(native: Native, *args: Any) -> tuple[Tensor, ...]:
    return backward(_rows(native), *args)


def _rows(native: Native) -> Rows:
    return Rows(partial(forward_sets, native), partial(backward_sets, native), native.empty_large)


def forward(
    rows: Rows,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    offsets: Tensor,
    ids: Tensor,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    vocab: int,
    chunk: int | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = tokens.shape
    tokens, temperatures, live = _flat(tokens, temperatures, mask, ignore_index)
    tokens, temperatures, wrong = _without_faults(tokens, temperatures, live, vocab, report=True)
    sets = _judged(sets_of(offsets, ids), live, vocab, report=True)
    head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, live, vocab, chunk)
    labels, temperatures, wrong = map(head.select, (tokens, temperatures, wrong))
    assert labels is not None
    sets = _selected(head, sets)
    logprobs = hidden.new_empty(head.rows, dtype=head.dtype)
    entropies = hidden.new_empty(head.rows if entropy else 0, dtype=head.dtype)
    state = hidden.new_empty((head.rows, 3), dtype=head.dtype)
    values = hidden.new_zeros(ids.shape, dtype=head.dtype)
    memory = head.memory(rows.empty_large)
    for part in head.parts():
        at = part.rows
        logprobs[at], of_part, state[at] = rows.forward(
            head.logits(part, memory), labels[at], _at(head.live, at), _at(temperatures, at),
            _sets_at(sets, at), temperature, softcap, logit_scale, ignore_index, entropy, values,
        )  # fmt: skip
        if entropy:
            entropies[at] = of_part
    results = [logprobs, state, *([entropies] if entropy else [])]
    if wrong is not None:
        for t in results:
            t[wrong] = torch.nan
    logprobs, state, *of_rows = (head.spread(t, live.shape[0]) for t in results)
    entropies = of_rows[0].view(shape) if entropy else entropies
    return logprobs.view(shape), entropies, state.view(*shape, 3), values


def backward(
    rows: Rows,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    offsets: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    state: Tensor,
    values: Tensor,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    vocab: int,
    chunk: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; the logits of the sets are not made again."""
    tokens, temperatures, live = _flat(tokens, temperatures, mask, ignore_index)
    tokens, temperatures, _ = _without_faults(tokens, temperatures, live, vocab, report=False)
    head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, live, vocab, chunk)
    sets = _selected(head, _judged(sets_of(offsets, ids), live, vocab, report=False))
    given = [
        head.select(t if t is None else t.reshape(-1, *t.shape[hidden.dim() - 1 :]))
        for t in (grad_logprobs, grad_entropy, tokens, temperatures, logprobs, state)
    ]
    gradients = Gradients(head, hidden, weight, bias, needs)
    memory = head.memory(rows.empty_large)
    for part in head.parts():
        at = part.rows
        g, h, token, t, logprob_of, state_of = (_at(x, at) for x in given)
        grad_logits = memory[: part.size]
        rows.backward(
            grad_logits, g, h, None, values, token, _at(head.live, at), t, _sets_at(sets, at),
            logprob_of, state_of, temperature, softcap, logit_scale, ignore_index,
        )  # fmt: skip
        gradients.add(part, grad_logits)
    return gradients.results()


def _selected(head: Head, sets: Sets) -> Sets:
    begins, ends = head.select(sets.begins), head.select(sets.ends)
    assert begins is not None
    assert ends is not None
    return Sets(begins, ends, sets.ids)


def _sets_at(sets: Sets, rows: slice) -> Sets:
    return Sets(sets.begins[rows], sets.ends[rows], sets.ids)


def _judged(sets: Sets, live: Tensor, vocab: int, *, report: bool) -> Sets:
    """On a CPU faults are raised here. On a GPU they are noted, and the set is empty instead."""
    if not live.is_cuda:
        if report:
            _kept.contents(live, vocab, *sets)
        return sets
    bad = _kept.bad_sets(live, vocab, *sets, repeated=False)
    if report:
        _faults.note(bad, _checks.BAD_KEPT)
    return Sets(torch.where(bad, 0, sets.begins), torch.where(bad, 0, sets.ends), sets.ids)
