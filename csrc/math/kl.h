// Per-token KL estimators of d = log p - log p_ref, and their derivatives in d. Host and device.
//
// V is the scalar S or a vector of it; exp_of is its exponential.
#pragma once
#include <stdint.h>

#include "math/host_device.h"

namespace ppok {
namespace PPOK_ISA {

// The order of ESTIMATORS in ppo_kernels/cpu/kl.py.
enum Estimator : int64_t { kK1, kK2, kK3, kAbs };

template <class S, class V>
PPOK_HD inline V clamp_ratio(V d, S limit) {
  return d < -limit ? V{} - limit : d > limit ? V{} + limit : d;
}

// e^t - 1 and e^t - 1 - t, made from t and e^t to relative accuracy.
template <class V>
struct ExpMinus {
  V one, one_and_t;
};

template <class S, class V>
PPOK_HD inline ExpMinus<V> exp_minus(V t, V exp_t) {
  constexpr int kDegree = sizeof(S) == 4 ? 11 : 18;
  V series = V{} + S(1);
  for (int n = kDegree; n > 2; --n) series = series * (t * S(1. / n)) + S(1);
  const V square = t * t * S(0.5) * series, above = exp_t - S(1);
  const auto small = (t < S(1)) & (t > S(-1));
  return {small ? t + square : above, small ? square : above - t};
}

template <Estimator kEstimator, class S, class V, class Exp>
PPOK_HD inline V kl_value(V d, Exp exp_of) {
  if (kEstimator == kK1) return d;
  if (kEstimator == kK2) return d * d * S(0.5);
  if (kEstimator == kK3) return exp_minus<S>(-d, exp_of(-d)).one_and_t;
  return d < S(0) ? -d : d;
}

template <Estimator kEstimator, class S, class V, class Exp>
PPOK_HD inline V kl_slope(V d, Exp exp_of) {
  if (kEstimator == kK1) return V{} + S(1);
  if (kEstimator == kK2) return d;
  if (kEstimator == kK3) return -exp_minus<S>(-d, exp_of(-d)).one;
  return d < S(0) ? V{} - S(1) : d > S(0) ? V{} + S(1) : V{};
}

}  // namespace PPOK_ISA
}  // namespace ppok
