// x_t = delta_t + c x_{t+1} (kReverse; else + c x_{t-1}) over one chunk, in blocks of one vector.
#pragma once
#include "cpu/simd.h"
#include "math/scan.h"

namespace ppok {
namespace PPOK_ISA {

constexpr int64_t kChunk = 1024;
constexpr int kSteps = kLanes / 2;  // of a block

// The steps of one block, combined: x = delta + c x_next by doubling. Where coefficients are given,
// c differs from step to step, and 0 cuts: what lies beyond is not looked at, NaN included.
template <bool kReverse>
struct Blocks {
  double c = -1.;
  vdouble doubled[3];  // c, c^2, c^4: of steps whose partner is in the block
  vdouble reach;       // the power by which a carry reaches each step
  double across;       // and the next block

  void set(double coefficient) {
    if (c == coefficient) return;
    c = coefficient;
    vdouble power = splat_double(c);
    for (int level = 0, by = 1; by < kSteps; ++level, by *= 2) {
      doubled[level] = power;
      power = product(power, shifted<kReverse>(power, splat_double(1.), by));
    }
    reach = power;
    across = power[kReverse ? 0 : kSteps - 1];
  }

  static PPOK_INLINE vdouble product(vdouble a, vdouble b) {
    const vdouble both = a * b;
    const vlong positive = (a > 0.) & (b > 0.);
    const vdouble normal = positive & (both < DBL_MIN) ? splat_double(DBL_MIN) : both;
    return normal > DBL_MAX ? splat_double(DBL_MAX) : normal;
  }

  PPOK_INLINE vdouble from_zero(vdouble x) const {
    for (int level = 0, by = 1; by < kSteps; ++level, by *= 2)
      x = multiply_add(doubled[level], shifted<kReverse>(x, vdouble{}, by), x);
    return x;
  }

  static PPOK_INLINE vdouble from_zero(vdouble x, vdouble coefficient, vdouble* reached) {
    for (int by = 1; by < kSteps; by *= 2) {
      const vdouble partner = shifted<kReverse>(x, vdouble{}, by);
      x = multiply_add(coefficient, coefficient > 0. ? partner : vdouble{}, x);
      coefficient = product(coefficient, shifted<kReverse>(coefficient, splat_double(1.), by));
    }
    *reached = coefficient;
    return x;
  }

  // What one block hands to the next.
  static PPOK_INLINE vdouble edge(vdouble x) { return spread_edge<kReverse>(x); }

  // Scans n steps from zero, in place. Zeros that the scan meets first stay zeros, and shift no
  // block: padding does not change the bits of what it pads.
  template <bool kCuts>
  void scan(double* x, const double* coefficient, int64_t n) const {
    if (kReverse)
      while (n && x[n - 1] == 0.) --n;
    else
      for (; n && *x == 0.; ++x, ++coefficient) --n;
    const Blocks blocks = *this;  // in registers, whatever is written
    const vdouble across = splat_double(blocks.across);
    vdouble carry{};
    for (int64_t done = 0; done < n; done += kSteps) {
      const int64_t count = n - done < kSteps ? n - done : kSteps;
      double *at = x + (kReverse ? n - done - count : done), buffer[2][kSteps] = {};
      const double* by = coefficient + (at - x);
      const int64_t into = kReverse ? kSteps - count : 0;
      if (count < kSteps) {
        memcpy(buffer[0] + into, at, count * sizeof(double));
        if (kCuts) memcpy(buffer[1] + into, by, count * sizeof(double));
      }
      const bool whole = count == kSteps;
      const vdouble delta = load_doubles(whole ? at : buffer[0]);
      vdouble y;
      if (kCuts) {
        vdouble reached;
        y = from_zero(delta, load_doubles(whole ? by : buffer[1]), &reached);
        y = multiply_add(reached, reached > 0. ? carry : vdouble{}, y);
        carry = edge(y);
      } else {
        y = blocks.from_zero(delta);
        const vdouble handed = edge(y);
        y = multiply_add(blocks.reach, carry, y);
        carry = multiply_add(across, carry, handed);
      }
      if (whole) {
        store_doubles(at, y);
      } else {
        store_doubles(buffer[0], y);
        memcpy(at, buffer[0] + into, count * sizeof(double));
      }
    }
  }
};

// c^1, c^2, ... from the end the scan starts at.
template <bool kReverse>
struct Powers {
  double c = 0.;
  double table[kChunk];

  const double* of(double coefficient) {
    if (c == coefficient) return table;
    c = coefficient;
    constexpr int kStep = 8;
    double power[kStep], stride = 1.;
    for (int k = 0; k < kStep; ++k) power[k] = stride = stride * c;
    for (int64_t j = 0; j < kChunk; j += kStep)
      for (int k = 0; k < kStep; ++k) {
        table[kReverse ? kChunk - 1 - j - k : j + k] = power[k];
        power[k] = clamp_power(power[k] * stride);
      }
    return table;
  }
};

// The product of the coefficients from each of n steps to the last one, or to the first that is 0.
inline void products_to_end(const double* coefficient, int64_t n, double* product) {
  vdouble later = splat_double(1.);
  for (int64_t left = n; left > 0; left -= kSteps) {
    const int64_t missing = left < kSteps ? kSteps - left : 0, at = left + missing - kSteps;
    double buffer[kSteps];
    for (int64_t i = 0; missing && i < kSteps; ++i)
      buffer[i] = i < missing ? 1. : coefficient[i - missing];
    vdouble c = load_doubles(missing ? buffer : coefficient + at);
    for (int by = 1; by < kSteps; by *= 2)
      c = Blocks<true>::product(c, shifted<true>(c, splat_double(1.), by));
    c = Blocks<true>::product(c, later);
    later = Blocks<true>::edge(c);
    store_doubles(missing ? buffer : product + at, c);
    for (int64_t i = missing; missing && i < kSteps; ++i) product[i - missing] = buffer[i];
  }
}

}  // namespace PPOK_ISA
}  // namespace ppok
