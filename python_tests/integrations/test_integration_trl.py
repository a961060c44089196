"""TRL's functions, ours and its own; its GRPO trainer with and without ours."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from comparing import compare, ragged

utils = pytest.importorskip("trl.trainer.utils", reason="needs trl")
from trl.kernels import ChunkedLogProbFunction  # noqa: E402

from ppo_kernels import _gemm  # noqa: E402
from ppo_kernels.integrations import trl  # noqa: E402

B, T, V = 5, 12, 97
MASK = ragged(B, T)


def logits(peak=0.0, seed=0):
    """[B, T, V] and tokens; with `peak` the tokens' logits are that far above the others."""
    g = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(B, T, V, generator=g)
    tokens = torch.randint(V, (B, T), generator=g)
    return x.scatter_add(-1, tokens[..., None], torch.full((B, T, 1), peak)), tokens


@pytest.mark.parametrize("peak", [0.0, 30.0, -30.0])
@pytest.mark.parametrize(("temperature", "mask"), [(1.0, None), (0.7, MASK), (2.0, MASK.long())])
def test_logprobs(peak, temperature, mask):
    x, tokens = logits(peak)
    compare(
        lambda z: trl.selective_log_softmax(z, tokens, temperature, mask),
        lambda z: utils.selective_log_softmax(z, tokens, temperature, mask),
        [x],
        differentiable=[0],
        scale=1,
    )


@pytest.mark.parametrize("peak", [0.0, 30.0])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("mask", [None, MASK])
def test_both(peak, requires_grad, mask):
    x, tokens = logits(peak)
    compare(
        lambda z: trl.selective_log_softmax_and_entropy(z, tokens, requires_grad, 0.8, mask),
        lambda z: utils.selective_log_softmax_and_entropy(z, tokens, requires_grad, 0.8, mask),
        [x],
        differentiable=[0],
        scale=1,
    )


@pytest.mark.parametrize("shape", [(V,), (T, V), (2, 3, 4, V)])
def test_entropy(shape):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    compare(trl.entropy_from_logits, utils.entropy_from_logits, [x], differentiable=[0], scale=1)


def test_entropy_of_forbidden_tokens():
    x, _ = logits()
    x[..., 1:50] = -torch.inf
    assert utils.entropy_from_logits(x).isnan().all()
    assert trl.entropy_from_logits(x).isfinite().all()


def test_several_tokens_per_row_and_errors_are_trls():
    x, _ = logits()
    index = torch.randint(V, (B, T, 3))
    expected = utils.selective_log_softmax(x, index, 0.5)
    assert trl.selective_log_softmax(x, index, 0.5).equal(expected)
    for f in (trl.selective_log_softmax, trl.selective_log_softmax_and_entropy):
        with pytest.raises(ValueError, match="temperature must be positive"):
            f(x, index[..., 0], temperature=0)


SETTINGS = {
    "plain": (1.0, 32, None, 1.0),
    "temperature and chunks": (0.7, 10, None, 1.0),
    "softcap and scale": (1.3, 64, 5.0, 0.5),
}


@pytest.mark.parametrize("outputs", [("entropy",), ("log_probs", "entropy"), ("log_probs",)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("bias", [True, False])
def test_fused_head(settings, outputs, bias):
    g = torch.Generator().manual_seed(2)
    hidden, weight, b = (torch.randn(s, generator=g) for s in ((33, 16), (V, 16), (V,)))
    targets = torch.randint(V, (33,), generator=g)
    made, host = (
        lambda h, w, *b, f=f: f.apply(h, w, b[0] if b else None, targets, *settings, outputs)
        for f in (trl.ChunkedLogProbFunction, ChunkedLogProbFunction)
    )
    inputs = [hidden, weight, b] if bias else [hidden, weight]

    def truth(h, w, *b):
        """TRL's has parts in fp32 whatever its inputs are."""
        temperature, _, cap, factor = settings
        z = factor * torch.nn.functional.linear(h, w, *b)
        logp = ((z if cap is None else cap * torch.tanh(z / cap)) / temperature).log_softmax(-1)
        chosen = logp.gather(-1, targets[:, None])[:, 0]
        return chosen, -(logp.exp() * logp).sum(-1) if "entropy" in outputs else None

    compare(made, host, inputs, differentiable=range(len(inputs)), truth=truth, slack=2)


def test_other_outputs_of_the_head_are_trls():
    hidden, weight, targets = torch.randn(8, 16), torch.randn(V, 16), torch.arange(8)
    args = (hidden, weight, None, targets, 1.0, 32)
    made, host = (f.apply(*args) for f in (trl.ChunkedLogProbFunction, ChunkedLogProbFunction))
    assert all(a.equal(b) for a, b in zip(made, host, strict=True))


def test_head_in_another_dtype_and_autocast():
    hidden, weight, targets = torch.randn(8, 16), torch.randn(V, 16), torch.arange(8)
    args = (None, targets, 1.0, 32, None, 1.0, ("log_probs",))
    functions = (trl.ChunkedLogProbFunction, ChunkedLogProbFunction)
    made, host = (f.apply(hidden.bfloat16(), weight, *args)[0] for f in functions)
    torch.testing.assert_close(made, host, rtol=0.02, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        made, host = (f.apply(hidden, weight, *args)[0] for f in functions)
    assert made.dtype == host.dtype
    torch.testing.assert_close(made, host, rtol=0.02, atol=0.05)


def test_compiles_in_one_graph():
    x, tokens = logits()
    step = torch.compile(
        lambda z: trl.selective_log_softmax_and_entropy(z, tokens, temperature=0.7),
        fullgraph=True,
        backend="aot_eager",
    )
    for made, expected in zip(
        step(x), trl.selective_log_softmax_and_entropy(x, tokens, temperature=0.7), strict=True
    ):
        assert made.equal(expected)


def test_grpo_trains_alike(tmp_path, monkeypatch):
    # Both with the products of torch.mm: Adam makes steps of rounding noise where gradients are 0.
    monkeypatch.setattr(_gemm, "library", lambda: "torch")
    path = Path(__file__).parents[2] / "examples/trl_grpo.py"
    spec = importlib.util.spec_from_file_location("trl_grpo", path)
    example = importlib.util.module_from_spec(spec)
    sys.modules["trl_grpo"] = example
    spec.loader.exec_module(example)
    runs = example.compare(steps=3, output_dir=tmp_path)
    plain, patched = runs["trl"], runs["ppo_kernels"]
    assert patched.calls > 0
    assert plain.calls == patched.calls
    assert len(plain.losses) == len(patched.losses) == 3
    torch.testing.assert_close(
        torch.tensor(patched.losses), torch.tensor(plain.losses), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(
        torch.tensor(patched.grad_norms), torch.tensor(plain.grad_norms), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(patched.weights, plain.weights, rtol=0, atol=1e-4)
