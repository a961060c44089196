// Reductions over a warp and a block, in one association whatever the grid: within a warp by
// halving, then over the warps in order.
#pragma once
#include "cuda/device.cuh"

namespace ppok {
namespace PPOK_ISA {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = ~0u;

// The larger; of a number and a NaN the number.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

template <class T>
__device__ inline T warp_max(T x) {
  for (int distance = kWarp / 2; distance; distance /= 2)
    x = larger(x, __shfl_xor_sync(kWholeWarp, x, distance));
  return x;
}

template <class T>
__device__ inline T warp_sum(T x) {
  for (int distance = kWarp / 2; distance; distance /= 2)
    x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

// Both give their result to every thread; all of the block's kThreads take part.
template <int kThreads, class T>
__device__ inline T block_max(T x) {
  PPOK_SHARED(T, of_warp, kThreads / kWarp);
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int warp = 0; warp < kThreads / kWarp; ++warp) x = larger(x, of_warp[warp]);
  __syncthreads();  // before another call writes
  return x;
}

template <int kThreads, int n, class T>
__device__ inline void block_sum(const T (&x)[n], double (&total)[n]) {
  PPOK_SHARED(T, of_warp, n * kThreads / kWarp);
  for (int i = 0; i < n; ++i) {
    const T sum = warp_sum(x[i]);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp * n + i] = sum;
  }
  __syncthreads();
  for (int i = 0; i < n; ++i) {
    total[i] = of_warp[i];
    for (int warp = 1; warp < kThreads / kWarp; ++warp) total[i] += of_warp[warp * n + i];
  }
  __syncthreads();
}

}  // namespace PPOK_ISA
}  // namespace ppok
