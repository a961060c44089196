"""The variants of clipped_loss beyond the cube: an oracle, objectives of sequences, selections."""

import math
from functools import partial

import pytest
import torch
from device import INTERPRETED, seeded
from hypothesis import given, settings
from loss_oracle import (
    BACKENDS,
    EXECUTORS,
    KERNELS,
    batches,
    bits,
    check_parts,
    plain_variant,
    plain_weights,
    some_mask,
    split,
    tokens,
    with_grad,
)
from torch.testing import assert_close

import ppo_kernels as pk
from ppo_kernels.ops._policy import VARIANTS
from ppo_kernels.testing import executor

CLOSE = {"rtol": 1e-12, "atol": 1e-14}
NEW = [name for name in VARIANTS if name != "clip"]
EACH = pytest.mark.parametrize("variant", NEW)
OF_TOKENS = [name for name in NEW if VARIANTS[name].kind == "token"]
OF_SEQUENCES = [name for name in NEW if VARIANTS[name].kind == "sequence"]
SEQUENCES = pytest.mark.parametrize("variant", OF_SEQUENCES)
COVARIANCES = pytest.mark.parametrize("variant", ["clip-cov", "kl-cov"])
BOUNDS = {"clip_low": 0.1, "clip_high": 0.2}


# ---- an oracle ---------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.6])
@pytest.mark.parametrize("variant", [*OF_TOKENS, *OF_SEQUENCES])
@EXECUTORS
def test_variants_equal_plain_python(name, variant, clamp, packed, aggregation):
    shape, ends = (5, 14), [14, 28, 42, 56, 70]
    if packed:
        shape, ends = (70,), [14, 14, 45, 46, 62, 70]
    inputs, mask = tokens(*shape, spread=0.7), some_mask(*shape)
    if not packed:
        inputs = (*inputs[:2], torch.tensor([-2.0, 1.5, 0.0, 0.7, -0.3], dtype=torch.float64))
    mask.view(-1)[ends[-2] :] = False
    setting = {"dual_clip": 1.3} if variant == "gspo" else {}
    if variant == "sapo":
        setting = {"tau_pos": 0.8, "tau_neg": 3.0}
    rows = split(mask.flatten().tolist(), ends)
    weights = plain_weights(rows, aggregation, 2.5)
    spread = inputs[2] if packed else inputs[2][:, None].expand(shape)
    flat = [t.flatten().tolist() for t in (*inputs[:2], spread)]
    loss, gradient, cuts = 0.0, [], []
    for row, w_row, *sequence in zip(rows, weights, *(split(t, ends) for t in flat), strict=True):
        live = [token for m, *token in zip(row, *sequence, strict=True) if m]
        plain = {"dual": 1.3} if variant == "gspo" else setting
        made = iter(plain_variant(variant, live, 0.1, 0.2, clamp=clamp, **plain))
        for m, w in zip(row, w_row, strict=True):
            token = next(made) if m else (0.0, 0.0, None)
            loss += w * token[0]
            gradient.append(w * token[1])
            cuts += [token[2]] * m
    with executor(name):
        got, grad, m = with_grad(
            pk.clipped_loss, *inputs, mask, variant=variant, aggregation=aggregation,
            denominator=2.5, log_ratio_clamp=clamp, **BOUNDS, **setting,
            cu_seqlens=torch.tensor([0, *ends]) if packed else None,
        )  # fmt: skip
    assert_close(got.item(), loss, **CLOSE)
    assert_close(grad.flatten().tolist(), gradient, **CLOSE)
    assert {"cispo": {"high", "low", None}, "gmpo": {"high", "low", None}}.get(
        variant, {None}
    ) <= set(cuts)
    n = len(cuts)
    assert m.clip_fraction_high.item() == pytest.approx(cuts.count("high") / n)
    assert m.clip_fraction_low.item() == pytest.approx(cuts.count("low") / n)
    assert m.dual_clip_fraction.item() == pytest.approx(cuts.count("dual") / n)


