"""Cases of gae, discounted_returns and vtrace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Inputs
from ._draw import normal, some_mask, uniform


def cases() -> Iterator[Case]:
    def case(label: str, shape: tuple[int, ...], *, longer: bool = False, **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            values = (*shape[:-1], shape[-1] + longer)
            made: Inputs = {"rewards": normal(g, *shape), "values": normal(g, *values)}
            made |= {"gamma": 0.97, "lam": 0.9}
            return made | {k: v(g, made) if callable(v) else v for k, v in more.items()}

        grads = ("rewards", "values") + (("next_values",) if "next_values" in more else ())
        ops = ("gae_forward",), ("gae_backward",)
        return Case("gae", label, inputs, *ops, grads)

    def sums(label: str, shape: tuple[int, ...], **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            made: Inputs = {"rewards": normal(g, *shape), "gamma": 0.97}
            return made | {k: v(g, made) if callable(v) else v for k, v in more.items()}

        grads = ("rewards",) + (("bootstrap",) if "bootstrap" in more else ())
        ops = ("returns_forward",), ("returns_backward",)
        return Case("discounted_returns", label, inputs, *ops, grads)

    def vtrace(label: str, shape: tuple[int, ...], *, longer: bool = False, **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            values = (*shape[:-1], shape[-1] + longer)
            made: Inputs = {"logprobs": -uniform(g, *shape), "rewards": normal(g, *shape)}
            made["rollout_logprobs"] = made["logprobs"] + normal(g, *shape, std=0.5)
            made |= {"values": normal(g, *values), "gamma": 0.97}
            return made | {k: v(g, made) if callable(v) else v for k, v in more.items()}

        return Case("vtrace", label, inputs, ("vtrace",))

    def masked(g: torch.Generator, made: Inputs) -> Tensor:
        mask = some_mask(g, *made["rewards"].shape)
        for name in made.keys() & {"rewards", "logprobs", "rollout_logprobs"}:
            made[name][~mask] = torch.nan
        if "values" in made:
            made["values"][..., : mask.shape[-1]][~mask] = torch.nan
        return mask

    def sometimes(g: torch.Generator, made: Inputs) -> Tensor:
        return uniform(g, *made["rewards"].shape) < 0.2

    def per_step(g: torch.Generator, made: Inputs) -> Tensor:
        return normal(g, *made["rewards"].shape)

    def per_row(g: torch.Generator, made: Inputs) -> Tensor:
        return uniform(g, made["rewards"].shape[0])

    offsets = torch.tensor([0, 5, 5, 6, 20, 33])
    yield case("padded", (3, 17))
    yield case("bootstrapped", (3, 17), longer=True)
    yield case("one step", (2, 1), longer=True)
    yield case("no discount", (2, 40), longer=True, gamma=1.0, lam=1.0)
    yield case("gamma 0", (2, 9), longer=True, gamma=0.0)
    yield case("lambda 0", (2, 9), longer=True, lam=0.0)
    yield case("lambda per row", (3, 17), longer=True, lam=per_row, value_lam=1.0)
    yield case(
        "flags",
        (3, 30),
        longer=True,
        terminated=sometimes,
        truncated=sometimes,
        next_values=per_step,
        value_lam=0.5,
    )
    for convention in ("carry", "zero", "truncate"):
        yield case(
            f"masked {convention}",
            (3, 30),
            longer=True,
            mask=masked,
            mask_convention=convention,
            terminated=sometimes,
        )
        yield case(
            f"packed {convention}",
            (33,),
            cu_seqlens=offsets.int(),
            mask=masked,
            mask_convention=convention,
            truncated=sometimes,
            next_values=per_step,
        )
    yield case("packed", (33,), cu_seqlens=offsets, lam=lambda g, made: uniform(g, 5))
    yield case(
        "fully masked",
        (2, 9),
        mask=lambda g, made: torch.zeros(2, 9),
        mask_convention="carry",
    )
    yield case("no rows", (0, 4), longer=True)
    yield case("no steps", (3, 0), longer=True)
    yield sums("padded", (3, 17), bootstrap=lambda g, made: normal(g, 3))
    yield sums("terminated", (3, 17), terminated=sometimes)
    yield sums("masked", (3, 30), mask=masked, mask_convention="zero")
    yield sums("packed", (33,), cu_seqlens=offsets, bootstrap=lambda g, made: normal(g, 5))
    yield vtrace("padded", (3, 17))
    yield vtrace("bootstrapped", (3, 17), longer=True, lam=0.9)
    yield vtrace("not clipped", (3, 17), longer=True, rho_clip=None, c_clip=3.0, pg_rho_clip=None)
    yield vtrace("low thresholds", (2, 40), rho_clip=0.9, c_clip=0.7, pg_rho_clip=0.8)
    yield vtrace("gamma 0", (2, 9), longer=True, gamma=0.0)
    yield vtrace("no traces", (2, 9), longer=True, c_clip=0.0)
    yield vtrace("lambda per row", (3, 17), longer=True, lam=per_row)
    yield vtrace(
        "flags",
        (3, 30),
        longer=True,
        terminated=sometimes,
        truncated=sometimes,
        next_values=per_step,
    )
    for convention in ("carry", "zero", "truncate"):
        given: Inputs = {"mask": masked, "mask_convention": convention, "terminated": sometimes}
        yield vtrace(f"masked {convention}", (3, 30), longer=True, **given)
        yield vtrace(f"packed {convention}", (33,), cu_seqlens=offsets.int(), **given)
    yield vtrace("packed", (33,), cu_seqlens=offsets, lam=lambda g, made: uniform(g, 5))
    yield vtrace("no steps", (3, 0), longer=True)
