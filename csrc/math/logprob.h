// The log-softmax of one row, from partial sums: state, merge and result. Host and device.
//
// The row is summed WITHOUT its target, so that log p = -softplus(log sum_others - z_target) keeps
// its relative accuracy where p is near 1 (there z - log-sum-exp cancels to 0). Elements equal to
// the maximum are counted apart from the rest, so that log(sum) = log1p(rest) and the entropy
// survive when another token holds all the mass.
#pragma once
#include <math.h>

#include "math/host_device.h"

namespace ppok {
namespace PPOK_ISA {

// Sum over j of exp((u_j - max) c) = at_max + rest; slope = sum of exp((u_j - max) c) (u_j - max)
// c. The empty state is {-inf, 0, 0, 0}. A NaN element makes rest NaN and leaves max alone.
template <class S>
struct PartialSums {
  S max, at_max, rest, slope;
};
using RowSums = PartialSums<double>;

PPOK_HD inline RowSums empty_row() { return {-INFINITY, 0., 0., 0.}; }

// The same sums against a larger maximum; weight = exp(gap), and the gap has the slope's unit.
template <class S>
PPOK_HD inline PartialSums<S> rebase(const PartialSums<S>& low, S max, S gap, S weight) {
  const S mass = low.at_max + low.rest;  // gap * mass is 0 where the weight is: not -inf * 0
  return {max, S(0), weight * mass, weight == S(0) ? S(0) : weight * (low.slope + gap * mass)};
}

PPOK_HD inline RowSums merge(const RowSums& a, const RowSums& b, double c) {
  const RowSums high = a.max >= b.max ? a : b;
  const RowSums low = a.max >= b.max ? b : a;
  if (low.max == -INFINITY)
    return {high.max, high.at_max, high.rest + low.rest, high.slope + low.slope};
  if (low.max == high.max)
    return {high.max, a.at_max + b.at_max, a.rest + b.rest, a.slope + b.slope};
  const double gap = (low.max - high.max) * c;
  const RowSums rebased = rebase(low, high.max, gap, exp(gap));
  return {high.max, high.at_max, high.rest + rebased.rest, high.slope + rebased.slope};
}

PPOK_HD inline double highest(const RowSums& sums) { return sums.max; }

struct RowResult {
  double logprob, entropy;
  double max, log_sum, mean;  // of the whole row: what backward needs; mean = E[(u - max) c]
};

PPOK_HD inline double softplus(double x) { return x > 0. ? x + log1p(exp(-x)) : log1p(exp(x)); }

PPOK_HD inline RowResult finish(const RowSums& others, double target, double c) {
  if (target == INFINITY || others.max == INFINITY ||
      (target == -INFINITY && others.max == -INFINITY))
    target = NAN;
  const double others_minus_target =
      others.max == -INFINITY
          ? (others.rest + target) * 0. - INFINITY  // V = 1, or the rest forbidden
          : log(others.at_max + others.rest) - (target - others.max) * c;
  const RowSums row = merge(others, RowSums{target, 1., target != target ? target : 0., 0.}, c);
  const double log_sum = row.at_max == 1. ? log1p(row.rest) : log(row.at_max + row.rest);
  const double mean = row.slope / (row.at_max + row.rest);
  return {0. - softplus(others_minus_target), log_sum - mean, row.max, log_sum, mean};
}

// ---- gradient, of g_logprob log p(target) + g_entropy H -----------------------------------------

struct Upstream {
  double logprob, entropy;
};

// d / dx_j = p_j (constant + slope z_j) for j other than the target; z = (u - max) c.
struct GradientPerMass {
  double constant, slope;
};

PPOK_HD inline GradientPerMass gradient_per_mass(double c, double mean, Upstream g) {
  return {c * (g.entropy * mean - g.logprob), -g.entropy * c};
}

// The target column, where the row's gradient is exact near p = 1: 1 - p by expm1.
PPOK_HD inline double gradient_of_target(double logprob, double z, double c, double mean,
                                         Upstream g) {
  const double p = exp(logprob), through_entropy = p != 0. ? g.entropy * p * (mean - z) : 0.;
  return c * (-g.logprob * expm1(logprob) + through_entropy);
}

// ---- softcap: u = softcap tanh(inner x), z = u / temperature ------------------------------------

// 1 - tanh(x)^2 from e = exp(-2 |x|): relative accuracy in the tails.
template <class V>
PPOK_HD inline V sech2_of(V e) {
  return e * 4.f / ((e + 1.f) * (e + 1.f));
}

}  // namespace PPOK_ISA
}  // namespace ppok
