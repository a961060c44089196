"""categorical_kl beyond the cube: collapsed and equal rows, bits, infinities, graphs, errors."""

import math

import pytest
import torch
from device import DEVICE, OFFSETS, THREADS, kernels, raises, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels.testing import DTYPES, LAYOUTS, executor, executors

EXECUTORS = executors("categorical_kl", device=DEVICE)
COMPILED = [e for e in EXECUTORS if e != "torch"]
KERNELS = kernels("categorical_kl")
BOTH = pytest.mark.parametrize("reverse", [False, True])
NAMES = pytest.mark.parametrize("name", EXECUTORS)


def example(*shape, seed=0, dtype=torch.float32, gap=0.5):
    g = seeded(seed)
    logits = torch.randn(shape, generator=g, dtype=torch.float64) * 3
    ref = logits + torch.randn(shape, generator=g, dtype=torch.float64) * gap
    return logits.to(dtype), ref.to(dtype)


def gradient(logits, ref, upstream=None, **more):
    leaf = logits.detach().requires_grad_()
    kl = pk.categorical_kl(leaf, ref, **more)
    return torch.autograd.grad(kl, leaf, torch.ones_like(kl) if upstream is None else upstream)[0]


def oracle(first, second):
    """KL(first || second) by exactly rounded sums over Python floats, every term at least 0."""

    def logprobs(row):
        top = max(row)
        total = math.fsum(math.exp(v - top) for v in row)
        return [v - top - math.log(total) for v in row]

    terms = []
    for a, b in zip(logprobs(first), logprobs(second), strict=True):
        if b == -math.inf and a > -math.inf:
            return math.inf
        # sum of p log(p / q) - p + q
        x = b - a if a > -math.inf else 0.0
        terms.append(math.exp(a) * (math.expm1(x) - x) if a > -math.inf else math.exp(b))
    return math.fsum(terms)


# ---- values --------------------------------------------------------------------------------------


@NAMES
def test_hand_computed(name):
    logits = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    ref = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    backward = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    slope = 0.75 * 0.25 * math.log(3)  # dKL/dx = p (log p/q - KL)
    with executor(name):
        assert pk.categorical_kl(logits, ref).item() == pytest.approx(forward, rel=1e-14)
        assert pk.categorical_kl(logits, ref, reverse=True).item() == pytest.approx(
            backward, rel=1e-14
        )
        assert gradient(logits, ref).tolist() == pytest.approx([slope, -slope], rel=1e-13)
        assert gradient(logits, ref, reverse=True).tolist() == pytest.approx([0.25, -0.25])


@NAMES
@BOTH
def test_equals_the_torch_expression(name, reverse):
    logits, ref = example(3, 4, 1000, dtype=torch.float64)
    logp, logq = ((x / 0.8).log_softmax(-1) for x in (logits, ref))
    if reverse:
        logp, logq = logq, logp
    expected = torch.nn.functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
    with executor(name):
        got = pk.categorical_kl(logits, ref, reverse=reverse, temperature=0.8)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@NAMES
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_give_exactly_zero(name, reverse, dtype):
    logits, _ = example(5, 3001, dtype=dtype)
    logits[1] = 7.25
    logits[2, 9] = 60.0
    logits[3, :2000] = -torch.inf
    with executor(name):
        kl = pk.categorical_kl(logits, logits.clone(), reverse=reverse, temperature=0.7)
        grad = gradient(logits, logits.clone(), reverse=reverse)
    assert not kl.any()
    if name != "torch":
        assert not grad.any()


