// What a loss that depends on each token alone asks of the row of a token. Host and device.
#pragma once
#include "logprob_row.h"
#include "loss_terms.h"
#include "math/logprob.h"

namespace ppok {
namespace PPOK_ISA {

// The gradients of a row's log-probability and entropy. On lanes that are vectors each holds the
// same token: the bits are those of clipped_loss and kl_backward.
PPOK_EITHER
template <class Terms>
PPOK_HD inline Upstream upstream_of(const PpoRows& a, const Row<PpoRows>& r,
                                    typename Terms::T logprob) {
  using T = typename Terms::T;
  using V = typename Terms::V;
  const V zero{}, now = Terms::splat(logprob);
  const V old = Terms::splat(read_one<T>(a.old_logprobs, r.row, r.col));
  const V advantage = Terms::splat(read_one<T>(a.advantages, r.row, r.col));
  const T weight = read_one<T>(a.weights, r.row, r.col);
  const T slope = with_token_loss(a, [&](auto loss) {
    typename decltype(loss)::template Kernel<Terms> kernel(loss);
    return Terms::first(kernel.add(now, old, advantage, zero, zero == zero).slope);
  });
  T of_logprob = slope * weight, of_entropy = static_cast<T>(-a.entropy_coef) * weight;
  if (a.ref_logprobs.data) {
    const V d = now - Terms::splat(read_one<T>(a.ref_logprobs, r.row, r.col));
    const T limit = static_cast<T>(a.log_ratio_clamp);
    const T of_kl = with_estimator(a.estimator, [&](auto chosen) {
      constexpr Estimator kEstimator = decltype(chosen)::value;
      return Terms::first(kl_gradient<kEstimator, T>(d, limit, Terms::splat(1.), Terms::exp_where));
    });
    of_logprob += static_cast<T>(a.kl_coef) * of_kl * weight;
  }
  if (a.loss_scale.data) {
    const T scale = read_one<T>(a.loss_scale, 0, 0);
    of_logprob *= scale;
    of_entropy *= scale;
  }
  return {of_logprob, a.entropy_coef == 0. ? 0. : of_entropy};
}

}  // namespace PPOK_ISA
}  // namespace ppok
