"""Compile what the public functions launch, for GPUs that are not here, and judge the result.

    python python_tests/compile_ladder.py            # every launch; exit 1 if something is wrong
    python python_tests/compile_ladder.py --quick    # the representative ones, as in `make test`
    python python_tests/compile_ladder.py --record   # every launch; write triton_resources/*.json

The public functions are called with meta tensors, which the ops hand to their Triton kernels as
they do CUDA tensors; a driver that only knows a target's name makes Triton compile every launch and
run none. This changes the process for good, so tests start another one.

Recorded per kernel and target: registers, bytes of local memory (spills), shared memory, 128-bit
loads and stores; and the sources they belong to. Adding a family: its launches, in
compile_launches.py, and ``--record``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from compile_launches import LAUNCHES, Launch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ppo_kernels import _op
from ppo_kernels import triton as backend
from ppo_kernels.triton import _launch

RECORDS = Path(__file__).parent / "triton_resources"
SOURCES = Path(backend.__file__).parent
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Target(NamedTuple):
    gpu: GPUTarget
    shared_limit: int  # bytes one program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10),
}


# ---- compiling -----------------------------------------------------------------------------------


class _Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: Any = None) -> int:
        return 0


class Compiled(NamedTuple):
    name: str
    kernel: Any  # triton.compiler.CompiledKernel
    constants: dict[str, Any]


_compiled: list[Compiled] = []


def serve_meta_tensors() -> None:
    """Let the `triton` backend serve meta tensors, and compile launches instead of running them."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        _compiled.append(Compiled(self.__name__, kernel, kwargs))
        return kernel

    JITFunction.run = compile_only
    _op.BACKENDS["triton"] = _op.Backend(("cuda", "meta"), None)
    library = torch.library.Library("ppo_kernels", "IMPL")
    for op in _op.OPS.values():
        library.impl(op.name, op._run, "Meta", allow_override=True)
    serve_meta_tensors.library = library  # type: ignore[attr-defined]  # it acts while it lives


def compile_launch(launch: Launch, target: str) -> list[Compiled]:
    """The kernels of one launch, in order, for one target."""
    driver.set_active(_Driver(TARGETS[target].gpu))
    _launch.NVIDIA = TARGETS[target].gpu.backend == "cuda"
    _compiled.clear()
    launch.call()
    return list(_compiled)


# ---- measuring -----------------------------------------------------------------------------------


def _nvidia(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    wide = re.compile(r"\b(ld|st)\.global\S*\.(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)")
    ways = [match[1] for match in wide.finditer(kernel.asm["ptx"])]
    return {
        "registers": found["REG"],
        "local": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "wide_loads": ways.count("ld"),
        "wide_stores": ways.count("st"),
    }


def _amd(kernel: Any) -> dict[str, int]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    def wide(kind: str) -> int:
        return len(re.findall(rf"(?:global|buffer)_{kind}_dwordx4", text))

    return {
        "registers": field("vgpr_count"),
        "local": field("private_segment_fixed_size"),
        "shared": kernel.metadata.shared,
        "wide_loads": wide("load"),
        "wide_stores": wide("store"),
    }


def measure(launches: list[Launch]) -> dict[str, dict[str, dict[str, int]]]:
    """Resources by family and ``launch | kernel | target``, over all targets."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for launch in launches:
        for target in TARGETS:
            for name, kernel, constants in compile_launch(launch, target):
                use = _amd(kernel) if "amdgcn" in kernel.asm else _nvidia(kernel)
                key = f"{launch.label} | {name} | {target}"
                if launch.wide and "BLOCK" in constants and use["wide_loads"] == 0:
                    use["missing_wide_loads"] = 1
                kernels = found.setdefault(launch.family, {})
                kernels[key] = _worse(kernels[key], use) if key in kernels else use
    return found


def _worse(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Of a kernel that one call launches twice, with other arguments."""
    return {
        name: (min if name.startswith("wide") else max)(a.get(name, 0), b.get(name, 0))
        for name in a | b
    }


def problems(found: dict[str, dict[str, int]], recorded: dict[str, dict[str, int]]) -> list[str]:
    """What is wrong with measured resources: absolutely, and compared with a record (or {})."""
    wrong = []
    for key, use in found.items():
        limit = TARGETS[key.rpartition(" | ")[2]].shared_limit
        if use["local"]:
            wrong.append(f"{key}: spills, {use['local']} bytes of local memory")
        if use["shared"] > limit:
            wrong.append(f"{key}: {use['shared']} bytes of shared memory, the limit is {limit}")
        if "missing_wide_loads" in use:
            wrong.append(f"{key}: no 128-bit loads")
        before = recorded.get(key, use)
        for name in ("registers", "shared"):
            if use[name] > before[name]:
                wrong.append(f"{key}: {name} {use[name]}, recorded {before[name]}")
        for name in ("wide_loads", "wide_stores"):
            if (use[name] > 0) < (before[name] > 0):
                wrong.append(f"{key}: {name} {use[name]}, recorded {before[name]}")
    return wrong


# ---- records -------------------------------------------------------------------------------------


# Families whose kernels are launched with another's, or made of its functions.
USED = {"ppo_loss": ("kl", "logprob", "losses", "moments")}


def sources(family: str) -> dict[str, str]:
    """Hashes of what a family's kernels are made of: modules of its own and shared ones."""
    names = ("_[!_]", family, *USED.get(family, ()))
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name in names
        for path in sorted(SOURCES.glob(f"{name}*.py"))
    }


def record(family: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{family}.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the representative launches")
    parser.add_argument("--record", action="store_true", help="write triton_resources/*.json")
    families = sorted({launch.family for launch in LAUNCHES})
    parser.add_argument("--family", choices=families, help="only this family")
    arguments = parser.parse_args()
    chosen = [
        launch
        for launch in LAUNCHES
        if arguments.family in (None, launch.family) and (launch.quick or not arguments.quick)
    ]
    serve_meta_tensors()
    wrong: list[str] = []
    count = 0
    for family, found in measure(chosen).items():
        count += len(found)
        if arguments.record:
            wrong += problems(found, {})
            RECORDS.mkdir(exist_ok=True)
            content = {
                "triton": triton.__version__,
                "sources": sources(family),
                "kernels": {key: found[key] for key in sorted(found)},
            }
            text = json.dumps(content, indent=1)
            # One kernel a line.
            text = re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", _one_line, text)
            (RECORDS / f"{family}.json").write_text(text + "\n")
        else:
            recorded = record(family)
            same = recorded["triton"] == triton.__version__
            wrong += problems(found, recorded["kernels"] if same else {})
    print("\n".join(wrong), file=sys.stderr)
    print(f"{count} kernels compiled, {len(wrong)} problems")
    return 1 if wrong else 0


def _one_line(match: re.Match[str]) -> str:
    return "{" + re.sub(r"\s+", " ", match[1]) + "}"


if __name__ == "__main__":
    sys.exit(main())
