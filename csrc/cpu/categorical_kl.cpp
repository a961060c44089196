// KL(a || b) of two rows of logits over the whole vocabulary, and its gradient for either.
//
// Both rows are read in one pass, chunk by chunk against the chunk's own maxima; chunks are merged
// in order, in double.
#include "math/categorical_kl.h"

#include <float.h>

#include "cpu/chunk_sums.h"
#include "cpu/rows.h"
#include "cpu/sums.h"
#include "kernels.h"
#include "math/kl.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

struct Row {
  int64_t position, row, col;
  bool is_used;
  template <class Args>
  Row(const Args& a, int64_t position)
      : position(position),
        row(position / a.cols),
        col(position % a.cols),
        is_used(is_live(a.mask, row, col)) {}
  bool live() const { return is_used; }
};

// ---- forward ----------------------------------------------------------------------------------

struct PairOfChunks {
  Chunk a, b;
};

template <class T>
struct Tops {
  T a, b;
};

// A chunk without a finite maximum is summed against 0.
template <class T>
inline T reference(T max) {
  return max == -INFINITY ? T(0) : max;
}

// What two chunks add up to, in vectors. Where u is -inf the weight is 0 and the difference (-inf,
// or NaN where v is -inf too) becomes finite; where v alone is -inf it is +inf.
struct PairVectors {
  vfloat a[2] = {}, b[2] = {}, slope[2] = {};
  PPOK_INLINE void add(const Exponent& of_a, const Exponent& of_b, const vfloat* u,
                       const vfloat* v) {
    for (int k = 0; k < 2; ++k) {
      const vfloat ya = of_a(u[k]), yb = of_b(v[k]);
      const Power p = vexp2_nonpositive(above_zero_power(ya), PowerSeries(1.f));
      const Power q = vexp2_nonpositive(above_zero_power(yb), PowerSeries(1.f));
      a[k] = multiply_add(p.scale, p.series, a[k]);
      b[k] = multiply_add(q.scale, q.series, b[k]);
      const vfloat gap = max_or_second(ya - yb, splat(-FLT_MAX));
      slope[k] = multiply_add(p.scale * p.series, gap, slope[k]);
    }
  }
  PairSums result(Tops<float> top, const Exponent& of_a, const Exponent& of_b) const {
    const double mass_a = sum_lanes(a[0] + a[1]), mass_b = sum_lanes(b[0] + b[1]);
    const double slopes = sum_lanes(slope[0] + slope[1]) - (of_a.excess - of_b.excess) * mass_a;
    return {{top.a, 0., of_a.correction() * mass_a},
            {top.b, 0., of_b.correction() * mass_b},
            of_a.correction() * kLn2 * slopes};
  }
};

PPOK_INLINE vfloat power_of_2(vfloat y) {
  const Power p = vexp2_nonpositive(above_zero_power(y), PowerSeries(1.f));
  return p.scale * p.series;
}
PPOK_INLINE double power_of_2(double y) { return exp2(y); }

// The same for any finite logits, with elements equal to the maximum counted apart. Where -3e38
// takes the place of -inf, differences of logits overflow, and their sums; of logits times 2^-24
// they do not. A token that b alone forbids gives inf, or 0 * inf where its probability underflows.
template <class T>
struct CarefulPair {
  using V = typename Lanes<T>::V;
  const Tops<T> top;
  const double c;
  V a_equal{}, a_rest{}, b_equal{}, b_rest{}, slope{};
  PPOK_INLINE void add(V u, V v) {
    const T small = T(0x1p-24), gain = static_cast<T>(0x1p24 * kLog2E * c);
    const V da = u * small - reference(top.a) * small, db = v * small - reference(top.b) * small;
    const V p = power_of_2(da * gain), q = power_of_2(db * gain), zero{}, one = zero + T(1);
    a_equal += da == zero ? one : zero;
    b_equal += db == zero ? one : zero;
    a_rest += da == zero ? zero : p;
    b_rest += db == zero ? zero : q;
    slope += da == zero - T(INFINITY) ? zero : p * (da - db);
  }
  PairSums result() const {
    const double slopes = 0x1p24 * c * sum_lanes(slope);
    return {{top.a, sum_lanes(a_equal), sum_lanes(a_rest)},
            {top.b, sum_lanes(b_equal), sum_lanes(b_rest)},
            slopes == slopes ? slopes : INFINITY};
  }
};

