"""Cases of logprobs_from_hidden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Inputs
from ._draw import normal, some_mask, uniform


def random_states(g: torch.Generator, shape: tuple[int, ...], size: int, vocab: int) -> Inputs:
    return {
        "hidden": normal(g, *shape, size),
        "weight": normal(g, vocab, size, std=3 / size**0.5),
        "tokens": torch.randint(vocab, shape, generator=g),
    }


def hidden_scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
    hidden, weight = inputs["hidden"].nan_to_num(), inputs["weight"]
    if not hidden.numel():
        return {}
    logits = hidden.abs() @ weight.abs().t()
    if "bias" in inputs:
        logits = logits + inputs["bias"].abs()
    temperature = torch.as_tensor(inputs.get("temperature", 1.0), dtype=torch.float64)
    gain = inputs.get("logit_scale", 1.0) / temperature.min()
    terms = 2 * logits.max() * gain + torch.tensor(float(weight.shape[0])).log()
    of_logits = 2 * gain * (1 + terms / 4) * (1 + terms if inputs.get("entropy") else 1)
    rows = hidden.abs().flatten(0, -2)
    return {
        0: terms,
        1: terms,
        "hidden": of_logits * weight.abs().max(),
        "weight": of_logits * rows.sum(0).max(),
        "bias": of_logits * rows.shape[0],
    }


def cases() -> Iterator[Case]:
    def case(label: str, shape: tuple[int, ...], size: int, vocab: int, **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            made = random_states(g, shape, size, vocab)
            return made | {k: v(g, made) if callable(v) else v for k, v in more.items()}

        return Case(
            "logprobs_from_hidden",
            label,
            inputs,
            ("hidden_logprob_forward",),
            ("hidden_logprob_backward",),
            ("hidden", "weight", "bias") if "bias" in more else ("hidden", "weight"),
            hidden_scale,
        )

    def bias(g: torch.Generator, made: Inputs) -> Tensor:
        return normal(g, made["weight"].shape[0])

    def ignored(g: torch.Generator, made: Inputs) -> Tensor:
        tokens: Tensor = made["tokens"]
        return torch.where(uniform(g, *tokens.shape) < 0.4, -100, tokens).int()

    def masked(g: torch.Generator, made: Inputs) -> Tensor:
        mask = some_mask(g, *made["tokens"].shape)
        made["hidden"][~mask] = torch.nan
        made["tokens"][~mask] = 10**6
        return mask

    def temperatures(g: torch.Generator, made: Inputs) -> Tensor:
        return uniform(g, *made["tokens"].shape) + 0.5

    def nothing(g: torch.Generator, made: Inputs) -> Tensor:
        return torch.zeros_like(made["tokens"])

    yield case("one token", (1,), 5, 7, entropy=True)
    yield case("V=1", (3,), 4, 1, entropy=True)
    yield case("padded", (2, 5), 16, 301)
    yield case("several chunks", (3, 100), 8, 53, bias=bias, entropy=True, chunk=256)
    yield case("several blocks of the weight", (2, 3), 4, 8195, bias=bias, entropy=True)
    yield case("three dimensions", (2, 2, 3), 6, 40, entropy=True)
    yield case("masked NaN", (4, 100), 8, 53, mask=masked, bias=bias, entropy=True, chunk=256)
    yield case("ignored labels", (3, 6), 8, 33, tokens=ignored, entropy=True)
    yield case("fully masked", (2, 3), 8, 33, mask=nothing, entropy=True)
    yield case("no rows", (0, 4), 8, 17, entropy=True)
    yield case("padded vocabulary", (2, 5), 8, 64, tokens=_below(61), vocab_size=61, bias=bias)
    yield case(
        "all transforms", (2, 7), 8, 53,
        bias=bias, softcap=8.0, logit_scale=0.3, temperature=temperatures, entropy=True,
    )  # fmt: skip


def _below(vocab: int) -> Any:
    return lambda g, made: made["tokens"] % vocab
