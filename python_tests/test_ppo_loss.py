"""ppo_loss_from_logits and ppo_loss_from_hidden: the functions they are made of, in one."""

import loss_rows
import pytest
import torch
from device import DEVICE, INTERPRETED, kernels, raises, seeded
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels import _head
from ppo_kernels.native import ppo_loss
from ppo_kernels.testing import executor, executors

FUNCTIONS = ("ppo_loss_from_logits", "ppo_loss_from_hidden")
PARTS = ("logprobs_from_logits", "clipped_loss", "kl_penalty", "masked_sum")
EXECUTORS = executors(*FUNCTIONS, *PARTS, device=DEVICE)
KERNELS = pytest.mark.parametrize("backend", kernels(*FUNCTIONS, *PARTS))
SOURCES = pytest.mark.parametrize("source", ["logits", "hidden"])
TILE = _head.TILE
TERMS = {"entropy_coef": 0.05, "kl_coef": 0.3, "kl_estimator": "k3", "kl_gradient": "k2"}


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


class Example:
    """Hidden states and a head, their logits, and what else a loss needs."""

    def __init__(self, rows=3, cols=20, vocab=41, size=10, dtype=torch.float32):
        g = seeded(0)
        self.hidden = torch.randn(rows, cols, size, generator=g).to(dtype)
        self.weight = (torch.randn(vocab, size, generator=g) / size**0.5).to(dtype)
        self.logits = (self.hidden.float() @ self.weight.float().t()).to(dtype)
        self.tokens = torch.randint(vocab, (rows, cols), generator=g)
        now = pk.logprobs_from_logits(self.logits, self.tokens)
        self.old = now + 0.3 * torch.randn(rows, cols, generator=g)
        self.ref = now + 0.3 * torch.randn(rows, cols, generator=g)
        self.advantages = torch.randn(rows, cols, generator=g)
        self.mask = torch.rand(rows, cols, generator=g) < 0.7

    def leaves(self, source):
        tensors = (self.logits,) if source == "logits" else (self.hidden, self.weight)
        return [t.clone().requires_grad_() for t in tensors]

    def loss(self, source, leaves, **settings):
        function = getattr(pk, f"ppo_loss_from_{source}")
        settings = {"mask": self.mask, **settings}
        if settings.get("kl_coef"):
            settings["ref_logprobs"] = self.ref
        return function(*leaves, self.tokens, self.old, self.advantages, **settings)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@SOURCES
def test_it_is_what_its_parts_give(name, source, aggregation):
    e = Example()
    leaves, logits = e.leaves(source), e.logits.clone().requires_grad_()
    with executor(name):
        got = e.loss(source, leaves, aggregation=aggregation, temperature=0.8, **TERMS)
        logprobs, entropies = pk.logprobs_from_logits(
            logits, e.tokens, mask=e.mask, temperature=0.8, entropy=True
        )
        want, metrics = pk.clipped_loss(
            logprobs, e.old, e.advantages, e.mask, aggregation=aggregation
        )
        kl = pk.kl_penalty(logprobs, e.ref, e.mask, estimator="k3", gradient="k2")

        def mean(x):
            if aggregation == "token-mean":
                return pk.masked_mean(x, e.mask)
            return pk.masked_mean(x, e.mask, dim=1).mean()

        total = want + 0.3 * mean(kl) - 0.05 * mean(entropies)
    close = {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(got.loss, total, **close)
    torch.testing.assert_close(got.policy_loss, want.detach(), **close)
    torch.testing.assert_close(got.entropy, mean(entropies).detach(), **close)
    torch.testing.assert_close(got.kl, mean(kl).detach(), **close)
    torch.testing.assert_close(got.logprobs, logprobs.detach(), **close)
    torch.testing.assert_close(got.entropies, entropies.detach(), **close)
    torch.testing.assert_close(got.metrics.stats, metrics.stats, **close)
    grads = torch.autograd.grad(got.loss, leaves)
    (grad_logits,) = torch.autograd.grad(total, logits)
    wanted = [grad_logits]
    if source == "hidden":
        wanted = [
            grad_logits @ e.weight,
            torch.einsum("btv,bth->vh", grad_logits, e.hidden),
        ]
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=2e-6)


