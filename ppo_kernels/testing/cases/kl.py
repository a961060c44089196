"""Cases of kl_penalty and shape_rewards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Inputs
from ._draw import normal, poisoned_mask


def cases() -> Iterator[Case]:
    def logprobs(g: torch.Generator, shape: tuple[int, ...], std: float) -> Inputs:
        policy = -2 * normal(g, *shape).abs()
        return {"logprobs": policy, "ref_logprobs": policy + normal(g, *shape, std=std)}

    def case(
        label: str, shape: tuple[int, ...], std: float = 1.0, masked: bool = False, **more: Any
    ) -> Case:
        def make(g: torch.Generator) -> Inputs:
            made = logprobs(g, shape, std)
            if masked:
                made["mask"] = poisoned_mask(g, *made.values())
            return made | more

        backward = () if more.get("gradient") == "none" else ("kl_backward",)
        return Case(
            "kl_penalty",
            label,
            make,
            ("kl_forward",),
            backward,
            ("logprobs",) if backward else (),
        )

    def shaped(
        label: str, shape: tuple[int, ...], offsets: list[int] | None = None, **more: Any
    ) -> Case:
        def make(g: torch.Generator) -> Inputs:
            made = logprobs(g, shape, 0.5)
            extra = {k: v(g, made) if callable(v) else v for k, v in more.items()}
            if offsets is not None:
                extra["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
            sequences = shape[0] if offsets is None else len(offsets) - 1
            return {"scores": normal(g, sequences), **made, "kl_coef": 0.3, **extra}

        return Case(
            "shape_rewards",
            label,
            make,
            ("shape_rewards",),
            ("kl_backward",),
            ("scores", "logprobs"),
        )

    def poisoned(g: torch.Generator, made: Inputs) -> Tensor:
        return poisoned_mask(g, *made.values())

    def nothing(g: torch.Generator, made: Inputs) -> Tensor:
        return torch.zeros_like(made["logprobs"], dtype=torch.int64)

    for estimator in ("k1", "k2", "k3", "abs"):
        yield case(estimator, (3, 37), masked=True, estimator=estimator)
        yield case(f"{estimator} clamped", (131,), 3.0, estimator=estimator, log_ratio_clamp=2.5)
        yield shaped(estimator, (4, 37), mask=poisoned, estimator=estimator, log_ratio_clamp=1.0)
    yield case("several blocks", (5, 1003), masked=True, estimator="k3")
    yield case("near 0", (3, 37), 1e-3, estimator="k3")
    yield case("far from 0", (3, 37), 30.0, estimator="k3", log_ratio_clamp=80.0)
    yield case("k3 with the gradient of k2", (3, 37), estimator="k3", gradient="k2")
    yield case("k1 with the gradient of k3", (3, 37), estimator="k1", gradient="k3")
    yield case("no gradient", (3, 37), masked=True, gradient="none")
    yield case("four dimensions", (2, 1, 3, 5), masked=True, estimator="k3")
    yield case("empty", (0, 5))
    yield shaped("no mask", (3, 7))
    yield shaped("several blocks", (3, 2100), mask=poisoned, estimator="k3")
    yield shaped("packed", (60,), [0, 10, 10, 31, 60, 60], mask=poisoned)
    yield shaped("packed without mask", (9,), [0, 0, 4, 9])
    yield shaped("fully masked", (3, 7), mask=nothing)
    yield shaped("coefficient in a tensor", (3, 7), kl_coef=torch.tensor(0.25).double())
    yield shaped("no tokens", (3, 0))
