// KL(a || b) of two rows of logits u and v, from partial sums: state, merge, result and gradient.
// Host and device.
//
// Both rows are summed against their own maxima, and what is summed for the divergence is made of
// differences: equal rows give exactly 0. Elements equal to the maximum are counted apart from the
// rest, as in math/logprob.h, so that the rest keeps its relative accuracy where one token holds
// all the mass of both.
#pragma once
#include <math.h>

#include "math/host_device.h"

namespace ppok {
namespace PPOK_ISA {

// Sum over j of exp((x_j - max) c) = at_max + rest. A NaN element makes rest NaN and leaves max
// alone.
template <class S>
struct Mass {
  S max, at_max, rest;
};

// slope = sum of exp((u_j - max_a) c) ((u_j - max_a) - (v_j - max_b)) c; +inf: a token that b alone
// forbids.
template <class S>
struct PartialPair {
  Mass<S> a, b;
  S slope;
};
using PairSums = PartialPair<double>;

template <class S = double>
PPOK_HD inline PartialPair<S> empty_pair() {
  return {{-INFINITY, 0, 0}, {-INFINITY, 0, 0}, 0};
}

PPOK_HD inline double highest(const PairSums& sums) { return sums.a.max; }

template <class S>
PPOK_HD inline S total(const Mass<S>& mass) {
  return mass.at_max + mass.rest;
}

// A maximum at least as high, the difference to it, in the slope's unit, and what the powers are to
// be multiplied by.
template <class S>
struct Raise {
  S max, gap, weight;
};

PPOK_HD inline Raise<double> raise(double from, double to, double c) {
  const double gap = from == to || from == -INFINITY ? 0. : (from - to) * c;
  return {to, gap, gap == 0. ? 1. : exp(gap)};
}

template <class S>
PPOK_HD inline Mass<S> raised(const Mass<S>& x, const Raise<S>& to) {
  const bool high = x.max == to.max;
  return {to.max, high ? x.at_max : S(0), to.weight * (high ? x.rest : total(x))};
}

// 0 where the weight is: a slope of inf is none of a rest that is nothing.
template <class S>
PPOK_HD inline S raised_slope(const PartialPair<S>& x, const Raise<S>& a, const Raise<S>& b) {
  if (x.slope == S(INFINITY) || a.weight == S(0))
    return x.slope == S(INFINITY) ? S(INFINITY) : S(0);
  return a.weight * (x.slope + (a.gap - b.gap) * total(x.a));
}

template <class S>
PPOK_HD inline PartialPair<S> raised(const PartialPair<S>& x, const Raise<S>& a,
                                     const Raise<S>& b) {
  return {raised(x.a, a), raised(x.b, b), raised_slope(x, a, b)};
}

// One expression: where multiplications and additions are fused, for both rows alike.
PPOK_HD inline Mass<double> merge(const Mass<double>& x, const Raise<double>& raise_x,
                                  const Mass<double>& y, const Raise<double>& raise_y) {
  const bool x_high = x.max == raise_x.max, y_high = y.max == raise_y.max;
  return {raise_x.max, (x_high ? x.at_max : 0.) + (y_high ? y.at_max : 0.),
          raise_x.weight * (x_high ? x.rest : total(x)) +
              raise_y.weight * (y_high ? y.rest : total(y))};
}

PPOK_HD inline PairSums merge(const PairSums& x, const PairSums& y, double c) {
  const double a = x.a.max >= y.a.max ? x.a.max : y.a.max;
  const double b = x.b.max >= y.b.max ? x.b.max : y.b.max;
  const Raise<double> x_a = raise(x.a.max, a, c), y_a = raise(y.a.max, a, c);
  const Raise<double> x_b = raise(x.b.max, b, c), y_b = raise(y.b.max, b, c);
  return {merge(x.a, x_a, y.a, y_a), merge(x.b, x_b, y.b, y_b),
          raised_slope(x, x_a, x_b) + raised_slope(y, y_a, y_b)};
}

PPOK_HD inline double log_of(const Mass<double>& mass) {
  return mass.at_max == 1. ? log1p(mass.rest) : log(total(mass));
}

PPOK_HD inline double divergence(const PairSums& sums) {
  if (fabs(sums.a.max) == INFINITY || fabs(sums.b.max) == INFINITY) return NAN;
  return sums.slope / total(sums.a) + (log_of(sums.b) - log_of(sums.a));
}

// The gradient of KL(a || b) for the logits of a, over c: p is a's probability,
// gap = log p_a - log p_b - KL.
template <class S, class V>
PPOK_HD inline V slope_of_first(V p, V gap) {
  return p == S(0) ? V{} : p * gap;
}

// The same for the logits of b: p_b - p_a without the cancellation of nearly equal numbers. p is
// the larger of the two, gap = log p_a - log p_b, less_one = exp(-|gap|) - 1.
template <class S, class V>
PPOK_HD inline V slope_of_second(V p, V gap, V less_one) {
  const V difference = p * less_one;
  return p == S(0) ? V{} : gap > S(0) ? difference : -difference;
}

}  // namespace PPOK_ISA
}  // namespace ppok
