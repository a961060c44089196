"""What only the data can tell, on a GPU: the row gives NaN, `check` raises, and no call waits."""

import pytest
import torch

import ppo_kernels as pk
from ppo_kernels import _faults
from ppo_kernels.testing import device_of, executors

BACKENDS = [e for e in executors("logprobs_from_logits") if e != "torch" and "cpu" not in e]
EACH = pytest.mark.parametrize("backend", BACKENDS)


def example(backend, *shape):
    g = torch.Generator().manual_seed(0)
    logits, tokens = (
        torch.randn(shape, generator=g) * 3,
        torch.randint(shape[-1], shape[:-1], generator=g),
    )
    return logits.to(device_of(backend)), tokens.to(device_of(backend))


def results(backend, logits, tokens, **more):
    """Outputs and gradient."""
    leaf = logits.detach().requires_grad_()
    out = pk.logprobs_from_logits(leaf, tokens, entropy=True, backend=backend, **more)
    (grad,) = torch.autograd.grad(out.logprobs.sum() + 0.3 * out.entropy.sum(), leaf)
    return out.logprobs.detach(), out.entropy.detach(), grad


@pytest.fixture(autouse=True)
def no_faults():
    _faults._flags.clear()
    yield
    _faults._flags.clear()


@EACH
def test_a_label_out_of_range_gives_nan_and_is_raised_by_check(backend):
    logits, tokens = example(backend, 2, 5, 40)
    expected = results(backend, logits, tokens)
    tokens[0, 3], tokens[1, 1] = 40, -1
    bad = torch.zeros_like(tokens, dtype=torch.bool)
    bad[0, 3] = bad[1, 1] = True
    for got, wanted in zip(results(backend, logits, tokens), expected, strict=True):
        assert got[bad].isnan().all()
        assert torch.equal(got[~bad], wanted[~bad])
    message = r"tokens: expected ids in \[0, V\) or ignore_index .* at flat position 3 in a call on"
    with pytest.raises(ValueError, match=message):
        pk.check()
    pk.check()  # forgotten


@EACH
@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan])
def test_a_bad_temperature_is_a_fault(backend, value):
    logits, tokens = example(backend, 4, 40)
    temperature = torch.tensor([1.0, 0.5, value, 2.0], device=device_of(backend))
    got = results(backend, logits, tokens, temperature=temperature)
    assert got[0].isnan().tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match=r"temperature: expected finite values .* 2 in"):
        pk.check()


@EACH
def test_masked_and_ignored_labels_are_no_faults(backend):
    logits, tokens = example(backend, 3, 40)
    tokens[0], tokens[1] = 99, -100
    mask = torch.tensor([False, True, True], device=device_of(backend))
    got = results(backend, logits, tokens, mask=mask)
    assert (got[0] == 0).tolist() == [True, True, False]
    pk.check()


@EACH
def test_rows_nobody_asks_about_have_a_zero_gradient_even_if_faulty(backend):
    logits, tokens = example(backend, 2, 40)
    tokens[0] = 40
    leaf = logits.requires_grad_()
    out = pk.logprobs_from_logits(leaf, tokens, backend=backend)
    out.backward(torch.tensor([0.0, 1.0], device=device_of(backend)))
    assert not leaf.grad[0].any()
    assert leaf.grad[1].any()


@EACH
def test_debug_mode_raises_at_once(backend, monkeypatch):
    logits, tokens = example(backend, 3, 40)
    tokens[1] = -5
    monkeypatch.setattr(_faults, "debug", True)
    with pytest.raises(ValueError, match="flat position 1"):
        pk.logprobs_from_logits(logits, tokens, backend=backend)


@EACH
def test_capture_refuses_what_must_wait(backend, monkeypatch):
    device = example(backend, 1, 4)[0].device
    monkeypatch.setattr(_faults, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="allocates its fault flag"):
        _faults.flag(device)
    monkeypatch.undo()
    _faults.flag(device)
    monkeypatch.setattr(_faults, "_capturing", lambda device: True)
    _faults.flag(device)
    with pytest.raises(RuntimeError, match="check: cannot wait"):
        pk.check()


