"""Figures of a run. Each is left out where its cases were not measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .._files import atomic_file
from .results import FLOOR, OURS, PRODUCTS, Row

FIRST = (OURS, "eager", "compile", "chunked", "chunked compile", "loop")
Series = dict[str, list[tuple[float, float]]]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the figures; returns their paths. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _one_machine(rows)
    figures = {
        "speed": _speed,
        "scan": _scan,
        "error": _error,
        "memory": _memory,
        "memory_hidden": _memory_hidden,
    }
    written = []
    for name, figure in figures.items():
        drawn = figure(rows)
        if drawn is not None:
            path = folder / f"{name}.png"
            with atomic_file(path) as temporary:
                drawn.savefig(temporary, dpi=150)
            written.append(path)
        pyplot.close("all")
    return written


def _one_machine(rows: Sequence[Row]) -> list[Row]:
    """Of the last device, with the most threads; of ours the first instruction set measured."""
    if not rows:
        return []
    device = rows[-1].device
    threads = max(r.threads for r in rows if r.device == device)
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if (row.device, row.threads) == (device, threads):
            kept.setdefault((*row.case, row.implementation), row)
    return list(kept.values())


def _elements(row: Row) -> int:
    return math.prod(map(int, row.size.split("x")))


def _series(rows: Sequence[Row], x: Callable[[Row], float], y: str) -> Series:
    found: Series = {}
    for row in rows:
        value = getattr(row, y)
        if value is not None:
            found.setdefault(row.implementation, []).append((x(row), value))
    order = sorted(found, key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), n))
    return {name: sorted(found[name]) for name in order}


def _lines(axes: Any, series: Series) -> None:
    for name, points in series.items():
        style: dict[str, Any] = {"linewidth": 1.2}
        if name == OURS:
            style = {"linewidth": 2.2, "zorder": 3}
        elif name in (FLOOR, PRODUCTS):
            style = {"linewidth": 1.2, "linestyle": "--", "color": "gray"}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)


def _grid(titles: Sequence[str], x: str, y: str) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    columns = min(3, len(titles))
    lines = -(-len(titles) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 3.1 * lines), squeeze=False, layout="constrained"
    )
    used = list(axes.flat)[: len(titles)]
    for spare in list(axes.flat)[len(titles) :]:
        spare.remove()
    for a, title in zip(used, titles, strict=True):
        a.set_title(title, fontsize=9)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    return figure, used


def _speed(rows: Sequence[Row]) -> Any:
    """Elements per second against elements, one panel per function and variant, fp32.

    Forward and backward where that was measured, else forward.
    """
    timed = [r for r in rows if r.dtype == "float32" and r.median_ms is not None]
    direction = {(r.function, r.variant): r.direction for r in sorted(timed, key=_backward)}
    panels: dict[str, list[Row]] = {}
    for row in timed:
        if row.direction == direction[row.function, row.variant]:
            title = " ".join(filter(None, (row.function, row.variant, row.direction)))
            panels.setdefault(title, []).append(row)
    panels = {t: p for t, p in panels.items() if len({_elements(r) for r in p}) > 1}
    if not panels:
        return None
    figure, axes = _grid(list(panels), "elements", "elements per second")
    for a, panel in zip(axes, panels.values(), strict=True):
        points = _series(panel, _elements, "median_ms")
        _lines(a, {n: [(x, x / ms * 1e3) for x, ms in p] for n, p in points.items()})
        a.legend(fontsize=6)
    return figure


def _backward(row: Row) -> bool:
    return row.direction != "forward"


def _scan(rows: Sequence[Row]) -> Any:
    """Time against T at (nearly) the same number of tokens."""
    padded = [r for r in rows if r.function == "gae" and r.size.count("x") == 1 and not r.variant]
    padded = [r for r in padded if r.direction == "forward" and r.dtype == "float32"]
    most = max(map(_elements, padded), default=0)
    padded = [r for r in padded if _elements(r) > most // 8]
    if len({r.size for r in padded}) < 2:
        return None
    figure, (axes,) = _grid(["gae, [B, T] of one size"], "T", "ns per token")
    _lines(axes, _per_token(padded))
    axes.legend(fontsize=7)
    return figure


def _per_token(rows: Sequence[Row]) -> Series:
    found: Series = {}
    for row in rows:
        if row.median_ms is not None:
            point = (float(row.size.split("x")[1]), row.median_ms * 1e6 / _elements(row))
            found.setdefault(row.implementation, []).append(point)
    return {name: sorted(points) for name, points in found.items()}


def _error(rows: Sequence[Row]) -> Any:
    """Largest error against float64 by dtype."""
    chosen = [r for r in rows if r.max_error is not None and r.implementation in FIRST]
    if not chosen:
        return None
    order = ("float64", "float32", "float16", "bfloat16")
    dtypes = sorted({r.dtype for r in chosen}, key=order.index)
    titles = list(dict.fromkeys(f"{r.function} {r.variant}".strip() for r in chosen))
    figure, axes = _grid(titles, "", "largest error against float64, relative to the largest value")
    for a, title in zip(axes, titles, strict=True):
        here = [r for r in chosen if f"{r.function} {r.variant}".strip() == title]
        names = [n for n in FIRST if any(r.implementation == n for r in here)]
        for i, name in enumerate(names):
            worst: dict[int, float] = {}
            for r in here:
                if r.implementation == name:
                    at = dtypes.index(r.dtype)
                    worst[at] = max(worst.get(at, 0.0), r.max_error or 0.0)
            shift = 0.1 * (i - (len(names) - 1) / 2)
            a.plot([d + shift for d in worst], worst.values(), "o", markersize=5, label=name)
        a.set_xticks(range(len(dtypes)), dtypes)
        a.set(yscale="log", xlim=(-0.5, len(dtypes) - 0.5), ylim=(1e-9, 1e-1))
        a.grid(alpha=0.3)
        a.legend(fontsize=6)
    return figure


def _memory(rows: Sequence[Row]) -> Any:
    """Peak memory against the vocabulary, at the row count with the most vocabularies."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.function == "logprobs_from_logits" and not row.variant and row.dtype == "float32":
            groups.setdefault((row.size.split("x")[0], row.direction), []).append(row)
    groups = {k: g for k, g in groups.items() if any(r.peak_mib is not None for r in g)}
    if not groups:
        return None
    most = max(groups, key=lambda k: len({r.size for r in groups[k]}))[0]
    panels = {k: g for k, g in groups.items() if k[0] == most}
    titles = [f"logprobs_from_logits, {count} tokens, {how}" for count, how in panels]
    figure, axes = _grid(titles, "vocabulary", "peak MiB beyond the inputs")
    for a, panel in zip(axes, panels.values(), strict=True):
        _lines(a, _series(panel, partial(_dimension, 1), "peak_mib"))
        a.set_yscale("symlog", linthresh=1)
        a.legend(fontsize=6)
    return figure


