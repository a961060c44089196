// Log-probability of one token per row of logits, with entropy, and its gradient.
//
// Each chunk of a row is summed against its own maximum, and the chunks are merged in order, in
// double.
#include "math/logprob.h"

#include "cpu/chunk_sums.h"
#include "cpu/rows.h"
#include "kernels.h"
#include "logprob_row.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

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

// ---- one row ----------------------------------------------------------------------------------

template <class T, class Args>
inline T target_logit(const Args& a, const Row<Args>& r) {
  T u;
  read_strided(column(a.logits, r.row, r.col, r.token), a.logits.dtype, 1, 1, &u);
  if (a.softcap > 0.) Transform<Args>{a}.cap(&u, 1);
  return u;
}

void keep_first(Fault& first, int32_t kind, int64_t where) {
#pragma omp critical(ppok_fault)
  if (first.kind == kNoFault || where < first.where) first = {kind, where};
}

// ---- forward ----------------------------------------------------------------------------------

template <class T, class Columns, bool kEntropy>
struct Forward {
  static constexpr int64_t kChunk = kChunkBytes / sizeof(typename Columns::Element);
  static constexpr int64_t kBuffer = kChunk;
  using Element = typename Columns::Element;
  using Position = Row<LogprobForward>;
  using Piece = Chunk;
  using Sums = RowSums;
  using Top = T;
  const LogprobForward& a;
  Fault& first;
  const int64_t chunks = (a.vocab + kChunk - 1) / kChunk;

  Position row(int64_t i) const { return Position(a, i); }
  double scale(const Position& r) const { return scale_of(a, r.temperature); }

  // Chunk k of u without the target; in `buffer` where the logits themselves will not do.
  Chunk chunk(const Position& r, int64_t k, Element* buffer) const {
    const int64_t from = k * kChunk, n = a.vocab - from < kChunk ? a.vocab - from : kChunk;
    const Element* u = columns_of_row<Columns>(a.logits, r.row, r.col, from, n, buffer);
    if constexpr (Columns::kType == DTypeOf<T>::value)
      if (a.softcap > 0.) {
        if (u != buffer) memcpy(buffer, u, n * sizeof(T));
        Transform<LogprobForward>{a}.cap(buffer, n);
        u = buffer;
      }
    const bool holds_target = r.token >= from && r.token < from + n;
    return {u, n, holds_target ? r.token - from : -1};
  }

  RowSums sum(const Position& r, const Chunk& now, T max, const Chunk& next, T* max_next) const {
    return sum_chunk<Columns, kEntropy>(now, max, scale(r), next, max_next);
  }

  void write(int64_t i, const RowResult& result) const {
    *at<T>(a.logprobs, i) = static_cast<T>(result.logprob);
    if (kEntropy) *at<T>(a.entropy, i) = static_cast<T>(result.entropy);
    T* state = at<T>(a.state, 3 * i);
    state[0] = static_cast<T>(result.max);
    state[1] = static_cast<T>(result.log_sum);
    state[2] = static_cast<T>(result.mean);
  }

  RowSums empty() const { return empty_row(); }
  void finish_row(const Position& r, RowInParts<RowSums>& parts) const {
    const double c = scale(r);
    RowSums others = merge(parts.rest, parts.top, c);
    // One token holds most of the mass: what the others add to it must not be rounded away.
    if constexpr (kEntropy && sizeof(T) == sizeof(float))
      if (others.at_max + others.rest < 1.5 && fabs(others.max) < INFINITY) {
        alignas(64) Element buffer[kChunk];
        parts.top = careful_sums<Columns>(chunk(r, parts.top_index, buffer),
                                          static_cast<float>(parts.top.max), c);
        others = merge(parts.rest, parts.top, c);
      }
    write(r.position, finish(others, target_logit<T>(a, r), c));
  }
  void skip_row(const Position& r) const {
    const double fill = r.kind == kFaulty ? NAN : 0.;
    write(r.position, {fill, fill, fill, fill, fill});
    if (r.kind == kFaulty) keep_first(first, r.fault, r.position);
  }
};

// ---- backward ---------------------------------------------------------------------------------

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

template <class T>
inline T target_gradient(const LogprobBackward& a, const Row<LogprobBackward>& r, const T* state,
                         double u, Upstream g) {
  const double c = scale_of(a, r.temperature), z = (u - state[0]) * c;
  return static_cast<T>(gradient_of_target(*at<T>(a.logprobs, r.position), z, c, state[2], g));
}

// Columns from .. from + n of one live row's gradient; n is at most kTile.
template <class T>
inline void gradient_tile(const LogprobBackward& a, const Row<LogprobBackward>& r, Upstream g,
                          int64_t from, int64_t n) {
  alignas(64) T raw_buffer[kTile], buffer[kTile], out_buffer[kTile];
  const T* state = at<T>(a.state, 3 * r.position);
  const Transform<LogprobBackward> transform{a};
  const double c = scale_of(a, r.temperature);
  const View& out = a.grad_logits;
  void* destination = column(out, r.row, r.col, from);
  T* grad = write_target(destination, out.dtype, out.stride[2], out_buffer);

  const T* raw = read_run(column(a.logits, r.row, r.col, from), a.logits.dtype, a.logits.stride[2],
                          n, raw_buffer);
  const T* u = raw;
  if (a.softcap > 0.) {
    memcpy(buffer, raw, n * sizeof(T));
    transform.cap(buffer, n);
    u = buffer;
    if (grad == raw) {  // in place: the raw logits are needed once more
      memcpy(raw_buffer, raw, n * sizeof(T));
      raw = raw_buffer;
    }
  }
  const bool holds_target = r.token >= from && r.token < from + n;
  T target = 0;
  if (holds_target) target = target_gradient(a, r, state, u[r.token - from], g);
  gradient_of_others(u, grad, n, c, state, g);
  if (holds_target) grad[r.token - from] = target;
  if (a.softcap > 0.) transform.uncap(grad, raw, n);
  write_run(destination, out.dtype, out.stride[2], n, grad);
}

