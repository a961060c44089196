"""categorical_kl_from_hidden: memory, bits, rows that cost nothing, and pairs of heads."""

import math
import os
import subprocess
import sys

import pytest
import torch
from device import DEVICE, INTERPRETED, kernels, raises, seeded
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels import _head
from ppo_kernels.bench import memory
from ppo_kernels.testing import executor, executors, ulp

EXECUTORS = executors("categorical_kl_from_hidden", "categorical_kl", device=DEVICE)
ON_CPU = [e for e in EXECUTORS if e.startswith("cpu")]
KERNELS = pytest.mark.parametrize("backend", kernels("categorical_kl_from_hidden"))
BOTH = pytest.mark.parametrize("reverse", [False, True])
TILE = _head.TILE


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


def example(rows=10, size=12, ref_size=7, vocab=70, seed=0, dtype=torch.float32):
    """hidden, weight, ref_hidden, ref_weight."""
    g = seeded(seed)
    heads = []
    for width in (size, ref_size):
        heads.append(torch.randn(rows, width, generator=g).to(dtype))
        heads.append((torch.randn(vocab, width, generator=g) * 2 / width**0.5).to(dtype))
    return heads


def gradients(kl, *leaves):
    upstream = torch.arange(1, kl.numel() + 1).view(kl.shape).to(kl) / kl.numel()
    return torch.autograd.grad(kl, leaves, upstream)


@pytest.mark.parametrize("name", EXECUTORS)
def test_by_hand(name):
    """Two tokens: p = 3/4, 1/4 and q = 1/2, 1/2."""
    hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], requires_grad=True)
    ref = torch.tensor([[5.0]]), torch.tensor([[2.0], [2.0]])
    slope = 0.75 * 0.25 * math.log(3)  # dKL/dx = p (log p/q - KL)
    with executor(name):
        kl = pk.categorical_kl_from_hidden(hidden, weight, *ref)
        back = pk.categorical_kl_from_hidden(hidden, weight, *ref, reverse=True)
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert back.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)
    for result, step in ((kl, slope), (back, 0.25)):
        of_hidden, of_weight = torch.autograd.grad(result, (hidden, weight))
        torch.testing.assert_close(of_hidden, torch.tensor([[step * math.log(3), 0.0]]))
        torch.testing.assert_close(of_weight, step * torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))


@pytest.mark.parametrize("name", EXECUTORS)
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_divergence_of_the_logits(name, reverse, dtype):
    heads = example(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with executor(name):
        got = pk.categorical_kl_from_hidden(*heads, reverse=reverse, temperature=0.7)
        logits = [h.to(wide) @ w.to(wide).t() for h, w in (heads[:2], heads[2:])]
        want = pk.categorical_kl(*logits, reverse=reverse, temperature=0.7)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXECUTORS)
def test_dtypes_of_the_two_models_may_differ(name):
    policy, ref = example(dtype=torch.bfloat16)[:2], example(dtype=torch.float64)[2:]
    policy[0].requires_grad_()
    with executor(name):
        kl = pk.categorical_kl_from_hidden(*policy, *ref)
        same = pk.categorical_kl_from_hidden(*policy, *(t.float() for t in ref))
    assert kl.dtype == torch.float64
    assert same.dtype == torch.float32
    torch.testing.assert_close(kl.float(), same, rtol=1e-5, atol=1e-6)
    (grad,), (want,) = (gradients(t, policy[0]) for t in (kl, same))
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("name", ON_CPU)
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_diverge_from_itself(name, reverse, dtype):
    hidden, weight, _, _ = example(TILE + 3, 96, vocab=517, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    with executor(name):
        kl = pk.categorical_kl_from_hidden(*leaves, hidden, leaves[1].detach(), reverse=reverse)
    assert not kl.any()
    assert not any(grad.any() for grad in gradients(kl, *leaves))


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, TILE - 1, TILE, 5 * TILE + 3])
def test_bits_do_not_depend_on_the_chunk(name, dtype, rows):
    heads = example(rows, 96, 40, 517, dtype=dtype)
    heads[0].requires_grad_()
    mask = torch.rand(rows, generator=seeded(1)) < 0.8
    results = []
    for chunk in (TILE, 2 * TILE, 7 * TILE, None):
        with executor(name):
            kl = pk.categorical_kl_from_hidden(*heads, mask, chunk=chunk)
        results.append((kl.detach(), *gradients(kl, heads[0])))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        torch.testing.assert_close(results[0][1], other[1])


