"""`make gpu-check`: every op tested on a GPU, and how fast it is there. Under 9 minutes.

    python python_tests/gpu_check.py [--minutes 9] [--out benchmarks/results/DEVICE]

Runs with the Python it is started with, which needs a CUDA (or ROCm) build of torch, Triton, pytest
and hypothesis, and no network. What is tested is the ppo_kernels that is installed there; without
one, the source tree, which has no compiled part.

The steps stand in the order of what they tell. Each has its share of the time and what those before
it left over; one that fails, hangs or runs out of time stops no other. After each step the folder
holds what is known so far: gpu_check.md, logs/, and the results of the benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

TESTS = Path(__file__).parent
ROOT = TESTS.parent
MINUTES = 9.0
SPARE = 20.0  # seconds for starting, and for stopping the last step
GRACE = 10.0  # seconds between asking a process to stop and killing it
NO_TESTS = 5  # pytest's status where none of the chosen ones is in this part
BACKENDS = "triton or cuda"
PYTEST = (sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", "-k")
BENCH = (sys.executable, "-m", "ppo_kernels", "bench", "--device", "cuda", "--seconds", "0.1")
WITHOUT_INDUCTOR = "eager,eager logsumexp,loop,chunked,linear_cross_entropy"
WITH_INDUCTOR = "eager,compile,chunked compile"
# What a failed test, a lost GPU and a wrong result of ours look like in a log.
FAILURE = re.compile(
    r"^(?:FAILED|ERROR) .*|^!+ (?!KeyboardInterrupt).*|.*: ppo_kernels (?:wrong|failed): .*", re.M
)


class Step(NamedTuple):
    """A command with `seconds` of the nine minutes.

    `device`: where the op tests make their tensors. `parallel`: the tests are shared out over
    several processes. `partial`: what is done when the time is over is a result.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    device: str = "cpu"
    parallel: bool = False
    partial: bool = False


def on_device() -> list[str]:
    """The test files whose tensors PPO_KERNELS_TEST_DEVICE moves."""
    paths = sorted(TESTS.glob("test_*.py"))
    return [str(p) for p in paths if re.search(r"^from device import", p.read_text(), re.M)]


def steps(out: Path) -> list[Step]:
    of_triton = [str(p) for p in TESTS.glob("test_triton*.py") if p.stem != "test_triton_compile"]
    bench = (*BENCH, "--out", str(out), "--baselines")
    return [
        Step("streams, graphs, compilers", 50, (*PYTEST, "not 2_31", *of_triton), parallel=True),
        Step("cube", 150, (*PYTEST, BACKENDS, str(TESTS / "test_cube.py")), parallel=True),
        Step("tests of the ops", 110, (*PYTEST, BACKENDS, *on_device()), "cuda", parallel=True),
        Step("sizes past 2^31", 60, (*PYTEST, "2_31", *of_triton)),
        Step("benchmark", 110, (*bench, WITHOUT_INDUCTOR), partial=True),
        Step("benchmark with Inductor", 40, (*bench, WITH_INDUCTOR), partial=True),
    ]


# ---- one step ------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    step: Step
    verdict: str
    seconds: float
    counts: str
    failures: list[str]

    @property
    def good(self) -> bool:
        return self.verdict == "ok" or (self.step.partial and self.verdict == "stopped")


def run(step: Step, processes: int, deadline: float, log: Path) -> Outcome:
    """Run a step until `deadline` (of time.monotonic), all its output in `log`."""
    begin = time.monotonic()
    parts = processes if step.parallel else 1
    paths = [log.with_suffix(f".{i}") for i in range(1, parts + 1)]
    running = [_start(step, f"{i}/{parts}", path) for i, path in enumerate(paths, 1)]
    verdict = "ok" if _ended(running, deadline) else "stopped"
    _signal(running, signal.SIGINT)
    if not _ended(running, time.monotonic() + GRACE):
        verdict = "killed"
        _signal(running, signal.SIGKILL)
    codes = {process.wait() for process in running}
    texts = [path.read_text(errors="replace") for path in paths]
    log.write_text("\n".join(texts))
    for path in paths:
        path.unlink()
    failures = [match[0].strip() for text in texts for match in FAILURE.finditer(text)]
    if failures or (verdict == "ok" and not codes <= {0, NO_TESTS}):
        verdict = "failed"
    return Outcome(step, verdict, time.monotonic() - begin, _counts(texts), failures)


