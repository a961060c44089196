// The sums of one chunk of a row of logits against its own maximum, while the maximum of the next
// is found.
#pragma once
#include "cpu/tile.h"
#include "math/logprob.h"

namespace ppok {
namespace PPOK_ISA {

constexpr int64_t kChunkBytes = 16384;
constexpr int kWays = 4;  // independent chains of vectors, to hide the latency of each
constexpr int kStep = kWays * kLanes;
constexpr int kPrefetch = 8192;  // bytes ahead of the maximum
constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// n contiguous columns, one of which may be left out as if it were -inf.
struct Chunk {
  const void* data = nullptr;
  int64_t n = 0, hole = -1;  // hole < 0: none
};

// y = (x - reference) gain - less in base 2. With a fused multiply-add x gain is exact, and all
// that is rounded besides y is reference * gain + less: by `excess`, the same for every column.
struct Exponent {
  float reference, gain, offset;
  double excess;
  Exponent(float reference, double scale, double less) : reference(reference) {
    gain = static_cast<float>(scale * kLog2E);
    const double exact = (kFused ? static_cast<double>(reference) * gain : 0.) + less;
    offset = static_cast<float>(exact);
    excess = exact - offset;
  }
  PPOK_INLINE vfloat operator()(vfloat x) const {
    if (kFused) return multiply_add(x, splat(gain), splat(-offset));
    return (x - reference) * gain - offset;
  }
  bool overflows() const { return !(fabsf(offset) < 0x1p100f); }
  // What undoes the excess in a sum of powers.
  double correction() const {
    const double x = kLn2 * excess;
    return fabs(x) < 1e-4 ? 1. - x + 0.5 * x * x : exp(-x);
  }
};

PPOK_INLINE double total(const vfloat* x) { return sum_lanes((x[0] + x[1]) + (x[2] + x[3])); }

// What one chunk adds up to, in vectors.
template <bool kEntropy>
struct Sums {
  vfloat sum[kWays] = {}, slope[kWays] = {};
  PPOK_INLINE void add(const Exponent& exponent, const vfloat* x) {
    for (int k = 0; k < kWays; ++k) {
      const vfloat y = above_zero_power(exponent(x[k]));
      const Power e = vexp2_nonpositive(y, PowerSeries(1.f));
      if (kEntropy) {
        const vfloat weight = e.scale * e.series;
        sum[k] += weight;
        slope[k] = multiply_add(weight, y, slope[k]);
      } else {
        sum[k] = multiply_add(e.scale, e.series, sum[k]);
      }
    }
  }
  RowSums result(double max, const Exponent& exponent) const {
    const double rest = total(sum), common = exponent.correction();
    if (max == -INFINITY) return {max, 0., rest, 0.};  // 0, unless a NaN hid among the -inf
    const double slopes = kEntropy ? kLn2 * (total(slope) - exponent.excess * rest) : 0.;
    return {max, 0., common * rest, common * slopes};
  }
};

// The same, with the elements equal to the maximum counted apart; for any finite maximum.
struct CarefulSums {
  vfloat sum[kWays] = {}, slope[kWays] = {}, equal[kWays] = {};
  PPOK_INLINE void add(float max, float gain, const vfloat* x) {
    for (int k = 0; k < kWays; ++k) {
      const vfloat y = above_zero_power((x[k] - max) * gain);
      const Power e = vexp2_nonpositive(y, PowerSeries(1.f));
      const vfloat weight = e.scale * e.series;
      equal[k] += select(x[k] == max, splat(1.f), vfloat{});
      sum[k] += select(x[k] == max, vfloat{}, weight);
      slope[k] += weight * y;
    }
  }
  RowSums result(double max) const { return {max, total(equal), total(sum), kLn2 * total(slope)}; }
};

// The maximum of one chunk, in vectors; NaN is passed over.
struct Top {
  vfloat top[kWays];
  Top() {
    for (vfloat& t : top) t = splat(-INFINITY);
  }
  PPOK_INLINE void add(const vfloat* x) {
    for (int k = 0; k < kWays; ++k) top[k] = max_or_second(x[k], top[k]);
  }
  PPOK_INLINE float result() const {
    return max_lanes(max_or_second(max_or_second(top[0], top[1]), max_or_second(top[2], top[3])));
  }
};

// A chunk as steps of kStep columns; those with the hole or the end are first copied out.
template <class Columns>
struct Steps {
  using Element = typename Columns::Element;
  const Element* data;
  int64_t n, hole, full, all;
  explicit Steps(const Chunk& c)
      : data(static_cast<const Element*>(c.data)),
        n(c.n),
        hole(c.hole),
        full(c.n / kStep),
        all((c.n + kStep - 1) / kStep) {}
  // The end of the steps from `step` on that can be read in place.
  int64_t plain_until(int64_t step) const {
    return hole >= step * kStep && hole / kStep < full ? hole / kStep : full;
  }
  PPOK_INLINE const Element* at(int64_t step) const { return data + step * kStep; }
  const Element* copied(int64_t step, Element* buffer) const {
    const int64_t from = step * kStep, count = n - from < kStep ? n - from : kStep;
    for (int i = 0; i < kStep; ++i) buffer[i] = Columns::minus_infinity();
    memcpy(buffer, at(step), count * sizeof(Element));
    if (hole >= from && hole < from + count) buffer[hole - from] = Columns::minus_infinity();
    return buffer;
  }
  PPOK_INLINE const Element* get(int64_t step, Element* buffer) const {
    return step < full && (hole < 0 || hole / kStep != step) ? at(step) : copied(step, buffer);
  }
  template <class Body>
  PPOK_INLINE void each(Body&& body) const {
    Element buffer[kStep];
    for (int64_t s = 0; s < all; ++s) body(get(s, buffer));
  }
};

template <class Element>
PPOK_INLINE void prefetch_step(const Element* p) {
  for (size_t line = 0; line < kStep * sizeof *p; line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetch + line);
}

template <class Columns>
inline RowSums careful_sums(const Chunk& chunk, float max, double c) {
  CarefulSums sums;
  Steps<Columns>(chunk).each([&](const auto* p) __attribute__((always_inline)) {
    vfloat x[kWays];
    for (int k = 0; k < kWays; k += 2) Columns::load_two(p + k * kLanes, x + k);
    sums.add(max, static_cast<float>(c * kLog2E), x);
  });
  return sums.result(max);
}

// The sums of one chunk against its maximum, and the maximum of the next.
template <class Columns, bool kEntropy>
inline RowSums sum_chunk(const Chunk& now, float max, double c, const Chunk& next,
                         float* max_next) {
  const Exponent exponent(max == -INFINITY ? 0.f : max, c, 0.);
  const Steps<Columns> a(now), b(next);
  Sums<kEntropy> sums;
  Top top;
  const auto add_sums = [&](const auto* p) __attribute__((always_inline)) {
    vfloat x[kWays];
    for (int k = 0; k < kWays; k += 2) Columns::load_two(p + k * kLanes, x + k);
    sums.add(exponent, x);
  };
  const auto add_top = [&](const auto* p) __attribute__((always_inline)) {
    vfloat x[kWays];
    for (int k = 0; k < kWays; k += 2) Columns::load_two_keys(p + k * kLanes, x + k);
    top.add(x);
  };
  for (int64_t s = 0; s < a.all || s < b.all;) {
    const bool in_now = s < a.all, in_next = s < b.all;
    const int64_t end_now = a.plain_until(s), end_next = b.plain_until(s);
    if (in_now && in_next && end_now > s && end_next > s) {
      for (const int64_t end = end_now < end_next ? end_now : end_next; s < end; ++s) {
        prefetch_step(b.at(s));
        add_top(b.at(s));
        add_sums(a.at(s));
      }
    } else if (in_now && !in_next && end_now > s) {
      for (; s < end_now; ++s) add_sums(a.at(s));
    } else if (in_next && !in_now && end_next > s) {
      for (; s < end_next; ++s) add_top(b.at(s));
    } else {
      typename Columns::Element buffer[kStep];
      if (in_now) add_sums(end_now > s ? a.at(s) : a.copied(s, buffer));
      if (in_next) add_top(end_next > s ? b.at(s) : b.copied(s, buffer));
      ++s;
    }
  }
  *max_next = Columns::from_key(top.result());
  if (exponent.overflows() && now.n) return careful_sums<Columns>(now, max, c);
  return sums.result(max, exponent);
}

// fp64: plainly, and always with care.
template <class Columns, bool kEntropy, class T>
inline RowSums sum_chunk(const Chunk& now, T max, double c, const Chunk& next, T* max_next) {
  const T *u = static_cast<const T*>(now.data), *v = static_cast<const T*>(next.data);
  *max_next = -INFINITY;
  for (int64_t j = 0; j < next.n; ++j)
    if (j != next.hole && v[j] > *max_next) *max_next = v[j];
  const double reference = max == -INFINITY ? 0. : max;
  RowSums sums{max, 0., 0., 0.};
  for (int64_t j = 0; j < now.n; ++j) {
    if (j == now.hole) continue;
    const double z = (u[j] - reference) * c, e = exp(z);
    if (u[j] == max && max != -INFINITY) {
      sums.at_max += 1.;
    } else {
      sums.rest += e;
      if (e != 0.) sums.slope += e * z;
    }
  }
  return sums;
}

}  // namespace PPOK_ISA
}  // namespace ppok
