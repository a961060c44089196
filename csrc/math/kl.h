// Per-token KL estimators of d = log p - log p_ref, and their derivatives in d. Host and device.
//
// V is the scalar S or a vector of it.
#pragma once
#include <math.h>
#include <stdint.h>

#include "math/host_device.h"

namespace ppok {
namespace PPOK_ISA {

// The order of ESTIMATORS in ppo_kernels/native/kl.py.
enum Estimator : int64_t { kK1, kK2, kK3, kAbs };

template <class S, class V>
PPOK_HD inline V clamp_ratio(V d, S limit) {
  return d < -limit ? V{} - limit : d > limit ? V{} + limit : d;
}

// (e^t - 1 - t) / t^2 for |t| < 1. fp32: minimax for the relative error (1e-8), in pairs of terms,
// so that the chain is short; fp64: Taylor.
template <class V>
PPOK_HD inline V exp_remainder(V t, V square, float) {
  const V low = (t * 0.1666666716f + 0.5f) + square * (t * 0.0083333104849f + 0.0416667349637f);
  const V high = (t * 1.98440233362e-4f + 1.38854514807e-3f) +
                 square * (t * 2.77228377854e-6f + 2.5354831450386e-5f);
  return low + square * square * high;
}

template <class V>
PPOK_HD inline V exp_remainder(V t, V, double) {
  double inverse = 1., series[17];
  for (int n = 2; n < 19; ++n) series[n - 2] = inverse /= n;
  V sum = V{};
  for (int n = 16; n >= 0; --n) sum = sum * t + series[n];
  return sum;
}

// e^t, and e^t - 1 and e^t - 1 - t to relative accuracy near 0.
template <class V>
struct Exponential {
  V exp, minus_one, minus_one_and_t;
};

// exp_of(t, where) is asked for e^t where `where` holds; elsewhere it may give anything. fp32 takes
// the small ones from the remainder, which it needs anyway.
template <class S, class V, class Exp>
PPOK_HD inline Exponential<V> exponential(V t, Exp exp_of) {
  constexpr bool kSeries = sizeof(S) == sizeof(float);
  const auto large = ((t < S(1)) & (t > S(-1))) == 0;
  const V square = t * t, rest = square * exp_remainder(t, square, S());
  const V e = exp_of(t, kSeries ? large : large == large), above = e - S(1);
  const V near_one = kSeries ? (t + rest) + S(1) : e;
  return {large ? e : near_one, large ? above : t + rest, large ? above - t : rest};
}

template <Estimator kEstimator, class S, class V, class Exp>
PPOK_HD inline V kl_value(V d, Exp exp_of) {
  if (kEstimator == kK1) return d;
  if (kEstimator == kK2) return d * d * S(0.5);
  if (kEstimator == kK3) return exponential<S>(-d, exp_of).minus_one_and_t;
  return d < S(0) ? -d : d;
}

template <Estimator kEstimator, class S, class V, class Exp>
PPOK_HD inline V kl_slope(V d, Exp exp_of) {
  if (kEstimator == kK1) return V{} + S(1);
  if (kEstimator == kK2) return d;
  if (kEstimator == kK3) return -exponential<S>(-d, exp_of).minus_one;
  return d < S(0) ? V{} - S(1) : d > S(0) ? V{} + S(1) : V{};
}

// d (upstream value(clamp(d))) / dd, 0 where the clamp is active.
template <Estimator kEstimator, class S, class V, class Exp>
PPOK_HD_INLINE V kl_gradient(V d, S limit, V upstream, Exp exp_of) {
  const V slope = kl_slope<kEstimator, S>(d, exp_of);
  return (d > limit) | (d < -limit) ? V{} : upstream * slope;
}

// ---- rewards ------------------------------------------------------------------------------------

PPOK_HD inline bool is_coefficient(double beta) { return beta >= 0. && beta < INFINITY; }

template <class V, class S>
PPOK_HD inline V kl_reward(V kl, S beta) {
  return kl * -beta;
}

// With the score of the sequence, on its last live token.
PPOK_HD inline double last_reward(double score, double kl, double beta) {
  return score - beta * kl;
}

template <Estimator kEstimator>
struct Chosen {
  static constexpr Estimator value = kEstimator;
};

PPOK_EITHER
template <class Body>
PPOK_HD auto with_estimator(int64_t estimator, Body&& body) {
  switch (estimator) {
    case kK1:
      return body(Chosen<kK1>());
    case kK2:
      return body(Chosen<kK2>());
    case kK3:
      return body(Chosen<kK3>());
    default:
      return body(Chosen<kAbs>());
  }
}

}  // namespace PPOK_ISA
}  // namespace ppok
