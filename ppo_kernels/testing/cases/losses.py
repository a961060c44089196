"""Cases of clipped_loss and value_loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops._aggregation import AGGREGATIONS
from ...ops._policy import VARIANTS
from ..case import Case, Inputs
from ._draw import normal, some_mask

# All variants but clip, and what is particular about a call of each.
_VARIANTS: dict[str, Inputs] = {
    "cispo": {},
    "sapo": {"tau_pos": 1.5, "tau_neg": 2.5},
    "gpg": {},
    "gspo": {"dual_clip": 1.2},
    "gmpo": {},
    "clip-cov": {"cov_ratio": 1.0, "cov_low": 0.1, "cov_high": 2.0},  # all: nothing is random
    "kl-cov": {"cov_ratio": 0.2, "kl_coef": 0.7},
}


def _garbage_under(mask: Tensor, made: Inputs, *names: str) -> Tensor:
    for name in names:
        if made[name].shape == mask.shape:
            made[name][mask == 0] = torch.nan
            made[name].view(-1)[: int((mask.view(-1)[:1] == 0).sum())] = torch.inf
    return mask


def cases() -> Iterator[Case]:
    def case(function: str, label: str, shape: tuple[int, ...], **more: Any) -> Case:
        live, constant, target = (
            ("logprobs", "old_logprobs", "advantages")
            if function == "clipped_loss"
            else ("values", "old_values", "returns")
        )

        def inputs(g: torch.Generator) -> Inputs:
            first = -normal(g, *shape).abs()
            made: Inputs = {
                live: first,
                constant: first + normal(g, *shape, std=0.3),
                target: normal(g, *shape),
            }
            return made | {k: v(g, made) if callable(v) else v for k, v in more.items()}

        def scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
            return loss_scale(function, inputs, target)

        return Case(function, label, inputs, (function,), ("scale_gradient",), (live,), scale)

    def masked(g: torch.Generator, made: Inputs) -> Tensor:
        first, *others = made
        mask = some_mask(g, *made[first].shape).double()
        mask[-1:] = 0
        return _garbage_under(mask, made, first, *others)

    def nothing(g: torch.Generator, made: Inputs) -> Tensor:
        return torch.zeros_like(next(iter(made.values())), dtype=torch.int64)

    def offsets(*ends: int) -> Callable[..., Tensor]:
        return lambda g, made: torch.tensor([0, *ends])

    def not_finite(g: torch.Generator, made: Inputs) -> Tensor:
        tensors = list(made.values())
        for i, (tensor, value) in enumerate(
            (t, v) for t in tensors for v in (torch.nan, torch.inf, -torch.inf)
        ):
            tensor[i, 3] = value
        return torch.ones_like(tensors[0])

    for function in ("clipped_loss", "value_loss"):
        yield case(function, "unmasked", (3, 301))
        yield case(function, "one token", (1,))
        yield case(function, "columns of one", (7, 1), mask=masked)
        yield case(function, "several blocks", (3, 5557), mask=masked)
        yield case(
            function,
            "several packed blocks",
            (20000,),
            mask=masked,
            aggregation="seq-mean-token-mean",
            cu_seqlens=offsets(1500, 1500, 9000, 9001, 20000),
        )
        yield case(function, "packed", (1000,), mask=masked, denominator=1234)
        yield case(function, "no rows", (0, 4))
        yield case(function, "no columns", (4, 0), aggregation="seq-mean-token-mean")
        yield case(function, "fully masked", (3, 5), mask=nothing)
        yield case(function, "not finite", (9, 5), mask=not_finite, aggregation="token-sum")
        for aggregation in AGGREGATIONS:
            extra: Inputs = {"aggregation": aggregation, "mask": masked}
            if aggregation == "seq-sum-norm":
                extra["norm_length"] = 77.0
            yield case(function, aggregation, (5, 130), **extra)
            yield case(
                function,
                f"{aggregation} packed",
                (130,),
                cu_seqlens=offsets(40, 40, 41, 129, 130),
                denominator=lambda g, made: torch.tensor(3.5, dtype=torch.float64),
                **extra,
            )
    per_sequence = {"advantages": lambda g, made: normal(g, 5)}
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        extra = {"aggregation": aggregation, "mask": masked} | per_sequence
        yield case("clipped_loss", f"{aggregation} per sequence", (5, 130), **extra)
        extra["cu_seqlens"] = offsets(40, 40, 41, 129, 130)
        yield case("clipped_loss", f"{aggregation} per packed sequence", (130,), **extra)
    yield case(
        "clipped_loss",
        "all bounds",
        (4, 300),
        mask=masked,
        clip_low=0.1,
        clip_high=0.3,
        dual_clip=1.5,
        log_ratio_clamp=0.55,
    )
    for variant, particular in _VARIANTS.items():
        extra = {"variant": variant, "clip_low": 0.1, "clip_high": 0.15, "mask": masked}
        extra |= particular
        mean = {"aggregation": "seq-mean-token-mean"}
        ends = {"cu_seqlens": offsets(40, 40, 41, 129, 130)}
        yield case("clipped_loss", variant, (5, 130), **extra)
        yield case("clipped_loss", f"{variant} packed", (130,), **extra, **ends, **mean)
        yield case("clipped_loss", f"{variant} of blocks", (3, 1501), **extra, log_ratio_clamp=0.4)
        yield case("clipped_loss", f"{variant} fully masked", (3, 5), **extra | {"mask": nothing})
        if VARIANTS[variant].kind == "selection":
            continue
        bad = {"mask": not_finite, "log_ratio_clamp": 5.0}
        yield case("clipped_loss", f"{variant} not finite", (9, 5), **extra | bad)
        extra |= per_sequence
        yield case("clipped_loss", f"{variant} per packed sequence", (130,), **extra, **ends)
    yield case("value_loss", "not clipped", (4, 300), mask=masked, clip=None, old_values=None)
    yield case("value_loss", "huber", (4, 300), mask=masked, huber_delta=0.7)
    yield case("value_loss", "huber, not clipped", (4, 300), huber_delta=0.7, clip=None)


def loss_scale(function: str, inputs: Inputs, target_name: str) -> dict[int | str, Tensor | float]:
    """Sums of the magnitudes of the terms of the loss and of each entry of the metrics."""
    mask = inputs.get("mask")
    tensors = [t for t in inputs.values() if isinstance(t, Tensor) and t.is_floating_point()]
    live, constant = tensors[:2]
    target = inputs[target_name]
    if target.shape != live.shape or live.numel() == 0:
        return {}
    used = torch.ones_like(live, dtype=torch.bool) if mask is None else mask != 0

    def magnitude(x: Tensor) -> float:
        return float(x[used & x.isfinite()].abs().sum())

    if function == "clipped_loss":
        x = live - constant
        r = x.exp()
        loss = magnitude(target * r * (1 + live.abs())) + magnitude(target * live) + magnitude(x)
        unclipped = magnitude(target * r)
        k3 = magnitude(torch.expm1(x) - x) + magnitude(x * torch.expm1(x))
        sums = [loss, unclipped, 0, 0, 0, magnitude(x), k3, magnitude(r), magnitude(r * r), 0, 0]
    else:
        error = (live - target).abs() + 0.2
        loss = magnitude(error.square())
        sums = [loss, 0, magnitude(live), magnitude(target), magnitude(error), loss]
        sums.append(magnitude(target.square()))
    return {1: torch.tensor([0, 0, *sums], dtype=torch.float64)}
