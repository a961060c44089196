"""Compile csrc/cuda for GPUs that are not here, and judge what ptxas says of every kernel.

    python python_tests/cuda_resources.py            # for all of them; exit 1 if something is wrong
    python python_tests/cuda_resources.py --record   # and write cuda_records/*.json

Recorded per kernel and architecture: registers, static shared memory, stack and spilled bytes; and
the flags and the sources they belong to. `built` reads the same, less the spills, from the objects
of an editable install.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CSRC = ROOT / "csrc"
BUILD = CSRC / "cuda/cuda.cmake"
RECORDS = TESTS / "cuda_records"
FAMILIES = sorted(path.stem for path in CSRC.glob("cuda/*.cu"))
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

MORE_REGISTERS = 4  # than recorded are no problem
SHARED_LIMIT = 48 << 10  # bytes that a block may have without asking

Resources = dict[str, dict[str, int]]  # of "kernel | architecture"


# ---- tools ---------------------------------------------------------------------------------------


@cache
def cuda_tool(name: str) -> str | None:
    """One of the toolkit, or that Triton brings along."""
    found = shutil.which(name)
    if found is None and (nvcc := shutil.which("nvcc")):
        beside = Path(nvcc).resolve().with_name(name)
        found = str(beside) if beside.exists() else None
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        beside = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        found = str(beside) if beside.exists() else None
    return found


@cache
def nvcc_version() -> str:
    run = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    return re.search(r"V(\d+\.\d+\.\d+)", run.stdout)[1]


def output(command: Sequence[str | Path], **more: Any) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, **more).stdout


def kernel_names(mangled: Iterable[str]) -> dict[str, str]:
    """As they are written in the source, without namespaces and parameters."""
    mangled = list(mangled)
    lines = output(["c++filt"], input="\n".join(mangled)).splitlines()
    return dict(zip(mangled, map(_short, lines), strict=True))


def _short(demangled: str) -> str:
    name = re.sub(r"ppok::cuda::|ppok::|\(anonymous namespace\)::|^void ", "", demangled)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


# ---- compiling -----------------------------------------------------------------------------------


def flags() -> list[str]:
    """As the build compiles, for release."""
    of_build = re.search(r"set\(CUDA_FLAGS (.*)\)", BUILD.read_text())[1].split()
    return ["-O3", "-DNDEBUG", "-std=c++17", "-DPPOK_ISA=cuda", *of_build]


def compiled(source: Path, architecture: str) -> tuple[Resources, list[str]]:
    """The kernels of a source, and what ptxas takes for an error: spills."""
    strict = ["-Xptxas", "-v,--warn-on-spills,-Werror"]
    with tempfile.TemporaryDirectory() as folder:
        out = ["-cubin", f"-arch={architecture}", "-o", f"{folder}/kernels.cubin"]
        command = ["nvcc", *flags(), f"-I{CSRC}", *strict, *out, str(source)]
        run = subprocess.run(command, capture_output=True, text=True)
    lines = [line.strip() for line in run.stderr.splitlines()]
    wrong = [line for line in lines if re.search(r"\b(error|warning)\b", line)]
    if run.returncode and not wrong:
        wrong = [f"nvcc exits with {run.returncode}"]
    return parsed(run.stderr, architecture), [f"{source.name}, {architecture}: {w}" for w in wrong]


def parsed(text: str, architecture: str) -> Resources:
    """What ``ptxas -v`` says."""
    uses = {}
    for part in re.split(r"Compiling entry function '", text)[1:]:
        frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        frames = [tuple(map(int, found)) for found in re.findall(frame, part)]  # and what it calls
        used = re.search(r"Used (\d+) registers", part)
        if not used:
            continue
        shared = re.search(r"(\d+) bytes smem", part)
        uses[part.partition("'")[0]] = {
            "registers": int(used[1]),
            "shared": int(shared[1]) if shared else 0,
            "stack": max((f[0] for f in frames), default=0),
            "spilled": sum(f[1] + f[2] for f in frames),
        }
    return _keyed(uses, architecture)


def _keyed(uses: Resources, architecture: str) -> Resources:
    names = kernel_names(uses)
    if len(set(names.values())) < len(names):
        raise ValueError(f"two kernels have one name: {sorted(names.values())}")
    return {f"{names[key]} | {architecture}": use for key, use in uses.items()}


# ---- what was built ------------------------------------------------------------------------------


def objects() -> list[Path]:
    """Of the editable install for this Python; none, if it has no CUDA backend."""
    tag = sys.implementation.cache_tag.replace("cpython-", "cp")
    return sorted(ROOT.glob(f"build/{tag}-*/CMakeFiles/kernels_cuda.dir/csrc/cuda/*.cu.o"))


def built(path: Path) -> Resources:
    """The kernels in an object, for each architecture that has code in it."""
    found: Resources = {}
    text = output([cuda_tool("cuobjdump"), "-res-usage", path])
    for part in re.split(r"^Fatbin elf code:$", text, flags=re.M)[1:]:
        uses = {}
        for name, usage in re.findall(r"Function (\S+):\s+(.*)", part):
            of = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
            stack = of["STACK"] + of["LOCAL"]
            uses[name] = {"registers": of["REG"], "shared": of["SHARED"], "stack": stack}
        found |= _keyed(uses, re.search(r"arch = (\S+)", part)[1])
    return found


# ---- judging -------------------------------------------------------------------------------------


def problems(found: Resources, recorded: Resources) -> list[str]:
    """What is wrong with resources: absolutely, and compared with a record (or {})."""
    wrong = []
    for key, use in found.items():
        if use.get("spilled"):
            wrong.append(f"{key}: {use['spilled']} bytes spilled")
        if use["shared"] > SHARED_LIMIT:
            wrong.append(f"{key}: {use['shared']} bytes of shared memory, limit {SHARED_LIMIT}")
        before = recorded.get(key, use)
        for name, more in (("registers", MORE_REGISTERS), ("shared", 0), ("stack", 0)):
            if use[name] > before[name] + more:
                wrong.append(f"{key}: {name} {use[name]}, recorded {before[name]}")
    return wrong


# ---- records -------------------------------------------------------------------------------------


def sources(family: str) -> dict[str, str]:
    """Hashes of what a family is made of: its source and the headers of ours."""
    found = set()
    waiting = [CSRC / f"cuda/{family}.cu"]
    while waiting:
        path = waiting.pop()
        if path not in found and path.exists():
            found.add(path)
            waiting += [CSRC / name for name in re.findall(r'#include "(.*)"', path.read_text())]
    names = {str(path.relative_to(CSRC)): path for path in found}
    return {name: hashlib.sha256(names[name].read_bytes()).hexdigest() for name in sorted(names)}


def record(family: str) -> dict[str, Any]:
    path = RECORDS / f"{family}.json"
    return json.loads(path.read_text()) if path.exists() else {"kernels": {}}


def write_record(family: str, kernels: Resources) -> None:
    kernels = {key: kernels[key] for key in sorted(kernels)}
    content = {"nvcc": nvcc_version(), "flags": " ".join(flags()), "sources": sources(family)}
    content["kernels"] = kernels
    text = json.dumps(content, indent=1)
    one_line = re.compile(r"\{\s+(\"registers\"[^}]*?)\s+\}")  # a kernel
    text = one_line.sub(lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{family}.json").write_text(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="write cuda_records/*.json")
    parser.add_argument("--family", choices=FAMILIES, help="only this source")
    asked = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("no nvcc on PATH", file=sys.stderr)
        return 2
    families = [asked.family] if asked.family else FAMILIES
    work = [(family, architecture) for family in families for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda w: compiled(CSRC / f"cuda/{w[0]}.cu", w[1]), work))
    wrong = [line for _, lines in results for line in lines]
    count = 0
    for family in families:
        of_family = zip(work, results, strict=True)
        found = {k: u for (f, _), (uses, _) in of_family if f == family for k, u in uses.items()}
        count += len(found)
        recorded = record(family)
        same = not asked.record and recorded.get("nvcc") == nvcc_version()
        wrong += problems(found, recorded["kernels"] if same else {})
        if asked.record:
            write_record(family, found)
    print("\n".join(wrong), file=sys.stderr)
    print(f"{count} kernels compiled, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
