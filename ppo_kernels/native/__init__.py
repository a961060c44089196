"""The host side of the compiled backends: tensors become pointers, sizes and strides.

One module per op family; each function has the arguments of its op's schema after the `Native` it
runs on. Shapes, dtypes and devices were checked by the public function. What only the data can tell
(label range, temperatures, offsets) is checked by the kernel: on a CPU it is raised here, on a GPU
it is noted (see `_faults`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Native(NamedTuple):
    """One backend's kernels, and how to call them.

    Attributes:
        module: The kernels, with the arguments of the structs in csrc/kernels.h.
        empty: A new tensor of this shape and dtype, where the kernels run.
        empty_large: The same for one the size of the logits.
        target: What the last argument of every kernel must be, now: the number of threads, or the
            stream and what else a launch needs.
    """

    module: Any
    empty: Callable[[Sequence[int], torch.dtype], Tensor]
    empty_large: Callable[[Sequence[int], torch.dtype], Tensor]
    target: Callable[[], Any]


# The order of enum DType in csrc/kernels.h.
DTYPE_CODES = {
    dtype: code
    for code, dtype in enumerate(
        (
            torch.float32,
            torch.bfloat16,
            torch.float16,
            torch.float64,
            torch.bool,
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.int32,
            torch.int64,
        )
    )
}


def rows(t: Tensor | None, inner: int = 0) -> tuple[int, ...] | None:
    """A [B, T] tensor, or a [N] one as a single row, then `inner` more dimensions, for a kernel."""
    if t is None:
        return None
    strides = t.stride()
    missing = 2 + inner - len(strides)
    if missing:
        strides = (0,) * missing + strides
    return (t.data_ptr(), DTYPE_CODES[t.dtype], *strides)


def pointer(t: Tensor) -> tuple[int, ...]:
    """A contiguous tensor, for a kernel that addresses it by flat position."""
    return (t.data_ptr(), DTYPE_CODES[t.dtype])


def two_leading(t: Tensor, inner: int = 0) -> Tensor:
    """More than two leading dimensions become two: a view if the strides allow it, else a copy."""
    return t.flatten(0, -2 - inner) if t.dim() > 2 + inner else t


def two_leading_each(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The same for several; the caller holds on to the copies while a kernel runs on them."""
    return tuple(t if t is None or t.dim() <= 2 else t.flatten(0, -2) for t in tensors)


def rows_cols(t: Tensor) -> tuple[int, int]:
    shape = t.shape
    return (1, 1) if not shape else (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
