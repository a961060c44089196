"""Kept sets beyond the cube: by hand, extreme and bad sets, bits, graphs, a sampler's settings."""

import itertools
import math

import pytest
import torch
from device import DEVICE, INTERPRETED, THREADS, kernels, raises, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels import KeptSet, _faults, _head
from ppo_kernels.testing import executor, executors

EXECUTORS = executors("logprobs_from_logits", "logprobs_from_hidden", device=DEVICE)
COMPILED = [e for e in EXECUTORS if e != "torch"]
BACKENDS = kernels("logprobs_from_logits", "logprobs_from_hidden")
EACH = pytest.mark.parametrize("name", EXECUTORS)
KERNELS = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


def sets_of(*lists):
    sizes = torch.tensor([0, *map(len, lists)])
    return KeptSet(sizes.cumsum(0), torch.tensor([i for own in lists for i in own]).int())


def example(rows, vocab, size, seed=0, dtype=torch.float32, std=3.0):
    """Logits, tokens, and sets of `size` ids in an order of no meaning that hold the token."""
    g = seeded(seed)
    logits = (torch.randn(rows, vocab, generator=g, dtype=torch.float64) * std).to(dtype)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:size] for _ in range(rows)])
    place = torch.randint(size, (rows, 1), generator=g)
    offsets = torch.arange(rows + 1) * size
    return logits, ids.gather(1, place)[:, 0], KeptSet(offsets, ids.flatten().int())


def results(logits, tokens, kept, weight=1.0, **more):
    """Log-probabilities, entropies and the gradient of both."""
    leaf = logits.detach().requires_grad_()
    out = pk.logprobs_from_logits(leaf, tokens, kept=kept, entropy=True, **more)
    total = (weight * out.logprobs).sum() + 0.3 * (weight * out.entropy).sum()
    return out.logprobs.detach(), out.entropy.detach(), *torch.autograd.grad(total, leaf)


# ---- values --------------------------------------------------------------------------------------


@EACH
def test_by_hand(name):
    """Of logits 0, log 3, 9 and 0 the third is not kept: p = 1/5, 3/5, 1/5."""
    logits = torch.tensor([[0.0, math.log(3), 9.0, 0.0]], requires_grad=True)
    with executor(name):
        out = pk.logprobs_from_logits(
            logits, torch.tensor([1]), kept=sets_of([3, 1, 0]), entropy=True
        )
        (grad,) = torch.autograd.grad(out.logprobs.sum(), logits)
    assert out.logprobs.item() == pytest.approx(math.log(3 / 5), rel=1e-6)
    entropy = -(3 / 5 * math.log(3 / 5) + 2 / 5 * math.log(1 / 5))
    assert out.entropy.item() == pytest.approx(entropy, rel=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[-0.2, 0.4, 0.0, -0.2]]))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_log_probability_of_masked_logits(name, dtype):
    logits, tokens, kept = example(5, 800, 60, dtype=dtype)
    others = torch.ones(5, 800, dtype=torch.bool)
    others.scatter_(1, kept.ids.view(5, 60).long(), False)
    with executor(name):
        got = results(logits, tokens, kept, temperature=0.7)
        leaf = logits.clone().requires_grad_()
        want = pk.logprobs_from_logits(
            leaf.masked_fill(others, -torch.inf), tokens, temperature=0.7, entropy=True
        )
        (grad,) = torch.autograd.grad(want.logprobs.sum() + 0.3 * want.entropy.sum(), leaf)
    torch.testing.assert_close(got[:2], (want.logprobs, want.entropy), rtol=1e-6, atol=1e-6)
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got[2], grad, **tolerance)
    assert not got[2][others].any()


@EACH
def test_the_set_of_everything_changes_nothing(name):
    logits, tokens, kept = example(3, 5003, 5003)
    with executor(name):
        got = results(logits, tokens, kept)
        leaf = logits.clone().requires_grad_()
        want = pk.logprobs_from_logits(leaf, tokens, entropy=True)
        (grad,) = torch.autograd.grad(want.logprobs.sum() + 0.3 * want.entropy.sum(), leaf)
    torch.testing.assert_close(got, (*want, grad), rtol=1e-5, atol=1e-6)


