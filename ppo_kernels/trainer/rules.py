"""Rewards that are rules, each 1 where it holds and 0 where not: 'regex:...' and the like."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ppo_kernels.trainer.config import InputError


@dataclass(frozen=True)
class Regex:
    """The pattern is found in the completion."""

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(f"reward: the pattern {self.pattern!r} is wrong: {error}") from error

    def __call__(self, completions: list[str]) -> list[float]:
        """Return one number per completion."""
        return [float(re.search(self.pattern, text) is not None) for text in completions]


@dataclass(frozen=True)
class Length:
    """The completion has `least` to `most` words."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "Length":
        """Read LEAST-MOST."""
        match = re.fullmatch(r"(\d+)-(\d+)", text)
        if not match or int(match[1]) > int(match[2]):
            raise InputError(
                f"reward: given 'length:{text}', expected length:LEAST-MOST, as length:5-20"
            )
        return cls(int(match[1]), int(match[2]))

    def __call__(self, completions: list[str]) -> list[float]:
        """Return one number per completion."""
        return [float(self.least <= len(text.split()) <= self.most) for text in completions]


@dataclass(frozen=True)
class Exact:
    """The completion, without blanks around it, is the text of a column of the prompts."""

    column: str

    def __call__(self, completions: list[str], **columns: list[Any]) -> list[float]:
        """Return one number per completion."""
        if self.column not in columns:
            raise InputError(
                f"reward: exact:{self.column} needs a column {self.column!r} of the prompts, which "
                f"have {sorted(set(columns) - {'prompts'})}"
            )
        answers = columns[self.column]
        return [
            float(text.strip() == str(answer).strip())
            for text, answer in zip(completions, answers, strict=True)
        ]


RULES: dict[str, Callable[[str], Callable[..., list[float]]]] = {
    "regex": Regex,
    "length": Length.parse,
    "exact": Exact,
}
