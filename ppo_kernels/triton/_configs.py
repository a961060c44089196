"""Tile sizes of every kernel, by shape class.

A result's bits follow from the `block` and the `segment`, so a class is made of sizes and dtypes of
one row alone, never of the number of rows, alignment or strides. Not yet measured: the values are
those that compile without spills and with 128-bit loads for sm_80, sm_90, sm_100 and gfx942.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """A program handles `block` columns at a time; `segment` columns (a multiple) are one unit."""

    block: int
    num_warps: int
    segment: int = 0


class Table(NamedTuple):
    """The first entry whose bound is at least the size serves it; the last serves the rest."""

    entries: tuple[tuple[int, Config], ...]
    largest: Config

    def choose(self, size: int) -> Config:
        return next((config for bound, config in self.entries if size <= bound), self.largest)


LOGPROB_FORWARD = Table(
    ((256, Config(256, 1, 256)), (1024, Config(1024, 4, 1024))), Config(4096, 8, 32768)
)
LOGPROB_BACKWARD = Table(((256, Config(256, 1)), (1024, Config(1024, 4))), Config(4096, 8))

# Kernels without a block: one program is a few scalars.
ONE_WARP = Config(1, 1)
