"""importance_weights: an oracle in plain Python, masks, NaN, metrics, bad input."""

import math

import pytest
import torch
from loss_oracle import BACKENDS, some_mask, split, tokens
from torch.testing import assert_close

import ppo_kernels as pk
from ppo_kernels.ops.importance import CORRECTIONS

KINDS = pytest.mark.parametrize("kind", CORRECTIONS)
BAND = {"low": 0.8, "high": 1.3}


def plain(kind, row):
    """Weight and whether a bound acted, for the log-ratios of the live tokens of a sequence."""
    made = []
    for x in row:
        ratio = math.exp(x)
        if kind.endswith("sequence"):
            ratio = math.prod(map(math.exp, row))
        elif kind.endswith("geometric"):
            ratio = math.prod(map(math.exp, row)) ** (1 / len(row))
        inside = 0.8 <= ratio <= 1.3
        if kind.startswith("tis"):
            weight = min(max(ratio, 0.8), 1.3)
        elif kind == "icepop":
            weight = ratio if inside else 0.0
        else:
            weight = 1.0 if inside else 0.0
        made.append((weight, not inside))
    return made


@KINDS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_and_metrics_equal_plain_python(kind, packed, masked):
    shape, ends = ((40,), [5, 5, 16, 17, 40]) if packed else ((8, 5), list(range(5, 45, 5)))
    old, rollout, _ = tokens(*shape, spread=1.0 if "geometric" in kind else 0.2)
    mask = some_mask(*shape) if masked else None
    if masked:
        mask.view(-1)[:5] = False
        old, rollout = (torch.where(mask, t, torch.nan) for t in (old, rollout))
    live = [True] * 40 if mask is None else mask.flatten().tolist()
    xs = (old - rollout).flatten().tolist()
    expected, all_made, all_x = [], [], []
    for row, live_row in zip(split(xs, ends), split(live, ends), strict=True):
        kept = [x for x, m in zip(row, live_row, strict=True) if m]
        made = iter(plain(kind, kept))
        here = [next(made) if m else None for m in live_row]
        expected += [w[0] if w else 0.0 for w in here]
        all_made += filter(None, here)
        all_x += kept
    offsets = torch.tensor([0, *ends]) if packed else None
    weights, m = pk.importance_weights(old, rollout, mask, kind=kind, **BAND, cu_seqlens=offsets)
    assert_close(weights.flatten().tolist(), expected, rtol=1e-12, atol=0)
    n, w = len(all_made), [made[0] for made in all_made]
    assert {limited for _, limited in all_made} == {False, True}
    want = {
        "tokens": n,
        "weight_mean": sum(w) / n,
        "limited_fraction": sum(made[1] for made in all_made) / n,
        "kl_k1": -sum(all_x) / n,
        "kl_k3": sum(math.exp(x) - 1 - x for x in all_x) / n,
        "ess": sum(w) ** 2 / (n * sum(v * v for v in w)),
    }
    assert {k: v.item() for k, v in m.as_dict().items()} == pytest.approx(want, rel=1e-12)


@KINDS
def test_what_lies_under_the_mask_changes_no_bit(kind):
    old, rollout, _ = tokens(6, 9, dtype=torch.float32)
    mask = some_mask(6, 9)
    mask[2] = False
    results = []
    for garbage in (0.0, torch.nan, torch.inf, -torch.inf):
        a, b = (torch.where(mask, t, garbage) for t in (old, rollout))
        results.append(pk.importance_weights(a, b, mask, kind=kind, **BAND))
        assert not results[-1].weights[~mask].any()
    for r in results[1:]:
        assert torch.equal(r.weights, results[0].weights)
        assert torch.equal(r.metrics.stats, results[0].metrics.stats)


