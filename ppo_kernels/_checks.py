"""Bad input: one place that words every complaint, so that all backends say the same.

Each message names the argument, what was given and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, *INDICES, *FLOATS)
# Fault kinds of csrc/kernels.h.
BAD_TOKEN, BAD_TEMPERATURE, BAD_OFFSETS, BAD_LAMBDA = 1, 2, 3, 4
# And those that only GPU kernels need, which cannot look again.
BAD_VALUE_LAMBDA, BAD_COEFFICIENT = 5, 6
BAD_KEPT = 7
# A GPU keeps a fault as one integer, position << FAULT_KIND_BITS | kind.
FAULT_KIND_BITS = 8


def compute_dtype(*inputs: Tensor | None) -> torch.dtype:
    """Of arithmetic and results: fp32, or fp64 as soon as one input is."""
    double = any(t is not None and t.dtype == torch.float64 for t in inputs)
    return torch.float64 if double else torch.float32


def tensor(name: str, value: Any, dtypes: Sequence[torch.dtype] | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{name}: expected dtype {expected}, got {str(value.dtype).removeprefix('torch.')}"
        )


def shape(name: str, value: Tensor, expected: Sequence[int], like: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected shape {list(expected)} ({like}), got {list(value.shape)}"
        )


def device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} ({like_name}), got {value.device}")


def mask(value: Tensor | None, like: Tensor, like_name: str) -> None:
    if value is None:
        return
    tensor("mask", value, MASKS)
    shape("mask", value, like.shape, f"as {like_name}")
    device("mask", value, like, like_name)


def cu_seqlens(value: Tensor, like: Tensor, like_name: str) -> None:
    """Shape, dtype and device of the offsets [S+1] of the S sequences packed in `like` [N]."""
    tensor("cu_seqlens", value, INDICES)
    if like.dim() != 1:
        raise ValueError(
            f"cu_seqlens: expected only with packed [N] {like_name}, got {list(like.shape)}"
        )
    if value.dim() != 1 or value.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape [sequences + 1], got {list(value.shape)}")
    device("cu_seqlens", value, like, f"as {like_name}")


def cu_seqlens_contents(value: Tensor, total: int) -> None:
    """Offsets start at 0, never decrease and end at `total` tokens; a sequence may be empty.

    Kernels test the same and, on a fault, leave the wording to this function.
    """
    offsets = value.tolist()
    where = len(offsets) - 1
    if offsets[0] != 0:
        where, expected = 0, "to start at 0"
    elif decreasing := [i for i in range(1, len(offsets)) if offsets[i] < offsets[i - 1]]:
        where, expected = decreasing[0], f"not to decrease (after {offsets[decreasing[0] - 1]})"
    elif offsets[-1] != total:
        expected = f"to end at {total}, the number of tokens"
    else:
        return
    raise ValueError(f"cu_seqlens: expected {expected}, got {offsets[where]} at index {where}")


def constant(name: str, value: Tensor | None) -> None:
    """PPO treats this input as a constant; a gradient through it would be a silent bug."""
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: is a constant of the objective but requires grad; pass {name}.detach()"
        )


def number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> None:
    """A finite Python number in [low, high], or (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Comparisons only: under torch.compile with dynamic shapes a float is symbolic.
    ok = (value > low if open_low else value >= low) and value <= high and abs(value) < math.inf
    if not ok:
        bounds = f"{'(' if open_low else '['}{low}, {high}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name}: expected a finite number in {bounds}, got {value}")


def fractions(name: str, value: Tensor) -> None:
    """Contents of a tensor of numbers in [0, 1]. Kernels test the same; the wording is here."""
    for i, x in enumerate(value.tolist()):
        if not 0 <= x <= 1:
            raise ValueError(f"{name}: expected finite numbers in [0, 1], got {x} at index {i}")


def choice(name: str, value: Any, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise ValueError(f"{name}: unknown {name} {value!r}, expected one of {', '.join(known)}")


def row_faults(
    tokens: Tensor, live: Tensor, temperatures: Tensor | None, vocab: int
) -> list[tuple[int, Tensor]]:
    """What kernels of rows complain about, and where."""
    faults = [(BAD_TOKEN, live & ((tokens < 0) | (tokens >= vocab)))]
    if temperatures is not None:
        faults.append((BAD_TEMPERATURE, live & ~((temperatures > 0) & temperatures.isfinite())))
    return faults


def row_contents(tokens: Tensor, live: Tensor, temperatures: Tensor | None, vocab: int) -> None:
    """The same, raised as kernels on a CPU raise it."""
    for kind, bad in row_faults(tokens, live, temperatures, vocab):
        if bad.any():
            where = int(bad.flatten().nonzero()[0])
            raise_row_fault((kind, where), vocab, tokens, temperatures)


def raise_row_fault(
    fault: tuple[int, int], vocab: int, tokens: Tensor, temperatures: Tensor | None
) -> NoReturn:
    kind, where = fault
    if kind == BAD_TOKEN:
        raise ValueError(
            f"tokens: expected ids in [0, {vocab}) or ignore_index at live positions, "
            f"got {int(tokens.flatten()[where])} at flat position {where}"
        )
    assert temperatures is not None
    raise ValueError(
        f"temperature: expected finite values above 0 at live positions, "
        f"got {float(temperatures.flatten()[where])} at flat position {where}"
    )


def raise_kept_fault(where: int, vocab: int, begins: Tensor, ends: Tensor, ids: Tensor) -> NoReturn:
    begin, end = int(begins[where]), int(ends[where])
    if not 0 <= begin <= end <= ids.shape[0]:
        raise ValueError(
            f"kept.offsets: expected not to decrease and to stay in [0, {ids.shape[0]}], "
            f"got {begin} and {end} at flat position {where}"
        )
    own = ids[begin:end]
    outside = own[(own < 0) | (own >= vocab)]
    what, found = f"ids in [0, {vocab})", int(outside[0]) if outside.numel() else None
    if found is None:
        distinct, times = own.unique(return_counts=True)
        what, found = "no id twice at a position", int(distinct[times > 1][0])
    raise ValueError(f"kept.ids: expected {what}, got {found} at flat position {where}")


def raise_device_fault(fault: int, device: torch.device) -> NoReturn:
    """What a kernel on a GPU noted; the tensors are gone, so the value cannot be told."""
    what = {
        BAD_TOKEN: "tokens: expected ids in [0, V) or ignore_index at live positions",
        BAD_TEMPERATURE: "temperature: expected finite values above 0 at live positions",
        BAD_OFFSETS: "cu_seqlens: expected to start at 0, not to decrease and to end at the tokens",
        BAD_LAMBDA: "lam: expected finite numbers in [0, 1]",
        BAD_VALUE_LAMBDA: "value_lam: expected finite numbers in [0, 1]",
        BAD_COEFFICIENT: "kl_coef: expected a finite number in [0, inf)",
        BAD_KEPT: "kept: expected offsets that do not decrease and ids in [0, V)",
    }[fault & ((1 << FAULT_KIND_BITS) - 1)]
    raise ValueError(
        f"{what}, got another at flat position {fault >> FAULT_KIND_BITS} "
        f"in a call on {device} since the last check"
    )
