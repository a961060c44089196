"""The matrix products of a head on a CPU, in fp32 or fp64, by one of two libraries torch brings.

torch.mm multiplies floats by MKL, which has AVX-512 code for Intel's processors alone. On others
that have AVX-512 oneDNN takes half the time (docs/design.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from . import cpu

LIBRARIES = ("torch", "onednn")
_OPERATOR = "_linear_pointwise"  # of torch.ops.mkldnn; what Inductor makes of a linear layer
# Rows of the weight at a time. With more, what oneDNN gives leaves the cache before it is copied or
# added. torch.mm takes all rows, unless they are made wide first.
BLOCK = {"torch": 8192, "onednn": 1024}
# With fewer, adding what oneDNN gives to the gradient of the weight takes longer than it saves.
FEW_ROWS = 64


@cache
def library() -> str:
    """What multiplies floats: oneDNN where AVX-512 is not Intel's, else what torch.mm takes.

    The environment variable PPO_KERNELS_CPU_GEMM overrides the choice. Raises ValueError where it
    cannot be had.
    """
    asked = os.environ.get("PPO_KERNELS_CPU_GEMM")
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, _OPERATOR)
    available = LIBRARIES if onednn else LIBRARIES[:1]
    if asked:
        if asked not in available:
            raise ValueError(
                f"PPO_KERNELS_CPU_GEMM: expected one of {', '.join(available)} here, got {asked!r}"
            )
        return asked
    by_mkl = torch.backends.mkl.is_available() and not cpu.is_intel()
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return available[-1] if by_mkl and avx512 else LIBRARIES[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, rows: int) -> None:
    """Write x @ weight.T + bias to `out`, `rows` of x at a time."""
    for columns, block in _blocks(weight, out.dtype):
        of_columns = None if bias is None else bias[columns].contiguous()
        for i in range(0, out.shape[0], rows):
            to = out[i : i + rows, columns]
            if _by_onednn(to):
                to.copy_(_onednn(x[i : i + rows], block, of_columns))
            elif of_columns is None:
                torch.mm(x[i : i + rows], block.t(), out=to)
            else:
                torch.addmm(of_columns, x[i : i + rows], block.t(), out=to)


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """Return grad @ weight, in the dtype of grad."""
    total = grad.new_zeros((grad.shape[0], weight.shape[1]))
    for columns, block in _blocks(weight, grad.dtype):
        if _by_onednn(grad):
            total += _onednn(grad[:, columns], block.t())
        else:
            # In place: autocast would narrow a product that is not.
            total.addmm_(grad[:, columns], block)
    return total


def add_grad_weight(grad: Tensor, x: Tensor, total: Tensor) -> None:
    """Add grad.T @ x to `total`; all are of one dtype."""
    if not _by_onednn(grad) or grad.shape[0] < FEW_ROWS:
        total.addmm_(grad.t(), x)
        return
    x_t = x.t().contiguous()
    for begin in range(0, total.shape[0], BLOCK["onednn"]):
        columns = slice(begin, begin + BLOCK["onednn"])
        total[columns] += _onednn(grad[:, columns].t(), x_t)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of the weight at a time, in a dtype that may take a copy."""
    rows = weight.shape[0]
    whole = dtype == weight.dtype and not _by_onednn(weight)
    step = rows if whole else BLOCK[library()]
    for begin in range(0, rows, step):
        columns = slice(begin, begin + step)
        yield columns, weight[columns].to(dtype).contiguous()


def _by_onednn(t: Tensor) -> bool:
    return t.dtype != torch.float64 and library() == "onednn"


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias; weight or its transpose is contiguous, and bias is.

    Some other layouts oneDNN multiplies by code it has for reference, hundreds of times slower; of
    a bias it does not heed the stride.
    """
    linear_pointwise = getattr(torch.ops.mkldnn, _OPERATOR)
    product: Tensor = linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return product
