// Reductions over a warp and over groups of threads, of which a block is one or several, in one
// association whatever the grid: within a warp by halving, then over the warps in order.
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

// The first warp of this thread's group.
template <int kThreads, int kGroups>
__device__ inline int first_warp() {
  return kGroups == 1 ? 0 : static_cast<int>(threadIdx.x) / kThreads * (kThreads / kWarp);
}

// Both give every thread the result of its group of kThreads, of which there are up to kGroups; all
// threads of the block take part.
template <int kThreads, int kGroups = 1, class T>
__device__ inline T block_max(T x) {
  PPOK_SHARED(T, of_warp, kGroups * kThreads / kWarp);
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  const T* group = of_warp + first_warp<kThreads, kGroups>();
  for (int warp = 0; warp < kThreads / kWarp; ++warp) x = larger(x, group[warp]);
  __syncthreads();  // before another call writes
  return x;
}

template <int kThreads, int kGroups = 1, int n, class T>
__device__ inline void block_sum(const T (&x)[n], double (&total)[n]) {
  PPOK_SHARED(T, of_warp, n * kGroups * kThreads / kWarp);
  for (int i = 0; i < n; ++i) {
    const T sum = warp_sum(x[i]);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp * n + i] = sum;
  }
  __syncthreads();
  const T* group = of_warp + n * first_warp<kThreads, kGroups>();
  for (int i = 0; i < n; ++i) {
    total[i] = group[i];
    for (int warp = 1; warp < kThreads / kWarp; ++warp) total[i] += group[warp * n + i];
  }
  __syncthreads();
}

}  // namespace PPOK_ISA
}  // namespace ppok
