"""logprob_forward and logprob_backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from . import Native, rows, rows_cols, two_leading


def logprob_forward(
    native: Native,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = tokens.shape
    logprobs = native.empty(shape, dtype)
    entropies = native.empty(shape if entropy else (0,), dtype)
    state = native.empty((*shape, 3), dtype)
    if len(shape) > 2:
        logits, tokens = two_leading(logits, 1), two_leading(tokens)
        mask = mask if mask is None else two_leading(mask)
        temperatures = temperatures if temperatures is None else two_leading(temperatures)
    fault = native.module.logprob_forward(
        rows(logits, 1), rows(tokens), rows(mask), rows(temperatures),
        *rows_cols(tokens), logits.shape[-1], ignore_index, temperature, softcap, logit_scale,
        rows(two_leading(logprobs)), rows(two_leading(entropies)) if entropy else None,
        rows(two_leading(state, 1), 1), native.target(),
    )  # fmt: skip
    if fault is not None:
        _checks.raise_row_fault(fault, logits.shape[-1], tokens, temperatures)
    return logprobs, entropies, state


def logprob_backward(native: Native, *args: Any) -> Tensor:
    logits: Tensor = args[2]
    grad = native.empty_large(logits.shape, logits.dtype)
    logprob_backward_into(native, grad, *args)
    return grad


def logprob_backward_(native: Native, *args: Any) -> None:
    logprob_backward_into(native, args[2], *args)


def logprob_backward_into(
    native: Native,
    grad_logits: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    logprobs: Tensor,
    state: Tensor,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
) -> None:
    if tokens.dim() > 2:
        if grad_logits is logits:
            grad_logits = logits.view(-1, *logits.shape[-2:])
        logits, state, grad_logits = (two_leading(t, 1) for t in (logits, state, grad_logits))
        tokens, logprobs = two_leading(tokens), two_leading(logprobs)
        grad_logprobs, grad_entropy, mask, temperatures = (
            t if t is None else two_leading(t)
            for t in (grad_logprobs, grad_entropy, mask, temperatures)
        )
    native.module.logprob_backward(
        rows(grad_logprobs), rows(grad_entropy), rows(logits, 1), rows(tokens), rows(mask),
        rows(temperatures), rows(logprobs), rows(state, 1),
        *rows_cols(tokens), logits.shape[-1], ignore_index, temperature, softcap, logit_scale,
        rows(grad_logits, 1), native.target(),
    )  # fmt: skip
