"""`ppo-kernels train`: settings from a YAML file and the command line."""

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from ppo_kernels.trainer.config import Config, InputError, UnstableError

C = TypeVar("C")


def parse_config(
    argv: Sequence[str],
    prog: str,
    config_file: str | None = None,
    kind: type[C] = Config,  # type: ignore[assignment]
) -> C:
    """Return the settings of `--config FILE [--key value ...]`; raise InputError with one line."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        description=kind.__doc__,
        default_config_files=[config_file] if config_file else [],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings")
    parser.add_class_arguments(kind, as_group=False)
    try:
        values = parser.parse_args(_with_values(argv, kind)).as_dict()
    except ArgumentError as error:
        raise InputError(_one_line(str(error), kind)) from error
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in values.items() if key in names})


def _with_values(argv: Sequence[str], kind: Any) -> list[str]:
    """Let a bare `--resume` stand for `--resume=true`, and so for every switch."""
    switches = {f"--{field.name}" for field in fields(kind) if field.type is bool}
    return [
        f"{word}=true" if word in switches and after.startswith("--") else word
        for word, after in zip(argv, [*argv[1:], "--"], strict=False)
    ]


def _one_line(message: str, kind: Any) -> str:
    """Say in one line what jsonargparse says in several: key, given, expected."""
    types = {field.name: _type_name(field.type) for field in fields(kind)}
    key = re.search(r'Parser key "(\w+)"', message)
    given = re.search(r"(?:Got|Given) value: (.*)", message)
    if key and given and key[1] in types:
        return f"{key[1]}: given {given[1]!r}, expected {types[key[1]]}"
    unknown = re.search(r"(?:Option|unrecognized arguments:) '?([^'\s]+)", message)
    if unknown:
        name = unknown[1].lstrip("-").split("=")[0]
        close = difflib.get_close_matches(name, types, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(types)}"
        return f"{name}: no such setting; {hint}"
    return " ".join(message.split())


def _type_name(kind: object) -> str:
    if isinstance(kind, type) and not hasattr(kind, "__args__"):
        return kind.__name__
    return str(kind).replace("typing.", "").replace("None", "null")


def run_command(
    prog: str,
    argv: Sequence[str] | None,
    work: Callable[[Any], None],
    config_file: str | None = None,
    kind: type = Config,
) -> int:
    """Call `work` with the parsed settings; mistakes and Ctrl-C end in one line and a status."""
    config: Any = None
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv, prog, config_file, kind)
        work(config)
    except InputError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except (UnstableError, OSError) as error:
        print(f"{prog}: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        folder = getattr(config, "output_dir", None)
        where = f"; what was finished is in {folder}" if folder else ""
        print(f"\n{prog}: interrupted{where}", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ppo-kernels train`; return the exit status."""
    return run_command("ppo-kernels train", argv, _train)


def _train(config: Config) -> None:
    from transformers.utils import logging

    from ppo_kernels.trainer.ppo import train

    logging.disable_progress_bar()
    result = train(config)
    if result.before is not None and result.after is not None:
        print(f"mean reward {result.before.mean:.3f} before, {result.after.mean:.3f} after")
    print(f"{result.tokens_per_second:.0f} tokens/s; everything is in {result.output_dir}")
