// The losses of one token and their slopes. Host and device; V is a scalar, or on the host a vector
// of them.
//
// A bound replaces the value only where it is strictly active: at exact ties the gradient flows.
// Comparisons with a NaN are false, so a NaN stays in the value and reaches both the loss and the
// slope.
#pragma once
#include <math.h>

#include "math/host_device.h"

namespace ppok {
namespace PPOK_ISA {

template <class V>
using Flag = decltype(V{} < V{});

// ---- policy -------------------------------------------------------------------------------------

template <class V>
struct PolicyToken {
  V loss, slope;                              // slope = d loss / d log ratio
  Flag<V> above_high, below_low, above_dual;  // which bound cut the gradient
};

// max(-A r, -A clip(r, low, high)), and for A < 0 at most -A dual: the ratio is bounded from above
// where the advantage rewards raising it, from below where it rewards lowering it, and d(-A r) / d
// log r = -A r.
template <class V, bool kDual>
struct ClippedRatio {
  V low, high, dual;
  PPOK_HD PolicyToken<V> operator()(V ratio, V advantage) const {
    const V zero{};
    const Flag<V> above_high = (advantage > zero) & (ratio > high);
    const Flag<V> below_low = (advantage < zero) & (ratio < low);
    const Flag<V> above_dual = kDual ? (advantage < zero) & (ratio > dual) : Flag<V>{};
    V bounded = above_high ? high : ratio;
    bounded = below_low ? low : bounded;
    bounded = above_dual ? dual : bounded;
    const V loss = zero - advantage * bounded;
    return {loss, (above_high | below_low | above_dual) ? zero : loss, above_high, below_low,
            above_dual};
  }
};

// ---- value --------------------------------------------------------------------------------------

template <class V>
struct ValueToken {
  V loss, slope;  // slope = d loss / d value
  Flag<V> clipped;
};

// max(h(v - R), h(old + clip(v - old, -clip, clip) - R)); h(e) = e^2 / 2, beyond huber_delta delta
// (|e| - delta / 2). h grows with |e|, so the larger error decides. clip = huber_delta = inf turns
// either off.
template <class V>
struct ClippedValue {
  V clip, huber_delta;
  PPOK_HD ValueToken<V> operator()(V value, V old_value, V target) const {
    const V moved = value - old_value;
    const V own =
        moved == moved ? value : moved;  // NaN here must not be lost to a comparison below
    V near_old = moved > clip ? old_value + clip : own;
    near_old = moved < V{} - clip ? old_value - clip : near_old;
    const V error = own - target, near_error = near_old - target;
    const Flag<V> clipped = magnitude(near_error) > magnitude(error);
    const V e = clipped ? near_error : error;
    V slope = e > huber_delta ? huber_delta : e;
    slope = e < V{} - huber_delta ? V{} - huber_delta : slope;
    const V size = magnitude(e);
    const V loss = size > huber_delta ? huber_delta * (size - huber_delta * 0.5f) : e * e * 0.5f;
    return {loss, clipped ? V{} : slope, clipped};
  }
  PPOK_HD static V magnitude(V x) { return x < V{} ? V{} - x : x; }
};

}  // namespace PPOK_ISA
}  // namespace ppok