@EACH
def test_a_set_of_one_token_is_sure_of_it(name):
    logits, tokens, _ = example(4, 100, 10)
    with executor(name):
        logprobs, entropy, grad = results(logits, tokens, sets_of(*tokens[:, None].tolist()))
    assert not logprobs.any()
    assert not entropy.any()
    assert not grad.any()


@EACH
def test_a_token_outside_of_its_set(name):
    """-inf whatever the logits: no gradient, and the entropy is that of the set."""
    logits = torch.tensor([[0.0, math.log(3), 0.0]] * 2, requires_grad=True)
    kept = sets_of([0, 1], [0, 1])
    with executor(name):
        out = pk.logprobs_from_logits(logits, torch.tensor([2, 0]), kept=kept, entropy=True)
        (grad,) = torch.autograd.grad(out.logprobs.sum(), logits, retain_graph=True)
        (through_entropy,) = torch.autograd.grad(out.entropy.sum(), logits)
    assert out.logprobs[0].item() == -math.inf
    torch.testing.assert_close(out.entropy[0], out.entropy[1])
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0, 0.0], [0.75, -0.75, 0.0]]))
    torch.testing.assert_close(through_entropy[0], through_entropy[1])
    assert through_entropy[0, 0] > 0


@EACH
@pytest.mark.parametrize("margin", [10.0, 17.0, 40.0, 80.0])
@pytest.mark.parametrize("size", [2, 50, 5000])
def test_collapsed_sets_keep_relative_accuracy(name, margin, size):
    """One token holds all the mass: log p = -log1p(e), with e = (size - 1) exp(-margin)."""
    logits = torch.zeros(2, 9000)
    logits[:, 4500] = margin
    own = [*range(1, size), 4500] if size < 4500 else range(size)
    e = (size - 1) * math.exp(-margin)
    if name == "torch" and e < 1e-37:
        pytest.skip("exp(-margin) is subnormal in the reference's fp32")
    entropy = math.log1p(e) + e / (1 + e) * margin
    with executor(name):
        leaf = logits.requires_grad_()
        out = pk.logprobs_from_logits(
            leaf, torch.tensor([4500, 1]), kept=sets_of(own, own), entropy=True
        )
        out.logprobs[0].backward()
    assert out.logprobs[0].item() == pytest.approx(-math.log1p(e), rel=2e-6)
    assert out.logprobs[1].item() == pytest.approx(-margin - math.log1p(e), rel=1e-6)
    assert out.entropy[0].item() == pytest.approx(entropy, rel=4e-6)
    assert out.entropy[1].item() == pytest.approx(entropy, rel=4e-6)
    assert leaf.grad[0, 4500].item() == pytest.approx(e / (1 + e), rel=4e-6)
    assert leaf.grad[0, 1].item() == pytest.approx(-math.exp(-margin) / (1 + e), rel=4e-6)


@EACH
def test_what_is_not_finite_matters_in_the_set_alone(name):
    logits, tokens, kept = example(4, 300, 20)
    ids = kept.ids.view(4, 20).long()
    others = torch.ones(4, 300, dtype=torch.bool).scatter(1, ids, False)
    unlike = ids != tokens[:, None]
    with executor(name):
        want = results(logits, tokens, kept, softcap=9.0)
        for bad in (torch.nan, torch.inf):
            got = results(logits.masked_fill(others, bad), tokens, kept, softcap=9.0)
            assert all(map(torch.equal, got, want))
        logits[0, ids[0][unlike[0]][3]] = torch.nan
        logits[1, ids[1][unlike[1]][:5]] = -torch.inf
        logits[2, ids[2]] = -torch.inf
        logprobs, entropy, grad = results(logits, tokens, kept)
    assert logprobs.isfinite().tolist() == entropy.isfinite().tolist() == [False, True, False, True]
    assert grad[0, ids[0]].isnan().all()
    assert not grad[1, ids[1][unlike[1]][:5]].any()
    assert grad[1].isfinite().all()
    assert not grad[others].any()


