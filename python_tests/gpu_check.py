"""`make gpu-check`: every op tested on a GPU, and how fast it is there. Under 9 minutes.

    python python_tests/gpu_check.py [--minutes 9] [--out benchmarks/results/DEVICE]

Runs with the Python it is started with, which needs a CUDA (or ROCm) build of torch, Triton, pytest
and hypothesis, and no network. The package is built for this GPU, of what is installed here and
into build/gpu_check. What is missing for that is named, and the source tree is tested, which has
Triton's kernels alone. (An editable install is tested as it is: it builds itself.)

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
import shutil
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
SITE = ROOT / "build/gpu_check/site"  # of the package that is tested
MINUTES = 9.0
SPARE = 20.0  # seconds for starting, and for stopping the last step
GRACE = 10.0  # seconds between asking a process to stop and killing it
NO_TESTS = 5  # pytest's status where none of the chosen ones is in this part
BACKENDS = "triton or cuda"
# Kernels of ours, at shapes with some blocks each: under a sanitizer they take many times as long.
SANITIZED = "cuda and contiguous and (float32 or bfloat16) and (prime or several or packed)"
PYTEST = (sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", "-k")
BENCH = (sys.executable, "-m", "ppo_kernels", "bench", "--device", "cuda", "--seconds", "0.1")
WITHOUT_INDUCTOR = (
    "eager,eager logsumexp,eager gathered,loop,chunked,checkpointed,linear_cross_entropy,"
    "ours from all logits,ours in parts,trl,verl,liger"
)
WITH_INDUCTOR = "eager,compile,chunked compile"
# What a failed test, a lost GPU, a wrong result of ours and a sanitizer's sum look like in a log.
FAILURE = re.compile(
    r"^(?:FAILED|ERROR) .*|^!+ (?!KeyboardInterrupt).*|.*: ppo_kernels (?:wrong|failed): .*"
    r"|^=+ (?:ERROR|RACECHECK) SUMMARY: [1-9].*",
    re.M,
)


class Step(NamedTuple):
    """A command with `seconds` of the nine minutes.

    `device`: where the op tests make their tensors. `parallel`: the tests are shared out over
    several processes. `partial`: what is done when the time is over is a result. `missing`: what
    it cannot do without, and does not find here; it is not run. `optional`: nor is that a failure.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    device: str = "cpu"
    parallel: bool = False
    partial: bool = False
    missing: str = ""
    optional: bool = False


def on_device() -> list[str]:
    """The test files whose tensors PPO_KERNELS_TEST_DEVICE moves."""
    paths = sorted(TESTS.glob("test_*.py"))
    return [str(p) for p in paths if re.search(r"^from device import", p.read_text(), re.M)]


def steps(out: Path, architecture: str) -> list[Step]:
    of_gpus = [str(p) for p in TESTS.glob("test_triton*.py") if p.stem != "test_triton_compile"]
    of_gpus.append(str(TESTS / "test_gpu.py"))
    bench = (*BENCH, "--out", str(out), "--baselines")
    of_cuda = (*bench, "none", "--backend", "cuda")
    build = package(architecture)
    return [
        *([] if is_editable() else [build]),
        Step("streams, graphs, compilers", 45, (*PYTEST, "not 2_31", *of_gpus), parallel=True),
        Step("cube", 115, (*PYTEST, BACKENDS, str(TESTS / "test_cube.py")), parallel=True),
        Step("tests of the ops", 85, (*PYTEST, BACKENDS, *on_device()), "cuda", parallel=True),
        Step("sizes past 2^31", 50, (*PYTEST, "2_31", *of_gpus)),
        *map(sanitizer, ("memcheck", "racecheck", "synccheck")),
        Step("benchmark", 60, (*bench, WITHOUT_INDUCTOR), partial=True),
        Step("benchmark of CUDA", 20, of_cuda, partial=True, missing=build.missing),
        Step("benchmark with Inductor", 25, (*bench, WITH_INDUCTOR), partial=True),
    ]


