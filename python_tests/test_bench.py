"""`ppo-kernels bench`: wrong results are not timed, what is finished is kept, files are whole."""

import subprocess
import sys

import pytest
import torch

import ppo_kernels as pk
from ppo_kernels import cpu, triton
from ppo_kernels._op import OPS
from ppo_kernels.bench import cases, cli, memory, plot, results, run, summary, timing
from ppo_kernels.bench.baselines.baseline import Baseline, peer

CPU = torch.device("cpu")


def bench(folder, *arguments):
    """Run in `folder`; exit status and rows."""
    status = cli.main(
        [*arguments, "--sizes", "small", "--seconds", "0.001", "--no-memory", "--out", str(folder)]
    )
    return status, results.read_csv(folder / "results.csv")


def jobs(monkeypatch, *wanted):
    """Let --sizes small be the jobs with these (function, variant, size, direction)."""
    known = {
        (job.benchmark.function, job.benchmark.variant, job.size, job.direction): job
        for job in cases.SIZES["small"]()
    }
    chosen = [known[key] for key in wanted]
    monkeypatch.setitem(cases.SIZES, "small", lambda: chosen)
    return chosen


SUM = ("masked_sum", "", "8x256", "forward")
WHITEN = ("whiten", "", "8x256", "forward+backward")
LOSS = ("clipped_loss", "", "8x256", "forward+backward")
OF_TORCH = (
    *("eager", "eager logsumexp", "eager gathered", "loop", "chunked", "checkpointed"),
    *("linear_cross_entropy", "linear_cross_entropy chunked", "ours from all logits"),
)


# ---- cases --------------------------------------------------------------------------------------


def test_every_public_function_is_measured():
    functions = {op.function for op in OPS.values()}
    assert set(cases.FUNCTIONS) == functions
    for name, jobs in cases.SIZES.items():
        measured = {job.benchmark.function for job in jobs()}
        assert measured == (set(cases.OF_HIDDEN) if name == "memory" else functions)
        assert len(set(jobs())) == len(jobs())


@pytest.mark.parametrize("sizes", cases.SIZES)
def test_every_shape_has_the_dimensions_of_its_inputs(sizes):
    for job in cases.SIZES[sizes]():
        job.benchmark.inputs(torch.Generator(CPU), tuple(min(n, 8) for n in job.shape))


def test_the_readme_cases_are_measured_by_default():
    measured = {
        size: {
            (j.benchmark.function, j.benchmark.variant, j.size, j.dtype_name, j.direction)
            for j in cases.SIZES[size]()
        }
        for size in ("default", "gpu")
    }
    assert set(summary.HEADLINES) <= measured["default"] | measured["gpu"]
    for cases_of_size in measured.values():
        at_8_tokens = {m[0] for m in cases_of_size if m[2] in ("1x8", "8x8", "8x8x8")}
        assert at_8_tokens == set(cases.FUNCTIONS)


@pytest.mark.parametrize("key", cases.BENCHMARKS, ids=" ".join)
def test_inputs_are_made_where_the_generator_is(key):
    """And nowhere else first: those of a GPU are gigabytes."""
    with torch.device("meta"):
        made = cases.BENCHMARKS[key].inputs(torch.Generator(CPU), cases.BENCHMARKS[key].check)
    assert {v.device.type for v in made.values() if isinstance(v, torch.Tensor)} == {"cpu"}


@pytest.mark.parametrize("key", cases.BENCHMARKS, ids=" ".join)
def test_every_baseline_computes_the_same(key):
    """Those of torch: Inductor compiles the same function, packages may not be installed."""
    benchmark = cases.BENCHMARKS[key]
    for dtype in (torch.float32, torch.bfloat16):
        job = cases.Job(benchmark, benchmark.check, dtype, cases.BACKWARD)
        for name in OF_TORCH:
            if name in benchmark.baselines:
                contender = run.Contender(job, name)
                assert run.judged(contender, contender.load(CPU), CPU) <= run.SAME[dtype]