@EACH
def test_an_empty_set_gives_nan_where_it_is_looked_at(name):
    logits = torch.zeros(2, 5)
    kept, tokens = sets_of([], []), torch.tensor([1, 2])
    with executor(name):
        logprobs, entropy, grad = results(
            logits, tokens, kept, torch.tensor([1.0, 0.0]), mask=torch.tensor([1, 0])
        )
    assert logprobs[0].isnan()
    assert entropy[0].isnan()
    assert not logprobs[1]
    assert not entropy[1]
    assert not grad.any()


@EACH
def test_rows_nobody_asks_about_have_no_gradient(name):
    logits, tokens, kept = example(3, 100, 10)
    logits[1] = torch.nan
    with executor(name):
        leaf = logits.requires_grad_()
        out = pk.logprobs_from_logits(leaf, tokens, kept=kept)
        torch.where(torch.tensor([True, False, True]), out, 0.0).sum().backward()
    if name != "torch":
        assert not leaf.grad[1].any()
    assert leaf.grad[0].any()
    assert leaf.grad[0].isfinite().all()


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("size", [37, 700, 9000])
def test_bits_of_a_row_depend_on_its_list_alone(name, size):
    rows = 3 if INTERPRETED else 9
    logits, tokens, kept = example(rows, 9001, size)
    ids = kept.ids.view(rows, size)

    def row(logits, tokens, kept, i):
        out = results(logits, tokens, kept)
        return out[0][i].item(), out[1][i].item(), out[2][i]

    def same(a, b):
        return a[:2] == b[:2] and torch.equal(a[2], b[2])

    with executor(name):
        want = row(logits[:1], tokens[:1], KeptSet(kept.offsets[:2], ids[0]), 0)
        assert same(row(logits, tokens, kept, 0), want)
        last = KeptSet(kept.offsets, ids.flip(0).flatten().long())
        assert same(row(logits.flip(0), tokens.flip(0), last, rows - 1), want)
        strided = torch.empty(rows, 2 * 9001)[:, ::2].copy_(logits)
        apart = torch.zeros(len(kept.ids), 3, dtype=torch.int32)[:, 1].copy_(kept.ids)
        assert same(row(strided, tokens, KeptSet(kept.offsets, apart), 0), want)
        threads = torch.get_num_threads()
        try:
            for n in THREADS:
                torch.set_num_threads(n)
                assert same(row(logits, tokens, kept, 0), want), n
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("name", COMPILED)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_set_agrees_with_float64(name, data):
    """Sets of any size in any order, with ties and forbidden tokens, against plain Python sums."""
    vocab = data.draw(st.sampled_from([1, 7, 40, 600]))
    ids = data.draw(st.permutations(range(vocab)))[: data.draw(st.integers(1, vocab))]
    value = st.one_of(st.floats(-300, 300, width=32), st.just(-math.inf), st.just(5.0))
    values = data.draw(st.lists(value, min_size=len(ids), max_size=len(ids)))
    target = data.draw(st.integers(0, len(ids) - 1))
    if max(values) == -math.inf:
        values[target] = 0.0
    logits = torch.full((1, vocab), torch.nan)
    logits[0, ids] = torch.tensor(values)
    with executor(name):
        got = pk.logprobs_from_logits(
            logits, torch.tensor([ids[target]]), kept=sets_of(ids), entropy=True
        )
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    rest = math.fsum(w for i, w in enumerate(weights) if i != target)
    mass = rest + weights[target]
    z = values[target] - top
    x = math.inf if z == -math.inf else math.log(rest) - z if rest else -math.inf
    expected = -(x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)))
    assert got.logprobs.item() == pytest.approx(expected, rel=3e-6, abs=1e-30)
    mean = math.fsum(w * (v - top) for w, v in zip(weights, values, strict=True) if w) / mass
    assert got.entropy.item() == pytest.approx(math.log(mass) - mean, rel=3e-6, abs=1e-6)


# ---- from hidden states --------------------------------------------------------------------------