@KERNELS
def test_masked_rows_are_not_multiplied(backend, monkeypatch):
    heads = example(5 * TILE)
    mask = torch.zeros(5 * TILE, dtype=torch.bool)
    mask[3::9] = True
    multiplied = []
    whole = _head.Head.logits

    def logits(self, part, memory):
        multiplied.append(part.hidden.shape)
        return whole(self, part, memory)

    monkeypatch.setattr(_head.Head, "logits", logits)
    heads[0].requires_grad_()
    pk.categorical_kl_from_hidden(*heads, mask, backend=backend).sum().backward()
    # Of 1280 rows 143, in one tile: forward and backward, of policy and reference.
    assert multiplied == [(TILE, 12), (TILE, 7)] * 2


@KERNELS
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_a_frozen_factor_is_no_work(backend, needs, monkeypatch):
    called = []
    for name in ("grad_hidden", "add_grad_weight"):
        method = getattr(_head.Head, name)
        monkeypatch.setattr(
            _head.Head, name, lambda *a, f=method, n=name: called.append(n) or f(*a)
        )
    heads = example()
    leaves = [t.requires_grad_(need) for t, need in zip(heads[:2], needs, strict=True)]
    pk.categorical_kl_from_hidden(*heads, backend=backend).sum().backward()
    methods = zip(("grad_hidden", "add_grad_weight"), needs, strict=True)
    assert called == [method for method, need in methods if need]
    assert [t.grad is not None for t in leaves] == list(needs)


@KERNELS
def test_a_bias_alone_may_train(backend):
    heads = example(dtype=torch.float64)
    bias = torch.linspace(-1, 1, 70, dtype=torch.float64)
    grads = []
    for name in (backend, "torch"):
        leaf = bias.clone().requires_grad_()
        kl = pk.categorical_kl_from_hidden(*heads, bias=leaf, backend=name)
        grads.append(gradients(kl, leaf))
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(not memory.RESET.exists(), reason="no /proc/self/clear_refs")
@pytest.mark.skipif(not ON_CPU, reason="measured on a CPU")
@pytest.mark.skipif(
    "PPO_KERNELS_SANITIZED" in os.environ, reason="AddressSanitizer holds back freed memory"
)
@pytest.mark.parametrize(
    ("more", "tiles"), [("", 2), (", softcap=9.0", 3)], ids=["plain", "softcap"]
)
def test_peak_memory_is_two_tiles(more, tiles):
    """And with a softcap a third one; the logits of each model would be eight."""
    code = f"""
import torch, ppo_kernels as pk
from ppo_kernels.bench.memory import peak_on_cpu
rows, vocab = 2048, 16384
heads = [t for _ in range(2) for t in (torch.randn(rows, 8), torch.randn(vocab, 8))]
heads[0].requires_grad_(), heads[1].requires_grad_()
def call():
    kl = pk.categorical_kl_from_hidden(*heads, chunk=256{more})
    return torch.autograd.grad(kl.sum(), heads[:2])
print(peak_on_cpu(call))
"""
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory is given back
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=at_once
    )
    tile = 256 * 16384 * 4
    assert tiles * tile < int(out.stdout) < (tiles + 0.5) * tile


@KERNELS
def test_a_weight_may_be_that_of_both_and_of_the_embedding(backend):
    weight = example(vocab=20, dtype=torch.float64)[1]
    tokens = torch.arange(9)
    both = []
    for name in (backend, "torch"):
        table = torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False)
        states = table(tokens).tanh()
        kl = pk.categorical_kl_from_hidden(
            states, table.weight, states.detach() * 0.8, table.weight.detach(), backend=name
        )
        kl.sum().backward()
        both.append(table.weight.grad)
    torch.testing.assert_close(*both)


