"""Peak memory of one call beyond its inputs.

On CPU a second process makes the inputs, makes the call once, and then has the kernel's high-water
mark of resident memory (VmHWM) reset before the call that counts. That includes what C++ allocates
for itself. glibc is told to give freed memory back at once, so that no call reuses pages of the one
before. Outputs and gradients count; pages are counted when they are touched.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..testing import Inputs
from .timing import Call

RESET = Path("/proc/self/clear_refs")
TIMEOUT = 300.0


class Meter:
    """A process that measures; started by the first question, and again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: dict[str, Any]) -> int:
        """Peak bytes of the call the question describes. Raises RuntimeError with the reason."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ppo_kernels.bench.memory"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"},
                start_new_session=True,  # Ctrl-C is for the parent
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
            line = self._process.stdout.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.close()
            raise RuntimeError(f"the measuring process ended or hung (exit status {code})")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return int(answer["bytes"])

    def close(self) -> int | None:
        if self._process is None:
            return None
        self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None
        return code


def peak_on_cuda(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(call: Call) -> int:
    call()
    peaks = []
    for _ in range(2):  # the first may still fault in code and thread stacks
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")
        before = _resident("VmRSS")
        kept = call()
        peaks.append(_resident("VmHWM") - before)
        del kept
    return max(0, min(peaks))


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")


def _serve() -> None:
    """Answer questions, one line of JSON each, until stdin ends."""
    from .run import Contender, find_job, make_call

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a package prints is no answer
    job_now, inputs = None, Inputs()
    device = torch.device("cpu")
    for line in sys.stdin:
        question = json.loads(line)
        try:
            job = find_job(**question["job"])
            torch.set_num_threads(question["threads"])
            if job != job_now:
                inputs = Inputs()  # frees the last job's first
                inputs, job_now = job.inputs(device), job
            contender = Contender(job, **question["contender"])
            with contender.context():
                peak = peak_on_cpu(make_call(job, contender.load(device), inputs))
            answer: dict[str, int | str] = {"bytes": peak}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
