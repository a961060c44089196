"""The Triton backend beyond the cube: the split over few rows, faults, what is launched.

Runs where the backend does: on a GPU, or interpreted with TRITON_INTERPRET=1.
"""

import pytest
import torch

import ppo_kernels as pk
from ppo_kernels import _faults
from ppo_kernels.testing import device_of, executors

if "triton" not in executors("logprobs_from_logits"):
    pytest.skip("triton runs neither on a GPU nor interpreted", allow_module_level=True)

from ppo_kernels.triton import _configs, _launch, categorical_kl, logprob

DEVICE = device_of("triton")


def example(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=g) * 3).to(dtype)
    return logits.to(DEVICE), torch.randint(shape[-1], shape[:-1], generator=g).to(DEVICE)


def results(logits, tokens, **more):
    """Outputs and gradient."""
    leaf = logits.detach().requires_grad_()
    out = pk.logprobs_from_logits(leaf, tokens, entropy=True, backend="triton", **more)
    (grad,) = torch.autograd.grad(out.logprobs.sum() + 0.3 * out.entropy.sum(), leaf)
    return out.logprobs.detach(), out.entropy.detach(), grad


def launched(monkeypatch, module=logprob):
    """Names of the kernels that `module` launches from here on."""
    names = []

    def spy(kernel, *args, **kwargs):
        names.append(kernel.__name__)
        _launch.launch(kernel, *args, **kwargs)

    monkeypatch.setattr(module, "launch", spy)
    return names


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- association ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab", [65, 1000])
def test_few_rows_give_the_bits_of_many(monkeypatch, dtype, vocab):
    """Tiny segments, so that there are many of them, and a row that starts with an empty one."""
    tiny = _configs.Table((), _configs.Config(16, 1, 64))
    monkeypatch.setattr(_configs, "LOGPROB_FORWARD", tiny)
    monkeypatch.setattr(_configs, "LOGPROB_FORWARD_FP64", tiny)
    logits, tokens = example(5, vocab, dtype=dtype)
    logits[1, :64] = -torch.inf
    logits[2] = -3.0
    tokens[1] = vocab - 1
    names = launched(monkeypatch)
    few = results(logits, tokens)
    assert names == ["segments_kernel", "merge_kernel", "backward_kernel"]
    monkeypatch.setattr(logprob, "processors", lambda device: 1)
    del names[:]
    many = results(logits, tokens)
    assert names == ["forward_kernel", "backward_kernel"]
    assert equal(few, many)
    assert few[1][2].item() == pytest.approx(torch.tensor(float(vocab)).log().item(), rel=1e-6)


def test_several_segments_of_the_real_size(monkeypatch):
    logits, tokens = example(2, 70001)
    names = launched(monkeypatch)
    few = results(logits, tokens, softcap=20.0)
    assert "merge_kernel" in names
    monkeypatch.setattr(logprob, "processors", lambda device: 1)
    assert equal(results(logits, tokens, softcap=20.0), few)
    exact = pk.logprobs_from_logits(
        logits.double().cpu(), tokens.cpu(), softcap=20.0, entropy=True, backend="torch"
    )
    torch.testing.assert_close(few[0].double().cpu(), exact.logprobs, rtol=1e-6, atol=0)
    torch.testing.assert_close(few[1].double().cpu(), exact.entropy, rtol=1e-6, atol=0)


def divergences(logits, ref, **more):
    """Values and gradients in both directions."""
    found = []
    for reverse in (False, True):
        leaf = logits.detach().requires_grad_()
        kl = pk.categorical_kl(leaf, ref, reverse=reverse, backend="triton", **more)
        (grad,) = torch.autograd.grad(kl, leaf, torch.ones_like(kl))
        found += [kl.detach(), grad]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab", [65, 1000])
