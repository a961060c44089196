"""Around the kernels: build, import, choice of backend, command line, generated docs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
import readme
import torch

import ppo_kernels as pk
from ppo_kernels import cpu, cuda, info
from ppo_kernels._op import OPS, _chosen

ROOT = Path(__file__).parent.parent


def python(code, **env):
    """Run code in a fresh interpreter; its last line of output, decoded."""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, cwd="/"
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


# ---- build ---------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_pip_install_in_isolation_without_cmake_or_ninja(tmp_path):
    """Nothing but a compiler on PATH: cmake and ninja are fetched by the build, torch is not."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("g++", "gcc", "c++", "cc", "as", "ld", "ar", "ranlib", "nm", "uname", "sh", "env"):
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    fresh = tmp_path / "venv"
    venv.create(fresh, with_pip=True)
    unoptimized = ("-C", "cmake.build-type=Debug")  # in a quarter of the time
    pip = subprocess.run(
        [fresh / "bin/python", "-m", "pip", "install", "-v", "--no-deps", source, *unoptimized],
        env={k: v for k, v in os.environ.items() if k != "CMAKE_PREFIX_PATH"}
        | {"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert pip.returncode == 0, pip.stdout[-4000:] + pip.stderr[-2000:]
    assert not re.search(r"(?:Downloading|Collecting|Using cached) torch\b", pip.stdout)
    (site,) = (fresh / "lib").glob("python3*/site-packages")
    assert (site / "ppo_kernels/py.typed").exists()
    assert (site / "ppo_kernels/_C.pyi").exists()
    # torch itself is taken from this environment.
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    code = "import ppo_kernels as pk, json; print(json.dumps([pk.__file__, pk.cpu.UNAVAILABLE]))"
    run = subprocess.run(
        [fresh / "bin/python", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    where, reason = json.loads(run.stdout)
    assert Path(where).is_relative_to(fresh)
    assert reason is None


def test_the_sdist_holds_all_sources(tmp_path):
    pytest.importorskip("scikit_build_core")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    kinds = ("*.py", "*.pyi", "*.typed", "*.h", "*.cuh", "*.cpp", "*.cu", "*.cmake", "*.yaml")
    paths = [
        path for kind in kinds for f in ("csrc", "ppo_kernels") for path in (ROOT / f).rglob(kind)
    ]
    assert {str(path.relative_to(ROOT)) for path in paths} <= held
    assert {"CMakeLists.txt", "csrc/cuda/cuda.cmake", "LICENSE", "README.md"} <= held


WHERE = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
CMAKE = shutil.which("cmake", path=WHERE)
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="no cmake on this machine")


@needs_cmake
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("PPO_KERNELS_CUDA=maybe", "PPO_KERNELS_CUDA=maybe: expected AUTO, ON or OFF"),
        ("PPO_KERNELS_CUDA=", "PPO_KERNELS_CUDA=: expected AUTO, ON or OFF"),
        ("PPO_KERNELS_CUDA_ARCHS=9.0", "PPO_KERNELS_CUDA_ARCHS=9.0: expected AUTO or a list of"),
        ("PPO_KERNELS_CUDA_ARCHS=80,90", "PPO_KERNELS_CUDA_ARCHS=80,90: expected AUTO or a list"),
        ("PPO_KERNELS_CUDA_ARCHS=sm_80", "PPO_KERNELS_CUDA_ARCHS=sm_80: expected AUTO or a list"),
        ("PPO_KERNELS_CUDA_ARCHS=", "PPO_KERNELS_CUDA_ARCHS=: expected AUTO or a list of"),
        ("PPO_KERNELS_CUDA_ARCHS=75-real;90a;120-virtual", None),
    ],
)
def test_options_of_the_cuda_build_are_checked(option, message):
    off = [] if "CUDA=" in option else ["-DPPO_KERNELS_CUDA=OFF"]
    run = subprocess.run(
        [CMAKE, f"-D{option}", *off, "-P", ROOT / "csrc/cuda/cuda.cmake"],
        capture_output=True,
        text=True,
    )
    if message is None:
        assert run.returncode == 0, run.stderr
    else:
        assert run.returncode != 0
        assert message in " ".join(run.stderr.split())


def configure(folder, *options, **env):
    """As pip's build does."""
    pybind11 = pytest.importorskip("pybind11").get_cmake_dir()
    found = [f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}"]
    return subprocess.run(
        [CMAKE, "-S", ROOT, "-B", folder, *found, *options],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


@needs_cmake
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-DPPO_KERNELS_CUDA=ON"], "PPO_KERNELS_CUDA=ON, PPO_KERNELS_CUDA_ARCHS=AUTO, but"),
        (["-DPPO_KERNELS_CUDA_ARCHS=90"], "PPO_KERNELS_CUDA_ARCHS=90, but"),
        ([], None),
    ],
)
def test_a_build_without_nvcc(tmp_path, options, message):
    """An error where CUDA or its architectures were asked for; else a build that knows why."""
    run = configure(tmp_path, *options, CUDACXX="/nowhere/nvcc")
    reason = "was found when ppo_kernels was built"
    if message is None:
        assert run.returncode == 0, run.stderr
        assert re.search(f"CUDA backend: off, no nvcc that compiles for .* {reason}", run.stdout)
    else:
        assert run.returncode != 0
        errors = " ".join(run.stderr.split())
        assert message in errors
        assert reason in errors


