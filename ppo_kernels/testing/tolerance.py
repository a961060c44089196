"""The rule for allowed errors.

The yardstick is the reference in float64 on upcast inputs, never torch in the input's own dtype,
which would pass every precision bug. Allowed error: twice that of the reference in fp32 on the same
upcast inputs, plus 4 ulps of the condition scale (the sum of the magnitudes of the terms a result
is made of); a half-precision gradient besides has 1 ulp of its own dtype, for the one rounding it
undergoes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._op import use_backend
from .case import Case, Inputs
from .layouts import arrange
from .running import run


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at |x|, as float64."""
    info = torch.finfo(dtype)
    exponent = x.abs().double().clamp(min=info.smallest_normal).log2().floor()
    return torch.exp2(exponent) * info.eps


def allowed_error(exact: Tensor, torch32: Tensor, scale: Tensor | float | None) -> Tensor:
    """See the module's docstring; infinite and NaN results must agree exactly instead."""
    finite = exact.isfinite() & torch32.isfinite()
    error = torch.where(finite, (torch32.double() - exact).abs(), 0.0)
    if scale is None:
        scale = torch.where(finite, exact.abs(), 0.0).max() if exact.numel() else 0.0
    worst = error.max() if error.numel() else 0.0
    return 2 * worst + 4 * torch.finfo(torch.float32).eps * torch.as_tensor(scale) + exact * 0


def mismatch(got: Tensor, exact: Tensor, allowed: Tensor) -> str | None:
    """What is wrong with `got`, or None. NaN and infinities must agree."""
    got = got.double().to(exact.device)
    same = (got == exact) | (got.isnan() & exact.isnan())
    bad = ~(same | ((got - exact).abs() <= allowed))
    if not bad.any():
        return None
    where = tuple(int(i) for i in bad.nonzero()[0])
    return (
        f"{int(bad.sum())} of {bad.numel()} elements differ, first at {where}: "
        f"got {got[where].item()!r}, exact {exact[where].item()!r}, "
        f"allowed error {allowed[where].item():.3g}"
    )


class Exact(NamedTuple):
    """A tensor of the exact result, and the error allowed in each of its elements."""

    value: Tensor
    allowed: Tensor


class Expected(NamedTuple):
    """What a case must give for inputs of one dtype."""

    dtype: torch.dtype
    outputs: list[Exact]
    grads: dict[str, Exact]


def reference(
    case: Case,
    upcast: Inputs,
    dtype: torch.dtype,
    *,
    grad: bool = True,
    call: Callable[..., Any] | None = None,
) -> Expected:
    """The reference in float64 on inputs of `dtype`, upcast."""
    with use_backend("torch"):
        exact, exact_grads = run(case, upcast, grad=grad, call=call)
        inputs32 = arrange(upcast, torch.float32)
        torch32, torch32_grads = run(case, inputs32, grad=grad, call=call)
    scales = case.scale(upcast)

    def allowed(key: int | str, e: Tensor, t: Tensor) -> Tensor:
        if dtype != torch.float64:
            return allowed_error(e, t, scales.get(key))
        # Here the reference is no better than the kernel: both may be off by some ulps.
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return 8 * ratio * allowed_error(e, e, scales.get(key))

    outputs = [
        Exact(e, allowed(i, e, t)) for i, (e, t) in enumerate(zip(exact, torch32, strict=True))
    ]
    grads = {}
    for name, e in exact_grads.items():
        error, once = allowed(name, e, torch32_grads[name]), e
        if dtype in (torch.bfloat16, torch.float16):
            error, once = error + ulp(e, dtype), e.to(dtype).double()
        grads[name] = Exact(once, error)
    return Expected(dtype, outputs, grads)


def judge(want: Expected, got: Sequence[Tensor], grads: Mapping[str, Tensor]) -> str | None:
    """What is wrong with what `run` gave, or None."""
    for i, (g, exact) in enumerate(zip(got, want.outputs, strict=True)):
        if g.shape != exact.value.shape:
            return f"output {i}: shape {list(g.shape)}, expected {list(exact.value.shape)}"
        if g.dtype not in (torch.float32, torch.float64):
            return f"output {i}: dtype {g.dtype}"
        problem = mismatch(g, *exact)
        if problem:
            return f"output {i}: {problem}"
    if set(grads) != set(want.grads):
        return f"gradients of {sorted(grads)}, expected of {sorted(want.grads)}"
    for name, g in grads.items():
        if g.dtype != want.dtype:
            return f"gradient of {name}: dtype {g.dtype}"
        problem = mismatch(g, *want.grads[name])
        if problem:
            return f"gradient of {name}: {problem}"
    return None
