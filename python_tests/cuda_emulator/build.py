"""CUDA sources compiled for the CPU, over the emulator: a Python extension or a program.

    python python_tests/cuda_emulator/build.py csrc/cuda/*.cu csrc/cuda/bindings.cpp

Prints the path of the extension. `extension` is the same from Python. Objects are kept under
build/cuda_emulator, and made again only if their source, a header of the project that they include,
or the command has changed.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "cuda_emulator"

SANITIZERS = {
    "": ["-O2", "-g1"],
    "address,undefined": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1"],
}
FLAGS = [
    *("-std=c++20", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-sign-compare"),
]


@cache
def compiler() -> str | None:
    """GCC: the sanitizers' fibers are not tried with another one."""
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def cuda_headers() -> Path | None:
    """Of a toolkit, or of the packages nvidia-cuda-runtime and nvidia-cuda-crt."""
    toolkits = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    toolkits += [nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    folders = [Path(toolkit) / "include" for toolkit in toolkits if toolkit]
    folders += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/include"))
    needed = ("cuda_runtime.h", "cuda_bf16.h", "crt/host_config.h")
    return next((f for f in folders if all((f / header).exists() for header in needed)), None)


def unavailable() -> str | None:
    """Why nothing can be built here, or None."""
    if compiler() is None:
        return "no C++ compiler"
    if cuda_headers() is None:
        return "no CUDA headers: neither a toolkit nor nvidia-cuda-runtime and nvidia-cuda-crt"
    return None


def _digest(*parts: str | bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part if isinstance(part, bytes) else part.encode())
        hashed.update(b"\0")
    return hashed.hexdigest()


@cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout


def _run(command: Sequence[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")


def _depends_on(depfile: Path) -> list[str]:
    """The files of a rule that the compiler wrote: "target: file file \\ file ..."."""
    return depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()


def _compile(source: Path, flags: Sequence[str]) -> Path:
    command = [compiler(), *FLAGS, *flags, "-MMD", "-c", str(source)]
    if source.suffix == ".cu":
        command[-1:] = ["-include", str(HERE / "cuda_emulator.h"), "-x", "c++", str(source)]
    key = _digest(_compiler_version(), *command)
    out = CACHE / f"{source.stem}-{key[:16]}.o"
    record = out.with_suffix(".json")
    if out.exists() and record.exists():
        known = json.loads(record.read_text())
        if all(
            Path(file).exists() and _digest(Path(file).read_bytes()) == digest
            for file, digest in known.items()
        ):
            return out
    record.unlink(missing_ok=True)
    depfile = out.with_suffix(".d")
    _run([*command, "-o", str(out), "-MF", str(depfile)])
    files = {file: _digest(Path(file).read_bytes()) for file in _depends_on(depfile)}
    record.write_text(json.dumps(files))
    return out


def _link(
    name: str,
    sources: Iterable[Path],
    sanitize: str,
    options: Sequence[str] = (),
    link: Sequence[str] = (),
    ucontext: bool = False,
) -> Path:
    """Compile, over the runtime, and link, unless the same has been linked before."""
    reason = unavailable()
    if reason:
        raise RuntimeError(reason)
    headers = ["-isystem", str(cuda_headers()), f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    instrumented = [*SANITIZERS[sanitize], *([f"-fsanitize={sanitize}"] if sanitize else [])]
    plain = SANITIZERS[""]
    of_suffix = {".cu": instrumented, ".cpp": plain}
    # Kernels first: of an inline function that several have, the linker takes the first.
    ordered = sorted(sources, key=lambda source: source.suffix != ".cu")
    work = [(s.resolve(), [*headers, *of_suffix[s.suffix], *options]) for s in ordered]
    runtime = [*headers, *plain, *(["-DEMULATOR_UCONTEXT"] if ucontext else [])]
    work += [(file, runtime) for file in sorted((HERE / "runtime").glob("*.cpp"))]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda item: _compile(*item), work))
        command = [compiler(), "-pthread", *instrumented, *link, *map(str, objects)]
        out = CACHE / _digest(*command)[:16] / name
        linked, contents = out.parent / "linked", _digest(*(o.read_bytes() for o in objects))
        if not linked.exists() or linked.read_text() != contents:
            out.parent.mkdir(exist_ok=True)
            _run([*command, "-o", f"{out}.new"])
            os.replace(f"{out}.new", out)  # a process that has loaded the old one keeps it
            linked.write_text(contents)
    return out


def program(name: str, sources: Iterable[Path], sanitize: str = "", ucontext: bool = False) -> Path:
    """`ucontext`: fibers switch as where there is no assembly for it."""
    return _link(name, sources, sanitize, ucontext=ucontext)


def extension(
    name: str, sources: Iterable[Path], sanitize: str = "", options: Sequence[str] = ()
) -> Path:
    """The Python extension `name`, which one of the sources must define with pybind11.

    What has kernels ends in .cu, and that alone is sanitized. `sanitize`: a key of SANITIZERS; such
    an extension can only be imported by a Python that runs with `environment(sanitize)`.
    """
    import pybind11

    include = [sysconfig.get_path("include"), pybind11.get_include()]
    python = [item for folder in include for item in ("-isystem", folder)]
    file = name + sysconfig.get_config_var("EXT_SUFFIX")
    return _link(file, sources, sanitize, [*options, *python], ["-shared"])


def load(path: Path) -> ModuleType:
    """Import an extension from where it lies."""
    name = path.name.split(".")[0]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configure(module: ModuleType, **settings: object) -> None:
    """Change settings of the emulator in a loaded extension; README.md lists them."""
    library = ctypes.CDLL(module.__file__)
    for name, value in settings.items():
        if library.emulator_configure(name.encode(), str(value).encode()):
            raise ValueError(f"the emulator has no setting {name}={value}")


PRELOADED = {"": [], "address,undefined": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}


def environment(sanitize: str, preload: bool = True) -> dict[str, str]:
    """For a process with a `sanitize` build in it; `preload`: the process itself is not one."""
    found = [
        subprocess.run(
            [compiler(), f"-print-file-name={library}"], capture_output=True, text=True
        ).stdout.strip()
        for library in PRELOADED[sanitize]
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(found if preload else []),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }


def prefix(sanitize: str) -> list[str]:
    """Before the command of such a process: ThreadSanitizer bears only so random addresses."""
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    too_random = sanitize == "thread" and bits.exists() and int(bits.read_text()) > 28
    return ["setarch", "-R"] if too_random else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--name", default="_cuda_emulated")
    parser.add_argument("--sanitize", default="", choices=list(SANITIZERS))
    args = parser.parse_args()
    print(extension(args.name, args.sources, args.sanitize))


if __name__ == "__main__":
    sys.exit(main())
