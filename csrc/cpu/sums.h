// Sums, counts and extremes over lanes, with an association that depends on nothing but the order
// of the elements.
//
// A kernel is written once over Lanes<T>: a vector of floats, or one double for fp64 inputs.
#pragma once
#include "cpu/simd.h"

namespace ppok {
namespace PPOK_ISA {

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using V = vfloat;
  using Mask = vint;
  static constexpr int kWidth = kLanes;
  static PPOK_INLINE V load(const float* p) { return ppok::PPOK_ISA::load(p); }
  static PPOK_INLINE void store(float* p, V x) { ppok::PPOK_ISA::store(p, x); }
  static PPOK_INLINE V splat(double x) { return ppok::PPOK_ISA::splat(static_cast<float>(x)); }
  static PPOK_INLINE float first(V x) { return x[0]; }
  static PPOK_INLINE V exp_where(V x, Mask where) { return any_lane(where) ? vexp(x) : x; }
  static PPOK_INLINE Mask nonzero(const uint8_t* p) { return load_bytes(p) != 0; }
};

template <>
struct Lanes<double> {
  using V = double;
  using Mask = bool;
  static constexpr int kWidth = 1;
  static PPOK_INLINE V load(const double* p) { return *p; }
  static PPOK_INLINE void store(double* p, V x) { *p = x; }
  static PPOK_INLINE V splat(double x) { return x; }
  static PPOK_INLINE double first(V x) { return x; }
  static PPOK_INLINE V exp_where(V x, Mask where) { return where ? exp(x) : x; }
  static PPOK_INLINE Mask nonzero(const uint8_t* p) { return *p != 0; }
};

// Accumulates in double, whatever the lanes.
template <class T>
struct Sum;

template <>
struct Sum<float> {
  vdouble low{}, high{};
  PPOK_INLINE void add(vfloat x) {
    low += widen_low(x);
    high += widen_high(x);
  }
  // Exact: the square of a float fits a double, and cannot overflow there.
  PPOK_INLINE void add_square(vfloat x) {
    const vdouble a = widen_low(x), b = widen_high(x);
    low += a * a;
    high += b * b;
  }
  PPOK_INLINE void add_difference(vfloat x, vfloat y) {
    low += widen_low(x) - widen_low(y);
    high += widen_high(x) - widen_high(y);
  }
  double total() const { return sum_lanes(low + high); }
};

template <>
struct Sum<double> {
  double value = 0.;
  PPOK_INLINE void add(double x) { value += x; }
  PPOK_INLINE void add_square(double x) { value += x * x; }
  PPOK_INLINE void add_difference(double x, double y) { value += x - y; }
  double total() const { return value; }
};

// The same at a fraction of the work, for float terms that are rounded themselves: what is added
// between two calls of settle() is summed as floats. Few terms, or their error shows.
template <class T>
struct SumInGroups {
  typename Lanes<T>::V pending{};
  Sum<T> sum;
  PPOK_INLINE void add(typename Lanes<T>::V x) { pending += x; }
  PPOK_INLINE void settle() {
    sum.add(pending);
    pending = typename Lanes<T>::V{};
  }
  double total() const { return sum.total(); }
};

// How often a condition held; at most 2^31 - 1 times per lane.
template <class T>
struct Count;

template <>
struct Count<float> {
  vint lanes{};
  PPOK_INLINE void add(vint condition) { lanes -= condition; }
  double total() const {
    double sum = 0.;
    for (int i = 0; i < kLanes; ++i) sum += lanes[i];
    return sum;
  }
};

template <>
struct Count<double> {
  int64_t value = 0;
  PPOK_INLINE void add(bool condition) { value += condition; }
  double total() const { return static_cast<double>(value); }
};

// NaN is passed over, and so are no elements at all: -inf.
template <class T>
struct Maximum;

template <>
struct Maximum<float> {
  vfloat lanes = splat(-INFINITY);
  PPOK_INLINE void add(vfloat x) { lanes = max_or_second(x, lanes); }
  double total() const { return max_lanes(lanes); }
};

template <>
struct Maximum<double> {
  double value = -INFINITY;
  PPOK_INLINE void add(double x) { value = x > value ? x : value; }
  double total() const { return value; }
};

// What loss_terms.h is written over.
template <class Scalar>
struct Terms : Lanes<Scalar> {
  using T = Scalar;
  using Sum = PPOK_ISA::Sum<T>;
  using SumInGroups = PPOK_ISA::SumInGroups<T>;
  using Count = PPOK_ISA::Count<T>;
  using Maximum = PPOK_ISA::Maximum<T>;
};

}  // namespace PPOK_ISA
}  // namespace ppok