template <class Columns>
inline PairSums careful_pair(const PairOfChunks& now, Tops<float> top, double c) {
  using Element = typename Columns::Element;
  const Steps<Columns> a(now.a), b(now.b);
  Element buffer_a[kStep], buffer_b[kStep];
  CarefulPair<float> sums{top, c};
  for (int64_t s = 0; s < a.all; ++s) {
    const Element *p = a.get(s, buffer_a), *q = b.get(s, buffer_b);
    for (int k = 0; k < kStep; k += 2 * kLanes) {
      vfloat u[2], v[2];
      Columns::load_two(p + k, u);
      Columns::load_two(q + k, v);
      sums.add(u[0], v[0]);
      sums.add(u[1], v[1]);
    }
  }
  return sums.result();
}

// The sums of two chunks against their maxima, and the maxima of the next two.
template <class Columns>
inline PairSums sum_pair(const PairOfChunks& now, Tops<float> top, double c,
                         const PairOfChunks& next, Tops<float>* top_next) {
  using Element = typename Columns::Element;
  const Exponent of_a(reference(top.a), c, 0.), of_b(reference(top.b), c, 0.);
  const Steps<Columns> a(now.a), b(now.b), next_a(next.a), next_b(next.b);
  PairVectors sums;
  Top top_a, top_b;
  const auto add = [&](const Element* p, const Element* q) __attribute__((always_inline)) {
    for (int k = 0; k < kStep; k += 2 * kLanes) {
      vfloat u[2], v[2];
      Columns::load_two(p + k, u);
      Columns::load_two(q + k, v);
      sums.add(of_a, of_b, u, v);
    }
  };
  const auto look_at = [](const Element* p, Top& top) __attribute__((always_inline)) {
    vfloat x[kWays];
    for (int k = 0; k < kWays; k += 2) Columns::load_two_keys(p + k * kLanes, x + k);
    top.add(x);
  };
  int64_t s = 0;
  for (const int64_t end = a.full < next_a.full ? a.full : next_a.full; s < end; ++s) {
    prefetch_step(next_a.at(s));
    prefetch_step(next_b.at(s));
    look_at(next_a.at(s), top_a);
    look_at(next_b.at(s), top_b);
    add(a.at(s), b.at(s));
  }
  Element buffer_a[kStep], buffer_b[kStep];
  for (int64_t t = s; t < next_a.all; ++t) {
    look_at(next_a.get(t, buffer_a), top_a);
    look_at(next_b.get(t, buffer_b), top_b);
  }
  for (int64_t t = s; t < a.all; ++t) add(a.get(t, buffer_a), b.get(t, buffer_b));
  *top_next = {Columns::from_key(top_a.result()), Columns::from_key(top_b.result())};
  const PairSums result = sums.result(top, of_a, of_b);
  const bool is_sound = fabs(result.slope) < INFINITY && !of_a.overflows() && !of_b.overflows();
  return is_sound || now.a.n == 0 ? result : careful_pair<Columns>(now, top, c);
}

template <class Columns>
inline PairSums sum_pair(const PairOfChunks& now, Tops<double> top, double c,
                         const PairOfChunks& next, Tops<double>* top_next) {
  const auto highest = [](const Chunk& chunk) {
    double top = -INFINITY;
    for (int64_t j = 0; j < chunk.n; ++j)
      top = fmax(top, static_cast<const double*>(chunk.data)[j]);
    return top;
  };
  *top_next = {highest(next.a), highest(next.b)};
  CarefulPair<double> sums{top, c};
  for (int64_t j = 0; j < now.a.n; ++j)
    sums.add(static_cast<const double*>(now.a.data)[j], static_cast<const double*>(now.b.data)[j]);
  return sums.result();
}

template <class Columns, class T>
struct Forward {
  using Element = typename Columns::Element;
  using Position = Row;
  using Piece = PairOfChunks;
  using Sums = PairSums;
  using Top = Tops<T>;
  // Two chunks and the next two stay in the first-level cache.
  static constexpr int64_t kChunk = kChunkBytes / 2 / sizeof(Element), kBuffer = 2 * kChunk;
  const CategoricalKlForward& a;
  const int64_t chunks = (a.vocab + kChunk - 1) / kChunk;

