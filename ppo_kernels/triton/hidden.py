"""What is made from hidden states: by torch's matrix products, and the kernels of rows."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..native import categorical_kl_hidden, logprob_hidden
from . import categorical_kl, logprob


def hidden_logprob_forward(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return logprob_hidden.forward(rows_of(hidden), hidden, *args)


def hidden_logprob_backward(
    g: Tensor | None, h: Tensor | None, hidden: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return logprob_hidden.backward(rows_of(hidden), g, h, hidden, *args)


def hidden_kl_forward(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return categorical_kl_hidden.forward(_kl_rows_of(hidden), hidden, *args)


def hidden_kl_backward(
    grad_kl: Tensor, hidden: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return categorical_kl_hidden.backward(_kl_rows_of(hidden), grad_kl, hidden, *args)


def rows_of(hidden: Tensor) -> logprob_hidden.Rows:
    return logprob_hidden.Rows(
        logprob.logprob_forward, logprob.logprob_backward_, partial(_empty, hidden)
    )


def _kl_rows_of(hidden: Tensor) -> logprob_hidden.Rows:
    return logprob_hidden.Rows(
        categorical_kl.categorical_kl_forward,
        categorical_kl.categorical_kl_backward_,
        partial(_empty, hidden),
    )


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)
