"""The `cuda` backend: the CUDA C++ kernels of the module `_cuda`.

They run on the current device and stream, wait for nothing and allocate nothing but what they are
given here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _devices, _faults, cpu
from ..native import Native

try:
    from .. import _cuda as _cuda  # type: ignore[attr-defined]

    UNAVAILABLE: str | None = "torch is a ROCm build" if torch.version.hip else None
except Exception as error:
    _cuda = None
    UNAVAILABLE = (
        f"the compiled module ppo_kernels._cuda did not load ({type(error).__name__}: {error})"
    )
    if cpu.UNAVAILABLE is None and cpu.build()["cuda_off"]:
        UNAVAILABLE = str(cpu.build()["cuda_off"])


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _workspace(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def _launch() -> tuple[Any, ...]:
    device = torch.device("cuda", torch.cuda.current_device())
    return (
        torch.cuda.current_stream(device).cuda_stream,
        _faults.flag(device).data_ptr(),
        _devices.processors(device),
        _workspace,
    )


NATIVE = Native(_cuda, _empty, _empty, _launch)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `native`, on this backend."""
    return partial(function, NATIVE)


def build() -> dict[str, str]:
    """How the compiled module was made."""
    return {"compiler": _cuda.compiler, "architectures": _cuda.architectures}
