"""Rows of logits in CUDA C++ beyond the cube: where they begin, how far they reach, schedules.

With PPO_KERNELS_EMULATOR_SANITIZE=address,undefined also that nothing outside of them is read.
"""

import ctypes
from contextlib import contextmanager
from functools import partial

import cuda_emulated
import loss_rows
import pytest
import torch
from loss_rows import SETTINGS, inputs

import ppo_kernels as pk
from ppo_kernels import _faults
from ppo_kernels.native import DTYPE_CODES

pytestmark = pytest.mark.skipif(
    cuda_emulated.unavailable() is not None, reason=str(cuda_emulated.unavailable())
)
BACKEND = cuda_emulated.NAME
VECTOR = 16  # bytes; of csrc/cuda/columns.cuh
SEGMENT = 65536  # bytes of logits that a block reads
outcome = partial(loss_rows.outcome, BACKEND)


def tokens_of(logits):
    return logits.argmin(-1)


def logprobs(logits, _, **more):
    leaf = logits.detach().requires_grad_()
    out = pk.logprobs_from_logits(leaf, tokens_of(logits), entropy=True, backend=BACKEND, **more)
    (grad,) = torch.autograd.grad(out.logprobs.sum() + 0.3 * out.entropy.sum(), leaf)
    return out.logprobs.detach(), out.entropy.detach(), grad


def policy_loss(logits, ref, **more):
    """Of many rows by one kernel, which keeps a row on the chip."""
    leaf, tokens = logits.detach().requires_grad_(), tokens_of(logits)
    ones = torch.ones(tokens.shape)
    settings = {"variant": "gpg", "aggregation": "token-sum", "entropy_coef": 0.3}
    out = pk.ppo_loss_from_logits(leaf, tokens, ones, ones, backend=BACKEND, **settings, **more)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return out.logprobs, out.entropies, grad


def divergence(logits, ref, reverse=False, **more):
    leaf = logits.detach().requires_grad_()
    kl = pk.categorical_kl(leaf, ref, reverse=reverse, backend=BACKEND, **more)
    return kl.detach(), *torch.autograd.grad(kl.sum(), leaf)


def reversed_divergence(logits, ref, **more):
    return divergence(logits, ref, reverse=True, **more)


FUNCTIONS = pytest.mark.parametrize(
    "function", [logprobs, policy_loss, divergence, reversed_divergence]
)


def example(*shape, dtype):
    g = torch.Generator().manual_seed(shape[-1])
    logits = torch.randn(shape, generator=g, dtype=torch.float64) * 3
    ref = logits + 0.5 * torch.randn(shape, generator=g, dtype=torch.float64)
    return logits.to(dtype), ref.to(dtype)


