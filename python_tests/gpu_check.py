"""`make gpu-check`: the Triton backend on a GPU, and how fast it is there. Under 9 minutes.

    python python_tests/gpu_check.py [--minutes 9]

Runs with the Python it is started with, which needs a CUDA (or ROCm) build of torch, Triton, pytest
and hypothesis. The report and the timings go to benchmarks/results/DEVICE/. A step that does not
fit into the time left is reported as not run, and fails the check.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Name, seconds it is given, command, environment.
STEPS = [
    ("large tensors, streams, graphs, faults", 150, [*PYTEST, "python_tests/test_triton.py",
     "python_tests/test_triton_gpu.py"], {}),
    ("cube", 240, [*PYTEST, "python_tests/test_cube.py", "-k", "triton"], {}),
    ("log-probabilities", 150, [*PYTEST, "python_tests/test_logprob.py", "-k", "triton"],
     {"PPO_KERNELS_TEST_DEVICE": "cuda"}),
    ("benchmark", 180, [sys.executable, "-m", "ppo_kernels", "bench", "logprobs_from_logits",
     "--device", "cuda", "--backend", "triton"], {}),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    end = time.monotonic() + 60 * parser.parse_args().minutes
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    report = [
        f"# {device}",
        "",
        f"torch {torch.__version__}, {datetime.date.today()}, commit {_commit()}",
        "",
    ]
    failed = False
    for name, limit, command, environment in STEPS:
        begin = time.monotonic()
        left = min(limit, end - begin)
        outcome, last = "not run: out of time", ""
        if left > 10:
            outcome, last = _run(command, environment, left)
        failed |= outcome != "passed"
        report.append(f"- {name}: {outcome} ({time.monotonic() - begin:.0f} s) {last}")
        print(report[-1], flush=True)
    folder = ROOT / "benchmarks/results" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu_check.md").write_text("\n".join(report) + "\n")
    return int(failed)


def _run(command: list[str], environment: dict[str, str], limit: float) -> tuple[str, str]:
    try:
        run = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            timeout=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s", ""
    if run.returncode:
        print(run.stdout)
    lines = run.stdout.strip().splitlines()
    return "passed" if run.returncode == 0 else "FAILED", lines[-1] if lines else ""


def _commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
