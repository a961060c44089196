"""A language-model head whose logits exist a few rows at a time.

The rows of hidden states that matter are selected first. Their logits are made in tiles by torch's
matrix product, in fp32 whatever the dtype of its factors (fp64 for fp64), handed to kernels that
work on rows of logits, and forgotten; backward makes them again. Every product of a tile has the
same shape, the last rows padded, so that a row's logits do not depend on how many tiles are made at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from . import _gemm

TILE = 256  # rows of a product on a CPU, as fast as all at once; `chunk` is a multiple of it
# Bytes of logits at a time. A GPU needs many rows to be busy; a CPU is busy with one tile, and what
# stays in cache between two passes is read for less.
BUDGET = {"cpu": 64 << 20, "cuda": 1 << 30}


class Part(NamedTuple):
    """Some of the selected rows."""

    rows: slice
    hidden: Tensor  # [rows, H], and zeros up to whole tiles

    @property
    def size(self) -> int:
        return int(self.rows.stop - self.rows.start)


class Head:
    """hidden [N, H] @ weight [V, H].T + bias [V], for some of the rows of `hidden`.

    Args:
        live: [N], which rows to select; None for all.
        vocab: The rows of weight that count; those behind are padding.
        chunk: Rows at a time, a multiple of TILE, or None for what the budget allows.

    Attributes:
        index: The selected rows, or None for all of them.
        live: What is left to be masked: of selected rows nothing. While a CUDA graph is captured
            nobody can say how many rows matter, so that all are selected.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        live: Tensor | None,
        vocab: int,
        chunk: int | None,
    ) -> None:
        self._multiply(hidden, weight[:vocab], bias)
        self.index: Tensor | None = None
        self.live: Tensor | None = None
        if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            self.live = live
        elif live is not None:
            index = live.nonzero()[:, 0]
            if index.shape[0] < live.shape[0]:
                self.index = index
        self.rows = hidden.shape[0] if self.index is None else self.index.shape[0]
        size = torch.finfo(self.dtype).bits // 8
        tiles = BUDGET[hidden.device.type] // (size * max(vocab, 1) * TILE)
        self.chunk = min(chunk or max(tiles, 1) * TILE, _padded(self.rows))

    def beside(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        """Another head, of the same rows and tokens, as many at a time."""
        other = copy(self)
        other._multiply(hidden, weight[: self.weight.shape[0]], bias)
        return other

    def _multiply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden, self.weight = hidden, weight
        self.bias = None if bias is None else bias[: weight.shape[0]].to(self.dtype)

    def select(self, t: Tensor | None) -> Tensor | None:
        """Of a tensor [N, ...], the selected rows."""
        return t if t is None or self.index is None else t.index_select(0, self.index)

    def spread(self, t: Tensor, size: int) -> Tensor:
        """The inverse: zeros in the rows that are not selected."""
        if self.index is None:
            return t
        return t.new_zeros((size, *t.shape[1:])).index_copy_(0, self.index, t)

    def parts(self) -> Iterator[Part]:
        for begin in range(0, self.rows, self.chunk):
            rows = slice(begin, min(begin + self.chunk, self.rows))
            if self.index is None:
                hidden = self.hidden[rows]
                if self.live is not None:
                    hidden = torch.where(self.live[rows, None], hidden, 0.0)
            else:
                hidden = self.hidden.index_select(0, self.index[rows])
            missing = _padded(hidden.shape[0]) - hidden.shape[0]
            if missing:
                hidden = torch.cat([hidden, hidden.new_zeros((missing, hidden.shape[1]))])
            yield Part(rows, hidden)

    def logits(self, part: Part, memory: Tensor) -> Tensor:
        """[rows, V] of a part, in `memory` [chunk, V]."""
        out = memory[: part.hidden.shape[0]]
        if out.is_cuda:
            self._product(part.hidden, self.weight.t(), out)
            if self.bias is not None:
                out += self.bias
        else:
            _gemm.linear(part.hidden.to(self.dtype), self.weight, self.bias, out, TILE)
        return out[: part.size]

    def grad_hidden(self, grad: Tensor) -> Tensor:
        """From the gradient of a part's logits, that of its hidden states."""
        if grad.is_cuda:
            to = grad.new_empty((grad.shape[0], self.weight.shape[1]))
            return self._product(grad.to(self.weight.dtype), self.weight, to).to(self.hidden.dtype)
        return _gemm.grad_input(grad, self.weight).to(self.hidden.dtype)

    def add_grad_weight(self, grad: Tensor, part: Part, total: Tensor) -> None:
        """Add what a part's logits give to the gradient of the weight, [V, H] in fp32 or fp64."""
        hidden = part.hidden[: part.size]
        if grad.is_cuda and hidden.dtype != self.dtype:
            grad = grad.to(hidden.dtype)
            total += self._product(grad.t(), hidden, torch.empty_like(total))
        elif grad.is_cuda:
            total.addmm_(grad.t(), hidden)
        else:
            _gemm.add_grad_weight(grad, hidden.to(self.dtype), total)

    def memory(self, empty: Callable[..., Tensor]) -> Tensor:
        return empty((self.chunk, self.weight.shape[0]), self.dtype)

    def _product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """On a GPU: what it multiplies in half precision, it sums in fp32, and keeps there."""
        if a.dtype == out.dtype:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _padded(rows: int) -> int:
    return max(-(-rows // TILE), 1) * TILE
