"""clipped_loss beyond the cube: an oracle, ties and overflow, advantages, its variants."""

import math

import pytest
import torch
from loss_oracle import (
    BACKENDS,
    EXECUTORS,
    KERNELS,
    NORM,
    bits,
    plain_policy,
    plain_weights,
    some_mask,
    split,
    tokens,
    with_grad,
)
from torch.testing import assert_close

import ppo_kernels as pk
from ppo_kernels.ops._aggregation import AGGREGATIONS
from ppo_kernels.testing import executor


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_sequence", [False, True])
@EXECUTORS
def test_policy_loss_equals_plain_python(name, aggregation, packed, per_sequence):
    shape, ends = (5, 14), [14, 28, 42, 56, 70]
    if packed:
        shape, ends = (70,), [14, 14, 45, 46, 62, 70]
    lp, old, adv = tokens(*shape, spread=0.7)
    mask = some_mask(*shape)
    mask.view(-1)[ends[-2] :] = False
    if per_sequence:
        adv = torch.linspace(-2.0, 1.5, len(ends), dtype=torch.float64)
        token_adv = [
            [a] * len(r) for a, r in zip(adv.tolist(), split([0] * ends[-1], ends), strict=True)
        ]
    else:
        token_adv = split(adv.flatten().tolist(), ends)
    bounds = {"clip_low": 0.15, "clip_high": 0.3, "dual_clip": 1.6, "log_ratio_clamp": 0.8}
    rows = split(mask.flatten().tolist(), ends)
    weights = plain_weights(rows, aggregation, 2.5)
    xs = split((lp - old).flatten().tolist(), ends)
    loss, gradient, live = 0.0, [], []
    for row, w_row, a_row in zip(xs, weights, token_adv, strict=True):
        for x, w, a in zip(row, w_row, a_row, strict=True):
            token = plain_policy(x, a, 0.15, 0.3, 1.6, 0.8)
            loss += w * token[0]
            gradient.append(w * token[1])
            if w:
                live.append((*token, a))
    with executor(name):
        got, grad, m = with_grad(
            pk.clipped_loss, lp, old, adv, mask, aggregation=aggregation, denominator=2.5,
            norm_length=NORM.get(aggregation),
            cu_seqlens=torch.tensor([0, *ends]) if packed else None, **bounds,
        )  # fmt: skip
    close = {"rtol": 1e-12, "atol": 1e-14}
    assert_close(got.item(), loss, **close)
    assert_close(grad.flatten().tolist(), gradient, **close)

    n = len(live)
    losses, _, cuts, x, r, a = zip(*live, strict=True)
    assert {"high", "low", "dual", None} <= set(cuts)
    expected = {
        "tokens": n,
        "sequences": sum(any(row) for row in rows),
        "loss": sum(losses) / n,
        "unclipped_loss": -sum(p * q for p, q in zip(a, r, strict=True)) / n,
        "clip_fraction": (cuts.count("high") + cuts.count("low")) / n,
        "clip_fraction_high": cuts.count("high") / n,
        "clip_fraction_low": cuts.count("low") / n,
        "dual_clip_fraction": cuts.count("dual") / n,
        "kl_k1": -sum(x) / n,
        "kl_k3": sum(p - 1 - q for p, q in zip(r, x, strict=True)) / n,
        "ratio_mean": sum(r) / n,
        "ratio_max": max(r),
        "ratio_min": min(r),
        "ess": sum(r) ** 2 / sum(p * p for p in r) / n,
    }
    measured = m.as_dict()
    assert list(measured) == list(expected)
    assert {k: v.item() for k, v in measured.items()} == pytest.approx(expected, rel=1e-12)
    assert all(v.dtype == torch.float64 and v.dim() == 0 for v in measured.values())


