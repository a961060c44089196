"""Cases of categorical_kl_from_hidden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Inputs
from ._draw import normal, some_mask


def _inputs(
    g: torch.Generator, shape: tuple[int, ...], sizes: tuple[int, int], vocab: int
) -> Inputs:
    """Two models that agree about most of it: the reference has some of the policy's numbers."""
    size, ref_size = sizes
    both = min(sizes)
    hidden, weight = normal(g, *shape, size), normal(g, vocab, size, std=3 / size**0.5)
    ref_hidden = normal(g, *shape, ref_size)
    ref_hidden[..., :both] = hidden[..., :both] + 0.1 * ref_hidden[..., :both]
    ref_weight = normal(g, vocab, ref_size, std=3 / size**0.5)
    ref_weight[:, :both] = weight[:, :both] + 0.1 * ref_weight[:, :both]
    return {
        "hidden": hidden,
        "weight": weight,
        "ref_hidden": ref_hidden,
        "ref_weight": ref_weight,
    }


def _scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
    """As for `categorical_kl`, of logits that are sums of products; then sums of their slopes."""
    hidden, weight = inputs["hidden"].nan_to_num(), inputs["weight"]
    if not hidden.numel():
        return {}
    top = torch.zeros(())
    for prefix in ("", "ref_"):
        rows = inputs[f"{prefix}hidden"].nan_to_num()
        logits = rows.abs() @ inputs[f"{prefix}weight"].abs().t()
        if f"{prefix}bias" in inputs:
            logits = logits + inputs[f"{prefix}bias"].abs()
        top = torch.maximum(top, logits.max())
    gain = inputs.get("logit_scale", 1.0) / inputs.get("temperature", 1.0)
    terms = 2 * gain * top + torch.tensor(float(weight.shape[0])).log()
    of_logits = 2 * gain * (1 + terms) * (1 + terms / 4)
    flat = hidden.abs().flatten(0, -2)
    return {
        0: terms,
        "hidden": of_logits * weight.abs().max(),
        "weight": of_logits * flat.sum(0).max(),
        "bias": of_logits * flat.shape[0],
    }


def cases() -> Iterator[Case]:
    def case(
        label: str, shape: tuple[int, ...], sizes: tuple[int, int], vocab: int, **more: Any
    ) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            made = _inputs(g, shape, sizes, vocab)
            return made | {k: v(g, made) if callable(v) else v for k, v in more.items()}

        return Case(
            "categorical_kl_from_hidden",
            label,
            inputs,
            ("hidden_kl_forward",),
            ("hidden_kl_backward",),
            ("hidden", "weight", "bias") if "bias" in more else ("hidden", "weight"),
            _scale,
        )

    def bias(g: torch.Generator, made: Inputs) -> Tensor:
        return normal(g, made["weight"].shape[0])

    def masked(g: torch.Generator, made: Inputs) -> Tensor:
        mask = some_mask(g, *made["hidden"].shape[:-1])
        made["hidden"][~mask], made["ref_hidden"][~mask] = torch.nan, torch.inf
        return mask

    def nothing(g: torch.Generator, made: Inputs) -> Tensor:
        return torch.zeros(made["hidden"].shape[:-1])

    heads = {"bias": bias, "ref_bias": bias}
    for reverse in (False, True):
        word = "reverse " if reverse else ""
        yield case(f"{word}one token", (1,), (5, 3), 7, reverse=reverse)
        yield case(f"{word}padded", (2, 5), (16, 24), 301, reverse=reverse, temperature=0.6)
        yield case(
            f"{word}several chunks", (3, 100), (8, 8), 53, reverse=reverse, chunk=256, **heads
        )
        yield case(f"{word}masked NaN", (4, 100), (8, 3), 53, reverse=reverse, mask=masked, **heads)
        yield case(
            f"{word}all transforms", (2, 7), (8, 5), 53,
            reverse=reverse, softcap=8.0, logit_scale=0.3, temperature=0.7, **heads,
        )  # fmt: skip
    yield case("V=1", (3,), (4, 4), 1)
    yield case("several blocks of the weight", (2, 3), (4, 4), 8195, **heads)
    yield case("three dimensions", (2, 2, 3), (6, 6), 40)
    yield case("scaled", (2, 3), (6, 6), 40, logit_scale=0.3)
    yield case("fully masked", (2, 3), (8, 8), 33, mask=nothing)
    yield case("no rows", (0, 4), (8, 8), 17)
    yield case("padded vocabulary", (2, 5), (8, 8), 64, vocab_size=61, **heads)