def test_bytes_that_any_version_must_move():
    def traffic(function, variant, shape, direction):
        job = cases.Job(cases.BENCHMARKS[function, variant], shape, torch.float32, direction)
        inputs = job.inputs(CPU)
        outputs = run.testing.flatten(job.benchmark.public(**run._leaves(job, inputs)))
        return job.traffic(inputs, outputs)

    rows, vocab = 4, 1000
    logits = rows * vocab * 4
    assert traffic("logprobs_from_logits", "", (rows, vocab), cases.FORWARD) == (
        logits + rows * 8,
        rows * 4,
    )
    read, written = traffic("logprobs_from_logits", "", (rows, vocab), cases.BACKWARD)
    assert (read, written) == (2 * (logits + rows * 8) + rows * 4, logits + rows * 4)
    kept = rows * (8 + 50 * (4 + 4)) + (rows + 1) * 8  # logits outside of the sets are not read
    assert traffic("logprobs_from_logits", "kept", (rows, vocab), cases.FORWARD)[0] == kept
    read, written = traffic("logprobs_from_logits", "kept", (rows, vocab), cases.BACKWARD)
    assert (read, written) == (2 * kept + rows * 4, logits + rows * 4)
    assert sum(traffic("gae", "", (4, 1000), cases.FORWARD)) == 17 * 4000
    loss = sum(traffic("clipped_loss", "", (4, 1000), cases.BACKWARD))
    assert 17 * 4000 < loss < 17 * 4000 + 200


# ---- a run --------------------------------------------------------------------------------------


def test_rows_say_what_ran_where(tmp_path, monkeypatch):
    jobs(monkeypatch, SUM, LOSS)
    threads = torch.get_num_threads()
    status, rows = bench(tmp_path, "--threads", "1")
    assert status == 0
    assert torch.get_num_threads() == threads
    timed = {(r.function, r.implementation): r for r in rows if r.status == "ok"}
    assert {(SUM[0], "ppo_kernels"), (SUM[0], "eager"), (LOSS[0], "ppo_kernels")} <= set(timed)
    for row in timed.values():
        assert 0 < row.low_ms <= row.median_ms <= row.high_ms
        assert row.samples >= timing.FEWEST_SAMPLES
        assert row.threads == 1
        assert row.torch == torch.__version__
        assert row.ppo_kernels == pk.__version__
        assert row.max_error < 1e-3
        assert row.device
        assert row.date
        assert row.read_gbps > 0
        assert row.copy_gbps > 0
    assert timed[SUM[0], "ppo_kernels"].isa == (cpu.isa() if not cpu.UNAVAILABLE else "")
    text = (tmp_path / "results.md").read_text()
    assert "### clipped_loss" in text
    assert timed[SUM[0], "ppo_kernels"].device in text


# The fault is planted in a compiled kernel.
@pytest.mark.skipif(cpu.UNAVAILABLE is not None, reason="no compiled module")
@pytest.mark.parametrize("fault", ["value", "shape"])
def test_a_wrong_kernel_is_reported_and_not_timed(tmp_path, monkeypatch, capsys, fault):
    jobs(monkeypatch, WHITEN)
    right = OPS["whiten_forward"].kernels["cpu"]

    def wrong(*args):
        y, *rest = right(*args)
        return (y * 1.0001 if fault == "value" else y[:, :-1].contiguous(), *rest)

    monkeypatch.setitem(OPS["whiten_forward"].kernels, "cpu", wrong)
    status, rows = bench(tmp_path)
    assert status == 0
    ours = [r for r in rows if r.implementation == "ppo_kernels"]
    assert [r.status for r in ours] == ["wrong"]
    assert ours[0].median_ms is None
    assert ours[0].note
    assert "ppo_kernels wrong" in capsys.readouterr().out
    assert any(r.implementation == "eager" and r.median_ms for r in rows)


