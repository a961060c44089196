"""Rows of results: CSV, Markdown, and comparison with an older run."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import info
from .._files import atomic_file

OURS = "ppo_kernels"
# What no version can do without: memory traffic, or for what is bound by arithmetic its products.
FLOOR = "read + copy"
PRODUCTS = "matrix products"


@dataclass
class Row:
    """One implementation at one size. None: not measured (see `note`).

    Attributes:
        backend: Of ours.
        isa: The instruction set: of the cpu backend, or else the one torch uses (which
            ATEN_CPU_CAPABILITY lowers), by the same names.
        status: ok; wrong (not timed); failed (it raised); skipped (it cannot run here);
            extrapolated (timed on fewer steps).
        low_ms: First quartile of the samples; high_ms the third.
        cache: flushed (the caches are emptied before each sample) or warm.
        bytes: What any version must read and write.
        bandwidth_percent: The time of a plain read and copy of as many bytes, by torch in the same
            turns, over this time.
        peak_mib: Peak memory beyond the inputs; outputs and gradients included.
        max_error: Against float64, at a smaller size, relative to the largest exact magnitude.
        read_gbps: One-pass read far out of cache, at the start of the run; copy_gbps likewise.
        commit: With a + where the source differs from it.
    """

    function: str
    variant: str
    size: str
    dtype: str
    direction: str
    implementation: str
    backend: str
    isa: str
    threads: int
    device: str
    status: str = "ok"
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    samples: int | None = None
    cache: str = ""
    bytes: int | None = None
    gbps: float | None = None
    bandwidth_percent: float | None = None
    peak_mib: float | None = None
    max_error: float | None = None
    read_gbps: float | None = None
    copy_gbps: float | None = None
    python: str = ""
    torch: str = ""
    ppo_kernels: str = ""
    commit: str = ""
    date: str = ""
    note: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        """What implementations are compared on."""
        return (
            self.function,
            self.variant,
            self.size,
            self.dtype,
            self.direction,
            str(self.threads),
            self.device,
        )

    @property
    def key(self) -> tuple[str, ...]:
        return (*self.case, self.implementation, self.backend, self.isa)

    def set(self, **columns: Any) -> None:
        for name, value in columns.items():
            setattr(self, name, value)


COLUMNS = {f.name: f.type for f in dataclasses.fields(Row)}


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow(_text(getattr(row, name)) for name in COLUMNS)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read_csv(path: Path) -> list[Row]:
    """Raises ValueError naming the file and what is wrong with it."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path}: expected a result of `ppo-kernels bench`; no column {missing[0]}"
            )
        try:
            return [Row(**{k: _value(COLUMNS[k], line[k]) for k in COLUMNS}) for line in reader]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _value(kind: Any, text: str) -> Any:
    if kind == "str":
        return text
    if not text:
        return None
    return int(text) if kind.startswith("int") else float(text)


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """What was measured again replaces what was there; the rest stays, in its place."""
    rows = {row.key: row for row in old}
    rows.update((row.key, row) for row in new)
    return list(rows.values())


# ---- comparison with an older run ---------------------------------------------------------------


def compare(old: Iterable[Row], new: Iterable[Row], threshold: float) -> tuple[str, bool]:
    """Ratios new / old of our times, as a table, and whether one is above the threshold.

    Other implementations' ratios show how much the machine itself has changed. A case of ours that
    was timed before and is wrong or fails now is beyond any threshold. Raises ValueError if there
    is nothing to compare.
    """
    before = {row.key: row for row in old if row.median_ms is not None}
    table = [["case", "dtype", "direction", "implementation", "old ms", "new ms", "ratio", ""]]
    beyond = False
    others = []
    for row in new:
        was = before.get(row.key)
        if was is None or was.median_ms is None:
            continue
        if row.median_ms is None and row.status not in ("wrong", "failed"):
            continue
        ratio = float("inf") if row.median_ms is None else row.median_ms / was.median_ms
        if row.implementation != OURS:
            others.append(ratio)
            continue
        verdict = "" if ratio <= threshold else row.status if row.status != "ok" else "slower"
        beyond |= ratio > threshold
        table.append(
            [
                case_name(row),
                row.dtype,
                row.direction,
                _who(row),
                number(was.median_ms),
                number(row.median_ms),
                f"{ratio:.2f}",
                verdict,
            ]
        )
    if len(table) == 1:
        raise ValueError(
            "no case of ppo_kernels is in both runs (device, threads and isa included)"
        )
    text = info.markdown(table)
    if others:
        text += (
            f"\nmedian ratio of the {len(others)} other timings: {statistics.median(others):.2f}"
        )
    return text, beyond