def is_editable() -> bool:
    """Whether an installed package would be the source tree: it precedes any other."""
    found = find_spec("ppo_kernels")
    return bool(found and found.origin and Path(found.origin).is_relative_to(ROOT / "ppo_kernels"))


def package(architecture: str) -> Step:
    """Build ppo_kernels for one GPU, as `pip install .` does, from what is here."""
    missing = [name for name in ("nvcc", "c++") if program(name) is None]
    missing += [name for name in ("cmake", "ninja") if not (program(name) or find_spec(name))]
    missing += [name for name in ("pip", "pybind11", "scikit_build_core") if not find_spec(name)]
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps")
    options = ("--no-build-isolation", "--upgrade", "--target", str(SITE))
    defines = ("PPO_KERNELS_CUDA=ON", f"PPO_KERNELS_CUDA_ARCHS={architecture}-real")
    settings = (f"-Cbuild-dir={SITE.parent}/cmake", *(f"-Ccmake.define.{d}" for d in defines))
    command = ("env", f"CUDACXX={program('nvcc')}", *pip, *options, *settings, str(ROOT))
    if torch.version.hip:
        missing = ["a CUDA build of torch"]
    return Step("build", 60, command, missing=", ".join(missing))


def program(name: str) -> str | None:
    """On PATH, beside the Python in use, or of the CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]
    folders += [str(Path(nvcc).resolve().parent)] if nvcc else []
    folders.append("/usr/local/cuda/bin")
    return shutil.which(name, path=os.pathsep.join(folders))


def sanitizer(tool: str) -> Step:
    """Some cells of the cube under a tool of compute-sanitizer, our kernels alone."""
    found = program("compute-sanitizer")
    options = ("--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no")
    ours = ("--kernel-name", "kns=4ppok4cuda")  # of a mangled name
    tests = (*PYTEST, SANITIZED, str(TESTS / "test_cube.py"))
    # With torch's cache an access past the end of a tensor would still be one to its memory.
    uncached = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    command = (*uncached, found or tool, *options, *ours, *tests)
    missing = "" if found else "compute-sanitizer"
    return Step(tool, 20, command, partial=True, missing=missing, optional=True)


# ---- one step ------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    step: Step
    verdict: str
    seconds: float
    counts: str
    failures: list[str]

    @property
    def good(self) -> bool:
        if self.step.missing:
            return self.step.optional
        return self.verdict == "ok" or (self.step.partial and self.verdict == "stopped")


def run(step: Step, processes: int, deadline: float, log: Path) -> Outcome:
    """Run a step until `deadline` (of time.monotonic), all its output in `log`."""
    if step.missing:
        return Outcome(step, f"not run: no {step.missing}", 0.0, "", [])
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
        failures = failures or [line for line in texts[0].splitlines() if line.strip()][-5:]
    return Outcome(step, verdict, time.monotonic() - begin, _counts(texts), failures)


def _start(step: Step, part: str, log: Path) -> subprocess.Popen[bytes]:
    environment = {
        "PPO_KERNELS_TEST_DEVICE": step.device,
        "PPO_KERNELS_TEST_SHARD": part,
        "OMP_NUM_THREADS": "2",
        "PYTHONUNBUFFERED": "1",
    }
    if not is_editable():
        package = SITE if (SITE / "ppo_kernels").exists() else ROOT
        paths = (str(package), os.environ.get("PYTHONPATH"))
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
    shutil.rmtree(SITE, ignore_errors=True)
    out = (asked.out or ROOT / "benchmarks/results" / name).resolve()
    architecture = "".join(map(str, torch.cuda.get_device_capability(0)))
    # Most of a test's time is that of a compiler, on one core; each process takes some memory.
    memory = torch.cuda.get_device_properties(0).total_memory >> 30
    processes = max(1, min((os.cpu_count() or 1) - 2, 12, memory // 6))
    return 0 if check(steps(out, architecture), out, facts, asked.minutes, processes) else 1


if __name__ == "__main__":
    sys.exit(main())
