"""Device functions that every family may use."""

import triton
import triton.language as tl

from .. import _checks

LOG2E = tl.constexpr(1.44269504088896340736)
LN2 = tl.constexpr(0.69314718055994530942)
INF = tl.constexpr(float("inf"))
# (tanh(x) - x) / x^3 as a polynomial in x^2, for |x| < 0.55: minimax, relative error 2^-24.6.
_TANH_0 = tl.constexpr(-0.3333295750930233)
_TANH_1 = tl.constexpr(0.13320942131729685)
_TANH_2 = tl.constexpr(-0.05268415636285518)
_TANH_3 = tl.constexpr(0.01645877998099963)

# Bits of a fault: the flat position above, what is wrong below; the smallest is the first.
FAULT_KIND_BITS = tl.constexpr(_checks.FAULT_KIND_BITS)
BAD_TOKEN = tl.constexpr(_checks.BAD_TOKEN)
BAD_TEMPERATURE = tl.constexpr(_checks.BAD_TEMPERATURE)
BAD_OFFSETS = tl.constexpr(_checks.BAD_OFFSETS)
BAD_LAMBDA = tl.constexpr(_checks.BAD_LAMBDA)
BAD_VALUE_LAMBDA = tl.constexpr(_checks.BAD_VALUE_LAMBDA)
BAD_COEFFICIENT = tl.constexpr(_checks.BAD_COEFFICIENT)


@triton.jit
def report_fault(faults, position, kind):
    """Keep the first fault of the device until `ppo_kernels.check` asks for it."""
    tl.atomic_min(faults, (position << FAULT_KIND_BITS) | kind, sem="relaxed")


@triton.jit
def position(i, cols):
    """Flat position i of [B, T], its row and its column, for 64-bit offsets.

    Divided in 32 bits, which the grid is limited to anyway: 64 take a call that spills.
    """
    return i.to(tl.int64), (i // cols).to(tl.int64), (i % cols).to(tl.int64)


@triton.jit
def tree_sum(x):
    """The sum of a block [2^k], in one order whatever registers hold it.

    tl.sum follows the layout, which follows the alignment of what was loaded: its bits would depend
    on a storage offset. Halving adds element i to element i + n/2 and nothing else.
    """
    for _ in tl.static_range(20):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2]), axis=0)  # exactly one order: two terms
    return tl.sum(x, axis=0)  # exactly one order: one term


@triton.jit
def exp2_of_double(y, DTYPE: tl.constexpr):
    """2^y of an fp64 y as DTYPE, with full relative accuracy however large |y| is."""
    if DTYPE == tl.float64:
        result = tl.exp2(y)
    else:
        y = tl.where(y < -1000.0, -1000.0, tl.where(y > 1000.0, 1000.0, y))
        whole = tl.floor(y + 0.5)
        result = tl.exp2((y - whole).to(tl.float32)) * tl.exp2(whole.to(tl.float32))
    return result


@triton.jit
def reciprocal(x):
    """1 / x of an fp64 x > 0, within an ulp or two: dividing in fp64 takes a call, which spills."""
    r = (1.0 / x.to(tl.float32)).to(tl.float64)
    for _ in tl.static_range(2):  # Newton's steps double the digits
        r = tl.where(r < INF, r * (2.0 - x * r), r)
    return r


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], by Kahan: the rounding of 1 + x cancels."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, by Kahan."""
    u = tl.exp(x)
    less = u - 1.0
    return tl.where(u == 1.0, x, tl.where(less == -1.0, -1.0, less * (x / tl.log(u))))


@triton.jit
def tanh(x):
    """Within 2 ulp: by exponentials, near 0 (where they cancel) by a polynomial."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    t = tl.where(x < 0.0, -t, t)
    if x.dtype == tl.float32:
        square = x * x
        series = tl.fma(square, _TANH_3, _TANH_2)
        series = tl.fma(square, series, _TANH_1)
        series = tl.fma(square, series, _TANH_0)
        t = tl.where(tl.abs(x) < 0.55, tl.fma(x * square, series, x), t)
    return t


@triton.jit
def sech2(x):
    """1 - tanh(x)^2 without its cancellation."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def divide(x, y):
    """The fp64 quotient x / y for y > 0 in the range of fp32, within an ulp: see `reciprocal`."""
    r = reciprocal(y)
    q = x * r
    return tl.where(tl.abs(q) < INF, tl.fma(tl.fma(-q, y, x), r, q), q)


@triton.jit
def nonzero(mask):
    """Whether each element of a mask of any dtype is live; NaN is."""
    if mask.dtype == tl.bfloat16:
        mask = mask.to(tl.float32)
    return mask != 0


@triton.jit
def exponential(t):
    """e^t, and e^t - 1 and e^t - 1 - t to relative accuracy near 0: see csrc/math/kl.h."""
    large = ~((t < 1.0) & (t > -1.0))
    square = t * t
    if t.dtype == tl.float64:
        e = tl.exp(t)
        series = 1.0 + t * (1.0 / 18)
        for n in tl.static_range(17, 2, -1):
            series = 1.0 + t * (1.0 / n) * series
        rest = 0.5 * square * series
        near_one = e
    else:
        e = exp2_of_double(t.to(tl.float64) * LOG2E, tl.float32)
        low = (t * 0.1666666716 + 0.5) + square * (t * 0.0083333104849 + 0.0416667349637)
        high = (t * 1.98440233362e-4 + 1.38854514807e-3) + square * (
            t * 2.77228377854e-6 + 2.5354831450386e-5
        )
        rest = square * (low + square * square * high)
        near_one = (t + rest) + 1.0
    above = e - 1.0
    return (
        tl.where(large, e, near_one),
        tl.where(large, above, t + rest),
        tl.where(large, above - t, rest),
    )


@triton.jit
def clamp(x, limit):
    """To [-limit, limit]; a NaN stays."""
    return tl.where(x < -limit, -limit, tl.where(x > limit, limit, x))


@triton.jit
def isnan(x):
    return x != x  # noqa: PLR0124