def aligned(t):
    """Every row begins at a vector."""
    lanes = VECTOR // t.element_size()
    whole = t.new_full((t.shape[0], -(-t.shape[1] // lanes) * lanes), torch.nan)
    return whole[:, : t.shape[1]].copy_(t)


def moved(t, by):
    """Rows that follow each other, from an element that is not a vector's first."""
    whole = t.new_full((by + t.numel(),), torch.nan)
    return whole[by:].view(t.shape).copy_(t)


@contextmanager
def nothing_else_is_read(*rows):
    """In a process with AddressSanitizer, the storage around these tensors is poisoned."""
    process = ctypes.CDLL(None)
    spans = []
    for t in rows if hasattr(process, "__asan_poison_memory_region") else ():
        storage = t.untyped_storage()
        begin, end = t.data_ptr(), t.data_ptr() + t.nbytes
        spans.append((storage.data_ptr(), begin - storage.data_ptr()))
        spans.append((end, storage.data_ptr() + storage.nbytes() - end))
    call = {}
    for name in ("poison", "unpoison") if spans else ():
        call[name] = getattr(process, f"__asan_{name}_memory_region")
        call[name].argtypes = ctypes.c_void_p, ctypes.c_size_t
    for span in spans:
        call["poison"](*span)
    try:
        yield
    finally:
        for span in spans:
            call["unpoison"](*span)


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- where rows begin ----------------------------------------------------------------------------

SHORT = [1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 33, 255, 257]


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_of_short_rows_do_not_depend_on_their_address(function, dtype):
    for vocab in SHORT:
        logits, ref = example(3, vocab, dtype=dtype)
        expected = function(aligned(logits), aligned(ref))
        for by in range(16):
            a, b = moved(logits, by), moved(ref, 5 * by % 16)
            with nothing_else_is_read(a, b):
                same(function(a, b), expected)


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_long_rows_do_not_depend_on_their_address(function, dtype):
    """Of several segments, the last of them short."""
    logits, ref = example(2, 50257, dtype=dtype)
    expected = function(aligned(logits), aligned(ref))
    for by in range(16):
        a, b = moved(logits, by), moved(ref, 5 * by % 16)
        with nothing_else_is_read(a, b):
            same(function(a, b), expected)


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_end_around_a_segment(function, dtype):
    for rows in (1, 2):  # read by a block: logprobs has one row, a divergence two
        segment = SEGMENT // rows // dtype.itemsize
        for vocab in (segment - 1, segment, segment + 1, segment + VECTOR // dtype.itemsize):
            logits, ref = example(1, vocab, dtype=dtype)
            expected = function(aligned(logits), aligned(ref))
            for by in (1, 3):
                a, b = moved(logits, by), moved(ref, by + 1)
                with nothing_else_is_read(a, b):
                    same(function(a, b), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_of_any_stride_have_the_same_bits(dtype):
    logits, ref = example(2, 20011, dtype=dtype)
    for function in (logprobs, policy_loss, divergence):
        expected = function(logits, ref)
        same(function(logits.mT.contiguous().mT, ref), expected)
        same(function(logits, ref.repeat_interleave(2, -1)[:, ::2]), expected)


def test_columns_further_apart_than_32_bits_reach():
    """The storage is never touched but for its columns, so it costs no memory."""
    values, ref = example(1, 40, dtype=torch.bfloat16)
    base = torch.empty(2**32, dtype=torch.bfloat16)
    far = base.as_strided((1, 40), (0, 2**26 + 2**25 + 1)).copy_(values)
    for function in (logprobs, policy_loss, divergence):
        same([t.clone() for t in function(far, ref)], function(values, ref))
    same(divergence(values, far), divergence(values, values))


@pytest.mark.parametrize("by", [1, 4])
def test_in_place_at_any_address(by):
    logits, _ = example(3, 20011, dtype=torch.bfloat16)
    expected = logprobs(logits, None)[-1]
    logits, tokens, upstream = moved(logits, by), tokens_of(logits), torch.ones(3)
    how = (1.0, 0.0, 1.0, -100)  # temperature, softcap, logit_scale, ignore_index
    ops = torch.ops.ppo_kernels
    logprob, _, state = ops.logprob_forward(logits, tokens, None, None, *how, True, True, BACKEND)
    with nothing_else_is_read(logits):
        ops.logprob_backward_(
            upstream, 0.3 * upstream, logits, tokens, None, None, logprob, state, *how, BACKEND
        )
    assert torch.equal(logits, expected)


# ---- dtypes --------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_mixed_dtypes_are_those_in_the_wider_one(reverse, first, second):
    logits, ref = example(2, 9001, dtype=torch.float32)
    logits, ref = logits.to(first), ref.to(second)
    wide = torch.float64 if torch.float64 in (first, second) else torch.float32
    if first == second:
        wide = first
    kl, grad = divergence(logits, ref, reverse)
    want_kl, want_grad = divergence(logits.to(wide), ref.to(wide), reverse)
    same((kl, grad), (want_kl, want_grad.to(first)))


# ---- schedules -----------------------------------------------------------------------------------

# Of one step and of several segments; aligned rows and others; less than a vector.
SHAPES = [((3, 5), torch.float32), ((3, 40001), torch.bfloat16), ((3, 40000), torch.float32)]


@pytest.mark.parametrize("function", [policy_loss, divergence, reversed_divergence])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_bits_depend_on_no_schedule(function, shape, dtype):
    logits, ref = example(*shape, dtype=dtype)
    mask = torch.tensor([1, 1, 0])
    expected = function(logits, ref, mask=mask)
    for schedule in cuda_emulated.SCHEDULES:
        with cuda_emulated.scheduled(**schedule):
            same(function(logits, ref, mask=mask), expected)


@FUNCTIONS
def test_bits_of_one_row_are_those_among_many(function):
    """In fp64, which the order of segments shows in; one kernel for many rows has fp32 at most."""
    dtype = torch.float32 if function is policy_loss else torch.float64
    logits, ref = example(1, 20011, dtype=dtype)
    expected = function(logits, ref)
    many = function(logits.expand(5, -1).clone(), ref.expand(5, -1).clone())
    for row in range(5):
        same([t[row, None] for t in many], expected)


# ---- rows that stay on the chip ------------------------------------------------------------------

TWO_PASSES = ["logprob_forward", "logprob_backward"]


@pytest.fixture
def launched(monkeypatch):
    """The kernels of rows that run from here on."""
    names, module = [], cuda_emulated.module()

    def spy(name, kernel, *args):
        names.append(name)
        return kernel(*args)

    for name in ("ppo_rows", *TWO_PASSES):
        monkeypatch.setattr(module, name, partial(spy, name, getattr(module, name)))
    return names


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_one_kernel_gives_the_bits_of_two(monkeypatch, launched, settings):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        example = inputs(dtype=dtype)
        del launched[:]
        got = outcome(*example, **settings)
        assert launched == ["ppo_rows"]
        with monkeypatch.context() as patch:
            patch.setattr(cuda_emulated.module(), "ppo_rows_fit", lambda *row: False)
            expected = outcome(*example, **settings)
        assert launched == ["ppo_rows", *TWO_PASSES]
        same(got, expected)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({"rows": 1, "cols": 1}, {}),  # too few for the device
        ({"rows": 1, "vocab": 60_000}, {}),  # too long for the chip
        ({"dtype": torch.float64}, {}),
        ({}, {"variant": "gspo"}),
    ],
    ids=str,
)
def test_other_rows_take_two_passes(launched, shape, settings):
    outcome(*inputs(**shape), **settings)
    assert launched == TWO_PASSES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_longest_rows_that_fit(launched, dtype):
    """The emulator ends where a block asks for more shared memory than there is."""
    module, code = cuda_emulated.module(), DTYPE_CODES[dtype]
    with cuda_emulated.scheduled(shared_bytes=66_000):
        vocab = max(v for v in range(60_000) if module.ppo_rows_fit(v, code))
        assert 64_000 < vocab * dtype.itemsize < 66_000
        longest = outcome(*inputs(1, 2, vocab, dtype), variant="gpg")
        assert launched == ["ppo_rows"]
        longer = outcome(*inputs(1, 2, vocab + 1, dtype), variant="gpg")
        assert launched == ["ppo_rows", *TWO_PASSES]
    assert longest[-1].any()
    same(outcome(*inputs(1, 2, vocab + 1, dtype), variant="gpg"), longer)


def test_a_bad_label_gives_nan_and_is_noted(monkeypatch):
    monkeypatch.setattr(_faults, "debug", False)
    example = inputs()
    example[-1][1, 2] = True
    example[0][1, 2] = 0.0
    example[1][1, 2] = 300
    loss, *_, grad = outcome(*example)
    assert loss.isnan()
    assert grad[1, 2].isnan().all()
    grad[1, 2] = 0
    assert not grad.isnan().any()
    with pytest.raises(ValueError, match=r"tokens: .* at flat position 6"):
        pk.check()


def test_rows_that_nothing_is_asked_of_are_zeros():
    example = inputs()
    example[4][0] = 0.0
    *_, grad = outcome(*example)
    assert not grad[0].any()
    assert grad[1:].any()