@EXECUTORS
def test_a_case_worked_out_by_hand(name):
    """Ratios 2 and 1/2, 1 and 1, against log-probabilities of -1 and bounds 3/4 and 3/2."""
    lp = torch.full((2, 2), -1.0, dtype=torch.float64)
    old = lp - torch.tensor([[2.0, 0.5], [1.0, 1.0]], dtype=torch.float64).log()
    adv = torch.tensor([3.0, -2.0], dtype=torch.float64)
    expected = {
        # Weights 3/2 and 3/4.
        "cispo": (3 * (1.5 + 0.75) - 2 * 2, [[-4.5, -2.25], [2.0, 2.0]]),
        "gpg": (3 * 2 - 2 * 2, [[-3.0, -3.0], [2.0, 2.0]]),
        # The geometric mean of the ratios is 1.
        "gspo": (-3 * 2 + 2 * 2, [[-3.0, -3.0], [2.0, 2.0]]),
        # Log-ratios log 2 and -log 2; the first at most 1/2.
        "gmpo": None,
    }
    shared = math.exp((0.5 - math.log(2.0)) / 2)
    expected["gmpo"] = (-3 * shared * 2 + 2 * 2, [[0.0, -3 * shared], [2.0, 2.0]])
    for variant, (loss, gradient) in expected.items():
        with executor(name):
            got, grad, _ = with_grad(
                pk.clipped_loss, lp, old, adv, clip_low=0.25, clip_high=0.5, variant=variant,
                aggregation="token-sum",
            )  # fmt: skip
        assert_close(got.item(), float(loss), **CLOSE)
        assert_close(grad, torch.tensor(gradient, dtype=torch.float64), **CLOSE)


# ---- objectives --------------------------------------------------------------------------------


@SEQUENCES
@EXECUTORS
def test_the_gradient_is_that_of_the_objective_of_sequences(name, variant):
    """Written for each sequence, as in the papers, and differentiated by torch."""
    lp, old, _ = tokens(6, 30, spread=0.5)
    adv = torch.tensor([1.0, -1.0, 0.5, -2.0, 3.0, -0.7], dtype=torch.float64)
    mask = some_mask(6, 30)
    leaf = lp.clone().requires_grad_()
    objective = 0
    for row, row_old, a, live in zip(leaf, old, adv, mask, strict=True):
        x = (row - row_old)[live]
        if variant == "gspo":
            ratio = x.mean().exp()
            objective += torch.minimum(ratio * a, ratio.clamp(0.9, 1.02) * a) / 6
        else:
            sign = a.sign()
            bounded = sign * torch.minimum(sign * x, sign * x.clamp(-0.1, 0.02))
            objective += a * bounded.mean().exp() / 6
    objective.backward()
    with executor(name):
        loss, grad, m = with_grad(
            pk.clipped_loss, lp, old, adv, mask, variant=variant, clip_low=0.1, clip_high=0.02,
            aggregation="seq-mean-token-mean",
        )  # fmt: skip
    assert_close(loss, -objective.detach(), **CLOSE)
    assert_close(grad, -leaf.grad, **CLOSE)
    assert 0 < m.clip_fraction < 1


@BACKENDS
@pytest.mark.parametrize("variant", ["sapo", "gpg", "gspo", "gmpo", "clip-cov", "kl-cov"])
def test_gradcheck(backend, variant):
    lp, old, adv = tokens(3, 5)
    setting = {"variant": variant, "aggregation": "seq-mean-token-mean", "backend": backend}
    if variant.endswith("-cov"):
        setting |= {"cov_ratio": 1.0, "cov_low": 0.02, "cov_high": 0.3}

    def loss(x):
        return pk.clipped_loss(x, old, adv[:, 0], some_mask(3, 5), **setting).loss * 1.7

    assert torch.autograd.gradcheck(loss, lp.clone().requires_grad_())


@EACH
@EXECUTORS
def test_the_loss_is_proportional_to_the_advantages(name, variant):
    """So weights of tokens may be multiplied into them; the powers of two are exact."""
    lp, old, adv = tokens(4, 50, dtype=torch.float32)
    how = {"variant": variant, "kl_coef": 0.0, "cov_ratio": 1.0, "cov_high": 1e9}
    with executor(name):
        a, b = (
            bits(pk.clipped_loss, lp, old, w * adv, some_mask(4, 50), **how, cov_low=w * 0.1)
            for w in (1.0, 4.0)
        )
    assert torch.equal(4 * a[0], b[0])
    assert torch.equal(4 * a[1], b[1])