@KERNELS
def test_padding_of_the_vocabularies_does_nothing(backend, monkeypatch):
    """Each model may have its own."""
    widths, whole = set(), _head.Head.logits

    def logits(self, part, memory):
        made = whole(self, part, memory)
        widths.add(made.shape[1])
        return made

    monkeypatch.setattr(_head.Head, "logits", logits)
    heads = example(vocab=64)
    heads[3] = torch.cat([heads[3], heads[3][:5]])
    for weight in (heads[1], heads[3]):
        weight[60:] = torch.nan
    heads[1].requires_grad_()
    got = pk.categorical_kl_from_hidden(*heads, vocab_size=60, backend=backend)
    cut = [t[:60] if i % 2 else t for i, t in enumerate(heads)]
    assert torch.equal(got, pk.categorical_kl_from_hidden(*cut, backend=backend))
    (grad,) = torch.autograd.grad(got.sum(), heads[1])
    assert not grad[60:].any()
    assert grad[:60].any(1).all()
    assert widths == {60}


@pytest.mark.skipif(INTERPRETED, reason="no kernel sums chunks, all backends do it alike")
@KERNELS
def test_many_chunks_add_no_bias(backend):
    """Their sum is kept in fp32 and rounded once: at random, and by half a unit at the most."""
    heads = example(12 * TILE, 16, 16, 40, dtype=torch.bfloat16)
    heads[0].abs_().add_(1)  # every chunk pulls the same way
    heads[1].requires_grad_()
    kl = pk.categorical_kl_from_hidden(*heads, chunk=TILE, backend=backend)
    (got,) = gradients(kl, heads[1])
    exact = [t.detach().double() for t in heads]
    exact[1].requires_grad_()
    (want,) = gradients(pk.categorical_kl_from_hidden(*exact, backend="torch"), exact[1])
    error = (got.double() - want) / ulp(want, torch.bfloat16)
    assert error.mean().abs() < 0.05
    assert error.abs().max() < 0.51


@KERNELS
def test_a_saturated_softcap_has_a_slope(backend):
    """4e-7 there: 1 - tanh^2 would have an error of a sixth."""
    hidden = torch.ones(1, 1)
    weight = torch.tensor([[-65.0], [60.0], [62.5], [64.0]])
    ref_hidden, ref_weight = torch.ones(1, 1), torch.tensor([[1.0], [-3.0], [2.0], [9.0]])
    grads = []
    for name, dtype in ((backend, torch.float32), ("torch", torch.float64)):
        bias = torch.zeros(4, dtype=dtype, requires_grad=True)
        heads = (t.to(dtype) for t in (hidden, weight, ref_hidden, ref_weight))
        kl = pk.categorical_kl_from_hidden(*heads, bias=bias, softcap=8.0, backend=name)
        grads.append(gradients(kl, bias)[0].double())
    torch.testing.assert_close(*grads, rtol=1e-5, atol=0)


@KERNELS
def test_autocast_chooses_the_dtype(backend):
    heads = example()
    leaves = [t.requires_grad_() for t in heads[:2]]
    narrow = [t.detach().to(torch.bfloat16) for t in heads]
    want = pk.categorical_kl_from_hidden(*narrow, backend=backend)
    plain = gradients(pk.categorical_kl_from_hidden(*heads, backend=backend), *leaves)
    kl = pk.categorical_kl_from_hidden(*heads, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(pk.categorical_kl_from_hidden(*heads, backend=backend), want)
        mixed = pk.categorical_kl_from_hidden(*narrow[:2], *heads[2:], backend=backend)
        assert torch.equal(mixed, want)
        assert all(map(torch.equal, gradients(kl, *leaves), plain))


@KERNELS
def test_double_backward_raises(backend):
    heads = example()
    heads[0].requires_grad_()
    kl = pk.categorical_kl_from_hidden(*heads, backend=backend)
    with pytest.raises(RuntimeError, match=r"categorical_kl_from_hidden: .*double backward"):
        torch.autograd.grad(kl.sum(), heads[0], create_graph=True)


@KERNELS
def test_opcheck(backend):
    hidden, weight, ref_hidden, ref_weight = example(4, 6, 5, 9)
    ops = torch.ops.ppo_kernels
    mask = hidden[:, 0] > -1
    settings = (True, 0.9, 5.0, 0.7, 8, TILE)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, torch.zeros(9))]
    constants = (ref_hidden, ref_weight, torch.ones(9), mask)
    opcheck(ops.hidden_kl_forward, (*leaves, *constants, *settings, backend))
    detached = [t.detach() for t in leaves]
    kl, state = ops.hidden_kl_forward(*detached, *constants, *settings, backend)
    more = (kl, state, *settings, [True, True, False], backend)
    opcheck(ops.hidden_kl_backward, (torch.ones_like(kl), *detached, *constants, *more))