@pytest.mark.skipif(cpu.UNAVAILABLE is not None, reason="no compiled module")
def test_a_fault_that_only_the_full_size_shows(tmp_path, monkeypatch):
    jobs(monkeypatch, WHITEN)
    right = OPS["whiten_forward"].kernels["cpu"]

    def wrong(x, *args):
        y, *rest = right(x, *args)
        return (y * 2 if x.shape == (8, 256) else y, *rest)

    assert cases.BENCHMARKS["whiten", ""].check != (8, 256)
    monkeypatch.setitem(OPS["whiten_forward"].kernels, "cpu", wrong)
    _, rows = bench(tmp_path)
    (ours,) = (r for r in rows if r.implementation == "ppo_kernels")
    assert (ours.status, ours.median_ms) == ("wrong", None)
    assert "at full size" in ours.note


def test_a_wrong_or_failing_baseline_is_reported(tmp_path, monkeypatch):
    (job,) = jobs(monkeypatch, SUM)

    def fails(device):
        def call(x, mask):
            raise RuntimeError("no compiler\nand a long trace")

        return call

    planted = {
        "wrong": Baseline(lambda device: lambda x, mask: x.sum()),
        "failing": Baseline(fails),
        "absent": peer("no_such_package.functions", "f", lambda f: f),
    }
    for name, baseline in planted.items():
        monkeypatch.setitem(job.benchmark.baselines, name, baseline)
    names = ["eager", *planted]
    runner = run.Runner(run.Settings(CPU, None, [1], names, 0.001, False))
    (rows,) = runner.rows([job])
    found = {r.implementation: r for r in rows}
    assert found["ppo_kernels"].status == "ok"
    assert found["wrong"].status == "wrong"
    assert found["failing"].status == "failed"
    assert found["failing"].note == "RuntimeError: no compiler"
    assert found["absent"].status == "skipped"
    assert found["absent"].note == "no_such_package is not installed"
    assert all(found[n].median_ms is None for n in planted)


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    jobs(monkeypatch, SUM, LOSS)
    measure = run.Runner._measure

    def interrupted(self, job, shared):
        if job.benchmark.function == LOSS[0]:
            raise KeyboardInterrupt
        return measure(self, job, shared)

    monkeypatch.setattr(run.Runner, "_measure", interrupted)
    status, rows = bench(tmp_path)
    assert status == 130
    assert {r.function for r in rows} == {SUM[0]}
    assert (tmp_path / "results.md").exists()
    assert "kept" in capsys.readouterr().err


@pytest.mark.skipif(not memory.RESET.exists(), reason="no /proc/self/clear_refs")
def test_peak_memory_without_times():
    job = cases.Job(cases.BENCHMARKS["whiten", ""], (64, 16384))
    (rows,) = run.Runner(run.Settings(CPU, None, [1], ["eager"], timing=False)).rows([job])
    assert {r.implementation for r in rows} == {"ppo_kernels", "eager"}
    for r in rows:
        assert r.median_ms is None
        assert r.peak_mib >= 4


def test_a_second_run_replaces_its_rows_and_keeps_the_others(tmp_path, monkeypatch):
    jobs(monkeypatch, SUM, LOSS)
    _, first = bench(tmp_path)
    _, second = bench(tmp_path, "masked_sum")
    assert [r.key for r in first] == [r.key for r in second]
    assert [r for r in first if r.function == LOSS[0]] == [
        r for r in second if r.function == LOSS[0]
    ]


@pytest.mark.parametrize(("longest", "budget"), [(0.0, 0.001), (2.0, 1e-6)])
def test_a_long_loop_is_extrapolated(monkeypatch, longest, budget):
    monkeypatch.setattr(run, "LONGEST_CALL", longest)
    monkeypatch.setattr(run, "SHORT_STEPS", 16)
    job = cases.Job(cases.BENCHMARKS["gae", ""], (2, 64))
    runner = run.Runner(run.Settings(CPU, None, [1], ["loop"], budget, False))
    (rows,) = runner.rows([job])
    loop = next(r for r in rows if r.implementation == "loop")
    assert (loop.status, loop.note) == ("extrapolated", "from 16 steps")
    assert loop.median_ms > 0


