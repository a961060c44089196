// What one thread adds up: the vocabulary of loss_terms.h for one token at a time.
#pragma once
#include "cuda/block.cuh"

namespace ppok {
namespace PPOK_ISA {

// e^x where it is asked for.
struct ExpWhere {
  template <class T>
  __device__ T operator()(T x, bool where) const {
    return where ? exp(x) : x;
  }
};

template <class Scalar>
struct Terms {
  using T = Scalar;
  using V = T;
  using Mask = bool;
  static constexpr ExpWhere exp_where{};
  __device__ static T splat(double x) { return static_cast<T>(x); }
  __device__ static T first(T x) { return x; }

  struct Sum {
    double value = 0.;
    __device__ void add(T x) { value += x; }
    __device__ void add_square(T x) {
      const double wide = x;
      value += wide * wide;
    }
    __device__ void add_difference(T x, T y) { value += static_cast<double>(x) - y; }
    __device__ double total() const { return value; }
  };

  // What is added between two calls of settle() is summed as Ts.
  struct SumInGroups {
    T pending = T(0);
    double value = 0.;
    __device__ void add(T x) { pending += x; }
    __device__ void settle() {
      value += pending;
      pending = T(0);
    }
    __device__ double total() const { return value; }
  };

  struct Count {
    int value = 0;
    __device__ void add(bool condition) { value += condition; }
    __device__ double total() const { return value; }
  };

  // NaN is passed over.
  struct Maximum {
    T value = -INFINITY;
    __device__ void add(T x) { value = larger(value, x); }
    __device__ double total() const { return value; }
  };
};

}  // namespace PPOK_ISA
}  // namespace ppok
