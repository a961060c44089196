"""kl_penalty beyond the cube: what it estimates, extremes; with shape_rewards, bits and errors."""

import itertools
import math

import pytest
import torch
from device import DEVICE, kernels, raises, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_oracle import ESTIMATORS, example, oracle
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels.testing import LAYOUTS, executor, executors

EXECUTORS = executors("kl_penalty", "shape_rewards", device=DEVICE)
COMPILED = [e for e in EXECUTORS if e != "torch"]
KERNELS = kernels("kl_penalty", "shape_rewards")
NAN, INF = math.nan, math.inf


def value_and_slope(d, **options):
    leaf = d.detach().requires_grad_()
    kl = pk.kl_penalty(leaf, torch.zeros_like(d), **options)
    return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]


# ---- what is estimated ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_hand_computed(name):
    d = torch.tensor([0.0, math.log(2), -math.log(4)], dtype=torch.float64)
    expected = {
        "k1": ([0, math.log(2), -math.log(4)], [1, 1, 1]),
        "k2": ([0, math.log(2) ** 2 / 2, math.log(4) ** 2 / 2], [0, math.log(2), -math.log(4)]),
        "k3": ([0, math.log(2) - 1 / 2, 3 - math.log(4)], [0, 1 / 2, -3]),
        "abs": ([0, math.log(2), math.log(4)], [0, 1, -1]),
    }
    with executor(name):
        for estimator, (values, slopes) in expected.items():
            kl, slope = value_and_slope(d, estimator=estimator)
            assert kl.tolist() == pytest.approx(values, rel=1e-15)
            assert slope.tolist() == pytest.approx(slopes, rel=1e-15)


@pytest.mark.parametrize("name", EXECUTORS)
def test_expectations_under_the_policy(name):
    """The table of the docstring, by summing over all tokens instead of sampling."""
    g = seeded(0)
    logits, ref = torch.randn(2, 6, generator=g, dtype=torch.float64) * 0.7
    log_q = ref.log_softmax(0)

    def gradient_of(f):
        leaf = logits.clone().requires_grad_()
        value = f(leaf.log_softmax(0))
        return value.item(), torch.autograd.grad(value, leaf)[0]

    kl, kl_gradient = gradient_of(lambda log_p: (log_p.exp() * (log_p - log_q)).sum())
    gradients = {
        "k1": torch.zeros(6, dtype=torch.float64),
        "k2": kl_gradient,
        "k3": gradient_of(lambda log_p: (log_q.exp() * (log_q - log_p)).sum())[1],
        "abs": gradient_of(lambda log_p: (log_p.exp() - log_q.exp()).abs().sum())[1],
    }
    for estimator, expected in gradients.items():
        with executor(name):
            value, gradient = gradient_of(
                lambda log_p, e=estimator: (
                    log_p.detach().exp() * pk.kl_penalty(log_p, log_q, estimator=e)
                ).sum()
            )
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
        if estimator in ("k1", "k3"):
            assert value == pytest.approx(kl, rel=1e-12)
        elif estimator == "abs":
            assert value > kl


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_relative_accuracy_near_0_and_far_from_it(name, dtype, estimator):
    """exp(-d) - 1 + d in fp32 has no correct digit below |d| = 3e-4."""
    exponents = torch.linspace(-12, math.log10(80), 400, dtype=torch.float64)
    magnitudes = torch.cat([10**exponents, torch.linspace(0.9, 1.1, 21, dtype=torch.float64)])
    d = torch.cat([magnitudes, -magnitudes]).to(dtype)
    exact = torch.tensor([oracle(x, estimator) for x in d.double().tolist()], dtype=torch.float64)
    with executor(name):
        got = torch.stack(value_and_slope(d, estimator=estimator), 1).double()
    assert ((got - exact).abs() <= 8 * torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("name", EXECUTORS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_matches_50_digits(name, data):
    estimator, gradient = (data.draw(st.sampled_from(ESTIMATORS)) for _ in range(2))
    clamp = data.draw(st.sampled_from([None, 0.5, 3.0]))
    d = data.draw(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40))
    with executor(name):
        kl, slope = value_and_slope(
            torch.tensor(d), estimator=estimator, gradient=gradient, log_ratio_clamp=clamp
        )
    limit = clamp or INF
    for x, value, derivative in zip(d, kl.tolist(), slope.tolist(), strict=True):
        inside = min(max(x, -limit), limit)
        expected = oracle(inside, gradient)[1] if abs(x) <= limit else 0
        assert value == pytest.approx(oracle(inside, estimator)[0], rel=1e-6, abs=1e-37)
        assert derivative == pytest.approx(expected, rel=1e-6, abs=1e-37)
        assert estimator == "k1" or value >= 0


# ---- value and gradient apart --------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_value_and_gradient_are_named_apart(name):
    logprobs, ref, mask = example(3, 50, dtype=torch.float64)
    with executor(name):

        def run(**options):
            leaf = logprobs.clone().requires_grad_()
            kl = pk.kl_penalty(leaf, ref, mask, **options)
            return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]

        values, gradients = zip(*(run(estimator=e) for e in ESTIMATORS), strict=True)
        for i, j in itertools.product(range(4), repeat=2):
            kl, gradient = run(estimator=ESTIMATORS[i], gradient=ESTIMATORS[j])
            assert torch.equal(kl, values[i])
            assert torch.equal(gradient, gradients[j])
        leaf = logprobs.clone().requires_grad_()
        silent = pk.kl_penalty(leaf, ref, mask, estimator="k3", gradient="none")
        assert not silent.requires_grad
        assert torch.equal(silent, values[2])