# ---- Markdown -----------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """All rows as tables, one per device, number of threads and function."""
    parts = ["# Microbenchmarks\n"]
    for place in dict.fromkeys((row.device, row.threads) for row in rows):
        here = [row for row in rows if (row.device, row.threads) == place]
        parts.append(f"## {place_of(here[0])}\n\n{_facts(here)}\n")
        for function in dict.fromkeys(row.function for row in here):
            chosen = [r for r in here if r.function == function and r.status != "skipped"]
            parts.append(f"### {function}\n\n{_table(chosen)}\n")
        reasons = dict.fromkeys(
            f"- {r.implementation}: {r.note}" for r in here if r.status == "skipped"
        )
        if reasons:
            parts.append("### Skipped\n\n" + "\n".join(reasons) + "\n")
    return "\n".join(parts)


def place_of(row: Row) -> str:
    """The device, and of a CPU the number of threads."""
    threads = f"{row.threads} thread{'s' * (row.threads != 1)}" if row.isa else ""
    return ", ".join(filter(None, (row.device, threads)))


def _facts(rows: Sequence[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(_text(getattr(r, name)) for r in rows if getattr(r, name)))

    dates = sorted(row.date for row in rows if row.date) or ["-"]
    return (
        f"ppo_kernels {all_of('ppo_kernels')} (commit {all_of('commit') or 'unknown'}), torch "
        f"{all_of('torch')}, Python {all_of('python')}; one-pass read {all_of('read_gbps')} GB/s, "
        f"copy {all_of('copy_gbps')} GB/s; {dates[0]} to {dates[-1]}.\n\n"
        "Median of the samples and their quartiles; GB/s of the bytes any version must move; % of "
        "what a plain read and copy of as many bytes takes in the same turns; peak memory beyond "
        "the inputs; largest error against float64, relative to the largest exact magnitude."
    )


def _table(rows: Sequence[Row]) -> str:
    columns = "case|dtype|direction|implementation|ms|quartiles|x eager|GB/s|%|peak MiB|error|note"
    table = [columns.split("|")]
    for row in rows:
        eager = find(rows, row, ("eager", "chunked"))
        speed = ratio_of(eager, row)
        note = "; ".join(filter(None, (row.status if row.status != "ok" else "", row.note)))
        table.append(
            [
                case_name(row),
                row.dtype,
                row.direction,
                _who(row),
                number(row.median_ms),
                f"{number(row.low_ms)} - {number(row.high_ms)}" if row.low_ms else "",
                number(speed),
                number(row.gbps),
                f"{row.bandwidth_percent:.0f}" if row.bandwidth_percent is not None else "",
                f"{row.peak_mib:.1f}" if row.peak_mib is not None else "",
                f"{row.max_error:.1e}" if row.max_error is not None else "",
                note.replace("|", "\\|"),
            ]
        )
    return info.markdown(table)


def find(rows: Sequence[Row], like: Row, names: Sequence[str]) -> Row | None:
    """One of these implementations in the same case, if possible at the same instruction set."""
    found = [r for r in rows if r.case == like.case and r.implementation in names]
    return next((r for r in found if r.isa == like.isa), found[0] if found else None)


def ratio_of(other: Row | None, row: Row) -> float | None:
    """How many times longer the other takes."""
    if other is None or other.median_ms is None or row.median_ms is None:
        return None
    return other.median_ms / row.median_ms


def case_name(row: Row) -> str:
    return " ".join(filter(None, (row.variant, f"[{row.size.replace('x', ', ')}]")))


def _who(row: Row) -> str:
    if row.implementation != OURS:
        return row.implementation
    return f"{OURS} ({', '.join(filter(None, (row.backend, row.isa)))})"


def number(x: float | None) -> str:
    """Three digits."""
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"
