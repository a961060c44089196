"""Prompts: read from a file, checked, and served in shuffled batches."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ppo_kernels.trainer.config import InputError

Row = Mapping[str, Any]


def load_prompts(path: str, key: str = "prompts") -> list[Row]:
    """Read one prompt a line, or, from a .jsonl file, one object with a 'prompt' a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{key}: given {path!r}, which cannot be read: {error.strerror}"
        ) from error
    if not path.endswith(".jsonl"):
        return [{"prompt": line} for line in lines if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{key}: line {number} of {path} is not JSON: {error}") from error
    return rows


def check_prompts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, longest: int, key: str = "prompts"
) -> int:
    """Return the longest prompt's tokens; refuse empty lists, unequal columns, unfit prompts."""
    if not rows:
        raise InputError(f"{key}: given no prompt, expected at least one")
    columns = set(rows[0])
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
            raise InputError(f"{key}: row {number} has no text under 'prompt': {row!r}")
        if set(row) != columns:
            raise InputError(
                f"{key}: row {number} has the columns {sorted(row)}, expected those of row 1, "
                f"{sorted(columns)}"
            )
    lengths = [len(ids) for ids in tokenizer([row["prompt"] for row in rows])["input_ids"]]
    for number, length in enumerate(lengths, 1):
        if not 1 <= length <= longest:
            raise InputError(
                f"{key}: row {number} has {length} tokens, "
                f"expected 1 to max_prompt_tokens={longest}"
            )
    return max(lengths)


def shuffled_batches(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Yield batches for ever; every row is served once before any is served again."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[Row] = []
    while True:
        while len(queue) < size:
            queue += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        yield queue[:size]
        queue = queue[size:]