@pytest.mark.parametrize("name", EXECUTORS)
def test_an_infinite_gradient_leaves_the_value_alone(name):
    with executor(name):
        kl, slope = value_and_slope(torch.tensor([-100.0, 1.0]), estimator="k1", gradient="k3")
    assert kl.tolist() == [-100, 1]
    assert slope[0] == -INF


# ---- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_far_ratios_overflow_unless_clamped(name):
    d = torch.tensor([-90.0, -1e30, 90.0, 1e30, -20.0])
    with executor(name):
        free, slope = value_and_slope(d, estimator="k3")
        clamped, flat = value_and_slope(d, estimator="k3", log_ratio_clamp=20.0)
        linear = value_and_slope(d, estimator="k1", log_ratio_clamp=20.0)
    assert free.tolist()[:2] == [INF, INF]
    assert slope.tolist()[:4] == [-INF, -INF, 1, 1]
    assert free[2].item() == pytest.approx(89)
    assert clamped[0] == clamped[1] == clamped[4]
    assert clamped[0].item() == pytest.approx(math.exp(20) - 21)
    assert clamped[2].item() == clamped[3].item() == pytest.approx(19)
    assert flat.tolist()[:4] == [0, 0, 0, 0]
    assert flat[4].item() == pytest.approx(1 - math.exp(20))
    assert linear[0].tolist() == [-20, -20, 20, 20, -20]
    assert linear[1].tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_not_finite_live_tokens_are_as_in_torch(name, estimator):
    logprobs = torch.tensor([NAN, 0.0, -INF, -INF, 0.0, -1.0])
    ref = torch.tensor([0.0, NAN, -1.0, -INF, -INF, -1.0])
    d = logprobs - ref
    plain = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d, "abs": d.abs()}[estimator]
    with executor(name):
        for clamp in (None, 5.0):
            leaf = logprobs.clone().requires_grad_()
            kl = pk.kl_penalty(leaf, ref, estimator=estimator, log_ratio_clamp=clamp)
            grad = torch.autograd.grad(kl.sum(), leaf)[0]
            assert kl[[0, 1, 3]].isnan().all()
            if clamp is None:
                torch.testing.assert_close(kl.detach(), plain, equal_nan=True)
            if estimator in ("k2", "k3"):
                assert grad[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_under_the_mask_has_an_effect(name, bad, estimator):
    logprobs, ref, mask = example(5, 701)
    scores = torch.arange(5.0)
    with executor(name):

        def run(a, b, upstream):
            leaf = a.clone().requires_grad_()
            kl = pk.kl_penalty(leaf, b, mask, estimator=estimator)
            shaped = pk.shape_rewards(scores, leaf, b, mask, kl_coef=0.1, estimator=estimator)
            grads = [
                torch.autograd.grad(t, leaf, upstream, retain_graph=True)[0] for t in (kl, *shaped)
            ]
            return [kl.detach(), *(t.detach() for t in shaped), *grads]

        clean = run(torch.where(mask, logprobs, 0), torch.where(mask, ref, 0), mask.float())
        poisoned = run(
            torch.where(mask, logprobs, bad),
            torch.where(mask, ref, -bad),
            torch.where(mask, 1.0, bad),
        )
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)
        assert not a[~mask].any()


