"""The same values under other strides, offsets and dtypes, and on other devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._kept import KeptSet
from .case import Inputs


def _embedded(t: Tensor, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> Tensor:
    """The values of `t` inside a larger tensor whose other elements are NaN (or nonsense)."""
    anything = float("nan") if t.is_floating_point() else 77
    whole = torch.full(shape, anything, device=t.device).to(t.dtype)
    inside = view(whole)
    inside.copy_(t)
    return inside


# Same values, other strides. One-dimensional tensors and scalars keep what applies to them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "offset": lambda t: _embedded(t, (t.numel() + 5,), lambda w: w[5:].view(t.shape)),
    "shifted": lambda t: (
        _embedded(t, (*t.shape[:-1], t.shape[-1] + 3), lambda w: w[..., 1:-2]) if t.dim() else t
    ),
    "strided": lambda t: (
        _embedded(t, (*t.shape[:-1], 2 * t.shape[-1]), lambda w: w[..., ::2]) if t.dim() else t
    ),
    "transposed": lambda t: (
        _embedded(t.mT, t.mT.shape, lambda w: w).mT if t.dim() > 1 else t.clone()
    ),
}


def arrange(
    inputs: Inputs, dtype: torch.dtype | None, layout: str = "contiguous", device: str = "cpu"
) -> Inputs:
    """Floating-point tensors in `dtype` (None: as they are), every tensor as and where asked."""

    def convert(value: Any) -> Any:
        if isinstance(value, KeptSet):
            return KeptSet(*map(convert, value))
        if not isinstance(value, Tensor):
            return value
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        return LAYOUTS[layout](value.to(device))

    return {name: convert(value) for name, value in inputs.items()}
