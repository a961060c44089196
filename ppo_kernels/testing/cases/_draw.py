"""Random numbers and masks, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def normal(g: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64) * std


def some_mask(g: torch.Generator, *shape: int) -> Tensor:
    return uniform(g, *shape) < 0.7


def poisoned_mask(g: torch.Generator, *tensors: Tensor) -> Tensor:
    """A mask; what lies under it is NaN or infinite."""
    mask = some_mask(g, *tensors[0].shape)
    for t, bad in zip(tensors, (torch.nan, torch.inf, -torch.inf), strict=False):
        t[~mask] = bad
    return mask