@NAMES
@BOTH
@pytest.mark.parametrize("margins", [(10.0, 12.0), (17.0, 20.0), (40.0, 37.0)])
@pytest.mark.parametrize("vocab", [2, 1000, 5000])
def test_collapsed_rows_keep_relative_accuracy(name, reverse, margins, vocab):
    """One token holds all the mass of both: a log-sum-exp in fp32 would read 0 for its rest."""
    logits, ref = (torch.zeros(vocab) for _ in range(2))
    logits[vocab // 2], ref[vocab // 2] = margins
    first, second = margins[::-1] if reverse else margins
    a, b = ((vocab - 1) * math.exp(-m) for m in (first, second))
    exact = (math.log1p(b) - math.log1p(a)) + a / (1 + a) * (second - first)
    p, q = ((vocab - 1) * math.exp(-m) for m in margins)
    rest = q / (1 + q) - p / (1 + p)
    with executor(name):
        kl = pk.categorical_kl(logits, ref, reverse=reverse)
        grad = gradient(logits, ref, reverse=reverse)
    assert kl.item() == pytest.approx(exact, rel=2e-5)
    if reverse and name != "torch":  # p - q
        assert grad[vocab // 2].item() == pytest.approx(rest, rel=2e-5)
        assert grad[0].item() == pytest.approx(-rest / (vocab - 1), rel=2e-5)


@NAMES
@BOTH
def test_logits_near_a_thousand(name, reverse):
    logits, ref = example(4, 999)
    logits, ref = logits + 1024, ref + 2048  # rounded here, exact from here on
    with executor(name):
        far = pk.categorical_kl(logits, ref, reverse=reverse)
        near = pk.categorical_kl(logits - 1024, ref - 2048, reverse=reverse)
        grads = [gradient(x, r, reverse=reverse) for x, r in ((logits, ref), (logits - 1024, ref))]
    torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(*grads, rtol=2e-6, atol=1e-8)


@NAMES
@BOTH
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_lowest_float_masks_as_minus_infinity_does(name, reverse, temperature):
    """Differences from it overflow when they are scaled."""
    lowest = torch.finfo(torch.float32).min
    rows = example(3, 5000)
    rows[0][:, ::3] = lowest
    rows[1][1, ::3] = lowest  # in the second distribution too: elsewhere only p underflows
    infinite = [x.where(x > lowest, -torch.inf) for x in rows]
    pairs = [pair[::-1] if reverse else pair for pair in (rows, infinite)]
    more = {"reverse": reverse, "temperature": temperature}
    with executor(name):
        (kl, same_kl), (grad, same_grad) = (
            [call(*pair, **more) for pair in pairs] for call in (pk.categorical_kl, gradient)
        )
    assert kl.isfinite().all()
    torch.testing.assert_close(kl, same_kl, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, same_grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", COMPILED)
@BOTH
def test_a_token_forbidden_by_the_lowest_float(name, reverse):
    """A divergence of 1e37, that is; sums of its terms overflow."""
    logits, ref = example(1, 5000)
    (logits if reverse else ref)[:, ::3] = torch.finfo(torch.float32).min
    with executor(name):
        kl = pk.categorical_kl(logits, ref, reverse=reverse, temperature=2.0)
    exact = pk.categorical_kl(
        logits.double(), ref.double(), reverse=reverse, temperature=2.0, backend="torch"
    )
    torch.testing.assert_close(kl.double(), exact, rtol=2e-6, atol=0)


@NAMES
@BOTH
def test_logits_near_the_largest_float(name, reverse):
    first, second = (torch.full((2, 5000), -3e38) for _ in range(2))
    first[:, [4500, 4501]] = 3e38
    second[:, [4500, 4501]] = second[0, 7] = 3e38
    rows = (second, first) if reverse else (first, second)
    with executor(name):
        kl = pk.categorical_kl(*rows, reverse=reverse, temperature=0.5)
        grad = gradient(*rows, reverse=reverse, temperature=0.5)
    torch.testing.assert_close(kl, torch.tensor([math.log(1.5), 0.0]), rtol=1e-6, atol=0)
    slope = torch.zeros(2, 5000)
    if reverse:  # (p - q) / temperature
        slope[0, [7, 4500, 4501]] = torch.tensor([2 / 3, -1 / 3, -1 / 3])
    torch.testing.assert_close(grad, slope, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@NAMES
def test_any_rows_agree_with_python(name, data):
    size = data.draw(st.integers(1, 40))
    value = st.one_of(st.floats(-60, 60, width=32), st.sampled_from([0.0, 5.0, -math.inf]))
    rows = [data.draw(st.lists(value, min_size=size, max_size=size)) for _ in range(2)]
    for row in rows:
        row[data.draw(st.integers(0, size - 1))] = 1.0
    reverse = data.draw(st.booleans())
    with executor(name):
        got = pk.categorical_kl(*(torch.tensor(r) for r in rows), reverse=reverse).item()
    exact = oracle(*(rows[::-1] if reverse else rows))
    spread = max(abs(v) for row in rows for v in row if v > -math.inf)
    assert got == exact or got == pytest.approx(exact, abs=2e-6 * (spread + 4))


# ---- infinities and masks ------------------------------------------------------------------------


@NAMES
def test_forbidden_tokens(name):
    inf = math.inf
    logits = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, 0.0], [0.0, -inf, -inf]])
    ref = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -inf], [0.0, -inf, -inf]])
    with executor(name):
        forward = pk.categorical_kl(logits, ref)
        backward = pk.categorical_kl(logits, ref, reverse=True)
        assert forward.tolist() == pytest.approx([math.log(1.5), inf, 0.0])
        assert backward.tolist() == pytest.approx([inf, math.log(1.5), 0.0])
        grads = gradient(logits, ref), gradient(logits, ref, reverse=True)
    for grad, infinite in zip(grads, (1, 0), strict=True):
        assert grad[infinite].isnan().all()
        assert grad[1 - infinite].isfinite().all()
        assert not grad[2].any()


