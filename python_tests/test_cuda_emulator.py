"""The emulator computes what CUDA defines, and notices the bugs planted in planted.cuh."""

import ctypes
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from cuda_emulator import build

pytestmark = pytest.mark.skipif(bool(build.unavailable()), reason=str(build.unavailable()))

PLAIN, ADDRESS, THREAD = build.SANITIZERS


def run(command, sanitize=PLAIN, preload=False, **settings):
    environment = build.environment(sanitize, preload)
    environment |= {f"CUDA_EMULATOR_{name.upper()}": str(v) for name, v in settings.items()}
    command = [*build.prefix(sanitize), *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def self_test(sanitize=PLAIN, **how):
    return build.program("self_test", [build.HERE / "self_test.cu"], sanitize, **how)


@pytest.mark.parametrize("sanitize", build.SANITIZERS)
def test_the_emulator_computes_what_cuda_defines(sanitize):
    done = run([self_test(sanitize)], sanitize)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


def test_without_the_assembly():
    done = run([self_test(ucontext=True)])
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


REVERSED = {"thread_order": "reversed"}
BLOCKS_REVERSED = {"block_order": "reversed"}
SHUFFLED = {"thread_order": "shuffled"}
WRONG = r"^wrong result"
RACE = "ThreadSanitizer: data race"
PLANTED = [
    # bug, sanitizer, settings, what it says
    ("missing_barrier", PLAIN, {}, WRONG),
    ("missing_barrier", THREAD, REVERSED, RACE),
    ("reused_too_soon", PLAIN, {}, WRONG),
    ("reused_too_soon", THREAD, {}, RACE),
    ("reused_too_soon", THREAD, REVERSED, RACE),
    ("missing_syncwarp", PLAIN, {}, WRONG),
    ("missing_syncwarp", THREAD, {}, RACE),
    (
        "different_barriers",
        PLAIN,
        {},
        r"different barriers: .*planted.cuh:\d+ and .*cuh:\d+",
    ),
    ("shuffle_for_syncwarp", THREAD, {}, RACE),
    ("early_exit", PLAIN, {}, r"exits while others wait in __syncthreads, \S*planted.cuh:\d+"),
    ("early_exit", PLAIN, REVERSED, r"__syncthreads, \S*planted.cuh:\d+ is reached after threads"),
    (
        "deadlock",
        PLAIN,
        {},
        r"deadlock(.*\n)+  threads 0 to 15: waiting in __syncwarp, \S*planted.cuh:\d+, mask f{8}\n"
        r"  threads 16 to 31: waiting in __syncthreads, \S*planted.cuh:\d+\n(.*\n)"
        r"  threads 48 to 63: waiting in __syncthreads",
    ),
    ("busy_wait", PLAIN, {"hang_seconds": 1}, r"hang: a thread runs for 1 s"),
    (
        "static_tiles",
        PLAIN,
        {"block_order": "reversed"},
        r"livelock.*load_acquire, \S*planted.cuh:\d+",
    ),
    ("plain_flag", THREAD, SHUFFLED, RACE),
    ("relaxed_flag", THREAD, SHUFFLED, RACE),
    ("missing_fence", THREAD, SHUFFLED, RACE),
    ("shared_write", PLAIN, {}, r"byte 8 was written in the 8 bytes of shared memory 'sums'"),
    ("shared_write", ADDRESS, {}, r"planted.cuh:\d+(:\d+)?: runtime error: index 2 out of bounds"),
    ("shared_read", PLAIN, {}, WRONG),
    ("shared_read", ADDRESS, {}, r"use-after-poison(.*\n)+.*block_sum.*planted.cuh:\d+"),
    ("dynamic_write", PLAIN, {}, r"byte 256 was written in the 256 bytes of dynamic shared memory"),
    ("dynamic_write", ADDRESS, {}, r"use-after-poison(.*\n)+.*reverse_warps.*planted.cuh:\d+"),
    ("global_read", ADDRESS, {}, r"heap-buffer-overflow(.*\n)+.*mean_of_rows.*planted.cuh:\d+"),
    (
        "too_much_shared",
        PLAIN,
        {},
        r"too much shared memory: 235520 bytes.* 'more', \S*cuh",
    ),
    ("misaligned", PLAIN, {}, r"is not aligned to the 16 bytes"),
    ("overflow", ADDRESS, {}, r"planted.cuh:\d+(:\d+)?: runtime error: signed integer overflow"),
    ("half_width", PLAIN, {}, WRONG),
    ("odd_width", PLAIN, {}, r"__shfl_xor_sync: a width of 24.*planted.cuh:\d+"),
    (
        "divergent_mask",
        PLAIN,
        {},
        r"deadlock(.*\n)+  threads 0 to 15: waiting in __syncwarp, .*, mask 0001ffff\n"
        r"  threads 16 to 31: waiting in __syncwarp, .*, mask ffffffff\n",
    ),
    ("lane_outside_mask", PLAIN, {}, r"__syncwarp, .*: lane 16 is not in its own mask, 0000ffff"),
    ("foreign_lane", PLAIN, {}, r"lane 0 reads lane 16, which is not in the mask"),
]


@pytest.mark.parametrize(
    ("bug", "sanitize", "settings", "message"), PLANTED, ids=[f"{p[0]}-{p[1]}" for p in PLANTED]
)
def test_planted_bugs_are_noticed(bug, sanitize, settings, message):
    done = run([self_test(sanitize), bug], sanitize, **settings)
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("bug", "sanitize", "settings"),
    [
        ("static_tiles", PLAIN, {}),
        ("plain_flag", PLAIN, SHUFFLED),
        ("shuffle_for_syncwarp", PLAIN, SHUFFLED),
        ("overflow", PLAIN, {}),
    ],
)
def test_bugs_that_need_more_than_that(bug, sanitize, settings):
    """So that what notices them above is what is said there, and nothing else."""
    assert run([self_test(sanitize), bug], sanitize, **settings).stdout == "right\n"