def states(rows=10, size=12, vocab=70, kept=9, dtype=torch.float32):
    g = seeded(3)
    _, tokens, sets = example(rows, vocab, kept)
    hidden = torch.randn(rows, size, generator=g).to(dtype)
    return hidden, (torch.randn(vocab, size, generator=g) / size**0.5).to(dtype), tokens, sets


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_hidden_states_it_is_that_of_their_logits(name, dtype):
    hidden, weight, tokens, kept = states(dtype=dtype)
    with executor(name):
        got = pk.logprobs_from_hidden(hidden, weight, tokens, kept=kept, entropy=True)
        logits = hidden.float() @ weight.float().t()
        want = pk.logprobs_from_logits(logits, tokens, kept=kept, entropy=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@KERNELS
def test_backward_from_hidden_states_makes_no_logits_again(backend, monkeypatch):
    made = []
    whole = _head.Head.logits
    monkeypatch.setattr(
        _head.Head, "logits", lambda self, part, memory: made.append(1) or whole(self, part, memory)
    )
    hidden, weight, tokens, kept = states()
    hidden.requires_grad_()
    pk.logprobs_from_hidden(hidden, weight, tokens, kept=kept, backend=backend).sum().backward()
    assert made == [1]


@KERNELS
def test_selected_rows_keep_their_own_sets(backend):
    hidden, weight, tokens, kept = states(2 * _head.TILE)
    mask = torch.arange(2 * _head.TILE) % 5 == 3
    both = []
    for name in (backend, "torch"):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        out = pk.logprobs_from_hidden(
            *leaves, tokens, kept=kept, mask=mask, entropy=True, backend=name
        )
        total = out.logprobs.sum() + out.entropy.square().sum()
        both.append((*out, *torch.autograd.grad(total, leaves)))
    torch.testing.assert_close(*both)


# ---- autograd and graphs -------------------------------------------------------------------------


@EACH
def test_gradcheck(name):
    logits, tokens, kept = example(3, 13, 6, dtype=torch.float64)

    def f(x):
        return tuple(
            pk.logprobs_from_logits(
                x, tokens, kept=kept, entropy=True, temperature=0.7, softcap=4.0, logit_scale=0.9
            )
        )

    with executor(name):
        assert torch.autograd.gradcheck(f, logits.requires_grad_())


@KERNELS
def test_double_backward_raises(backend):
    logits, tokens, kept = example(3, 13, 6)
    hidden, weight, labels, sets = states()
    for leaf, out in (
        (
            logits,
            pk.logprobs_from_logits(logits.requires_grad_(), tokens, kept=kept, backend=backend),
        ),
        (
            hidden,
            pk.logprobs_from_hidden(
                hidden.requires_grad_(), weight, labels, kept=sets, backend=backend
            ),
        ),
    ):
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(out.sum(), leaf, create_graph=True)


@KERNELS
def test_opcheck(backend):
    ops = torch.ops.ppo_kernels
    logits, tokens, kept = example(4, 30, 6)
    logits.requires_grad_()
    given = (tokens, tokens > 9, torch.rand(4) + 0.5, *kept)
    numbers = (1.0, 0.0, 1.0, -100)
    opcheck(ops.kept_logprob_forward, (logits, *given, *numbers, True, backend))
    leaf = logits.detach()
    logprobs, entropy, state = ops.kept_logprob_forward(leaf, *given, *numbers, True, backend)
    upstream = torch.ones_like(logprobs), torch.ones_like(entropy)
    opcheck(
        ops.kept_logprob_backward, (*upstream, leaf, *given, logprobs, state, *numbers, backend)
    )

    hidden, weight, tokens, kept = states(4, 6, 30, 5)
    leaves = [t.requires_grad_() for t in (hidden, weight, torch.zeros(30))]
    given = (tokens, tokens > 9, None, *kept)
    numbers = (*numbers, 30, _head.TILE)
    opcheck(ops.hidden_kept_forward, (*leaves, *given, *numbers, True, backend))
    leaves = [t.detach() for t in leaves]
    logprobs, entropy, *saved = ops.hidden_kept_forward(*leaves, *given, *numbers, True, backend)
    opcheck(
        ops.hidden_kept_backward,
        (*upstream, *leaves, *given, logprobs, *saved, *numbers, [True, True, False], backend),
    )


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic):
    def f(logits, hidden, weight, tokens, kept):
        out = pk.logprobs_from_logits(logits, tokens, kept=kept, entropy=True, backend=backend)
        other = pk.logprobs_from_hidden(hidden, weight, tokens, kept=kept, backend=backend)
        return out.logprobs.sum() + out.entropy.square().sum() + other.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        hidden, weight, tokens, kept = states(rows)
        grads = []
        for g in (f, compiled):
            leaves = [t.clone().requires_grad_() for t in (hidden @ weight.t(), hidden, weight)]
            grads.append(torch.autograd.grad(g(*leaves, tokens, kept), leaves))
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


