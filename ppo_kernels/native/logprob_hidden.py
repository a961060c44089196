"""hidden_logprob_forward and hidden_logprob_backward: tiles of logits, and the kernels of rows.

What differs between backends is the pair of functions that work on rows of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _faults
from .._head import Head
from . import Native, logprob


class Rows(NamedTuple):
    """logprob_forward and logprob_backward_ of a backend, and how it makes large tensors."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward_: Callable[..., None]
    empty_large: Callable[..., Tensor]


def hidden_logprob_forward(native: Native, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return forward(_rows(native), *args)


def hidden_logprob_backward(native: Native, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backward(_rows(native), *args)


def _rows(native: Native) -> Rows:
    return Rows(
        partial(logprob.logprob_forward, native),
        partial(logprob.logprob_backward_, native),
        native.empty_large,
    )


def forward(
    rows: Rows,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    vocab: int,
    chunk: int | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tokens.shape
    tokens, temperatures, live = _flat(tokens, temperatures, mask, ignore_index)
    tokens, temperatures, wrong = _without_faults(tokens, temperatures, live, vocab, report=True)
    head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, live, vocab, chunk)
    tokens_of, temperatures_of = head.select(tokens), head.select(temperatures)
    assert tokens_of is not None
    logprobs = hidden.new_empty(head.rows, dtype=head.dtype)
    entropies = hidden.new_empty(head.rows if entropy else 0, dtype=head.dtype)
    state = hidden.new_empty((head.rows, 3), dtype=head.dtype)
    memory = head.memory(rows.empty_large)
    for part in head.parts():
        at = part.rows
        logprobs[at], of_part, state[at] = rows.forward(
            head.logits(part, memory), tokens_of[at], _at(head.live, at), _at(temperatures_of, at),
            temperature, softcap, logit_scale, ignore_index, entropy, False,
        )  # fmt: skip
        if entropy:
            entropies[at] = of_part
    results = [head.spread(t, tokens.shape[0]) for t in (logprobs, state)]
    if entropy:
        entropies = head.spread(entropies, tokens.shape[0])
    if wrong is not None:
        for t in (*results, entropies):
            if t.numel():
                t[wrong] = torch.nan
    return (
        results[0].view(shape),
        entropies.view(shape) if entropy else entropies,
        results[1].view(*shape, 3),
    )


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
    logprobs: Tensor,
    state: Tensor,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    vocab: int,
    chunk: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; one that is not needed is empty."""
    tokens, temperatures, live = _flat(tokens, temperatures, mask, ignore_index)
    tokens, temperatures, _ = _without_faults(tokens, temperatures, live, vocab, report=False)
    flat = hidden.reshape(-1, hidden.shape[-1])
    head = Head(flat, weight, bias, live, vocab, chunk)
    given = [
        head.select(t if t is None else t.reshape(-1, *t.shape[hidden.dim() - 1 :]))
        for t in (grad_logprobs, grad_entropy, tokens, temperatures, logprobs, state)
    ]
    grad_hidden = torch.empty_like(flat[: head.rows if needs[0] else 0])
    total = weight.new_zeros(weight.shape if needs[1] else (0,), dtype=head.dtype)
    total_bias = weight.new_zeros(weight.shape[:1] if needs[2] else (0,), dtype=head.dtype)
    memory = head.memory(rows.empty_large)
    for part in head.parts():
        at = part.rows
        g, h, token, t, logprob_of, state_of = (_at(x, at) for x in given)
        logits = head.logits(part, memory)
        rows.backward_(
            g, h, logits, token, _at(head.live, at), t, logprob_of, state_of,
            temperature, softcap, logit_scale, ignore_index,
        )  # fmt: skip
        if needs[0]:
            grad_hidden[at] = head.grad_hidden(logits)
        if needs[1]:
            head.add_grad_weight(logits, part, total[:vocab])
        if needs[2]:
            total_bias[:vocab] += logits.sum(0)
    return (
        head.spread(grad_hidden, flat.shape[0]).view(hidden.shape) if needs[0] else grad_hidden,
        total.to(weight.dtype),
        total_bias.to(total_bias.dtype if bias is None else bias.dtype),
    )


def _at(t: Tensor | None, rows: slice) -> Tensor | None:
    return t if t is None else t[rows]


def _flat(
    tokens: Tensor, temperatures: Tensor | None, mask: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    live = tokens != ignore_index
    if mask is not None:
        live = live & (mask != 0)
    return (
        tokens.reshape(-1),
        temperatures if temperatures is None else temperatures.reshape(-1),
        live.reshape(-1),
    )


def _without_faults(
    tokens: Tensor, temperatures: Tensor | None, live: Tensor, vocab: int, *, report: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Labels and temperatures the kernels will not complain about: they know no flat positions.

    On a CPU faults are raised here. On a GPU they are noted; the third result says where they are.
    Once is enough: backward does not report what forward did.
    """
    if not (report or tokens.is_cuda):
        return tokens, temperatures, None
    bad_token = live & ((tokens < 0) | (tokens >= vocab))
    faults = [(_checks.BAD_TOKEN, bad_token)]
    if temperatures is not None:
        bad = live & ~((temperatures > 0) & temperatures.isfinite())
        faults.append((_checks.BAD_TEMPERATURE, bad))
    if not tokens.is_cuda:
        for kind, bad in faults:
            if bad.any():
                _checks.raise_row_fault((kind, int(bad.nonzero()[0])), vocab, tokens, temperatures)
        return tokens, temperatures, None
    for kind, bad in faults if report else ():
        _faults.note(bad, kind)
    tokens = torch.where(bad_token, 0, tokens)
    if temperatures is not None:
        temperatures = torch.where(faults[1][1], 1.0, temperatures)
        return tokens, temperatures, bad_token | faults[1][1]
    return tokens, temperatures, bad_token