@EACH
def test_tracing_a_graph_allocates_the_flag(backend):
    """Its first run may be in memory that belongs to a CUDA graph."""
    logits, tokens = example(backend, 3, 40)
    seen = []

    def compiler(graph, inputs):
        seen.extend(_faults._flags.values())
        return graph.forward

    compiled = torch.compile(
        lambda x, t: pk.logprobs_from_logits(x, t, backend=backend),
        fullgraph=True,
        backend=compiler,
    )
    compiled(logits, tokens)
    (flag,) = seen
    assert type(flag) is torch.Tensor
    assert flag.item() == _faults.NONE
    assert list(_faults._flags) == [logits.device]


# ---- scans ---------------------------------------------------------------------------------------

SCANS = [
    e for e in executors("gae", "discounted_returns") if e != "torch" and not e.startswith("cpu")
]


@pytest.mark.parametrize("backend", SCANS)
@pytest.mark.parametrize(
    ("offsets", "where"),
    [([1, 90], 0), ([0, 40, 30, 90], 2), ([0, 40], 1), ([0, 40, 200], 2), ([-5, 90], 0), ([0], 0)],
)
@pytest.mark.parametrize("convention", [None, "carry"])
def test_bad_offsets_are_a_fault(backend, offsets, where, convention):
    n, device = 90, device_of(backend)
    x = torch.ones(n, device=device, requires_grad=True)
    masked = {}
    if convention:
        masked = {"mask": torch.ones(n, device=device), "mask_convention": convention}
    got = pk.discounted_returns(
        x, gamma=0.9, cu_seqlens=torch.tensor(offsets, device=device), backend=backend, **masked
    )
    (grad,) = torch.autograd.grad(got.sum(), x)
    if offsets == [0, 40]:
        assert got.isnan().tolist() == [False] * 40 + [True] * 50
    if offsets == [0]:
        assert got.isnan().all()
    assert grad.shape == (n,)
    with pytest.raises(ValueError, match=rf"cu_seqlens: expected .* at flat position {where} in"):
        pk.check()
    pk.check()
    x = x.detach()
    got = pk.vtrace(
        *(x, x, x, x), gamma=0.9, cu_seqlens=torch.tensor(offsets, device=device),
        backend=backend, **masked,
    )  # fmt: skip
    for part in got:
        if offsets == [0, 40]:
            assert part.isnan().tolist() == [False] * 40 + [True] * 50
        if offsets == [0]:
            assert part.isnan().all()
    with pytest.raises(ValueError, match=rf"cu_seqlens: expected .* at flat position {where} in"):
        pk.check()


@pytest.mark.parametrize("backend", SCANS)
@pytest.mark.parametrize("value", [-0.1, 1.5, torch.nan, torch.inf])
def test_a_bad_lambda_is_a_fault(backend, value):
    x = torch.ones(4, 50, device=device_of(backend))
    lam = torch.tensor([0.5, 1.0, value, value], device=device_of(backend))
    got = pk.gae(x, x, gamma=0.9, lam=lam, backend=backend)
    assert got.advantages.isnan().all(1).tolist() == [False, False, True, True]
    assert got.advantages[:2].isfinite().all()
    with pytest.raises(ValueError, match=r"^lam: expected .* at flat position 2 in"):
        pk.check()
    got = pk.gae(x, x, gamma=0.9, lam=0.5, value_lam=lam, backend=backend)
    assert got.advantages.isfinite().all()
    assert got.returns.isnan().all(1).tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match=r"^value_lam: expected .* at flat position 2 in"):
        pk.check()
    got = pk.vtrace(x, x, x, x, gamma=0.9, lam=lam, backend=backend)
    for part in got:
        assert part.isnan().all(1).tolist() == [False, False, True, True]
        assert part[:2].isfinite().all()
    with pytest.raises(ValueError, match=r"^lam: expected .* at flat position 2 in"):
        pk.check()
