"""The backend `cuda-emulated`, of the tests alone: the CUDA kernels run by the emulator.

It is the `cuda` backend, host functions included, with the module that the emulator gives in place
of `_cuda`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from cuda_emulator import build

from ppo_kernels import _faults
from ppo_kernels._op import BACKENDS, OPS, Backend
from ppo_kernels.native import Native

NAME = "cuda-emulated"
PROCESSORS = 2
SOURCES = build.ROOT / "csrc/cuda"
OPTIONS = [
    "-DPPOK_ISA=cuda",
    "-DPPOK_MODULE=_cuda_emulated",
    '-DPPOK_COMPILER="the emulator"',
    '-DPPOK_ARCHITECTURES="none"',
]
SANITIZE = os.environ.get("PPO_KERNELS_EMULATOR_SANITIZE", "")
DEFAULTS = {
    "thread_order": os.environ.get("CUDA_EMULATOR_THREAD_ORDER", "forward"),
    "block_order": "forward", "resident_blocks": 4, "seed": 1, "shared_bytes": 227 << 10,
}  # fmt: skip
# What no result may depend on.
SCHEDULES: list[dict[str, Any]] = [
    {"thread_order": "reversed"},
    {"thread_order": "shuffled"},
    {"thread_order": "shuffled", "seed": 2, "block_order": "reversed"},
    {"resident_blocks": 1, "block_order": "reversed"},
]
if SANITIZE == "thread":  # tells races in any schedule
    SCHEDULES = SCHEDULES[2:3]


def unavailable() -> str | None:
    """Why the backend is not tested here, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "this process tests Triton"
    if torch.cuda.is_available():
        return "there is a GPU"
    if os.environ.get("PPO_KERNELS_SANITIZED") == "1":
        return "this process has a sanitizer of its own"
    return build.unavailable()


def _empty(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _launch() -> tuple[Any, ...]:
    flag = _faults.flag(torch.device("cpu"))
    return 0, flag.data_ptr(), PROCESSORS, lambda size: _empty((size,), torch.uint8)


@cache
def module() -> Any:
    sources = [*sorted(SOURCES.glob("*.cu")), SOURCES / "bindings.cpp"]
    return build.load(build.extension("_cuda_emulated", sources, SANITIZE, OPTIONS))


def install() -> None:
    """Every op with a `cuda` kernel has it as `cuda-emulated` too, on CPU tensors."""
    native = Native(module(), _empty, _empty, _launch)
    for op in OPS.values():
        kernel = op.kernels.get("cuda")
        if isinstance(kernel, partial):
            op.kernels[NAME] = partial(kernel.func, native, **kernel.keywords)
    BACKENDS[NAME] = Backend(("cpu",), None)


@contextmanager
def scheduled(**settings: Any) -> Iterator[None]:
    """Run the block's kernels in this schedule."""
    build.configure(module(), **settings)
    try:
        yield
    finally:
        build.configure(module(), **DEFAULTS)
