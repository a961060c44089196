"""The scans in Triton beyond the cube and test_scan.py: levels, places, what is launched.

Runs where the backend does: on a GPU, or interpreted with TRITON_INTERPRET=1.
"""

import pytest
import torch
from device import INTERPRETED

import ppo_kernels as pk
from ppo_kernels import _faults
from ppo_kernels.testing import device_of, executors

if "triton" not in executors("gae", "discounted_returns"):
    pytest.skip("triton runs neither on a GPU nor interpreted", allow_module_level=True)

from ppo_kernels.triton import _configs, scan

DEVICE = device_of("triton")
CHUNK = 8  # in these tests, so that short sequences have many levels of chunks
CONVENTIONS = [None, "carry", "zero", "truncate"]
NUMBERS = ("rewards", "values", "next_values", "logprobs", "rollout_logprobs")


@pytest.fixture(autouse=True)
def tiny_chunks(monkeypatch):
    monkeypatch.setattr(_configs, "SCAN", _configs.Config(32, 1, CHUNK))
    _faults._flags.clear()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    yield
    torch.use_deterministic_algorithms(False)
    _faults._flags.clear()


def example(lengths, seed=0, density=0.7, flag_rate=0.05):
    """Packed sequences with every option; NaN where nobody may look."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal(size=n):
        return torch.randn(size, generator=g, dtype=torch.float64)

    def chosen(rate):
        return torch.rand(n, generator=g) < rate

    mask, truncated = chosen(density), chosen(flag_rate)
    inputs = {
        "rewards": normal(),
        "values": normal(),
        "next_values": torch.where(truncated, normal(), torch.nan),
        "mask": mask,
        "terminated": chosen(flag_rate),
        "truncated": truncated,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "lam": torch.rand(len(lengths), generator=g, dtype=torch.float64) * 0.2 + 0.8,
        "value_lam": 0.97,
        "gamma": 0.99,
    }
    logprobs = normal()
    return inputs | {"logprobs": logprobs, "rollout_logprobs": logprobs + 0.3 * normal()}


def prepared(inputs, convention, *without):
    """On the device, with NaN under the mask, which without a convention is left out."""
    inputs = {k: v for k, v in inputs.items() if k not in without}
    if convention is None:
        inputs.pop("mask", None)
    else:
        for k in inputs.keys() & {*NUMBERS}:
            x = inputs[k] = inputs[k].clone()
            x[..., : inputs["mask"].shape[-1]][~inputs["mask"]] = torch.nan
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def targets(inputs, convention, backend="triton"):
    """Advantages and returns of vtrace, on the CPU."""
    inputs = prepared(inputs, convention, "value_lam") | {"rho_clip": 1.2, "c_clip": 1.1}
    return [x.cpu() for x in pk.vtrace(**inputs, mask_convention=convention, backend=backend)]


def results(inputs, convention, backend="triton", upstream=None):
    """Advantages, returns and gradients, on the CPU."""
    inputs = prepared(inputs, convention, "logprobs", "rollout_logprobs")
    leaves = [inputs[k].requires_grad_() for k in ("rewards", "values", "next_values")]
    got = pk.gae(**inputs, mask_convention=convention, backend=backend)
    if upstream is None:
        g = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in got]
    grads = torch.autograd.grad(got, leaves, [u.to(DEVICE) for u in upstream])
    return [x.detach().cpu() for x in (*got, *grads)]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("flag_rate", [0.0, 0.004, 0.2])
def test_levels_over_levels_equal_the_reference(convention, flag_rate):
    """700 steps are 88 chunks of 8, these are 11, these are 2."""
    lengths = [700, 3, 0, CHUNK, CHUNK + 1, 64, 65, 1, 72, 73, 0]
    inputs = example(lengths, density=0.9, flag_rate=flag_rate)
    exact = results(inputs, convention, "torch")
    exact += targets(inputs, convention, "torch")
    both = results(inputs, convention) + targets(inputs, convention)
    for got, wanted in zip(both, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(1, 700), (3, 130), (5, 32), (7, 33), (40, 3), (9, 16)])
def test_padded_rows_equal_the_reference(convention, shape):
    """Rows longer and shorter than a block, alone and many to a block, with a bootstrap value."""
    inputs = example([shape[1]] * shape[0], flag_rate=0.01)
    inputs.pop("cu_seqlens")
    rows = {
        k: v.view(shape) if isinstance(v, torch.Tensor) and v.numel() == shape[0] * shape[1] else v
        for k, v in inputs.items()
    }
    rows["lam"] = inputs["lam"]
    last = torch.arange(shape[0], dtype=torch.float64)[:, None]
    rows["values"] = torch.cat([rows["values"], last], 1)
    exact = results(rows, convention, "torch")
    exact += targets(rows, convention, "torch")
    both = results(rows, convention) + targets(rows, convention)
    for got, wanted in zip(both, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_bits_do_not_depend_on_the_place(convention):
    """A sequence alone, and behind others of every length modulo a block."""
    n = 150
    alone = example([n], seed=3, flag_rate=0.01) | {"lam": torch.tensor([0.9]).double()}
    upstream = [torch.sin(torch.arange(n).double() * k) for k in (1, 2)]
    expected = results(alone, convention, upstream=upstream) + targets(alone, convention)
    for before in (*range(1, 34, 8 if INTERPRETED else 4), 100):
        others = example([before, 20], seed=before)
        packed = {
            k: torch.cat([x[:before], alone[k], x[before:]])
            for k, x in others.items()
            if isinstance(x, torch.Tensor) and x.numel() == before + 20
        }
        packed |= {
            "cu_seqlens": torch.tensor([0, before, before + n, before + n + 20]),
            "lam": torch.tensor([0.5, 0.9, 0.7]).double(),
            "value_lam": 0.97,
            "gamma": 0.99,
        }
        pads = [torch.cat([torch.ones(before), u, torch.ones(20)]).double() for u in upstream]
        got = results(packed, convention, upstream=pads) + targets(packed, convention)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a[before : before + n], b), before


def test_rounding_happens_once():
    """fp32 results are the fp64 ones, rounded."""
    inputs = example([300], flag_rate=0.0)
    single = {
        k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    for k in ("rewards", "values", "next_values"):
        inputs[k] = single[k].double()
    inputs["lam"] = single["lam"].double()
    upstream = [torch.linspace(-1, 1, 300).float() * k for k in (1, 2)]
    exact = results(inputs, None, upstream=[u.double() for u in upstream])
    for got, wanted in zip(results(single, None, upstream=upstream), exact, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted.float())


# ---- launches ------------------------------------------------------------------------------------


def test_short_rows_are_one_launch_and_no_number_is_a_constant(monkeypatch):
    seen = []
    monkeypatch.setattr(
        scan, "launch", lambda kernel, n, *args, config, **kw: seen.append((kernel.__name__, kw))
    )
    for rows, length, gamma in ((1, CHUNK, 0.9), (30, 5, 0.8), (200, 7, 1.0)):
        x = torch.ones(rows, length, device=DEVICE)
        pk.gae(x, x, gamma=gamma, lam=gamma / 2, backend="triton")
    assert [name for name, _ in seen] == ["forward_kernel"] * 3
    assert seen[0] == seen[1] == seen[2]


def test_one_long_row_is_shared_out(monkeypatch):
    """No kernel has fewer programs than its work has blocks."""
    seen = []
    monkeypatch.setattr(
        scan, "launch", lambda kernel, n, *args, config, **kw: seen.append((kernel.__name__, n))
    )
    x = torch.ones(1, 5000, device=DEVICE)
    pk.gae(x, x, gamma=0.9, lam=0.9, backend="triton")
    own = 32 - CHUNK
    counts = [5000, *(5000 // CHUNK**level + 1 for level in (1, 2, 3, 4))]
    up = [-(-n // own) for n in counts]
    assert [n for _, n in seen] == up + up[-2::-1]
