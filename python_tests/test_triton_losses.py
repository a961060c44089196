"""Losses and KL in Triton beyond the cube: counting, offsets, faults, bits, what is launched."""

import pytest
import torch

import ppo_kernels as pk
from ppo_kernels import _faults
from ppo_kernels.ops._aggregation import AGGREGATIONS
from ppo_kernels.testing import LAYOUTS, device_of, executors

if "triton" not in executors("clipped_loss", "value_loss", "kl_penalty", "shape_rewards"):
    pytest.skip("triton runs neither on a GPU nor interpreted", allow_module_level=True)

from ppo_kernels.triton import _configs, _launch, kl, losses

DEVICE = device_of("triton")
FUNCTIONS = pytest.mark.parametrize("function", [pk.clipped_loss, pk.value_loss])


def example(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    first = -torch.randn(shape, generator=g, dtype=torch.float64).abs()
    others = (
        first + 0.4 * torch.randn(shape, generator=g, dtype=torch.float64),
        torch.randn(shape, generator=g, dtype=torch.float64),
    )
    mask = torch.rand(shape, generator=g) < 0.6
    return [t.to(DEVICE, dtype) for t in (first, *others)], mask.to(DEVICE)


def results(function, inputs, mask=None, **more):
    """Loss, stats and gradient."""
    leaf = inputs[0].detach().requires_grad_()
    loss, metrics = function(leaf, *inputs[1:], mask, **{"backend": "triton"} | more)
    (grad,) = torch.autograd.grad(loss * 1.5, leaf)
    return loss.detach(), metrics.stats, grad


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def offsets(*ends, dtype=torch.int32):
    return torch.tensor([0, *ends], dtype=dtype, device=DEVICE)


# ---- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sequences_of_many_blocks_are_counted(monkeypatch, masked, dtype):
    """Blocks of 16: sequences begin and end inside of them, on their edges, and span hundreds."""
    monkeypatch.setattr(_configs, "COUNTS", _configs.Config(16, 1))
    monkeypatch.setattr(_configs, "TOKENS_FP64", _configs.Config(64, 1))
    ends = [16, 16, 20, 25, 32, 33, 47, 47, 96, 700, 701, 701]
    inputs, mask = example(701, dtype=torch.float64)
    mask[33:47] = False
    more = {"cu_seqlens": offsets(*ends, dtype=dtype), "aggregation": "seq-mean-token-mean"}
    for function in (pk.clipped_loss, pk.value_loss):
        got = results(function, inputs, mask if masked else None, **more)
        want = results(function, inputs, mask if masked else None, backend="torch", **more)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        assert torch.equal(got[1][:2], want[1][:2])


@FUNCTIONS
def test_rows_of_many_blocks_are_counted(monkeypatch, function):
    monkeypatch.setattr(_configs, "COUNTS", _configs.Config(16, 1))
    monkeypatch.setattr(_configs, "TOKENS_FP64", _configs.Config(64, 1))
    inputs, mask = example(5, 333, dtype=torch.float64)
    mask[3] = False
    more = {"aggregation": "seq-mean-token-mean"}
    torch.testing.assert_close(
        results(function, inputs, mask, **more),
        results(function, inputs, mask, backend="torch", **more),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 100])
