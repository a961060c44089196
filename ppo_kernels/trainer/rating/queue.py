"""The questions that are open, and the file of the answers."""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from ppo_kernels._files import atomic_file
from ppo_kernels.trainer.config import InputError
from ppo_kernels.trainer.data import Row, load_rows

OPTIONS = {"stars": 5, "pairs": 2}


class Item(NamedTuple):
    """A question: one completion to be rated, or two of which one is better."""

    row: Row
    completions: tuple[str, ...]

    @property
    def prompt(self) -> str | list[Mapping[str, str]]:
        """What the completions follow: a text, perhaps empty, or a conversation."""
        return self.row.get("prompt") or ""

    def answered(self, option: int) -> Row:
        """Return the row of the output for an option, counted from 1."""
        if len(self.completions) == 1:
            return {**self.row, "rating": option}
        chosen, rejected = self.completions if option == 1 else self.completions[::-1]
        return {"prompt": self.prompt, "chosen": chosen, "rejected": rejected}


def key_of(prompt: object, completions: Sequence[str]) -> str:
    """Return what tells questions apart: all their texts, in any order."""
    return json.dumps([prompt or "", sorted(completions)], sort_keys=True)


def make_items(
    rows: Sequence[Row], mode: str, pairs_per_prompt: int | None, seed: int
) -> dict[str, Item]:
    """Return the questions in the order to ask them; a text that comes twice is asked for once."""
    chance = random.Random(seed)
    texts: dict[str, Item] = {}
    prompts: defaultdict[str, list[Item]] = defaultdict(list)
    for number, row in enumerate(rows, 1):
        completion = row.get("completion") if isinstance(row, Mapping) else None
        if not isinstance(completion, str):
            raise InputError(f"data: row {number} has no text under 'completion': {row!r}")
        prompt = row.get("prompt") or ""
        if not (isinstance(prompt, str) or is_conversation(prompt)):
            raise InputError(
                f"data: row {number} has neither a text nor messages under 'prompt': {prompt!r}"
            )
        key = key_of(prompt, [completion])
        if key not in texts:
            texts[key] = Item(row, (completion,))
            prompts[key_of(prompt, ())].append(texts[key])
    if mode == "pairs":
        texts = {}
        for group in prompts.values():
            pairs = list(combinations(group, 2))
            for pair in chance.sample(pairs, min(len(pairs), pairs_per_prompt or len(pairs))):
                first, second = chance.sample(pair, 2)
                both = first.completions + second.completions
                texts[key_of(first.prompt, both)] = Item(first.row, both)
    if not texts:
        given = f"{len(rows)} rows without two different completions of a prompt"
        raise InputError(f"data: given {given if rows else 'no row'}, so there is nothing to rate")
    order = list(texts)
    chance.shuffle(order)
    return {key: texts[key] for key in order}


def is_conversation(prompt: object) -> bool:
    """Whether this is a list of messages with 'role' and 'content'."""
    return isinstance(prompt, list) and all(
        isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in prompt
    )


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep another process from writing the same ratings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        raise InputError(
            f"output: given {str(path)!r}, which another `ppo-kernels rate` is writing"
        ) from error


class Stale(Exception):  # noqa: N818  an answer, not a mistake
    """The answer is to a question that is no longer the current one."""


class Queue:
    """The open questions in their order; what is answered is in the file when a method returns.

    Methods may be called from several threads.
    """

    def __init__(self, items: Mapping[str, Item], path: Path, mode: str) -> None:
        self.items, self.path, self.options = items, path, OPTIONS[mode]
        self._lock = RLock()
        self._rows = list(load_rows(str(path), "output", "")) if path.exists() else []
        columns = ("completion",) if mode == "stars" else ("chosen", "rejected")
        self._keys = []
        for number, row in enumerate(self._rows, 1):
            if any(not isinstance(row.get(column), str) for column in columns):
                raise InputError(
                    f"output: row {number} of {path} has the columns {sorted(row)}, expected "
                    f"{' and '.join(columns)}, as mode {mode!r} writes them; name another file"
                )
            self._keys.append(key_of(row.get("prompt"), [row[column] for column in columns]))
        rated = set(self._keys)
        self._open = [key for key in items if key not in rated]

    @property
    def done(self) -> int:
        """How many questions have an answer."""
        return len(self.items) - len(self._open)

    @property
    def key(self) -> str | None:
        """Of the current question; None where all are answered."""
        return self._open[0] if self._open else None

    @property
    def can_undo(self) -> bool:
        """Whether the file's last row answers one of the questions."""
        return bool(self._keys) and self._keys[-1] in self.items

    def state(self) -> dict[str, Any]:
        """Return the progress and the current question."""
        with self._lock:
            item = self.items[self.key] if self.key else None
            return {
                "done": self.done,
                "total": len(self.items),
                "can_undo": self.can_undo,
                "key": self.key,
                "prompt": item.prompt if item else "",
                "completions": item.completions if item else (),
            }

    def answer(self, key: str | None, option: int) -> None:
        """Record an option, counted from 1, of the current question."""
        with self._lock:
            self._expect(key)
            row = self.items[self._open[0]].answered(option)
            self._write([*self._rows, row])
            self._keys.append(self._open.pop(0))

    def skip(self, key: str | None) -> None:
        """Ask the current question again after all others; a later run asks it again too."""
        with self._lock:
            self._expect(key)
            self._open.append(self._open.pop(0))

    def undo(self) -> None:
        """Take the last answer back and ask its question again."""
        with self._lock:
            if self.can_undo:
                self._write(self._rows[:-1])
                self._open.insert(0, self._keys.pop())

    def _expect(self, key: str | None) -> None:
        if key is None or key != self.key:
            raise Stale

    def _write(self, rows: list[Row]) -> None:
        with atomic_file(self.path) as temporary:
            temporary.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                encoding="utf-8",
            )
        self._rows = rows
