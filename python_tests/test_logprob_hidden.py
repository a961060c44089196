"""logprobs_from_hidden: memory, bits, rows that cost nothing, and heads of all kinds."""

import math

import pytest
import torch
from device import DEVICE, INTERPRETED, kernels, raises, seeded
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels import _head
from ppo_kernels.testing import executor, executors

EXECUTORS = executors("logprobs_from_hidden", "logprobs_from_logits", device=DEVICE)
KERNELS = pytest.mark.parametrize("backend", kernels("logprobs_from_hidden"))
TILE = _head.TILE


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


def example(rows=10, size=12, vocab=70, seed=0, dtype=torch.float32):
    g = seeded(seed)
    hidden = torch.randn(rows, size, generator=g).to(dtype)
    weight = (torch.randn(vocab, size, generator=g) / size**0.5).to(dtype)
    return hidden, weight, torch.randint(vocab, (rows,), generator=g)


def gradients(result, *leaves):
    total = sum((t * torch.arange(1, t.numel() + 1).view(t.shape)).sum() for t in result)
    return torch.autograd.grad(total, leaves)


def test_by_hand():
    """Two tokens with logits 0 and log 3: p = 1/4, 3/4."""
    hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    for name in EXECUTORS:
        with executor(name):
            logprobs = pk.logprobs_from_hidden(hidden, weight, torch.tensor([0]))
        assert logprobs.item() == pytest.approx(math.log(1 / 4), rel=1e-6)
        grad_hidden, grad_weight = torch.autograd.grad(logprobs, (hidden, weight))
        torch.testing.assert_close(grad_hidden, torch.tensor([[-0.75 * math.log(3), 0.0]]))
        torch.testing.assert_close(grad_weight, torch.tensor([[0.75, 1.5], [-0.75, -1.5]]))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_log_probability_of_the_logits(name, dtype):
    hidden, weight, tokens = example(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with executor(name):
        got = pk.logprobs_from_hidden(hidden, weight, tokens, temperature=0.7, entropy=True)
        logits = hidden.to(wide) @ weight.to(wide).t()
        want = pk.logprobs_from_logits(logits, tokens, temperature=0.7, entropy=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [e for e in EXECUTORS if e.startswith("cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, TILE - 1, TILE, 5 * TILE + 3])
def test_bits_do_not_depend_on_the_chunk(name, dtype, rows):
    hidden, weight, tokens = example(rows, 96, 517, dtype=dtype)
    mask = torch.rand(rows, generator=seeded(1)) < 0.8
    with executor(name):
        results = [
            pk.logprobs_from_hidden(hidden, weight, tokens, mask=mask, entropy=True, chunk=chunk)
            for chunk in (TILE, 2 * TILE, 7 * TILE, None)
        ]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@KERNELS
def test_masked_rows_are_not_multiplied(backend, monkeypatch):
    hidden, weight, tokens = example(5 * TILE)
    mask = torch.zeros(5 * TILE, dtype=torch.bool)
    mask[3::9] = True
    multiplied = []
    whole = _head.Head.logits

    def logits(self, part, memory):
        multiplied.append(part.hidden.shape[0])
        return whole(self, part, memory)

    monkeypatch.setattr(_head.Head, "logits", logits)
    hidden.requires_grad_()
    pk.logprobs_from_hidden(hidden, weight, tokens, mask=mask, backend=backend).sum().backward()
    assert multiplied == [TILE, TILE]  # forward and backward: of 1280 rows 143, in one tile


@KERNELS
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_a_frozen_factor_is_no_work(backend, needs, monkeypatch):
    called = []
    for name in ("grad_hidden", "add_grad_weight"):
        method = getattr(_head.Head, name)
        monkeypatch.setattr(
            _head.Head, name, lambda *a, f=method, n=name: called.append(n) or f(*a)
        )
    hidden, weight, tokens = example()
    leaves = [t.requires_grad_(need) for t, need in zip((hidden, weight), needs, strict=True)]
    pk.logprobs_from_hidden(*leaves, tokens, backend=backend).sum().backward()
    methods = zip(("grad_hidden", "add_grad_weight"), needs, strict=True)
    assert called == [method for method, need in methods if need]
    assert [t.grad is not None for t in leaves] == list(needs)


@KERNELS
def test_a_tied_embedding_gets_both_gradients(backend):
    _, weight, tokens = example(9, 8, 20)
    both = []
    for b in (backend, "torch"):
        table = torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False)
        logprobs = pk.logprobs_from_hidden(table(tokens).tanh(), table.weight, tokens, backend=b)
        logprobs.sum().backward()
        both.append(table.weight.grad)
    torch.testing.assert_close(*both)


@KERNELS
def test_a_head_with_an_adapter(backend):
    hidden, weight, tokens = example(dtype=torch.float64)
    a, b = (torch.randn(s, generator=seeded(1), dtype=torch.float64) for s in ((2, 12), (70, 2)))
    both = []
    for name in (backend, "torch"):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        adapted = weight + 0.5 * (leaves[1] @ leaves[0])
        out = pk.logprobs_from_hidden(hidden, adapted, tokens, entropy=True, backend=name)
        both.append(gradients(out, *leaves))
    torch.testing.assert_close(*both)


@KERNELS
def test_padding_of_the_vocabulary_does_nothing(backend):
    hidden, weight, tokens = example(vocab=64)
    weight[60:] = torch.nan
    tokens %= 60
    weight.requires_grad_()
    got = pk.logprobs_from_hidden(hidden, weight, tokens, vocab_size=60, backend=backend)
    want = pk.logprobs_from_hidden(hidden, weight[:60], tokens, backend=backend)
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got.sum(), weight)
    assert not grad[60:].any()
    assert grad[:60].any(1).all()


@pytest.mark.skipif(INTERPRETED, reason="no kernel sums chunks, all backends do it alike")
@KERNELS
def test_many_chunks_add_no_bias(backend):
    """Their sum is kept in fp32: what the last ones add is not lost, as it would be in bf16."""
    chunks = 8
    hidden, weight, tokens = example(chunks * TILE, 6, 10, dtype=torch.bfloat16)
    hidden = hidden.abs() + 1  # every chunk pulls the same way
    tokens[:] = 3
    weight.requires_grad_()
    logprobs = pk.logprobs_from_hidden(hidden, weight, tokens, chunk=TILE, backend=backend)
    (got,) = torch.autograd.grad(logprobs.sum(), weight)
    exact = weight.detach().double().requires_grad_()
    logprobs = pk.logprobs_from_hidden(hidden.double(), exact, tokens, backend="torch")
    (want,) = torch.autograd.grad(logprobs.sum(), exact)
    # Rounded once, to bf16: half a unit in the last place, where a sum in bf16 stalls.
    error = (got.double() - want).abs() / want.abs()
    assert error.max() <= 2**-8


@KERNELS
def test_autocast_chooses_the_dtype(backend):
    hidden, weight, tokens = example()
    narrow = [t.to(torch.bfloat16) for t in (hidden, weight)]
    want = pk.logprobs_from_hidden(*narrow, tokens, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(pk.logprobs_from_hidden(hidden, weight, tokens, backend=backend), want)
        mixed = pk.logprobs_from_hidden(narrow[0], weight, tokens, backend=backend)
        assert torch.equal(mixed, want)


@KERNELS
def test_autocast_does_not_narrow_backward(backend):
    hidden, weight, tokens = example()
    leaves = [t.requires_grad_() for t in (hidden, weight, torch.zeros(70))]
    total = pk.logprobs_from_hidden(*leaves[:2], tokens, bias=leaves[2], backend=backend).sum()
    want = torch.autograd.grad(total, leaves, retain_graph=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = torch.autograd.grad(total, leaves)
    assert all(map(torch.equal, got, want))


@KERNELS
def test_double_backward_raises(backend):
    hidden, weight, tokens = example()
    hidden.requires_grad_()
    logprobs = pk.logprobs_from_hidden(hidden, weight, tokens, backend=backend)
    with pytest.raises(RuntimeError, match=r"logprobs_from_hidden: .*double backward"):
        torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)


@KERNELS
def test_opcheck(backend):
    hidden, weight, tokens = example(4, 6, 9)
    bias = torch.zeros(9)
    ops = torch.ops.ppo_kernels
    mask = tokens > 2
    settings = (0.9, 0.0, 1.0, -100, 8, TILE)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    tokens = tokens % 8
    opcheck(ops.hidden_logprob_forward, (*leaves, tokens, mask, None, *settings, True, backend))
    detached = [t.detach() for t in leaves]
    logprobs, entropy, state = ops.hidden_logprob_forward(
        *detached, tokens, mask, None, *settings, True, backend
    )
    opcheck(
        ops.hidden_logprob_backward,
        (
            torch.ones_like(logprobs), torch.ones_like(entropy), *detached, tokens, mask, None,
            logprobs, state, *settings, [True, True, False], backend,
        ),
    )  # fmt: skip


@KERNELS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic):
    def f(hidden, weight, tokens, mask):
        out = pk.logprobs_from_hidden(
            hidden, weight, tokens, mask=mask, entropy=True, backend=backend
        )
        return out.logprobs.sum() + out.entropy.square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        hidden, weight, tokens = example(rows)
        grads = []
        for g in (f, compiled):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
            grads.append(torch.autograd.grad(g(*leaves, tokens, tokens > 20), leaves))
        torch.testing.assert_close(*grads, rtol=0, atol=0)


H, W, T = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
        ({"hidden": H.long()}, TypeError, "hidden: expected dtype float32, .* got int64"),
        ({"hidden": H[..., :0]}, ValueError, r"hidden: .*H > 0, got \[2, 3, 0\]"),
        ({"weight": W.bfloat16()}, TypeError, "weight: expected dtype float32, got bfloat16"),
        ({"weight": W[:, 1:]}, ValueError, r"weight: expected shape \[V, 4\].* got \[5, 3\]"),
        ({"weight": W[0]}, ValueError, r"weight: expected shape \[V, 4\].* got \[4\]"),
        ({"weight": W[:0]}, ValueError, r"weight: .* V > 0, got \[0, 4\]"),
        ({"tokens": T[0]}, ValueError, r"tokens: expected shape \[2, 3\] .* got \[3\]"),
        (
            {"tokens": T + 5},
            ValueError,
            r"tokens: expected ids in \[0, 5\) .* 5 at flat pos.* 0",
        ),
        ({"tokens": T + 4, "vocab_size": 4}, ValueError, r"tokens: expected ids in \[0, 4\) .*"),
        ({"bias": W[:, 0][1:]}, ValueError, r"bias: expected shape \[5\] .* got \[4\]"),
        ({"mask": T[0]}, ValueError, r"mask: expected shape \[2, 3\]"),
        ({"temperature": 0.0}, ValueError, "temperature: .* got 0.0"),
        ({"temperature": torch.zeros(3)}, ValueError, "temperature: .* got 0.0 at flat position 0"),
        ({"softcap": -1.0}, ValueError, "softcap: .* got -1"),
        ({"vocab_size": 6}, ValueError, "vocab_size: expected a number from 1 to 5, got 6"),
        ({"vocab_size": True}, TypeError, "vocab_size: expected an int, got bool"),
        ({"chunk": 100}, ValueError, "chunk: expected a multiple of 256 above 0, got 100"),
        ({"chunk": 0}, ValueError, "chunk: .* got 0"),
        ({"chunk": 256.0}, TypeError, "chunk: expected an int, got float"),
    ],
)
@pytest.mark.parametrize("name", EXECUTORS)
def test_bad_input_says_the_same_everywhere(name, change, error, message):
    arguments = {"hidden": H, "weight": W, "tokens": T} | change
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    with executor(name), raises(name, error, message):
        pk.logprobs_from_hidden(**arguments)
