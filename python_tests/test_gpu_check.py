"""What `make gpu-check` does around its steps, with steps that need no GPU."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import gpu_check
import pytest
import torch
from gpu_check import Step

from ppo_kernels.bench import cli
from ppo_kernels.testing import CASES

FACTS = {"device": "a GPU", "driver": "1.2"}


def python(name, code, seconds=30, **more):
    return Step(name, seconds, (sys.executable, "-c", code), **more)


def run(step, tmp_path, seconds=30.0, processes=1):
    deadline = time.monotonic() + seconds
    return gpu_check.run(step, processes, deadline, tmp_path / "step.log")


def test_every_step_runs_and_the_report_grows(tmp_path, capsys):
    report, seen = tmp_path / "gpu_check.md", tmp_path / "seen"
    copy = f"import shutil; shutil.copy({str(report)!r}, {str(seen)!r})"
    steps = [
        python("first", "print('2 passed, 1 skipped in 0.10s')"),
        python("second", "print('FAILED a.py::b - why\\n1 failed, 3 passed in 1s'); exit(1)"),
        python("third", copy),
    ]
    assert not gpu_check.check(steps, tmp_path, FACTS, minutes=2, processes=1)
    assert "| first | ok |" in seen.read_text()
    assert "| second | failed |" in seen.read_text()
    assert "| third | not yet run |" in seen.read_text()
    final = report.read_text()
    assert final.startswith("# a GPU\n\n- driver: 1.2\n")
    assert "| third | ok |" in final
    assert "| 2 passed, 1 skipped |" in final
    assert "## second\n\n```\nFAILED a.py::b - why\n```" in final
    assert "second: failed" in capsys.readouterr().out
    assert gpu_check.check(steps[:1], tmp_path, FACTS, minutes=2, processes=1)


@pytest.mark.parametrize("partial", [False, True])
def test_a_step_is_stopped_when_its_time_is_over(tmp_path, partial):
    code = """
import time
try: time.sleep(60)
except KeyboardInterrupt: print("7 passed in 1s")
"""
    outcome = run(python("slow", code, partial=partial), tmp_path, 1.5)
    assert (outcome.verdict, outcome.counts) == ("stopped", "7 passed")
    assert outcome.good == partial
    assert outcome.seconds < 20


def test_a_step_that_hangs_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    outcome = run(python("deaf", code, partial=True), tmp_path, 1.5)
    assert outcome.verdict == "killed"
    assert not outcome.good
    assert outcome.seconds < 20


def test_what_a_step_leaves_over_goes_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "SPARE", 0.0)
    steps = [python("quick", "", 3), python("slow", "import time; time.sleep(3)", 1)]
    assert gpu_check.check(steps, tmp_path, FACTS, minutes=8 / 60, processes=1)


def test_tests_are_shared_out_over_processes(tmp_path):
    code = """
