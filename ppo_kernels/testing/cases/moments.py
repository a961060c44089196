"""Cases of whiten, masked_mean and masked_sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Inputs
from ._draw import normal, poisoned_mask


def _whiten_scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
    """The gradient's terms, upstream / std, cancel where there is next to no variance."""
    live = inputs["x"][inputs.get("mask", torch.ones_like(inputs["x"])) != 0]
    if not live.numel() or not live.isfinite().all():
        return {}
    std = (live.var(correction=0) + inputs.get("eps", 1e-8)).sqrt()
    return {"x": 3 / std}


def cases() -> Iterator[Case]:
    def case(function: str, label: str, make: Callable[[torch.Generator], Inputs]) -> Case:
        ops = ("whiten_forward", "whiten_backward") if function == "whiten" else (function,)
        scale = _whiten_scale if function == "whiten" else lambda inputs: {}
        return Case(function, label, make, ops[:1], ops[1:], ("x",), scale)

    def plain(shape: tuple[int, ...], **more: Any) -> Callable[[torch.Generator], Inputs]:
        return lambda g: {"x": normal(g, *shape) + 0.5, **more}

    def masked(shape: tuple[int, ...], **more: Any) -> Callable[[torch.Generator], Inputs]:
        def make(g: torch.Generator) -> Inputs:
            x = normal(g, *shape) + 0.5
            return {"x": x, "mask": poisoned_mask(g, x), **more}

        return make

    def live(x: list[float], mask: list[int], **more: Any) -> Callable[[torch.Generator], Inputs]:
        return lambda g: {
            "x": torch.tensor(x, dtype=torch.float64),
            "mask": torch.tensor(mask, dtype=torch.float64),
            **more,
        }

    yield case("whiten", "plain", plain((3, 37)))
    yield case("whiten", "several blocks", masked((5, 1003)))
    yield case("whiten", "scalar", plain(()))
    yield case("whiten", "packed", masked((131,)))
    yield case("whiten", "three dimensions", masked((2, 3, 17)))
    yield case("whiten", "keeps the mean", masked((3, 37), shift_mean=False))
    yield case("whiten", "biased", masked((3, 37), unbiased=False, eps=1e-3))
    yield case("whiten", "mean above spread", lambda g: {"x": normal(g, 4, 300) + 300.0})
    yield case("whiten", "constant", lambda g: {"x": normal(g, 1, 1).expand(3, 37).clone()})
    yield case("whiten", "one live", live([3.0, 7.0, 1.0], [0, 1, 0], shift_mean=False))
    yield case("whiten", "fully masked", live([torch.nan, 7.0, 1.0], [0, 0, 0]))
    yield case("whiten", "not finite", live([1.0, torch.inf, 2.0, 3.0], [1, 1, 0, 1]))
    yield case("whiten", "empty", plain((0, 5)))
    for function in ("masked_sum", "masked_mean"):
        yield case(function, "plain", plain((3, 37)))
        yield case(function, "several blocks", masked((5, 1003)))
        yield case(function, "scalar", plain(()))
        yield case(function, "rows", masked((5, 41), dim=1))
        yield case(function, "columns", masked((5, 41), dim=0))
        yield case(function, "few columns", masked((41, 5), dim=-2))
        yield case(function, "middle of three", masked((4, 7, 19), dim=1))
        yield case(function, "long rows", masked((2, 5000), dim=-1))
        yield case(function, "fully masked", live([torch.nan, 7.0], [0, 0]))
        yield case(function, "not finite", live([torch.inf, 7.0, torch.nan], [1, 1, 0]))
        yield case(function, "nothing to sum", plain((3, 0), dim=1))
