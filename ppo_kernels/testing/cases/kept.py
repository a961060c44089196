"""Cases of logprobs_from_logits and logprobs_from_hidden over kept sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..._kept import KeptSet
from ..case import Case, Inputs
from ._draw import some_mask, uniform
from .logprob import logprob_scale, random_logits
from .logprob_hidden import hidden_scale, random_states


def random_sets(
    g: torch.Generator, tokens: Tensor, vocab: int, share: float = 0.1, *, others: bool = False
) -> KeptSet:
    """Each token in its set (but for every third, with `others`), in an order of no meaning."""
    rows, lists = tokens.flatten(), []
    for i, token in enumerate(rows.tolist()):
        kept = uniform(g, vocab) < share
        if 0 <= token < vocab:
            kept[token] = not (others and i % 3 == 0)
        own = kept.nonzero()[:, 0]
        lists.append(own[torch.randperm(len(own), generator=g)])
    sizes = torch.tensor([len(own) for own in lists], dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return KeptSet(offsets, torch.cat([offsets[:0], *lists]).int())


def _outside(inputs: Inputs, value: float) -> None:
    """Set the logits that no set has."""
    logits, (offsets, ids) = inputs["logits"], inputs["kept"]
    owner = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    allowed = torch.zeros(logits.shape, dtype=torch.bool).view(-1, logits.shape[-1])
    allowed[owner, ids.long()] = True
    logits[~allowed.view(logits.shape)] = value


def cases() -> Iterator[Case]:
    yield from _from_logits()
    yield from _from_hidden()


def _from_logits() -> Iterator[Case]:
    def case(
        label: str,
        shape: tuple[int, ...],
        edit: str = "",
        *,
        share: float = 0.1,
        others: bool = False,
        outside: float | None = None,
        **more: Any,
    ) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            made = random_logits(g, shape, edit=edit)
            made["kept"] = random_sets(g, made["tokens"], shape[-1], share, others=others)
            if outside is not None:
                _outside(made, outside)
            return made | {k: v(g, made) if callable(v) else v for k, v in more.items()}

        return Case(
            "logprobs_from_logits",
            f"kept {label}",
            inputs,
            ("kept_logprob_forward",),
            ("kept_logprob_backward",),
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
        offsets, ids = made["kept"]
        owner = torch.repeat_interleave(torch.arange(mask.numel()), offsets.diff())
        ids[~mask.flatten()[owner]] = -7
        return mask

    def temperatures(g: torch.Generator, made: Inputs) -> Tensor:
        return uniform(g, *made["tokens"].shape) + 0.5

    def slice_of_offsets(g: torch.Generator, made: Inputs) -> KeptSet:
        offsets, ids = made["kept"]
        unused = torch.full((7,), -1, dtype=ids.dtype)
        return KeptSet((offsets + 7).int(), torch.cat([unused, ids, unused]).long())

    yield case("padded", (2, 5, 1009))
    yield case("one token", (1,), share=1.0, entropy=True)
    yield case("V=1", (3, 1), share=1.0, entropy=True)
    yield case("packed", (6, 300), entropy=True)
    yield case("four dimensions", (2, 2, 3, 50), entropy=True)
    yield case("full sets", (2, 3, 301), share=1.0, entropy=True)
    yield case("single tokens", (2, 4, 301), share=0.0, entropy=True)
    yield case("several chunks", (1, 2, 9001), share=0.97, entropy=True)
    yield case("other tokens", (3, 6, 97), others=True, entropy=True)
    yield case("NaN outside", (2, 4, 97), outside=torch.nan, entropy=True, softcap=5.0)
    yield case("temperature per token", (2, 3, 300), temperature=temperatures, entropy=True)
    yield case(
        "all transforms", (2, 3, 301),
        softcap=8.0, logit_scale=0.3, temperature=1.7, entropy=True, share=0.5,
    )  # fmt: skip
    yield case("ignored labels", (3, 6, 33), tokens=ignored, entropy=True)
    yield case("masked", (3, 6, 33), mask=masked, entropy=True, share=0.3)
    yield case("slice of offsets", (2, 3, 33), kept=slice_of_offsets, entropy=True)
    for edit in (
        "target wins",
        "target loses",
        "constant",
        "far below 0",
        "forbidden",
        "not finite",
    ):
        yield case(edit, (2, 4, 517), edit, entropy=True, share=0.6)
    yield case("empty sets", (2, 3, 40), share=0.0, others=True, entropy=True)
    yield case("no rows", (0, 4, 17), entropy=True)


def _from_hidden() -> Iterator[Case]:
    def case(label: str, shape: tuple[int, ...], size: int, vocab: int, **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            made = random_states(g, shape, size, vocab)
            if "bias" in more:
                made["bias"] = uniform(g, vocab)
            if "mask" in more:
                made["mask"] = some_mask(g, *shape)
                made["hidden"][~made["mask"]] = torch.nan
            made["tokens"] %= more.get("vocab_size", vocab)
            used = more.get("vocab_size", vocab)
            made["kept"] = random_sets(g, made["tokens"], used, 0.3, others=True)
            return {**more, **made}

        return Case(
            "logprobs_from_hidden",
            f"kept {label}",
            inputs,
            ("hidden_kept_forward",),
            ("hidden_kept_backward",),
            ("hidden", "weight", "bias") if "bias" in more else ("hidden", "weight"),
            hidden_scale,
        )

    yield case("padded", (2, 5), 16, 301)
    yield case("several chunks", (3, 100), 8, 53, bias=True, entropy=True, chunk=256)
    yield case("masked", (4, 100), 8, 53, mask=True, bias=True, entropy=True, chunk=256)
    yield case("padded vocabulary", (2, 5), 8, 64, vocab_size=61, bias=True)
    yield case("no rows", (0, 4), 8, 17, entropy=True)
    yield case("all transforms", (2, 7), 8, 53, softcap=8.0, logit_scale=0.3, entropy=True)