import os
print(os.environ["PPO_KERNELS_TEST_DEVICE"], os.environ["PPO_KERNELS_TEST_SHARD"])
print("5 passed in 1s")
"""
    outcome = run(python("parts", code, device="cuda", parallel=True), tmp_path, processes=3)
    assert (outcome.verdict, outcome.counts) == ("ok", "15 passed")
    assert [p.name for p in tmp_path.iterdir()] == ["step.log"]
    log = (tmp_path / "step.log").read_text()
    assert all(part in log for part in ("cuda 1/3", "cuda 2/3", "cuda 3/3"))


@pytest.mark.parametrize(
    ("status", "verdict"), [(0, "ok"), (gpu_check.NO_TESTS, "ok"), (1, "failed"), (3, "failed")]
)
def test_the_status_of_any_process_counts(tmp_path, status, verdict):
    code = f"import os; exit({status} if os.environ['PPO_KERNELS_TEST_SHARD'] == '2/2' else 0)"
    assert run(python("step", code, parallel=True), tmp_path, processes=2).verdict == verdict


@pytest.mark.parametrize(
    "line",
    [
        "ERROR a.py - ImportError",
        "!!!!! _pytest.outcomes.Exit: the GPU is lost after a.py::b !!!!!",
        "gae [8, 8] float32 forward: ppo_kernels wrong: output 0: 3 of 64 elements differ",
        "========= ERROR SUMMARY: 2 errors",
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
    ],
)
def test_a_failure_that_no_status_tells(tmp_path, line):
    outcome = run(python("step", f"print('x'); print({line!r})", partial=True), tmp_path)
    assert (outcome.verdict, outcome.failures) == ("failed", [line])


def test_a_sum_of_no_errors_is_none(tmp_path):
    assert (
        run(python("step", "print('========= ERROR SUMMARY: 0 errors')"), tmp_path).verdict == "ok"
    )


def test_of_a_failure_without_a_name_the_last_lines_are_shown(tmp_path):
    outcome = run(python("step", "print('compiling\\n\\nout of memory'); exit(1)"), tmp_path)
    assert outcome.failures == ["compiling", "out of memory"]


@pytest.mark.parametrize("optional", [False, True])
def test_a_step_that_lacks_something_is_not_run(tmp_path, optional):
    step = python("step", "print('FAILED')", missing="nvcc, pybind11", optional=optional)
    steps = [step, python("next", "print('1 passed')")]
    assert gpu_check.check(steps, tmp_path, FACTS, minutes=1, processes=1) == optional
    report = (tmp_path / "gpu_check.md").read_text()
    assert "| step | not run: no nvcc, pybind11 | 0 |" in report
    assert "| next | ok |" in report


@pytest.mark.parametrize("built", [False, True])
def test_what_was_built_is_tested_or_else_the_sources(tmp_path, monkeypatch, built):
    monkeypatch.setattr(gpu_check, "is_editable", lambda: False)
    monkeypatch.setattr(gpu_check, "SITE", tmp_path / "site")
    if built:
        (tmp_path / "site/ppo_kernels").mkdir(parents=True)
    outcome = run(python("step", "import os; print(os.environ['PYTHONPATH'])"), tmp_path)
    path = (tmp_path / "step.log").read_text().strip().split(":")[0]
    assert outcome.verdict == "ok"
    assert path == str(tmp_path / "site" if built else gpu_check.ROOT)


# ---- the real steps ------------------------------------------------------------------------------


def test_the_steps_fit_into_the_time_and_are_understood(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "is_editable", lambda: False)
    steps = gpu_check.steps(tmp_path, "90")
    assert sum(step.seconds for step in steps) <= 60 * gpu_check.MINUTES - gpu_check.SPARE
    assert len({step.name for step in steps}) == len(steps)
    benchmarks = [step for step in steps if "bench" in step.command]
    for step in benchmarks:
        asked = cli.parser().parse_args(step.command[step.command.index("bench") + 1 :])
        assert asked.device == "cuda"
    known = {name for b in cli.cases.BENCHMARKS.values() for name in b.baselines}
    named = f"{gpu_check.WITHOUT_INDUCTOR},{gpu_check.WITH_INDUCTOR}".split(",")
    assert known - set(named) <= {"linear_cross_entropy chunked"}
    assert {"build", "memcheck", "racecheck", "synccheck"} <= {step.name for step in steps}
    for step in steps:
        files = [word for word in step.command if word.endswith(".py")]
        assert all(Path(file).exists() for file in files)


def test_the_build_takes_what_is_there(monkeypatch):
    monkeypatch.setattr(gpu_check, "program", lambda name: f"/tools/{name}")
    step = gpu_check.package("90")
    assert step.missing == ""
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(step.command)
    assert "CUDACXX=/tools/nvcc" in step.command
    assert "-Ccmake.define.PPO_KERNELS_CUDA_ARCHS=90-real" in step.command


def test_the_build_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(gpu_check, "program", lambda name: None if name == "nvcc" else name)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: name if name == "pip" else None)
    assert gpu_check.package("90").missing == "nvcc, pybind11, scikit_build_core"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpu_check.package("90").missing == "a CUDA build of torch"


def test_the_sanitizers_see_our_kernels_and_some_cells(monkeypatch):
    monkeypatch.setattr(gpu_check, "program", lambda name: None)
    step = gpu_check.sanitizer("memcheck")
    assert (step.missing, step.optional) == ("compute-sanitizer", True)
    monkeypatch.setattr(gpu_check, "program", lambda name: f"/tools/{name}")
    assert gpu_check.sanitizer("memcheck").missing == ""
    for word in ("prime", "several", "packed"):
        assert word in gpu_check.SANITIZED
        assert any(word in case.id for case in CASES)


def test_an_editable_install_is_the_source_tree(monkeypatch):
    spec = SimpleNamespace(origin=str(gpu_check.ROOT / "ppo_kernels/__init__.py"))
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: spec)
    assert gpu_check.is_editable()
    spec.origin = "/usr/lib/python3/site-packages/ppo_kernels/__init__.py"
    assert not gpu_check.is_editable()
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    assert not gpu_check.is_editable()


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


# ---- what it relies on in conftest.py ------------------------------------------------------------


class Config:
    def __init__(self):
        self.hook, self.deselected = self, []

    def pytest_deselected(self, items):
        self.deselected += items


def test_parts_of_the_tests_are_all_of_them(monkeypatch):
    seen = []
    for part in range(1, 4):
        monkeypatch.setenv("PPO_KERNELS_TEST_SHARD", f"{part}/3")
        config, items = Config(), list(range(150))
        conftest.pytest_collection_modifyitems(config, items)
        assert sorted(items + config.deselected) == list(range(150))
        assert items[:20] == list(range(20 * part - 20, 20 * part))
        seen += items
    assert sorted(seen) == list(range(150))


def test_a_lost_gpu_ends_the_run(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Item:
        nodeid = "a.py::b"

    conftest.pytest_runtest_teardown(Item)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(pytest.exit.Exception, match=r"the GPU is lost after a\.py::b: CUDA"):
        conftest.pytest_runtest_teardown(Item)