def test_every_planted_bug_is_in_the_table():
    planted = set(re.findall(r'\{"(\w+)", \w+_right,', (build.HERE / "self_test.cu").read_text()))
    assert planted == {p[0] for p in PLANTED}
    assert len(planted) > 20


@pytest.mark.parametrize("setting", [("seed", "x"), ("block_order", "shuffled")])
def test_a_setting_that_is_not_understood_ends_the_process(setting):
    done = run([self_test()], **dict([setting]))
    assert done.returncode != 0
    assert f"CUDA_EMULATOR_{setting[0].upper()}={setting[1]} is not understood" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_same_kernels_compile_with_nvcc(tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_90", f"-I{build.ROOT / 'csrc'}", "-x", "cu"]
    command += ["-diag-suppress=550,177", "-c", build.HERE / "planted.cuh", "-o", tmp_path / "o"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- an extension --------------------------------------------------------------------------------

KERNELS = """
    #include "cuda/device.cuh"
    #include "scale.h"
    using namespace ppok;
    __global__ void scale(const float* x, float* y, int n) {
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) y[i] = kFactor * x[i];
    }
    __global__ void log_order(int* log, int* count) { log[atomicAdd(count, 1)] = threadIdx.x; }
    const char* launch_scale(uintptr_t x, uintptr_t y, int n) {
      return launch(scale, (n + 63) / 64, 64, 0, nullptr, reinterpret_cast<const float*>(x),
                    reinterpret_cast<float*>(y), n);
    }
    const char* launch_log(uintptr_t log, uintptr_t count) {
      return launch(log_order, 1, 32, 0, nullptr, reinterpret_cast<int*>(log),
                    reinterpret_cast<int*>(count));
    }
"""
BINDINGS = """
    #include <pybind11/pybind11.h>
    const char* launch_scale(uintptr_t x, uintptr_t y, int n);
    const char* launch_log(uintptr_t log, uintptr_t count);
    PYBIND11_MODULE(scaling, m) {
      m.def("scale", &launch_scale, pybind11::call_guard<pybind11::gil_scoped_release>());
      m.def("log", &launch_log);
    }
"""
USE = """
    import ctypes, os, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from cuda_emulator import build
    module = build.load(Path({path!r}))
    def scale(n):
        x = (ctypes.c_float * 200)(*range(200))
        y = (ctypes.c_float * 200)()
        error = module.scale(ctypes.addressof(x), ctypes.addressof(y), n)
        assert error is None, error
        assert list(y) == [3 * v for v in x[:n]] + [0] * (200 - n)
    scale(150)
    if sys.argv[1] == "fork":
        child = os.fork()
        if child == 0:
            scale(100)  # none of the parent's threads is there
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    if sys.argv[1] == "too_far":
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        module.scale(*[libc.malloc(ctypes.c_size_t(64)) for _ in "xy"], 17)
    if sys.argv[1] == "race":
        x = (ctypes.c_float * 101)()
        module.scale(ctypes.addressof(x), ctypes.addressof(x) + 4, 100)
    print("done")
"""


@pytest.fixture(scope="module")
def sources():
    folder = build.CACHE / "scaling"  # always the same, so that objects are found again
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.cu").write_text(textwrap.dedent(KERNELS))
    (folder / "bindings.cpp").write_text(textwrap.dedent(BINDINGS))
    (folder / "scale.h").write_text("constexpr float kFactor = 3.f;\n")
    return [folder / "kernels.cu", folder / "bindings.cpp"]


@pytest.mark.parametrize(
    ("sanitize", "what", "message"),
    [
        (PLAIN, "fork", None),
        (ADDRESS, "fork", None),
        (ADDRESS, "too_far", r"heap-buffer-overflow(.*\n)+.* in scale\(.*kernels.cu:\d+"),
        (THREAD, "once", None),
        (THREAD, "race", r"data race(.*\n)+.* scale\(.*kernels.cu:\d+"),
    ],
)
def test_an_extension(sources, sanitize, what, message, tmp_path):
    path = build.extension("scaling", sources, sanitize)
    script = tmp_path / "use.py"
    script.write_text(textwrap.dedent(USE).format(tests=str(build.HERE.parent), path=str(path)))
    done = run([sys.executable, script, what], sanitize, preload=True)
    if message is None:
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    else:
        assert done.returncode != 0
        assert re.search(message, done.stderr), done.stderr


def test_an_extension_is_configured_in_its_process(sources):
    module = build.load(build.extension("scaling", sources))

    def order():
        log, count = (ctypes.c_int * 32)(), ctypes.c_int()
        module.log(ctypes.addressof(log), ctypes.addressof(count))
        return list(log)

    build.configure(module, thread_order="reversed")
    assert order() == list(range(31, -1, -1))
    build.configure(module, thread_order="forward")
    assert order() == list(range(32))
    with pytest.raises(ValueError, match="no setting thread_order=random"):
        build.configure(module, thread_order="random")


def test_what_has_not_changed_is_not_built_again(sources):
    def built():
        path = build.extension("scaling", sources)
        return {file: file.stat().st_mtime_ns for file in [path, *build.CACHE.glob("kernels-*.o")]}

    first = built()
    assert built() == first
    header = sources[0].with_name("scale.h")
    header.write_text("constexpr float kFactor = 4.f;\n")
    second = built()
    assert first.keys() == second.keys()
    assert sum(second[file] > first[file] for file in first) == 2  # the extension, its kernels
    header.write_text("constexpr float kFactor = 3.f;\n")


def test_a_source_that_does_not_compile(tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text("nonsense")
    with pytest.raises(RuntimeError, match=r"broken.cu:1:\d+: error: .*nonsense"):
        build.extension("broken", [broken])