# ---- bad input -----------------------------------------------------------------------------------

LOGITS, TOKENS = torch.zeros(2, 11), torch.zeros(2, dtype=torch.long)
GOOD = KeptSet(torch.tensor([0, 3, 5]), torch.tensor([0, 4, 2, 7, 0]))
BAD = [
    ([1, 2], TypeError, "kept: expected a KeptSet, got list"),
    (KeptSet([0], GOOD.ids), TypeError, "kept.offsets: expected a tensor, got list"),
    (GOOD._replace(ids=GOOD.ids.float()), TypeError, "kept.ids: expected dtype int32, .* float32"),
    (GOOD._replace(offsets=GOOD.offsets[:2]), ValueError, r"kept.offsets: expected shape \[3\]"),
    (GOOD._replace(ids=GOOD.ids[None]), ValueError, r"kept.ids: .* got \[1, 5\]"),
    (GOOD._replace(ids=GOOD.ids.to("meta")), ValueError, "kept.ids: expected device .*, got meta"),
]
BAD_DATA = [
    ([0, 3, 6], [0, 4, 2, 7, 0], r"kept.offsets: .* in \[0, 5\], got 3 and 6 at flat position 1"),
    ([-1, 3, 5], [0, 4, 2, 7, 0], r"kept.offsets: .* got -1 and 3 at flat position 0"),
    ([0, 5, 4], [0, 4, 2, 7, 1], r"kept.offsets: .* got 5 and 4 at flat position 1"),
    ([0, 3, 5], [0, 4, 2, 11, 0], r"kept.ids: expected ids in \[0, 11\), got 11 at flat pos.* 1"),
    ([0, 3, 5], [0, 4, -1, 7, 0], r"kept.ids: expected ids in \[0, 11\), got -1 at flat pos.* 0"),
]
REPEATED = ([0, 3, 5], [0, 4, 2, 7, 7], "kept.ids: expected no id twice .*, got 7 at flat pos.* 1")


def call_both(backend, kept):
    yield lambda: pk.logprobs_from_logits(LOGITS, TOKENS, kept=kept, backend=backend)
    hidden, weight = torch.zeros(2, 4), torch.zeros(11, 4)
    yield lambda: pk.logprobs_from_hidden(hidden, weight, TOKENS, kept=kept, backend=backend)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize(("kept", "error", "message"), BAD, ids=[m[:30] for _, _, m in BAD])
def test_what_is_no_set_is_an_error(backend, kept, error, message):
    for call in call_both(backend, kept):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize(("offsets", "ids", "message"), BAD_DATA)
def test_bad_sets_are_errors(backend, offsets, ids, message):
    kept = KeptSet(torch.tensor(offsets), torch.tensor(ids))
    states = "cpu" if DEVICE == "cpu" else backend  # from these, it is torch that looks
    for name, call in zip((backend, states), call_both(backend, kept), strict=True):
        with raises(name, ValueError, message if name in ("torch", "cpu") else "kept: "):
            call()


@pytest.mark.parametrize("backend", [b for b in ["torch", *BACKENDS] if b in ("torch", "cpu")])
def test_a_repeated_id_is_an_error_on_a_cpu(backend):
    offsets, ids, message = REPEATED
    for call in call_both(backend, KeptSet(torch.tensor(offsets), torch.tensor(ids))):
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                call()
    logits, tokens, kept = example(2000, 130, 70)  # the same ids, in other rows
    pk.logprobs_from_logits(logits, tokens, kept=kept, backend=backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])