@pytest.mark.parametrize("name", EXECUTORS)
def test_mixed_dtypes_meet_in_fp32_or_better(name):
    logprobs, ref, mask = example(3, 40, dtype=torch.float64)
    scores = torch.arange(3.0)
    with executor(name):
        for a, b in itertools.product((torch.bfloat16, torch.float16, torch.float32), repeat=2):
            x, y = logprobs.to(a).requires_grad_(), ref.to(b)
            kl = pk.kl_penalty(x, y, mask, estimator="k2")
            exact = pk.kl_penalty(x.detach().float(), y.float(), mask, estimator="k2")
            assert torch.equal(kl, exact)
            assert torch.autograd.grad(kl.sum(), x)[0].dtype == a
        wide = pk.kl_penalty(logprobs.float(), ref, mask)
        assert wide.dtype == torch.float64
        assert torch.equal(wide, torch.where(mask, logprobs.float().double() - ref, 0.0))
        shaped = pk.shape_rewards(scores.double(), logprobs.float(), ref.float(), mask, kl_coef=0.1)
        assert shaped.rewards.dtype == shaped.kl.dtype == torch.float64


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_bits_of_a_token_depend_on_nothing_but_the_token(name, dtype, estimator):
    logprobs, ref, mask = example(9, 3001, dtype=dtype)
    scores = torch.arange(9.0)
    with executor(name):

        def run(a, b, m):
            leaf = a.detach().requires_grad_()
            out = pk.shape_rewards(scores, leaf, b, m, kl_coef=0.1, estimator=estimator)
            grad = torch.autograd.grad(pk.kl_penalty(leaf, b, m, estimator=estimator).sum(), leaf)
            return [t.detach() for t in (*out, *grad)]

        expected = run(logprobs, ref, mask)
        before = torch.get_num_threads()
        try:
            counts = (1, 2, 3) if name != "triton" else (before,)
            for threads, layout in itertools.product(counts, LAYOUTS.values()):
                torch.set_num_threads(threads)
                got = run(layout(logprobs), layout(ref), layout(mask))
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        finally:
            torch.set_num_threads(before)
        for start in range(1, 20):
            moved = pk.kl_penalty(logprobs[0, start:], ref[0, start:], estimator=estimator)
            whole = pk.kl_penalty(logprobs[:1], ref[:1], estimator=estimator)
            assert torch.equal(moved, whole[0, start:])


@pytest.mark.parametrize("name", COMPILED)
def test_offsets_past_2_31_elements(name):
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # never touched but at its two ends
    logprobs = storage.as_strided((2, 5), (2**31, 1))
    logprobs.copy_(torch.arange(10.0).view(2, 5))
    with executor(name):
        kl = pk.kl_penalty(logprobs, torch.zeros(2, 5))
    assert kl.flatten().tolist() == list(range(10))


# ---- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("gradient", ["k1", "k2", "k3"])
def test_gradcheck(name, gradient):
    logprobs, ref, mask = example(3, 7, dtype=torch.float64)
    logprobs.requires_grad_()
    scores = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def shaped(scores, logprobs):
        return tuple(pk.shape_rewards(scores, logprobs, ref, mask, kl_coef=0.3, estimator=gradient))

    with executor(name):
        assert torch.autograd.gradcheck(
            lambda x: pk.kl_penalty(x, ref, mask, estimator=gradient, log_ratio_clamp=9.0), logprobs
        )
        assert torch.autograd.gradcheck(shaped, (scores, logprobs))


