"""What a run reports while it goes: to files, TensorBoard, Weights & Biases and the terminal."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ppo_kernels._files import remove
from ppo_kernels.trainer.config import Config, InputError

WRITTEN = (
    "config.json",
    "before.json",
    "log.jsonl",
    "completions.jsonl",
    "tensorboard",
    "wandb",
    "checkpoints",
    "failure",
    "profile.txt",
    "reward.png",
    "metrics.png",
    "samples.md",
    "summary.json",
    "policy",
    "value",
)
Table = Sequence[Mapping[str, Any]]


def prepare_output(config: Config, goes_on: bool = False) -> Path:
    """Make the output folder. One that holds a run is refused, or cleared with `overwrite`.

    With `resume`, a run that goes on keeps it, and one that ended before its first checkpoint
    begins anew.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if goes_on:
        return folder
    present = [folder / name for name in WRITTEN if (folder / name).exists()]
    is_replaceable = config.resume and not (folder / "summary.json").exists()
    if present and not config.overwrite and not is_replaceable:
        raise InputError(
            f"output_dir: given {config.output_dir!r}, which holds a run already; "
            "expected a new folder, or overwrite: true, or resume: true"
        )
    remove(present)
    return folder


def progress_bar(steps: int, name: str, done: int = 0, is_shown: bool = True) -> "tqdm[NoReturn]":
    """Return a bar that redraws itself in a terminal and adds a line now and then in a file."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=steps,
        initial=done,
        desc=name,
        unit="step",
        dynamic_ncols=True,
        mininterval=interval,
        disable=not is_shown,
    )


class Tracker(Protocol):
    """Where metrics and tables of completions go."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take one step's metrics."""

    def table(self, step: int, rows: Table) -> None:
        """Take some of a step's completions."""

    def close(self) -> None:
        """Write what is left."""


class JsonLines:
    """log.jsonl and completions.jsonl, a line a step.

    A line reaches its file in one unbuffered write, so an interrupted run leaves whole lines only.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.history = [row for row in read_lines(folder / "log.jsonl") if row["step"] < first]
        tables = [row for row in read_lines(folder / "completions.jsonl") if row["step"] < first]
        self.log = _start(folder / "log.jsonl", self.history)
        self.completions = _start(folder / "completions.jsonl", tables)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line to log.jsonl; numbers that are not finite become null."""
        row = {"step": step, **values}
        self.log.write(_line(row))
        self.history.append(row)

    def table(self, step: int, rows: Table) -> None:
        """Add a line for each row to completions.jsonl."""
        self.completions.write(b"".join(_line({"step": step, **row}) for row in rows))

    def close(self) -> None:
        """Close the files."""
        self.log.close()
        self.completions.close()


def _start(path: Path, rows: Sequence[Mapping[str, Any]]) -> Any:
    file = open(path, "wb", buffering=0)  # noqa: SIM115
    file.write(b"".join(map(_line, rows)))
    return file


def _line(row: Mapping[str, Any]) -> bytes:
    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return (json.dumps({key: plain(value) for key, value in row.items()}) + "\n").encode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a file of JSON lines; null is NaN, and no file is no lines."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


class TensorBoard:
    """Scalars, and tables as Markdown."""

    def __init__(self, folder: Path, first: int) -> None:
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add the scalars."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def table(self, step: int, rows: Table) -> None:
        """Add the table as text."""
        lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        for row in rows:
            cells = [" ".join(str(value).split()).replace("|", "\\|") for value in row.values()]
            lines.append("| " + " | ".join(cells) + " |")
        self.writer.add_text("completions", "\n".join(lines), step)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class WeightsAndBiases:
    """A run of a W&B project; a resumed run goes on in it."""

    def __init__(self, folder: Path, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                f"wandb: given {config.wandb!r}, which needs wandb: pip install wandb"
            ) from error
        (folder / "wandb").mkdir(exist_ok=True)
        name = folder / "wandb" / "run_id"
        known = name.read_text() if name.exists() else None
        self.wandb = wandb
        self.run = wandb.init(
            project=config.wandb,
            dir=str(folder),
            config=asdict(config),
            id=known,
            resume="allow" if known else None,
        )
        name.write_text(self.run.id)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the scalars."""
        self.run.log(dict(values), step=step)

    def table(self, step: int, rows: Table) -> None:
        """Log the table."""
        cells = [list(row.values()) for row in rows]
        self.run.log({"completions": self.wandb.Table(list(rows[0]), cells)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class RunLog:
    """Hands a run's metrics and tables to its trackers, and shows the main ones in a bar.

    Attributes:
        history: The metrics of every step, those before a resumed run's first step included.
    """

    def __init__(
        self, folder: Path, config: Config, first: int = 0, more: Sequence[Tracker] | None = ()
    ) -> None:
        """Open what `config` names, and `more`; or nothing if that is None."""
        self.trackers: list[Tracker] = []
        self.history: list[dict[str, float]] = []
        self.bar = progress_bar(config.steps, "ppo", first, is_shown=more is not None)
        if more is None:
            return
        lines = JsonLines(folder, first)
        self.history = lines.history
        self.trackers += [lines, *more]
        if config.tensorboard:
            self.trackers.append(TensorBoard(folder, first))
        if config.wandb is not None:
            self.trackers.append(WeightsAndBiases(folder, config))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record one step."""
        for tracker in self.trackers:
            tracker.metrics(step, values)
        shown = {
            "reward": f"{values['reward/mean']:.3f}",
            "kl": f"{values['kl/per_completion']:.2f}",
            "clip": f"{values['policy/clip_fraction']:.3f}",
        }
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def table(self, step: int, rows: Table) -> None:
        """Record some completions."""
        for tracker in self.trackers:
            tracker.table(step, rows)