@pytest.mark.parametrize(("offsets", "ids", "message"), BAD_DATA)
def test_on_a_gpu_a_bad_set_gives_nan_and_is_raised_by_check(backend, offsets, ids, message):
    _faults._flags.clear()
    where = int(message[-1])
    got = results(
        LOGITS, TOKENS, KeptSet(torch.tensor(offsets), torch.tensor(ids)), backend=backend
    )
    for t in got:
        assert t[where].isnan().all()
        assert (t[1 - where].isfinite().all()) or "offsets" in message
    with pytest.raises(ValueError, match=f"kept: expected offsets .* flat position {where} in"):
        pk.check()
    pk.check()


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
def test_masked_positions_have_any_ids(backend):
    kept = GOOD._replace(ids=torch.tensor([99, -1, -1, 7, 0]))
    mask = torch.tensor([False, True])
    got = pk.logprobs_from_logits(LOGITS, TOKENS, kept=kept, mask=mask, backend=backend)
    assert got.tolist() == [0.0, pytest.approx(math.log(1 / 2))]
    weight = torch.zeros(11, 4)
    hidden = torch.zeros(2, 4)
    got = pk.logprobs_from_hidden(hidden, weight, TOKENS, kept=kept, mask=mask, backend=backend)
    assert got.tolist() == [0.0, pytest.approx(math.log(1 / 2))]
    pk.check()


@KERNELS
def test_not_in_place(backend):
    logits = LOGITS.clone().requires_grad_() * 1
    with pytest.raises(ValueError, match="inplace_backward: expected False with kept"):
        pk.logprobs_from_logits(logits, TOKENS, kept=GOOD, inplace_backward=True, backend=backend)


# ---- the sampler's settings ----------------------------------------------------------------------


def ids_of(kept):
    return [sorted(kept.ids[a:b].tolist()) for a, b in itertools.pairwise(kept.offsets)]


def test_settings_by_hand():
    """p = 1/2, 1/4, 1/8, 1/8: the token that crosses p is kept, the lower of equal ones."""
    logits = torch.tensor([[1.0, 4.0, 2.0, 1.0]]).log()
    for setting, expected in (
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 2, 3]),  # all that equal the third
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.0}, [1]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.6}, [1, 2]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # 2/3 of what top-k left
        ({"top_k": 2, "top_p": 0.7}, [1, 2]),
        ({"min_p": 0.4}, [1, 2]),
        ({"min_p": 0.0}, [0, 1, 2, 3]),
        ({"min_p": 1.0}, [1]),
    ):
        assert ids_of(pk.kept_set(logits, **setting)) == [expected], setting


@pytest.mark.parametrize(
    "setting",
    [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}],
)
def test_settings_mean_what_they_mean_to_transformers(setting):
    transformers = pytest.importorskip("transformers")
    warpers = {
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    logits = torch.randn(700, 90, generator=seeded(0), dtype=torch.float64) * 3
    left = logits
    for name, value in setting.items():
        left = warpers[name](value)(None, left)
    kept = pk.kept_set(logits.view(7, 100, 90), **setting)
    expected = [row.isfinite().nonzero()[:, 0].tolist() for row in left]
    assert ids_of(kept) == expected


def test_what_has_no_probability_is_in_no_set():
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, torch.nan, 1.0]])
    for setting in ({}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 1e-9}):
        assert ids_of(pk.kept_set(logits, **setting)) == [[0, 2], []]
    assert pk.kept_set(logits[:0]).offsets.tolist() == [0]


def test_the_sets_of_a_sampler_give_its_probabilities():
    logits = torch.randn(50, 200, generator=seeded(1)) * 3
    kept = pk.kept_set(logits, top_k=20, top_p=0.9)
    probabilities = torch.zeros(50, 200)
    for i, own in enumerate(ids_of(kept)):
        probabilities[i, own] = logits[i, own].softmax(0)
    tokens = probabilities.multinomial(1, generator=seeded(2))[:, 0]
    got = pk.logprobs_from_logits(logits, tokens, kept=kept)
    want = probabilities.gather(1, tokens[:, None])[:, 0].log()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits: expected a tensor"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits: .*V > 0, got \[2, 0\]"),
        ({"top_k": 0}, ValueError, "top_k: expected .* got 0"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an int, got float"),
        ({"top_p": 1.5}, ValueError, "top_p: expected .* got 1.5"),
        ({"min_p": -0.1}, ValueError, "min_p: expected .* got -0.1"),
    ],
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        pk.kept_set(**{"logits": LOGITS, **change})
