"""What the README says of results: the main cases, levels and threads, and what a call costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .. import info
from .results import OURS, Row, case_name, find, number, place_of, ratio_of

EAGER = ("eager", "chunked")
LEVELS = ("generic", "avx2", "avx512")
CALLS = ("8x8", "1x8", "8", "8x8x8")  # sizes of 8 tokens

# The cases of the README: those of a CPU, then those of a GPU; what was not measured is left out.
HEADLINES: tuple[tuple[str, str, str, str, str], ...] = (
    ("logprobs_from_logits", "", "2048x50257", "float32", "forward"),
    ("logprobs_from_logits", "", "2048x50257", "bfloat16", "forward"),
    ("logprobs_from_logits", "entropy", "2048x50257", "float32", "forward"),
    ("logprobs_from_logits", "", "2048x50257", "float32", "forward+backward"),
    ("logprobs_from_logits", "", "2048x50257", "bfloat16", "forward+backward"),
    ("logprobs_from_hidden", "", "2048x768x50257", "float32", "forward"),
    ("logprobs_from_hidden", "", "2048x768x50257", "float32", "forward+backward"),
    ("ppo_loss_from_hidden", "", "2048x768x50257", "float32", "forward+backward"),
    ("categorical_kl_from_hidden", "", "2048x768x50257", "float32", "forward+backward"),
    ("clipped_loss", "", "64x16384", "float32", "forward+backward"),
    ("value_loss", "", "64x16384", "float32", "forward+backward"),
    ("gae", "", "64x8192", "float32", "forward"),
    ("gae", "", "8x32768", "float32", "forward"),
    ("gae", "", "1x1048576", "float32", "forward"),
    ("gae", "packed", "1048576", "float32", "forward"),
    ("whiten", "", "64x16384", "float32", "forward"),
    ("logprobs_from_logits", "", "8192x151936", "bfloat16", "forward"),
    ("logprobs_from_logits", "entropy", "8192x151936", "bfloat16", "forward"),
    ("logprobs_from_logits", "", "8192x151936", "bfloat16", "forward+backward"),
    ("categorical_kl", "", "4096x151936", "bfloat16", "forward+backward"),
    ("clipped_loss", "", "4096x16384", "float32", "forward+backward"),
    ("value_loss", "", "4096x16384", "float32", "forward+backward"),
    ("gae", "", "4096x16384", "float32", "forward"),
    ("gae", "packed", "67108864", "float32", "forward"),
    ("whiten", "", "4096x16384", "float32", "forward"),
)


def headline(rows: Sequence[Row]) -> str:
    """The README's table: our best level and most threads, against torch eager and compiled."""
    table = [["", "dtype", "", "ms", "of bandwidth", "eager", "torch.compile", "Python loop"]]
    shown = []
    for wanted in HEADLINES:
        ours = [
            r
            for r in rows
            if r.key[:5] == wanted and r.implementation == OURS and r.median_ms is not None
        ]
        if not ours:
            continue
        best = max(ours, key=lambda r: (r.threads, LEVELS.index(r.isa) if r.isa in LEVELS else -1))
        shown.append(best)
        cells = []
        for names in (("eager", "chunked"), ("compile", "chunked compile"), ("loop",)):
            other = find(rows, best, names)
            ratio = ratio_of(other, best)
            mark = "\\*" if other and other.status == "extrapolated" else ""
            cells.append(f"{number(ratio)}x{mark}" if ratio else "")
        share = f"{best.bandwidth_percent:.0f} %" if best.bandwidth_percent else ""
        name = f"`{best.function}` {case_name(best)}"
        ms = number(best.median_ms)
        table.append([name, best.dtype, best.direction, ms, share, *cells])
    if not shown:
        return ""
    first = shown[0]
    text = (
        f"{', '.join(filter(None, (place_of(first), first.isa)))}, torch {first.torch}, "
        f"{first.date[:10]}:\n\n{info.markdown(table)}\n\nThe last three columns are how many "
        "times longer torch takes: eager (for scans: as chunked matrix products), compiled by "
        "Inductor, and a loop over the steps."
    )
    if any("\\*" in cell for line in table for cell in line):
        text += " \\* extrapolated from fewer steps."
    return text


def levels(rows: Sequence[Row]) -> str:
    """How many times faster than torch eager, by a CPU's instruction set and threads."""
    speeds: dict[tuple[str, int], list[tuple[float, Row]]] = {}
    for row in rows:
        eager = find(rows, row, EAGER)
        speed = ratio_of(eager, row) if eager else None
        if row.implementation == OURS and row.isa and row.cache == "flushed" and speed:
            speeds.setdefault((row.isa, row.threads), []).append((speed, row))
    table = [["instruction set", "threads", "cases", "median", "least", "in"]]
    for (isa, threads), here in speeds.items():
        least, where = min(here, key=lambda pair: pair[0])
        middle = statistics.median(speed for speed, _ in here)
        case = f"`{where.function}` {case_name(where)} {where.dtype} {where.direction}"
        counts = str(threads), str(len(here))
        table.append([isa, *counts, f"{number(middle)}x", f"{number(least)}x", case])
    if not speeds:
        return ""
    return (
        "How many times longer torch eager takes, at the same instruction set or a higher one, out "
        "of cache:\n\n"
        f"{info.markdown(table)}"
    )


def calls(rows: Sequence[Row]) -> str:
    """Microseconds of a call on 8 tokens: what calling costs."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.implementation != OURS or row.size not in CALLS or row.dtype != "float32":
            continue
        if row.variant or row.median_ms is None:
            continue
        key = (row.function, row.direction)
        best[key] = min(best.get(key, row), row, key=lambda r: (-r.threads, r.median_ms or 0))
    table = [["8 tokens", "", "us", "eager", "torch.compile"]]
    for row in best.values():
        others = find(rows, row, EAGER), find(rows, row, ("compile", "chunked compile"))
        cells = [f"{1e3 * r.median_ms:.1f}" if r and r.median_ms else "" for r in (row, *others)]
        table.append([f"`{row.function}`", row.direction, *cells])
    return info.markdown(table) if best else ""
