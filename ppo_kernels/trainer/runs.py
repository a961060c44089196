"""The folder of a command's run: claimed, and filled with settings, log and summary."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from ppo_kernels._files import remove
from ppo_kernels.trainer.config import InputError
from ppo_kernels.trainer.logs import progress_bar
from ppo_kernels.trainer.report import write_json


def start_run(config: Any, writes: Sequence[str]) -> Path:
    """Make the output folder, with config.json; one that holds a run is refused or cleared."""
    folder = Path(config.output_dir)
    present = [folder / name for name in ("config.json", *writes) if (folder / name).exists()]
    if present and not config.overwrite:
        raise InputError(
            f"output_dir: given {config.output_dir!r}, which holds {present[0].name} already; "
            "expected a new folder, or overwrite: true"
        )
    remove(present)
    write_json(folder / "config.json", asdict(config))
    return folder


class StepLog:
    """A progress bar, and a line of log.jsonl for each step, written at once."""

    def __init__(self, path: Path | None, steps: int, name: str) -> None:
        self.file = open(path, "wb", buffering=0) if path else None  # noqa: SIM115
        self.bar = progress_bar(steps, name)
        self.history: list[dict[str, float]] = []

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.file:
            self.file.close()

    def write(self, metrics: Mapping[str, float]) -> None:
        """Record one step."""
        self.history.append({"step": len(self.history), **metrics})
        if self.file:
            self.file.write((json.dumps(self.history[-1]) + "\n").encode())
        self.bar.set_postfix({key: f"{value:.3g}" for key, value in metrics.items()}, refresh=False)
        self.bar.update()
