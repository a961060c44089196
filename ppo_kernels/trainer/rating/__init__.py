"""Collecting human ratings of completions, in a browser or a terminal."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ppo_kernels.trainer.config import InputError, check_settings
from ppo_kernels.trainer.data import Row, load_rows
from ppo_kernels.trainer.rating.queue import Queue, claimed, make_items


@dataclass(frozen=True)
class RateConfig:
    """Settings of `ppo-kernels rate`: keys of its YAML file, overridden by `--key value`."""

    data: str | None = None
    """What to rate, as `ppo-kernels generate` writes it: rows with a 'completion' and, if there is
    one, its 'prompt', a text or a list of messages. .jsonl, .csv, .parquet or a saved dataset."""
    output: str | None = None
    """File of the ratings, .jsonl, which `ppo-kernels reward` reads. What it holds is kept; rows
    that are rated there are not asked for again."""
    mode: Literal["stars", "pairs"] = "stars"
    """Stars: each completion gets a 'rating' of 1 to 5. Pairs: of two completions of a prompt one
    is 'chosen', the other 'rejected'."""
    pairs_per_prompt: int | None = 1
    """Pairs asked for of a prompt's completions, at random; null for all."""
    ui: Literal["browser", "terminal"] = "browser"
    """Where to ask: on a page of this machine, or in the terminal."""
    port: int = 8017
    """Of the page, on 127.0.0.1; 0 takes one that is free."""
    open_page: bool = True
    """Open the page in the default browser."""
    seed: int = 0
    """Of the order of the questions, of the pairs and of their sides."""

    def __post_init__(self) -> None:
        check_settings(
            self,
            {
                "an integer >= 1": (
                    {"pairs_per_prompt"},
                    lambda v: type(v) is int and v >= 1,
                ),
                "an integer in 0..65535": (
                    {"port"},
                    lambda v: type(v) is int and 0 <= v <= 65535,
                ),
                "a string": ({"data"}, lambda v: isinstance(v, str) and v != ""),
                "a file name that ends in .jsonl": (
                    {"output"},
                    lambda v: isinstance(v, str) and v.endswith(".jsonl"),
                ),
            },
        )


class Rated(NamedTuple):
    """How far the rating got, and where it is."""

    output: Path
    done: int
    total: int


def rate(config: RateConfig, *, data: Sequence[Row] | None = None) -> Rated:
    """Ask for ratings as `config` says, until all are given or the user leaves.

    Rows given here take the place of the file that `config` names. Every answer is in the output
    before the next question is shown.
    """
    if config.output is None:
        raise InputError("output: not given, and it has no default")
    if config.ui == "terminal" and not sys.stdin.isatty():
        raise InputError("ui: given 'terminal', but the standard input is none")
    if data is None:
        if config.data is None:
            raise InputError("data: not given, and it has no default")
        data = load_rows(config.data, "data", "completion")
    items = make_items(data, config.mode, config.pairs_per_prompt, config.seed)
    path = Path(config.output)
    with claimed(path):
        queue = Queue(items, path, config.mode)
        try:
            if config.ui == "terminal":
                from ppo_kernels.trainer.rating import terminal

                terminal.ask(queue)
            else:
                from ppo_kernels.trainer.rating import page

                page.ask(queue, config.port, config.open_page)
        except ModuleNotFoundError as error:
            raise InputError(
                f"ui: given {config.ui!r}, which needs {error.name}; "
                "it comes with: pip install 'ppo-kernels[rate]'"
            ) from error
    return Rated(path, queue.done, len(items))
