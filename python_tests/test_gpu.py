"""Every op in Triton and in CUDA C++ as a GPU runs it: streams, graphs, compilers, devices, sizes.

Interpreted or emulated, what needs no GPU runs at a size for that, so that these tests are tested
themselves.
"""

import pytest
import torch

import ppo_kernels as pk
from ppo_kernels import _faults
from ppo_kernels._op import BACKENDS
from ppo_kernels.bench.cases import BENCHMARKS
from ppo_kernels.testing import arrange, device_of, executors, flatten

OF_GPUS = [e for e in executors("whiten") if e in ("triton", "cuda", "cuda-emulated")]
if not OF_GPUS:
    pytest.skip("no backend for GPUs runs here in any way", allow_module_level=True)

DEVICE = device_of(OF_GPUS[0])
ON_GPU = DEVICE == "cuda"
LOGITS, ROWS, PACKED = ((64, 50257), (64, 4096), (65536,)) if ON_GPU else ((3, 70), (3, 40), (90,))
HIDDEN = (300, 256, 50257) if ON_GPU else (3, 8, 70)
# More tokens than 32 bits count.
MANY, LENGTH = (2**15 + 1, 2**16) if ON_GPU else (3, 40)

OPS = list(BENCHMARKS.values())
# What is made from hidden states waits for the number of live rows, and autocast narrows it.
OF_KERNELS_ALONE = [op for op in OPS if op.products is None]
OF_LOGITS = ("logprobs_from_logits", "categorical_kl")
on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="torch sees no GPU")


def named(ops):
    return pytest.mark.parametrize(
        "op", ops, ids=[" ".join(filter(None, (op.function, op.variant))) for op in ops]
    )


def one_of_each(*keys):
    return named([BENCHMARKS[key] for key in keys])


@pytest.fixture(autouse=True, params=OF_GPUS)
def backend(request):
    """The one that calls of the test run on."""
    op = request.node.callspec.params.get("op")
    if op and request.param not in executors(op.function):
        pytest.skip(f"no {request.param} kernel")
    _faults._flags.clear()
    pk.check(DEVICE)
    with pk.use_backend(request.param):
        yield request.param
    pk.check()


def example(op, seed=0, shape=None, dtype=torch.float32):
    if shape is None:
        shape = LOGITS if op.function in OF_LOGITS else PACKED if op.variant == "packed" else ROWS
        shape = HIDDEN if op.products else shape
    return arrange(
        op.inputs(torch.Generator(DEVICE).manual_seed(seed), shape), dtype, device=DEVICE
    )


def tensors(inputs, change):
    return {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def run(op, inputs, function=None):
    """Outputs and gradients; what arrives from above is the same in all rows of an output."""
    leaves = inputs | {name: inputs[name].detach().requires_grad_() for name in op.grads}
    outputs = flatten((function or op.public)(**leaves))
    live = [t for t in outputs if t.requires_grad]
    if not live:
        return outputs
    upstream = [ramp(t, 0.5 + i) for i, t in enumerate(live)]
    grads = torch.autograd.grad(live, [leaves[name] for name in op.grads], upstream)
    return [*(t.detach() for t in outputs), *grads]


def ramp(like, start):
    steps = like.shape[1] if like.dim() > 1 else 1
    row = torch.linspace(start, 2.5, steps, dtype=like.dtype, device=like.device)
    return row.expand_as(like) if like.dim() else row[0]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- values --------------------------------------------------------------------------------------


@on_a_gpu
@named(OPS)
def test_auto_chooses_one_of_them(op):
    pk.reset_op_counts()
    with pk.use_backend("auto"):
        run(op, example(op))
    first = next(name for name in BACKENDS if name in executors(op.function, device=DEVICE))
    assert {backend for _, backend in pk.op_counts()} == {first} <= {"triton", "cuda"}


@named(OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_to_float64(op, dtype):
    """At sizes with many programs; how close the cube says."""
    inputs = example(op, dtype=dtype)
    with pk.use_backend("torch"):
        exact = run(op, arrange(inputs, torch.float64, device=DEVICE))
    for got, wanted in zip(run(op, inputs), exact, strict=True):
        scale = wanted.abs().max().item()
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=max(eps, 1e-5) * scale)


@on_a_gpu
@named(OPS)
def test_the_same_bits_every_time(op):
    """Beside other work, so that programs run in another order."""
    inputs = example(op)
    expected = run(op, inputs)
    noise, stream = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            noise @ noise
        assert same(run(op, inputs), expected)
    stream.synchronize()


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [50257, 151936])
def test_bits_of_a_row_depend_on_nothing_but_the_row(dtype, vocab):
    """Alignment changes the registers that hold a row, few rows another kernel sums it."""
    op = BENCHMARKS["logprobs_from_logits", "entropy"]
    whole = example(op, shape=(4096, vocab), dtype=dtype)
    expected = run(op, whole)
    few = tensors(whole, lambda t: t[:7])
    for offset in range(16):
        moved = torch.empty(7 * vocab + offset, dtype=dtype, device=DEVICE)[offset:]
        few["logits"] = moved.view(7, vocab).copy_(whole["logits"][:7])
        assert same(run(op, few), [t[:7] for t in expected]), offset
    strided = torch.empty(7, 2 * vocab, dtype=dtype, device=DEVICE)[:, ::2]
    few["logits"] = strided.copy_(whole["logits"][:7])
    assert same(run(op, few), [t[:7] for t in expected])