@needs_cmake
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_a_build_for_several_architectures_names_them(tmp_path):
    plain = ["-GUnix Makefiles", "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF"]
    run = configure(tmp_path, *plain, "-DPPO_KERNELS_CUDA_ARCHS=80-real;90-real")
    assert run.returncode == 0, run.stderr
    bindings = "csrc/cuda/bindings.cpp.o"
    make = ["make", "-C", tmp_path, "-f", "CMakeFiles/_cuda.dir/build.make"]
    subprocess.run([*make, f"CMakeFiles/_cuda.dir/{bindings}"], capture_output=True, check=True)
    assert b"80-real, 90-real" in (tmp_path / "CMakeFiles/_cuda.dir" / bindings).read_bytes()


def test_versions_agree():
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert pk.__version__ == version == cpu.build()["version"]


def test_stub_and_module_agree():
    """Every function of _C is in its stub, with as many arguments."""
    stub = (ROOT / "ppo_kernels/_C.pyi").read_text()
    typed = {
        name: len([a for a in arguments.split(",") if a.strip() not in ("", "/")])
        for name, arguments in re.findall(r"^def (\w+)\((.*?)\) ->", stub, flags=re.S | re.M)
    }
    actual = {
        name: len(re.findall(r"arg\d+:", getattr(cpu._C, name).__doc__))
        for name in dir(cpu._C)
        if callable(getattr(cpu._C, name)) and not name.startswith("__")
    }
    assert typed == actual


# ---- import and choice of backend ----------------------------------------------------------------

BROKEN = """
import sys, json
sys.modules["ppo_kernels._C"] = None
import torch, ppo_kernels as pk
from ppo_kernels import info
x = torch.randn(2, 5)
out = pk.logprobs_from_logits(x, torch.zeros(2, dtype=torch.int64))
try:
    pk.logprobs_from_logits(x, torch.zeros(2, dtype=torch.int64), backend="cpu")
except RuntimeError as error:
    refused = str(error)
print(json.dumps([info.report(), sorted(pk.op_counts()), refused]))
"""


def test_import_survives_a_missing_compiled_module():
    report, counts, refused = python(BROKEN)
    assert counts == [["logprobs_from_logits", "torch"]]
    assert "compiled module: off - the compiled module ppo_kernels._C did not load" in report
    assert "backend 'cpu' cannot run logprobs_from_logits: the compiled module" in refused
    assert "torch: can run" in refused


TRITON = """
import sys, json
import torch
before = "triton" in sys.modules
if MISSING:
    sys.modules["triton"] = None
import ppo_kernels as pk
waited = "triton" in sys.modules and not before and not MISSING
try:
    pk.logprobs_from_logits(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64), backend="triton")
except RuntimeError as error:
    refused = str(error)
print(json.dumps([waited, refused]))
"""


def test_triton_is_not_imported_and_may_be_missing():
    waited, refused = python("MISSING = False" + TRITON, TRITON_INTERPRET="0")
    assert not waited
    assert "'triton' cannot run logprobs_from_logits: runs on cuda tensors, these are" in refused
    _, refused = python("MISSING = True" + TRITON, TRITON_INTERPRET="0")
    assert "cannot run logprobs_from_logits: triton is not installed (cpu: can run; " in refused


def test_import_without_torch_says_so_in_one_line():
    code = "import sys; sys.modules['torch'] = None; import ppo_kernels"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.stderr.splitlines()[-1] == (
        "ImportError: ppo_kernels needs torch >= 2.6; install it with: pip install torch"
    )


def test_environment_chooses_backend_and_instruction_set():
    code = """
import json, torch, ppo_kernels as pk
pk.logprobs_from_logits(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64))
print(json.dumps([sorted(pk.op_counts()), pk.cpu.isa()]))
"""
    assert python(code, PPO_KERNELS_BACKEND="torch")[0] == [["logprobs_from_logits", "torch"]]
    assert python(code, PPO_KERNELS_BACKEND="")[0] == [["logprob_forward", "cpu"]]
    assert python(code, PPO_KERNELS_CPU_ISA="generic")[1] == "generic"