@pytest.mark.parametrize("variant", [*OF_TOKENS, *OF_SEQUENCES])
@EXECUTORS
@settings(max_examples=3 if INTERPRETED else 10, deadline=None)
@given(batch=batches())
def test_padding_packing_and_micro_batches_are_one_batch(name, variant, batch):
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        f = partial(pk.clipped_loss, variant=variant, log_ratio_clamp=0.5)
        check_parts(name, f, aggregation, batch, exact_bits=name != "torch")


# ---- what is not finite ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*OF_TOKENS, *OF_SEQUENCES])
@EXECUTORS
def test_nan_stays_in_its_token_or_sequence(name, variant):
    for where in range(3):
        inputs = [t.clone() for t in tokens(3, 5, dtype=torch.float32)]
        inputs[where][1, 2] = torch.nan
        with executor(name):
            loss, grad, m = with_grad(pk.clipped_loss, *inputs, variant=variant)
        if variant == "gpg" and where == 1:  # does not look at the old policy
            assert not loss.isnan()
            assert m.ratio_max.isnan()
            continue
        assert loss.isnan()
        whole = variant in OF_SEQUENCES and (where < 2 or variant == "gmpo")
        bad = [[1, k] for k in range(5)] if whole else [[1, 2]]
        if variant == "gpg" and where == 0:
            bad = []  # the gradient is -A
        found = grad.isnan().nonzero().tolist()
        if variant == "gmpo":  # whose cut tokens have no gradient whatever the loss
            assert found
            assert {row for row, _ in found} == {1}
        elif variant == "cispo" and where == 0:
            assert found == [[1, 2]]
        else:
            assert found == bad


@EXECUTORS
def test_ratios_that_overflow(name):
    x = torch.tensor([200.0, 200.0, -200.0, torch.inf, -torch.inf])
    adv = torch.tensor([1.0, -1.0, 1.0, 2.0, 1.0])
    gate = torch.sigmoid(torch.tensor(-1.0)).item()
    with executor(name):
        loss, grad, _ = with_grad(
            pk.clipped_loss, x, torch.zeros(5), adv, variant="sapo", tau_neg=2.0,
            aggregation="token-sum",
        )  # fmt: skip
        assert_close(loss.item(), -4 + 2 - 4 * gate - 8 - 4 * gate, rtol=1e-6, atol=0)
        assert not grad.any()
        grad = with_grad(pk.clipped_loss, x[:3], torch.zeros(3), adv[:3], variant="cispo")[1]
    assert_close(grad, torch.tensor([-1.2, 1.2, -0.8]) / 3)


# ---- selections --------------------------------------------------------------------------------


def covariance(lp, adv, mask):
    return (adv - adv[mask].mean()) * (lp - lp[mask].mean())


@EXECUTORS
def test_clip_cov_takes_the_loss_of_some_tokens_away(name):
    lp, old, adv = tokens(8, 60)
    adv += 0.7
    mask = some_mask(8, 60)
    c = covariance(lp, adv, mask)
    _, full, m = with_grad(pk.clipped_loss, lp, old, adv, mask, backend="torch")
    candidates = mask & (full != 0) & (c > 0.2) & (c < 1.5)
    picked = []
    for seed in (1, 1, 2):
        with executor(name):
            loss, grad, measured = with_grad(
                pk.clipped_loss, lp, old, adv, mask, variant="clip-cov", cov_ratio=0.05,
                cov_low=0.2, cov_high=1.5, generator=seeded(seed),
            )  # fmt: skip
        picked.append(mask & (full != 0) & (grad == 0))
        assert picked[-1].sum() == int(0.05 * mask.sum())
        assert (candidates | ~picked[-1]).all()
        assert_close(grad, torch.where(picked[-1], 0.0, full), **CLOSE)
        assert measured.tokens == m.tokens
        ratio = (lp - old).exp()
        kept = torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))[mask & ~picked[-1]]
        assert_close(loss, kept.sum() / mask.sum(), **CLOSE)
    assert torch.equal(picked[0], picked[1])
    assert not torch.equal(picked[0], picked[2])


