"""Cases of categorical_kl."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Inputs
from ._draw import normal, some_mask


def cases() -> Iterator[Case]:
    def case(label: str, shape: tuple[int, ...], edit: str = "", **more: Any) -> Case:
        def inputs(g: torch.Generator) -> Inputs:
            logits = normal(g, *shape, std=3.0)
            ref = logits + normal(g, *shape, std=0.5)
            rows, ref_rows = logits.view(-1, shape[-1]), ref.view(-1, shape[-1])
            if edit == "same winner":
                rows[:, 3], ref_rows[:, 3] = 40.0, 41.0
            elif edit == "other winner":
                rows[:, 3], ref_rows[:, 5] = 40.0, 45.0
            elif edit == "far below 0":
                logits, ref = logits - 9000.0, ref - 7000.0
            elif edit == "forbidden":  # a whole leading block, and tokens that one side forbids
                rows[:, : shape[-1] // 2] = ref_rows[:, : shape[-1] // 2] = -torch.inf
                (ref_rows if more.get("reverse") else rows)[:, ::3] = -torch.inf
            elif edit == "infinite":
                (rows if more.get("reverse") else ref_rows)[::2, ::5] = -torch.inf
            elif edit == "not finite":
                for r in (rows, ref_rows):
                    r[0], r[1, 2], r[2, -1] = -torch.inf, torch.inf, torch.nan
                    rows, ref_rows = ref_rows[3:], rows[3:]
            made: Inputs = {"logits": logits, "ref_logits": ref}
            extra = {k: v(g, made) if callable(v) else v for k, v in more.items()}
            return made | extra

        forward, backward = ("categorical_kl_forward",), ("categorical_kl_backward",)
        scale = _categorical_kl_scale
        return Case("categorical_kl", label, inputs, forward, backward, ("logits",), scale)

    def masked(g: torch.Generator, made: Inputs) -> Tensor:
        mask = some_mask(g, *made["logits"].shape[:-1])
        made["logits"][~mask], made["ref_logits"][~mask] = torch.nan, torch.inf
        return mask

    for reverse in (False, True):
        word = "reverse " if reverse else ""
        yield case(f"{word}prime V", (2, 5, 1009), reverse=reverse)
        yield case(f"{word}V=1", (3, 1), reverse=reverse)
        yield case(f"{word}one row", (7,), reverse=reverse)
        yield case(f"{word}several blocks", (1, 3, 2100), reverse=reverse)
        yield case(f"{word}four dimensions", (2, 2, 3, 50), reverse=reverse, temperature=0.6)
        yield case(f"{word}masked NaN", (3, 6, 33), reverse=reverse, mask=masked)
        for edit in (
            "same winner",
            "other winner",
            "far below 0",
            "forbidden",
            "infinite",
            "not finite",
        ):
            yield case(f"{word}{edit}", (7, 517), edit, reverse=reverse)
        for edit in ("same winner", "other winner", "forbidden", "infinite"):
            yield case(f"{word}{edit}, several chunks", (2, 9001), edit, reverse=reverse)
    yield case("no rows", (0, 4, 17))


def _categorical_kl_scale(inputs: Inputs) -> dict[int | str, Tensor | float]:
    """Differences of logits, each distribution's against its own maximum, and log V."""
    gain = 1 / inputs.get("temperature", 1.0)
    logits = [inputs[name] for name in ("logits", "ref_logits")]
    if not logits[0].numel():
        return {}
    top = max(float(x.where(x.isfinite(), 0.0).abs().max()) for x in logits)
    terms = 2 * gain * top + torch.tensor(float(logits[0].shape[-1])).log()
    return {0: terms, "logits": 2 * gain * (1 + terms) * (1 + terms / 4)}
