"""The `ppo-kernels` command; also `python -m ppo_kernels`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import info


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ppo-kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="what runs here, and why the rest does not")
    show.add_argument("--table", action="store_true", help="only the function x backend table")
    for name, text in (
        ("bench", "time every function against torch and others: [OP ...] [--sizes ...] ..."),
        ("train", "PPO from a configuration file: --config FILE [--key value ...]"),
        ("sft", "train or fine-tune a language model: --data FILE [--key value ...]"),
        ("rate", "collect human ratings of completions: --data FILE --output FILE ..."),
        ("reward", "reward model from preferences or ratings: --data FILE --model FOLDER ..."),
        ("eval", "rewards, KL, perplexity, variety of a policy: --model FOLDER --prompts FILE ..."),
        ("generate", "completions of prompts: --model FOLDER --prompts FILE ..."),
        ("demo", "PPO on real text, start to finish"),
        ("rlhf", "from human ratings to an evaluated policy, on real data, start to finish"),
    ):
        commands.add_parser(name, help=text, add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "info":
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        print(info.markdown(info.backend_table()) if arguments.table else info.report())
        return 0
    if arguments.command == "bench":
        from .bench.cli import main as bench

        return bench(rest)
    return _trainer(arguments.command, rest)


def _trainer(command: str, rest: Sequence[str]) -> int:
    try:
        if command == "train":
            from .trainer.cli import main as run
        elif command == "demo":
            from .trainer.demo import main as run
        else:
            from .trainer import commands

            run = getattr(commands, f"main_{command}")
    except ModuleNotFoundError as error:
        print(
            f"ppo-kernels {command}: {error.name} is not installed; "
            "it comes with: pip install 'ppo-kernels[trainer]'",
            file=sys.stderr,
        )
        return 2
    return run(rest)