  Row row(int64_t i) const { return Row(a, i); }
  double scale(const Row&) const { return 1. / a.temperature; }
  PairOfChunks chunk(const Row& r, int64_t k, Element* buffer) const {
    const int64_t from = k * kChunk, n = a.vocab - from < kChunk ? a.vocab - from : kChunk;
    return {{columns_of_row<Columns>(a.first, r.row, r.col, from, n, buffer), n},
            {columns_of_row<Columns>(a.second, r.row, r.col, from, n, buffer + kChunk), n}};
  }
  PairSums sum(const Row& r, const PairOfChunks& now, Tops<T> top, const PairOfChunks& next,
               Tops<T>* top_next) const {
    return sum_pair<Columns>(now, top, scale(r), next, top_next);
  }

  PairSums empty() const { return empty_pair(); }
  void finish_row(const Row& r, RowInParts<PairSums>& parts) const {
    const double c = scale(r);
    PairSums sums = merge(parts.rest, parts.top, c);
    // One token holds most of the mass of both: what the others add must not be rounded away.
    if constexpr (sizeof(T) == sizeof(float))
      if (total(sums.a) < 1.5 && total(sums.b) < 1.5 && sums.b.max == parts.top.b.max) {
        alignas(64) Element buffer[kBuffer];
        const Tops<T> top{static_cast<T>(sums.a.max), static_cast<T>(sums.b.max)};
        parts.top = careful_pair<Columns>(chunk(r, parts.top_index, buffer), top, c);
        sums = merge(parts.rest, parts.top, c);
      }
    write(r.position, divergence(sums), sums.a.max, log_of(sums.a), sums.b.max, log_of(sums.b));
  }
  void skip_row(const Row& r) const { write(r.position, 0., 0., 0., 0., 0.); }

  void write(int64_t i, double kl, double max_a, double log_a, double max_b, double log_b) const {
    *at<T>(a.kl, i) = static_cast<T>(kl);
    T* state = at<T>(a.state, 4 * i);
    state[0] = static_cast<T>(max_a);
    state[1] = static_cast<T>(log_a);
    state[2] = static_cast<T>(max_b);
    state[3] = static_cast<T>(log_b);
  }
};

// ---- backward ---------------------------------------------------------------------------------

// factor * 2^y for y <= 0.
template <class T>
struct ScaledPower;
template <>
struct ScaledPower<float> {
  const PowerSeries series;
  explicit ScaledPower(double factor) : series(static_cast<float>(factor)) {}
  PPOK_INLINE vfloat operator()(vfloat y) const {
    const Power p = vexp2_nonpositive(above_zero_power(y), series);
    return p.scale * p.series;
  }
};
template <>
struct ScaledPower<double> {
  const double factor;
  explicit ScaledPower(double factor) : factor(factor) {}
  double operator()(double y) const { return factor * exp2(y); }
};

PPOK_INLINE vfloat expm1_nonpositive(vfloat x) {
  return exponential<float>(
             x, [](vfloat t, vint) { return power_of_2(t * static_cast<float>(kLog2E)); })
      .minus_one;
}
PPOK_INLINE double expm1_nonpositive(double x) { return expm1(x); }

// upstream * c * the slope of one row, in its columns.
template <class T, bool kOfSecond>
struct Gradient {
  using V = typename Lanes<T>::V;
  ScaledPower<T> power;
  T max_a, max_b, gain, c, log2_a, log2_b, gap_of_all;
  Gradient(const CategoricalKlBackward& a, const Row& r, double upstream)
      : power(upstream / a.temperature) {
    const T* state = at<T>(a.state, 4 * r.position);
    max_a = state[0];
    max_b = state[2];
    c = static_cast<T>(1. / a.temperature);
    gain = static_cast<T>(kLog2E / a.temperature);
    log2_a = static_cast<T>(state[1] * kLog2E);
    log2_b = static_cast<T>(state[3] * kLog2E);
    const double logs = static_cast<double>(state[3]) - state[1];
    gap_of_all = static_cast<T>(kOfSecond ? logs : logs - *at<T>(a.kl, r.position));
  }
  PPOK_INLINE V operator()(V u, V v) const {
    const V da = u - max_a, db = v - max_b, gap = (da - db) * c + gap_of_all;
    const V ya = da * gain - log2_a, yb = db * gain - log2_b;
    if (!kOfSecond) return slope_of_first<T>(power(ya), gap);
    const V minus_size = gap > T(0) ? -gap : gap;
    return slope_of_second<T>(power(gap > T(0) ? ya : yb), gap, expm1_nonpositive(minus_size));
  }
};

