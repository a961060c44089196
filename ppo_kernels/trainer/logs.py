"""What a run reports while it goes: a line of JSON a step, TensorBoard, a progress bar."""

import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ppo_kernels.trainer.config import Config, InputError

WRITTEN = (
    "config.json",
    "log.jsonl",
    "tensorboard",
    "reward.png",
    "samples.md",
    "summary.json",
    "policy",
    "value",
)


def prepare_output(config: Config) -> Path:
    """Make the output folder; one that holds a run is refused, or cleared with `overwrite`."""
    folder = Path(config.output_dir)
    present = [folder / name for name in WRITTEN if (folder / name).exists()]
    if present and not config.overwrite:
        raise InputError(
            f"output_dir: given {config.output_dir!r}, which holds a run already; "
            "expected a new folder, or overwrite: true"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in present:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return folder


def progress_bar(steps: int, name: str) -> "tqdm[NoReturn]":
    """Return a bar that redraws itself in a terminal and adds a line now and then in a file."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=steps, desc=name, unit="step", dynamic_ncols=True, mininterval=interval)


class RunLog:
    """Writes each step's metrics to log.jsonl and TensorBoard, and shows the main ones.

    A line reaches the file in one unbuffered write, so an interrupted run leaves whole lines only.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.file = open(folder / "log.jsonl", "wb", buffering=0)  # noqa: SIM115
        self.board = SummaryWriter(str(folder / "tensorboard"))
        self.bar = progress_bar(steps, "ppo")
        self.history: list[dict[str, float]] = []

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        self.board.close()
        self.file.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self.file.write((json.dumps({"step": step, **finite}) + "\n").encode())
        for key, value in metrics.items():
            self.board.add_scalar(key, value, step)
        self.history.append({"step": step, **metrics})
        shown = {
            "reward": f"{metrics['reward/mean']:.3f}",
            "kl": f"{metrics['kl/per_completion']:.2f}",
            "clip": f"{metrics['policy/clip_fraction']:.3f}",
        }
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
