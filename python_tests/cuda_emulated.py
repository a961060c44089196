"""The backend `cuda-emulated`, of the tests alone: the CUDA kernels run by the emulator.

It is the `cuda` backend, host functions included, with the module that the emulator gives in place
of `_cuda`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ppo_kernels import _faults
from ppo_kernels._op import BACKENDS, OPS, Backend
from ppo_kernels.native import Native

NAME = "cuda-emulated"
PROCESSORS = 2


def _empty(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _launch() -> tuple[Any, ...]:
    flag = _faults.flag(torch.device("cpu"))
    return 0, flag.data_ptr(), PROCESSORS, lambda size: _empty((size,), torch.uint8)


def install(module: Any) -> None:
    native = Native(module, _empty, _empty, _launch)
    for op in OPS.values():
        kernel = op.kernels.get("cuda")
        if isinstance(kernel, partial):
            op.kernels[NAME] = partial(kernel.func, native, **kernel.keywords)
    BACKENDS[NAME] = Backend(("cpu",), None)
