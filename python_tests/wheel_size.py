"""How long the package builds and how large its wheel is, for no GPU, one and all.

    python python_tests/wheel_size.py

Needs nvcc, scikit-build-core and pybind11; prints the table of README.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALL = "75-real;80-real;86-real;90-real;100-real;120"
DEFINES = {
    "none": ["PPO_KERNELS_CUDA=OFF"],
    "80 and its PTX": ["PPO_KERNELS_CUDA=ON", "PPO_KERNELS_CUDA_ARCHS=80"],
    ALL: ["PPO_KERNELS_CUDA=ON", f"PPO_KERNELS_CUDA_ARCHS={ALL}"],
}


def measure(defines: list[str]) -> tuple[float, float]:
    """Seconds, and megabytes of the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"-Cbuild-dir={folder}/build", *(f"-Ccmake.define.{d}" for d in defines)]
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        begin = time.monotonic()
        subprocess.run([*pip, *options, "-w", folder, str(ROOT)], check=True)
        seconds = time.monotonic() - begin
        (wheel,) = Path(folder).glob("*.whl")
        return seconds, wheel.stat().st_size / 1e6


def main() -> None:
    print(f"| GPU architectures | s to build, on {os.cpu_count()} cores | MB of the wheel |")
    print("|---|---|---|")
    for name, defines in DEFINES.items():
        seconds, megabytes = measure(defines)
        print(f"| {name} | {seconds:.0f} | {megabytes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
