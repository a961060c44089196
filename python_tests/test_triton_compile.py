"""Compiled for GPUs that are not here: what the public functions launch, and the records of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process compiles nothing", allow_module_level=True)

import compile_ladder as ladder
import triton

FAMILIES = sorted({launch.family for launch in ladder.LAUNCHES})
RECORD_AGAIN = "run `python python_tests/compile_ladder.py --record`"


def test_representative_launches_compile_within_the_records():
    """No spills, shared memory under the limit, 128-bit loads, nothing above the record."""
    run = subprocess.run(
        [sys.executable, ladder.__file__, "--quick"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert sum(launch.quick for launch in ladder.LAUNCHES) >= len(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_records_belong_to_the_sources(family):
    recorded = ladder.record(family)
    assert recorded["sources"] == ladder.sources(family), RECORD_AGAIN
    launched = {launch.label for launch in ladder.LAUNCHES if launch.family == family}
    keys = [key.split(" | ") for key in recorded["kernels"]]
    assert {label for label, _, _ in keys} == launched, RECORD_AGAIN
    assert {target for _, _, target in keys} == set(ladder.TARGETS)
    assert ladder.problems(recorded["kernels"], {}) == []


def test_the_pinned_triton_is_the_recorded_one():
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    for family in FAMILIES:
        assert f'"triton=={ladder.record(family)["triton"]}"' in pyproject
    if triton.__version__ not in pyproject:
        pytest.skip(f"triton {triton.__version__} is installed, not the pinned one")


def test_sums_do_not_follow_the_registers():
    """tl.sum, tl.cumsum and tl.dot add in the order of the layout, hence of the alignment."""
    for path in ladder.SOURCES.glob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code, _, comment = line.partition("#")
            if re.search(r"\btl\.(sum|cumsum|dot)\(", code):
                assert "exact" in comment, f"{path.name}:{number}: use tree_sum, or say why not"


@pytest.mark.parametrize("target", ladder.TARGETS)
def test_contiguous_half_precision_has_128_bit_loads(target):
    for family, label, kernel in (
        ("losses", "clipped_loss bfloat16 [8, 1024]", "policy_kernel"),
        ("losses", "value_loss float16 [65536]", "value_kernel"),
        ("losses", "importance_weights tis bfloat16 [8, 1024]", "importance_kernel"),
        ("kl", "k3 bfloat16 [8, 1024]", "slope_kernel"),
        ("moments", "whiten bfloat16 rows=64", "whiten_kernel"),
    ):
        use = ladder.record(family)["kernels"][f"{label} | {kernel} | {target}"]
        assert use["wide_loads"], f"{label}: {kernel}"


GOOD = {"registers": 64, "local": 0, "shared": 1024, "wide_loads": 2, "wide_stores": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 60, "wide_loads": 1}, None),
        ({"local": 8}, "spills, 8 bytes"),
        ({"shared": 65 << 10}, "66560 bytes of shared memory, the limit is 65536"),
        ({"registers": 65}, "registers 65, recorded 64"),
        ({"shared": 1025}, "shared 1025, recorded 1024"),
        ({"wide_loads": 0}, "wide_loads 0, recorded 2"),
        ({"wide_stores": 0}, "wide_stores 0, recorded 1"),
        ({"missing_wide_loads": 1}, "no 128-bit loads"),
    ],
)
def test_a_regression_is_a_problem(change, message):
    key = "call | kernel | gfx942"
    wrong = ladder.problems({key: GOOD | change}, {key: GOOD})
    if message is None:
        assert wrong == []
    else:
        assert any(w.startswith(key) and message in w for w in wrong)


def test_of_two_launches_of_a_kernel_the_worse_counts():
    other = GOOD | {"registers": 90, "shared": 0, "wide_stores": 0, "missing_wide_loads": 1}
    worse = GOOD | {"registers": 90, "wide_stores": 0, "missing_wide_loads": 1}
    assert ladder._worse(GOOD, other) == ladder._worse(other, GOOD) == worse
