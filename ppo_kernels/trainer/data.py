"""Rows of data: read from files, rendered by chat templates, checked, served in batches."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedTokenizerBase

from ppo_kernels.trainer.config import InputError

Row = Mapping[str, Any]
T = TypeVar("T")


def load_rows(path: str, key: str, column: str) -> list[Row]:
    """Read a table; of a text file, each line that is not blank gives a row with one `column`.

    Tables are .jsonl (an object a line), .csv (with a header), .parquet (needs pyarrow), and
    folders that `datasets.Dataset.save_to_disk` wrote (need datasets).
    """
    if Path(path).is_dir():
        return _saved_dataset(path, key)
    if path.endswith(".parquet"):
        return _parquet(path, key)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.endswith(".csv"):
                return _csv(file, path, key)
            lines = [line.rstrip("\r") for line in file.read().split("\n")]
    except UnicodeDecodeError as error:
        raise InputError(f"{key}: given {path!r}, which is not UTF-8: {error}") from error
    except OSError as error:
        raise _unreadable(path, key, error) from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not path.endswith(".jsonl"):
        return [{column: line} for _, line in rows]
    return [_json_row(line, number, path, key) for number, line in rows]


def _json_row(line: str, number: int, path: str, key: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{key}: line {number} of {path} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{key}: line {number} of {path} is no JSON object: {line}")
    return row


def _csv(file: Iterable[str], path: str, key: str) -> list[Row]:
    rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise InputError(f"{key}: row {number} of {path} has not as many fields as the header")
    return cast(list[Row], rows)


def _parquet(path: str, key: str) -> list[Row]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError as error:
        raise _not_installed("pyarrow", path, key) from error
    try:
        return cast(list[Row], parquet.read_table(path).to_pylist())
    except ArrowInvalid as error:
        raise InputError(f"{key}: given {path!r}, which is no parquet file: {error}") from error
    except OSError as error:
        raise _unreadable(path, key, error) from error


def _saved_dataset(path: str, key: str) -> list[Row]:
    try:
        from datasets import Dataset, load_from_disk
    except ModuleNotFoundError as error:
        raise _not_installed("datasets", path, key) from error
    try:
        dataset = load_from_disk(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{key}: given the folder {path!r}, expected one that Dataset.save_to_disk wrote"
        ) from error
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"{key}: given {path!r}, a dataset of the splits {sorted(dataset)}, expected one split"
        )
    return cast(list[Row], dataset.to_list())


def _unreadable(path: str, key: str, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(f"{key}: given {path!r}, which cannot be read: {reason}")


def _not_installed(package: str, path: str, key: str) -> InputError:
    return InputError(
        f"{key}: given {path!r}, which needs {package}; "
        "it comes with: pip install 'ppo-kernels[data]'"
    )


def load_prompts(path: str, key: str = "prompts") -> list[Row]:
    """Read rows with a 'prompt' and further columns, or one prompt a line."""
    return load_rows(path, key, "prompt")


def render_prompts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, key: str = "prompts"
) -> list[Row]:
    """Make text of prompts that are conversations; these stay as the column 'messages'."""
    rendered: list[Row] = []
    for number, row in enumerate(rows, 1):
        prompt = row.get("prompt") if isinstance(row, Mapping) else None
        if isinstance(prompt, list):
            text = render_conversation(prompt, tokenizer, f"{key}: row {number}")
            row = {**row, "prompt": text, "messages": prompt}  # noqa: PLW2901
        rendered.append(row)
    return rendered


def render_conversation(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str
) -> str:
    """Return the text up to where the assistant begins, whose tokens are the template's tokens."""
    for message in messages:
        if not (isinstance(message, Mapping) and {"role", "content"} <= set(message)):
            raise InputError(f"{where} has a message without 'role' and 'content': {message!r}")
    if not tokenizer.chat_template:
        raise InputError(f"{where} is a conversation, but the tokenizer has no chat template")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    # templates write what a tokenizer puts before every text
    for candidate in (text, text.removeprefix(tokenizer.bos_token or "")):
        if tokenizer(candidate)["input_ids"] == wanted:
            return candidate
    raise InputError(
        f"{where}: the tokenizer adds special tokens to the text of the chat template: {text!r}"
    )


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


def shuffled_batches(rows: Sequence[T], size: int, seed: int) -> Iterator[list[T]]:
    """Yield batches for ever; every row is served once before any is served again."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[T] = []
    while True:
        while len(queue) < size:
            queue += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        yield queue[:size]
        queue = queue[size:]
