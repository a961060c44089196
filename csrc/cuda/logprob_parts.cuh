// What the log-probabilities over all columns and over sets of them share: the transform of logits,
// a thread's sums, a row's results, and the gradient of one logit.
#pragma once
#include "cuda/block.cuh"
#include "cuda/element.cuh"
#include "cuda/exp2.cuh"
#include "logprob_row.h"
#include "math/logprob.h"

namespace ppok {
namespace PPOK_ISA {

// Logits to u, and du / dlogits: see scale_of.
template <class T, bool kSoftcap>
struct Transform {
  T inner, outer, gain;
  template <class Args>
  __device__ explicit Transform(const Args& a)
      : inner(static_cast<T>(a.logit_scale / a.softcap)),
        outer(static_cast<T>(a.softcap)),
        gain(static_cast<T>(a.logit_scale)) {}
  __device__ T operator()(T x) const { return kSoftcap ? outer * tanh(inner * x) : x; }
  __device__ T slope(T x) const {
    constexpr T kMinusTwoLog2E = static_cast<T>(-2. * kLog2E);
    return kSoftcap ? gain * sech2_of(power_of_two(kMinusTwoLog2E * fabs(inner * x))) : T(1);
  }
};

// What one thread has summed; the slope is in units of log 2. Without the entropy all mass is in
// `rest`.
template <class T, bool kEntropy>
struct Running {
  PartialSums<T> sums{-INFINITY, T(0), T(0), T(0)};

  template <int n>
  __device__ void add(const T (&u)[n], T gain) {
    T top = u[0];
#pragma unroll
    for (int k = 1; k < n; ++k) top = larger(top, u[k]);
    if (top > sums.max) {
      const T gap = (sums.max - top) * gain;
      sums = rebase(sums, top, gap, power_of_two(gap));
    }
    const T reference = sums.max == -INFINITY ? T(0) : sums.max;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const T above = u[k] - reference, y = above * gain, e = power_of_two(y);
      if (kEntropy) {
        if (above == T(0))
          sums.at_max += T(1);
        else
          sums.rest += e;
        sums.slope = fma(e, larger(y, T(-FLT_MAX)), sums.slope);  // 0 where e is, not 0 * -inf
      } else {
        sums.rest += e;
      }
    }
  }

  // The sums of all threads of the group, or of the warp.
  template <int kThreads, int kGroups = 1>
  __device__ RowSums of_group(double gain) const {
    const T max = block_max<kThreads, kGroups>(sums.max);
    const PartialSums<T> own = against(max, gain);
    const T parts[3] = {own.at_max, own.rest, own.slope};
    double total[3];
    block_sum<kThreads, kGroups>(parts, total);
    return {max, total[0], total[1], total[2] * kLn2};
  }
  __device__ RowSums of_warp(double gain) const {
    const T max = warp_max(sums.max);
    const PartialSums<T> own = against(max, gain);
    return {max, warp_sum(own.at_max), warp_sum(own.rest), warp_sum(own.slope) * kLn2};
  }

  __device__ PartialSums<T> against(T max, double gain) const {
    if (!(sums.max < max)) return sums;
    const double gap = (static_cast<double>(sums.max) - max) * gain;
    return rebase(sums, max, static_cast<T>(gap), power_of_two_wide<T>(gap));
  }
};

// A row's results, as they are saved for its gradient.
template <class T>
struct Scored {
  T logprob, max, log_sum, mean;
  Scored() = default;
  __device__ explicit Scored(const RowResult& result)
      : logprob(static_cast<T>(result.logprob)),
        max(static_cast<T>(result.max)),
        log_sum(static_cast<T>(result.log_sum)),
        mean(static_cast<T>(result.mean)) {}
  template <class Args>
  __device__ Scored(const Args& a, int64_t i)
      : logprob(at<T>(a.logprobs, i)),
        max(at<T>(a.state, 3 * i)),
        log_sum(at<T>(a.state, 3 * i + 1)),
        mean(at<T>(a.state, 3 * i + 2)) {}
};

template <class T, class Args>
__device__ void write_row(const Args& a, int64_t i, const RowResult& result) {
  const Scored<T> row(result);
  at<T>(a.logprobs, i) = row.logprob;
  if (a.entropy.data) at<T>(a.entropy, i) = static_cast<T>(result.entropy);
  at<T>(a.state, 3 * i) = row.max;
  at<T>(a.state, 3 * i + 1) = row.log_sum;
  at<T>(a.state, 3 * i + 2) = row.mean;
}

// The gradient of one row, without the softcap's factor; c as scale_of gives it.
template <class T, bool kEntropy>
struct Gradient {
  Scored<T> row;
  double c;
  Upstream g;
  T gain, log_sum, constant, slope;

  __device__ Gradient(const Scored<T>& row, double c, Upstream g) : row(row), c(c), g(g) {
    const GradientPerMass per_mass = gradient_per_mass(c, row.mean, g);
    gain = static_cast<T>(c * kLog2E);
    log_sum = static_cast<T>(row.log_sum * kLog2E);
    constant = static_cast<T>(per_mass.constant);
    slope = static_cast<T>(per_mass.slope * kLn2);
  }
  __device__ T operator()(T u) const {
    const T y = (u - row.max) * gain, p = power_of_two(y - log_sum);
    constexpr T kNoMass = -2048;  // 0 where p is, not 0 * -inf
    return p * (kEntropy ? fma(slope, larger(y, kNoMass), constant) : constant);
  }
  __device__ double of_target(double u) const {
    return gradient_of_target(row.logprob, (u - row.max) * c, c, row.mean, g);
  }
};

}  // namespace PPOK_ISA
}  // namespace ppok
