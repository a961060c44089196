"""What runs here, and why the rest does not: the texts behind `ppo-kernels info`."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

import ppo_kernels

from . import _gemm, cpu, cuda
from ._op import BACKENDS, OPS, Op, refusal


def functions() -> dict[str, list[Op]]:
    """Each public function and the ops behind it."""
    grouped: dict[str, list[Op]] = {}
    for op in OPS.values():
        grouped.setdefault(op.function, []).append(op)
    return grouped


def backend_table() -> list[list[str]]:
    """Public function by backend, whatever this machine has: what the README shows."""
    rows = [["function", *BACKENDS]]
    for function, ops in functions().items():
        served = [
            "yes" if name == "torch" or all(name in op.kernels for op in ops) else "-"
            for name in BACKENDS
        ]
        rows.append([f"`{function}`", *served])
    return rows


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries mapped into this process; two of them fight over the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    found = re.findall(r"(/\S*/lib[gi]?omp[^/\s]*)", maps.read_text())
    return sorted({str(Path(path).resolve()) for path in found})


def cuda_module() -> str:
    """Whether the CUDA kernels were built, by what and for which GPUs, or why not."""
    if cuda.UNAVAILABLE:
        return f"CUDA module: off - {cuda.UNAVAILABLE}"
    build = cuda.build()
    return f"CUDA module: {build['compiler']}, for the architectures {build['architectures']}"


def cpu_products() -> str:
    """Which library multiplies floats, or what is wrong with the one that was asked for."""
    try:
        return f"matrix products of heads on a CPU: {_gemm.library()}"
    except ValueError as error:
        return f"matrix products of heads on a CPU: none - {error}"


def report() -> str:
    """Versions, build flags, and for each function and backend whether it runs here or why not."""
    lines = [
        f"ppo_kernels {ppo_kernels.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    ]
    if cpu.UNAVAILABLE:
        lines.append(f"compiled module: off - {cpu.UNAVAILABLE}")
    else:
        build = cpu.build()
        lines.append(
            f"compiled module: {build['compiler']}, "
            f"{'OpenMP' if build['openmp'] else 'no OpenMP: one thread'}, instruction set "
            f"{cpu.isa()} of {'/'.join(cpu.supported_isas())}, {torch.get_num_threads()} threads"
        )
    lines += [cpu_products(), cuda_module()]
    runtimes = openmp_runtimes()
    if len(runtimes) > 1:
        lines.append(f"warning: two OpenMP runtimes are loaded: {', '.join(runtimes)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines += ["", f"backends on {device} tensors (auto takes the first that runs):"]
    for function, ops in functions().items():
        for name in BACKENDS:
            reason = next(filter(None, (refusal(op, name, device) for op in ops)), None)
            lines.append(
                f"  {function:26} {name:6} {'runs' if reason is None else f'off: {reason}'}"
            )
    return "\n".join(lines)