@pytest.mark.parametrize("backend", KERNELS)
def test_double_backward_raises(backend):
    logprobs, ref, mask = example(3, 7)
    logprobs.requires_grad_()
    kl = pk.kl_penalty(logprobs, ref, mask, backend=backend)
    with pytest.raises(RuntimeError, match=r"kl_penalty: .*double backward"):
        torch.autograd.grad(kl.sum(), logprobs, create_graph=True)
    shaped = pk.shape_rewards(torch.ones(3), logprobs, ref, mask, kl_coef=1.0, backend=backend)
    with pytest.raises(RuntimeError, match=r"shape_rewards: .*double backward"):
        torch.autograd.grad(shaped.rewards.sum(), logprobs, create_graph=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend):
    logprobs, ref, mask = example(3, 20)
    logprobs.requires_grad_()
    scores = torch.ones(3, requires_grad=True)
    ops = torch.ops.ppo_kernels
    opcheck(ops.kl_forward, (logprobs, ref, mask, "k3", "k2", INF, backend))
    opcheck(ops.kl_forward, (logprobs.T, ref.T, None, "k1", "k1", 2.0, backend))
    opcheck(ops.shape_rewards, (scores, logprobs, ref, mask, None, None, 0.1, "k1", INF, backend))
    offsets, coef = torch.tensor([0, 20, 20, 60]), torch.tensor(0.2)
    packed = (t.flatten() for t in (logprobs, ref))
    opcheck(ops.shape_rewards, (scores, *packed, None, offsets, coef, 0.0, "k3", 1.0, backend))
    logprobs = logprobs.detach()
    opcheck(ops.kl_backward, (ref, logprobs, ref, mask, "k3", INF, backend))


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic):
    def f(scores, a, b, m, coef, offsets):
        kl = pk.kl_penalty(a, b, m, estimator="k3", gradient="k2", backend=backend)
        out = pk.shape_rewards(scores, a, b, m, kl_coef=coef, backend=backend)
        packed = pk.shape_rewards(
            scores,
            a.flatten(),
            b.flatten(),
            kl_coef=0.2,
            estimator="k2",
            cu_seqlens=offsets,
            backend=backend,
        )
        return kl.sum() + out.rewards.square().sum() + packed.rewards.square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        a, b, mask = example(rows, 6, seed=rows)
        offsets = torch.arange(rows + 1) * 6
        leaves = [(torch.ones(rows), a.clone()) for _ in range(2)]
        for pair in leaves:
            for t in pair:
                t.requires_grad_()
        results = [
            g(*pair, b, mask, torch.tensor(0.3), offsets)
            for g, pair in zip((f, compiled), leaves, strict=True)
        ]
        torch.testing.assert_close(*results)
        for r in results:
            r.backward()
        for x, y in zip(*leaves, strict=True):
            torch.testing.assert_close(x.grad, y.grad)


# ---- bad input -----------------------------------------------------------------------------------

LOGPROBS, REF, MASK = example(2, 3)
BAD = [
    (dict(logprobs=[1.0]), TypeError, "logprobs: expected a tensor, got list"),
    (dict(logprobs=LOGPROBS.long()), TypeError, "logprobs: expected dtype .*, got int64"),
    (dict(ref_logprobs=REF.int()), TypeError, "ref_logprobs: expected dtype .*, got int32"),
    (
        dict(ref_logprobs=REF[:1]),
        ValueError,
        r"ref_logprobs: expected shape \[2, 3\] \(as logprobs\), got \[1, 3\]",
    ),
    (dict(ref_logprobs=REF.to("meta")), ValueError, f"ref_logprobs: expected device {DEVICE}"),
    (
        dict(ref_logprobs=REF.clone().requires_grad_()),
        ValueError,
        r"ref_logprobs: .*pass ref_logprobs.detach\(\)",
    ),
    (dict(mask=MASK[0]), ValueError, r"mask: expected shape \[2, 3\] \(as logprobs\), got \[3\]"),
    (
        dict(estimator="k4"),
        ValueError,
        "estimator: unknown estimator 'k4', expected one of k1, k2, k3, abs",
    ),
    (dict(estimator="none"), ValueError, "estimator: unknown estimator 'none'"),
    (
        dict(log_ratio_clamp=0),
        ValueError,
        r"log_ratio_clamp: expected a finite number in \(0, inf\), got 0",
    ),
    (dict(log_ratio_clamp=NAN), ValueError, "log_ratio_clamp: expected .*, got nan"),
    (dict(backend="gpu"), ValueError, "backend: unknown backend 'gpu'"),
]
BAD_KL = [
    (
        dict(gradient="k4"),
        ValueError,
        "gradient: unknown gradient 'k4', expected one of k1, k2, k3, abs, none",
    ),
]


