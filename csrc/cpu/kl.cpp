// Per-token KL estimates, their gradients, and KL-shaped rewards on the CPU: one pass each.
#include "math/kl.h"

#include "cpu/reduce.h"
#include "kernels.h"
#include "sequences.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

// One block of d = log p - log p_ref and of the mask.
template <class T>
struct Block {
  using V = typename Lanes<T>::V;
  Tile<T> logprobs, ref;
  LiveTile live;

  template <class Args>
  Block(const Args& a, int64_t from, int64_t n)
      : logprobs(a.logprobs, a.cols, from, n),
        ref(a.ref_logprobs, a.cols, from, n),
        live(a.mask, a.cols, from, n) {}
  PPOK_INLINE V log_ratio(int64_t i) const { return logprobs[i] - ref[i]; }
  PPOK_INLINE V where_live(int64_t i, V x) const { return live.select<T>(i, x); }
};

template <Estimator kEstimator, class T>
void value(const KlForward& a) {
  const T limit = static_cast<T>(a.log_ratio_clamp);
  for_blocks(a.rows * a.cols, a.threads, [&](int64_t from, int64_t n) {
    const Block<T> block(a, from, n);
    OutTile<T> kl(a.kl, from, n);
    for (int64_t i = 0; i < n; i += Lanes<T>::kWidth) {
      const auto d = clamp_ratio<T>(block.log_ratio(i), limit);
      kl.set(i, block.where_live(i, kl_value<kEstimator, T>(d, Lanes<T>::exp_where)));
    }
    kl.write();
  });
}

template <Estimator kEstimator, class T>
void gradient(const KlBackward& a) {
  const T limit = static_cast<T>(a.log_ratio_clamp);
  for_blocks(a.rows * a.cols, a.threads, [&](int64_t from, int64_t n) {
    const Block<T> block(a, from, n);
    const Tile<T> upstream(a.grad_kl, a.cols, from, n);
    OutTile<T> grad(a.grad_logprobs, from, n);
    for (int64_t i = 0; i < n; i += Lanes<T>::kWidth) {
      const auto slope =
          kl_gradient<kEstimator, T>(block.log_ratio(i), limit, upstream[i], Lanes<T>::exp_where);
      grad.set(i, block.where_live(i, slope));
    }
    grad.write();
  });
}

template <Estimator kEstimator, class T>
void shape(const ShapeRewards& a, const Sequences& sequences, double beta) {
  const T limit = static_cast<T>(a.log_ratio_clamp);
  for_blocks(a.rows * a.cols, a.threads, [&](int64_t from, int64_t n) {
    const Block<T> block(a, from, n);
    OutTile<T> rewards(a.rewards, from, n), kl(a.kl, from, n);
    for (int64_t i = 0; i < n; i += Lanes<T>::kWidth) {
      const auto d = clamp_ratio<T>(block.log_ratio(i), limit);
      const auto estimate = kl_value<kEstimator, T>(d, Lanes<T>::exp_where);
      kl.set(i, block.where_live(i, estimate));
      rewards.set(i, block.where_live(i, kl_reward(estimate, static_cast<T>(beta))));
    }
    rewards.write();
    kl.write();
  });

  T* rewards = static_cast<T*>(a.rewards.data);
  const T* kl = static_cast<const T*>(a.kl.data);
#pragma omp parallel for num_threads(static_cast<int>(a.threads)) \
    schedule(static) if (a.threads > 1 && a.rows * a.cols >= kParallelTokens)
  for (int64_t s = 0; s < sequences.count; ++s) {
    const Run run = sequences[s];
    int64_t last = run.end - 1;
    while (last >= run.begin && !is_live(a.mask, run.row, last)) --last;
    const int64_t where = last < run.begin ? -1 : run.row * a.cols + last;
    static_cast<int64_t*>(a.last.data)[s] = where;
    if (where >= 0)
      rewards[where] =
          static_cast<T>(last_reward(read_one<double>(a.scores, 0, s), kl[where], beta));
  }
}

}  // namespace

Fault kl_forward(const KlForward& a) {
  with_estimator(a.estimator, [&](auto chosen) {
    a.kl.dtype == kF64 ? value<decltype(chosen)::value, double>(a)
                       : value<decltype(chosen)::value, float>(a);
  });
  return {kNoFault, 0};
}

Fault kl_backward(const KlBackward& a) {
  const bool wide = a.logprobs.dtype == kF64 || a.ref_logprobs.dtype == kF64;
  with_estimator(a.estimator, [&](auto chosen) {
    wide ? gradient<decltype(chosen)::value, double>(a)
         : gradient<decltype(chosen)::value, float>(a);
  });
  return {kNoFault, 0};
}

Fault shape_rewards(const ShapeRewards& a) {
  const double beta = a.kl_coefs.data ? read_one<double>(a.kl_coefs, 0, 0) : a.kl_coef;
  if (!is_coefficient(beta)) return {kBadCoefficient, 0};
  const Sequences sequences{a.cu_seqlens, a.rows, a.cols, a.sequences};
  if (!sequences.valid()) return {kBadOffsets, 0};
  with_estimator(a.estimator, [&](auto chosen) {
    a.kl.dtype == kF64 ? shape<decltype(chosen)::value, double>(a, sequences, beta)
                       : shape<decltype(chosen)::value, float>(a, sequences, beta);
  });
  return {kNoFault, 0};
}

}  // namespace PPOK_ISA
}  // namespace ppok