// The same straight from contiguous logits to a contiguous gradient of their dtype. Where that is
// large, it is made in the cache and streamed past it: nobody reads it soon, and the memory is not
// read before it is overwritten.
template <class Columns, bool kCareful>
inline void gradient_direct(const LogprobBackward& a, const Row<LogprobBackward>& r, Upstream g,
                            int64_t from, int64_t n, const GradientOfOthers<kCareful>& gradient,
                            bool stream) {
  using Element = typename Columns::Element;
  alignas(64) Element buffer[kTile];
  const auto* u = reinterpret_cast<const Element*>(column(a.logits, r.row, r.col, from));
  auto* to = reinterpret_cast<Element*>(column(a.grad_logits, r.row, r.col, from));
  Element* made = stream ? buffer : to;
  const bool holds_target = r.token >= from && r.token < from + n;
  float target = 0.f;
  if (holds_target)
    target = target_gradient(a, r, at<float>(a.state, 3 * r.position),
                             Columns::to_float(u[r.token - from]), g);
  gradient_of_others<Columns>(u, made, n, gradient);
  if (holds_target) made[r.token - from] = Columns::from_float(target);
  if (stream) stream_out(to, made, n * sizeof(Element));
}

// tile(row, upstream, from, n) makes a part of a live row's gradient.
template <class Tile>
void backward(const LogprobBackward& a, Tile&& tile) {
  for_parts_of_rows(a.rows * a.cols, a.vocab, a.threads, [&](int64_t i, int64_t from, int64_t n) {
    const Row<LogprobBackward> r(a, i);
    Upstream g{0., 0.};
    if (r.kind == kLive && a.grad_logprobs.data)
      g.logprob = read_one<double>(a.grad_logprobs, r.row, r.col);
    if (r.kind == kLive && a.grad_entropy.data)
      g.entropy = read_one<double>(a.grad_entropy, r.row, r.col);
    if (g.logprob == 0. && g.entropy == 0.)  // nothing asked of this row: it is not read
      zero_columns(a.grad_logits, r.row, r.col, from, n);
    else
      tile(r, g, from, n);
  });
}

template <class T>
void backward_by_tiles(const LogprobBackward& a) {
  backward(a, [&](const Row<LogprobBackward>& r, Upstream g, int64_t from, int64_t n) {
    for (int64_t done = 0; done < n; done += kTile)
      gradient_tile<T>(a, r, g, from + done, n - done < kTile ? n - done : kTile);
  });
}

template <class Columns>
void backward_direct(const LogprobBackward& a) {
  const int64_t size = a.rows * a.cols * a.vocab * sizeof(typename Columns::Element);
  const bool stream = a.grad_logits.data != a.logits.data && size >= kStreamBytes;
  backward(a, [&](const Row<LogprobBackward>& r, Upstream g, int64_t from, int64_t n) {
    const float* state = at<float>(a.state, 3 * r.position);
    const double c = scale_of(a, r.temperature);
    const GradientOfOthers<false> plain(state, c, g);
    const bool careful = g.entropy != 0. || plain.exponent.overflows();
    const GradientOfOthers<true> exact(state, c, g);
    for (int64_t done = 0; done < n; done += kTile) {
      const int64_t count = n - done < kTile ? n - done : kTile;
      if (careful)
        gradient_direct<Columns>(a, r, g, from + done, count, exact, stream);
      else
        gradient_direct<Columns>(a, r, g, from + done, count, plain, stream);
    }
  });
}

}  // namespace

Fault logprob_forward(const LogprobForward& a) {
  const bool entropy = a.entropy.data != nullptr;
  const auto run = [&](auto columns, auto zero) {
    using T = decltype(zero);
    using C = decltype(columns);
    Fault first{kNoFault, 0};
    if (entropy)
      sum_rows(Forward<T, C, true>{a, first}, a.rows * a.cols, a.vocab, a.threads);
    else
      sum_rows(Forward<T, C, false>{a, first}, a.rows * a.cols, a.vocab, a.threads);
    return first;
  };
  if (a.logits.dtype == kF64) return run(Columns<kF64>{}, 0.);
  if (a.logits.dtype == kBF16 && a.softcap == 0.) return run(Columns<kBF16>{}, 0.f);
  if (a.logits.dtype == kF16 && a.softcap == 0.) return run(Columns<kF16>{}, 0.f);
  return run(Columns<kF32>{}, 0.f);
}

Fault logprob_backward(const LogprobBackward& a) {
  const bool as_is = a.logits.stride[2] == 1 && a.grad_logits.stride[2] == 1 &&
                     a.logits.dtype == a.grad_logits.dtype && a.softcap == 0.;
  if (a.logits.dtype == kF64)
    backward_by_tiles<double>(a);
  else if (as_is && a.logits.dtype == kF32)
    backward_direct<Columns<kF32>>(a);
  else if (as_is && a.logits.dtype == kBF16)
    backward_direct<Columns<kBF16>>(a);
  else if (as_is && a.logits.dtype == kF16)
    backward_direct<Columns<kF16>>(a);
  else
    backward_by_tiles<float>(a);
  return {kNoFault, 0};
}

}  // namespace PPOK_ISA
}  // namespace ppok