@KINDS
def test_nan_infinities_and_nothing(kind):
    old, rollout, _ = tokens(3, 4, dtype=torch.bfloat16)
    rollout[1, 2] = torch.nan
    weights, m = pk.importance_weights(old, rollout, kind=kind, **BAND)
    bad = [[1, k] for k in range(4)] if "-" in kind else [[1, 2]]
    assert weights.isnan().nonzero().tolist() == bad
    assert weights.dtype == torch.float32
    assert m.weight_mean.isnan()
    for sign, limit in ((1, 1.3), (-1, 0.8)):
        far = torch.full((1, 3), sign * torch.inf)
        weights, m = pk.importance_weights(far, torch.zeros(1, 3), kind=kind, **BAND)
        assert (weights == torch.tensor(limit if kind.startswith("tis") else 0.0)).all()
        assert m.limited_fraction == 1
        assert m.ess.item() == pytest.approx(float(kind.startswith("tis")))
    for shape in ((0, 4), (3, 0), (3, 4)):
        old, rollout, _ = tokens(*shape)
        weights, m = pk.importance_weights(old, rollout, torch.zeros(shape), kind=kind, **BAND)
        assert not weights.any()
        assert m.tokens == m.limited_fraction == m.kl_k3 == 0
        assert m.weight_mean == m.ess == 1
        m = pk.importance_weights(old, rollout, torch.zeros(shape), kind=kind, high=0.5).metrics
        assert not m.stats.any()


@KINDS
def test_reduced_metrics_are_those_of_one_batch(kind):
    tensors = (*tokens(9, 50)[:2], some_mask(9, 50))

    def metrics(*part):
        return pk.importance_weights(*part, kind=kind, **BAND).metrics

    whole = metrics(*tensors)
    merged = pk.reduce_metrics([metrics(*(t[i : i + 2] for t in tensors)) for i in range(0, 9, 2)])
    assert_close(merged.stats, whole.stats, rtol=1e-13, atol=1e-13)


@BACKENDS
def test_weighted_advantages_weight_the_losses_and_stop_at_zero(backend):
    lp, old, adv = tokens(4, 30)
    rollout = old + 0.2 * torch.randn(4, 30, generator=torch.Generator().manual_seed(3)).to(old)
    weights, _ = pk.importance_weights(old, rollout, kind="icepop", **BAND)
    leaf = lp.clone().requires_grad_()
    loss, _ = pk.clipped_loss(leaf, old, adv * weights, backend=backend)
    loss.backward()
    other = lp.clone().requires_grad_()
    ratio = (other - old).exp()
    expected = (weights * torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))).mean()
    expected.backward()
    assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-14)
    assert 0 < (weights == 0).sum() < weights.numel()
    assert not leaf.grad[weights == 0].any()


def test_compiles_to_one_graph():
    old, rollout, _ = tokens(23)
    offsets = torch.tensor([0, 4, 4, 15, 23])

    def f(a, b):
        return pk.importance_weights(a, b, kind="tis-geometric", **BAND, cu_seqlens=offsets)

    got = torch.compile(f, backend="aot_eager", fullgraph=True)(old, rollout)
    assert_close(got.weights, f(old, rollout).weights)


X, N = torch.zeros(2, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("args", "more", "error", "message"),
    [
        (([1.0], X), {}, TypeError, "old_logprobs: .*tensor, got list"),
        ((X, X.int()), {}, TypeError, "rollout_logprobs: .*got int32"),
        ((X, N), {}, ValueError, r"rollout_logprobs: expected shape \[2, 3\] \(as old_logprobs\)"),
        ((X, X.clone().requires_grad_()), {}, ValueError, r"pass rollout_logprobs.detach\(\)"),
        ((X.clone().requires_grad_(), X), {}, ValueError, r"pass old_logprobs.detach\(\)"),
        ((X, X, torch.ones(2)), {}, ValueError, "mask: expected shape"),
        (
            (X, X),
            {"kind": "tip"},
            ValueError,
            "kind: unknown kind 'tip', expected one of tis, tis-",
        ),
        ((X, X), {"low": -1.0}, ValueError, "low: .*got -1"),
        ((X, X), {"low": 3.0}, ValueError, r"high: .*\[3.0, .*got 2"),
        ((X, X), {"high": math.inf}, ValueError, "high: .*got inf"),
        ((N, N), {"kind": "mask-sequence"}, ValueError, "cu_seqlens: .*'mask-sequence' needs"),
        ((N, N), {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: .*end at 4"),
    ],
)
def test_bad_input(args, more, error, message):
    with pytest.raises(error, match=message):
        pk.importance_weights(*args, **{"high": 2.0} | more)