def test_turns_are_taken_in_order():
    log = []
    contestants = {
        name: timing.Contestant(lambda name=name: log.append(name), run.contextlib.nullcontext)
        for name in "abc"
    }
    times = timing.take_turns(contestants, budget=0, flush=lambda: log.append("flush"), device=CPU)
    assert set(times) == set("abc")
    turns = log[6:]
    assert turns == ["flush", "a", "flush", "b", "flush", "c"] * timing.FEWEST_SAMPLES


# ---- on a GPU -----------------------------------------------------------------------------------


def test_ours_is_what_auto_would_choose():
    best = "torch" if triton.UNAVAILABLE else "triton"
    for function in cases.FUNCTIONS:
        assert run.default_executor(function, torch.device("cuda")) == best
    on_cpu = "torch" if cpu.UNAVAILABLE else f"cpu:{cpu.isa()}"
    assert run.default_executor("whiten", CPU) == on_cpu


@pytest.fixture
def gpu(monkeypatch):
    """A clock that says 3 ms, and a log of what a GPU would be told."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(("sleep", cycles)))
    return log


def test_the_host_issues_a_call_ahead_of_the_gpu(gpu, monkeypatch):
    clock = iter((1.0, 1.0 + 2**-12))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    call = timing.Contestant(lambda: gpu.append("call"), run.contextlib.nullcontext)
    times = timing.take_turns(
        {"a": call}, budget=0, flush=lambda: gpu.append("flush"), device=torch.device("cuda")
    )
    assert times["a"] == timing.Times(3e-3, 3e-3, 3e-3, timing.FEWEST_SAMPLES)
    estimate = ["event", "call", "event", "wait"]
    ahead = ("sleep", int(2**-11 * timing.CYCLES_PER_SECOND))
    turn = ["flush", ahead, *estimate]
    assert gpu == estimate * 2 + ["call", "wait"] + turn * timing.FEWEST_SAMPLES


def test_calls_that_only_the_host_bounds_get_no_head_start(gpu):
    """Small inputs are timed in batches, as the host issues them; so are very long calls."""
    call = timing.Contestant(lambda: gpu.append("call"), run.contextlib.nullcontext)
    timing.take_turns({"a": call}, budget=0, flush=None, device=torch.device("cuda"))
    assert not [entry for entry in gpu if entry[0] == "sleep"]
    slow = timing._head_start(lambda: timing.time.sleep(0.01), torch.device("cuda"))
    assert slow == timing.LONGEST_HEAD_START


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.skipif(not memory.RESET.exists(), reason="no /proc/self/clear_refs")
def test_peak_memory_of_a_call():
    """Scratch memory that is freed again counts; so does the output; the input does not."""
    code = """
import torch
from ppo_kernels.bench.memory import peak_on_cpu
x = torch.ones(4 << 20)
print(peak_on_cpu(lambda: (x + 1).add_(x * 2)), peak_on_cpu(lambda: x.sum()))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    scratch, none = map(int, out.stdout.split())
    assert abs(scratch - (32 << 20)) < 2 << 20
    assert none < 2 << 20


@pytest.mark.skipif(not memory.RESET.exists(), reason="no /proc/self/clear_refs")
def test_the_measuring_process_answers_and_survives_a_bad_question():
    meter = memory.Meter()
    job = {"function": "whiten", "variant": "", "dtype": "float32", "direction": "forward"}
    ours = {"name": results.OURS, "executor": run.default_executor("whiten", CPU)}
    try:
        with pytest.raises(RuntimeError, match="nowhere"):
            meter.ask(
                {"job": job | {"shape": [8, 64]}, "contender": {"name": "nowhere"}, "threads": 1}
            )
        peak = meter.ask({"job": job | {"shape": [64, 16384]}, "contender": ours, "threads": 1})
        assert 4 << 20 <= peak < 12 << 20
    finally:
        meter.close()


