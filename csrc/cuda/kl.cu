// Per-token KL estimates, their gradients, and KL-shaped rewards.
#include "cuda/block.cuh"
#include "cuda/launchers.h"
#include "cuda/sums.cuh"
#include "cuda/tokens.cuh"
#include "math/kl.h"
#include "sequences.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

// What the passes over all tokens are told.
struct Pair {
  Tokens tokens;
  Source logprobs, ref, mask, upstream;
  bool lines;

  template <class Args>
  Pair(const Args& a, const View& upstream)
      : tokens{a.rows * a.cols, a.cols},
        logprobs(a.logprobs, a.rows, a.cols),
        ref(a.ref_logprobs, a.rows, a.cols),
        mask(a.mask, a.rows, a.cols),
        upstream(upstream, a.rows, a.cols) {
    lines = logprobs.line && ref.line && (mask.line || !mask.view.data) &&
            (this->upstream.line || !upstream.data);
  }
};

// This thread's tokens, and their d = log p - log p_ref.
template <class T>
struct LogRatios {
  Place<kTokens> place;
  unsigned live;
  T d[kTokens];

  __device__ explicit LogRatios(const Pair& p)
      : place(p.tokens, blockIdx.x * static_cast<int64_t>(kStep) + threadIdx.x * kTokens, p.lines),
        live(read_live(p.mask, place)) {
    T ref[kTokens];
    read(p.logprobs, place, live, d);
    read(p.ref, place, live, ref);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) d[k] -= ref[k];
  }
  __device__ T where_live(int k, T x) const { return live >> k & 1 ? x : T(0); }
};

template <class T, Estimator kEstimator>
__global__ void __launch_bounds__(kThreads) estimate(const Pair p, T limit, const View kl) {
  LogRatios<T> x(p);
#pragma unroll
  for (int k = 0; k < kTokens; ++k)
    x.d[k] = x.where_live(k, kl_value<kEstimator, T>(clamp_ratio(x.d[k], limit), ExpWhere()));
  write(kl, x.place, x.d);
}

template <class T, Estimator kEstimator>
__global__ void __launch_bounds__(kThreads) differentiate(const Pair p, T limit, const View grad) {
  LogRatios<T> x(p);
  T g[kTokens];
  read(p.upstream, x.place, x.live, g);
#pragma unroll
  for (int k = 0; k < kTokens; ++k)
    g[k] = x.where_live(k, kl_gradient<kEstimator, T>(x.d[k], limit, g[k], ExpWhere()));
  write(grad, x.place, g);
}

// ---- rewards ------------------------------------------------------------------------------------

// NaN if it is not one.
__device__ inline double coefficient_of(const ShapeRewards& a) {
  const double beta = a.kl_coefs.data ? read_one<double>(a.kl_coefs, 0, 0) : a.kl_coef;
  return is_coefficient(beta) ? beta : NAN;
}

template <class T, Estimator kEstimator>
__global__ void __launch_bounds__(kThreads) penalize(const Pair p, const ShapeRewards a) {
  LogRatios<T> x(p);
  const T limit = static_cast<T>(a.log_ratio_clamp), beta = static_cast<T>(coefficient_of(a));
  T rewards[kTokens];
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    x.d[k] = x.where_live(k, kl_value<kEstimator, T>(clamp_ratio(x.d[k], limit), ExpWhere()));
    rewards[k] = x.where_live(k, kl_reward(x.d[k], beta));
  }
  write(a.kl, x.place, x.d);
  write(a.rewards, x.place, rewards);
}

// The last live one of the columns [begin, end), or -1; by one warp.
__device__ inline int64_t last_live(const View& mask, const Run& run, int lane) {
  for (int64_t end = run.end; end > run.begin; end -= kWarp) {
    const int64_t col = end - 1 - lane;
    const bool live = col >= run.begin && is_live(mask, run.row, col);
    const unsigned lanes = __ballot_sync(kWholeWarp, live);
    if (lanes) return end - __ffs(lanes);
  }
  return -1;
}

// After `penalize`, one warp per sequence: its score, on its last live token. One more warp judges
// the last offset.
template <class T>
__global__ void __launch_bounds__(kThreads)
    place_scores(const ShapeRewards a, const Sequences sequences, int64_t* fault) {
  const int lane = threadIdx.x % kWarp;
  const int64_t s = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (s > sequences.count) return;
  const double beta = coefficient_of(a);
  const bool packed = sequences.offsets.data, wrong = packed && sequences.wrong(s);
  if (lane == 0 && wrong) report_fault(fault, s, kBadOffsets);
  if (lane == 0 && s == 0 && beta != beta) report_fault(fault, 0, kBadCoefficient);
  if (s == sequences.count) return;
  Run run = sequences[s];
  if (run.begin < 0) run.begin = 0;
  if (run.end > sequences.cols) run.end = sequences.cols;
  const int64_t last = last_live(a.mask, run, lane), where = run.row * a.cols + last;
  if (lane) return;
  at<int64_t>(a.last, s) = last < 0 ? -1 : where;
  if (last < 0) return;
  const double score =
      wrong || (packed && sequences.wrong(s + 1)) ? NAN : read_one<double>(a.scores, 0, s);
  at<T>(a.rewards, where) = static_cast<T>(last_reward(score, at<T>(a.kl, where), beta));
}

// ---- launchers ----------------------------------------------------------------------------------

// body(estimator, T()) in the dtype of arithmetic.
template <class Body>
const char* with_kernel(int64_t estimator, bool wide, Body&& body) {
  return with_estimator(estimator, [&](auto chosen) {
    return wide ? body(chosen, double()) : body(chosen, float());
  });
}

template <class Kernel, class... A>
const char* launch_pass(Kernel kernel, const Launch& to, const Pair& p, A... args) {
  return launch(kernel, parts_of(p.tokens.count, kStep), kThreads, 0, to.stream, p, args...);
}

}  // namespace

int64_t kl_forward_workspace(const KlForward&) { return 0; }
const char* kl_forward(const KlForward& a, const Launch& to) {
  return with_kernel(a.estimator, a.kl.dtype == kF64, [&](auto chosen, auto zero) {
    using T = decltype(zero);
    return launch_pass(estimate<T, decltype(chosen)::value>, to, Pair(a, View{}),
                       static_cast<T>(a.log_ratio_clamp), a.kl);
  });
}

int64_t kl_backward_workspace(const KlBackward&) { return 0; }
const char* kl_backward(const KlBackward& a, const Launch& to) {
  const bool wide = a.logprobs.dtype == kF64 || a.ref_logprobs.dtype == kF64;
  return with_kernel(a.estimator, wide, [&](auto chosen, auto zero) {
    using T = decltype(zero);
    return launch_pass(differentiate<T, decltype(chosen)::value>, to, Pair(a, a.grad_kl),
                       static_cast<T>(a.log_ratio_clamp), a.grad_logprobs);
  });
}

int64_t shape_rewards_workspace(const ShapeRewards&) { return 0; }
const char* shape_rewards(const ShapeRewards& a, const Launch& to) {
  return with_kernel(a.estimator, a.kl.dtype == kF64, [&](auto chosen, auto zero) {
    using T = decltype(zero);
    const char* error = launch_pass(penalize<T, decltype(chosen)::value>, to, Pair(a, View{}), a);
    if (error) return error;
    const Sequences sequences{a.cu_seqlens, a.rows, a.cols, a.sequences};
    return launch(place_scores<T>, parts_of(a.sequences + 1, kThreads / kWarp), kThreads, 0,
                  to.stream, a, sequences, to.fault);
  });
}

}  // namespace PPOK_ISA
}  // namespace ppok
