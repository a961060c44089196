"""Loss and slope of one token: the formulas of ``csrc/math/losses.h``, for kernels to call."""

import triton
import triton.language as tl

from ._math import INF, LOG2E, clamp, exp2_of_double, isnan

# enum PolicyVariant of csrc/kernels.h.
CISPO = tl.constexpr(1)
SAPO = tl.constexpr(2)
GPG = tl.constexpr(3)
GSPO = tl.constexpr(4)
GMPO = tl.constexpr(5)
# enum Correction.
TIS = tl.constexpr(0)
TIS_SEQUENCE = tl.constexpr(1)
TIS_GEOMETRIC = tl.constexpr(2)
ICEPOP = tl.constexpr(3)
MASK_GEOMETRIC = tl.constexpr(5)


@triton.jit
def clipped_ratio(ratio, advantage, low, high, dual):
    """Loss, d loss / d log ratio, and which bound cut it."""
    above_high = (advantage > 0.0) & (ratio > high)
    below_low = (advantage < 0.0) & (ratio < low)
    above_dual = (advantage < 0.0) & (ratio > dual)
    bounded = tl.where(above_high, high, tl.where(below_low, low, ratio))
    bounded = tl.where(above_dual, dual, bounded)
    loss = 0.0 - advantage * bounded
    slope = tl.where(above_high | below_low | above_dual, 0.0, loss)
    return loss, slope, above_high, below_low, above_dual


@triton.jit
def weighted_logprob(logprob, ratio, advantage, low, high):
    """-w A logprob with the constant w = clip(r, low, high)."""
    above_high = ratio > high
    below_low = ratio < low
    slope = 0.0 - tl.where(above_high, high, tl.where(below_low, low, ratio)) * advantage
    return slope * logprob, slope, above_high, below_low, ratio < -INF


@triton.jit
def soft_gate(ratio, ratio_minus_one, advantage, low, high):
    """-A (4 / tau) sigmoid(tau (r - 1)), tau = high where A > 0, else low."""
    tau = tl.where(advantage > 0.0, high, low)
    z = tau * ratio_minus_one
    e = exp2_of_double(tl.where(z > 0.0, -z, z).to(tl.float64) * LOG2E, z.dtype)
    near = 1.0 / (1.0 + e)
    far = e / (1.0 + e)
    both = near * far
    loss = 0.0 - advantage * (tl.where(z > 0.0, near, far) * 4.0 / tau)
    slope = 0.0 - advantage * tl.where(both == 0.0, 0.0, both * ratio * 4.0)
    never = ratio < -INF
    return loss, slope, never, never, never


@triton.jit
def bounded_log_ratio(x, advantage, low, high):
    """At most `high` where A > 0, at least `low` where A < 0; and which bound cut it."""
    above_high = (advantage > 0.0) & (x > high)
    below_low = (advantage < 0.0) & (x < low)
    return tl.where(above_high, high, tl.where(below_low, low, x)), above_high, below_low


@triton.jit
def policy_loss(
    logprob, moved, x, ratio, ratio_minus_one, advantage, of_sequence, low, high, dual, limit,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """Loss, d loss / d logprob, and which bound replaced the ratio; x is `moved` within a limit."""
    never = ratio < -INF
    if VARIANT == CISPO:
        result = weighted_logprob(logprob, ratio, advantage, low, high)
    elif VARIANT == SAPO:
        result = soft_gate(ratio, ratio_minus_one, advantage, low, high)
    elif VARIANT == GPG:
        result = (0.0 - advantage) * logprob, 0.0 - advantage, never, never, never
    elif VARIANT == GSPO:
        result = clipped_ratio(of_sequence, advantage, low, high, dual)
    elif VARIANT == GMPO:
        _, above, below = bounded_log_ratio(x, advantage, low, high)
        result = of_sequence, tl.where(above | below, 0.0, of_sequence), above, below, never
    else:
        result = clipped_ratio(ratio, advantage, low, high, dual)
    loss, slope, above_high, below_low, above_dual = result
    if VARIANT != CISPO and VARIANT != GPG:  # noqa: PLR1714
        slope = tl.where((moved > limit) | (moved < -limit), 0.0, slope)
    return loss, slope, above_high, below_low, above_dual


@triton.jit
def importance_weight(ratio, low, high, KIND: tl.constexpr):
    """The weight, and whether the ratio is outside of [low, high]."""
    outside = (ratio > high) | (ratio < low)
    if KIND == TIS or KIND == TIS_SEQUENCE or KIND == TIS_GEOMETRIC:  # noqa: PLR1714, SIM109
        weight = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    elif KIND == ICEPOP:
        weight = tl.where(outside, 0.0, ratio)
    else:
        weight = tl.where(outside, 0.0, tl.where(isnan(ratio), ratio, 1.0))
    return weight, outside


@triton.jit
def clipped_value(value, old, target, clip, huber_delta):
    """Loss, d loss / d value, and whether the clipped error is the larger."""
    moved = value - old
    own = tl.where(isnan(moved), moved, value)  # NaN must not be lost to a comparison below
    near_old = tl.where(moved > clip, old + clip, tl.where(moved < -clip, old - clip, own))
    error = own - target
    near_error = near_old - target
    clipped = tl.abs(near_error) > tl.abs(error)
    error = tl.where(clipped, near_error, error)
    size = tl.abs(error)
    linear = huber_delta * (size - huber_delta * 0.5)
    loss = tl.where(size > huber_delta, linear, error * error * 0.5)
    return loss, tl.where(clipped, 0.0, clamp(error, huber_delta)), clipped