@NAMES
@BOTH
def test_a_forbidden_token_far_below_the_maximum_counts(name, reverse):
    """Its probability underflows, and it stands before the maximum: rescaling must not lose it."""
    logits, ref = example(2, 5000)
    rows = (ref, logits) if reverse else (logits, ref)
    rows[0][0, 3], rows[0][0, 4800] = -500.0, 400.0
    rows[1][0, 3] = -torch.inf
    with executor(name):
        kl = pk.categorical_kl(logits, ref, reverse=reverse)
    assert kl[0] == torch.inf
    assert kl[1].isfinite()


@NAMES
@BOTH
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int64, *DTYPES])
def test_nothing_under_the_mask_has_an_effect(name, reverse, mask_dtype):
    logits, ref = example(2, 3, 70)
    mask = torch.tensor([[0, 2, 0], [3, 0, 1]]).to(mask_dtype)
    dead = mask == 0
    results = []
    for bad in (0.0, torch.nan, torch.inf, -torch.inf):
        x, r = logits.clone(), ref.clone()
        x[dead], r[dead] = bad, -bad
        with executor(name):
            kl = pk.categorical_kl(x, r, mask=mask, reverse=reverse)
            grad = gradient(x, r, mask=mask, reverse=reverse)
        assert not kl[dead].any()
        assert not grad[dead].any()
        assert grad[~dead].any()
        results.append((kl, grad))
    for kl, grad in results:
        assert torch.equal(kl, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("name", COMPILED)
def test_rows_nobody_asks_about_are_not_read(name):
    logits, ref = example(3, 50)
    logits[1] = torch.nan
    with executor(name):
        grad = gradient(logits, ref, torch.tensor([1.0, 0.0, 2.0]))
    assert not grad[1].any()
    assert grad[[0, 2]].isfinite().all()
    assert grad[[0, 2]].any()


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILED)
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row_depend_on_nothing_but_the_row(name, reverse, dtype):
    logits, ref = example(5, 10007, dtype=dtype)
    logits[1, :5000] = -torch.inf  # chunks without a maximum
    logits[2, 9000], ref[2, 9000] = 60.0, 62.0
    with executor(name):

        def both(x, r):
            return pk.categorical_kl(x, r, reverse=reverse), gradient(x, r, reverse=reverse)

        def same(x, r, rows=slice(None)):
            kl, grad = both(x, r)
            torch.testing.assert_close(kl, expected[0][rows], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(grad, expected[1][rows], rtol=0, atol=0, equal_nan=True)

        expected = both(logits, ref)
        for layout in LAYOUTS.values():
            same(layout(logits), layout(ref))
            same(logits, layout(ref))
        for offset in OFFSETS:
            buffer = torch.empty(logits.numel() + offset, dtype=dtype)
            same(buffer[offset:].view(logits.shape).copy_(logits)[:2], ref[:2], slice(2))
        for i in range(5):
            same(logits[i], ref[i], i)
        threads = torch.get_num_threads()
        try:
            for n in THREADS:
                torch.set_num_threads(n)
                same(logits, ref)
                same(logits[2:3].expand(30, -1), ref[2:3].expand(30, -1), [2] * 30)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [e for e in COMPILED if e.startswith("cpu")])
@BOTH
def test_bits_of_one_row_do_not_depend_on_the_threads(name, reverse):
    """It is long enough that its chunks are shared out."""
    logits, ref = example(1, 150001)
    logits[0, 70000], ref[0, 70000] = 60.0, 62.0
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            with executor(name):
                results.append(pk.categorical_kl(logits, ref, reverse=reverse).item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(results)) == 1


