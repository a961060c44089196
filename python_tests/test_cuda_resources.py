"""What nvcc makes of csrc/cuda: registers, spills, shared memory, 128-bit loads; the records."""

import re
import shutil

import cuda_resources as cuda
import pytest

from ppo_kernels.cuda import UNAVAILABLE  # the import builds what has changed

RECORD_AGAIN = "run `python python_tests/cuda_resources.py --record`"
OBJECTS = cuda.objects()
needs_cuobjdump = pytest.mark.skipif(
    cuda.cuda_tool("cuobjdump") is None, reason="no cuobjdump: neither a CUDA toolkit nor Triton"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
needs_objects = pytest.mark.skipif(not OBJECTS, reason=f"no objects: {UNAVAILABLE}")


# ---- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", cuda.FAMILIES)
def test_records_belong_to_the_sources(family):
    recorded = cuda.record(family)
    assert recorded.get("sources") == cuda.sources(family), RECORD_AGAIN
    assert recorded["flags"].split() == cuda.flags(), RECORD_AGAIN
    keys = [key.split(" | ") for key in recorded["kernels"]]
    kernels = {kernel for kernel, _ in keys}
    assert len(keys) == len(kernels) * len(cuda.ARCHITECTURES) > 0
    assert cuda.problems(recorded["kernels"], {}) == []


def test_every_record_is_of_a_source():
    assert sorted(path.stem for path in cuda.RECORDS.glob("*.json")) == cuda.FAMILIES
    assert all("math/host_device.h" in cuda.sources(family) for family in cuda.FAMILIES)


@needs_cuobjdump
@needs_objects
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: p.name.partition(".")[0])
def test_the_build_stays_within_the_records(path):
    found = cuda.built(path)
    recorded = cuda.record(path.name.partition(".")[0])
    assert found
    if recorded["nvcc"] == cuda.nvcc_version():
        assert cuda.problems(found, recorded["kernels"]) == []
        architectures = {key.rpartition(" | ")[2] for key in found}
        same = {k for k in recorded["kernels"] if k.rpartition(" | ")[2] in architectures}
        assert same <= found.keys()
    else:
        assert cuda.problems(found, {}) == []


# ---- what counts as a problem --------------------------------------------------------------------

GOOD = {"registers": 64, "shared": 1024, "stack": 0, "spilled": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 64 + cuda.MORE_REGISTERS}, None),
        ({"registers": 65 + cuda.MORE_REGISTERS}, "registers 69, recorded 64"),
        ({"shared": 1025}, "shared 1025, recorded 1024"),
        ({"stack": 8}, "stack 8, recorded 0"),
        ({"spilled": 4}, "4 bytes spilled"),
        ({"shared": 49153}, "49153 bytes of shared memory, limit 49152"),
    ],
)
def test_a_regression_is_a_problem(change, message):
    wrong = cuda.problems({"kernel | sm_80": GOOD | change}, {"kernel | sm_80": GOOD})
    if message is None:
        assert wrong == []
    else:
        assert f"kernel | sm_80: {message}" in wrong


KERNELS = """
namespace ppok { namespace cuda { namespace {
template <class T> __global__ void __launch_bounds__(1024, 2) spills(T* p) {
  T x[64];
  for (int i = 0; i < 64; ++i) x[i] = p[i * 256 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) p[i * 256 + threadIdx.x] = x[63 - i] * x[i];
}
template <class T> __global__ void light(T* p) {
  __shared__ T y[32];
  y[threadIdx.x] = p[0];
  __syncthreads();
  p[threadIdx.x] = y[31 - threadIdx.x];
}
}
const void* kernels[] = {(const void*)&spills<double>, (const void*)&light<float>};
} }
"""


