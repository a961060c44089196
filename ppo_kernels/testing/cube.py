"""One cell of the cube op x executor x dtype x layout."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from .. import cpu
from .._op import op_counts, reset_op_counts
from .case import DTYPES, Case, Inputs
from .layouts import LAYOUTS, arrange
from .running import device_of, executor, run
from .tolerance import Expected, judge, reference


@lru_cache(maxsize=16)  # the executors and layouts of a case and dtype share it
def _expected(case: Case, dtype: torch.dtype, seed: int) -> tuple[Inputs, Expected]:
    inputs = case.inputs(torch.Generator().manual_seed(seed))
    return inputs, reference(case, arrange(arrange(inputs, dtype), torch.float64), dtype)


# Functions that hand their tensors on to kernels that have cases of their own.
_COMPOSED = (
    "categorical_kl_from_hidden",
    "logprobs_from_hidden",
    "ppo_loss_from_hidden",
    "ppo_loss_from_logits",
)


def cells(case: Case, executor: str) -> list[tuple[torch.dtype, str]]:
    """The dtypes and layouts in which an executor runs a case.

    All of both, but for what would only repeat: one kind of view shows that strides are handed on
    to torch, and for the second of the two half precisions. A function without kernels of its own
    does the same on every backend and at every instruction-set level, with every view.
    """
    if case.function in _COMPOSED:
        if executor == "torch" or executor == f"cpu:{cpu.isa()}":
            return [(dtype, "contiguous") for dtype in DTYPES] + [(torch.float32, "strided")]
        if executor.startswith("cpu:"):
            return []
        return [(torch.bfloat16, "strided")]
    # What an interpreter cannot see: alignment, which is all that an offset changes; how wide loads
    # are, which is where strides meet dtypes.
    if executor == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        views = [layout for layout in LAYOUTS if layout not in ("contiguous", "offset")]
        every = [(dtype, "contiguous") for dtype in DTYPES]
        return every + [(torch.bfloat16, layout) for layout in views]
    return [
        (dtype, layout)
        for dtype in DTYPES
        for layout in LAYOUTS
        if layout in ("contiguous", "strided")
        or not (executor == "torch" or dtype == torch.float16)
    ]


def check(case: Case, name: str, dtype: torch.dtype, layout: str, seed: int = 0) -> None:
    """Hold one cell of the cube op x executor x dtype x layout to the float64 reference.

    Raises AssertionError naming what differs, or if another kernel than the one asked for ran.
    """
    inputs, want = _expected(case, dtype, seed)
    reset_op_counts()
    with executor(name) as backend:
        got, grads = run(case, arrange(inputs, dtype, layout, device_of(name)))
    ran = op_counts()
    ops = (case.function,) if backend == "torch" else case.forward + case.backward
    assert set(ran) == {(op, backend) for op in ops}, f"asked for {ops}, ran {ran}"
    problem = judge(want, got, grads)
    assert problem is None, problem
