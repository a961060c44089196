// The steps of the discounted scans: advantages, returns and their adjoint, V-trace. Host and
// device.
//
// Every product is fused with its sum where the target has the instruction, and nowhere else, so
// that the same step gives the same bits in every loop it is compiled into.
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>

#include "math/host_device.h"

namespace ppok {
namespace PPOK_ISA {

// What a step says about itself; a masked step says nothing (0).
enum StepCode : uint8_t { kLive = 1, kTerminated = 2, kTruncated = 4 };
constexpr uint8_t kCut = kTerminated | kTruncated;  // nothing accumulated later reaches this step

PPOK_HD inline double mul_add(double a, double b, double c) {
#if defined(__FP_FAST_FMA) || defined(__CUDA_ARCH__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// delta = r + gamma v' - v; v' is 0 after a terminated step.
PPOK_HD inline double td_error(double reward, double value, double next_value, double gamma) {
  return mul_add(gamma, next_value, reward - value);
}

// One step of x_t = delta_t + c x_{t+1}. A coefficient of 0 cuts: what lies beyond is not looked
// at, NaN included.
PPOK_HD inline double scan_step(double coefficient, double accumulated, double delta) {
  return mul_add(coefficient, coefficient > 0. ? accumulated : 0., delta);
}

// Products of coefficients above 0 stay normal numbers, so that an infinite carry times a product
// is still infinite, and a carry of 0 still 0.
PPOK_HD inline double clamp_power(double power) {
  return power < DBL_MIN ? DBL_MIN : power > DBL_MAX ? DBL_MAX : power;
}

// Of a run of steps: what it makes of nothing carried into it, and the factor by which a carry
// enters.
struct alignas(16) Transfer {
  double sum, factor;
};

// Of two runs, one scanned after the other.
PPOK_HD inline Transfer joined(const Transfer& earlier, const Transfer& later) {
  const double both = earlier.factor * later.factor;
  const bool cut = !(earlier.factor > 0. && later.factor > 0.);
  return {scan_step(later.factor, earlier.sum, later.sum), cut ? both : clamp_power(both)};
}

// V-trace: the probability ratio of a step, truncated; a NaN stays.
PPOK_HD inline double truncated(double ratio, double clip) { return ratio > clip ? clip : ratio; }

// rho (r + gamma (v' + x') - v), where x' is what the scan made of the next step.
PPOK_HD inline double vtrace_advantage(double rho, double td_error, double beyond, double gamma) {
  return rho * mul_add(gamma, beyond, td_error);
}

// dL/dv_t of D = dL/ddelta: a value is in its own return and delta, and, discounted, in the delta
// of the step before.
PPOK_HD inline double value_gradient(double grad_return, double d, double discounted_before) {
  return grad_return - d + discounted_before;
}

}  // namespace PPOK_ISA
}  // namespace ppok
