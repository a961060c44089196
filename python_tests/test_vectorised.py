"""The inner loops of the compiled kernels are vector code: read from their disassembly.

A compiler that stops to vectorise a loop changes no result, and no test of results notices.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
TAG = sys.implementation.cache_tag.replace("cpython-", "cp")
BUILDS = list(ROOT.glob(f"build/{TAG}-*/CMakeFiles"))
pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump on this machine"),
    pytest.mark.skipif(not BUILDS, reason="no objects: not an editable install"),
]

VECTOR = {"avx2": "ymm", "avx512": "zmm"}
# An arithmetic instruction on one float or double; moves and conversions of addresses do not count.
SCALAR = re.compile(r"v?(add|sub|mul|div|sqrt|max|min|fn?m(add|sub)\d*)s[sd]\b")


class Loop(NamedTuple):
    """What one inner loop must hold: so many instructions that match, on whole vectors."""

    source: str
    what: str
    holds: dict[str, int]
    scalars: bool = False  # a loop that also holds the code for its last, shorter turn


FUSED, WIDENED = r"vfn?m(add|sub)\d+p[sd]", r"vcvtps2pd"
LOOK_UP, STORED = r"vperm(d|[it]2d)", r"vmovup[sd] %\wmm\d+,.*\("
LOOPS = [
    Loop("logprob", "sums of a chunk", {LOOK_UP: 4, FUSED: 12, r"vmaxps": 4}),
    Loop("logprob", "gradient", {LOOK_UP: 1, FUSED: 3, STORED: 1}),
    Loop("categorical_kl", "sums of two chunks", {LOOK_UP: 8, FUSED: 36, r"vmaxps": 20}),
    Loop("categorical_kl", "gradient of the second", {LOOK_UP: 4, FUSED: 25, STORED: 2}),
    Loop("losses", "clipped loss", {FUSED: 15, WIDENED: 4, r"vmaxps": 2}),
    Loop("kl", "k3", {FUSED: 5}),
    Loop("scan", "blocks", {FUSED: 3, r"valignq|vperm(pd|2f128)|vblendpd": 2}, scalars=True),
    Loop("moments", "sum of squares", {WIDENED: 2, r"vfn?m(add|sub)\d+pd|vmulpd": 2}),
]


def inner_loops(assembly: str) -> list[list[str]]:
    """The bodies of all loops without a loop inside, as instructions."""
    instructions, index, loops = [], {}, []
    for line in assembly.splitlines():
        if match := re.match(r"\s*([0-9a-f]+):\s+(.*\S)", line):
            index[match[1]] = len(instructions)
            instructions.append(match[2])
    jumps = []
    for end, text in enumerate(instructions):
        match = re.match(r"j\w+\s+([0-9a-f]+)", text)
        begin = index.get(match[1]) if match else None
        if begin is not None and begin <= end:
            jumps.append((begin, end))
    for begin, end in jumps:
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in jumps):
            loops.append(instructions[begin : end + 1])
    return loops


def is_vectorised(body: list[str], loop: Loop, register: str) -> bool:
    on_vectors = [text for text in body if f"%{register}" in text]
    found = all(
        sum(bool(re.match(pattern, text)) for text in on_vectors) >= least
        for pattern, least in loop.holds.items()
    )
    return found and (loop.scalars or not any(SCALAR.match(text) for text in body))


def loops_of(path: Path) -> list[list[str]]:
    loops = []
    run = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    )
    for function in run.stdout.split("\n\n"):  # addresses begin anew in every section
        loops += inner_loops(function)
    return loops


def objects(source: str, isa: str) -> Path:
    path = BUILDS[0] / f"kernels_{isa}.dir/csrc/cpu/{source}.cpp.o"
    if not path.exists():
        pytest.skip(f"this platform has no {isa} level")
    return path


@pytest.mark.parametrize("isa", VECTOR)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: f"{loop.source}-{loop.what}")
def test_inner_loops_are_vector_code(loop, isa):
    bodies = loops_of(objects(loop.source, isa))
    assert any(is_vectorised(body, loop, VECTOR[isa]) for body in bodies), (
        f"none of the {len(bodies)} inner loops of {loop.source} ({isa}) holds {loop.holds} on "
        f"{VECTOR[isa]} registers"
    )


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: f"{loop.source}-{loop.what}")
def test_the_generic_level_does_not_pass_for_one_of_them(loop):
    """The test above can fail."""
    bodies = loops_of(objects(loop.source, "generic"))
    assert bodies
    assert not any(is_vectorised(body, loop, name) for body in bodies for name in VECTOR.values())
