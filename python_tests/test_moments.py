"""whiten, masked_sum and masked_mean beyond the cube: exact cases, bits, ranks, graphs, errors."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from device import DEVICE, kernels, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels.testing import DTYPES, LAYOUTS, executor, executors

EXECUTORS = executors("whiten", "masked_mean", "masked_sum", device=DEVICE)
COMPILED = [e for e in EXECUTORS if e != "torch"]
BACKENDS = kernels("whiten", "masked_mean", "masked_sum")
NAN = math.nan


def example(*shape, seed=0, dtype=torch.float32):
    g = seeded(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.rand(shape, generator=g) < 0.6


def oracle(x, mask, shift_mean=True, unbiased=True, eps=1e-8):
    """Whitening by exactly rounded sums over Python floats."""
    flat, use = x.double().flatten().tolist(), mask.flatten().tolist()
    live = [v for v, m in zip(flat, use, strict=True) if m]
    if not live:
        return torch.zeros(x.shape, dtype=torch.float64)
    mean = math.fsum(live) / len(live)
    m2 = math.fsum((v - mean) ** 2 for v in live)
    n = len(live) - unbiased
    scale = 1 / math.sqrt((m2 / n if n else 0.0) + eps)
    back = 0.0 if shift_mean else mean
    y = [(v - mean) * scale + back if m else 0.0 for v, m in zip(flat, use, strict=True)]
    return torch.tensor(y, dtype=torch.float64).view(x.shape)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_hand_computed(name):
    x = torch.tensor([[1.0, 5.0, NAN], [NAN, 3.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    with executor(name):
        assert pk.masked_sum(x, mask).item() == 16
        assert pk.masked_mean(x, mask).item() == 4
        assert pk.masked_sum(x, mask, 0).tolist() == [1, 8, 7]
        assert pk.masked_sum(x, mask, -1).tolist() == [6, 10]
        assert pk.masked_mean(x, mask, 0).tolist() == [1, 4, 7]
        assert pk.masked_mean(x, mask, 1).tolist() == [3, 5]
        # Mean 4, squared deviations 9 + 1 + 1 + 9.
        biased = pk.whiten(x, mask, unbiased=False, eps=0.0)
        shifted = pk.whiten(x, mask, unbiased=True, eps=64 - 20 / 3, shift_mean=False)
    root = math.sqrt(5)
    expected = torch.tensor([[-3, 1, 0], [0, -1, 3]], dtype=torch.float64)
    torch.testing.assert_close(biased, expected / root, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        shifted, torch.where(mask != 0, 4 + expected / 8, 0.0), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("name", EXECUTORS)
def test_nothing_live_gives_zeros(name):
    x = torch.full((3, 4), NAN, requires_grad=True)
    mask = torch.zeros(3, 4)
    with executor(name):
        for out in (
            pk.whiten(x, mask),
            pk.whiten(x, mask, shift_mean=False, eps=0.0),
            pk.masked_sum(x, mask),
            pk.masked_mean(x, mask),
            pk.masked_mean(x, mask, 0),
        ):
            assert not out.any()
            assert not torch.autograd.grad(out.sum(), x)[0].any()
        assert pk.masked_mean(torch.empty(0)).item() == 0
        assert pk.masked_mean(torch.empty(2, 0, 3), dim=1).tolist() == [[0] * 3] * 2
        assert pk.masked_sum(torch.empty(0, 3), dim=1).shape == (0,)
        assert pk.whiten(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize(("mean", "tolerance"), [(1e4, 2e-6), (1e6, 2e-6)])
def test_a_mean_far_above_the_spread_costs_no_accuracy(name, mean, tolerance):
    """A sum of squares minus the squared mean, in fp32, has no correct digit here."""
    x, mask = example(7, 1013)
    x = x + mean  # rounded to fp32 here, exact from here on
    exact = oracle(x, mask)
    with executor(name):
        y = pk.whiten(x, mask).double()
        kept = pk.whiten(x, mask, shift_mean=False).double()
    assert ((y - exact).abs() <= tolerance * exact.abs().clamp(min=1e-6)).all()
    kept_exact = oracle(x, mask, shift_mean=False)
    torch.testing.assert_close(kept, kept_exact, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [0.1, -1e6, 3e-5])
def test_equal_elements_give_exactly_zero(name, dtype, value):
    """Rounding noise around the mean would come out multiplied by 1 / sqrt(eps) = 10^4."""
    x = torch.full((5, 2111), value, dtype=dtype)
    mask = torch.rand(5, 2111, generator=seeded(0)) < 0.5
    with executor(name):
        assert not pk.whiten(x, mask).any()
        kept = pk.whiten(x, mask, shift_mean=False)
        leaf = x.clone().requires_grad_()
        pk.whiten(leaf, mask).sum().backward()
    assert torch.equal(kept, torch.where(mask, x, 0).to(kept.dtype))
    assert not leaf.grad.any()


@pytest.mark.parametrize("name", EXECUTORS)
def test_one_live_element_has_variance_zero(name):
    x, mask = torch.tensor([2.0, 5.0]), torch.tensor([False, True])
    with executor(name):
        assert pk.whiten(x, mask).tolist() == [0, 0]
        assert pk.whiten(x, mask, shift_mean=False).tolist() == [0, 5]


def test_tiny_differences_are_blown_up_to_variance_one_unless_eps_is_larger():
    x = torch.tensor([1.0, 1.0 + 1e-3], dtype=torch.float64)
    amplified = pk.whiten(x)
    assert amplified.abs().max().item() == pytest.approx(0.7, abs=0.01)
    assert pk.whiten(x, eps=1e-2).abs().max() < 0.006


@pytest.mark.parametrize("name", EXECUTORS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_matches_exactly_rounded_sums(name, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    scale = data.draw(st.sampled_from([1e-3, 1.0, 1e3]))
    offset = data.draw(st.sampled_from([0.0, -7.0, 1e4]))
    x, mask = example(*shape, seed=data.draw(st.integers(0, 99)))
    x = x * scale + offset
    options = {
        "shift_mean": data.draw(st.booleans()),
        "unbiased": data.draw(st.booleans()),
        "eps": data.draw(st.sampled_from([1e-8, 1e-2])),
    }
    with executor(name):
        y = pk.whiten(x, mask, **options)
        total, mean = pk.masked_sum(x, mask), pk.masked_mean(x, mask)
    exact = oracle(x, mask, **options)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    live = x[mask].double().tolist()
    assert total.item() == torch.tensor(math.fsum(live), dtype=torch.float64).float().item()
    expected = math.fsum(live) / max(len(live), 1)
    assert mean.item() == pytest.approx(expected, rel=2.0**-23)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (5, 300), (300, 5), (3, 4, 17), (2, 3, 4, 5)])
def test_every_dimension(name, shape):
    x, mask = example(*shape, dtype=torch.float64)
    for dim in range(-len(shape), len(shape)):
        others = [range(n) for i, n in enumerate(shape) if i != dim % len(shape)]
        with executor(name):
            sums, means = pk.masked_sum(x, mask, dim), pk.masked_mean(x, mask, dim)
        assert sums.shape == means.shape == torch.Size([len(r) for r in others])
        for index in itertools.islice(itertools.product(*others), 40):
            where = list(index)
            where.insert(dim % len(shape), slice(None))
            live = x[tuple(where)][mask[tuple(where)]].tolist()
            assert sums[index].item() == pytest.approx(math.fsum(live), rel=1e-13, abs=1e-13)
            mean = math.fsum(live) / max(len(live), 1)
            assert means[index].item() == pytest.approx(mean, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("name", EXECUTORS)
def test_long_sums_of_fp32_keep_every_digit(name):
    """fp32 accumulation would stop growing at 2^24, and lose the fractions long before."""
    n = 5000 if name == "torch" or name.startswith("cpu") else 1200  # others take long
    x = torch.ones(1, 1).expand(n, n)
    with executor(name):
        assert pk.masked_sum(x).item() == n * n
        assert pk.masked_sum(x[:1000, :1000] + 2.0**-10).item() == 1e6 * (1 + 2.0**-10)
        assert pk.masked_sum(x + 2.0**-10, dim=0)[0].item() == n * (1 + 2.0**-10)


# ---- what is masked, NaN and infinity ------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_nothing_under_the_mask_has_an_effect(name, bad):
    x, mask = example(5, 701)
    poisoned = torch.where(mask, x, bad)
    with executor(name):
        for f in (
            pk.whiten,
            pk.masked_sum,
            pk.masked_mean,
            lambda x, m: pk.masked_mean(x, m, 0),
            lambda x, m: pk.masked_sum(x, m, 1),
        ):
            results = []
            for values in (torch.where(mask, x, 0.0), poisoned):
                leaf = values.clone().requires_grad_()
                out = f(leaf, mask)
                upstream = torch.where(mask, 0.7, bad) if out.shape == mask.shape else 0.7
                grad = torch.autograd.grad(out, leaf, torch.as_tensor(upstream).expand_as(out))[0]
                assert not grad[~mask].any()
                results.append((out, grad))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("where", [0, 5000])
def test_not_finite_live_elements_show(name, bad, where):
    x, mask = example(2, 3001)
    x.view(-1)[where], mask.view(-1)[where] = bad, True
    with executor(name):
        y = pk.whiten(x, mask)
        assert y[mask].isnan().all()
        assert not y[~mask].any()
        for f in (pk.masked_sum, pk.masked_mean):
            torch.testing.assert_close(f(x, mask).item(), bad, equal_nan=True)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [*DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64],
)
def test_any_nonzero_mask_value_counts(name, strided, dtype):
    mask = torch.tensor([0, 1, 0, 2, 0, 0, 1]).to(dtype)
    if dtype == torch.float64:
        mask[1] = 1e-300
    if dtype.is_floating_point:
        mask[0], mask[3] = -0.0, NAN
    elif dtype == torch.int64:
        mask[3] = 2**32
    if strided:
        mask = LAYOUTS["strided"](mask)
    x = torch.arange(7.0)
    with executor(name):
        assert pk.masked_sum(x, mask).item() == 1 + 3 + 6
        assert pk.masked_sum(x[None], mask[None], 0).tolist() == [0, 1, 0, 3, 0, 0, 6]


# ---- bits ----------------------------------------------------------------------------------------


def everything(x, mask, upstream):
    leaf = x.detach().requires_grad_()
    y = pk.whiten(leaf, mask)
    return (
        y.detach().reshape(-1),
        torch.autograd.grad(y, leaf, upstream)[0].reshape(-1),
        pk.masked_sum(x, mask),
        pk.masked_mean(x, mask),
        *(f(x, mask, d) for f in (pk.masked_sum, pk.masked_mean) for d in range(x.dim() - 1)),
    )


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(9, 3001), (3001, 9), (2, 1)])
def test_bits_depend_on_neither_threads_nor_strides(name, dtype, shape):
    x, mask = example(*shape, dtype=dtype)
    upstream = example(*shape, seed=1)[0].to(torch.promote_types(dtype, torch.float32))
    with executor(name):
        expected = everything(x, mask, upstream)
        before = torch.get_num_threads()
        try:
            counts = (1,) if name == "triton" else (1, 2, 3)
            for threads, layout in itertools.product(counts, LAYOUTS.values()):
                torch.set_num_threads(threads)
                got = everything(layout(x), layout(mask), layout(upstream))
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        finally:
            torch.set_num_threads(before)
        packed = everything(x.flatten(), mask.flatten(), upstream.flatten())
        assert all(torch.equal(a, b) for a, b in zip(packed[:4], expected[:4], strict=True))


@pytest.mark.parametrize("name", COMPILED)
def test_offsets_past_2_31_elements(name):
    storage = torch.empty(2**31 + 64, dtype=torch.float16)  # never touched but at its two ends
    x = storage.as_strided((2, 5), (2**31, 1))
    x.copy_(torch.arange(10.0).view(2, 5))
    with executor(name):
        assert pk.masked_sum(x).item() == 45
        assert pk.masked_sum(x, dim=0).tolist() == [5, 7, 9, 11, 13]
        assert pk.whiten(x)[1, 4].item() == pytest.approx(4.5 / math.sqrt(82.5 / 9), rel=1e-6)


@pytest.mark.skipif("triton" not in COMPILED, reason="triton does not run here")
@pytest.mark.parametrize("tokens", [16, 70, 1003])
def test_many_blocks_are_merged_as_few(monkeypatch, tokens):
    """Tiny blocks, so that states of several blocks of states are merged, some of them empty."""
    from ppo_kernels.triton import _configs

    monkeypatch.setattr(_configs, "MOMENTS", _configs.Config(16, 1))
    monkeypatch.setattr(_configs, "MERGE_MOMENTS", _configs.Config(4, 1))
    x, mask = example(tokens, dtype=torch.float64)
    x[tokens // 2 :] += 100
    mask[:64] &= tokens <= 64
    y = pk.whiten(x, mask, backend="triton")
    torch.testing.assert_close(y, oracle(x, mask), rtol=1e-12, atol=1e-13)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_gradcheck(name):
    x, mask = example(3, 7, dtype=torch.float64)
    x.requires_grad_()
    with executor(name):
        for options in ({}, {"shift_mean": False}, {"unbiased": False, "eps": 0.3}):
            assert torch.autograd.gradcheck(lambda x, o=options: pk.whiten(x, mask, **o), x)
        for f in (pk.masked_sum, pk.masked_mean):
            for dim in (None, 0, 1):
                assert torch.autograd.gradcheck(lambda x, f=f, d=dim: f(x, mask, d), x)
        assert torch.autograd.gradcheck(pk.masked_mean, x.new_tensor(2.0).requires_grad_())


@pytest.mark.parametrize("name", EXECUTORS)
def test_whitening_ignores_shifts_and_scales_of_its_input(name):
    """So its gradient has no component along 1 nor along y."""
    x, mask = example(4, 1500)
    upstream = example(4, 1500, seed=1)[0]
    leaf = (3 * x + 100).requires_grad_()
    with executor(name):
        y = pk.whiten(leaf, mask, eps=0.0)
        grad = torch.autograd.grad(y, leaf, upstream)[0].double()
    assert abs(grad.sum().item()) < 1e-4
    assert abs((grad * y.double()).sum().item()) < 1e-4
    assert grad.abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_and_means_can_be_differentiated_twice(backend):
    x, mask = example(3, 5, dtype=torch.float64)
    x.requires_grad_()
    for f in (pk.masked_sum, pk.masked_mean):
        assert torch.autograd.gradgradcheck(
            lambda x, f=f: f(x.square(), mask, 1, backend=backend), x
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_whiten_refuses_double_backward(backend):
    x = torch.randn(3, 4, requires_grad=True)
    y = pk.whiten(x, backend=backend)
    with pytest.raises(RuntimeError, match=r"whiten: .*double backward"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


# ---- process groups ------------------------------------------------------------------------------


def rank_main(rank, folder, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group, results = dist.group.WORLD, {}
    for case, parts in cases.items():
        for backend in ("torch", "cpu"):
            results[case, backend] = pk.whiten(*parts[rank], group=group, backend=backend)
    leaf = cases["uneven"][rank][0].clone().requires_grad_()
    with pytest.raises(ValueError, match=r"x: .* group is not differentiable; pass x.detach\(\)"):
        pk.whiten(leaf, group=group)
    with torch.no_grad():
        pk.whiten(leaf, group=group)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="the processes are on the CPU")
def test_ranks_whiten_their_union(tmp_path):
    x, mask = example(11, 1013)
    x = x * 3 + 1e4
    equal, dead = torch.full_like(x, 0.1), torch.zeros_like(mask)

    def cut(x, mask, row):
        return [(x[:row], mask[:row]), (x[row:], mask[row:])]

    cases = {
        "uneven": cut(x, mask, 2),
        "one rank has no tokens": cut(x, mask, 0),
        "one rank has no live token": cut(x, torch.cat([dead[:4], mask[4:]]), 4),
        "equal elements": cut(equal, mask, 3),
        "nothing live": cut(x, dead, 3),
        "twice the same": [(x, mask), (x, mask)],
    }
    mp.spawn(rank_main, (str(tmp_path), cases), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, parts in cases.items():
        exact = oracle(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        for backend in ("torch", "cpu"):
            union = torch.cat([results[case, backend] for results in ranks])
            torch.testing.assert_close(union.double(), exact, rtol=2e-6, atol=1e-6)
            if case in ("equal elements", "nothing live"):
                assert not union.any()
            if case == "twice the same":
                assert torch.equal(*union.chunk(2))


# ---- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, mask = example(3, 50)
    x.requires_grad_()
    ops = torch.ops.ppo_kernels
    opcheck(ops.whiten_forward, (x, mask, True, True, 1e-8, backend))
    opcheck(ops.whiten_forward, (x.T, None, False, False, 0.1, backend))
    for m, dim in ((None, None), (mask, 0), (mask, 1)):
        opcheck(ops.masked_sum, (x, m, dim, backend))
        opcheck(ops.masked_mean, (x, m, dim, backend))
    x = x.detach()
    moments = ops.moments(x, mask, backend)
    opcheck(ops.moments, (x, mask, backend))
    opcheck(ops.whiten_apply, (x, mask, moments, True, True, 1e-8, backend))
    opcheck(ops.whiten_backward, (x, x, mask, moments, True, True, 1e-8, backend))


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic):
    def f(x, m):
        y = pk.whiten(x, m, backend=backend)
        mean = pk.masked_mean(x, m, 1, backend=backend)
        return pk.masked_sum(y * y.detach(), m, backend=backend) + mean.square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        x, mask = example(rows, 60, seed=rows)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        expected, got = f(a, mask), compiled(b, mask)
        expected.backward()
        got.backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(b.grad, a.grad)


# ---- bad input -----------------------------------------------------------------------------------

X, MASK = example(2, 3)
BAD = [
    (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
    (dict(x=X.long()), TypeError, "x: expected dtype float32, .*, got int64"),
    (dict(mask=MASK[0]), ValueError, r"mask: expected shape \[2, 3\] \(as x\), got \[3\]"),
    (dict(mask=True), TypeError, "mask: expected a tensor, got bool"),
    (dict(mask=MASK.to("meta")), ValueError, f"mask: expected device {DEVICE}.* got meta"),
    (dict(backend="gpu"), ValueError, "backend: unknown backend 'gpu', expected one of auto, "),
]
BAD_DIM = [
    (dict(dim=2), ValueError, r"dim: expected a dimension in \[-2, 1\], got 2"),
    (dict(dim=-3), ValueError, r"dim: expected a dimension in \[-2, 1\], got -3"),
    (dict(dim=(0, 1)), TypeError, "dim: expected an int or None, got tuple"),
    (dict(dim=True), TypeError, "dim: expected an int or None, got bool"),
]
BAD_WHITEN = [
    (dict(eps=-1e-8), ValueError, r"eps: expected a finite number in \[0, inf\), got -1e-08"),
    (dict(eps=NAN), ValueError, "eps: expected a finite number .*, got nan"),
    (dict(eps=None), TypeError, "eps: expected a number, got NoneType"),
    (dict(group="world"), TypeError, "group: expected a .* process group, got str"),
]
CALLS = [
    *((pk.whiten, *bad) for bad in BAD + BAD_WHITEN),
    *((f, *bad) for f in (pk.masked_sum, pk.masked_mean) for bad in BAD + BAD_DIM),
]


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize(("function", "change", "error", "message"), CALLS)
def test_bad_input(backend, function, change, error, message):
    with pytest.raises(error, match=message):
        function(**(dict(x=X, mask=MASK, backend=backend) | change))
