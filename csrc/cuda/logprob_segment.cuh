// What a thread sums of one segment of a row of logits.
#pragma once
#include "cuda/columns.cuh"
#include "cuda/logprob_parts.cuh"

namespace ppok {
namespace PPOK_ISA {

constexpr int kVectors = 4;  // of a thread in a step: 64 bytes
template <class E>
using Logits = Columns<E, kVectors>;

// The columns up to `end`, without the target; both counted as Logits does.
template <class E, bool kEntropy, bool kSoftcap>
struct SegmentSums {
  using T = Compute<E>;
  const Transform<T, kSoftcap> transform;
  const T gain;
  const int target, end;
  Running<T, kEntropy> running;

  template <class Args>
  __device__ SegmentSums(const Args& a, double gain, int target, int end)
      : transform(a), gain(static_cast<T>(gain)), target(target), end(end) {}

  // The logits from column j on; `whole`: all are of the segment, and none the target's.
  __device__ void add(T (&u)[kLanes<E>], int j, bool whole) {
#pragma unroll
    for (int k = 0; k < kLanes<E>; ++k) {
      u[k] = transform(u[k]);
      if (!whole && (j + k == target || j + k >= end)) u[k] = -INFINITY;
    }
    running.add(u, gain);
  }
  __device__ void add(const Lanes<E>& x, int j, bool whole) {
    T u[kLanes<E>];
#pragma unroll
    for (int k = 0; k < kLanes<E>; ++k) u[k] = widen(x[k]);
    add(u, j, whole);
  }
};

}  // namespace PPOK_ISA
}  // namespace ppok