def test_the_last_live_token_is_found_through_blocks(monkeypatch, length):
    monkeypatch.setattr(_configs, "COUNTS", _configs.Config(16, 1))
    for last in {0, length // 2, length - 1, -1}:
        mask = torch.zeros(3, length, dtype=torch.bool, device=DEVICE)
        mask[:, : last + 1] = True
        mask[2] = False
        zeros = torch.zeros(3, length, device=DEVICE)
        scores = torch.tensor([2.0, 3.0, torch.nan], device=DEVICE)
        packed = {"cu_seqlens": offsets(length, 2 * length, 3 * length)}
        a = pk.shape_rewards(scores, zeros, zeros, mask, kl_coef=1.0, backend="triton").rewards
        b = pk.shape_rewards(
            scores, zeros.view(-1), zeros.view(-1), mask.view(-1), kl_coef=1.0, backend="triton",
            **packed,
        ).rewards  # fmt: skip
        want = torch.zeros_like(zeros)
        if last >= 0:
            want[0, last], want[1, last] = 2.0, 3.0
        assert torch.equal(a, want)
        assert torch.equal(b.view(3, length), want)


# ---- bits ----------------------------------------------------------------------------------------


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_bits_do_not_depend_on_strides(function, dtype, aggregation):
    inputs, mask = example(7, 601, dtype=dtype)
    expected = results(function, inputs, mask, aggregation=aggregation)
    assert expected[2].count_nonzero() > 1000
    for layout in LAYOUTS.values():
        moved = [layout(t) for t in (*inputs, mask)]
        assert equal(results(function, moved[:3], moved[3], aggregation=aggregation), expected)
    mixed = [inputs[0], LAYOUTS["transposed"](inputs[1]), LAYOUTS["shifted"](inputs[2])]
    assert equal(results(function, mixed, mask, aggregation=aggregation), expected)


@FUNCTIONS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_tokens_gradient_has_the_same_bits_padded_and_packed(function, aggregation):
    lengths = [3, 0, 700, 1, 512]
    inside = torch.arange(700, device=DEVICE)[None] < torch.tensor(lengths, device=DEVICE)[:, None]
    padded, mask = example(5, 700)
    mask &= inside
    more = {
        "aggregation": aggregation,
        "norm_length": 9.0 if aggregation == "seq-sum-norm" else None,
        "denominator": torch.tensor(3, device=DEVICE),
    }
    a = results(function, padded, mask, **more)[2]
    packed = [t[inside] for t in padded]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    b = results(function, packed, mask[inside], cu_seqlens=offsets(*ends), **more)[2]
    assert torch.equal(a[inside], b)
    assert not a[~mask].any()


def test_sums_of_blocks_are_kept_in_fp64():
    """Equal terms, so that every rounding of a sum in fp32 goes the same way."""
    n = 300_000
    values = torch.full((n,), 0.1, device=DEVICE)
    m = pk.value_loss(values, None, torch.zeros_like(values), clip=None, backend="triton").metrics
    assert m.value_mean.item() == pytest.approx(values[0].double().item(), rel=1e-13)


# ---- faults --------------------------------------------------------------------------------------


@pytest.fixture
def no_faults():
    _faults._flags.clear()
    yield
    _faults._flags.clear()


BAD_OFFSETS = [
    ([1, 4, 9], 0),
    ([-1, 4, 9], 0),
    ([0, 4, 8], 2),
    ([0, 4, 10], 2),
    ([0, 6, 5, 9], 2),
    ([0, 10**9, 9], 2),
    ([0, -5, 9], 1),
    ([0], 0),
    ([3], 0),
]


@pytest.mark.parametrize(("bad", "where"), BAD_OFFSETS)
@FUNCTIONS
def test_bad_offsets_give_nan_and_are_raised_by_check(no_faults, function, bad, where):
    inputs, mask = example(9)
    for more in ({}, {"aggregation": "seq-mean-token-mean"}):
        for m in (None, mask):
            cu_seqlens = torch.tensor(bad, device=DEVICE)
            loss, _, grad = results(function, inputs, m, cu_seqlens=cu_seqlens, **more)
            assert loss.isnan()
            assert torch.equal(grad.isnan(), torch.ones_like(mask) if m is None else mask)
            with pytest.raises(ValueError, match=f"cu_seqlens: .* flat position {where} in"):
                pk.check()
    pk.check()


@pytest.mark.parametrize(("bad", "where"), BAD_OFFSETS)
def test_bad_offsets_of_rewards_are_raised_by_check(no_faults, bad, where):
    (a, b, _), mask = example(9)
    scores = torch.ones(len(bad) - 1, device=DEVICE)
    pk.shape_rewards(
        scores, a, b, mask, kl_coef=0.1, cu_seqlens=torch.tensor(bad, device=DEVICE),
        backend="triton",
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"cu_seqlens: .* flat position {where} in"):
        pk.check()


@pytest.mark.parametrize("coef", [-0.1, torch.inf, torch.nan])
def test_a_bad_coefficient_gives_nan_and_is_raised_by_check(no_faults, coef):
    (a, b, _), mask = example(2, 5)
    scores = torch.ones(2, device=DEVICE)
    coef = torch.tensor(coef, device=DEVICE)
    out = pk.shape_rewards(scores, a, b, mask, kl_coef=coef, backend="triton")
    assert torch.equal(out.rewards.isnan(), mask)
    assert not out.kl.isnan().any()
    with pytest.raises(ValueError, match=r"kl_coef: expected a finite number in \[0, inf\)"):
        pk.check()


def test_nothing_is_a_fault_in_good_calls(no_faults):
    inputs, mask = example(9)
    for ends in ([9], [0, 9], [4, 4, 9, 9]):
        results(pk.clipped_loss, inputs, mask, cu_seqlens=offsets(*ends))
        scores = torch.ones(len(ends), device=DEVICE)
        coef = torch.zeros((), device=DEVICE)
        pk.shape_rewards(
            scores, *inputs[:2], mask, kl_coef=coef, cu_seqlens=offsets(*ends), backend="triton"
        )
    pk.check()


# ---- launches ------------------------------------------------------------------------------------


def test_inputs_are_not_copied(monkeypatch):
    seen = []
    for module in (losses, kl):
        monkeypatch.setattr(module, "launch", lambda k, n, *args, **kw: seen.append((k, args)))
    inputs, mask = example(4, 12)
    a, b, c = (t[:, :-1] for t in inputs)
    pk.clipped_loss(a, b, c, mask[:, :-1], backend="triton")
    pk.kl_penalty(a, b, backend="triton")
    policy = next(args for kernel, args in seen if kernel is losses.policy_kernel)
    for at, t in zip((0, 3, 6), (a, b, c), strict=True):
        assert policy[at].data_ptr() == t.data_ptr()
        assert policy[at + 1 : at + 3] == (12, 1)
    assert seen[-1][1][0].data_ptr() == a.data_ptr()


@FUNCTIONS
def test_no_number_of_a_call_is_a_compile_time_constant(monkeypatch, function):
    """One more JIT per clip range, length or batch would never be noticed by a value test."""
    calls = []

    def spy(kernel, programs, *args, config, **constants):
        calls[-1].append((kernel.__name__, config, constants))
        _launch.launch(kernel, programs, *args, config=config, **constants)

    monkeypatch.setattr(losses, "launch", spy)
    settings = (
        ((2, 7), dict(denominator=3.0)),
        ((5, 90), dict(denominator=0.5)),
        ((64, 40), dict(aggregation="token-sum")),
        ((1, 3000), dict(aggregation="seq-sum-norm", norm_length=8.0)),
    )
    for shape, more in settings:
        calls.append([])
        inputs, mask = example(*shape)
        clip = {"clip_low": 0.1 * shape[0]} if function is pk.clipped_loss else {"clip": shape[0]}
        results(function, inputs, mask, **clip, **more)
    assert calls[0] == calls[1] == calls[2] == calls[3]
    assert len(calls[0]) == 6