@KERNELS
@pytest.mark.parametrize(
    "settings", [{}, {"variant": "sapo", "tau_pos": 2.0, "tau_neg": 0.5}, {"variant": "gspo"}]
)
def test_from_logits_has_the_bits_of_its_parts(backend, settings):
    e = Example()
    (leaf,) = e.leaves("logits")
    settings = {"backend": backend, **settings}
    got = e.loss("logits", [leaf], **settings)
    logprobs = pk.logprobs_from_logits(leaf, e.tokens, mask=e.mask, backend=backend)
    want, metrics = pk.clipped_loss(logprobs, e.old, e.advantages, e.mask, **settings)
    assert torch.equal(got.loss, want)
    assert torch.equal(got.metrics.stats, metrics.stats)
    assert torch.equal(got.logprobs, logprobs)
    grads = [torch.autograd.grad(loss, leaf)[0] for loss in (got.loss, want)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum"])
@SOURCES
def test_micro_batches_add_up(name, source, aggregation):
    e = Example(rows=4)
    settings = {"aggregation": aggregation, **TERMS}
    count = e.mask.sum() if aggregation == "token-mean" else 4
    with executor(name):
        leaves = e.leaves(source)
        whole = e.loss(source, leaves, **settings)
        want = torch.autograd.grad(whole.loss, leaves)
        for leaf in leaves:
            leaf.grad = None
        total = 0
        for rows in (slice(0, 1), slice(1, 4)):
            cut = [t if t.dim() == 2 else t[rows] for t in leaves]
            part = getattr(pk, f"ppo_loss_from_{source}")(
                *cut, e.tokens[rows], e.old[rows], e.advantages[rows], e.mask[rows],
                ref_logprobs=e.ref[rows], denominator=count, **settings,
            )  # fmt: skip
            part.loss.backward()
            total = total + part.loss.detach()
    torch.testing.assert_close(total, whole.loss.detach(), rtol=1e-5, atol=1e-6)
    for leaf, w in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", EXECUTORS)
@SOURCES
def test_what_is_masked_changes_nothing(name, source):
    e = Example()
    results = []
    for garbage in (None, torch.nan, torch.inf):
        leaves = e.leaves(source)
        constants = [e.old.clone(), e.advantages.clone(), e.ref.clone()]
        tokens = e.tokens.clone()
        if garbage is not None:
            for t in (leaves[0].data, *constants):
                t[~e.mask] = garbage
            tokens[~e.mask] = -7
        with executor(name):
            out = getattr(pk, f"ppo_loss_from_{source}")(
                *leaves, tokens, *constants[:2], e.mask, ref_logprobs=constants[2], **TERMS
            )
            grads = torch.autograd.grad(out.loss, leaves)
        assert not grads[0][~e.mask].any()
        results.append((out.loss.detach(), out.metrics.stats, out.logprobs, *grads))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("name", EXECUTORS)
@SOURCES
def test_nothing_live_gives_a_connected_zero(name, source):
    e = Example()
    leaves = e.leaves(source)
    with executor(name):
        out = e.loss(source, leaves, mask=torch.zeros_like(e.mask), **TERMS)
        grads = torch.autograd.grad(out.loss, leaves)
    assert out.loss == out.entropy == out.kl == 0
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("name", EXECUTORS)
@SOURCES
def test_ignored_labels_are_masked(name, source):
    e = Example()
    leaves = e.leaves(source)
    with executor(name):
        want = e.loss(source, leaves, entropy=True)
        e.tokens = torch.where(e.mask, e.tokens, -100)
        got = e.loss(source, leaves, mask=None, entropy=True)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.entropy, want.entropy)
    assert torch.equal(got.metrics.stats, want.metrics.stats)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SOURCES
