"""The tests of the emulated CUDA kernels, with the kernels under a sanitizer.

    python python_tests/cuda_sanitized.py address,undefined
    python python_tests/cuda_sanitized.py thread python_tests/test_cube.py -k "gae and cuda"

What follows the sanitizer goes to pytest; without it, all tests of the kernels run. For races the
threads take turns in a shuffled order, unless a test asks for another. All tests are shared out
over a process for each core, which its first report ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cuda_emulator import build

TESTS = Path(__file__).parent
WHICH = "cuda and not compile and not opcheck"  # which test a compiler more than a kernel
ONE_THREAD = " and not threads"  # of torch: its own race, for all that ThreadSanitizer sees


def everything(sanitize: str) -> list[str]:
    """The cells of the cube, the tests of the ops, the kernels' own."""
    files = [TESTS / "test_cube.py", *sorted(TESTS.glob("test_cuda_*.py"))]
    files += [p for p in sorted(TESTS.glob("test_*.py")) if "from device import" in p.read_text()]
    about_tools = ("test_cuda_emulator.py", "test_cuda_resources.py", "test_cuda_sanitized.py")
    which = WHICH + ONE_THREAD * (sanitize == "thread")
    return [str(path) for path in files if path.name not in about_tools] + ["-k", which]


def run(
    sanitize: str, arguments: Sequence[str], shard: str = "1/1", **more: Any
) -> subprocess.CompletedProcess:
    """Run pytest; `more` goes to subprocess.run."""
    environment = build.environment(sanitize) | {
        "PPO_KERNELS_EMULATOR_SANITIZE": sanitize,
        "PPO_KERNELS_TEST_SHARD": shard,
    }
    if sanitize == "thread":
        environment["OMP_NUM_THREADS"] = "1"
        environment["CUDA_EMULATOR_THREAD_ORDER"] = "shuffled"
        environment["TSAN_OPTIONS"] += f":suppressions={build.HERE / 'thread_sanitizer.txt'}"
    # A report goes to the process's own standard error, which --capture=fd would swallow.
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys"]
    command = [*build.prefix(sanitize), *pytest, *arguments]
    return subprocess.run(command, env=environment, **more)


def run_everything(sanitize: str) -> int:
    cores = os.cpu_count() or 1
    shards = [f"{i + 1}/{cores}" for i in range(cores)]
    with ThreadPoolExecutor(len(shards)) as pool:
        runs = pool.map(lambda shard: run(sanitize, everything(sanitize), shard), shards)
        return max(abs(done.returncode) for done in runs)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in build.SANITIZERS:
        print(f"usage: cuda_sanitized.py {' | '.join(filter(None, build.SANITIZERS))} [pytest ...]")
        return 2
    if reason := build.unavailable():
        print(f"cuda_sanitized.py: not run, {reason}")
        return 0
    import ppo_kernels  # noqa: F401  # built without a sanitizer in the compiler

    if len(sys.argv) == 2:
        return run_everything(sys.argv[1])
    return run(sys.argv[1], sys.argv[2:]).returncode


if __name__ == "__main__":
    sys.exit(main())
