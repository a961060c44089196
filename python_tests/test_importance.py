"""importance_weights: an oracle in plain Python, masks, NaN, bits, metrics, graphs, bad input."""

import math
from itertools import pairwise

import pytest
import torch
from device import DEVICE, THREADS, kernels, raises
from loss_oracle import some_mask, split, tokens
from torch.testing import assert_close

import ppo_kernels as pk
from ppo_kernels.ops.importance import CORRECTIONS
from ppo_kernels.testing import executor, executors
from ppo_kernels.testing.tolerance import ulp

KINDS = pytest.mark.parametrize("kind", CORRECTIONS)
EXECUTORS = pytest.mark.parametrize("name", executors("importance_weights", device=DEVICE))
KERNELS = pytest.mark.parametrize("backend", kernels("importance_weights"))
BACKENDS = pytest.mark.parametrize("backend", ["torch", *kernels("importance_weights")])
BAND = {"low": 0.8, "high": 1.3}


def equal(a, b):
    return torch.equal(a.weights, b.weights) and torch.equal(a.metrics.stats, b.metrics.stats)


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
@EXECUTORS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_and_metrics_equal_plain_python(kind, name, packed, masked):
    shape, ends = ((40,), [5, 5, 16, 17, 40]) if packed else ((8, 5), list(range(5, 45, 5)))
    old, rollout, _ = tokens(*shape, spread=1.0 if "geometric" in kind else 0.2)
    mask = some_mask(*shape) if masked else None
    if masked:
        mask.view(-1)[:5] = False
        old, rollout = (torch.where(mask, t, torch.nan) for t in (old, rollout))
    live = [True] * 40 if mask is None else mask.flatten().tolist()
    xs = (old - rollout).flatten().tolist()
    expected, all_made, all_x, sequences = [], [], [], 0
    for row, live_row in zip(split(xs, ends), split(live, ends), strict=True):
        kept = [x for x, m in zip(row, live_row, strict=True) if m]
        made = iter(plain(kind, kept))
        here = [next(made) if m else None for m in live_row]
        expected += [w[0] if w else 0.0 for w in here]
        all_made += filter(None, here)
        all_x += kept
        sequences += bool(kept)
    offsets = torch.tensor([0, *ends]) if packed else None
    with executor(name):
        weights, m = pk.importance_weights(
            old, rollout, mask, kind=kind, **BAND, cu_seqlens=offsets
        )
    assert_close(weights.flatten().tolist(), expected, rtol=1e-12, atol=0)
    n, w = len(all_made), [made[0] for made in all_made]
    assert {limited for _, limited in all_made} == {False, True}
    want = {
        "tokens": n,
        "sequences": sequences,
        "weight_mean": sum(w) / n,
        "limited_fraction": sum(made[1] for made in all_made) / n,
        "kl_k1": -sum(all_x) / n,
        "kl_k3": sum(math.exp(x) - 1 - x for x in all_x) / n,
        "ess": sum(w) ** 2 / (n * sum(v * v for v in w)),
    }
    assert {k: v.item() for k, v in m.as_dict().items()} == pytest.approx(want, rel=1e-12)


@KERNELS
@pytest.mark.parametrize("kind", ["icepop", "tis-sequence", "tis-geometric"])
def test_weights_are_within_a_few_ulps(backend, kind):
    """Of a long sequence too: its log-ratios are not rounded before they are summed."""
    inputs = tokens(4, 3000, dtype=torch.float32, spread=0.5)[:2]
    weights = pk.importance_weights(*inputs, kind=kind, high=1e38, backend=backend).weights
    wide = (t.double() for t in inputs)
    exact = pk.importance_weights(*wide, kind=kind, high=1e38, backend="torch").weights
    error = ((weights.double() - exact).abs() / ulp(exact, torch.float32)).max()
    if kind == "icepop":
        assert error < 4
    else:
        assert error < (3 if backend == "triton" else 0.51)