def _start(step: Step, part: str, log: Path) -> subprocess.Popen[bytes]:
    environment = {
        "PPO_KERNELS_TEST_DEVICE": step.device,
        "PPO_KERNELS_TEST_SHARD": part,
        "OMP_NUM_THREADS": "2",
        "PYTHONUNBUFFERED": "1",
    }
    if find_spec("ppo_kernels") is None:
        paths = (str(ROOT), os.environ.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with log.open("wb") as file:
        return subprocess.Popen(
            step.command,
            cwd=TESTS,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _ended(running: list[subprocess.Popen[bytes]], deadline: float) -> bool:
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0.01))
    return all(process.returncode is not None for process in running)


def _signal(running: list[subprocess.Popen[bytes]], how: signal.Signals) -> None:
    """To what still runs, with what it started."""
    for process in running:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)


def _counts(texts: list[str]) -> str:
    """What pytest says at its end, added up."""
    total: Counter[str] = Counter()
    for text in texts:
        for count, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", text[-300:]):
            total[what] += int(count)
    return ", ".join(f"{count} {what}" for what, count in total.items())


# ---- all of them ---------------------------------------------------------------------------------


def check(
    planned: Sequence[Step], out: Path, facts: dict[str, str], minutes: float, processes: int
) -> bool:
    """Run the steps, and write the report after each. Whether all were good."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    end = time.monotonic()
    scale = (60 * minutes - SPARE) / sum(step.seconds for step in planned)
    outcomes: list[Outcome] = []
    for step in planned:
        end += scale * step.seconds
        log = out / "logs" / (re.sub(r"[^a-z0-9]+", "-", step.name.lower()) + ".log")
        outcomes.append(run(step, processes, end, log))
        (out / "gpu_check.md").write_text(report(facts, outcomes, planned))
        print(_line(outcomes[-1]), *outcomes[-1].failures[:9], sep="\n  ", flush=True)
    return all(outcome.good for outcome in outcomes)


def report(facts: dict[str, str], outcomes: list[Outcome], planned: Sequence[Step]) -> str:
    lines = [f"# {facts['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if name != "device"]
    lines += ["", "| step | | s | tests |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(_cells(outcome))} |" for outcome in outcomes]
    lines += [f"| {step.name} | not yet run | | |" for step in planned[len(outcomes) :]]
    for outcome in outcomes:
        if outcome.failures:
            lines += ["", f"## {outcome.step.name}", "", "```", *outcome.failures, "```"]
    return "\n".join(lines) + "\n"


def _cells(outcome: Outcome) -> tuple[str, ...]:
    return outcome.step.name, outcome.verdict, f"{outcome.seconds:.0f}", outcome.counts


def _line(outcome: Outcome) -> str:
    name, verdict, seconds, counts = _cells(outcome)
    return f"{name}: {verdict} ({seconds} s) {counts}"


def gpu() -> dict[str, str]:
    """The device and what runs on it."""
    import triton

    here = torch.cuda.get_device_properties(0)
    return {
        "device": torch.cuda.get_device_name(0),
        "memory": f"{here.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} device(s)",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}",
        "triton": triton.__version__,
        "Python": platform.python_version(),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return ", ".join(dict.fromkeys(run.stdout.split("\n"))).strip(", ") or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here", file=sys.stderr)
        return 2
    facts = gpu()
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    out = (asked.out or ROOT / "benchmarks/results" / name).resolve()
    # Most of a test's time is that of a compiler, on one core; each process takes some memory.
    memory = torch.cuda.get_device_properties(0).total_memory >> 30
    processes = max(1, min((os.cpu_count() or 1) - 2, 12, memory // 6))
    return 0 if check(steps(out), out, facts, asked.minutes, processes) else 1


if __name__ == "__main__":
    sys.exit(main())
