"""Human feedback: preference pairs or ratings as one form, and splits that share no text."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ppo_kernels.trainer.config import InputError
from ppo_kernels.trainer.data import Row, render_conversation


class Feedback(NamedTuple):
    """Rated texts; two of a group are a pair if their ratings are at least min_gap apart.

    A preference is a group of its own, of the ratings 1 and 0. The ratings of a prompt are a group,
    and so are all ratings without one.
    """

    prompts: list[str]
    completions: list[str]
    ratings: list[float]
    groups: list[int]
    min_gap: float
    is_pairs: bool

    def rows(self, index: Sequence[int]) -> "Feedback":
        """Select texts."""
        return self._replace(
            prompts=[self.prompts[i] for i in index],
            completions=[self.completions[i] for i in index],
            ratings=[self.ratings[i] for i in index],
            groups=[self.groups[i] for i in index],
        )

    def key(self, i: int) -> str:
        """What must not be in two splits: the prompt, or without one the text."""
        return " ".join((self.prompts[i] or self.completions[i]).split()).casefold()


def read_feedback(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, min_gap: float, key: str
) -> Feedback:
    """Read preferences or ratings; raise InputError naming the row that is neither."""
    if not rows:
        raise InputError(f"{key}: given no row, expected at least one")
    is_pairs = isinstance(rows[0], Mapping) and "chosen" in rows[0]
    needed = {"chosen", "rejected"} if is_pairs else {"completion", "rating"}
    feedback = Feedback([], [], [], [], 1.0 if is_pairs else min_gap, is_pairs)
    prompt_ids: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        where = f"{key}: row {number}"
        if not isinstance(row, Mapping) or not needed <= set(row):
            raise InputError(
                f"{where} has the columns {sorted(row)}, expected 'chosen' and 'rejected', or "
                "'completion' and 'rating', the same in every row"
            )
        prompt = row.get("prompt") or ""
        if isinstance(prompt, list):
            prompt = render_conversation(prompt, tokenizer, where)
        if not isinstance(prompt, str):
            raise InputError(f"{where} has no text under 'prompt': {prompt!r}")
        if is_pairs:
            texts = [_text(row, "chosen", where), _text(row, "rejected", where)]
            ratings, group = [1.0, 0.0], number
            if texts[0] == texts[1]:
                raise InputError(f"{where} has the same text under 'chosen' and 'rejected'")
        else:
            texts, ratings = [_text(row, "completion", where)], [_rating(row["rating"], where)]
            group = prompt_ids.setdefault(prompt, len(prompt_ids))
        for text, rating in zip(texts, ratings, strict=True):
            feedback.prompts.append(prompt)
            feedback.completions.append(text)
            feedback.ratings.append(rating)
            feedback.groups.append(group)
    return feedback


def _text(row: Row, column: str, where: str) -> str:
    value: Any = row[column]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} has no text under {column!r}: {value!r}")
    return value


def _rating(value: Any, where: str) -> float:
    try:
        number = float(value) if isinstance(value, str | Real) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where} has the rating {value!r}, expected a number")
    return number


def split_feedback(feedback: Feedback, fraction: float, seed: int) -> tuple[Feedback, Feedback]:
    """Return training and held-out feedback without a prompt, or text, in both.

    Preferences without prompts that share a text, directly or by others, stay together.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [feedback.key(i) for i in range(len(feedback.groups))]
    if feedback.is_pairs:
        for better, worse in zip(keys[::2], keys[1::2], strict=True):
            parent[root(better)] = root(worse)
    roots = [root(key) for key in keys]
    distinct = sorted(set(roots))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = Counter(roots)
    out: set[str] = set()
    room = fraction * len(roots)
    for i in order:
        if sizes[distinct[i]] <= room:
            out.add(distinct[i])
            room -= sizes[distinct[i]]
    held_out = [i for i, name in enumerate(roots) if name in out]
    if not held_out:
        raise InputError(
            f"data: given {len(distinct)} prompts or texts that share nothing, too few to hold "
            f"{fraction:g} of them out; expected more, or eval_data"
        )
    training = [i for i, name in enumerate(roots) if name not in out]
    return feedback.rows(training), feedback.rows(held_out)


def overlap(one: Feedback, other: Feedback) -> set[str]:
    """Return what both have: prompts, or texts without one."""
    first = {one.key(i) for i in range(len(one.groups))}
    return first & {other.key(i) for i in range(len(other.groups))}
