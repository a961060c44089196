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
struct RowSums {
  double max, at_max, rest, slope;
};

PPOK_HD inline RowSums empty_row() { return {-INFINITY, 0., 0., 0.}; }

PPOK_HD inline RowSums merge(const RowSums& a, const RowSums& b, double c) {
  const RowSums& high = a.max >= b.max ? a : b;
  const RowSums& low = a.max >= b.max ? b : a;
  if (low.max == -INFINITY)
    return {high.max, high.at_max, high.rest + low.rest, high.slope + low.slope};
  if (low.max == high.max)
    return {high.max, a.at_max + b.at_max, a.rest + b.rest, a.slope + b.slope};
  const double gap = (low.max - high.max) * c, weight = exp(gap), mass = low.at_max + low.rest;
  return {high.max, high.at_max, high.rest + weight * mass,
          high.slope + weight * (low.slope + gap * mass)};
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

}  // namespace PPOK_ISA
}  // namespace ppok