@EXECUTORS
def test_kl_cov_adds_to_the_loss_of_the_largest_covariances(name):
    lp, old, adv = tokens(8, 60)
    adv += 3  # so that the mean over the live tokens is none of another set
    mask = some_mask(8, 60)
    c = torch.where(mask, covariance(lp, adv, mask), -torch.inf)
    top = c >= c.flatten().sort().values[-int(0.1 * mask.sum())]
    leaf = lp.clone().requires_grad_()
    x = (leaf - old)[mask]
    expected = (-adv[mask] * x.exp() + top[mask] * (0.3 * x.abs())).mean()
    expected.backward()
    with executor(name):
        loss, grad, m = with_grad(
            pk.clipped_loss, lp, old, adv, mask, variant="kl-cov", cov_ratio=0.1, kl_coef=0.3
        )
    assert_close(loss, expected.detach(), **CLOSE)
    assert_close(m.loss, expected.detach(), **CLOSE)
    assert_close(grad, leaf.grad, **CLOSE)


@COVARIANCES
@BACKENDS
def test_at_least_one_token_is_picked_if_there_are_any(variant, backend):
    lp, old, adv = tokens(3, 4)
    how = {"variant": variant, "backend": backend, "cov_low": -1e9, "cov_high": 1e9}
    plain = {"clip_low": 1e9} if variant == "kl-cov" else {}
    base = with_grad(pk.clipped_loss, lp, old, adv, backend=backend, **plain)[1]
    if variant == "clip-cov":
        how["clip_low"] = plain["clip_low"] = 1e9
        base = with_grad(pk.clipped_loss, lp, old, adv, backend=backend, **plain)[1]
    grad = with_grad(pk.clipped_loss, lp, old, adv, **how)[1]
    assert (grad != base).sum() == 1
    for shape in ((0, 4), (3, 0)):
        assert with_grad(pk.clipped_loss, *tokens(*shape), **how)[0] == 0


# ---- in the fused losses -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*OF_TOKENS, *OF_SEQUENCES])
@pytest.mark.parametrize("packed", [False, True])
@BACKENDS
def test_fused_losses_take_variants(backend, packed, variant):
    g = seeded(0)
    steps = 20 if INTERPRETED else 120
    shape, offsets, first = (5, steps), None, 2 * steps + 10
    if packed:
        shape, offsets = (5 * steps,), torch.tensor([0, first, first, first + 1, 5 * steps])
    hidden = torch.randn(*shape, 6, generator=g)
    weight = torch.randn(11, 6, generator=g)
    labels = torch.randint(11, shape, generator=g)
    mask = some_mask(*shape)
    how = {"variant": variant, "cu_seqlens": offsets, "backend": backend, **BOUNDS}
    leaf = hidden.clone().requires_grad_()
    logprobs = (leaf @ weight.T).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    old = logprobs.detach() + 0.3 * torch.randn(shape, generator=g)
    adv = torch.randn(shape, generator=g)
    expected = pk.clipped_loss(logprobs, old, adv, mask, **how | {"backend": "torch"})
    expected.loss.backward()
    from_logits, from_hidden = (hidden.clone().requires_grad_() for _ in range(2))
    logits = from_logits @ weight.T
    a = pk.ppo_loss_from_logits(logits, labels, old, adv, mask, **how)
    b = pk.ppo_loss_from_hidden(from_hidden, weight, labels, old, adv, mask, chunk=256, **how)
    for result, other in ((a, from_logits), (b, from_hidden)):
        result.loss.backward()
        assert_close(result.loss, expected.loss, rtol=2e-5, atol=1e-6)
        assert_close(result.metrics.stats, expected.metrics.stats, rtol=2e-5, atol=2e-5)
        assert_close(other.grad, leaf.grad, rtol=2e-4, atol=2e-7)


