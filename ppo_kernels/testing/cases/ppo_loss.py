"""Cases of ppo_loss_from_logits and ppo_loss_from_hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops._aggregation import AGGREGATIONS, Batch, Frame
from ...ops._aggregation import frame as frame_of
from ..case import Case, Inputs
from ._draw import normal, some_mask, uniform
from .losses import loss_scale

FROM = ("logits", "hidden")
SIZE = 8


def cases() -> Iterator[Case]:
    for source in FROM:

        def case(label: str, shape: tuple[int, ...], vocab: int, **more: Any) -> Case:
            return _case(source, label, shape, vocab, more)  # noqa: B023

        yield case("one token", (1,), 7)
        yield case("V=1", (3,), 1, entropy=True)
        yield case("padded", (3, 20), 301)
        if source == "hidden":
            yield case("several chunks", (3, 100), 37, chunk=256, **_ALL)
        yield case("masked", (3, 20), 37, mask=_masked, **_ALL)
        yield case("no rows", (0, 4), 17, **_ALL)
        yield case("fully masked", (2, 3), 33, mask=_nothing, **_ALL)
        yield case("ignored labels", (3, 6), 33, tokens=_ignored, entropy_coef=0.1)
        yield case(
            "per packed sequence", (130,), 53, mask=_masked, advantages=_per_sequence(5),
            cu_seqlens=_offsets(40, 40, 41, 129, 130), aggregation="seq-mean-token-mean", **_ALL,
        )  # fmt: skip
        yield case("per sequence", (4, 9), 53, advantages=_per_sequence(4), denominator=_number(7))
        yield case("scaled", (4, 30), 53, loss_scale=_number(1024), mask=_masked, **_ALL)
        yield case(
            "all transforms", (3, 20), 53, softcap=8.0, logit_scale=0.3, temperature=_temperatures,
            clip_low=0.1, clip_high=0.3, dual_clip=1.5, log_ratio_clamp=0.55, **_ALL,
        )  # fmt: skip
        for aggregation in AGGREGATIONS[1:]:
            norm = {"norm_length": 30.0} if aggregation == "seq-sum-norm" else {}
            yield case(
                aggregation, (4, 25), 53, mask=_masked, aggregation=aggregation, **norm, **_ALL
            )


def _case(
    source: str, label: str, shape: tuple[int, ...], vocab: int, more: dict[str, Any]
) -> Case:
    def inputs(g: torch.Generator) -> Inputs:
        made: Inputs = {}
        if source == "logits":
            made["logits"] = normal(g, *shape, vocab, std=3)
        else:
            made["hidden"] = normal(g, *shape, SIZE)
            made["weight"] = normal(g, vocab, SIZE, std=3 / SIZE**0.5)
        made["tokens"] = torch.randint(vocab, shape, generator=g)
        for k, v in more.items():
            if k in ("tokens", "temperature", "softcap", "logit_scale"):
                made[k] = v(g, made) if callable(v) else v
        now = _logprobs(made)
        made["old_logprobs"] = now + normal(g, *shape, std=0.3)
        made["advantages"] = normal(g, *shape)
        if "kl_coef" in more:
            made["ref_logprobs"] = now + normal(g, *shape, std=0.3)
        rest = {k: v for k, v in more.items() if k not in made or k == "advantages"}
        return made | {k: v(g, made) if callable(v) else v for k, v in rest.items()}

    name = f"ppo_loss_from_{source}"
    grads = ("logits",) if source == "logits" else ("hidden", "weight")
    return Case(name, label, inputs, (name,), (), grads, _scale, unit_upstream=True)


def _logits(inputs: Inputs) -> Tensor:
    if "logits" in inputs:
        logits: Tensor = inputs["logits"]
        return logits
    hidden, weight = inputs["hidden"], inputs["weight"]
    return torch.einsum("...h,vh->...v", hidden, weight)


def _logprobs(inputs: Inputs) -> Tensor:
    z = _logits(inputs) * inputs.get("logit_scale", 1.0)
    if "softcap" in inputs:
        z = inputs["softcap"] * torch.tanh(z / inputs["softcap"])
    z = z / torch.as_tensor(inputs.get("temperature", 1.0)).unsqueeze(-1)
    index = inputs["tokens"].clamp(0, z.shape[-1] - 1).long()[..., None]
    return z.log_softmax(-1).gather(-1, index)[..., 0]


def _scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
    """An error of a log-probability is an error of everything made of it."""
    logits = _logits(inputs)
    if not logits.numel():
        return {}
    top = logits[logits.isfinite()].abs().max() * inputs.get("logit_scale", 1.0)
    temperature = torch.as_tensor(inputs.get("temperature", 1.0), dtype=torch.float64)
    terms = 2 * top / temperature.min() + torch.tensor(float(logits.shape[-1])).log()
    policy = {"logprobs": _logprobs(inputs)}
    for name in ("old_logprobs", "advantages", "mask"):
        if name in inputs:
            policy[name] = inputs[name]
    moved = policy["logprobs"] - policy["old_logprobs"]
    scale: dict[int | str, Tensor | float] = {}
    if 1 in (of_policy := loss_scale("clipped_loss", policy, "advantages")):
        of_stats = torch.as_tensor(of_policy[1])
        of_stats[-2:] = moved.nan_to_num().exp().max()
        scale[1] = of_stats * (1 + terms)
    frame = _frame(inputs)
    batch = Batch(moved, frame)
    weights = batch.weights(frame, torch.float64) * inputs.get("loss_scale", 1.0)
    magnitudes = batch.select(policy["advantages"], moved.dtype).abs() * moved.exp()
    if "ref_logprobs" in inputs:
        magnitudes = magnitudes + (policy["logprobs"] - inputs["ref_logprobs"]).abs().exp()
    of_terms = float(torch.where(batch.live, (magnitudes + terms) * weights, 0.0).sum())
    measured = bool(inputs.get("entropy") or inputs.get("entropy_coef"))
    scale |= dict.fromkeys((2, 3) if measured else (2,), terms)
    of_loss = of_terms * (1 + terms)
    return scale | {0: of_loss} | dict.fromkeys((3 + measured, 4 + measured, 5 + measured), of_loss)


def _frame(inputs: Inputs) -> Frame:
    names = ("mask", "cu_seqlens", "aggregation", "denominator", "norm_length")
    mask, offsets, aggregation, denominator, norm = (inputs.get(name) for name in names)
    old = inputs["old_logprobs"]
    return frame_of("old", old, mask, offsets, aggregation or "token-mean", denominator, norm)


def _masked(g: torch.Generator, made: Inputs) -> Tensor:
    mask = some_mask(g, *made["tokens"].shape)
    for name in ("logits", "hidden", "old_logprobs", "advantages", "ref_logprobs"):
        if name in made and made[name].shape[: mask.dim()] == mask.shape:
            made[name][~mask] = torch.nan
    made["tokens"][~mask] = 10**6
    return mask


def _nothing(g: torch.Generator, made: Inputs) -> Tensor:
    return torch.zeros_like(made["tokens"])


def _ignored(g: torch.Generator, made: Inputs) -> Tensor:
    tokens: Tensor = made["tokens"]
    return torch.where(uniform(g, *tokens.shape) < 0.4, -100, tokens).int()


def _temperatures(g: torch.Generator, made: Inputs) -> Tensor:
    return uniform(g, *made["tokens"].shape) + 0.5


def _per_sequence(count: int) -> Callable[..., Tensor]:
    return lambda g, made: normal(g, count)


def _offsets(*ends: int) -> Callable[..., Tensor]:
    return lambda g, made: torch.tensor([0, *ends])


def _number(value: float) -> Callable[..., Tensor]:
    return lambda g, made: torch.tensor(float(value), dtype=torch.float64)


_ALL: dict[str, Any] = {
    "entropy_coef": 0.1, "kl_coef": 0.2, "kl_estimator": "k3", "kl_gradient": "k2",
}  # fmt: skip