@KINDS
@EXECUTORS
def test_what_lies_under_the_mask_changes_no_bit(kind, name):
    old, rollout, _ = tokens(6, 9, dtype=torch.float32)
    mask = some_mask(6, 9)
    mask[2] = False
    results = []
    for garbage in (0.0, torch.nan, torch.inf, -torch.inf):
        a, b = (torch.where(mask, t, garbage) for t in (old, rollout))
        with executor(name):
            results.append(pk.importance_weights(a, b, mask, kind=kind, **BAND))
        assert not results[-1].weights[~mask].any()
    assert all(equal(r, results[0]) for r in results[1:])


@KINDS
@EXECUTORS
def test_nan_infinities_and_nothing(kind, name):
    with executor(name):
        old, rollout, _ = tokens(3, 4, dtype=torch.bfloat16)
        rollout[1, 2] = torch.nan
        weights, m = pk.importance_weights(old, rollout, kind=kind, **BAND)
        bad = [[1, k] for k in range(4)] if "-" in kind else [[1, 2]]
        assert weights.isnan().nonzero().tolist() == bad
        assert weights.dtype == torch.float32
        assert m.weight_mean.isnan()
        for x, limit in ((torch.inf, 1.3), (200.0, 1.3), (-200.0, 0.8), (-torch.inf, 0.8)):
            far = torch.full((1, 3), x)
            weights, m = pk.importance_weights(far, torch.zeros(1, 3), kind=kind, **BAND)
            assert (weights == torch.tensor(limit if kind.startswith("tis") else 0.0)).all()
            assert m.limited_fraction == 1
            assert m.ess.item() == pytest.approx(float(kind.startswith("tis")))
        for shape in ((0, 4), (3, 0), (3, 4)):
            old, rollout, _ = tokens(*shape)
            nothing = torch.zeros(shape)
            weights, m = pk.importance_weights(old, rollout, nothing, kind=kind, **BAND)
            assert not weights.any()
            assert m.tokens == m.sequences == m.limited_fraction == m.kl_k3 == 0
            assert m.weight_mean == m.ess == 1
            m = pk.importance_weights(old, rollout, nothing, kind=kind, high=0.5).metrics
            assert not m.stats.any()


@EXECUTORS
def test_the_bounds_are_inside(name):
    same = torch.zeros(2, 3)
    with executor(name):
        for kind in CORRECTIONS:
            weights, m = pk.importance_weights(same, same, kind=kind, low=1.0, high=1.0)
            assert (weights == 1).all()
            assert m.limited_fraction == 0


# ---- bits ----------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("kind", ["icepop", "tis-sequence"])
def test_bits_depend_neither_on_threads_nor_on_strides(backend, kind):
    old, rollout, _ = tokens(7, 3000, dtype=torch.float32, spread=0.01 if "-" in kind else 0.2)
    inputs = (old, rollout, some_mask(7, 3000))
    setting = {"kind": kind, **BAND, "backend": backend}
    expected = pk.importance_weights(*inputs, **setting)
    threads = torch.get_num_threads()
    try:
        for n in THREADS if backend == "cpu" else ():
            torch.set_num_threads(n)
            assert equal(pk.importance_weights(*inputs, **setting), expected), n
    finally:
        torch.set_num_threads(threads)
    strided = [t.mT.contiguous().mT for t in inputs]
    assert equal(pk.importance_weights(*strided, **setting), expected)


def same_sums(a, b):
    """Log-ratios and k3 of a few tokens are added in fp32 first."""
    assert_close(a.stats[:-2], b.stats[:-2], rtol=1e-12, atol=0)
    assert_close(a.stats[-2:], b.stats[-2:], rtol=1e-6, atol=1e-6)