@COVARIANCES
def test_fused_losses_pick_no_tokens(variant):
    x, labels = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"variant: .*{variant}.*only clipped_loss picks"):
        pk.ppo_loss_from_logits(torch.zeros(2, 3, 5), labels, x, x, variant=variant)


@pytest.mark.parametrize("variant", OF_SEQUENCES)
def test_fused_losses_ask_for_sequences(variant):
    x, labels = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"cu_seqlens: .*{variant}.*of packed tokens, got None"):
        pk.ppo_loss_from_logits(torch.zeros(3, 5), labels, x, x, variant=variant)


# ---- bits and graphs ---------------------------------------------------------------------------


@SEQUENCES
@KERNELS
def test_bits_depend_neither_on_threads_nor_on_strides(backend, variant):
    shape = (7, 3000)
    mask = some_mask(*shape)
    how = {"variant": variant, "backend": backend}
    for dtype in (torch.float32, torch.float64):
        inputs = tokens(*shape, dtype=dtype)
        expected = bits(pk.clipped_loss, *inputs, mask, **how)
        threads = torch.get_num_threads()
        try:
            for n in (1, 2, 3) if backend == "cpu" else ():
                torch.set_num_threads(n)
                got = bits(pk.clipped_loss, *inputs, mask, **how)
                assert all(map(torch.equal, got, expected)), n
        finally:
            torch.set_num_threads(threads)
        strided = [t.mT.contiguous().mT for t in (*inputs, mask.int())]
        assert all(map(torch.equal, bits(pk.clipped_loss, *strided, **how), expected))


@SEQUENCES
@KERNELS
def test_a_sequence_is_summed_from_its_first_token_on(backend, variant):
    """Large log-ratios that cancel each other: every other order of the sum shows."""
    g = seeded(0)
    large = torch.ones(300, dtype=torch.float32)
    large[::2] = -1
    x = torch.where(torch.arange(600) % 3 > 0, torch.randn(600, generator=g), 0.0)
    x[torch.randperm(600, generator=g)[:300]] = large * 2.0**50
    how = {"variant": variant, "clip_low": 1e30, "clip_high": 1e30, "backend": backend}

    def gradient(x, mask=None, offsets=None):
        adv = torch.full_like(x, -1.0)
        return with_grad(
            pk.clipped_loss, x, torch.zeros_like(x), adv, mask, cu_seqlens=offsets,
            aggregation="token-sum", **how,
        )[1]  # fmt: skip

    alone = gradient(x[None])[0]
    assert 0 < alone[0] < torch.inf
    for before in (1, 3, 17, 900):
        packed = torch.cat([torch.randn(before, generator=g), x])
        offsets = torch.tensor([0, before, before + 600])
        assert torch.equal(gradient(packed, offsets=offsets)[before:], alone)
        padded = torch.full((2, 600 + before), torch.nan)
        padded[1, :600] = x
        assert torch.equal(gradient(padded, ~padded.isnan())[1, :600], alone)


@pytest.mark.parametrize("code", range(1, 6))
@KERNELS
def test_opcheck(backend, code):
    lp, old, adv = tokens(3, 5, dtype=torch.float32)
    op = torch.ops.ppo_kernels.clipped_loss.default
    for needs_gradient in (False, True):
        live = lp.clone().requires_grad_(needs_gradient)
        args = (live, old, adv, 0.8, 1.2, None, None, code, some_mask(3, 5), None, 0, None, None)
        torch.library.opcheck(op, (*args, None, needs_gradient, backend))


@EACH
@BACKENDS
def test_compiles_to_one_graph(backend, variant):
    inputs = tokens(23, dtype=torch.float32)
    offsets = torch.tensor([0, 4, 4, 15, 16, 23])
    mask = some_mask(23)
    # Of clip-cov all candidates, so that nothing is random.
    how = {"cov_low": 0.1, "cov_ratio": 1.0 if variant == "clip-cov" else 0.2}

    def step(live, *constants):
        loss, metrics = pk.clipped_loss(
            live, *constants, mask, cu_seqlens=offsets, variant=variant, backend=backend, **how
        )
        return loss * 0.5, metrics.loss

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
