"""`ppo-kernels bench`: time every function against what users would otherwise call."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import cpu
from .._files import atomic_file
from .._op import BACKENDS
from . import cases, results
from .plot import draw
from .results import Row
from .run import Runner, Settings, device_name


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="ppo-kernels bench",
        description="Time every function against torch eager, torch.compile and installed packages."
        " A run adds to the results in its folder: what it measures again is replaced.",
    )
    made.add_argument("functions", nargs="*", metavar="OP", help="public functions; all by default")
    made.add_argument(
        "--sizes", choices=tuple(cases.SIZES), help="default on a CPU, gpu on a GPU, if not given"
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument(
        "--backend", type=_names(tuple(BACKENDS)), help="comma-separated; what auto would choose"
    )
    made.add_argument(
        "--isa",
        type=_names(tuple(cpu.supported_isas())),
        help="comma-separated instruction-set levels of the cpu backend; the one in use",
    )
    made.add_argument(
        "--threads", type=_counts, help="comma-separated numbers of threads; torch's own"
    )
    known = dict.fromkeys(n for b in cases.BENCHMARKS.values() for n in b.baselines)
    made.add_argument(
        "--baselines",
        type=_names(("none", *known)),
        help="comma-separated, or none; all (with --sizes small: all but Inductor, which compiles)",
    )
    made.add_argument("--seconds", type=_positive, help="of calls per timing, about")
    made.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    made.add_argument("--no-timing", action="store_true", help="leave out times")
    made.add_argument(
        "--out", type=Path, help="folder of the results; benchmarks/results/DEVICE by default"
    )
    made.add_argument(
        "--compare", type=Path, metavar="OLD.csv", help="print our times over those of OLD.csv"
    )
    made.add_argument(
        "--threshold", type=_positive, help="exit with status 1 where that ratio is larger"
    )
    return made


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"given {name!r}, expected a list of {', '.join(known) or 'nothing here'}"
                )
        return names

    return parse


def _counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", text):
        raise argparse.ArgumentTypeError(f"given {text!r}, expected numbers as in 1,2")
    return list(dict.fromkeys(int(x) for x in text.split(",")))


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"given {text!r}, expected a number above 0")
    return number


def main(argv: Sequence[str]) -> int:
    options = parser()
    asked = options.parse_args(argv)
    for name in asked.functions:
        if name not in cases.FUNCTIONS:
            options.error(f"OP: given {name!r}, expected one of {', '.join(cases.FUNCTIONS)}")
    if asked.device == "cuda" and not torch.cuda.is_available():
        options.error("--device: given cuda, but torch sees no CUDA device")
    if asked.device == "cuda" and asked.threads:
        options.error("--threads: belongs to the CPU")
    if (asked.compare is None) != (asked.threshold is None):
        options.error("--compare and --threshold go together")
    device = torch.device(asked.device)
    asked.sizes = asked.sizes or ("gpu" if device.type == "cuda" else "default")
    settings = _settings(asked, device, options)
    folder = asked.out or Path("benchmarks/results") / _slug(device_name(device))
    try:
        older = results.read_csv(asked.compare) if asked.compare else []
        kept = results.read_csv(folder / "results.csv") if (folder / "results.csv").exists() else []
    except (OSError, ValueError) as error:
        options.error(str(error))

    jobs = [
        job
        for job in cases.SIZES[asked.sizes]()
        if not asked.functions or job.benchmark.function in asked.functions
    ]
    new: list[Row] = []
    stopped = False
    told: set[str] = set()
    with _bar(len(jobs) * len(settings.threads)) as bar:
        try:
            for rows in Runner(settings).rows(jobs):
                new += rows
                results.write_csv(folder / "results.csv", results.merged(kept, new))
                for line in _news(rows, told):
                    bar.write(line)
                bar.update()
        except KeyboardInterrupt:
            stopped = True
    _report(folder, results.merged(kept, new))
    if stopped:
        print(f"ppo-kernels bench: stopped; kept {len(new)} rows", file=sys.stderr)
        return 130
    if not asked.compare:
        return 0
    try:
        table, beyond = results.compare(older, new, asked.threshold)
    except ValueError as error:
        options.error(f"--compare: {error}")
    print(table)
    return int(beyond)


def _settings(
    asked: argparse.Namespace, device: torch.device, options: argparse.ArgumentParser
) -> Settings:
    executors = None
    if asked.backend or asked.isa:
        levels = asked.isa or [cpu.isa()]
        backends = asked.backend or ["cpu"]
        if asked.isa and "cpu" not in backends:
            options.error("--isa: belongs to the cpu backend, which --backend leaves out")
        for name in backends:
            if BACKENDS[name].unavailable:
                options.error(f"--backend: {name} is off: {BACKENDS[name].unavailable}")
        executors = [
            e for b in backends for e in ([f"cpu:{i}" for i in levels] if b == "cpu" else [b])
        ]
    baselines = asked.baselines
    if baselines is None and asked.sizes == "small":
        every = dict.fromkeys(n for b in cases.BENCHMARKS.values() for n in b.baselines)
        baselines = [name for name in every if "compile" not in name]
    return Settings(
        device,
        executors,
        asked.threads or [torch.get_num_threads()],
        baselines,
        asked.seconds or (0.02 if asked.sizes == "small" else 2.0),
        not asked.no_memory,
        not asked.no_timing,
    )


def _news(rows: Iterable[Row], told: set[str]) -> Iterable[str]:
    """What went wrong, each reason once."""
    for row in rows:
        if row.status in ("skipped", "failed", "wrong"):
            case = f"{row.function} {row.variant} [{row.size}] {row.dtype} {row.direction}: "
            case = "" if row.status == "skipped" else case
            text = f"{case}{row.implementation} {row.status}: {row.note}"
            if text not in told:
                told.add(text)
                yield text


def _report(folder: Path, rows: list[Row]) -> None:
    if not rows:
        return
    with atomic_file(folder / "results.md") as temporary:
        temporary.write_text(results.markdown(rows))
    print(f"results: {folder / 'results.csv'}, {folder / 'results.md'}")
    try:
        for path in draw(rows, folder):
            print(f"figure: {path}")
    except ImportError as error:
        print(f"no figures: {error.name} is not installed (pip install 'ppo-kernels[bench]')")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class _PlainBar:
    """What is used of tqdm, where that is not installed: messages only."""

    def __enter__(self) -> _PlainBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, line: str) -> None:
        print(line)

    def update(self) -> None:
        pass


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return _PlainBar()
    return tqdm(total=total, unit="case", dynamic_ncols=True, disable=None)
