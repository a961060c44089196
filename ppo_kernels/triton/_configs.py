"""Tile sizes of every kernel, by shape class.

A result's bits follow from the `block` and the `segment`, so a class is made of the size and dtype
of one row alone, never of the number of rows, alignment or strides. Not yet measured on a GPU: the
values are those that compile without spills, with 128-bit loads and with at least three programs to
a multiprocessor.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """A program handles `block` columns at a time; `segment` columns (a multiple) are one unit.

    Warps are of 32 lanes. Where they have 64 (AMD) half as many run: a lane then has enough columns
    for 128-bit loads of half precision. Without `max_registers` NVIDIA's assembler spills to raise
    the occupancy.
    """

    block: int
    num_warps: int
    segment: int = 0
    max_registers: int = 168


class Table(NamedTuple):
    """The first entry whose bound is at least the size serves it; the last serves the rest."""

    entries: tuple[tuple[int, Config], ...]
    largest: Config

    def choose(self, size: int) -> Config:
        return next((config for bound, config in self.entries if size <= bound), self.largest)


# By columns; segments are also the units of work for few rows.
LOGPROB_FORWARD = Table(
    ((256, Config(256, 1, 256)), (1024, Config(1024, 4, 1024))), Config(2048, 4, 32768)
)
LOGPROB_BACKWARD = Table(((256, Config(256, 1)), (1024, Config(1024, 4))), Config(2048, 4))
# fp64 takes twice the registers.
LOGPROB_FORWARD_FP64 = Table(((256, Config(256, 1, 256)),), Config(1024, 8, 32768))
LOGPROB_BACKWARD_FP64 = Table(((256, Config(256, 1)),), Config(1024, 8))

# Kernels without a block: a program is a few scalars.
ONE_WARP = Config(1, 1)

# By neighbouring outputs: a program adds `block` of them over `segment` elements of each.
REDUCE = Table(((1, Config(1, 4, 4096)), (16, Config(16, 4, 1024))), Config(64, 4, 512))
# Tokens that have one state of the moments, and are whitened by one program.
MOMENTS = Config(1024, 4)
WHITEN = Config(1024, 4)
# States merged at a time.
MERGE_MOMENTS = Config(1024, 4)

# By columns: two rows of logits at a time, so half the columns of a log-probability's.
KL_FORWARD = Table(((256, Config(256, 1, 256)),), Config(1024, 4, 32768))
KL_FORWARD_FP64 = Table(((256, Config(256, 2, 256)),), Config(512, 4, 32768))
KL_BACKWARD = Table(((256, Config(256, 1)),), Config(1024, 4))
KL_BACKWARD_FP64 = Table(((256, Config(256, 1)),), Config(512, 4))


# Kernels that walk over all tokens: the size of one program, whatever the number of tokens.
TOKENS = Config(1024, 4)
TOKENS_FP64 = Config(512, 4)
# Sums of one number per block or per sequence.
COUNTS = Config(1024, 4)

# A block of steps; a segment is the chunk that is scanned from zero, and the rest of the block is
# what a program writes. With every option a scan needs the registers of a whole multiprocessor;
# a plain one takes half of them.
SCAN = Config(1024, 8, 256, 255)