def test_few_rows_of_divergences_give_the_bits_of_many(monkeypatch, dtype, vocab):
    """Tiny segments: empty ones in both rows, maxima of the two in different ones, equal rows."""
    tiny = _configs.Table((), _configs.Config(16, 1, 64))
    monkeypatch.setattr(_configs, "KL_FORWARD", tiny)
    monkeypatch.setattr(_configs, "KL_FORWARD_FP64", tiny)
    logits, ref = example(6, vocab, dtype=dtype)[0], example(6, vocab, dtype=dtype, seed=1)[0]
    logits[1, :64] = ref[1, :64] = -torch.inf
    logits[2, 3], logits[2, -1], ref[2, 3], ref[2, -1] = 30.0, 20.0, 20.0, 30.0
    ref[3] = logits[3]
    logits[4] = torch.nan
    mask = torch.tensor([1, 1, 1, 1, 0, 1], device=DEVICE)
    names = launched(monkeypatch, categorical_kl)
    few = divergences(logits, ref, mask=mask)
    assert names == ["segments_kernel", "merge_kernel", "backward_kernel"] * 2
    monkeypatch.setattr(categorical_kl, "processors", lambda device: 1)
    del names[:]
    many = divergences(logits, ref, mask=mask)
    assert names == ["forward_kernel", "backward_kernel"] * 2
    assert equal(few, many)
    for kl in few[::2]:
        assert kl[3] == 0
        assert kl[4] == 0
        assert kl[2] == pytest.approx(10.0, abs=0.01)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_token_forbidden_in_one_segment(monkeypatch, reverse):
    """Its probability underflows, there and once more against the maximum of the row."""
    tiny = _configs.Table((), _configs.Config(16, 1, 64))
    monkeypatch.setattr(_configs, "KL_FORWARD", tiny)
    logits, ref = example(2, 300)[0], example(2, 300, seed=1)[0]
    first, second = (ref, logits) if reverse else (logits, ref)
    first[0, 70], first[0, 71], first[0, 290] = -900.0, 0.0, 500.0
    second[0, 70] = -torch.inf
    few = divergences(logits, ref)[2 * reverse]
    assert few[0] == torch.inf
    assert few[1].isfinite()
    monkeypatch.setattr(categorical_kl, "processors", lambda device: 1)
    assert torch.equal(divergences(logits, ref)[2 * reverse], few)


def test_several_segments_of_divergences_of_the_real_size(monkeypatch):
    logits, ref = example(2, 70001)[0], example(2, 70001, seed=1)[0]
    names = launched(monkeypatch, categorical_kl)
    few = divergences(logits, ref, temperature=1.5)
    assert "merge_kernel" in names
    monkeypatch.setattr(categorical_kl, "processors", lambda device: 1)
    assert equal(divergences(logits, ref, temperature=1.5), few)
    for reverse in (False, True):
        exact = pk.categorical_kl(
            logits.double(), ref.double(), reverse=reverse, temperature=1.5, backend="torch"
        )
        torch.testing.assert_close(few[2 * reverse].double(), exact, rtol=1e-6, atol=0)


def test_classes_are_whole_blocks():
    for name, table in vars(_configs).items():
        if isinstance(table, _configs.Table):
            for config in [*(c for _, c in table.entries), table.largest]:
                assert config.block & (config.block - 1) == 0, name
                assert config.segment % config.block == 0, name
            bounds = [bound for bound, _ in table.entries]
            assert bounds == sorted(bounds), name
            assert all(config.block >= bound for bound, config in table.entries), name


def test_the_split_reports_faults_too(monkeypatch):
    _faults._flags.clear()
    tiny = _configs.Table((), _configs.Config(16, 1, 64))
    monkeypatch.setattr(_configs, "LOGPROB_FORWARD", tiny)
    logits, tokens = example(6, 100)
    tokens[4] = 10**12
    names = launched(monkeypatch)
    assert results(logits, tokens)[0].isnan().tolist() == [False] * 4 + [True, False]
    assert "merge_kernel" in names
    with pytest.raises(ValueError, match="flat position 4"):
        pk.check(DEVICE)


# ---- launches ------------------------------------------------------------------------------------


def test_shifted_logits_are_not_copied(monkeypatch):
    logits, tokens = example(2, 6, 50)
    seen = []
    monkeypatch.setattr(logprob, "launch", lambda kernel, n, *args, **kw: seen.append(args))
    pk.logprobs_from_logits(logits[:, :-1], tokens[:, 1:], backend="triton")
    (args,) = seen
    assert args[0].data_ptr() == logits.data_ptr()
    assert args[1:4] == (300, 50, 1)
    assert args[4].data_ptr() == tokens[:, 1:].data_ptr()


def test_no_number_of_a_call_is_a_compile_time_constant(monkeypatch):
    """One more JIT per temperature, length or batch would never be noticed by a value test."""
    constants = []
    monkeypatch.setattr(
        logprob, "launch", lambda kernel, n, *args, config, **kw: constants.append((config, kw))
    )
    for rows, length, temperature in ((1, 7, 0.5), (3, 9, 0.7), (64, 100, 1.3)):
        logits, tokens = example(rows, length, 50)
        pk.logprobs_from_logits(logits, tokens, temperature=temperature, backend="triton")
    assert constants[0] == constants[1] == constants[2]
