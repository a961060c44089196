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
  V loss, slope;                              // slope = d loss / d logprob
  Flag<V> above_high, below_low, above_dual;  // which bound replaced the ratio
};

// A token as the variants see it: with x = log ratio, clamped, and what they made of its sequence.
template <class V>
struct PolicyInput {
  V logprob, x, ratio, ratio_minus_one, advantage, of_sequence;
};

template <class V>
struct PolicyNumbers {
  V low, high, dual;
};

// A variant's of() maps a token to its loss. kThroughRatio: its gradient ends where log ratios are
// clamped. kOfSequence: statistic() makes one number of the means that a sequence has of term() and
// of its advantages.
struct TokenVariant {
  static constexpr bool kThroughRatio = true, kOfSequence = false;
};
struct SequenceVariant {
  static constexpr bool kThroughRatio = true, kOfSequence = true;
};

// max(-A r, -A clip(r, low, high)), and for A < 0 at most -A dual: the ratio is bounded from above
// where the advantage rewards raising it, from below where it rewards lowering it, and d(-A r) / d
// log r = -A r.
template <bool kDual>
struct ClippedRatio : TokenVariant {
  template <class V>
  PPOK_HD static PolicyToken<V> clip(V ratio, V advantage, const PolicyNumbers<V>& n) {
    const V zero{};
    const Flag<V> above_high = (advantage > zero) & (ratio > n.high);
    const Flag<V> below_low = (advantage < zero) & (ratio < n.low);
    const Flag<V> above_dual = kDual ? (advantage < zero) & (ratio > n.dual) : Flag<V>{};
    V bounded = above_high ? n.high : ratio;
    bounded = below_low ? n.low : bounded;
    bounded = above_dual ? n.dual : bounded;
    const V loss = zero - advantage * bounded;
    return {loss, (above_high | below_low | above_dual) ? zero : loss, above_high, below_low,
            above_dual};
  }
  template <class V, class Exp>
  PPOK_HD static PolicyToken<V> of(const PolicyInput<V>& in, const PolicyNumbers<V>& n, Exp) {
    return clip(in.ratio, in.advantage, n);
  }
};

// -w A logprob with the constant w = clip(r, low, high).
struct WeightedLogprob : TokenVariant {
  static constexpr bool kThroughRatio = false;
  template <class V, class Exp>
  PPOK_HD static PolicyToken<V> of(const PolicyInput<V>& in, const PolicyNumbers<V>& n, Exp) {
    const Flag<V> above_high = in.ratio > n.high, below_low = in.ratio < n.low;
    const V weight = above_high ? n.high : below_low ? n.low : in.ratio;
    const V slope = V{} - weight * in.advantage;
    return {slope * in.logprob, slope, above_high, below_low, Flag<V>{}};
  }
};

// -A (4 / tau) s, s = sigmoid(tau (r - 1)), and d s / d log r = tau s (1 - s) r; tau is high where
// A > 0, else low. Both s and 1 - s keep their digits, and r may overflow where s is 1.
struct SoftGate : TokenVariant {
  template <class V, class Exp>
  PPOK_HD static PolicyToken<V> of(const PolicyInput<V>& in, const PolicyNumbers<V>& n, Exp exp) {
    const V zero{}, one = zero + 1.f;
    const V tau = in.advantage > zero ? n.high : n.low;
    const V z = tau * in.ratio_minus_one;
    const V e = exp(z > zero ? zero - z : z, zero == zero);
    const V near = one / (one + e), far = e / (one + e);
    const V both = near * far;
    return {zero - in.advantage * ((z > zero ? near : far) * 4.f / tau),
            zero - in.advantage * (both == zero ? zero : both * in.ratio * 4.f), Flag<V>{},
            Flag<V>{}, Flag<V>{}};
  }
};

// -A logprob.
struct PolicyGradient : TokenVariant {
  static constexpr bool kThroughRatio = false;
  template <class V, class Exp>
  PPOK_HD static PolicyToken<V> of(const PolicyInput<V>& in, const PolicyNumbers<V>&, Exp) {
    const V slope = V{} - in.advantage;
    return {slope * in.logprob, slope, Flag<V>{}, Flag<V>{}, Flag<V>{}};
  }
};

// The clipped ratio with exp(mean of x) in the place of r, whose derivative in x is taken to be
// itself: of the mean over the sequence that is its gradient.
struct ClippedSequenceRatio : SequenceVariant {
  template <class V>
  PPOK_HD static V term(V x, V, const PolicyNumbers<V>&) {
    return x;
  }
  PPOK_HD static double statistic(double x, double) { return exp(x); }
  template <class V, class Exp>
  PPOK_HD static PolicyToken<V> of(const PolicyInput<V>& in, const PolicyNumbers<V>& n, Exp) {
    return ClippedRatio<true>::clip(in.of_sequence, in.advantage, n);
  }
};

// -(mean of A) exp(mean of x), x at most high where A > 0 and at least low where A < 0. Every token
// has the loss of its sequence.
struct GeometricMean : SequenceVariant {
  template <class V>
  PPOK_HD static V term(V x, V advantage, const PolicyNumbers<V>& n) {
    const V below = (advantage > V{}) & (x > n.high) ? n.high : x;
    return (advantage < V{}) & (x < n.low) ? n.low : below;
  }
  PPOK_HD static double statistic(double x, double advantage) { return -advantage * exp(x); }
  template <class V, class Exp>
  PPOK_HD static PolicyToken<V> of(const PolicyInput<V>& in, const PolicyNumbers<V>& n, Exp) {
    const Flag<V> above_high = (in.advantage > V{}) & (in.x > n.high);
    const Flag<V> below_low = (in.advantage < V{}) & (in.x < n.low);
    return {in.of_sequence, (above_high | below_low) ? V{} : in.of_sequence, above_high, below_low,
            Flag<V>{}};
  }
};

// ---- importance ---------------------------------------------------------------------------------

template <class V>
struct Weight {
  V weight;
  Flag<V> limited;  // the ratio is outside of [low, high]
};

template <class V>
PPOK_HD inline Flag<V> outside(V ratio, V low, V high) {
  return (ratio > high) | (ratio < low);
}

struct ClampedWeight {
  template <class V>
  PPOK_HD static Weight<V> of(V ratio, V low, V high) {
    const V bounded = ratio > high ? high : ratio;
    return {ratio < low ? low : bounded, outside(ratio, low, high)};
  }
};

struct BandedWeight {
  template <class V>
  PPOK_HD static Weight<V> of(V ratio, V low, V high) {
    const Flag<V> limited = outside(ratio, low, high);
    return {limited ? V{} : ratio, limited};
  }
};

// 1 in the place of the ratio, but not of NaN.
struct KeptWeight {
  template <class V>
  PPOK_HD static Weight<V> of(V ratio, V low, V high) {
    const V kept = ratio == ratio ? V{} + 1.f : ratio;
    const Flag<V> limited = outside(ratio, low, high);
    return {limited ? V{} : kept, limited};
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