def test_the_upstream_gradient_is_one_more_rounding(backend, source, dtype):
    e = Example(dtype=dtype)
    leaves = e.leaves(source)
    grads = [
        torch.autograd.grad(e.loss(source, leaves, backend=backend, **TERMS).loss * factor, leaves)
        for factor in (1, 0.3)
    ]
    for one, scaled in zip(*grads, strict=True):
        assert torch.equal(scaled, (one.float() * torch.tensor(0.3)).to(dtype))


@KERNELS
@SOURCES
def test_loss_scale_comes_before_the_rounding(backend, source):
    """Gradients that half precision has no numbers for, unless they are scaled first."""
    e = Example(dtype=torch.float16)
    leaves = e.leaves(source)
    tiny = {"denominator": 1e9, "clip_low": 1.0, "clip_high": 1e6, "backend": backend}
    (lost, *_) = torch.autograd.grad(e.loss(source, leaves, **tiny).loss, leaves)
    out = e.loss(source, leaves, loss_scale=torch.tensor(2.0**20), **tiny)
    (kept, *_) = torch.autograd.grad(out.loss, leaves)
    assert not lost.any()
    assert kept[e.mask].any(-1).all()
    torch.testing.assert_close(out.loss, out.policy_loss * 2**20)


@KERNELS
@SOURCES
def test_a_second_backward_gives_the_same_or_raises(backend, source):
    e = Example()
    leaves = e.leaves(source)
    loss = e.loss(source, leaves, backend=backend).loss
    half = loss * 0.5
    torch.autograd.grad(half, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(half, leaves)


@KERNELS
@SOURCES
def test_double_backward_raises(backend, source):
    e = Example()
    leaves = e.leaves(source)
    loss = e.loss(source, leaves, backend=backend).loss
    with pytest.raises(RuntimeError, match=rf"ppo_loss_from_{source}: .*double backward"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@KERNELS
@SOURCES
def test_gradcheck(backend, source):
    e = Example(rows=2, cols=3, vocab=7, size=4, dtype=torch.float64)
    e.old, e.ref, e.advantages = (t.double() for t in (e.old, e.ref, e.advantages))
    settings = {"clip_low": 1.0, "clip_high": 1e6, "backend": backend, **TERMS}
    settings["kl_gradient"] = "k3"
    torch.autograd.gradcheck(
        lambda *leaves: e.loss(source, leaves, **settings).loss,
        e.leaves(source),
        fast_mode=INTERPRETED,
    )


@pytest.mark.parametrize("name", EXECUTORS)
def test_only_the_loss_is_differentiable(name):
    e = Example()
    with executor(name):
        out = e.loss("logits", e.leaves("logits"), **TERMS)
    assert out.loss.requires_grad
    rest = (out.metrics.stats, out.logprobs, out.entropies, out.policy_loss, out.entropy, out.kl)
    assert not any(t.requires_grad for t in rest)
    with executor(name):
        out = e.loss("logits", [e.logits])
    assert not out.loss.requires_grad
    assert out.entropy is None
    assert out.entropies is None
    assert out.kl is None


# ---- in place ------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("factor", [1, 0.3])
def test_in_place_the_logits_become_their_gradient(backend, shifted, factor):
    e = Example()
    grads = []
    for inplace in (False, True):
        (leaf,) = e.leaves("logits")
        wide = torch.cat([leaf, leaf[:, :1]], 1)
        logits = wide[:, :-1] if shifted else leaf * 1
        loss = e.loss("logits", [logits], inplace=inplace, backend=backend, **TERMS).loss
        (loss * factor).backward()
        grads.append(leaf.grad)
        if inplace and not shifted:
            assert torch.equal(logits.detach(), leaf.grad)
    assert torch.equal(*grads)


@KERNELS
def test_in_place_another_consumer_raises(backend):
    e = Example()
    (leaf,) = e.leaves("logits")
    logits = leaf * 1
    other = logits.square().sum()
    loss = e.loss("logits", [logits], inplace=True, backend=backend).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@KERNELS
def test_in_place_a_leaf_is_refused(backend):
    e = Example()
    before = e.leaves("logits")
    with pytest.raises(ValueError, match="inplace: expected logits computed from parameters"):
        e.loss("logits", before, inplace=True, backend=backend)
    assert torch.equal(before[0], e.logits)
    e.loss("logits", [e.logits], inplace=True, backend=backend)  # nothing is differentiated
    assert torch.equal(before[0], e.logits)


@KERNELS
def test_in_place_a_bad_label_leaves_the_logits(backend):
    e = Example()
    (leaf,) = e.leaves("logits")
    logits = leaf * 1
    e.mask[-1, -1] = True
    e.tokens[-1, -1] = 10**6
    with raises(backend, ValueError, "tokens: expected ids .* 1000000 at flat position 59"):
        e.loss("logits", [logits], inplace=True, backend=backend)
    if backend == "cpu":
        assert torch.equal(logits.detach(), e.logits)


@KERNELS
def test_in_place_is_declared_when_compiled(backend):
    e = Example()
    (leaf,) = e.leaves("logits")

    def f(leaf):
        return e.loss("logits", [leaf * 1], inplace=True, backend=backend).loss

    (want,) = torch.autograd.grad(f(leaf), leaf)
    with pytest.warns(UserWarning, match="inplace=True has no effect under torch.compile"):
        loss = torch.compile(f, backend="aot_eager")(leaf)
    (got,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(got, want)


# ---- rows that stay in the cache -----------------------------------------------------------------

on_cpu = pytest.mark.skipif(
    "cpu" not in kernels(*FUNCTIONS, *PARTS), reason="needs the C++ kernels"
)


def assert_bits_of_two_passes(monkeypatch, example, **settings):
    monkeypatch.setattr(ppo_loss, "IN_CACHE", -1)
    got = loss_rows.outcome("cpu", *example, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(ppo_loss, "_rows_at_once", lambda *args: None)
        want = loss_rows.outcome("cpu", *example, **settings)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [e for e in EXECUTORS if e.startswith("cpu")])
@pytest.mark.parametrize("settings", loss_rows.SETTINGS, ids=str)
def test_one_pass_gives_the_bits_of_two(monkeypatch, settings, name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        with executor(name):
            assert_bits_of_two_passes(monkeypatch, loss_rows.inputs(dtype=dtype), **settings)


@on_cpu
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("rows", "cols", "vocab"),
    [(1, 1, 300), (9, 1, 300), (2, 50, 30_000), (3, 3, 300_000), (0, 4, 10)],
)
def test_however_rows_are_cut_and_shared_out(monkeypatch, rows, cols, vocab, threads):
    """Blocks have 8 rows of 30000, or one longer than a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for inplace in (False, True):
            example = loss_rows.inputs(max(rows, 1), cols, vocab)
            assert_bits_of_two_passes(
                monkeypatch, [t[:rows] for t in example], inplace=inplace, entropy_coef=0.1
            )
    finally:
        torch.set_num_threads(before)


@on_cpu
@pytest.mark.parametrize("cut", [lambda t: t[:, 1::2], lambda t: t.transpose(0, 1)])
def test_rows_of_a_view(monkeypatch, cut):
    logits, *tokens, advantages, mask = loss_rows.inputs(4, 6)
    tokens = [cut(t) for t in (*tokens, mask)]
    advantages = advantages[:, None].expand(mask.shape)
    example = (cut(logits), *tokens[:-1], cut(advantages), tokens[-1])
    assert_bits_of_two_passes(monkeypatch, example, **loss_rows.EVERYTHING)


@on_cpu
def test_a_loss_of_tokens_reads_its_rows_once(monkeypatch):
    called, make = [], ppo_loss._rows_at_once

    def spy(*args):
        called.append(make(*args))
        return called[-1]

    monkeypatch.setattr(ppo_loss, "_rows_at_once", spy)
    loss_rows.outcome("cpu", *loss_rows.inputs(vocab=30_000))
    assert len(called) == 1
    assert called[0] is not None
    loss_rows.outcome("cpu", *loss_rows.inputs(vocab=30_000), variant="gspo")
    assert len(called) == 1
    loss_rows.outcome("cpu", *loss_rows.inputs())  # in the cache anyway
    assert called[1:] == [None]


# ---- hidden states -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [e for e in EXECUTORS if e.startswith("cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_does_not_depend_on_the_chunk(name, dtype):
    e = Example(rows=5, cols=TILE, dtype=dtype)
    with executor(name):
        results = []
        for chunk in (TILE, 3 * TILE, None):
            leaves = e.leaves("hidden")
            out = e.loss("hidden", leaves, chunk=chunk, **TERMS)
            grad_hidden, grad_weight = torch.autograd.grad(out.loss, leaves)
            results.append((out.loss, out.logprobs, out.entropy, out.kl, grad_hidden, grad_weight))
    for other in results[1:]:
        assert all(map(torch.equal, results[0][:4], other[:4]))
        # Products with other numbers of rows may be blocked otherwise.
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(results[0][4:], other[4:], rtol=tolerance, atol=1e-6)


@KERNELS
def test_the_logits_are_made_once(backend, monkeypatch):
    e = Example(rows=5, cols=TILE)
    made = []
    whole = _head.Head.logits

    def logits(self, part, memory):
        made.append(part.hidden.shape[0])
        return whole(self, part, memory)

    monkeypatch.setattr(_head.Head, "logits", logits)
    leaves = e.leaves("hidden")
    e.loss("hidden", leaves, chunk=TILE, backend=backend).loss.backward()
    assert made == [TILE] * -(-int(e.mask.sum()) // TILE)


@KERNELS
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_a_frozen_factor_is_no_work(backend, needs, monkeypatch):
    called = []
    for name in ("grad_hidden", "add_grad_weight"):
        method = getattr(_head.Head, name)
        monkeypatch.setattr(
            _head.Head, name, lambda *a, f=method, n=name: called.append(n) or f(*a)
        )
    e = Example()
    leaves = [t.requires_grad_(n) for t, n in zip((e.hidden, e.weight), needs, strict=True)]
    loss = e.loss("hidden", leaves, backend=backend).loss
    if any(needs):
        loss.backward()
    methods = zip(("grad_hidden", "add_grad_weight"), needs, strict=True)
    assert called == [method for method, need in methods if need]
    assert [t.grad is not None for t in leaves] == list(needs)


@KERNELS
def test_bias_padding_and_transforms(backend):
    e = Example(vocab=48)
    bias = torch.randn(48, generator=seeded(3))
    e.tokens %= 40
    settings = {
        "vocab_size": 40, "softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3, **TERMS,
    }  # fmt: skip
    both = []
    for name in (backend, "torch"):
        leaves = [*e.leaves("hidden"), bias.clone().requires_grad_()]
        out = e.loss("hidden", leaves[:2], bias=leaves[2], backend=name, **settings)
        both.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-6)
    assert not both[0][2][40:].any()
    assert not both[0][3][40:].any()


@KERNELS
def test_autocast_chooses_the_dtype(backend):
    e = Example()
    narrow = [t.to(torch.bfloat16) for t in (e.hidden, e.weight)]
    want = e.loss("hidden", narrow, backend=backend).loss
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = e.loss("hidden", [e.hidden, e.weight], backend=backend).loss
    assert torch.equal(got, want)


# ---- torch ---------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("dynamic", [False, True])
@SOURCES
def test_compiles_without_a_graph_break(backend, source, dynamic):
    def f(e, leaves):
        out = e.loss(source, leaves, backend=backend, **TERMS)
        return out.loss * 0.7, out.entropy, out.metrics.clip_fraction

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for cols in (6, 9) if dynamic else (6,):
        e = Example(cols=cols)
        results = []
        for g in (f, compiled):
            leaves = e.leaves(source)
            out = g(e, leaves)
            results.append([*out, *torch.autograd.grad(out[0], leaves)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@KERNELS
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend, grad):
    e = Example(rows=2, cols=3, vocab=7, size=4)
    ops = torch.ops.ppo_kernels
    objective = (
        e.old, e.advantages, e.ref, None, True, 0.1, 0.2, "k3", "k2", 0.8, 1.2, None, None, 0,
        e.mask, None, 0, None, None, None,
    )  # fmt: skip
    logits, hidden, weight = (
        t.clone().requires_grad_(grad) for t in (e.logits, e.hidden, e.weight)
    )
    rows = (e.tokens, None, 0.9, 0.0, 1.0)
    objective_ = (*objective, grad, backend)
    opcheck(ops.ppo_loss_from_logits, (logits, *rows, False, *objective_))
    opcheck(
        ops.ppo_loss_from_hidden,
        (hidden, weight, None, *rows, 7, None, [grad, grad, False], *objective_),
    )


BASE = Example(rows=2, cols=3, vocab=5, size=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": BASE.tokens + 5}, ValueError, r"tokens: expected ids in \[0, 5\)"),
        ({"tokens": BASE.tokens[0]}, ValueError, r"tokens: expected shape \[2, 3\]"),
        ({"old_logprobs": BASE.old[0]}, ValueError, r"old_logprobs: expected shape \[2, 3\]"),
        ({"advantages": BASE.old[:, 0:2]}, ValueError, r"advantages: expected shape \[2, 3\]"),
        ({"mask": BASE.mask[0]}, ValueError, r"mask: expected shape \[2, 3\]"),
        ({"ref_logprobs": BASE.ref[0]}, ValueError, r"ref_logprobs: expected shape \[2, 3\]"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs: expected a tensor, as kl_coef 0.1 needs"),
        ({"kl_coef": -0.1}, ValueError, "kl_coef: .* got -0.1"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator: unknown kl_estimator 'k4'"),
        ({"kl_gradient": "none"}, ValueError, "kl_gradient: unknown kl_gradient 'none'"),
        ({"entropy_coef": -1.0}, ValueError, "entropy_coef: .* got -1"),
        ({"loss_scale": 2.0}, TypeError, "loss_scale: expected a tensor, got float"),
        ({"loss_scale": BASE.old[0]}, ValueError, r"loss_scale: expected shape \[\] \(one number"),
        ({"variant": "clap"}, ValueError, "variant: unknown variant 'clap'"),
        ({"aggregation": "mean"}, ValueError, "aggregation: unknown aggregation 'mean'"),
        ({"temperature": 0.0}, ValueError, "temperature: .* got 0.0"),
        ({"softcap": 0.0}, ValueError, "softcap: .* got 0.0"),
    ],
)
@pytest.mark.parametrize("name", EXECUTORS)
@SOURCES
def test_bad_input_says_the_same_everywhere(name, source, change, error, message):
    first = {"logits": BASE.logits} if source == "logits" else {
        "hidden": BASE.hidden, "weight": BASE.weight,
    }  # fmt: skip
    constants = {
        "tokens": BASE.tokens, "old_logprobs": BASE.old, "advantages": BASE.advantages,
    }  # fmt: skip
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v
        for k, v in (first | constants | change).items()
    }
    with executor(name), raises(name, error, message):
        getattr(pk, f"ppo_loss_from_{source}")(**arguments)


@pytest.mark.parametrize("field", ["old_logprobs", "advantages", "ref_logprobs", "loss_scale"])
def test_constants_that_require_grad_are_refused(field):
    e = Example()
    given = {"old_logprobs": e.old, "advantages": e.advantages, "ref_logprobs": e.ref}
    given["loss_scale"] = torch.tensor(1.0)
    given[field] = given[field].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"{field}: is a constant of the objective"):
        pk.ppo_loss_from_logits(e.logits, e.tokens, **given)
