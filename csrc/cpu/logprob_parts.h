// What the log-probabilities over all columns and over sets of them share: the transforms of
// logits, a row's results, and the gradient of runs of columns.
#pragma once
#include "cpu/chunk_sums.h"
#include "cpu/rows.h"
#include "logprob_row.h"

namespace ppok {
namespace PPOK_ISA {

// ---- logits to u: the transforms before the temperature ---------------------------------------

PPOK_INLINE vfloat sech2(vfloat x) {
  const vfloat size = bits_to_float(float_to_bits(x) & 0x7fffffff);
  return sech2_of(vexp(-(size + size)));
}
inline double sech2(double x) { return sech2_of(exp(-2. * fabs(x))); }

template <class Args>
struct Transform {
  const Args& a;
  PPOK_INLINE void cap(float* u, int64_t n) const {
    const float inner = static_cast<float>(a.logit_scale / a.softcap),
                outer = static_cast<float>(a.softcap);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(u + j, outer * vtanh(load(u + j) * inner));
    if (j < n) {
      float tail[kLanes] = {};
      memcpy(tail, u + j, (n - j) * sizeof(float));
      store(tail, outer * vtanh(load(tail) * inner));
      memcpy(u + j, tail, (n - j) * sizeof(float));
    }
  }
  void cap(double* u, int64_t n) const {
    for (int64_t j = 0; j < n; ++j) u[j] = a.softcap * tanh(a.logit_scale * u[j] / a.softcap);
  }
  // Multiplies the gradient by du / dlogits, from the raw logits.
  PPOK_INLINE void uncap(float* grad, const float* raw, int64_t n) const {
    const float inner = static_cast<float>(a.logit_scale / a.softcap),
                gain = static_cast<float>(a.logit_scale);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
      store(grad + j, load(grad + j) * (gain * sech2(load(raw + j) * inner)));
    for (; j < n; ++j) grad[j] *= gain * sech2(splat(raw[j] * inner))[0];
  }
  void uncap(double* grad, const double* raw, int64_t n) const {
    for (int64_t j = 0; j < n; ++j)
      grad[j] *= a.logit_scale * sech2(a.logit_scale * raw[j] / a.softcap);
  }
};

// ---- the results of a row -------------------------------------------------------------------

inline void keep_first(Fault& first, int32_t kind, int64_t where) {
#pragma omp critical(ppok_fault)
  if (first.kind == kNoFault || where < first.where) first = {kind, where};
}

// One token holds most of the mass: what the others add to it must not be rounded away.
inline bool needs_care(const RowSums& others) {
  return others.at_max + others.rest < 1.5 && fabs(others.max) < INFINITY;
}

template <class T, bool kEntropy, class Args>
inline void write_row(const Args& a, int64_t i, const RowResult& result) {
  *at<T>(a.logprobs, i) = static_cast<T>(result.logprob);
  if (kEntropy) *at<T>(a.entropy, i) = static_cast<T>(result.entropy);
  T* state = at<T>(a.state, 3 * i);
  state[0] = static_cast<T>(result.max);
  state[1] = static_cast<T>(result.log_sum);
  state[2] = static_cast<T>(result.mean);
}

// ---- gradient ---------------------------------------------------------------------------------

// grad = c (-g_logprob p + g_entropy p (mean - z)), the target column excepted. With care (for the
// entropy, or logits so large that x gain overflows) z is made from the difference to the maximum,
// exact near it; without, p takes one multiply-add less.
template <bool kCareful>
struct GradientOfOthers {
  Exponent exponent;
  PowerSeries series;
  vfloat log_sum, constant, slope;
  GradientOfOthers(const float* state, double c, Upstream g)
      : exponent(state[0], c, kCareful ? 0. : state[1] * kLog2E),
        series(kCareful ? 1.f : static_cast<float>(-g.logprob * c * exp(-kLn2 * exponent.excess))),
        log_sum(splat(static_cast<float>(state[1] * kLog2E))) {
    const GradientPerMass per_mass = gradient_per_mass(c, state[2], g);
    constant = splat(static_cast<float>(per_mass.constant));
    slope = splat(static_cast<float>(per_mass.slope * kLn2));
  }
  PPOK_INLINE vfloat operator()(vfloat x) const {
    if (!kCareful) {
      const Power p = vexp2_nonpositive(above_zero_power(exponent(x)), series);
      return p.scale * p.series;
    }
    const vfloat y = above_zero_power((x - exponent.reference) * exponent.gain);
    const Power p = vexp2_nonpositive(above_zero_power(y - log_sum), series);
    return p.scale * p.series * multiply_add(slope, y, constant);
  }
};

template <class Columns, bool kCareful, class Element = typename Columns::Element>
inline void gradient_of_others(const Element* u, Element* grad, int64_t n,
                               const GradientOfOthers<kCareful>& gradient) {
  const auto two = [&](const Element* from, Element* to) __attribute__((always_inline)) {
    vfloat x[2];
    Columns::load_two(from, x);
    for (vfloat& v : x) v = gradient(v);
    Columns::store_two(to, x);
  };
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) two(u + j, grad + j);
  if (j < n) {
    Element tail[2 * kLanes] = {};
    memcpy(tail, u + j, (n - j) * sizeof(Element));
    two(tail, tail);
    memcpy(grad + j, tail, (n - j) * sizeof(Element));
  }
}

inline void gradient_of_others(const double* u, double* grad, int64_t n, double c,
                               const double* state, Upstream g) {
  const GradientPerMass per_mass = gradient_per_mass(c, state[2], g);
  for (int64_t j = 0; j < n; ++j) {
    const double z = (u[j] - state[0]) * c, p = exp(z - state[1]);
    grad[j] = p == 0. ? 0. : p * (per_mass.constant + per_mass.slope * z);
  }
}

inline void gradient_of_others(const float* u, float* grad, int64_t n, double c, const float* state,
                               Upstream g) {
  const GradientOfOthers<false> plain(state, c, g);
  if (g.entropy == 0. && !plain.exponent.overflows())
    gradient_of_others<Columns<kF32>>(u, grad, n, plain);
  else
    gradient_of_others<Columns<kF32>>(u, grad, n, GradientOfOthers<true>(state, c, g));
}

template <class T, class Args>
inline T target_gradient(const Args& a, const Row<Args>& r, const T* state, double u, Upstream g) {
  const double c = scale_of(a, r.temperature), z = (u - state[0]) * c;
  return static_cast<T>(gradient_of_target(*at<T>(a.logprobs, r.position), z, c, state[2], g));
}

}  // namespace PPOK_ISA
}  // namespace ppok
