"""The scans in CUDA C++ beyond the cube and test_scan.py: tiles, nodes and schedules."""

import cuda_emulated
import pytest
import torch
from scan_oracle import CONVENTIONS

import ppo_kernels as pk

pytestmark = pytest.mark.skipif(
    cuda_emulated.unavailable() is not None, reason=str(cuda_emulated.unavailable())
)
BACKEND = cuda_emulated.NAME
TILE, FAN = 2048, 32  # of csrc/cuda/scan_steps.cuh and scan_tree.cuh


def example(lengths, convention=None, seed=0, flag_rate=0.001, density=0.9, dtype=torch.float32):
    """Packed sequences with every option; NaN where nobody may look."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal():
        return torch.randn(n, generator=g, dtype=torch.float64).to(dtype)

    def chosen(rate):
        return torch.rand(n, generator=g) < rate

    truncated, mask = chosen(flag_rate), chosen(density)
    inputs = {"rewards": normal(), "values": normal(), "truncated": truncated}
    inputs |= {"next_values": torch.where(truncated, normal(), torch.nan)}
    inputs |= {"terminated": chosen(flag_rate), "gamma": 0.999, "value_lam": 0.9}
    inputs |= {"lam": torch.rand(len(lengths), generator=g) * 0.1 + 0.9}
    if convention:
        for name in ("rewards", "values", "next_values"):
            inputs[name][~mask] = torch.nan
        inputs |= {"mask": mask, "mask_convention": convention}
    return inputs | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def results(inputs, upstream=None, backend=BACKEND):
    """Advantages, returns and gradients."""
    leaves = [k for k in ("rewards", "values", "next_values") if k in inputs]
    inputs = inputs | {k: inputs[k].clone().requires_grad_() for k in leaves}
    got = pk.gae(**inputs, backend=backend)
    if upstream is None:
        upstream = torch.sin(torch.arange(got.returns.numel()) * 0.1).view(got.returns.shape)
    pair = [upstream.to(x.dtype) * k for k, x in zip((1, 2), got, strict=True)]
    grads = torch.autograd.grad(got, [inputs[k] for k in leaves], pair)
    return [x.detach() for x in (*got, *grads)]


def off_policy(inputs, seed=7):
    """The same for vtrace."""
    g = torch.Generator().manual_seed(seed)
    rewards = inputs["rewards"]
    logprobs, change = torch.randn((2, rewards.numel()), generator=g).to(rewards.dtype)
    more = {"logprobs": logprobs, "rollout_logprobs": logprobs + 0.05 * change, "c_clip": 1.05}
    if "mask" in inputs:
        for x in (more["logprobs"], more["rollout_logprobs"]):
            x[~inputs["mask"]] = torch.nan
    return {k: x for k, x in inputs.items() if k != "value_lam"} | more


# Sequences longer than a node of the third level, tiles of nothing but short ones, ends on the
# edges of tiles and nodes.
LENGTHS = {
    "long": [3, FAN**3 + 2 * TILE + 5, 40],
    "short": [*([1, 2, 0, FAN, FAN + 1, 70] * 40)],
    "edges": [TILE, TILE - 1, 1, 2 * TILE, TILE - FAN, FAN, FAN * FAN, FAN * FAN, 0, TILE + 1],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_schedule_gives_the_bits_of_the_recurrence(lengths, convention):
    """In fp64, where every order of sums shows."""
    inputs = example(lengths, convention, dtype=torch.float64)
    expected = results(inputs)
    for got, wanted in zip(expected, results(inputs, backend="cpu"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    for schedule in cuda_emulated.SCHEDULES:
        with cuda_emulated.scheduled(**schedule):
            for got, wanted in zip(results(inputs), expected, strict=True):
                assert torch.equal(got, wanted), schedule


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_schedule_gives_the_bits_of_vtrace(lengths, convention):
    inputs = off_policy(example(lengths, convention, dtype=torch.float64))
    expected = pk.vtrace(**inputs, backend=BACKEND)
    for got, wanted in zip(expected, pk.vtrace(**inputs, backend="cpu"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    for schedule in cuda_emulated.SCHEDULES:
        with cuda_emulated.scheduled(**schedule):
            for got, wanted in zip(pk.vtrace(**inputs, backend=BACKEND), expected, strict=True):
                assert torch.equal(got, wanted), schedule


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("before", [1, FAN - 1, FAN, FAN + 1, TILE - FAN * FAN, TILE, TILE + 77])
def test_bits_do_not_depend_on_the_place_in_a_tile(convention, before):
    n = 2 * TILE + 2 * FAN + 5
    alone = example([n], convention, seed=1, dtype=torch.float64)
    others = example([before, 20], convention, seed=2, dtype=torch.float64)
    among = {
        k: torch.cat([x[:before], alone[k], x[before:]])
        for k, x in others.items()
        if k in alone and isinstance(x, torch.Tensor) and x.numel() == before + 20
    }
    among = alone | among | {"cu_seqlens": torch.tensor([0, before, before + n, before + n + 20])}
    among["lam"] = torch.cat([others["lam"][:1], alone["lam"], others["lam"][1:]])
    upstream = torch.cos(torch.arange(n) * 0.1)
    around = torch.cat([torch.ones(before), upstream, torch.ones(20)])
    for got, wanted in zip(results(among, around), results(alone, upstream), strict=True):
        assert torch.equal(got[before : before + n], wanted)
    with_ratios, expected = off_policy(among), off_policy(alone)
    for k in ("logprobs", "rollout_logprobs"):
        with_ratios[k][before : before + n] = expected[k]
    results_of = [pk.vtrace(**x, backend=BACKEND) for x in (with_ratios, expected)]
    for got, wanted in zip(*results_of, strict=True):
        assert torch.equal(got[before : before + n], wanted)


@pytest.mark.parametrize("shape", [(1, 300_000), (3, 2 * TILE), (2 * TILE + 1, 1), (700, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_and_many_rows_are_exact(shape, dtype):
    """Integers without discount: a lost or doubled step shows at once."""
    g = torch.Generator().manual_seed(0)
    r = torch.randint(-3, 4, shape, generator=g).to(dtype)
    ends = torch.randint(-3, 4, shape[:1], generator=g).to(dtype)
    to_go = r.double().flip(1).cumsum(1).flip(1)
    got = pk.discounted_returns(r, gamma=1, bootstrap=ends, backend=BACKEND)
    assert torch.equal(got, to_go.float() + ends[:, None].float())


@pytest.mark.parametrize("edge", [-1, 0, 1])
@pytest.mark.parametrize("at", [FAN, FAN * FAN, TILE])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nothing_passes_a_cut_at_the_edge_of_a_tile_or_node(bad, at, edge):
    n = 3 * TILE
    for cut in (at + edge, n - at + edge):  # from either end
        r, ends = torch.zeros(1, n, requires_grad=True), torch.zeros(1, n)
        ends[0, cut] = 1
        with torch.no_grad():
            r[0, cut + 1 :] = bad
        got = pk.discounted_returns(r, gamma=0.99, terminated=ends, backend=BACKEND)
        assert not got[0, : cut + 1].any()
        assert not got[0, cut + 1 :].isfinite().any()
        upstream = torch.zeros(1, n)
        upstream[0, : cut + 1] = bad
        (grad,) = torch.autograd.grad(got, r, upstream)
        assert not grad[0, : cut + 1].isfinite().any()
        assert not grad[0, cut + 1 :].any()


@pytest.mark.parametrize("convention", ["carry", "zero"])
def test_masks_of_long_gaps(convention):
    """Tiles without a live step, and nodes whose steps are many tiles apart."""
    n = 8 * TILE
    for live in (slice(5 * TILE, None), slice(0, 7), slice(None, None, 300)):
        inputs = example([n, n], dtype=torch.float64)
        inputs["mask"] = torch.zeros(2, n)
        inputs["mask"][:, live] = 1
        inputs["mask"] = inputs["mask"].flatten()
        inputs |= {"mask_convention": convention}
        for got, wanted in zip(results(inputs), results(inputs, backend="cpu"), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