@KERNELS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic):
    def f(*arguments):
        return pk.categorical_kl_from_hidden(*arguments, softcap=5.0, backend=backend).square()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        heads = example(rows)
        results = []
        for g in (f, compiled):
            leaves = [t.clone().requires_grad_() for t in heads[:2]]
            kl = g(*leaves, *heads[2:], heads[0][:, 0] > -1)
            results.append((kl.detach(), *gradients(kl, *leaves)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


H, W, RH, RW = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, 6), torch.zeros(5, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "^hidden: expected a tensor, got list"),
        ({"hidden": H[..., :0]}, ValueError, r"^hidden: .*H > 0, got \[2, 3, 0\]"),
        ({"weight": W[:, 1:]}, ValueError, r"^weight: expected shape \[V, 4\].* got \[5, 3\]"),
        ({"weight": W.bfloat16()}, TypeError, "^weight: expected dtype float32, got bfloat16"),
        ({"ref_hidden": RH.long()}, TypeError, "ref_hidden: expected dtype float32, .* got int64"),
        ({"ref_hidden": RH[:1]}, ValueError, r"ref_hidden: expected shape \[2, 3, 6\] .*\[1, 3, "),
        ({"ref_weight": RW[:, 1:]}, ValueError, r"ref_weight: .* \[V, 6\].* got \[5, 5\]"),
        ({"ref_weight": RW[1:]}, ValueError, r"ref_weight: expected shape \[5, 6\] .* got \[4, 6"),
        ({"ref_weight": RW.half()}, TypeError, "ref_weight: expected dtype float32, got float16"),
        ({"ref_hidden": RH.clone().requires_grad_()}, ValueError, r"ref_hidden: .*detach\(\)"),
        ({"ref_weight": RW.clone().requires_grad_()}, ValueError, r"ref_weight: .*detach\(\)"),
        ({"ref_bias": RW[:, 0].requires_grad_()}, ValueError, r"ref_bias: .*detach\(\)"),
        ({"bias": W[1:, 0]}, ValueError, r"^bias: expected shape \[5\] .* got \[4\]"),
        ({"ref_bias": W[1:, 0]}, ValueError, r"ref_bias: expected shape \[5\] .* got \[4\]"),
        ({"mask": H[0, :, 0]}, ValueError, r"mask: expected shape \[2, 3\] .*, got \[3\]"),
        ({"mask": [True]}, TypeError, "mask: expected a tensor, got list"),
        ({"temperature": 0.0}, ValueError, "temperature: .* got 0.0"),
        ({"temperature": torch.ones(())}, TypeError, "temperature: expected a number, got Tensor"),
        ({"softcap": -1.0}, ValueError, "softcap: .* got -1"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale: .* got 0"),
        ({"vocab_size": 6}, ValueError, "vocab_size: expected a number from 1 to 5, got 6"),
        (
            {"vocab_size": 5, "ref_weight": RW[1:]},
            ValueError,
            "vocab_size: expected a number from 1 to 4, got 5",
        ),
        ({"chunk": 100}, ValueError, "chunk: expected a multiple of 256 above 0, got 100"),
        ({"backend": "gpu"}, ValueError, "backend: unknown backend 'gpu', expected one of auto, "),
    ],
)
@pytest.mark.parametrize("name", EXECUTORS)
def test_bad_input_says_the_same_everywhere(name, change, error, message):
    arguments = {"hidden": H, "weight": W, "ref_hidden": RH, "ref_weight": RW} | change
    arguments = {
        k: v.detach().to(DEVICE).requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in arguments.items()
    }
    with executor(name), raises(name, error, message):
        pk.categorical_kl_from_hidden(**arguments)
