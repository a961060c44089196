"""clipped_loss, value_loss and their metrics, beyond the cube."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import ppo_kernels as pk
from ppo_kernels import cpu
from ppo_kernels.ops._aggregation import AGGREGATIONS
from ppo_kernels.testing import executor, executors

EXECUTORS = pytest.mark.parametrize("name", executors("clipped_loss", "value_loss", device="cpu"))
BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpu"])
LOSSES = pytest.mark.parametrize("function", [pk.clipped_loss, pk.value_loss])
NORM = {"seq-sum-norm": 6.0}


def tokens(*shape, seed=0, dtype=torch.float64, spread=0.4):
    """Three token tensors, as either loss takes them."""
    g = torch.Generator().manual_seed(seed)
    first = -torch.randn(shape, generator=g, dtype=torch.float64).abs()
    second = first + spread * torch.randn(shape, generator=g, dtype=torch.float64)
    third = torch.randn(shape, generator=g, dtype=torch.float64)
    return first.to(dtype), second.to(dtype), third.to(dtype)


def some_mask(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def with_grad(function, live, *args, upstream=1.0, **kwargs):
    live = live.detach().clone().requires_grad_()
    loss, metrics = function(live, *args, **kwargs)
    (loss * upstream if upstream != 1.0 else loss).backward()
    return loss.detach(), live.grad, metrics


# ---- against loops in plain Python -------------------------------------------------------------


def plain_policy(x, a, low, high, dual, clamp):
    """Loss, d loss / d x and which bound cut it, for one token with log-ratio x."""
    flows = clamp is None or -clamp <= x <= clamp
    if clamp is not None:
        x = min(max(x, -clamp), clamp)
    r = math.exp(x)
    unclipped, clipped = -a * r, -a * min(max(r, 1 - low), 1 + high)
    loss, slope, cut = unclipped, unclipped, None
    if clipped > unclipped:
        loss, slope, cut = clipped, 0.0, "high" if a > 0 else "low"
    if dual is not None and a < 0 and -a * dual < loss:
        loss, slope, cut = -a * dual, 0.0, "dual"
    return loss, slope if flows else 0.0, cut, x, r


def plain_value(v, old, target, clip, delta):
    def h(e):
        far = delta is not None and abs(e) > delta
        return delta * (abs(e) - delta / 2) if far else e * e / 2

    def slope(e):
        return e if delta is None else min(max(e, -delta), delta)

    loss, gradient, cut = h(v - target), slope(v - target), False
    if clip is not None:
        other = h(old + min(max(v - old, -clip), clip) - target)
        if other > loss + 1e-12:
            loss, gradient, cut = other, 0.0, True
    return loss, gradient, cut


def plain_weights(rows, aggregation, denominator):
    """Weights of the live tokens of each row; rows hold booleans."""
    live = sum(map(sum, rows))
    sequences = sum(any(row) for row in rows)
    if denominator is None:
        denominator = {"token-mean": live, "token-sum": 1}.get(aggregation, sequences)
    denominator *= NORM.get(aggregation, 1)
    return [
        [
            m and 1 / (denominator * (sum(row) if aggregation == "seq-mean-token-mean" else 1))
            for m in row
        ]
        for row in rows
    ]


def split(flat, ends):
    starts = [0, *ends[:-1]]
    return [flat[a:b] for a, b in zip(starts, ends, strict=True)]


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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("delta", [None, 0.6])
@EXECUTORS
def test_value_loss_equals_plain_python(name, aggregation, clip, delta):
    v, old, target = tokens(4, 9)
    mask = some_mask(4, 9)
    mask[2] = False
    rows = mask.tolist()
    weights = plain_weights(rows, aggregation, None)
    loss, gradient, live = 0.0, [], []
    for i in range(4):
        for j in range(9):
            one = v[i, j].item(), old[i, j].item(), target[i, j].item()
            token = plain_value(*one, clip, delta)
            loss += weights[i][j] * token[0]
            gradient.append(weights[i][j] * token[1])
            if rows[i][j]:
                live.append((*token, *one))
    with executor(name):
        got, grad, m = with_grad(
            pk.value_loss, v, old if clip else None, target, mask, clip=clip, huber_delta=delta,
            aggregation=aggregation, norm_length=NORM.get(aggregation),
        )  # fmt: skip
    close = {"rtol": 1e-12, "atol": 1e-14}
    assert_close(got.item(), loss, **close)
    assert_close(grad.flatten().tolist(), gradient, **close)
    n = len(live)
    losses, _, cuts, vs, _, rs = zip(*live, strict=True)
    errors = [r - p for r, p in zip(rs, vs, strict=True)]

    def variance(x):
        return sum((e - sum(x) / n) ** 2 for e in x) / n

    expected = {
        "tokens": n,
        "sequences": 3,
        "loss": sum(losses) / n,
        "clip_fraction": sum(cuts) / n,
        "value_mean": sum(vs) / n,
        "return_mean": sum(rs) / n,
        "error_mean": -sum(errors) / n,
        "explained_variance": 1 - variance(errors) / variance(rs),
    }
    measured = {k: t.item() for k, t in m.as_dict().items()}
    assert list(measured) == list(expected)
    assert measured == pytest.approx(expected, rel=1e-11)
    assert clip is None or 0 < m.clip_fraction < 1


@LOSSES
@EXECUTORS
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_beside_whole_vectors_count_once(name, function, masked):
    """Every length up to two of the longest vectors, in fp32 as in fp64."""
    for n in range(1, 34):
        inputs = tokens(n, seed=n)
        mask = some_mask(n, seed=n) if masked else None
        with executor(name):
            exact = with_grad(function, *inputs, mask)
            got = with_grad(function, *(t.float() for t in inputs), mask)
        for a, b in zip((*got[:2], got[2].stats), (*exact[:2], exact[2].stats), strict=True):
            assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


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


# ---- ties, extremes, NaN -----------------------------------------------------------------------


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
def test_at_exact_ties_the_gradient_flows(name):
    lp, old = torch.tensor([0.3]), torch.zeros(1)
    up, down = torch.tensor([1.0]), torch.tensor([-1.0])
    with executor(name):
        r = pk.clipped_loss(lp, old, up).metrics.ratio_max.item()
        cases = [
            (lp, up, {"clip_high": r - 1}, -r),
            (lp, up, {"clip_high": r - 1 - 1e-6}, 0),
            (lp, down, {"dual_clip": r}, r),
            (lp, down, {"dual_clip": r - 1e-6}, 0),
            (lp, down, {"log_ratio_clamp": lp.item()}, r),
            (lp, down, {"log_ratio_clamp": lp.item() - 1e-6}, 0),
            (old, up, {"clip_low": 0.0}, -1),
            (old, down, {"clip_low": 0.0}, 1),
        ]
        for live, adv, bounds, slope in cases:
            assert with_grad(pk.clipped_loss, live, old, adv, **bounds)[1].item() == slope, bounds
        one, two = torch.tensor([1.0]), torch.tensor([2.0])
        # |v - R| = |v' - R|, clipped and not.
        for v, old_v, target in [(two, one, torch.tensor([1.75])), (one, one, two)]:
            grad = with_grad(pk.value_loss, v, old_v, target, clip=0.5)[1]
            assert grad.item() == (v - target).item()


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


@EXECUTORS
@pytest.mark.parametrize("clip", [0.2, None])
def test_nan_in_a_live_input_gives_nan_there_and_only_there(name, clip):
    for where in range(3):
        inputs = [t.clone() for t in tokens(2, 5, dtype=torch.float32)]
        inputs[where][1, 2] = torch.nan
        with executor(name):
            loss, grad, m = with_grad(pk.clipped_loss, *inputs, dual_clip=2.0)
            assert loss.isnan()
            assert grad.isnan().nonzero().tolist() == [[1, 2]]
            assert m.ratio_max.isnan() == m.ratio_min.isnan() == (where < 2)
            if where == 1 and clip is None:
                continue
            loss, grad, m = with_grad(pk.value_loss, *inputs, clip=clip, huber_delta=0.5)
            assert loss.isnan()
            assert grad.isnan().nonzero().tolist() == [[1, 2]]


@EXECUTORS
def test_a_squared_ratio_does_not_overflow_the_sample_size(name):
    x = torch.tensor([60.0] + [0.0] * 9)
    with executor(name):
        m = pk.clipped_loss(x, torch.zeros(10), torch.ones(10)).metrics
    assert_close(m.ess.item(), 0.1, rtol=1e-6, atol=0)


@EXECUTORS
def test_k3_of_nearly_equal_policies_keeps_its_digits(name):
    old = torch.zeros(1000)
    for size in (1e-6, 1e-3, 0.1, 0.49, 0.51, 3.0):
        for x in (torch.full((1000,), size), torch.full((1000,), -size)):
            with executor(name):
                got = pk.clipped_loss(x, old, old).metrics.kl_k3.item()
            exact = x[0].double()
            exact = (torch.expm1(exact) - exact).item() if size > 1e-5 else (exact**2 / 2).item()
            assert got == pytest.approx(exact, rel=3e-6)


# ---- masks -------------------------------------------------------------------------------------


@LOSSES
@EXECUTORS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_what_lies_under_the_mask_changes_no_bit(name, function, aggregation):
    mask = some_mask(6, 37)
    mask[4] = False
    clean = tokens(6, 37, dtype=torch.float32)
    results = []
    for garbage in (0.0, torch.nan, torch.inf, -torch.inf, 1e30):
        inputs = [torch.where(mask, t, garbage) for t in clean]
        with executor(name):
            loss, grad, m = with_grad(
                function, *inputs, mask, aggregation=aggregation,
                norm_length=NORM.get(aggregation), upstream=0.7,
            )  # fmt: skip
        assert not grad[~mask].any()
        results.append((loss, grad, m.stats))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
            assert not b.isnan().any()


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


@LOSSES
@EXECUTORS
def test_any_nonzero_mask_element_is_live(name, function):
    inputs = tokens(3, 67, dtype=torch.float32)
    live = some_mask(3, 67)
    expected = None
    for dtype, one in [
        (torch.bool, True), (torch.uint8, 255), (torch.int8, -128), (torch.int16, 256),
        (torch.int32, 2**31 - 2**30), (torch.int64, 2**40), (torch.float32, 1e-40),
        (torch.float64, 1e-300), (torch.bfloat16, -1.0), (torch.float16, 6e-8),
    ]:  # fmt: skip
        mask = torch.zeros(3, 67, dtype=dtype)
        mask[live] = one
        if dtype.is_floating_point:
            mask[~live] = -0.0
        with executor(name):
            got = function(*inputs, mask, aggregation="seq-mean-token-mean")
        expected = expected or got
        assert torch.equal(got.loss, expected.loss), dtype
        assert torch.equal(got.metrics.stats, expected.metrics.stats), dtype


@LOSSES
@EXECUTORS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_live_token_gives_a_connected_zero(name, function, aggregation):
    norm = NORM.get(aggregation)
    with executor(name):
        for shape in ((3, 5), (0, 5), (3, 0)):
            inputs = tokens(*shape, dtype=torch.bfloat16)
            mask = torch.zeros(shape, dtype=torch.bool)
            loss, grad, m = with_grad(
                function, *inputs, mask, aggregation=aggregation, norm_length=norm
            )
            assert loss == 0
            assert grad.shape == shape
            assert grad.dtype == torch.bfloat16
            assert not grad.any()
            numbers = m.as_dict()
            assert all(t.isfinite() for t in numbers.values())
            assert numbers["tokens"] == numbers["sequences"] == 0
            if function is pk.clipped_loss:
                ones = [numbers[k].item() for k in ("ratio_mean", "ratio_max", "ratio_min", "ess")]
                assert ones == [1, 1, 1, 1]
        # A zero denominator although tokens are live.
        for zero in (0, torch.tensor(0)):
            loss, grad, _ = with_grad(
                function, *tokens(2, 3), aggregation=aggregation, norm_length=norm, denominator=zero
            )
            assert loss == 0
            assert not grad.any()


# ---- parts of a batch --------------------------------------------------------------------------


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    cuts = draw(st.lists(st.integers(0, len(lengths)), max_size=3))
    return lengths, sorted({0, len(lengths), *cuts}), draw(st.integers(0, 2**16))


def denominators(aggregation, rows):
    live = sum(int(r.sum()) for r in rows)
    sequences = sum(bool(r.any()) for r in rows)
    return {"token-mean": live, "token-sum": 3}.get(aggregation, sequences)


@LOSSES
@EXECUTORS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(max_examples=25, deadline=None)
@given(batch=batches())
def test_padding_packing_and_micro_batches_are_one_batch(name, function, aggregation, batch):
    """Sequences of any length, packed, padded, and cut into micro-batches in either form."""
    lengths, cuts, seed = batch
    total, longest = sum(lengths), max(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    flat = tokens(total, seed=seed)
    mask = some_mask(total, seed=seed)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def pad(t):
        return torch.full(inside.shape, 7, dtype=t.dtype).masked_scatter(inside, t)

    padded = [pad(t) for t in flat]
    padded_mask = pad(mask) & inside
    rows = [mask[a:b] for a, b in pairwise(offsets)]
    kwargs = {
        "aggregation": aggregation,
        "norm_length": NORM.get(aggregation),
        "denominator": denominators(aggregation, rows),
    }
    with executor(name):
        loss, grad, m = with_grad(function, *flat, mask, cu_seqlens=offsets, **kwargs)
        padded_loss, padded_grad, padded_m = with_grad(function, *padded, padded_mask, **kwargs)
        parts = []
        for a, b in pairwise(cuts):
            inputs = [t[offsets[a] : offsets[b]] for t in (*flat, mask)]
            part_offsets = offsets[a : b + 1] - offsets[a]
            parts.append(with_grad(function, *inputs, cu_seqlens=part_offsets, **kwargs))
        padded_parts = [
            with_grad(function, *(t[a:b] for t in (*padded, padded_mask)), **kwargs)
            for a, b in pairwise(cuts)
        ]
    close = {"rtol": 1e-12, "atol": 1e-14}
    assert_close(padded_loss, loss, **close)
    assert torch.equal(padded_grad[inside], grad)
    assert_close(padded_m.stats, m.stats, **close)
    for some in (parts, padded_parts):
        assert_close(sum(p[0] for p in some), loss, **close)
        assert_close(pk.reduce_metrics([p[2] for p in some]).stats, m.stats, **close)
    assert torch.equal(torch.cat([p[1] for p in parts]), grad)
    assert torch.equal(torch.cat([p[1] for p in padded_parts]), padded_grad)


@LOSSES
def test_micro_batches_in_fp32_give_the_same_gradient_bits(function):
    inputs = tokens(8, 700, dtype=torch.float32)
    mask = some_mask(8, 700)
    count = mask.sum()
    loss, grad, _ = with_grad(function, *inputs, mask, denominator=count, backend="cpu")
    parts = [
        with_grad(function, *(t[a:b] for t in (*inputs, mask)), denominator=count, backend="cpu")
        for a, b in ((0, 1), (1, 5), (5, 8))
    ]
    assert torch.equal(torch.cat([p[1] for p in parts]), grad)
    assert_close(sum(p[0] for p in parts), loss, rtol=3e-7, atol=0)


@BACKENDS
def test_packed_tokens_whose_number_is_that_of_the_sequences_have_their_own_advantages(backend):
    lp, old, adv = tokens(3)
    offsets = torch.tensor([0, 0, 2, 3])
    a, b = (
        with_grad(pk.clipped_loss, lp, old, adv, cu_seqlens=c, backend=backend)
        for c in (None, offsets)
    )
    assert torch.equal(a[1], b[1])


# ---- metrics -----------------------------------------------------------------------------------


@LOSSES
def test_reduced_metrics_are_those_of_one_batch(function):
    inputs = tokens(9, 50)
    mask = some_mask(9, 50)
    whole = function(*inputs, mask).metrics
    parts = [function(*(t[i : i + 2] for t in (*inputs, mask))).metrics for i in range(0, 9, 2)]
    merged = pk.reduce_metrics(parts)
    assert type(merged) is type(whole)
    assert_close(merged.stats, whole.stats, rtol=1e-13, atol=1e-13)
    # An empty part adds nothing.
    nothing = function(*(t[:1] for t in inputs), torch.zeros(1, 50)).metrics
    assert torch.equal(pk.reduce_metrics([*parts, nothing]).stats, merged.stats)


def test_reduce_metrics_takes_one_type_and_at_least_one_object():
    inputs = tokens(2, 3)
    policy, value = (f(*inputs).metrics for f in (pk.clipped_loss, pk.value_loss))
    with pytest.raises(TypeError, match="got PolicyMetrics, ValueMetrics"):
        pk.reduce_metrics([policy, value])
    with pytest.raises(TypeError, match="got Tensor"):
        pk.reduce_metrics([torch.zeros(13)])
    with pytest.raises(ValueError, match="at least one"):
        pk.reduce_metrics([])


def _rank(rank, file):
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    for function in (pk.clipped_loss, pk.value_loss):
        inputs = tokens(6, 11)
        whole = function(*inputs).metrics
        first, last = ((0, 2), (2, 6))[rank]
        parts = [function(*(t[i : i + 1] for t in inputs)).metrics for i in range(first, last)]
        merged = pk.reduce_metrics(parts, group=torch.distributed.group.WORLD)
        assert_close(merged.stats, whole.stats, rtol=1e-13, atol=1e-13)
    bad = torch.full((1, 3), torch.nan if rank == 0 else 0.5)
    m = pk.clipped_loss(bad, torch.zeros(1, 3), torch.ones(1, 3)).metrics
    merged = pk.reduce_metrics([m], group=torch.distributed.group.WORLD)
    assert merged.ratio_max.isnan()
    assert merged.ratio_min.isnan()
    assert merged.tokens == 6
    torch.distributed.destroy_process_group()


def test_metrics_reduce_over_two_processes(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "rendezvous"),), nprocs=2)


@BACKENDS
@pytest.mark.parametrize(
    ("values", "returns", "expected"),
    [
        ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0], 1.0),
        ([2.0, 3.0, 5.0], [1.0, 2.0, 4.0], 1.0),  # a constant error explains all the variance
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.0),
        ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], -3.0),
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], 1.0),
        ([0.0, 1.0, 2.0], [0.1, 0.1, 0.1], 0.0),
        ([5.0], [3.0], 1.0),
        ([10000.5, 10001.5], [10000.0, 10002.0], 0.75),
    ],
)
def test_explained_variance(values, returns, expected, backend):
    m = pk.value_loss(
        torch.tensor(values), None, torch.tensor(returns), clip=None, backend=backend
    ).metrics
    assert m.explained_variance.item() == pytest.approx(expected, abs=1e-6)


def test_explained_variance_of_a_nan_is_nan():
    m = pk.value_loss(torch.tensor([1.0, torch.nan]), None, torch.ones(2), clip=None).metrics
    assert m.explained_variance.isnan()


# ---- gradients ---------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck(backend, aggregation):
    first, second, third = tokens(3, 5)
    mask = some_mask(3, 5)
    kwargs = {"aggregation": aggregation, "norm_length": NORM.get(aggregation), "backend": backend}

    def policy(x):
        return pk.clipped_loss(x, second, third, mask, dual_clip=1.5, **kwargs).loss * 1.7

    def value(x):
        return pk.value_loss(x, second, third, mask, huber_delta=0.6, **kwargs).loss * 1.7

    for f in (policy, value):
        assert torch.autograd.gradcheck(f, first.clone().requires_grad_())


@LOSSES
def test_an_upstream_gradient_of_one_costs_nothing_and_others_are_rounded_once(function):
    inputs = tokens(4, 400)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        cast = [t.to(dtype) for t in inputs]
        exact = with_grad(function, *(t.double() for t in cast), backend="torch")[1]
        for upstream in (1.0, 0.3, 0.0, -5.0):
            pk.reset_op_counts()
            grad = with_grad(function, *cast, upstream=upstream, backend="cpu")[1]
            scaled = pk.op_counts().get(("scale_gradient", "cpu"), 0)
            assert scaled == (upstream != 1 or dtype in (torch.bfloat16, torch.float16))
            assert grad.dtype == dtype
            near = {"rtol": 1.01 * torch.finfo(dtype).eps * (2 if dtype.itemsize == 2 else 8)}
            assert_close(grad.double(), exact * upstream, atol=1e-7, **near)


@LOSSES
@BACKENDS
def test_a_bad_upstream_gradient_stays_out_of_masked_positions(function, backend):
    mask = some_mask(3, 40)
    for bad in (torch.inf, torch.nan):
        grad = with_grad(function, *tokens(3, 40), mask, upstream=bad, backend=backend)[1]
        assert not grad[~mask].any()
        assert not grad[mask].isfinite().all()


@LOSSES
def test_backward_twice_gives_the_same_gradient(function):
    first, *others = tokens(3, 40)
    leaf = first.clone().requires_grad_()
    loss, _ = function(leaf * 1, *others, backend="cpu")
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * once)


@LOSSES
def test_double_backward_raises_on_kernels_and_works_on_the_reference(function):
    first, *others = tokens(2, 3)
    leaf = first.clone().requires_grad_()
    loss, _ = function(leaf, *others, backend="cpu")
    with pytest.raises(RuntimeError, match=f"{function.__name__}: .*double backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    loss, _ = function(leaf, *others, backend="torch")
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert grad.requires_grad


@LOSSES
@BACKENDS
def test_metrics_and_losses_without_grad_are_detached(function, backend):
    first, *others = tokens(2, 3)
    leaf = first.clone().requires_grad_()
    assert not function(leaf, *others, backend=backend).metrics.stats.requires_grad
    with torch.no_grad():
        assert not function(leaf, *others, backend=backend).loss.requires_grad
    assert not function(first, *others, backend=backend).loss.requires_grad


# ---- bits --------------------------------------------------------------------------------------


def bits(function, *args, **kwargs):
    loss, grad, m = with_grad(function, *args, backend="cpu", **kwargs)
    return loss, grad, m.stats


@LOSSES
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_bits_depend_neither_on_threads_nor_on_strides(function, aggregation):
    shape = (7, 5000)
    mask = some_mask(*shape)
    for dtype in (torch.float32, torch.float64):
        inputs = tokens(*shape, dtype=dtype)
        expected = bits(function, *inputs, mask, aggregation=aggregation)
        threads = torch.get_num_threads()
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                got = bits(function, *inputs, mask, aggregation=aggregation)
                assert all(map(torch.equal, got, expected)), n
        finally:
            torch.set_num_threads(threads)
        strided = [t.mT.contiguous().mT for t in (*inputs, mask.int())]
        got = bits(function, *strided, aggregation=aggregation)
        assert all(map(torch.equal, got, expected))


def test_an_advantage_per_sequence_is_an_advantage_per_token():
    lp, old, _ = tokens(5, 333, dtype=torch.float32)
    adv = torch.randn(5)
    a = bits(pk.clipped_loss, lp, old, adv)
    assert all(map(torch.equal, a, bits(pk.clipped_loss, lp, old, adv[:, None].expand(5, 333))))


@LOSSES
def test_cu_seqlens_may_be_int32(function):
    inputs = tokens(10)
    offsets = torch.tensor([0, 3, 3, 10])
    for backend in ("torch", "cpu"):
        a, b = (
            function(
                *inputs, cu_seqlens=c, aggregation="seq-mean-token-mean", backend=backend
            ).metrics.stats
            for c in (offsets, offsets.int())
        )
        assert torch.equal(a, b)


# ---- graphs ------------------------------------------------------------------------------------


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(function, dtype):
    first, second, third = tokens(3, 5, dtype=dtype)
    op = getattr(torch.ops.ppo_kernels, function.__name__).default
    settings = (0.2, 0.2, None, None, 0) if function is pk.clipped_loss else (0.2, None)
    for mask, offsets, aggregation, denominator, divisor in [
        (None, None, 0, None, None),
        (some_mask(3, 5), None, 3, torch.tensor(3), None),
        (some_mask(3, 5), None, 0, None, 4.0),
    ]:
        for needs_gradient in (False, True):
            live = first.clone().requires_grad_(needs_gradient)
            torch.library.opcheck(
                op,
                (live, second, third, *settings, mask, offsets, aggregation, denominator, divisor,
                 None, needs_gradient, "cpu"),
            )  # fmt: skip
    scale = torch.ops.ppo_kernels.scale_gradient.default
    torch.library.opcheck(scale, (torch.randn(3, 5), torch.tensor(0.5), dtype, "cpu"))


@LOSSES
def test_the_op_itself_refuses_to_drop_a_gradient(function):
    first, second, third = tokens(3, 5)
    op = getattr(torch.ops.ppo_kernels, function.__name__)
    settings = (0.2, 0.2, None, None, 0) if function is pk.clipped_loss else (0.2, None)
    with pytest.raises(RuntimeError, match="requires grad"):
        op(first.requires_grad_(), second, third, *settings, *(None,) * 2, 0, *(None,) * 3,
           False, "cpu")  # fmt: skip


@LOSSES
@BACKENDS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph(function, backend, packed, dtype):
    shape = (23,) if packed else (4, 6)
    offsets = torch.tensor([0, 4, 4, 15, 16, 23]) if packed else None
    inputs = tokens(*shape, dtype=dtype)
    mask = some_mask(*shape)
    count = torch.tensor(4)

    def step(live, *constants):
        loss, metrics = function(
            live, *constants, mask, cu_seqlens=offsets, aggregation="seq-mean-token-mean",
            denominator=count, backend=backend,
        )  # fmt: skip
        return loss * 0.5, metrics.loss, metrics.clip_fraction

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for f in (step, compiled):
        live = inputs[0].clone().requires_grad_()
        loss, *metrics = f(live, *inputs[1:])
        loss.backward()
        results.append((loss.detach(), live.grad, *metrics))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-9)


# ---- bad input ---------------------------------------------------------------------------------

X = torch.zeros(2, 3)
N = torch.zeros(4)
POLICY = {"logprobs": X, "old_logprobs": X, "advantages": X}
PACKED = {"logprobs": N, "old_logprobs": N, "advantages": N}
VALUE = {"values": X, "old_values": X, "returns": X}


@pytest.mark.parametrize(
    ("function", "inputs", "error", "message"),
    [
        (pk.clipped_loss, POLICY | {"logprobs": [1.0]}, TypeError, "logprobs: .*tensor, got list"),
        (pk.clipped_loss, POLICY | {"logprobs": X.int()}, TypeError, "logprobs: .*got int32"),
        (
            pk.clipped_loss,
            {k: torch.zeros(2, 3, 4) for k in POLICY},
            ValueError,
            r"logprobs: expected shape \[B, T\] or packed \[N\], got \[2, 3, 4\]",
        ),
        (
            pk.clipped_loss,
            POLICY | {"old_logprobs": X.mT},
            ValueError,
            r"old_logprobs: expected shape \[2, 3\] \(as logprobs\), got \[3, 2\]",
        ),
        (
            pk.clipped_loss,
            POLICY | {"advantages": torch.zeros(3)},
            ValueError,
            r"advantages: expected shape \[2, 3\] \(as logprobs\) or \[2\] \(one per sequence\)",
        ),
        (
            pk.clipped_loss,
            PACKED | {"advantages": torch.zeros(3)},
            ValueError,
            r"advantages: expected shape \[4\] \(as logprobs\), got \[3\]",
        ),
        (
            pk.clipped_loss,
            PACKED | {"advantages": torch.zeros(3), "cu_seqlens": torch.tensor([0, 2, 4])},
            ValueError,
            r"advantages: expected shape \[4\] \(as logprobs\) or \[2\] \(one per sequence\)",
        ),
        (
            pk.clipped_loss,
            POLICY | {"old_logprobs": X.clone().requires_grad_()},
            ValueError,
            r"old_logprobs: .*pass old_logprobs.detach\(\)",
        ),
        (
            pk.clipped_loss,
            POLICY | {"advantages": X.clone().requires_grad_()},
            ValueError,
            r"advantages: .*pass advantages.detach\(\)",
        ),
        (
            pk.clipped_loss,
            POLICY | {"mask": torch.ones(2, 2)},
            ValueError,
            r"mask: expected shape \[2, 3\] \(as logprobs\), got \[2, 2\]",
        ),
        (pk.clipped_loss, POLICY | {"clip_low": -0.1}, ValueError, r"clip_low: .*got -0.1"),
        (pk.clipped_loss, POLICY | {"clip_high": -0.1}, ValueError, r"clip_high: .*got -0.1"),
        (pk.clipped_loss, POLICY | {"clip_low": "a"}, TypeError, "clip_low: .*got str"),
        (pk.clipped_loss, POLICY | {"dual_clip": 1.0}, ValueError, r"dual_clip: .*\(1, .*got 1.0"),
        (pk.clipped_loss, POLICY | {"log_ratio_clamp": 0.0}, ValueError, "log_ratio_clamp: .* 0"),
        (
            pk.clipped_loss,
            POLICY | {"variant": "clop"},
            ValueError,
            "variant: unknown variant 'clop', expected one of clip",
        ),
        (
            pk.clipped_loss,
            POLICY | {"aggregation": "mean"},
            ValueError,
            "aggregation: unknown aggregation 'mean', expected one of token-mean, token-sum, seq-",
        ),
        (
            pk.clipped_loss,
            PACKED | {"aggregation": "seq-mean-token-sum"},
            ValueError,
            "cu_seqlens: .*'seq-mean-token-sum' needs .* got None",
        ),
        (
            pk.clipped_loss,
            POLICY | {"aggregation": "seq-sum-norm"},
            ValueError,
            "norm_length: expected a number",
        ),
        (
            pk.clipped_loss,
            POLICY | {"aggregation": "seq-sum-norm", "norm_length": 0},
            ValueError,
            "norm_length: .*got 0",
        ),
        (pk.clipped_loss, POLICY | {"norm_length": 5}, ValueError, "norm_length: expected None"),
        (pk.clipped_loss, POLICY | {"denominator": -1}, ValueError, "denominator: .*got -1"),
        (pk.clipped_loss, POLICY | {"denominator": "3"}, TypeError, "denominator: .*got str"),
        (
            pk.clipped_loss,
            POLICY | {"denominator": torch.ones(1)},
            ValueError,
            r"denominator: expected shape \[\] \(one number\), got \[1\]",
        ),
        (
            pk.clipped_loss,
            POLICY | {"denominator": torch.tensor(True)},
            TypeError,
            "denominator: .*got bool",
        ),
        (
            pk.clipped_loss,
            POLICY | {"cu_seqlens": torch.tensor([0, 6])},
            ValueError,
            r"cu_seqlens: expected only with packed \[N\] logprobs, got \[2, 3\]",
        ),
        (
            pk.clipped_loss,
            PACKED | {"cu_seqlens": torch.tensor([0.0, 4.0])},
            TypeError,
            "cu_seqlens: expected dtype int32, int64, got float32",
        ),
        (
            pk.clipped_loss,
            PACKED | {"cu_seqlens": torch.tensor([[0, 4]])},
            ValueError,
            r"cu_seqlens: expected shape \[sequences \+ 1\], got \[1, 2\]",
        ),
        (pk.value_loss, VALUE | {"old_values": None}, TypeError, "old_values: .*got NoneType"),
        (
            pk.value_loss,
            VALUE | {"returns": N},
            ValueError,
            r"returns: expected shape \[2, 3\] \(as values\), got \[4\]",
        ),
        (
            pk.value_loss,
            VALUE | {"returns": X.clone().requires_grad_()},
            ValueError,
            r"pass returns.detach\(\)",
        ),
        (pk.value_loss, VALUE | {"clip": -1.0}, ValueError, "clip: .*got -1"),
        (pk.value_loss, VALUE | {"huber_delta": 0.0}, ValueError, "huber_delta: .*got 0"),
        *(
            (pk.clipped_loss, PACKED | {"cu_seqlens": torch.tensor(o)}, ValueError, f"cu_seq.*{m}")
            for o, m in [
                ([1, 4], "start at 0, got 1 at index 0"),
                ([-1, 4], "start at 0, got -1 at index 0"),
                ([0, 3], "end at 4, .* got 3 at index 1"),
                ([0, 5], "end at 4, .* got 5 at index 1"),
                ([0], "end at 4, .* got 0 at index 0"),
                ([0, 3, 2, 4], "not to decrease .* got 2 at index 2"),
                ([0, 5, 4], "not to decrease .* got 4 at index 2"),
            ]
        ),
    ],
)
def test_bad_input_says_the_same_everywhere(function, inputs, error, message):
    texts = set()
    for name in executors("clipped_loss", "value_loss", device="cpu"):
        with executor(name), pytest.raises(error, match=message) as caught:
            function(**inputs)
        texts.add(str(caught.value))
    assert len(texts) == 1


def test_every_variant_names_its_formula_and_paper():
    from ppo_kernels.ops.clipped_loss import VARIANTS

    assert sorted(v.code for v in VARIANTS.values()) == list(range(len(VARIANTS)))
    assert all(v.formula and "arXiv" in v.paper for v in VARIANTS.values())


def test_this_machine_runs_the_kernels():
    assert cpu.UNAVAILABLE is None