@needs_nvcc
def test_spills_are_found(tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text(KERNELS)
    found, errors = cuda.compiled(source, "sm_80")
    assert found["spills<double> | sm_80"]["spilled"] > 0
    assert found["light<float> | sm_80"] | {"registers": 0} == GOOD | {
        "registers": 0,
        "shared": 128,
    }
    assert any("kernels.cu, sm_80: " in e and "spill" in e.lower() for e in errors), errors
    assert any("spilled" in problem for problem in cuda.problems(found, {}))


@needs_nvcc
def test_what_does_not_compile_is_an_error(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("nonsense")
    found, errors = cuda.compiled(source, "sm_80")
    assert found == {}
    assert any("broken.cu, sm_80: " in e and "error" in e for e in errors)


# ---- machine code --------------------------------------------------------------------------------

# Kernels that stream (patterns of their names), and how many 128-bit loads they have in the loop
# that has most (without a loop, in all). A token tensor is read by 3: one of four floats, two of
# two doubles. A scan reads step by step.
WIDE_LOADS = {
    "logprob": {"sum_segments": 4, "make_gradient": 4},
    # Two dtypes at once are read one by one.
    "categorical_kl": {r"sum_segments<\w+, false": 4, r"make_gradient<\w+, false": 4},
    "losses": {
        r"pass_over_tokens<\w+, (Policy|Squared)\w+": 3 * 3 * 2,
        **{r"pass_over_tokens<\w+, Importance\w+": 2 * 3 * 2, "scale_tokens": 3},
    },
    "ppo_rows": {"score_and_differentiate": 4},
    "kl": {"estimate": 2 * 3, "differentiate": 2 * 3, "penalize": 2 * 3},
    "moments": {
        **{"find_moments": 3 * 2, "whiten_tokens": 3, "sum_runs": 3},
        **{"sum_upstream": 2 * 3, "make_gradient": 2 * 3},
    },
}


def wide_loads(code: str) -> int:
    """Of one kernel: in the loop that has most."""
    instructions = {
        int(address, 16): text
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    }
    loads = [at for at, text in instructions.items() if re.search(r"\bLDG\.E\S*\.128\b", text)]
    jumps = [
        (int(match[1], 16), at)
        for at, text in instructions.items()
        if (match := re.search(r"\bBRA\b.* (0x[0-9a-f]+)", text))
    ]
    loops = [
        sum(first <= at <= last for at in loads)
        for first, last in jumps
        if first < last and any("LDG" in instructions[i] for i in range(first, last, 16))
    ]
    return max(loops) if loops else len(loads)


def machine_code(path) -> dict[str, str]:
    """Of every kernel in an object, for the first architecture that is in it."""
    text = cuda.output([cuda.cuda_tool("cuobjdump"), "-sass", path])
    parts = re.split(r"^\s*Function : (\S+)\n", text, flags=re.M)[1:]
    code: dict[str, str] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        code.setdefault(name, body)
    names = cuda.kernel_names(code)
    return {names[name]: body for name, body in code.items()}


@needs_cuobjdump
@needs_objects
@pytest.mark.parametrize("family", WIDE_LOADS)
def test_streaming_kernels_load_128_bits(family):
    (path,) = [path for path in OBJECTS if path.name == f"{family}.cu.o"]
    kernels = machine_code(path)
    for name, least in WIDE_LOADS[family].items():
        of_name = {k: code for k, code in kernels.items() if re.match(rf"{name}\b", k)}
        assert of_name, f"{family} has no kernel {name}"
        for kernel, code in of_name.items():
            assert wide_loads(code) >= least, kernel


@pytest.mark.parametrize(
    ("loads", "expected"), [("LDG.E.EF.128", 2), ("LDG.E.64", 0), ("LDS.128", 0)]
)
def test_only_wide_loads_of_the_loop_count(loads, expected):
    lines = ["LDG.E.128 R0, [R2]", f"{loads} R0, [R2]", f"{loads} R4, [R6]", "LDG.E R8, [R2]"]
    lines += ["@P0 BRA 0x10", "LDG.E.128 R0, [R2]", "BRA 0x60"]
    code = "\n".join(f"        /*{16 * i:04x}*/   {text} ;" for i, text in enumerate(lines))
    assert wide_loads(code) == expected


def test_without_a_loop_all_loads_count():
    assert wide_loads("/*0000*/ LDG.E.128 R0, [R2] ;\n/*0010*/ EXIT ;\n/*0020*/ BRA 0x20;") == 1
