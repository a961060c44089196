"""Cases of logprobs_from_logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Inputs
from ._draw import normal, some_mask, uniform


def random_logits(
    g: torch.Generator, shape: tuple[int, ...], std: float = 3.0, edit: str = ""
) -> Inputs:
    logits = normal(g, *shape, std=std)
    tokens = torch.randint(shape[-1], shape[:-1], generator=g)
    index = tokens[..., None]
    if edit == "target wins":
        logits = logits.scatter(-1, index, 40.0)
    elif edit == "target loses":
        logits = logits.scatter(-1, index, -60.0)
    elif edit == "constant":
        logits = torch.full(shape, -7.25, dtype=torch.float64)
    elif edit == "far below 0":
        logits = logits - 9000.0
    elif edit == "forbidden":
        # A whole leading block, scattered others, and one row whose target is forbidden.
        logits[..., : shape[-1] // 2] = -torch.inf
        logits[uniform(g, *shape) < 0.3] = -torch.inf
        logits = logits.scatter(-1, index, 1.0)
        logits[..., -1] = 0.5
        logits.view(-1, shape[-1])[0, tokens.flatten()[0]] = -torch.inf
    elif edit == "not finite":
        rows = logits.view(-1, shape[-1])
        rows[0] = -torch.inf
        rows[1, 3], rows[2, -1], rows[3] = torch.inf, torch.nan, torch.nan
        rows[4, int(tokens.flatten()[4])] = torch.inf
    return {"logits": logits, "tokens": tokens}


def logprob_scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
    logits = inputs["logits"]
    if not logits.numel():
        return {}
    top = logits.where(logits.isfinite(), 0.0).abs().max() * inputs.get("logit_scale", 1.0)
    if "softcap" in inputs:
        top = top.clamp(max=inputs["softcap"])
    temperature = torch.as_tensor(inputs.get("temperature", 1.0), dtype=torch.float64)
    gain = 1 / temperature[temperature.isfinite()].min()
    terms = 2 * top * gain + torch.tensor(float(logits.shape[-1])).log()
    scale: dict[int | str, Tensor | float] = {0: terms, "logits": 2 * gain * (1 + terms / 4)}
    if inputs.get("entropy"):
        scale[1] = terms
        scale["logits"] = 2 * gain * (1 + terms) * (1 + terms / 4)
    return scale


def cases() -> Iterator[Case]:
    def case(label: str, shape: tuple[int, ...], edit: str = "", **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            made = random_logits(g, shape, edit=edit)
            extra = {k: v(g, made) if callable(v) else v for k, v in more.items()}
            return made | extra

        return Case(
            "logprobs_from_logits",
            label,
            inputs,
            ("logprob_forward",),
            ("logprob_backward",),
            ("logits",),
            logprob_scale,
        )

    def ignored(g: torch.Generator, made: Inputs) -> Tensor:
        tokens: Tensor = made["tokens"]
        return torch.where(uniform(g, *tokens.shape) < 0.4, -100, tokens).int()

    def masked(g: torch.Generator, made: Inputs) -> Tensor:
        mask = some_mask(g, *made["tokens"].shape)
        made["logits"][~mask] = torch.nan
        made["tokens"][~mask] = 10**6
        return mask

    def temperatures(g: torch.Generator, made: Inputs) -> Tensor:
        return uniform(g, *made["tokens"].shape) + 0.5

    yield case("prime V", (2, 5, 1009))
    yield case("one token", (1,), entropy=True)
    yield case("V=1", (3, 1), entropy=True)
    yield case("V below a vector", (2, 3, 7), entropy=True)
    for v in (4095, 4096, 4097, 9001):
        yield case(f"V={v}", (1, 3, v), entropy=True)
    yield case("packed", (6, 300), entropy=True)
    yield case("four dimensions", (2, 2, 3, 50), entropy=True)
    yield case("temperature", (2, 3, 300), temperature=0.6, entropy=True)
    yield case("temperature per token", (2, 3, 300), temperature=temperatures, entropy=True)
    yield case("softcap", (2, 3, 301), softcap=5.0, entropy=True)
    yield case(
        "all transforms",
        (2, 3, 301),
        softcap=8.0,
        logit_scale=0.3,
        temperature=1.7,
        entropy=True,
    )
    yield case("ignored labels", (3, 6, 33), tokens=ignored, entropy=True)
    yield case("masked NaN", (3, 6, 33), mask=masked, entropy=True)
    yield case(
        "fully masked",
        (2, 3, 33),
        mask=lambda g, made: torch.zeros_like(made["tokens"]),
        entropy=True,
    )
    for edit in (
        "target wins",
        "target loses",
        "constant",
        "far below 0",
        "forbidden",
        "not finite",
    ):
        yield case(edit, (2, 4, 517), edit, entropy=True)
    yield case("no rows", (0, 4, 17), entropy=True)
