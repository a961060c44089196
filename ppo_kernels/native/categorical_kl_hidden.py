"""hidden_kl_forward and hidden_kl_backward: tiles of both models' logits, and kernels of rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._head import Head, Part
from . import Native, categorical_kl
from .logprob_hidden import Gradients, Rows


def hidden_kl_forward(native: Native, *args: Any) -> tuple[Tensor, Tensor]:
    return forward(_rows(native), *args)


def hidden_kl_backward(native: Native, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backward(_rows(native), *args)


def _rows(native: Native) -> Rows:
    return Rows(
        partial(categorical_kl.categorical_kl_forward, native),
        partial(categorical_kl.categorical_kl_backward_, native),
        native.empty_large,
    )


def forward(
    rows: Rows,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    reverse: bool,
    temperature: float,
    softcap: float,
    logit_scale: float,
    vocab: int,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    shape = hidden.shape[:-1]
    policy = _policy(hidden, weight, bias, mask, vocab, chunk)
    ref = policy.beside(_flat(ref_hidden), ref_weight, ref_bias)
    dtype = _checks.compute_dtype(hidden, ref_hidden)
    kl = hidden.new_empty(policy.rows, dtype=dtype)
    state = hidden.new_empty((policy.rows, 4), dtype=dtype)
    memory, ref_memory = (head.memory(rows.empty_large) for head in (policy, ref))
    for part, ref_part in zip(policy.parts(), ref.parts(), strict=True):
        logits = policy.logits(part, memory)
        ref_logits = ref.logits(ref_part, ref_memory)
        if softcap:
            for x in (logits, ref_logits):
                _cap(x, softcap, logit_scale, out=x)
        kl[part.rows], state[part.rows] = rows.forward(
            logits, ref_logits, _at(policy.live, part), reverse,
            _of_rows(temperature, softcap, logit_scale),
        )  # fmt: skip
    count = shape.numel()
    return policy.spread(kl, count).view(shape), policy.spread(state, count).view(*shape, 4)


def backward(
    rows: Rows,
    grad_kl: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    kl: Tensor,
    state: Tensor,
    reverse: bool,
    temperature: float,
    softcap: float,
    logit_scale: float,
    vocab: int,
    chunk: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; one that is not needed is empty."""
    policy = _policy(hidden, weight, bias, mask, vocab, chunk)
    ref = policy.beside(_flat(ref_hidden), ref_weight, ref_bias)
    given = [
        policy.select(t.reshape(-1, *t.shape[hidden.dim() - 1 :])) for t in (grad_kl, kl, state)
    ]
    gradients = Gradients(policy, hidden, weight, bias, needs)
    memory, ref_memory = (head.memory(rows.empty_large) for head in (policy, ref))
    capped = policy.memory(rows.empty_large) if softcap else memory
    for part, ref_part in zip(policy.parts(), ref.parts(), strict=True):
        logits = policy.logits(part, memory)
        ref_logits = ref.logits(ref_part, ref_memory)
        grad = capped[: part.size]
        if softcap:
            _cap(logits, softcap, logit_scale, out=grad)
            _cap(ref_logits, softcap, logit_scale, out=ref_logits)
        upstream, kl_of, state_of = (_at(t, part) for t in given)
        rows.backward_(
            upstream, grad, ref_logits, _at(policy.live, part), kl_of, state_of, reverse,
            _of_rows(temperature, softcap, logit_scale),
        )  # fmt: skip
        if softcap:
            _uncap(grad, logits, softcap, logit_scale)
        gradients.add(part, grad)
    return gradients.results()


def _policy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    vocab: int,
    chunk: int | None,
) -> Head:
    live = mask if mask is None else mask.reshape(-1) != 0
    return Head(_flat(hidden), weight, bias, live, vocab, chunk)


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def _at(t: Tensor | None, part: Part) -> Tensor | None:
    return t if t is None else t[part.rows]


def _of_rows(temperature: float, softcap: float, logit_scale: float) -> float:
    """What the kernels divide by: they know no scale."""
    return temperature if softcap else temperature / logit_scale


def _cap(x: Tensor, softcap: float, logit_scale: float, out: Tensor) -> None:
    torch.mul(x, logit_scale / softcap, out=out).tanh_().mul_(softcap)


def _uncap(grad: Tensor, x: Tensor, softcap: float, logit_scale: float) -> None:
    """The gradient of x from that of its cap, in place; x is lost.

    The slope, scale * sech^2(u) = scale * 4 e / (1 + e)^2 with e = exp(-2 |u|), does not cancel.
    """
    e = x.abs_().mul_(-2 * logit_scale / softcap).exp_()
    grad.mul_(e).mul_(4 * logit_scale)
    e.add_(1)
    grad.div_(e).div_(e)