@pytest.mark.parametrize("name", [e for e in COMPILED if e.startswith("cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_larger_than_the_cache_has_the_same_bits(name, dtype):
    """It is streamed past the cache, from rows that begin anywhere in a line."""
    vocab = 10007
    rows = (36 << 20) // (dtype.itemsize * vocab)
    logits, ref = example(7, vocab, dtype=dtype)
    many = torch.arange(rows) % 7
    with executor(name):
        small = gradient(logits, ref)
        large = gradient(logits[many], ref[many])
    assert torch.equal(large, small[many])


@pytest.mark.parametrize("name", COMPILED)
def test_offsets_past_2_31_elements(name):
    base = torch.empty(2**31 + 200, dtype=torch.bfloat16)  # never touched but at its two ends
    logits, values = base.as_strided((2, 100), (2**31, 1)), example(2, 100, dtype=torch.bfloat16)
    logits.copy_(values[0])
    with executor(name):
        assert torch.equal(pk.categorical_kl(logits, values[1]), pk.categorical_kl(*values))
        assert torch.equal(pk.categorical_kl(values[0], logits), torch.zeros(2))
        assert torch.equal(gradient(logits, values[1]), gradient(*values))


@NAMES
def test_mixed_dtypes(name):
    logits, ref = example(3, 200)
    with executor(name):
        assert pk.categorical_kl(logits.bfloat16(), ref.double()).dtype == torch.float64
        assert gradient(logits.bfloat16(), ref.double()).dtype == torch.bfloat16
        mixed = pk.categorical_kl(logits.bfloat16(), ref)
        assert torch.equal(mixed, pk.categorical_kl(logits.bfloat16().float(), ref))


# ---- autograd and graphs -------------------------------------------------------------------------


@NAMES
@BOTH
def test_gradcheck(name, reverse):
    logits, ref = example(3, 13, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1])

    def f(x):
        return pk.categorical_kl(x, ref, reverse=reverse, temperature=0.7, mask=mask)

    with executor(name):
        assert torch.autograd.gradcheck(f, logits.requires_grad_())


@pytest.mark.parametrize("backend", KERNELS)
def test_double_backward_raises(backend):
    logits, ref = example(3, 13)
    kl = pk.categorical_kl(logits.requires_grad_(), ref, backend=backend)
    with pytest.raises(RuntimeError, match=r"categorical_kl: .*double backward"):
        torch.autograd.grad(kl.sum(), logits, create_graph=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend):
    logits, ref = example(2, 3, 50)
    mask = torch.ones(2, 3)
    ops = torch.ops.ppo_kernels
    args = (True, 0.7, backend)
    opcheck(ops.categorical_kl_forward, (logits.clone().requires_grad_(), ref, mask, *args))
    opcheck(ops.categorical_kl_forward, (logits, ref.double(), None, False, 1.0, backend))
    kl, state = ops.categorical_kl_forward(logits, ref, mask, *args)
    opcheck(ops.categorical_kl_backward, (kl, logits, ref, mask, kl, state, *args))


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic):
    def f(x, r, m):
        return pk.categorical_kl(x, r, mask=m, temperature=0.9, backend=backend).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        logits, ref = example(rows, 4, 60, seed=rows)
        mask = logits[..., 0] > 0
        a, b = (logits.clone().requires_grad_() for _ in range(2))
        expected, got = f(a, ref, mask), compiled(b, ref, mask)
        expected.backward()
        got.backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(b.grad, a.grad)


# ---- bad input -----------------------------------------------------------------------------------

LOGITS, REF = example(2, 3, 11)
BAD = [
    (dict(logits=[1.0]), TypeError, "^logits: expected a tensor, got list"),
    (dict(logits=LOGITS.long()), TypeError, "^logits: expected dtype float32, .*, got int64"),
    (dict(logits=LOGITS[..., :0]), ValueError, r"logits: expected shape .* got \[2, 3, 0\]"),
    (dict(logits=torch.tensor(1.0)), ValueError, r"logits: expected shape .* got \[\]"),
    (dict(ref_logits=None), TypeError, "ref_logits: expected a tensor, got NoneType"),
    (dict(ref_logits=REF[:1]), ValueError, r"ref_logits: expected shape \[2, 3, 11\] .* \[1, 3, "),
    (dict(ref_logits=REF.int()), TypeError, "ref_logits: expected dtype float32, .*, got int32"),
    (dict(ref_logits=REF.to("meta")), ValueError, f"ref_logits: expected device {DEVICE}.* meta"),
    (dict(ref_logits=REF.clone().requires_grad_()), ValueError, r"ref_logits: .*detach\(\)"),
    (dict(mask=LOGITS > 0), ValueError, r"mask: expected shape \[2, 3\] .*, got \[2, 3, 11\]"),
    (dict(mask=[True]), TypeError, "mask: expected a tensor, got list"),
    (
        dict(mask=torch.ones(2, 3).to("meta")),
        ValueError,
        f"mask: expected device {DEVICE}.* got meta",
    ),
    (dict(temperature=0.0), ValueError, r"temperature: expected .* in \(0, inf\), got 0"),
    (dict(temperature=torch.ones(())), TypeError, "temperature: expected a number, got Tensor"),
    (dict(backend="gpu"), ValueError, "backend: unknown backend 'gpu', expected one of auto, "),
]


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input(backend, change, error, message):
    with raises(backend, error, message):
        pk.categorical_kl(**(dict(logits=LOGITS, ref_logits=REF, backend=backend) | change))
