"""ppo_loss_from_logits and ppo_loss_from_hidden: kernels of rows of logits, and those of tokens.

What differs between backends is the kernels, in `Kernels`. Per-token objectives go from logits to
their gradient one part of the rows at a time; those that must see a whole sequence first make all
log-probabilities, then all gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..ops._aggregation import AGGREGATIONS, Batch, Frame
from ..ops._objective import Objective, total
from . import DTYPE_CODES, Native, kl, logprob, logprob_hidden, losses, moments, rows, rows_cols
from .logprob_hidden import Gradients, Rows, Scoring


class Kernels(NamedTuple):
    """The functions of one backend, with the arguments of their ops' schemas.

    Attributes:
        backward_into: logprob_backward, with the tensor it is to write as first argument.
        rows_at_once: From rows of logits to their log-probabilities, entropies and gradient; it may
            decline.
    """

    rows: Rows
    backward_into: Callable[..., None]
    clipped_loss: Callable[..., tuple[Tensor, Tensor, Tensor]]
    kl_forward: Callable[..., Tensor]
    kl_backward: Callable[..., Tensor]
    masked_sum: Callable[..., tuple[Tensor, Tensor]]
    rows_at_once: Callable[..., tuple[Tensor, Tensor] | None]


def ppo_loss_from_logits(native: Native, *args: Any) -> tuple[Tensor, ...]:
    return from_logits(_kernels(native), False, *args)


def ppo_loss_from_logits_(native: Native, *args: Any) -> tuple[Tensor, ...]:
    return from_logits(_kernels(native), True, *args)


def ppo_loss_from_hidden(native: Native, *args: Any) -> tuple[Tensor, ...]:
    return from_hidden(_kernels(native), *args)


def _kernels(native: Native) -> Kernels:
    return Kernels(
        logprob_hidden.rows_of(native),
        partial(logprob.logprob_backward_into, native),
        partial(losses.clipped_loss, native),
        partial(kl.kl_forward, native),
        partial(kl.kl_backward, native),
        partial(moments.masked_reduce, native, mean=False),
        partial(_rows_at_once, native),
    )


# Bytes of logits that a CPU's caches hold from one pass to the next.
IN_CACHE = 1 << 20


def _rows_at_once(
    native: Native, grad_logits: Tensor, logits: Tensor, labels: tuple[Any, ...],
    settings: tuple[Any, ...], o: Objective, tail: Tail,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """See `Kernels`: None where two passes do as well.

    On a GPU if a row does not fit on the chip or rows do not fill it, on a CPU if logits are few.
    """
    tokens, _, temperatures = labels
    vocab = logits.shape[-1]
    target = native.target()
    fit = getattr(native.module, "ppo_rows_fit", None)
    if fit is not None:
        *_, processors, _ = target
        if tokens.numel() < processors or not fit(vocab, DTYPE_CODES[logits.dtype]):
            return None
    elif logits.numel() * logits.element_size() <= IN_CACHE:
        return None
    o = o.by_tokens(tokens)
    logprobs = native.empty(tokens.shape, tail.dtype)
    entropies = native.empty(tokens.shape if o.entropy else (0,), tail.dtype)
    tensors = (
        *labels, o.old_logprobs, o.advantages, tail.weights.expand(tokens.shape),
        o.ref_logprobs if o.kl_coef else None, tail.scale,
    )  # fmt: skip
    fault = native.module.ppo_rows(
        rows(logits, 1), *map(rows, tensors), *rows_cols(tokens), vocab, settings[3], *settings[:3],
        o.policy.code, *losses.numbers(*o.policy[:4]), kl.ESTIMATORS.index(o.kl_gradient),
        o.kl_coef, o.entropy_coef, rows(logprobs), rows(entropies) if o.entropy else None,
        rows(grad_logits, 1), target,
    )  # fmt: skip
    if fault is not None:
        _checks.raise_row_fault(fault, vocab, tokens, temperatures)
    return logprobs, entropies


# Masked labels are masked already.
_NO_LABEL = -1


def from_logits(
    k: Kernels,
    overwrite: bool,
    logits: Tensor,
    tokens: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    inplace: bool,
    *objective: Any,
) -> tuple[Tensor, ...]:
    """The gradient of the logits comes last, unless it is to `overwrite` them."""
    o = Objective.of(objective)
    labels = (tokens, o.frame.mask, temperatures)
    settings = (temperature, softcap, logit_scale, _NO_LABEL)
    tail = Tail(k, o, tokens, _checks.compute_dtype(logits))
    needs_gradient = o.frame.needs_gradient
    grad = logits
    if not overwrite:
        grad = k.rows.empty_large(logits.shape if needs_gradient else (0,), logits.dtype)
    at_once = None
    if needs_gradient and not o.whole_sequences:
        at_once = k.rows_at_once(grad, logits, labels, settings, o, tail)
    if at_once is not None:
        logprobs, entropies = at_once
        frame = o.frame._replace(needs_gradient=False)
        loss, stats, terms, _ = tail.loss(logprobs, entropies, frame)
    else:
        logprobs, entropies, state = k.rows.forward(logits, *labels, *settings, o.entropy, False)
        loss, stats, terms, policy = tail.loss(logprobs, entropies, o.frame)
        if needs_gradient:
            g, h = tail.gradients(o, logprobs, policy=policy)
            k.backward_into(grad, g, h, logits, *labels, logprobs, state, *settings)
    result = (loss, stats, terms, logprobs, entropies)
    return result if overwrite else (*result, grad)


def from_hidden(
    k: Kernels,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    vocab: int,
    chunk: int | None,
    needs: list[bool],
    *objective: Any,
) -> tuple[Tensor, ...]:
    o = Objective.of(objective)
    labels = (tokens, o.frame.mask, temperatures)
    settings = (temperature, softcap, logit_scale, _NO_LABEL)
    rows: tuple[Any, ...] = (*settings, vocab, chunk)
    scoring = Scoring(k.rows, hidden, weight, bias, *(*labels, *rows, o.entropy))
    tail = Tail(k, o, tokens, scoring.head.dtype)
    at_once = any(needs) and not o.whole_sequences
    gradients = Gradients(scoring.head, hidden, weight, bias, needs if at_once else [False] * 3)
    parts = None
    if at_once:
        parts = _Parts(o, tokens, tail.weights, scoring.select, scoring.head.live)
    for scored in scoring.parts():
        if parts is not None:
            of_part, weights = parts.of(scored.part.rows)
            g, h = tail.gradients(of_part, scored.logprobs, weights=weights)
            k.rows.backward_(
                g, h, scored.logits, *scored.labels, scored.logprobs, scored.state, *settings
            )
            gradients.add(scored.part, scored.logits)
    logprobs, entropies, state = scoring.results()
    later = any(needs) and parts is None
    frame = o.frame._replace(needs_gradient=later)
    loss, stats, terms, policy = tail.loss(logprobs, entropies, frame)
    if not later:
        return loss, stats, terms, logprobs, entropies, *gradients.results()
    g, h = tail.gradients(o, logprobs, policy=policy)
    given = (*labels, logprobs, state, *rows, needs)
    made = logprob_hidden.backward(k.rows, g, h, hidden, weight, bias, *given)
    return loss, stats, terms, logprobs, entropies, *made


class Tail:
    """From log-probabilities and entropies of tokens to the loss, and back."""

    def __init__(self, k: Kernels, o: Objective, tokens: Tensor, dtype: torch.dtype) -> None:
        self.k, self.o, self.tokens, self.dtype = k, o, tokens, dtype
        self.scale = None if o.loss_scale is None else o.loss_scale.to(dtype)

    @cached_property
    def weights(self) -> Tensor:
        """Not asked for by the policy's term alone of all tokens, whose kernel has them."""
        return Batch(self.tokens, self.o.frame).weights(self.o.frame, self.dtype)

    def loss(
        self, logprobs: Tensor, entropies: Tensor, frame: Frame
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, its stats, its terms, and on request the gradient of the policy's term."""
        o = self.o
        policy, stats, gradient = self.k.clipped_loss(
            logprobs, o.old_logprobs, o.advantages, *o.policy, *frame
        )
        entropy = divergence = torch.zeros_like(policy)
        if o.entropy:
            entropy = self._aggregate(entropies)
        if o.ref_logprobs is not None:
            divergence = self._aggregate(
                self.k.kl_forward(
                    logprobs, o.ref_logprobs, frame.mask, o.kl_estimator, o.kl_gradient, o.kl_clamp
                )
            )
        terms = (policy, entropy, divergence)
        return total(o, *terms), stats, torch.stack(terms), gradient

    def gradients(
        self,
        o: Objective,
        logprobs: Tensor,
        *,
        weights: Tensor | None = None,
        policy: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Of log-probabilities and entropies.

        Either of a part, with the `weights` of its tokens, or of all, with the `policy`'s gradient.
        """
        if policy is None:
            assert weights is not None
            _, _, slopes = self.k.clipped_loss(
                logprobs, o.old_logprobs, o.advantages, *o.policy, *o.frame
            )
            policy = slopes * weights
        if o.kl_coef:
            slopes = self.k.kl_backward(
                torch.ones_like(logprobs), logprobs, o.ref_logprobs, o.frame.mask, o.kl_gradient,
                o.kl_clamp,
            )  # fmt: skip
            weights = self.weights if weights is None else weights
            policy = policy + o.kl_coef * slopes * weights
        entropy = None
        if o.entropy_coef:
            weights = self.weights if weights is None else weights
            entropy = self._scaled(-o.entropy_coef * weights).expand(logprobs.shape)
        return self._scaled(policy), entropy

    def _aggregate(self, of_tokens: Tensor) -> Tensor:
        return self.k.masked_sum(of_tokens * self.weights, self.o.frame.mask, None)[0]

    def _scaled(self, t: Tensor) -> Tensor:
        return t if self.scale is None else t * self.scale


class _Parts:
    """An objective of tokens, cut as their rows are; `rows` makes one row of a token of each."""

    def __init__(
        self,
        o: Objective,
        tokens: Tensor,
        weights: Tensor,
        rows: Callable[[Tensor], Tensor],
        live: Tensor | None,
    ) -> None:
        self.o, self.live = o.by_tokens(tokens), live
        self.old_logprobs, self.advantages, self.weights = (
            rows(t.expand(tokens.shape)) for t in (o.old_logprobs, self.o.advantages, weights)
        )
        self.ref_logprobs = None if o.ref_logprobs is None else rows(o.ref_logprobs)

    def of(self, at: Any) -> tuple[Objective, Tensor]:
        """The objective of a part's tokens, as a sum, and their weights."""
        o = self.o._replace(
            old_logprobs=self.old_logprobs[at],
            advantages=self.advantages[at],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[at],
            frame=Frame(
                None if self.live is None else self.live[at],
                None, AGGREGATIONS.index("token-sum"), None, 1.0, None, True,
            ),
        )  # fmt: skip
        return o, self.weights[at]