def test_unknown_names_in_the_environment_are_reported_not_fatal():
    code = """
import json, torch, ppo_kernels as pk
try:
    pk.logprobs_from_logits(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64))
    message = ""
except ValueError as error:
    message = str(error)
print(json.dumps([message, pk.cpu.UNAVAILABLE or ""]))
"""
    message, _ = python(code, PPO_KERNELS_BACKEND="fpga")
    assert message == (
        "PPO_KERNELS_BACKEND: unknown backend 'fpga', "
        "expected one of auto, cpu, triton, cuda, torch"
    )
    _, reason = python(code, PPO_KERNELS_CPU_ISA="sse9")
    assert "instruction set 'sse9' cannot run here: expected one of generic" in reason


def test_backend_argument_beats_context_beats_environment():
    x, t = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)
    with pk.use_backend("torch"):
        pk.reset_op_counts()
        pk.logprobs_from_logits(x, t)
        pk.logprobs_from_logits(x, t, backend="cpu")
        with pk.use_backend("auto"):
            pk.logprobs_from_logits(x, t)
        assert pk.op_counts() == {
            ("logprobs_from_logits", "torch"): 1,
            ("logprob_forward", "cpu"): 2,
        }
    assert len(_chosen) == 1
    with (
        pytest.raises(ValueError, match="use_backend: unknown backend 'tpu'"),
        pk.use_backend("tpu"),
    ):
        pass


def test_instruction_set_levels():
    levels = cpu.supported_isas()
    assert levels[0] == "generic"
    before = cpu.isa()
    assert before in levels
    with pytest.raises(ValueError, match="instruction set 'mmx' cannot run here: expected one of"):
        cpu.set_isa("mmx")
    assert cpu.isa() == before


def test_public_names_are_documented():
    for name in pk.__all__:
        assert getattr(pk, name).__doc__, name
    for op in OPS.values():
        assert op.function in pk.__all__


# ---- command line and generated docs -------------------------------------------------------------


def command(*arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "ppo_kernels", *arguments],
        env=os.environ | env,
        capture_output=True,
        text=True,
        cwd="/",
    )


def test_info_names_every_function_and_reason():
    run = command("info")
    assert run.returncode == 0
    for function in info.functions():
        assert re.search(rf"{function} +cpu +runs", run.stdout)
    broken = command("info", PPO_KERNELS_CPU_ISA="sse9").stdout
    assert re.search(r"logprobs_from_logits +cpu +off: the compiled module .*sse9", broken)
    assert re.search(r"\nmatrix products of heads on a CPU: (torch|onednn)\n", run.stdout)
    broken = command("info", PPO_KERNELS_CPU_GEMM="blis").stdout
    assert re.search(r"on a CPU: none - PPO_KERNELS_CPU_GEMM: expected .* got 'blis'", broken)
    assert command("info", "--tabel").returncode == 2


def test_info_tells_how_the_cuda_module_was_built_or_why_not(monkeypatch):
    module = SimpleNamespace(compiler="nvcc 13.0", architectures="80-real;90")
    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(cuda, "UNAVAILABLE", None)
    assert "\nCUDA module: nvcc 13.0, for the architectures 80-real;90\n" in info.report()
    monkeypatch.setattr(cuda, "UNAVAILABLE", "no nvcc was found")
    assert "\nCUDA module: off - no nvcc was found\n" in info.report()


def test_info_warns_about_two_openmp_runtimes(monkeypatch):
    monkeypatch.setattr(info, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    assert "warning: two OpenMP runtimes are loaded: /a/libgomp.so.1, /b/lib" in info.report()
    monkeypatch.undo()
    assert len(info.openmp_runtimes()) == 1


def test_generated_parts_of_the_docs_are_current():
    run = subprocess.run([sys.executable, ROOT / "python_tests/readme.py"])  # no backend of tests
    assert run.returncode == 0, "run `make docs`"


def test_the_example_of_the_readme_runs():
    code = re.search(r"```python\n(import ppo_kernels.*?)```", readme.README.read_text(), re.S)[1]
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    logits, values = normal(2, 6, 30).requires_grad_(), normal(2, 5).requires_grad_()
    names = {
        "logits": logits,
        "values": values,
        "tokens": torch.randint(30, (2, 6), generator=g),
        "mask": torch.ones(2, 5),
        "scores": normal(2),
        "old_logprobs": normal(2, 5),
        "ref_logprobs": normal(2, 5),
        "old_values": normal(2, 5),
    }
    exec(code, names)
    assert logits.grad.isfinite().all()
    assert logits.grad.any()
    assert values.grad.any()
