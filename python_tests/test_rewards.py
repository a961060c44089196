"""shape_rewards beyond the cube: by hand, against a loop, its gradients."""

import itertools
import math

import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_oracle import ESTIMATORS, example

import ppo_kernels as pk
from ppo_kernels.testing import executor, executors

EXECUTORS = executors("kl_penalty", "shape_rewards", device=DEVICE)
NAN = math.nan


@pytest.mark.parametrize("name", EXECUTORS)
def test_rewards_by_hand(name):
    logprobs = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, NAN], [NAN, NAN, NAN], [1.0, NAN, 3.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1]])
    scores = torch.tensor([10.0, 20.0, NAN, 40.0])
    expected = [[-0.5, -1, 8.5], [-2, 17.5, 0], [0, 0, 0], [-0.5, 0, 38.5]]
    packed = [0, 3, 6, 6, 9, 12]
    with executor(name):
        for coef in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)):
            out = pk.shape_rewards(scores, logprobs, logprobs * 0, mask, kl_coef=coef)
            assert out.rewards.tolist() == expected
            assert torch.equal(out.kl, torch.where(mask != 0, logprobs, 0))
        # The same, packed, with an empty sequence in between whose score has nowhere to go.
        offsets = torch.tensor(packed)
        out = pk.shape_rewards(
            torch.tensor([10.0, 20.0, 99.0, NAN, 40.0]),
            logprobs.flatten(),
            logprobs.flatten() * 0,
            mask.flatten(),
            kl_coef=0.5,
            cu_seqlens=offsets,
        )
        assert out.rewards.view(4, 3).tolist() == expected
        free = pk.shape_rewards(scores[:2], logprobs[:2, :2], logprobs[:2, :2], kl_coef=0)
        assert free.rewards.tolist() == [[0, 10], [0, 20]]


@pytest.mark.parametrize("name", EXECUTORS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_rewards_match_a_loop_and_packing_equals_padding(name, data):
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    coef = data.draw(st.sampled_from([0.0, 0.05, 1.0]))
    options = {
        "estimator": data.draw(st.sampled_from(ESTIMATORS)),
        "log_ratio_clamp": data.draw(st.sampled_from([None, 0.3])),
    }
    B, T = len(lengths), max(lengths) + data.draw(st.integers(0, 2))
    logprobs, ref, mask = example(B, T, seed=data.draw(st.integers(0, 99)), dtype=torch.float64)
    scores = torch.linspace(-1, 1, B, dtype=torch.float64)
    inside = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    mask &= inside
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    with executor(name):
        kl = pk.kl_penalty(logprobs, ref, mask, **options)
        padded = pk.shape_rewards(scores, logprobs, ref, mask, kl_coef=coef, **options)
        packed = pk.shape_rewards(
            scores,
            logprobs[inside],
            ref[inside],
            mask[inside],
            kl_coef=coef,
            cu_seqlens=offsets,
            **options,
        )
    assert torch.equal(padded.kl, kl)
    for p, q in zip(padded, packed, strict=True):
        assert torch.equal(p[inside], q)
    for b in range(B):
        live = [t for t in range(T) if mask[b, t]]
        for t in range(T):
            reward = -coef * kl[b, t].item() + (scores[b].item() if live[-1:] == [t] else 0)
            assert padded.rewards[b, t].item() == pytest.approx(reward, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("name", EXECUTORS)
def test_rewards_of_one_token_and_of_none(name):
    with executor(name):
        one = pk.shape_rewards(
            torch.tensor([2.0]), torch.tensor([[1.0]]), torch.tensor([[0.5]]), kl_coef=1.0
        )
        none = pk.shape_rewards(torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 4), kl_coef=1.0)
        scores = torch.ones(2, requires_grad=True)
        nothing = torch.zeros(0, requires_grad=True)
        packed = pk.shape_rewards(
            scores, nothing, torch.zeros(0), kl_coef=1.0, cu_seqlens=torch.tensor([0, 0, 0])
        )
        packed.rewards.sum().backward()
    assert one.rewards.tolist() == [[1.5]]
    assert none.rewards.shape == (0, 4)
    assert scores.grad.tolist() == [0, 0]


@pytest.mark.parametrize("name", EXECUTORS)
def test_rewards_gradients_by_part(name):
    logprobs, ref, mask = example(3, 5, dtype=torch.float64)
    mask[1] = False
    mask[0, 3:], mask[2, 4] = False, True
    last = [int(mask[b].nonzero().max()) if mask[b].any() else None for b in range(3)]
    upstream = torch.arange(15.0, dtype=torch.float64).view(3, 5) + 1
    coef = torch.tensor(0.3)
    with executor(name):
        scores = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
        leaf = logprobs.clone().requires_grad_()
        out = pk.shape_rewards(scores, leaf, ref, mask, kl_coef=coef, estimator="k2")
        by_rewards = torch.autograd.grad(out.rewards, (scores, leaf), upstream, retain_graph=True)
        by_kl = torch.autograd.grad(out.kl, leaf, upstream, retain_graph=True)[0]
        by_both = torch.autograd.grad(out, leaf, (upstream, upstream))[0]
        only = pk.shape_rewards(scores, logprobs, ref, mask, kl_coef=coef).rewards
        alone = torch.autograd.grad(only, scores, upstream)[0]
    expected = [0 if t is None else upstream[b, t].item() for b, t in enumerate(last)]
    assert by_rewards[0].tolist() == alone.tolist() == expected
    assert by_rewards[0].dtype == torch.bfloat16
    slope = torch.where(mask, upstream * (logprobs - ref), 0.0)
    torch.testing.assert_close(by_kl, slope)
    torch.testing.assert_close(by_rewards[1], -0.3 * slope, rtol=1e-6, atol=0)
    torch.testing.assert_close(by_both, 0.7 * slope, rtol=1e-6, atol=0)
