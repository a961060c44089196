"""The `cpu` backend: hands tensors to the C++ kernels of `_C` as pointers, sizes and strides.

One module per op family; each function has the arguments of its op's schema. Shapes, dtypes and
devices were checked by the public function; what only the data can tell (label range, temperatures,
offsets) is checked by the kernel and raised here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from .. import _C as _C

    UNAVAILABLE: str | None = None
except Exception as error:
    _C = None  # type: ignore[assignment]
    UNAVAILABLE = (
        f"the compiled module ppo_kernels._C did not load ({type(error).__name__}: {error})"
    )

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


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """torch.empty, in the form that takes torch least time to parse."""
    return torch.empty(*shape, dtype=dtype) if shape else torch.empty((), dtype=dtype)


def empty_large(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """torch.empty for an output the size of the logits, on huge pages where the system has them."""
    t = empty(shape, dtype)
    size = t.numel() * t.element_size()
    if size >= 8 << 20:
        _C.advise_huge_pages(t.data_ptr(), size)
    return t


def two_leading_each(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The same for several; the caller holds on to the copies while a kernel runs on them."""
    return tuple(t if t is None or t.dim() <= 2 else t.flatten(0, -2) for t in tensors)


def rows_cols(t: Tensor) -> tuple[int, int]:
    shape = t.shape
    return (1, 1) if not shape else (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def supported_isas() -> list[str]:
    """Instruction-set levels this build can run on this processor, lowest first."""
    return [] if UNAVAILABLE else _C.supported_isas()


def isa() -> str:
    """The level in use: the highest, unless PPO_KERNELS_CPU_ISA or `set_isa` lowered it."""
    return _C.isa()


def set_isa(name: str) -> None:
    """Choose the level for the whole process. Raises ValueError for one that cannot run here."""
    _C.set_isa(name)


def build() -> dict[str, str | bool]:
    """How the compiled module was made."""
    return {"version": _C.version, "compiler": _C.compiler, "openmp": _C.openmp}