def packed(*offsets, dtype=torch.int64, **more):
    return dict(
        logprobs=LOGPROBS.flatten(),
        ref_logprobs=REF.flatten(),
        mask=None,
        scores=torch.ones(len(offsets) - 1),
        cu_seqlens=torch.tensor(offsets, dtype=dtype),
        **more,
    )


BAD_REWARDS = [
    (dict(scores=1.0), TypeError, "scores: expected a tensor, got float"),
    (dict(scores=torch.ones(2).int()), TypeError, "scores: expected dtype .*, got int32"),
    (
        dict(scores=torch.ones(3)),
        ValueError,
        r"scores: expected shape \[2\] \(one per row of logprobs\), got \[3\]",
    ),
    (dict(kl_coef=-0.1), ValueError, r"kl_coef: expected a finite number in \[0, inf\), got -0.1"),
    (dict(kl_coef=INF), ValueError, "kl_coef: expected a finite number .*, got inf"),
    (dict(kl_coef="high"), TypeError, "kl_coef: expected a number, got str"),
    (dict(kl_coef=torch.tensor(-0.5)), ValueError, "kl_coef: expected .*, got -0.5"),
    (dict(kl_coef=torch.tensor(NAN)), ValueError, "kl_coef: expected .*, got nan"),
    (dict(kl_coef=torch.ones(2)), ValueError, r"kl_coef: expected shape \[\] .*, got \[2\]"),
    (dict(kl_coef=torch.tensor(1)), TypeError, "kl_coef: expected dtype .*, got int64"),
    (
        dict(kl_coef=torch.tensor(0.1, requires_grad=True)),
        ValueError,
        r"kl_coef: .*pass kl_coef.detach\(\)",
    ),
    (
        dict(logprobs=LOGPROBS[0], ref_logprobs=REF[0], mask=None),
        ValueError,
        r"logprobs: expected shape \[B, T\], or \[N\] with cu_seqlens, got \[3\]",
    ),
    (dict(cu_seqlens=torch.tensor([0, 6])), ValueError, "cu_seqlens: expected only with packed"),
    (packed(0, 6) | dict(cu_seqlens=[0, 6]), TypeError, "cu_seqlens: expected a tensor, got list"),
    (packed(0, 6, dtype=torch.int16), TypeError, "cu_seqlens: expected dtype int32, int64, got"),
    (packed(1, 6), ValueError, "cu_seqlens: expected to start at 0, got 1 at index 0"),
    (packed(0, 5), ValueError, "cu_seqlens: expected to end at 6, .*, got 5 at index 1"),
    (
        packed(0, 4, 2, 6),
        ValueError,
        r"cu_seqlens: expected not to decrease \(after 4\), got 2 at index 2",
    ),
    (packed(0, 9, 6), ValueError, "cu_seqlens: expected not to decrease"),
    (
        packed(0, 2, 6) | dict(scores=torch.ones(1)),
        ValueError,
        r"scores: expected shape \[2\] \(one per packed sequence\), got \[1\]",
    ),
]
KL = dict(logprobs=LOGPROBS, ref_logprobs=REF, mask=MASK)
CALLS = [
    *((pk.kl_penalty, KL, *bad) for bad in BAD + BAD_KL),
    *(
        (pk.shape_rewards, KL | dict(scores=torch.ones(2), kl_coef=0.1), *bad)
        for bad in BAD + BAD_REWARDS
    ),
]


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
@pytest.mark.parametrize(("function", "arguments", "change", "error", "message"), CALLS)
def test_bad_input(backend, function, arguments, change, error, message):
    with raises(backend, error, message):
        function(**(arguments | dict(backend=backend) | change))
