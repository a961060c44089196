// Exponentials in base 2.
#pragma once
#include "cuda/device.cuh"

namespace ppok {
namespace PPOK_ISA {

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

__device__ inline float power_of_two(float y) { return exp2_approx(y); }
__device__ inline double power_of_two(double y) { return exp2(y); }

// 2^y as T to full relative accuracy however large |y| is, for y <= 0.
template <class T>
__device__ inline T power_of_two_wide(double y) {
  if constexpr (sizeof(T) == sizeof(double)) return exp2(y);
  const double bounded = fmax(y, -1000.), whole = rint(bounded);
  return power_of_two(static_cast<T>(bounded - whole)) * power_of_two(static_cast<T>(whole));
}

}  // namespace PPOK_ISA
}  // namespace ppok
