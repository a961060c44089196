"""Log-probabilities from hidden states: torch's matrix products, and the kernels of rows."""

from typing import Any

import torch
from torch import Tensor

from ..native import logprob_hidden
from . import logprob


def hidden_logprob_forward(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return logprob_hidden.forward(rows_of(hidden), hidden, *args)


def hidden_logprob_backward(
    g: Tensor | None, h: Tensor | None, hidden: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return logprob_hidden.backward(rows_of(hidden), g, h, hidden, *args)


def rows_of(hidden: Tensor) -> logprob_hidden.Rows:
    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    return logprob_hidden.Rows(logprob.logprob_forward, logprob.logprob_backward_, empty)