template <class Columns, class Gradient, class Element>
inline void gradient_run(const Element* u, const Element* v, Element* grad, int64_t n,
                         const Gradient& gradient) {
  if constexpr (Columns::kType == kF64) {
    for (int64_t j = 0; j < n; ++j) grad[j] = gradient(u[j], v[j]);
  } else {
    const auto two = [&](auto* p, auto* q, auto* to) __attribute__((always_inline)) {
      vfloat x[2], y[2];
      Columns::load_two(p, x);
      Columns::load_two(q, y);
      for (int k = 0; k < 2; ++k) x[k] = gradient(x[k], y[k]);
      Columns::store_two(to, x);
    };
    int64_t j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) two(u + j, v + j, grad + j);
    if (j < n) {
      Element tail_u[2 * kLanes] = {}, tail_v[2 * kLanes] = {};
      memcpy(tail_u, u + j, (n - j) * sizeof(Element));
      memcpy(tail_v, v + j, (n - j) * sizeof(Element));
      two(tail_u, tail_v, tail_u);
      memcpy(grad + j, tail_u, (n - j) * sizeof(Element));
    }
  }
}

// Made in place, or in the cache: to be converted, or to be streamed past it.
template <class Columns, class T, bool kOfSecond>
void backward(const CategoricalKlBackward& a) {
  using Element = typename Columns::Element;
  const int64_t size = a.rows * a.cols * a.vocab * sizeof(Element);
  const bool convert = a.grad.dtype != Columns::kType, stream = !convert && size >= kStreamBytes;
  for_parts_of_rows(a.rows * a.cols, a.vocab, a.threads, [&](int64_t i, int64_t from, int64_t n) {
    const Row r(a, i);
    double upstream = r.live() ? read_one<double>(a.grad_kl, r.row, r.col) : 0.;
    if (upstream == 0.) return zero_columns(a.grad, r.row, r.col, from, n);
    if (!(fabs(*at<T>(a.kl, i)) < INFINITY)) upstream = NAN;
    const Gradient<T, kOfSecond> gradient(a, r, upstream);
    for (const int64_t end = from + n; from < end; from += kTile) {
      alignas(64) Element buffers[3][kTile];
      const int64_t count = end - from < kTile ? end - from : kTile;
      const Element* u = columns_of_row<Columns>(a.first, r.row, r.col, from, count, buffers[0]);
      const Element* v = columns_of_row<Columns>(a.second, r.row, r.col, from, count, buffers[1]);
      char* to = column(a.grad, r.row, r.col, from);
      Element* made = convert || stream ? buffers[2] : reinterpret_cast<Element*>(to);
      gradient_run<Columns>(u, v, made, count, gradient);
      if (stream) stream_out(to, made, count * sizeof(Element));
      if constexpr (sizeof(Element) > 2)
        if (convert) write_run(to, a.grad.dtype, a.grad.stride[2], count, made);
    }
  });
}

// body(columns, zero): how both logits are read, and what they are computed in.
template <class Args, class Body>
void with_columns(const Args& a, Body&& body) {
  const int32_t first = a.first.dtype, second = a.second.dtype;
  if (first == kF64 || second == kF64) return body(Columns<kF64>(), 0.);
  if (first == kBF16 && second == kBF16) return body(Columns<kBF16>(), 0.f);
  if (first == kF16 && second == kF16) return body(Columns<kF16>(), 0.f);
  body(Columns<kF32>(), 0.f);
}

}  // namespace

Fault categorical_kl_forward(const CategoricalKlForward& a) {
  with_columns(a, [&](auto columns, auto zero) {
    sum_rows(Forward<decltype(columns), decltype(zero)>{a}, a.rows * a.cols, a.vocab, a.threads);
  });
  return {kNoFault, 0};
}

Fault categorical_kl_backward(const CategoricalKlBackward& a) {
  with_columns(a, [&](auto columns, auto zero) {
    a.of_second ? backward<decltype(columns), decltype(zero), true>(a)
                : backward<decltype(columns), decltype(zero), false>(a);
  });
  return {kNoFault, 0};
}

}  // namespace PPOK_ISA
}  // namespace ppok
