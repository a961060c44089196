"""What functions of hidden states share: checks, autocast, all logits at once for references."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _head


def autocast(hidden: Tensor, weight: Tensor, prefix: str = "") -> tuple[Tensor, Tensor]:
    """Both in the dtype in which autocast, where it is on, would have them multiplied."""
    _checks.tensor(f"{prefix}hidden", hidden, _checks.FLOATS)
    _checks.tensor(f"{prefix}weight", weight, _checks.FLOATS)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    for name, t in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight)):
        if hasattr(t, "full_tensor"):
            raise TypeError(
                f"{name}: expected a plain tensor, got a {type(t).__name__}; gather it with "
                f"{name}.full_tensor() first"
            )
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(
            f"{prefix}hidden: expected shape [..., H] with H > 0, got {list(hidden.shape)}"
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight: expected shape [V, {hidden.shape[-1]}] (H of {prefix}hidden) with "
            f"V > 0, got {list(weight.shape)}"
        )
    _checks.tensor(f"{prefix}weight", weight, (hidden.dtype,))
    _checks.device(f"{prefix}weight", weight, hidden, f"as {prefix}hidden")
    if bias is not None:
        _checks.tensor(f"{prefix}bias", bias, _checks.FLOATS)
        _checks.shape(f"{prefix}bias", bias, weight.shape[:1], f"V of {prefix}weight")
        _checks.device(f"{prefix}bias", bias, hidden, f"as {prefix}hidden")


def check_sizes(vocab_size: int | None, chunk: int | None, largest: int) -> int:
    """The size of the vocabulary."""
    for name, value, high, step in (
        ("vocab_size", vocab_size, largest, 1),
        ("chunk", chunk, None, _head.TILE),
    ):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1 or value % step or (high is not None and value > high):
            expected = f"a number from 1 to {high}" if high else f"a multiple of {step} above 0"
            raise ValueError(f"{name}: expected {expected}, got {value}")
    return largest if vocab_size is None else vocab_size


def all_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor | None) -> Tensor:
    dtype = _checks.compute_dtype(hidden)
    hidden = hidden.to(dtype)
    if live is not None:
        # Selected away before any arithmetic: NaN under the mask must not reach the weight's
        # gradient.
        hidden = torch.where(live[..., None], hidden, 0.0)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden, weight.to(dtype), bias if bias is None else bias.to(dtype))


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _checks.compute_dtype(hidden) if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0, hidden.shape[-1])),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=dtype),
    )
