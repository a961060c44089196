"""hidden_logprob_forward and hidden_logprob_backward: tiles of logits, and the kernels of rows.

What differs between backends is the pair of functions that work on rows of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _faults
from .._head import Head, Part
from . import Native, logprob


class Rows(NamedTuple):
    """A backend's kernels of rows of logits, and how it makes large tensors.

    `backward_` writes the gradient of the logits over them.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward_: Callable[..., None]
    empty_large: Callable[..., Tensor]


def hidden_logprob_forward(native: Native, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return forward(rows_of(native), *args)


def hidden_logprob_backward(native: Native, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backward(rows_of(native), *args)


def rows_of(native: Native) -> Rows:
    return Rows(
        partial(logprob.logprob_forward, native),
        partial(logprob.logprob_backward_, native),
        native.empty_large,
    )


class Scored(NamedTuple):
    """Some of the selected rows, while their logits exist; these may be overwritten."""

    part: Part
    logits: Tensor
    labels: tuple[Any, ...]  # tokens, mask and temperatures
    logprobs: Tensor
    state: Tensor


class Scoring:
    """Log-probabilities, and on request entropies, of hidden states: part by part, then of all."""

    def __init__(
        self,
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
    ) -> None:
        self.rows, self.shape, self.entropy = rows, tokens.shape, entropy
        self.settings = (temperature, softcap, logit_scale, ignore_index)
        tokens, temperatures, live = _flat(tokens, temperatures, mask, ignore_index)
        tokens, temperatures, wrong = _without_faults(
            tokens, temperatures, live, vocab, report=True
        )
        self.head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, live, vocab, chunk)
        self.labels = (self.head.select(tokens), self.head.live, self.head.select(temperatures))
        self.wrong = self.head.select(wrong)
        count, dtype = self.head.rows, self.head.dtype
        self.logprobs = hidden.new_empty(count, dtype=dtype)
        self.entropies = hidden.new_empty(count if entropy else 0, dtype=dtype)
        self.state = hidden.new_empty((count, 3), dtype=dtype)

    def select(self, t: Tensor) -> Tensor:
        """Of one number for each token, those of the selected rows."""
        selected = self.head.select(t.reshape(-1))
        assert selected is not None
        return selected

    def parts(self) -> Iterator[Scored]:
        memory = self.head.memory(self.rows.empty_large)
        for part in self.head.parts():
            at = part.rows
            logits = self.head.logits(part, memory)
            labels = tuple(_at(t, at) for t in self.labels)
            logprobs, entropies, state = self.rows.forward(
                logits, *labels, *self.settings, self.entropy, False
            )
            if self.wrong is not None:
                for t in (logprobs, state, *([entropies] if self.entropy else [])):
                    t[self.wrong[at]] = torch.nan
            self.logprobs[at], self.state[at] = logprobs, state
            if self.entropy:
                self.entropies[at] = entropies
            yield Scored(part, logits, labels, logprobs, state)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all rows, 0 where they were not selected: log-probabilities, entropies and states."""
        size = self.shape.numel()
        logprobs, state = (self.head.spread(t, size) for t in (self.logprobs, self.state))
        entropies = self.entropies
        if self.entropy:
            entropies = self.head.spread(entropies, size).view(self.shape)
        return logprobs.view(self.shape), entropies, state.view(*self.shape, 3)


class Gradients:
    """Of hidden states, weight and bias, from those of the logits; what is not needed is empty."""

    def __init__(
        self, head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
    ) -> None:
        self.head, self.needs, self.shape = head, needs, hidden.shape
        self.dtypes = (weight.dtype, head.dtype if bias is None else bias.dtype)
        self.hidden = hidden.new_empty((head.rows if needs[0] else 0, hidden.shape[-1]))
        self.weight = weight.new_zeros(weight.shape if needs[1] else (0,), dtype=head.dtype)
        self.bias = weight.new_zeros(weight.shape[:1] if needs[2] else (0,), dtype=head.dtype)

    def add(self, part: Part, logits: Tensor) -> None:
        vocab = logits.shape[1]
        if self.needs[0]:
            self.hidden[part.rows] = self.head.grad_hidden(logits)
        if self.needs[1]:
            self.head.add_grad_weight(logits, part, self.weight[:vocab])
        if self.needs[2]:
            self.bias[:vocab] += logits.sum(0)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.hidden
        if self.needs[0]:
            hidden = self.head.spread(hidden, self.shape[:-1].numel()).view(self.shape)
        return hidden, self.weight.to(self.dtypes[0]), self.bias.to(self.dtypes[1])


def forward(rows: Rows, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    scoring = Scoring(rows, *args)
    for _ in scoring.parts():
        pass
    return scoring.results()


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
    gradients = Gradients(head, hidden, weight, bias, needs)
    memory = head.memory(rows.empty_large)
    for part in head.parts():
        at = part.rows
        g, h, token, t, logprob_of, state_of = (_at(x, at) for x in given)
        logits = head.logits(part, memory)
        rows.backward_(
            g, h, logits, token, _at(head.live, at), t, logprob_of, state_of,
            temperature, softcap, logit_scale, ignore_index,
        )  # fmt: skip
        gradients.add(part, logits)
    return gradients.results()


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
    if not tokens.is_cuda:
        if report:
            _checks.row_contents(tokens, live, temperatures, vocab)
        return tokens, temperatures, None
    faults = _checks.row_faults(tokens, live, temperatures, vocab)
    for kind, bad in faults if report else ():
        _faults.note(bad, kind)
    wrong = faults[0][1]
    tokens = torch.where(wrong, 0, tokens)
    if temperatures is not None:
        temperatures = torch.where(faults[1][1], 1.0, temperatures)
        wrong = wrong | faults[1][1]
    return tokens, temperatures, wrong
