"""The Triton kernel that goes from rows of logits to the gradient of their loss.

Runs where the backend does: on a GPU, or interpreted with TRITON_INTERPRET=1.
"""

import pytest
import torch

import ppo_kernels as pk
from ppo_kernels import _faults
from ppo_kernels.testing import device_of, executors

if "triton" not in executors("ppo_loss_from_logits"):
    pytest.skip("triton runs neither on a GPU nor interpreted", allow_module_level=True)

from ppo_kernels.triton import _launch, logprob, ppo_loss

DEVICE = device_of("triton")
ALL = {
    "entropy_coef": 0.05, "kl_coef": 0.3, "kl_estimator": "k3", "log_ratio_clamp": 0.5,
    "temperature": 0.8, "softcap": 6.0, "logit_scale": 0.9, "dual_clip": 1.5,
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels of rows that are launched from here on."""
    names = []

    def spy(kernel, *args, **kwargs):
        names.append(kernel.__name__)
        _launch.launch(kernel, *args, **kwargs)

    monkeypatch.setattr(logprob, "launch", spy)
    monkeypatch.setattr(ppo_loss, "launch", spy)
    return names


def example(rows, cols, vocab, dtype):
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, cols, vocab, generator=g) * 3).to(dtype)
    tokens = torch.randint(vocab, (rows, cols), generator=g)
    now = pk.logprobs_from_logits(logits, tokens, backend="torch")
    constants = [now + 0.4 * torch.randn(rows, cols, generator=g) for _ in range(2)]
    advantages = torch.randn(rows, generator=g)
    mask = torch.rand(rows, cols, generator=g) < 0.7
    logits[~mask] = torch.nan
    return [t.to(DEVICE) for t in (logits, tokens, *constants, advantages, mask)]


def outcome(inputs, inplace=False, **settings):
    logits, tokens, old, ref, advantages, mask = inputs
    leaf = logits.detach().requires_grad_()
    if settings.get("kl_coef"):
        settings["ref_logprobs"] = ref
    out = pk.ppo_loss_from_logits(
        leaf * 1, tokens, old, advantages, mask, inplace=inplace, backend="triton", **settings
    )
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return [t for t in (*out[:1], out.metrics.stats, *out[2:], grad) if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", [{}, ALL, {"entropy_coef": 0.1}, {"entropy": True}])
@pytest.mark.parametrize("inplace", [False, True])
def test_one_kernel_gives_the_bits_of_two(monkeypatch, launched, dtype, settings, inplace):
    inputs = example(3, 5, 300, dtype)
    few = outcome(inputs, inplace, **settings)
    assert "rows_kernel" not in launched
    assert "backward_kernel" in launched
    del launched[:]
    monkeypatch.setattr(ppo_loss, "processors", lambda device: 1)
    many = outcome(inputs, inplace, **settings)
    assert launched == ["rows_kernel"]
    assert all(map(torch.equal, few, many))


@pytest.mark.parametrize("variant", ["cispo", "sapo", "gpg", "gspo", "gmpo"])
def test_variants(monkeypatch, launched, variant):
    inputs = example(3, 5, 40, torch.float32)
    few = outcome(inputs, variant=variant)
    monkeypatch.setattr(ppo_loss, "processors", lambda device: 1)
    many = outcome(inputs, variant=variant)
    assert ("rows_kernel" in launched) == (variant in ("cispo", "sapo", "gpg"))
    assert all(map(torch.equal, few, many))


@pytest.mark.parametrize("gradient", ["k1", "k2", "k3", "abs"])
def test_gradients_of_the_kl(monkeypatch, gradient):
    inputs = example(3, 5, 40, torch.float32)
    settings = {"kl_coef": 0.3, "kl_gradient": gradient, "loss_scale": torch.tensor(8.0)}
    few = outcome(inputs, **settings)
    monkeypatch.setattr(ppo_loss, "processors", lambda device: 1)
    assert all(map(torch.equal, few, outcome(inputs, **settings)))


def test_a_bad_label_gives_nan_and_is_noted(monkeypatch):
    monkeypatch.setattr(ppo_loss, "processors", lambda device: 1)
    monkeypatch.setattr(_faults, "debug", False)
    inputs = example(3, 5, 40, torch.float32)
    inputs[-1][1, 2] = True
    inputs[0][1, 2] = 0.0
    inputs[1][1, 2] = 40
    loss, *_, grad = outcome(inputs)
    assert loss.isnan()
    assert grad[1, 2].isnan().all()
    grad[1, 2] = 0
    assert not grad.isnan().any()
    with pytest.raises(ValueError, match=r"tokens: .* at flat position 7"):
        pk.check()


def test_rows_that_nothing_is_asked_of_are_zeros(monkeypatch):
    monkeypatch.setattr(ppo_loss, "processors", lambda device: 1)
    inputs = example(3, 5, 40, torch.float32)
    inputs[4][1] = 0.0
    *_, grad = outcome(inputs)
    assert not grad[1].any()
    assert grad[0].any()