def _memory_hidden(rows: Sequence[Row]) -> Any:
    """Peak memory from hidden states, forward and backward: against vocabulary, against tokens.

    Each at the sizes where most others were measured.
    """
    measured = [r for r in rows if r.function.endswith("_from_hidden") and _backward(r)]
    measured = [r for r in measured if r.dtype == "float32" and r.peak_mib is not None]
    panels: dict[str, tuple[list[Row], int]] = {}
    for function in dict.fromkeys(r.function for r in measured):
        for axis, fixed in ((2, "{} tokens, H = {}"), (0, "H = {}, V = {}")):
            groups: dict[str, list[Row]] = {}
            for row in measured:
                size = row.size.split("x")
                del size[axis]
                if row.function == function:
                    groups.setdefault(fixed.format(*size), []).append(row)
            most = max(groups, key=lambda k: len({r.size for r in groups[k]}))
            if len({r.size for r in groups[most]}) > 1:
                panels[f"{function}, {most}"] = (groups[most], axis)
    if not panels:
        return None
    figure, axes = _grid(list(panels), "vocabulary; tokens", "peak MiB beyond the inputs")
    for a, (panel, axis) in zip(axes, panels.values(), strict=True):
        _lines(a, _series(panel, partial(_dimension, axis), "peak_mib"))
        sizes = sorted({int(_dimension(axis, row)) for row in panel})
        a.set_xticks(sizes, sizes)
        a.minorticks_off()
        a.legend(fontsize=6)
    return figure


def _dimension(axis: int, row: Row) -> float:
    return float(row.size.split("x")[axis])
