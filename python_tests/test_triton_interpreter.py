"""The repaired interpreter itself: what it must compute, and the bugs it must not let pass."""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import interpreter
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

OUT_OF_BOUNDS = pytest.raises(InterpreterError, match="OutOfBounds")


@triton.jit
def copy(source, target, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < n).to(tl.float32), mask=at < n)


@triton.jit
def copy_strided(source, stride, target, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at * stride, mask=at < n), mask=at < n)


def test_bf16_is_rounded_as_torch_rounds():
    bits = torch.arange(2**16, dtype=torch.int32) << 16
    near = torch.cat([bits + d for d in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = near.view(torch.float32)
    got = torch.empty(x.numel(), dtype=torch.bfloat16)
    size = triton.next_power_of_2(x.numel())
    copy[(1,)](x, got, x.numel(), BLOCK=size)
    torch.testing.assert_close(got, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(got.numel())
    copy[(1,)](got, back, x.numel(), BLOCK=size)
    torch.testing.assert_close(back, got.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [8, 9])
def test_a_load_or_store_past_the_end_is_caught(n):
    long, short = torch.zeros(16), torch.zeros(8)
    for tensors in ((long, short), (short, long)):
        if n == 8:
            copy[(1,)](*tensors, n, BLOCK=16)
        else:
            with OUT_OF_BOUNDS:
                copy[(1,)](*tensors, n, BLOCK=16)


def test_a_load_between_the_elements_is_caught():
    every_second = torch.zeros(16)[::2]
    copy_strided[(1,)](every_second, 2, torch.zeros(8), 8, BLOCK=8)
    with OUT_OF_BOUNDS:
        copy_strided[(1,)](every_second, 1, torch.zeros(8), 8, BLOCK=8)
    with OUT_OF_BOUNDS:
        copy_strided[(1,)](torch.zeros(3, 4)[:, :2], 1, torch.zeros(8), 5, BLOCK=8)
    copy_strided[(1,)](torch.zeros(1).expand(8), 0, torch.zeros(8), 8, BLOCK=8)


@triton.jit
def sum_of_all(source, target, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target, tl.sum(tl.load(source + at, mask=at < n), axis=0))


def test_lanes_masked_off_without_a_value_show():
    x, total = torch.ones(5), torch.zeros(1)
    sum_of_all[(1,)](x, total, 5, BLOCK=8)
    assert total.isnan()


@triton.jit
def double_it(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(source + at)
    tl.store(target + at, x + x)


def test_arithmetic_in_bf16_is_refused():
    double_it[(1,)](torch.ones(4), torch.ones(4), BLOCK=4)
    with pytest.raises(InterpreterError, match="arithmetic in bf16: widen after the load"):
        double_it[(1,)](torch.ones(4).bfloat16(), torch.ones(4).bfloat16(), BLOCK=4)


@triton.jit
def write_floats(target, double: tl.float64, single):
    tl.store(target, double)
    tl.store(target + 1, single)


def test_floats_arrive_in_their_declared_type():
    out = torch.zeros(2, dtype=torch.float64)
    write_floats[(1,)](out, 0.1, 0.1)
    assert out.tolist() == [0.1, float(np.float32(0.1))]


@triton.jit
def extremes(source, target, BLOCK: tl.constexpr):
    x = tl.load(source + tl.arange(0, BLOCK))
    tl.store(target, tl.max(x, axis=0))
    tl.store(target + 1, tl.min(x, axis=0))
    tl.store(target + 2, tl.maximum(tl.load(source), 2.0))
    tl.store(target + 3, tl.fma(tl.load(source + 1), tl.load(source + 1), tl.load(source + 2)))


def test_extremes_drop_nan_and_fma_rounds_once():
    x = torch.tensor([torch.nan, 1 + 2**-20, -1 - 2**-19, -7.0])
    out = torch.empty(4)
    extremes[(1,)](x, out, BLOCK=4)
    assert out.tolist() == [1 + 2**-20, -7.0, 2.0, 2**-40]


@triton.jit
def _after(a, b):
    return b + 0.0 * a


@triton.jit
def _affine(a, x, b, y):
    return a * b, b * x + y


@triton.jit
def _average(a, b):
    return 0.5 * (a + b)


@triton.jit
def scans(source, linear, averaged, reduced, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(source + at)
    _, y = tl.associative_scan((x * 0.0 + 0.5, x), 0, _affine, reverse=REVERSE)
    tl.store(linear + at, y)
    tl.store(averaged + at, tl.associative_scan(x, 0, _average, reverse=REVERSE))
    tl.store(reduced, tl.reduce(x, 0, _average))


@pytest.mark.parametrize("reverse", [False, True])
def test_scans_run_as_trees(reverse):
    """An associative function gives the serial result; another one does not."""
    x = torch.arange(1.0, 9.0)
    linear, averaged, reduced = torch.empty(8), torch.empty(8), torch.empty(1)
    scans[(1,)](x, linear, averaged, reduced, BLOCK=8, REVERSE=reverse)

    def serial(step):
        out, total = [], None
        for v in reversed(x.tolist()) if reverse else x.tolist():
            total = v if total is None else step(total, v)
            out.append(total)
        return out[::-1] if reverse else out

    assert linear.tolist() == serial(lambda total, v: 0.5 * total + v)
    assert averaged.tolist() != serial(lambda total, v: 0.5 * (total + v))
    assert reduced.item() == x.mean()


@triton.jit
def offset_in_32_bits(target, i):
    tl.store(target + (i * 65536).to(tl.int64) * 0, 1.0)


def test_integers_that_overflow_are_caught():
    offset_in_32_bits[(1,)](torch.zeros(1), 7)
    with pytest.raises(InterpreterError, match="multiply overflows 32 bits"):
        offset_in_32_bits[(1,)](torch.zeros(1), 65536)


def test_only_this_process_serves_cpu_tensors_in_triton():
    from ppo_kernels import _op

    assert _op.BACKENDS["triton"].devices == ("cuda", "cpu")
    assert interpreter.interpreter.InterpreterBuilder.create_fma is interpreter._fma