# ---- results ------------------------------------------------------------------------------------


def row(**columns):
    known = {
        "function": "gae",
        "variant": "",
        "size": "64x8192",
        "dtype": "float32",
        "direction": "forward",
        "implementation": "ppo_kernels",
        "backend": "cpu",
        "isa": "avx2",
        "threads": 2,
        "device": "a processor, 2 cores",
        "median_ms": 2.0,
        "low_ms": 1.5,
        "high_ms": 2.5,
    }
    return results.Row(**(known | columns))


def test_rows_survive_the_csv(tmp_path):
    rows = [row(note='a, "quoted" | note', samples=5), row(dtype="bfloat16", median_ms=None)]
    path = tmp_path / "results.csv"
    results.write_csv(path, rows)
    assert results.read_csv(path) == rows


@pytest.mark.parametrize("kind", ["csv", "png"])
def test_files_are_whole_or_absent(tmp_path, monkeypatch, kind):
    """A write that fails halfway leaves the old file, and nothing beside it."""
    path = tmp_path / ("results.csv" if kind == "csv" else "error.png")
    path.write_text("old")

    def rows():
        yield row(max_error=1e-7)
        raise OSError("disk full")

    def half(self, temporary, **options):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    if kind == "csv":
        with pytest.raises(OSError, match="disk full"):
            results.write_csv(path, rows())
    else:
        monkeypatch.setattr(pytest.importorskip("matplotlib.figure").Figure, "savefig", half)
        with pytest.raises(OSError, match="disk full"):
            plot.draw([row(max_error=1e-7)], tmp_path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    gae = [row(size=s, max_error=1e-7) for s in ("64x8192", "8x65536", "1x1048576")]
    logprob = [
        row(function="logprobs_from_logits", size=f"256x{v}", peak_mib=v / 1000, dtype=dtype)
        for v in (8192, 50257)
        for dtype in ("float32", "bfloat16")
    ]
    hidden = [
        row(function=f, size=size, peak_mib=peak, direction="forward+backward")
        for f in cases.OF_HIDDEN
        for size, peak in (("8x4x100", 2.0), ("8x4x200", 3.0), ("16x4x100", 2.0))
    ]
    names = [p.name for p in plot.draw([*gae, *logprob, *hidden], tmp_path)]
    assert names == ["speed.png", "scan.png", "error.png", "memory.png", "memory_hidden.png"]
    assert all((tmp_path / n).read_bytes().startswith(b"\x89PNG") for n in names)
    assert plot.draw([row(status="failed", median_ms=None)], tmp_path / "none") == []


def test_readme_table():
    shapes = {"eager": 20.0, "chunked": 30.0, "loop": 4000.0, "ppo_kernels": 2.0}
    rows = [
        row(
            implementation=name,
            isa="avx512",
            median_ms=ms,
            status="extrapolated" if name == "loop" else "ok",
            date="2026-01-02T03:04:05",
        )
        for name, ms in shapes.items()
        if name != "eager"
    ]
    on_gpu = summary.headline([row(device="a GPU", backend="triton", isa="", date="2026-01-02")])
    assert on_gpu.startswith("a GPU, torch ")
    text = summary.headline([*rows, row(isa="generic", median_ms=9.0)])
    assert "| `gae` [64, 8192] | float32 | forward | 2 |  | 15x |  | 2000x\\* |" in text
    assert "a processor, 2 cores, 2 threads, avx512" in text
    assert "2026-01-02" in text
    assert summary.headline([]) == ""


def test_levels_and_calls():
    """Against eager at the same threads; from cache only calls on 8 tokens count."""
    rows = [
        row(implementation="eager", isa="avx512", cache="flushed", median_ms=60.0),
        row(implementation="eager", isa="generic", cache="flushed", median_ms=6.0),
        row(implementation="eager", isa="avx2", cache="flushed", median_ms=6.0),
        row(isa="avx2", cache="flushed", median_ms=2.0),
        row(isa="generic", cache="flushed", median_ms=3.0),
        row(function="whiten", implementation="eager", cache="flushed", median_ms=3.0),
        row(function="whiten", isa="generic", cache="flushed", median_ms=6.0),
        row(size="1x8", implementation="chunked", cache="warm", median_ms=0.05),
        row(size="1x8", isa="generic", cache="warm", median_ms=0.03),
        row(size="1x8", isa="avx2", cache="warm", median_ms=0.02),
    ]
    text = summary.levels(rows)
    assert "| avx2 | 2 | 1 | 3x | 3x | `gae`" in text
    assert "| generic | 2 | 2 | 1.25x | 0.5x | `whiten`" in text
    assert "| `gae` | forward | 20.0 | 50.0 |  |" in summary.calls(rows)
    assert summary.levels([]) == summary.calls([]) == ""


# ---- comparison ---------------------------------------------------------------------------------


def test_compare():
    eager = row(implementation="eager", backend="", median_ms=10.0)
    old = [row(), row(size="1x8"), eager]
    slower = [
        row(median_ms=2.5),
        row(size="1x8"),
        row(implementation="eager", backend="", median_ms=99.0),
    ]
    text, beyond = results.compare(old, slower, 1.3)
    assert not beyond
    assert "1.25" in text
    text, beyond = results.compare(old, slower, 1.2)
    assert beyond
    assert "slower" in text
    assert results.compare(old, [row(status="wrong", median_ms=None)], 100.0)[1]
    with pytest.raises(ValueError, match="in both runs"):
        results.compare(old, [row(threads=1)], 1.2)


@pytest.mark.parametrize(("factor", "status"), [(1e-6, 1), (1e6, 0)])
def test_exit_status_of_compare(tmp_path, monkeypatch, capsys, factor, status):
    jobs(monkeypatch, SUM)
    _, rows = bench(tmp_path / "old", "masked_sum")
    for r in rows:
        r.median_ms = r.median_ms and r.median_ms * factor
    results.write_csv(tmp_path / "old.csv", rows)
    found, _ = bench(
        tmp_path / "new", "masked_sum", "--compare", str(tmp_path / "old.csv"), "--threshold", "10"
    )
    assert found == status
    assert "old ms" in capsys.readouterr().out


# ---- bad arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "OP: given 'nothing', expected one of logprobs_from_logits"),
        (["--sizes", "huge"], "huge"),
        (["--backend", "cpu,gpu"], "given 'gpu', expected a list of cpu, triton, cuda, torch"),
        (["--isa", "sse9"], "given 'sse9'"),
        (["--backend", "torch", "--isa", cpu.supported_isas()[0]], "--isa: belongs to the cpu"),
        (["--threads", "0"], "given '0', expected numbers as in 1,2"),
        (["--threads", "1,two"], "given '1,two'"),
        (["--seconds", "-1"], "given '-1', expected a number above 0"),
        (["--seconds", "nan"], "given 'nan'"),
        (["--baselines", "eager,jax"], "given 'jax'"),
        (["--compare", "old.csv"], "--compare and --threshold go together"),
        (["--threshold", "1.1"], "--compare and --threshold go together"),
        (["--compare", "/no/such.csv", "--threshold", "2"], "/no/such.csv"),
    ],
)
def test_bad_arguments(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_file_that_holds_no_results(tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        cli.main(["--compare", str(other), "--threshold", "2", "--out", str(tmp_path)])
    assert "no column function" in capsys.readouterr().err
    results.write_csv(other, [row()])
    other.write_text(other.read_text().replace(",2,a", ",two,a").replace(",2,", ",two,", 1))
    with pytest.raises(ValueError, match=r"other.csv, line 2"):
        results.read_csv(other)


def test_the_command_reaches_the_benchmarks():
    run = subprocess.run(
        [sys.executable, "-m", "ppo_kernels", "bench", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--compare" in run.stdout
