"""What the package takes to build and how large its wheel is: for no GPU, one and all.

    python python_tests/wheel_size.py

Needs nvcc, scikit-build-core and pybind11; prints the table of README.md. Time is that of all cores
together, which other work on the machine hardly changes.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALL = "75-real;80-real;86-real;90-real;100-real;120"
DEFINES = {
    "none": ["PPO_KERNELS_CUDA=OFF"],
    "80 and its PTX": ["PPO_KERNELS_CUDA=ON", "PPO_KERNELS_CUDA_ARCHS=80"],
    ALL: ["PPO_KERNELS_CUDA=ON", f"PPO_KERNELS_CUDA_ARCHS={ALL}"],
}


def measure(defines: list[str]) -> tuple[float, float]:
    """Seconds of processor time, and megabytes of the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"-Cbuild-dir={folder}/build", *(f"-Ccmake.define.{d}" for d in defines)]
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*pip, *options, "-w", folder, str(ROOT)], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (wheel,) = Path(folder).glob("*.whl")
        seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return seconds, wheel.stat().st_size / 1e6


def main() -> None:
    print("| GPU architectures | processor seconds to build | MB of the wheel |")
    print("|---|---|---|", flush=True)
    for name, defines in DEFINES.items():
        seconds, megabytes = measure(defines)
        print(f"| {name} | {seconds:.0f} | {megabytes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
