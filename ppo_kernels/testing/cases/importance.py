"""Cases of importance_weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops.importance import CORRECTIONS
from ..case import Case, Inputs
from ._draw import normal, poisoned_mask


def cases() -> Iterator[Case]:
    def case(
        kind: str,
        label: str,
        shape: tuple[int, ...],
        ends: list[int] | None = None,
        mask: float | None = None,
        **more: Any,
    ) -> Case:
        """`mask`: of one value everywhere; None for some of the tokens."""

        def inputs(g: torch.Generator) -> Inputs:
            old = -normal(g, *shape).abs()
            made: Inputs = {
                "old_logprobs": old,
                "rollout_logprobs": old + normal(g, *shape, std=_spread(kind, shape)),
            }
            some = poisoned_mask(g, *made.values())
            made["mask"] = some if mask is None else torch.full(shape, mask)
            if ends is not None:
                made["cu_seqlens"] = torch.tensor([0, *ends])
            return made | {"kind": kind, "low": 0.9, "high": 1.1} | more

        return Case(
            "importance_weights", f"{kind} {label}", inputs, ("importance_weights",), scale=_scale
        )

    for kind in CORRECTIONS:
        yield case(kind, "padded", (5, 130))
        yield case(kind, "packed", (130,), [40, 40, 41, 129, 130])
    yield case("icepop", "several blocks", (3, 5557))
    yield case("icepop", "one token", (1,), mask=1.0)
    yield case("icepop", "no rows", (0, 4))
    yield case("icepop", "without offsets", (1000,))
    yield case("tis-sequence", "fully masked", (3, 5), mask=0.0, low=2.0, high=3.0)
    yield case("mask-geometric", "no columns", (4, 0))
    yield case("mask-geometric", "columns of one", (7, 1))
    ends = [1500, 1500, 8000, 8001, 9001]
    yield case("mask-sequence", "several packed blocks", (9001,), ends, low=0.95, high=1.05)
    yield case("icepop", "live NaN", (5, 130), mask=1.0)


def _spread(kind: str, shape: tuple[int, ...]) -> float:
    """Of log-ratios, so that some ratios lie in the band and some outside."""
    steps = max(shape[-1], 1)
    if kind.endswith("-sequence"):
        return 0.2 * steps**-0.5
    return 0.1 * steps**0.5 if kind.endswith("-geometric") else 0.2


def _scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
    """Sums of the magnitudes of the terms of each entry of the metrics."""
    live = inputs["mask"] != 0
    x = (inputs["old_logprobs"] - inputs["rollout_logprobs"])[live]
    x = x[x.isfinite()]
    high, n = inputs["high"], x.numel()
    k3 = (torch.expm1(x) - x).abs().sum() + (x * torch.expm1(x)).abs().sum()
    sums = [0, 0, n * high, n * high**2, 0, float(x.abs().sum()), float(k3)]
    return {1: torch.tensor(sums, dtype=torch.float64)}