@EXECUTORS
def test_a_case_worked_out_by_hand(name):
    """Ratios 1, 2, 2, 1/2, 1/2, 4 against bounds 3/4, 3/2 and dual clip 3."""
    old = torch.zeros(1, 6)
    lp = torch.tensor([[1.0, 2.0, 2.0, 0.5, 0.5, 4.0]]).log()
    adv = torch.tensor([[3.0, 1.0, -1.0, 1.0, -1.0, -1.0]])
    with executor(name):
        loss, grad, m = with_grad(
            pk.clipped_loss, lp, old, adv, clip_low=0.25, clip_high=0.5, dual_clip=3.0,
            aggregation="token-sum",
        )  # fmt: skip
    # Token losses -3, -1.5 (high), 2, -0.5, 0.75 (low), 3 (dual).
    assert_close(loss, torch.tensor(0.75))
    assert_close(grad, torch.tensor([[-3.0, 0.0, 2.0, -0.5, 0.0, 0.0]]))
    assert [round(6 * f.item()) for f in (m.clip_fraction_high, m.clip_fraction_low)] == [1, 1]
    assert round(6 * m.dual_clip_fraction.item()) == 1


# ---- ratios of 1 and infinity ------------------------------------------------------------------


@EXECUTORS
def test_on_policy_step_carries_the_whole_gradient(name):
    lp, _, adv = tokens(4, 8, dtype=torch.float32)
    with executor(name):
        loss, grad, m = with_grad(pk.clipped_loss, lp, lp.clone(), adv)
    assert torch.equal(grad, -adv / 32)
    assert_close(loss, -adv.mean())
    assert m.ratio_max == m.ratio_min == m.ratio_mean == m.ess == 1
    assert m.kl_k1 == m.kl_k3 == m.clip_fraction == 0


@EXECUTORS
def test_ratios_that_overflow(name):
    x = torch.tensor([200.0, 200.0, -200.0, -200.0, torch.inf, -torch.inf])
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    old = torch.zeros(6)
    with executor(name):
        for i, (loss, slope) in enumerate(
            [(-1.2, 0), (torch.inf, torch.inf), (0, 0), (0.8, 0), (-1.2, 0), (0, 0)]
        ):
            got, grad, _ = with_grad(pk.clipped_loss, x[[i]], old[[i]], adv[[i]])
            assert_close(got.item(), float(loss))
            assert grad.item() == slope
        got, grad, m = with_grad(
            pk.clipped_loss, x, old, adv, log_ratio_clamp=2.0, aggregation="token-sum"
        )
    e = math.exp(2.0)
    assert_close(got.item(), -1.2 + e - 1 / e + 0.8 - 1.2 - 1 / e, rtol=1e-6, atol=1e-6)
    assert grad.count_nonzero() == 0
    assert_close(m.ratio_max.item(), e, rtol=1e-6, atol=0)
    assert_close(m.kl_k3.item(), (3 * (e - 3) + 3 * (1 / e + 1)) / 6, rtol=1e-6, atol=0)


# ---- advantages of sequences -------------------------------------------------------------------


@EXECUTORS
def test_the_advantage_of_a_masked_sequence_is_never_looked_at(name):
    lp, old, _ = tokens(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
    with executor(name):
        a, b = (
            with_grad(pk.clipped_loss, lp, old, torch.tensor([1.0, bad, -2.0]), mask)
            for bad in (0.0, torch.nan)
        )
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@KERNELS
def test_an_advantage_per_sequence_is_an_advantage_per_token(backend):
    lp, old, _ = tokens(5, 333, dtype=torch.float32)
    adv = torch.randn(5)
    a, b = (
        bits(pk.clipped_loss, lp, old, each, backend=backend)
        for each in (adv, adv[:, None].expand(5, 333))
    )
    assert all(map(torch.equal, a, b))


@BACKENDS
def test_packed_tokens_whose_number_is_that_of_the_sequences_have_their_own_advantages(backend):
    lp, old, adv = tokens(3)
    offsets = torch.tensor([0, 0, 2, 3])
    a, b = (
        with_grad(pk.clipped_loss, lp, old, adv, cu_seqlens=c, backend=backend)
        for c in (None, offsets)
    )
    assert torch.equal(a[1], b[1])


# ---- variants ----------------------------------------------------------------------------------


def test_every_variant_names_its_formula_and_paper():
    from ppo_kernels.ops._policy import VARIANTS

    computed = [v for v in VARIANTS.values() if v.kind != "selection"]
    assert sorted(v.code for v in computed) == list(range(len(computed)))
    assert {v.kind for v in computed} == {"token", "sequence"}
    assert all(v.formula and "arXiv" in v.paper for v in VARIANTS.values())
