"""The products of a head on a CPU, by either library."""

from types import SimpleNamespace

import pytest
import torch
from device import DEVICE, seeded

import ppo_kernels as pk
from ppo_kernels import _gemm, _head

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's products are torch.mm's")

BLOCK = _gemm.BLOCK["onednn"]
available = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
LIBRARIES = [pytest.param(n, marks=available if n == "onednn" else ()) for n in _gemm.LIBRARIES]


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    monkeypatch.setattr(_gemm, "library", lambda: request.param)
    return request.param


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def contiguous(t):
    return t


def transposed(t):
    return t.t().contiguous().t() if t.dim() == 2 else t


def strided(t):
    """Every second element, and NaN between."""
    wide = t.new_full((*t.shape, 2), torch.nan)
    wide[..., 0] = t
    return wide[..., 0]


def assert_product(got, a, b, plus=0.0):
    """a @ b within the bound of any order of summation."""
    a, b = a.double(), b.double()
    terms = a.shape[1] + 1
    bound = terms * torch.finfo(got.dtype).eps * (a.abs() @ b.abs() + abs(plus))
    assert not got.isnan().any()
    assert ((got.double() - (a @ b + plus)).abs() <= bound).all()


@pytest.mark.parametrize("layout", [contiguous, transposed, strided])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("rows", "size", "vocab"),
    [(1, 1, 1), (3, 97, BLOCK - 1), (63, 8, BLOCK + 1), (64, 33, BLOCK), (256, 16, 2 * BLOCK + 5)],
)
def test_products(library, rows, size, vocab, dtype, layout):
    x, weight = random(rows, size, dtype=dtype), random(vocab, size, seed=1, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    bias, grad = random(vocab, seed=2, dtype=wide), random(rows, vocab, seed=3, dtype=wide)
    for given in (None, layout(bias)):
        out = torch.full((rows, vocab + 3), torch.nan, dtype=wide)[:, :vocab]
        _gemm.linear(layout(x.to(wide)), layout(weight), given, out, 256)
        assert_product(out, x, weight.t(), 0.0 if given is None else bias.double())
    assert_product(_gemm.grad_input(layout(grad), layout(weight)), grad, weight)
    total = torch.ones(vocab, size, dtype=wide)
    _gemm.add_grad_weight(layout(grad), layout(x.to(wide)), total)
    assert_product(total, grad.t(), x, 1.0)


def test_bits_do_not_depend_on_how_many_tiles_there_are(library):
    hidden, weight = random(3 * _head.TILE, 96), random(BLOCK + 100, 96, seed=1)
    tokens = torch.randint(BLOCK, (len(hidden),), generator=seeded(2))
    at_once = pk.logprobs_from_hidden(hidden, weight, tokens, chunk=3 * _head.TILE)
    parts = [
        pk.logprobs_from_hidden(h, weight, t, chunk=_head.TILE)
        for h, t in zip(hidden.split(300), tokens.split(300), strict=True)
    ]
    assert torch.equal(at_once, torch.cat(parts))


@available
@pytest.mark.parametrize("layout", [contiguous, transposed, strided])
def test_onednn_is_given_no_layout_it_is_slow_with(monkeypatch, layout):
    """Nor a strided bias, which it would misread."""
    whole, calls = _gemm._onednn, []

    def spy(x, weight, bias=None):
        calls.append(weight.shape)
        assert weight.is_contiguous() or weight.t().is_contiguous()
        assert bias is None or bias.is_contiguous()
        return whole(x, weight, bias)

    monkeypatch.setattr(_gemm, "library", lambda: "onednn")
    monkeypatch.setattr(_gemm, "_onednn", spy)
    hidden, weight = (layout(random(n, 24)).requires_grad_() for n in (100, 2 * BLOCK))
    tokens = torch.zeros(100, dtype=torch.int64)
    bias = layout(random(2 * BLOCK))
    pk.logprobs_from_hidden(hidden, weight, tokens, bias=bias).sum().backward()
    logits, grad_hidden, grad_weight = [(BLOCK, 24)] * 2, [(24, BLOCK)] * 2, [(24, 100)] * 2
    assert calls == [*logits, *logits, *grad_hidden, *grad_weight]


@pytest.mark.parametrize(
    ("intel", "capability", "mkl", "mkldnn", "chosen"),
    [
        (False, "AVX512", True, True, "onednn"),
        (True, "AVX512", True, True, "torch"),
        (False, "AVX2", True, True, "torch"),
        (False, "AVX512", False, True, "torch"),
        (False, "AVX512", True, False, "torch"),
    ],
)
def test_the_choice_follows_the_processor(monkeypatch, intel, capability, mkl, mkldnn, chosen):
    monkeypatch.delenv("PPO_KERNELS_CPU_GEMM", raising=False)
    monkeypatch.setattr(pk.cpu, "is_intel", lambda: intel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    assert _gemm.library.__wrapped__() == chosen


@available
def test_a_torch_without_the_operator_multiplies_by_itself(monkeypatch):
    monkeypatch.delenv("PPO_KERNELS_CPU_GEMM", raising=False)
    monkeypatch.setattr(pk.cpu, "is_intel", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert _gemm.library.__wrapped__() == "onednn"
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert _gemm.library.__wrapped__() == "torch"


def test_the_environment_overrides_it(monkeypatch):
    for name in ("torch", *(["onednn"] if torch.backends.mkldnn.is_available() else [])):
        monkeypatch.setenv("PPO_KERNELS_CPU_GEMM", name)
        assert _gemm.library.__wrapped__() == name
    monkeypatch.setenv("PPO_KERNELS_CPU_GEMM", "blis")
    with pytest.raises(
        ValueError, match=r"PPO_KERNELS_CPU_GEMM: expected one of torch.*got 'blis'"
    ):
        _gemm.library.__wrapped__()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setenv("PPO_KERNELS_CPU_GEMM", "onednn")
    with pytest.raises(ValueError, match="expected one of torch here, got 'onednn'"):
        _gemm.library.__wrapped__()
