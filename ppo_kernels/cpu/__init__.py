"""The `cpu` backend: the C++ kernels of the module `_C`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..native import Native

try:
    from .. import _C as _C

    UNAVAILABLE: str | None = None
except Exception as error:
    _C = None  # type: ignore[assignment]
    UNAVAILABLE = (
        f"the compiled module ppo_kernels._C did not load ({type(error).__name__}: {error})"
    )


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


NATIVE = Native(_C, empty, empty_large, torch.get_num_threads)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `native`, on this backend."""
    return partial(function, NATIVE)


def supported_isas() -> list[str]:
    """Instruction-set levels this build can run on this processor, lowest first."""
    return [] if UNAVAILABLE else _C.supported_isas()


def isa() -> str:
    """The level in use: the highest, unless PPO_KERNELS_CPU_ISA or `set_isa` lowered it."""
    return _C.isa()


def set_isa(name: str) -> None:
    """Choose the level for the whole process. Raises ValueError for one that cannot run here."""
    _C.set_isa(name)


def is_intel() -> bool:
    """Whether the processor is Intel's."""
    return not UNAVAILABLE and _C.is_intel()


def build() -> dict[str, str | bool]:
    """How the compiled module was made."""
    return {
        "version": _C.version,
        "compiler": _C.compiler,
        "openmp": _C.openmp,
        "cuda_off": _C.cuda_off,
    }