@KINDS
@KERNELS
def test_packing_padding_and_micro_batches_give_the_same_bits(kind, backend):
    lengths = torch.tensor([3, 0, 1100, 1, 512])
    inside = torch.arange(1100) < lengths[:, None]
    spread = 0.02 if "-seq" in kind else 3.0 if "-geo" in kind else 0.2
    old, rollout, _ = tokens(5, 1100, dtype=torch.float32, spread=spread)
    mask = some_mask(5, 1100) & inside
    setting = {"kind": kind, **BAND, "backend": backend}
    padded, m = pk.importance_weights(old, rollout, mask, **setting)
    assert 0 < m.limited_fraction < 1
    flat = [t[inside] for t in (old, rollout, mask)]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    for dtype in (torch.int32, torch.int64):
        packed = pk.importance_weights(*flat, **setting, cu_seqlens=offsets.to(dtype))
        assert torch.equal(packed.weights, padded[inside])
        same_sums(packed.metrics, m)
    parts = [
        pk.importance_weights(*(t[a:b] for t in (old, rollout, mask)), **setting)
        for a, b in pairwise((0, 1, 3, 5))
    ]
    assert torch.equal(torch.cat([p.weights for p in parts]), padded)
    same_sums(pk.reduce_metrics([p.metrics for p in parts]), m)


# ---- in a loss -----------------------------------------------------------------------------------


@BACKENDS
def test_weighted_advantages_weight_the_losses_and_stop_at_zero(backend):
    lp, old, adv = tokens(4, 30)
    rollout = old + 0.2 * torch.randn(4, 30, generator=torch.Generator().manual_seed(3)).to(old)
    weights, _ = pk.importance_weights(old, rollout, kind="icepop", **BAND, backend=backend)
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


# ---- graphs --------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("kind", ["tis", "mask-geometric"])
def test_opcheck(backend, kind):
    op = torch.ops.ppo_kernels.importance_weights.default
    code = list(CORRECTIONS).index(kind)
    old, rollout, _ = tokens(3, 5, dtype=torch.bfloat16)
    torch.library.opcheck(op, (old, rollout, code, 0.8, 1.3, some_mask(3, 5), None, backend))
    old, rollout = (t.flatten() for t in (old, rollout.double()))
    offsets = torch.tensor([0, 4, 4, 15])
    torch.library.opcheck(op, (old, rollout, code, 0.8, 1.3, None, offsets, backend))


@BACKENDS
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_to_one_graph(backend, packed):
    old, rollout, _ = tokens(*((23,) if packed else (4, 6)), dtype=torch.float32)
    offsets = torch.tensor([0, 4, 4, 15, 23]) if packed else None

    def f(a, b):
        return pk.importance_weights(
            a, b, kind="tis-geometric", **BAND, cu_seqlens=offsets, backend=backend
        )

    torch.compiler.reset()
    got = torch.compile(f, backend="aot_eager", fullgraph=True)(old, rollout)
    expected = f(old, rollout)
    assert_close(got.weights, expected.weights)
    assert_close(got.metrics.stats, expected.metrics.stats)


# ---- bad input -----------------------------------------------------------------------------------


X, N = torch.zeros(2, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("args", "more", "error", "message"),
    [
        (([1.0], X), {}, TypeError, "old_logprobs: .*tensor, got list"),
        ((X, X.int()), {}, TypeError, "rollout_logprobs: .*got int32"),
        ((X, N), {}, ValueError, r"rollout_logprobs: expected shape \[2, 3\] \(as old_logprobs\)"),
        ((X, X.clone().requires_grad_()), {}, ValueError, "rollout_logprobs: .*pass rollout_log"),
        ((X.clone().requires_grad_(), X), {}, ValueError, "old_logprobs: .*pass old_logprobs.det"),
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
@EXECUTORS
def test_bad_input(name, args, more, error, message):
    with executor(name), raises(name, error, message):
        pk.importance_weights(*args, **{"high": 2.0} | more)


@KERNELS
def test_the_op_itself_refuses_to_drop_a_gradient(backend):
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.ops.ppo_kernels.importance_weights(
            X.clone().requires_grad_(), X, 0, 0.0, 2.0, None, None, backend
        )
