"""Losses and rewards on every GPU backend: bits, and what only the data can tell."""

import pytest
import torch
from gpu_losses import BACKENDS, LOSSES, equal, example, offsets, results

import ppo_kernels as pk
from ppo_kernels import _faults
from ppo_kernels.ops._aggregation import AGGREGATIONS
from ppo_kernels.testing import LAYOUTS, device_of

EACH = pytest.mark.parametrize("backend", BACKENDS)
FUNCTIONS = pytest.mark.parametrize("function", LOSSES, ids=["clip", "gmpo", "value"])


@pytest.fixture(autouse=True)
def no_faults():
    _faults._flags.clear()
    yield
    _faults._flags.clear()


# ---- bits ----------------------------------------------------------------------------------------


@EACH
@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_bits_do_not_depend_on_strides(backend, function, dtype, aggregation):
    inputs, mask = example(backend, 7, 601, dtype=dtype)
    expected = results(function, backend, inputs, mask, aggregation=aggregation)
    assert expected[2].count_nonzero() > 1000
    for layout in LAYOUTS.values():
        moved = [layout(t) for t in (*inputs, mask)]
        assert equal(
            results(function, backend, moved[:3], moved[3], aggregation=aggregation), expected
        )
    mixed = [inputs[0], LAYOUTS["transposed"](inputs[1]), LAYOUTS["shifted"](inputs[2])]
    assert equal(results(function, backend, mixed, mask, aggregation=aggregation), expected)


@EACH
@FUNCTIONS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_tokens_gradient_has_the_same_bits_padded_and_packed(backend, function, aggregation):
    lengths, device = [3, 0, 700, 1, 512], device_of(backend)
    inside = torch.arange(700, device=device)[None] < torch.tensor(lengths, device=device)[:, None]
    padded, mask = example(backend, 5, 700)
    mask &= inside
    more = {
        "aggregation": aggregation,
        "norm_length": 9.0 if aggregation == "seq-sum-norm" else None,
        "denominator": torch.tensor(3, device=device),
    }
    a = results(function, backend, padded, mask, **more)[2]
    packed = [t[inside] for t in padded]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    b = results(
        function, backend, packed, mask[inside], cu_seqlens=offsets(backend, *ends), **more
    )[2]
    assert torch.equal(a[inside], b)
    assert not a[~mask].any()


@EACH
def test_an_advantage_per_sequence_is_an_advantage_per_token(backend):
    inputs, mask = example(backend, 5, 333)
    per_sequence = torch.linspace(-2, 2, 5, device=device_of(backend))
    spread = per_sequence[:, None].expand(5, 333)
    assert equal(
        results(pk.clipped_loss, backend, [*inputs[:2], per_sequence], mask),
        results(pk.clipped_loss, backend, [*inputs[:2], spread], mask),
    )


@EACH
def test_sums_of_blocks_are_kept_in_fp64(backend):
    """Equal terms, so that every rounding of a sum in fp32 goes the same way."""
    n = 300_000
    values = torch.full((n,), 0.1, device=device_of(backend))
    m = pk.value_loss(values, None, torch.zeros_like(values), clip=None, backend=backend).metrics
    assert m.value_mean.item() == pytest.approx(values[0].double().item(), rel=1e-13)


@EACH
@FUNCTIONS
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_bad_upstream_gradient_stays_out_of_masked_positions(backend, function, bad):
    (first, *others), mask = example(backend, 3, 40)
    leaf = first.requires_grad_()
    loss, _ = function(leaf, *others, mask, backend=backend)
    loss.backward(torch.tensor(bad, device=device_of(backend)))
    assert not leaf.grad[~mask].any()
    assert not leaf.grad[mask].isfinite().all()


# ---- faults --------------------------------------------------------------------------------------

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


@EACH
@pytest.mark.parametrize(("bad", "where"), BAD_OFFSETS)
@FUNCTIONS
def test_bad_offsets_give_nan_and_are_raised_by_check(backend, function, bad, where):
    inputs, mask = example(backend, 9)
    for more in ({}, {"aggregation": "seq-mean-token-mean"}):
        for m in (None, mask):
            cu_seqlens = torch.tensor(bad, device=mask.device)
            loss, _, grad = results(function, backend, inputs, m, cu_seqlens=cu_seqlens, **more)
            assert loss.isnan()
            assert torch.equal(grad.isnan(), torch.ones_like(mask) if m is None else mask)
            with pytest.raises(ValueError, match=f"cu_seqlens: .* flat position {where} in"):
                pk.check()
    pk.check()


@EACH
@pytest.mark.parametrize(("bad", "where"), BAD_OFFSETS)
def test_bad_offsets_of_weights_give_nan_and_are_raised_by_check(backend, bad, where):
    (a, b, _), mask = example(backend, 9)
    for kind in ("tis", "mask-geometric"):
        cu_seqlens = torch.tensor(bad, device=mask.device)
        weights, _ = pk.importance_weights(
            a, b, mask, kind=kind, high=2.0, cu_seqlens=cu_seqlens, backend=backend
        )
        assert torch.equal(weights.isnan(), mask)
        with pytest.raises(ValueError, match=f"cu_seqlens: .* flat position {where} in"):
            pk.check()


@EACH
@pytest.mark.parametrize(("bad", "where"), BAD_OFFSETS)
def test_bad_offsets_of_rewards_are_raised_by_check(backend, bad, where):
    (a, b, _), mask = example(backend, 9)
    scores, cu_seqlens = torch.ones(len(bad) - 1), torch.tensor(bad)
    pk.shape_rewards(
        scores.to(mask.device), a, b, mask, kl_coef=0.1, cu_seqlens=cu_seqlens.to(mask.device),
        backend=backend,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"cu_seqlens: .* flat position {where} in"):
        pk.check()


@EACH
@pytest.mark.parametrize("coef", [-0.1, torch.inf, torch.nan])
def test_a_bad_coefficient_gives_nan_and_is_raised_by_check(backend, coef):
    (a, b, _), mask = example(backend, 2, 5)
    scores, coef = (torch.tensor(x, device=mask.device) for x in ([1.0, 1.0], coef))
    out = pk.shape_rewards(scores, a, b, mask, kl_coef=coef, backend=backend)
    assert torch.equal(out.rewards.isnan(), mask)
    assert not out.kl.isnan().any()
    with pytest.raises(ValueError, match=r"kl_coef: expected a finite number in \[0, inf\)"):
        pk.check()


@EACH
def test_nothing_is_a_fault_in_good_calls(backend):
    inputs, mask = example(backend, 9)
    for ends in ([9], [0, 9], [4, 4, 9, 9]):
        packed = {"cu_seqlens": offsets(backend, *ends), "backend": backend}
        pk.clipped_loss(*inputs, mask, aggregation="seq-mean-token-mean", **packed)
        scores = torch.ones(len(ends), device=mask.device)
        coef = torch.zeros((), device=mask.device)
        pk.shape_rewards(scores, *inputs[:2], mask, kl_coef=coef, **packed)
    pk.check()
