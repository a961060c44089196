"""Losses and KL in Triton beyond the cube: counting through blocks, what is launched."""

import pytest
import torch
from gpu_losses import BACKENDS, LOSSES, example, offsets, results

import ppo_kernels as pk
from ppo_kernels.testing import device_of

if "triton" not in BACKENDS:
    pytest.skip("triton runs neither on a GPU nor interpreted", allow_module_level=True)

from ppo_kernels.triton import _configs, _launch, kl, losses

FUNCTIONS = pytest.mark.parametrize("function", [pk.clipped_loss, pk.value_loss])


# ---- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sequences_of_many_blocks_are_counted(monkeypatch, masked, dtype):
    """Blocks of 16: sequences begin and end inside of them, on their edges, and span hundreds."""
    monkeypatch.setattr(_configs, "COUNTS", _configs.Config(16, 1))
    monkeypatch.setattr(_configs, "TOKENS_FP64", _configs.Config(64, 1))
    ends = [16, 16, 20, 25, 32, 33, 47, 47, 96, 700, 701, 701]
    inputs, mask = example("triton", 701, dtype=torch.float64)
    mask[33:47] = False
    more = {
        "cu_seqlens": offsets("triton", *ends, dtype=dtype),
        "aggregation": "seq-mean-token-mean",
    }
    for function in LOSSES:
        got = results(function, "triton", inputs, mask if masked else None, **more)
        want = results(function, "torch", inputs, mask if masked else None, **more)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        assert torch.equal(got[1][:2], want[1][:2])


@pytest.mark.parametrize("function", LOSSES, ids=["clip", "gmpo", "value"])
def test_rows_of_many_blocks_are_counted(monkeypatch, function):
    monkeypatch.setattr(_configs, "COUNTS", _configs.Config(16, 1))
    monkeypatch.setattr(_configs, "TOKENS_FP64", _configs.Config(64, 1))
    inputs, mask = example("triton", 5, 333, dtype=torch.float64)
    mask[3] = False
    more = {"aggregation": "seq-mean-token-mean"}
    torch.testing.assert_close(
        results(function, "triton", inputs, mask, **more),
        results(function, "torch", inputs, mask, **more),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 100])
def test_the_last_live_token_is_found_through_blocks(monkeypatch, length):
    monkeypatch.setattr(_configs, "COUNTS", _configs.Config(16, 1))
    for last in {0, length // 2, length - 1, -1}:
        mask = torch.zeros(3, length, dtype=torch.bool, device=device_of("triton"))
        mask[:, : last + 1] = True
        mask[2] = False
        zeros = torch.zeros(3, length, device=device_of("triton"))
        scores = torch.tensor([2.0, 3.0, torch.nan], device=device_of("triton"))
        packed = {"cu_seqlens": offsets("triton", length, 2 * length, 3 * length)}
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


# ---- launches ------------------------------------------------------------------------------------


def test_inputs_are_not_copied(monkeypatch):
    seen = []
    for module in (losses, kl):
        monkeypatch.setattr(module, "launch", lambda k, n, *args, **kw: seen.append((k, args)))
    inputs, mask = example("triton", 4, 12)
    a, b, c = (t[:, :-1] for t in inputs)
    pk.clipped_loss(a, b, c, mask[:, :-1], backend="triton")
    pk.kl_penalty(a, b, backend="triton")
    policy = next(args for kernel, args in seen if kernel is losses.policy_kernel)
    for at, t in zip((0, 3, 6), (a, b, c), strict=True):
        assert policy[at].data_ptr() == t.data_ptr()
        assert policy[at + 1 : at + 3] == (12, 1)
    assert seen[-1][1][0].data_ptr() == a.data_ptr()


def spied(monkeypatch):
    """A list of calls, to the last of which is added what is launched."""
    calls = []

    def spy(kernel, programs, *args, config, **constants):
        calls[-1].append((kernel.__name__, config, constants))
        _launch.launch(kernel, programs, *args, config=config, **constants)

    monkeypatch.setattr(losses, "launch", spy)
    return calls


def test_no_bound_of_weights_is_a_compile_time_constant(monkeypatch):
    calls = spied(monkeypatch)
    for shape, low, high in (((2, 7), 0.5, 2.0), ((5, 90), 0.0, 1), ((1, 3000), 1.0, 1e9)):
        calls.append([])
        (old, rollout, _), mask = example("triton", *shape)
        bounds = {"low": low, "high": high}
        pk.importance_weights(old, rollout, mask, kind="mask-sequence", **bounds, backend="triton")
    assert calls[0] == calls[1] == calls[2]
    assert len(calls[0]) == 6


@FUNCTIONS
def test_no_number_of_a_call_is_a_compile_time_constant(monkeypatch, function):
    """One more JIT per clip range, length or batch would never be noticed by a value test."""
    calls = spied(monkeypatch)
    settings = (
        ((2, 7), dict(denominator=3.0)),
        ((5, 90), dict(denominator=0.5)),
        ((64, 40), dict(aggregation="token-sum")),
        ((1, 3000), dict(aggregation="seq-sum-norm", norm_length=8.0)),
    )
    for shape, more in settings:
        calls.append([])
        inputs, mask = example("triton", *shape)
        clip = {"clip_low": 0.1 * shape[0]} if function is pk.clipped_loss else {"clip": shape[0]}
        results(function, "triton", inputs, mask, **clip, **more)
    assert calls[0] == calls[1] == calls[2] == calls[3]
    assert len(calls[0]) == 6