# ---- streams, graphs, devices --------------------------------------------------------------------


@on_a_gpu
@named(OPS)
def test_work_goes_to_the_current_stream(op):
    """The inputs arrive there late: on any other stream a kernel would read zeros."""
    inputs = example(op)
    expected = run(op, inputs)
    late = tensors(inputs, torch.zeros_like)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # cycles: some 50 ms
        fill(late, inputs)
        got = run(op, late)
    stream.synchronize()
    assert same(got, expected)


def fill(these, values):
    for name, tensor in these.items():
        if isinstance(tensor, torch.Tensor):
            tensor.copy_(values[name])


@on_a_gpu
@named(OPS)
def test_captured_in_a_graph_and_replayed(op):
    inputs, others = example(op), example(op, seed=1)
    if op.variant == "packed":
        others["cu_seqlens"] = inputs["cu_seqlens"]
    expected = [run(op, others), run(op, inputs)]
    static = tensors(inputs, torch.clone)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, static)
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            pk.check()
    for values, wanted in zip((others, inputs), expected, strict=True):
        fill(static, values)
        graph.replay()
        assert same(captured, wanted)


@on_a_gpu
def test_faults_of_a_replayed_graph_reach_check():
    logits, tokens = (torch.randn(8, 1000, device=DEVICE), torch.zeros(8, device=DEVICE).long())
    pk.logprobs_from_logits(logits, tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logprobs = pk.logprobs_from_logits(logits, tokens)
    graph.replay()
    pk.check()
    tokens[3] = 1000
    for _ in range(2):
        graph.replay()
        with pytest.raises(ValueError, match="flat position 3 in a call on cuda"):
            pk.check()
    assert logprobs.isnan().nonzero().flatten().tolist() == [3]


@on_a_gpu
def test_backward_does_not_report_a_fault_again():
    hidden = torch.randn(8, 16, device=DEVICE, requires_grad=True)
    tokens = torch.full((8,), 3, device=DEVICE)
    tokens[5] = 100
    logprobs = pk.logprobs_from_hidden(hidden, torch.randn(100, 16, device=DEVICE), tokens)
    with pytest.raises(ValueError, match=r"tokens: .* flat position 5 in a call on cuda"):
        pk.check()
    logprobs.sum().backward()
    pk.check()
    assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [5]


@on_a_gpu
@named(OF_KERNELS_ALONE)
def test_a_call_waits_for_nothing(op):
    inputs = example(op)
    run(op, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@named(OPS)
def test_the_device_of_the_tensors_counts_not_the_current_one(op):
    here = tensors(example(op), lambda t: t.to("cuda:0"))
    there = tensors(here, lambda t: t.to("cuda:1"))
    with torch.cuda.device(0):
        other = run(op, there)
        assert {t.device.index for t in other} == {1}
        assert same([t.to("cuda:0") for t in other], run(op, here))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_check_names_the_device():
    logits, tokens = torch.randn(8, 100, device="cuda:1"), torch.full((8,), 100, device="cuda:1")
    pk.logprobs_from_logits(logits, tokens)
    pk.check("cuda:0")
    with pytest.raises(ValueError, match="flat position 0 in a call on cuda:1"):
        pk.check()


# ---- torch.compile, autocast ---------------------------------------------------------------------


@one_of_each(
    ("logprobs_from_logits", "entropy"),
    ("categorical_kl", ""),
    ("clipped_loss", ""),
    ("kl_penalty", "k3"),
    ("gae", ""),
    ("vtrace", ""),
    ("whiten", ""),
)
def test_compiles_into_one_graph(op, backend):
    inputs = example(op)
    expected = run(op, inputs)
    compiler = "inductor" if ON_GPU else "aot_eager"
    torch._dynamo.reset()
    pk.reset_op_counts()
    got = run(op, inputs, torch.compile(op.public, fullgraph=True, backend=compiler))
    assert {name for _, name in pk.op_counts()} == {backend}
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@named(OF_KERNELS_ALONE)
def test_autocast_changes_nothing(op):
    inputs = example(op)
    expected = run(op, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert same(run(op, inputs), expected)


# ---- sizes past 2^31 elements --------------------------------------------------------------------


def needs_memory(gigabytes):
    if ON_GPU and torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free memory")


def test_a_gradient_of_2_31_logits_in_their_place():
    needs_memory(16)
    op = BENCHMARKS["logprobs_from_logits", "entropy"]
    inputs = example(op, shape=(16384, 151936) if ON_GPU else (16, 70), dtype=torch.bfloat16)
    logits = inputs["logits"]
    assert logits.numel() > 2**31 or not ON_GPU
    expected = run(op, tensors(inputs, lambda t: t[-7:].clone()))
    leaf = logits.detach().requires_grad_()
    out = pk.logprobs_from_logits(**inputs | {"logits": leaf * 1, "inplace_backward": True})
    out.logprobs.mul(0.5).sum().add(out.entropy.sum(), alpha=1.5).backward()
    assert same([out.logprobs[-7:], out.entropy[-7:], leaf.grad[-7:]], expected)


@one_of_each(
    ("categorical_kl", ""),
    ("clipped_loss", ""),
    ("value_loss", ""),
    ("importance_weights", "tis"),
    ("kl_penalty", "k3"),
    ("shape_rewards", ""),
    ("gae", ""),
    ("discounted_returns", ""),
    ("vtrace", ""),
    ("whiten", ""),
    ("masked_sum", ""),
)
def test_past_2_31_elements(op):
    """The rows of the inputs are one row, which takes no memory: their results agree with its."""
    needs_memory(44)
    one = example(op, shape=(1, LENGTH), dtype=torch.bfloat16)
    if op.function in ("gae", "discounted_returns", "vtrace"):
        one = {k: v for k, v in one.items() if not k.startswith("mask")}  # a list of 17 GB
    elif op.function in ("clipped_loss", "value_loss"):
        one["aggregation"] = "token-sum"
    elif op.function == "whiten":
        one["unbiased"] = False
    all_of = tensors(one, lambda t: t.expand(MANY, *t.shape[1:]))
    assert MANY * LENGTH > 2**31 or not ON_GPU
    for got, wanted in zip(run(op, all_of), run(op, one), strict=True):
        if wanted.dim() == 0:  # a sum over all
            assert got.item() == pytest.approx(MANY * wanted.item(), rel=1e-6)
        elif len(got) == MANY:
            for row in (1, MANY // 2, MANY - 1):
                assert torch.equal(got[row], got[0]), row
            rounded = 1e-5 if op.function == "whiten" else 0
            torch.testing.assert_close(got[:1], wanted, rtol=rounded, atol=rounded)


def test_packed_sequences_past_2_31_tokens():
    needs_memory(40)
    op, steps = BENCHMARKS["gae", "packed"], 2**20 if ON_GPU else 40
    sequences = 2**11 + 1 if ON_GPU else 3
    setting = {"gamma": 0.99, "lam": 0.95}

    def results(count):
        rewards, values = (torch.full((1,), x, device=DEVICE) for x in (0.5, 0.25))
        tokens = {"rewards": rewards.bfloat16(), "values": values.bfloat16()}
        tokens = tensors(tokens, lambda t: t.expand(count * steps))
        ends = torch.arange(count + 1, device=DEVICE) * steps
        return run(op, tokens | setting | {"cu_seqlens": ends})

    for got, wanted in zip(results(sequences), results(1), strict=True):
        for k in (0, 1, sequences - 1):
            assert torch.equal(got[k * steps : (k + 1) * steps], wanted), k
