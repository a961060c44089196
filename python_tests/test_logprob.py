"""logprobs_from_logits beyond the cube: extreme rows, bits, in-place gradient, graphs, errors."""

import itertools
import math
import warnings

import pytest
import torch
from device import DEVICE, INTERPRETED, OFFSETS, THREADS, kernels, raises, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels.testing import executor, executors

EXECUTORS = executors("logprobs_from_logits", device=DEVICE)
COMPILED = [e for e in EXECUTORS if e != "torch"]
BACKENDS = kernels("logprobs_from_logits")


def example(*shape, seed=0, dtype=torch.float32, std=3.0):
    g = seeded(seed)
    logits = torch.randn(shape, generator=g, dtype=torch.float64) * std
    return logits.to(dtype), torch.randint(shape[-1], shape[:-1], generator=g)


def gradient(logits, tokens, **kwargs):
    logits = logits.detach().requires_grad_()
    result = pk.logprobs_from_logits(logits, tokens, **kwargs)
    total = sum(t.sum() for t in result) if isinstance(result, tuple) else result.sum()
    return torch.autograd.grad(total, logits)[0]


# ---- against torch's own expression, and where that loses everything -----------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_equals_the_torch_expression(name):
    logits, tokens = example(3, 4, 1000, dtype=torch.float64)
    z = logits / 0.8
    expected = z.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    entropy = torch.distributions.Categorical(logits=z).entropy()
    with executor(name):
        got = pk.logprobs_from_logits(logits, tokens, temperature=0.8, entropy=True)
    torch.testing.assert_close(got.logprobs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.entropy, entropy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("margin", [10.0, 17.0, 40.0, 80.0])
@pytest.mark.parametrize("vocab", [2, 1000, 5000])
def test_collapsed_rows_keep_relative_accuracy(name, margin, vocab):
    """One token holds all the mass: log p = -log1p(e), with e = (V - 1) exp(-margin)."""
    logits = torch.zeros(2, vocab)
    logits[:, vocab // 2] = margin
    tokens = torch.tensor([vocab // 2, 0])
    e = (vocab - 1) * math.exp(-margin)
    entropy = math.log1p(e) + e / (1 + e) * margin
    if name == "torch" and e < 1e-37:
        pytest.skip("exp(-margin) is subnormal in the reference's fp32")
    with executor(name):
        logprobs, entropies = pk.logprobs_from_logits(logits, tokens, entropy=True)
        leaf = logits.clone().requires_grad_()
        pk.logprobs_from_logits(leaf, tokens)[0].backward()
    assert logprobs[0].item() == pytest.approx(-math.log1p(e), rel=2e-6)
    assert logprobs[1].item() == pytest.approx(-margin - math.log1p(e), rel=1e-6)
    assert entropies[0].item() == pytest.approx(entropy, rel=4e-6)
    assert entropies[1].item() == pytest.approx(entropy, rel=4e-6)
    assert leaf.grad[0, vocab // 2].item() == pytest.approx(e / (1 + e), rel=4e-6)
    assert leaf.grad[0, 0].item() == pytest.approx(-math.exp(-margin) / (1 + e), rel=4e-6)


@pytest.mark.parametrize("name", COMPILED)
def test_logprobs_near_0_keep_relative_accuracy_at_any_margin(name):
    """The exponential of a rounded log-odds of -70 would be off by 4e-6."""
    margins = torch.arange(18.0, 84.0, 0.37)
    logits = torch.zeros(len(margins), 1000)
    logits[:, 9] = margins
    with executor(name):
        got = pk.logprobs_from_logits(logits, torch.full((len(margins),), 9))
    exact = -(999 * (-margins.double()).exp()).log1p()
    assert ((got - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize("name", EXECUTORS)
def test_gradient_of_a_sure_target_in_bf16(name):
    """softmax - onehot formed in bf16 would be 100 % wrong at p = 0.999."""
    logits = torch.zeros(1, 100, dtype=torch.bfloat16)
    logits[0, 7] = 11.5
    with executor(name):
        grad = gradient(logits, torch.tensor([7]))
    rest = 99 * math.exp(-11.5)
    assert grad[0, 7].item() == pytest.approx(rest / (1 + rest), rel=2**-8)
    assert grad.double().sum().item() == pytest.approx(0, abs=2**-8 * rest)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fp32_rounded_once_to_nearest_even(name, dtype):
    """Truncation would stay within an ulp and bias every update.

    Half and single rows are summed in different orders, so a few gradients next to a tie may round
    to the other side of it.
    """
    logits, tokens = example(6, 5003, dtype=dtype)
    logits[3], logits[4, 7] = torch.nan, -torch.inf
    with executor(name):
        halves = gradient(logits, tokens, entropy=True)
        singles = gradient(logits.float(), tokens, entropy=True)
    if dtype == torch.float16:  # with subnormal halves among them
        assert singles[:3].abs().min() < torch.finfo(dtype).smallest_normal
    rounded = singles.to(dtype)
    same = (halves == rounded) | (halves.isnan() & rounded.isnan())
    assert same.float().mean() > 0.999
    torch.testing.assert_close(halves, rounded, rtol=0.01, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", EXECUTORS)
def test_logits_near_a_thousand(name):
    """One fp32 log-sum-exp near 1000 would cost 3e-5 in p; state is (maximum, log of the sum)."""
    logits, tokens = example(4, 999)
    shifted = (logits + 1024).detach()  # rounds to multiples of 2^-13: exact from here on
    with executor(name):
        near = gradient(shifted - 1024, tokens)
        far = gradient(shifted, tokens)
    torch.testing.assert_close(far, near, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("entropy", [False, True])
def test_logits_near_the_largest_float(name, entropy):
    """Scaling them before the maximum is taken away would overflow."""
    logits = torch.full((2, 5000), -3e38)
    logits[:, 4500], logits[:, 4501], logits[:, 7] = 3e38, 3e38, 1e38
    tokens = torch.tensor([4500, 7])
    half = math.log(0.5)
    with executor(name):
        got = pk.logprobs_from_logits(logits, tokens, temperature=0.5, entropy=entropy)
        grad = gradient(logits, tokens, temperature=0.5, entropy=entropy)
    logprobs = got.logprobs if entropy else got
    torch.testing.assert_close(logprobs, torch.tensor([half, -torch.inf]), rtol=1e-6, atol=0)
    if entropy:
        torch.testing.assert_close(got.entropy, torch.tensor([-half, -half]), rtol=1e-6, atol=0)
    expected = torch.zeros(2, 5000)
    expected[0, 4500], expected[0, 4501] = 1, -1
    expected[1, 4500], expected[1, 4501], expected[1, 7] = -1, -1, 2
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("peaks", [[9000], [100, 9000], [9000, 9001], [4095, 4096]])
@pytest.mark.parametrize("margin", [2.0, 9.0, 30.0])
def test_entropy_of_peaked_rows_keeps_relative_accuracy(name, peaks, margin):
    """Whichever chunk of the row holds the peak, and whether or not another chunk ties with it."""
    logits, tokens = example(3, 12000, std=0.5)
    logits[:, peaks] = logits.amax() + margin + math.log(12000)
    exact = pk.logprobs_from_logits(logits.double(), tokens, entropy=True, backend="torch")
    with executor(name):
        got = pk.logprobs_from_logits(logits, tokens, entropy=True)
    torch.testing.assert_close(got.entropy.double(), exact.entropy, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.logprobs.double(), exact.logprobs, rtol=2e-6, atol=0)


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row_depend_on_nothing_but_the_row(name, dtype):
    logits, tokens = example(9, 10007, dtype=dtype)
    with executor(name):

        def row(x, t):
            out = pk.logprobs_from_logits(x, t, entropy=True)
            return out.logprobs[0].item(), out.entropy[0].item(), gradient(x, t, entropy=True)[0]

        def same(a, b):
            return a[:2] == b[:2] and torch.equal(a[2], b[2])

        expected = row(logits[:1].clone(), tokens[:1])
        for offset in OFFSETS:
            buffer = torch.empty(logits.numel() + offset, dtype=dtype)
            moved = buffer[offset:].view(logits.shape).copy_(logits)
            assert same(row(moved[:2], tokens[:2]), expected), offset
        assert same(row(logits.flip(0).flip(0), tokens), expected)
        strided = torch.empty(9, 2 * 10007, dtype=dtype)[:, ::2].copy_(logits)
        assert same(row(strided, tokens), expected)
        many = 20 if INTERPRETED else 600
        big = logits[:1].expand(many, -1)
        assert same(row(big, tokens[:1].expand(many)), expected)
        threads = torch.get_num_threads()
        try:
            for n in THREADS:
                torch.set_num_threads(n)
                assert same(row(logits[:1], tokens[:1]), expected), n
                assert same(row(logits, tokens), expected), n
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize(("rows", "far"), [(2, 2**31 + 11), (3, 2**30 + 11)])
def test_offsets_past_2_31_elements(name, rows, far):
    """The storage is never touched but for its rows, so it costs no memory on a CPU."""
    vocab = 1000
    base = torch.empty((rows - 1) * far + vocab, dtype=torch.bfloat16)
    logits = base.as_strided((rows, vocab), (far, 1))
    values, tokens = example(rows, vocab, dtype=torch.bfloat16)
    logits.copy_(values)
    with executor(name):
        got = pk.logprobs_from_logits(logits, tokens, entropy=True)
        expected = pk.logprobs_from_logits(values, tokens, entropy=True)
        assert torch.equal(got.logprobs, expected.logprobs)
        assert torch.equal(got.entropy, expected.entropy)
        assert torch.equal(gradient(logits, tokens), gradient(values, tokens))


@pytest.mark.skipif(DEVICE != "cpu", reason="of the cpu backend")
def test_shifted_logits_are_not_copied(monkeypatch):
    """The usual logits[:, :-1] view goes to the kernel as it is."""
    logits, _ = example(2, 6, 50)
    seen = []
    forward = pk.cpu._C.logprob_forward

    def spy(view, *args):
        seen.append(view)
        return forward(view, *args)

    monkeypatch.setattr(pk.cpu._C, "logprob_forward", spy)
    pk.logprobs_from_logits(logits[:, :-1], torch.zeros(2, 5, dtype=torch.int64), backend="cpu")
    assert seen == [(logits.data_ptr(), 0, 300, 50, 1)]


@settings(max_examples=10 if INTERPRETED else 40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", COMPILED)
def test_splitting_the_rows_anywhere_changes_no_bit(name, data):
    """Micro-batches, packing and padding: a row's results are its own."""
    vocab = data.draw(st.sampled_from([1, 2, 15, 16, 17, 63, 65, 1000, 4095, 4097, 8193]))
    rows = data.draw(st.integers(1, 12))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    logits, tokens = example(rows, vocab, seed=data.draw(st.integers(0, 9)), dtype=dtype)
    with executor(name):
        whole = pk.logprobs_from_logits(logits, tokens, entropy=True)
        grad = gradient(logits, tokens, entropy=True)
        bounds = [0, *cuts, rows]
        parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        split = [pk.logprobs_from_logits(logits[p], tokens[p], entropy=True) for p in parts]
        grads = [gradient(logits[p], tokens[p], entropy=True) for p in parts]
    assert torch.equal(torch.cat([s.logprobs for s in split]), whole.logprobs)
    assert torch.equal(torch.cat([s.entropy for s in split]), whole.entropy)
    assert torch.equal(torch.cat(grads), grad)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", COMPILED)
def test_any_finite_row_agrees_with_float64(name, data):
    """Rows of any scale, with ties and forbidden tokens, against plain Python sums."""
    values = data.draw(
        st.lists(
            st.one_of(
                st.floats(-300, 300, width=32), st.just(-math.inf), st.sampled_from([0.0, 5.0])
            ),
            min_size=1,
            max_size=70,
        )
    )
    target = data.draw(st.integers(0, len(values) - 1))
    if max(values) == -math.inf:
        values[target] = 0.0
    top = max(values)
    others = [math.exp(v - top) for i, v in enumerate(values) if i != target]
    z = values[target] - top
    total = math.fsum(others)
    x = (math.log(total) - z if total else -math.inf) if z > -math.inf else math.inf
    expected = -(x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)))
    with executor(name):
        row, index = torch.tensor(values, dtype=torch.float32), torch.tensor(target)
        got, entropy = pk.logprobs_from_logits(row, index, entropy=True)
    assert got.item() == pytest.approx(expected, rel=3e-6, abs=1e-30)
    weights = [math.exp(v - top) for v in values]
    mass = math.fsum(weights)
    exact = (
        math.log(mass)
        - math.fsum(w * (v - top) for w, v in zip(weights, values, strict=True) if w) / mass
    )
    assert entropy.item() == pytest.approx(exact, rel=3e-6, abs=1e-6)


# ---- in-place backward ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_overwrites_the_logits(name, softcap, dtype):
    values, tokens = example(2, 5, 5003, dtype=dtype)
    leaf = values.clone().requires_grad_()
    logits = leaf * 1
    kept = logits[:, :-1]
    with executor(name):
        out = pk.logprobs_from_logits(kept, tokens[:, :-1], softcap=softcap, inplace_backward=True)
        version = logits._version
        out.sum().backward()
        expected = gradient(values[:, :-1], tokens[:, :-1], softcap=softcap)
    assert logits._version > version
    assert torch.equal(logits[:, :-1], expected)
    assert torch.equal(leaf.grad[:, :-1], expected)
    assert not leaf.grad[:, -1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward_is_not_silent_about_second_uses(backend):
    values, tokens = example(2, 5, 100)
    logits = values.requires_grad_() * 1
    out = pk.logprobs_from_logits(logits, tokens, inplace_backward=True, backend=backend)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

    logits = values.requires_grad_() * 1
    other = logits.square().sum()
    pk.logprobs_from_logits(logits, tokens, inplace_backward=True, backend=backend).sum().backward(
        retain_graph=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()

    with pytest.raises(ValueError, match="inplace_backward: expected logits computed from"):
        pk.logprobs_from_logits(values, tokens, inplace_backward=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward_warns_under_compile(backend):
    values, tokens = example(2, 5, 100)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        return pk.logprobs_from_logits(x * 1, tokens, inplace_backward=True, backend=backend).sum()

    leaf = values.clone().requires_grad_()
    with pytest.warns(UserWarning, match="inplace_backward=True has no effect under torch.compile"):
        f(leaf).backward()
    assert torch.equal(leaf.grad, gradient(values, tokens, backend=backend))


# ---- autograd and graphs -------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_gradcheck(name):
    logits, tokens = example(3, 13, dtype=torch.float64)

    def f(x):
        return tuple(
            pk.logprobs_from_logits(
                x, tokens, entropy=True, temperature=0.7, softcap=4.0, logit_scale=0.9
            )
        )

    with executor(name):
        assert torch.autograd.gradcheck(f, logits.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_raises(backend):
    logits, tokens = example(3, 13)
    logits.requires_grad_()
    out = pk.logprobs_from_logits(logits, tokens, backend=backend)
    with pytest.raises(RuntimeError, match=r"logprobs_from_logits: .*double backward"):
        torch.autograd.grad(out.sum(), logits, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    logits, tokens = example(2, 3, 50)
    logits.requires_grad_()
    temperatures = torch.rand(2, 3) + 0.5
    ops = torch.ops.ppo_kernels
    args = (tokens, tokens > 9, temperatures, 1.0, 0.0, 1.0, -100)
    opcheck(ops.logprob_forward, (logits, *args, True, False, backend))
    opcheck(
        ops.logprob_forward,
        (logits, tokens, None, None, 0.7, 9.0, 1.0, -100, False, False, backend),
    )
    logprobs, _, state = ops.logprob_forward(logits.detach(), *args, True, False, backend)
    upstream = torch.rand(2, 3)
    saved = (upstream, upstream, logits.detach().clone(), *args[:3], logprobs, state, *args[3:])
    opcheck(ops.logprob_backward, (*saved, backend))
    opcheck(ops.logprob_backward_, (*saved, backend))


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic):
    def f(x, t, m):
        out = pk.logprobs_from_logits(x, t, mask=m, temperature=0.9, entropy=True, backend=backend)
        return out.logprobs.sum() + out.entropy.square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        logits, tokens = example(rows, 4, 60, seed=rows)
        mask = tokens > 5
        a, b = (logits.clone().requires_grad_() for _ in range(2))
        expected, got = f(a, tokens, mask), compiled(b, tokens, mask)
        expected.backward()
        got.backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_graphs_run_the_kernel(backend):
    logits, tokens = example(3, 4, 60)
    compiled = torch.compile(pk.logprobs_from_logits, fullgraph=True, backend="aot_eager")
    pk.reset_op_counts()
    compiled(logits.requires_grad_(), tokens, backend=backend).sum().backward()
    assert pk.op_counts() == {("logprob_forward", backend): 1, ("logprob_backward", backend): 1}


@pytest.mark.parametrize("name", COMPILED)
def test_rows_nobody_asks_about_are_not_read(name):
    """Masked tokens get a zero upstream gradient from the loss: NaN logits there stay harmless."""
    logits, tokens = example(4, 5000)
    logits[1] = torch.nan
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0])
    with executor(name):
        leaf = logits.requires_grad_()
        out = pk.logprobs_from_logits(leaf, tokens)
        torch.where(weight > 0, out * weight, 0.0).sum().backward()
    assert not leaf.grad[1].any()
    assert not leaf.grad[3].any()
    assert leaf.grad[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_alone_and_logprobs_alone_have_gradients(backend):
    logits, tokens = example(3, 20, dtype=torch.float64)
    for part in (0, 1):
        grads = []
        for name in (backend, "torch"):
            leaf = logits.clone().requires_grad_()
            out = pk.logprobs_from_logits(leaf, tokens, entropy=True, backend=name)
            out[part].sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_any_nonzero_mask_value_counts(mask_dtype, backend):
    logits, tokens = example(2, 3, 20)
    mask = torch.tensor([[0, 2, 0], [3, 0, 1]]).to(mask_dtype)
    got = pk.logprobs_from_logits(logits, tokens, mask=mask, backend=backend)
    assert torch.equal(got != 0, mask != 0)


# ---- bad input -----------------------------------------------------------------------------------

LOGITS, TOKENS = example(2, 3, 11)
BAD = [
    (dict(logits=[1.0]), TypeError, "logits: expected a tensor, got list"),
    (dict(logits=LOGITS.long()), TypeError, "logits: expected dtype float32, .*, got int64"),
    (dict(logits=LOGITS[..., :0]), ValueError, r"logits: expected shape .* got \[2, 3, 0\]"),
    (dict(tokens=TOKENS.float()), TypeError, "tokens: expected dtype int32, int64, got float32"),
    (dict(tokens=TOKENS[:1]), ValueError, r"tokens: expected shape \[2, 3\] .*, got \[1, 3\]"),
    (dict(tokens=TOKENS.to("meta")), ValueError, f"tokens: expected device {DEVICE}.*, got meta"),
    (
        dict(tokens=TOKENS + 100),
        ValueError,
        r"tokens: expected ids in \[0, 11\) .* flat position 0",
    ),
    (dict(tokens=TOKENS - TOKENS - 1), ValueError, r"tokens: .* got -1 at flat position 0"),
    (dict(mask=TOKENS[0] > 0), ValueError, r"mask: expected shape \[2, 3\] \(as tokens\)"),
    (dict(mask=[True]), TypeError, "mask: expected a tensor, got list"),
    (dict(mask=TOKENS + 0j), TypeError, "mask: expected dtype bool, .*, got complex64"),
    (
        dict(temperature=0.0),
        ValueError,
        r"temperature: expected a finite number in \(0, inf\), got 0",
    ),
    (dict(temperature="hot"), TypeError, "temperature: expected a number, got str"),
    (dict(temperature=torch.ones(2)), ValueError, r"temperature: .* broadcasts to \[2, 3\]"),
    (
        dict(temperature=torch.tensor([1.0, 0.0, 1.0])),
        ValueError,
        "temperature: expected finite values above 0 at live positions, got 0.0 at flat position 1",
    ),
    (dict(temperature=torch.ones((), requires_grad=True)), ValueError, "temperature: .*detach"),
    (dict(softcap=-1.0), ValueError, r"softcap: expected a finite number in \(0, inf\), got -1"),
    (dict(logit_scale=math.inf), ValueError, r"logit_scale: expected a finite number .*, got inf"),
    (dict(ignore_index=None), TypeError, "ignore_index: expected an int, got NoneType"),
    (dict(backend="gpu"), ValueError, "backend: unknown backend 'gpu', expected one of auto, "),
]


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input(backend, change, error, message):
    arguments = dict(logits=LOGITS, tokens=TOKENS, backend=backend) | change
    with raises(backend, error, message):
        pk.logprobs_from_logits(**arguments)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_bad_labels_under_the_mask_are_nobodys_business(backend):
    tokens = TOKENS.clone()
    tokens[0, 0], tokens[1, 1] = 10**9, -5
    mask = torch.ones_like(tokens)
    mask[0, 0] = mask[1, 1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = pk.logprobs_from_logits(LOGITS, tokens, mask=mask, backend=backend)
    assert got.isfinite().all()
    pk.check()
