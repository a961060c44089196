// The vector type of the instruction set this file is compiled for, and the functions the kernels
// need on it.
//
// GCC/Clang vector extensions, so that the order of every sum is written down rather than chosen by
// the vectoriser; intrinsics only where the compiler has no words for the instruction. Kernel files
// include C headers only and live in a namespace per instruction set: an inline function emitted
// with AVX-512 code must never be merged with one of the generic path.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(PPOK_ISA_AVX512)
#define PPOK_VECTOR_BYTES 64
#elif defined(PPOK_ISA_AVX2)
#define PPOK_VECTOR_BYTES 32
#else
#define PPOK_VECTOR_BYTES 16
#endif

#define PPOK_INLINE inline __attribute__((always_inline))

namespace ppok {
namespace PPOK_ISA {

constexpr int kLanes = PPOK_VECTOR_BYTES / 4;

typedef float vfloat __attribute__((vector_size(PPOK_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(PPOK_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(PPOK_VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(PPOK_VECTOR_BYTES / 2)));
typedef double vdouble __attribute__((vector_size(PPOK_VECTOR_BYTES)));
typedef float vfloat_mem __attribute__((vector_size(PPOK_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t vhalf_mem
    __attribute__((vector_size(PPOK_VECTOR_BYTES / 2), aligned(2), may_alias));

PPOK_INLINE vfloat splat(float x) { return x - vfloat{}; }
PPOK_INLINE vfloat load(const float* p) { return *reinterpret_cast<const vfloat_mem*>(p); }
PPOK_INLINE void store(float* p, vfloat x) { *reinterpret_cast<vfloat_mem*>(p) = x; }
// Widening; GCC 12 takes __builtin_convertvector to these apart.
#if defined(PPOK_ISA_AVX512)
PPOK_INLINE vdouble widen_low(vfloat x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
PPOK_INLINE vdouble widen_high(vfloat x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
PPOK_INLINE vint load_bytes(const uint8_t* p) {
  return reinterpret_cast<vint>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(PPOK_ISA_AVX2)
PPOK_INLINE vdouble widen_low(vfloat x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
PPOK_INLINE vdouble widen_high(vfloat x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
PPOK_INLINE vint load_bytes(const uint8_t* p) {
  return reinterpret_cast<vint>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
PPOK_INLINE vdouble widen_low(vfloat x) { return vdouble{x[0], x[1]}; }
PPOK_INLINE vdouble widen_high(vfloat x) { return vdouble{x[2], x[3]}; }
PPOK_INLINE vint load_bytes(const uint8_t* p) { return vint{p[0], p[1], p[2], p[3]}; }
#endif

PPOK_INLINE vfloat bits_to_float(vint x) { return reinterpret_cast<vfloat>(x); }
PPOK_INLINE vint float_to_bits(vfloat x) { return reinterpret_cast<vint>(x); }
PPOK_INLINE bool any_lane(vint condition) {
#if defined(PPOK_ISA_AVX512)
  const __m512i bits = reinterpret_cast<__m512i>(condition);
  return _mm512_test_epi32_mask(bits, bits) != 0;
#elif defined(PPOK_ISA_AVX2)
  const __m256i bits = reinterpret_cast<__m256i>(condition);
  return !_mm256_testz_si256(bits, bits);
#else
  return (condition[0] | condition[1] | condition[2] | condition[3]) != 0;
#endif
}
PPOK_INLINE vfloat select(vint condition, vfloat a, vfloat b) { return condition ? a : b; }

// The larger of two; b if either is NaN. GCC makes a comparison and a blend of a > b ? a : b.
#if defined(PPOK_ISA_AVX512)
PPOK_INLINE vfloat max_or_second(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
#elif defined(PPOK_ISA_AVX2)
PPOK_INLINE vfloat max_or_second(vfloat a, vfloat b) { return _mm256_max_ps(a, b); }
#else
PPOK_INLINE vfloat max_or_second(vfloat a, vfloat b) { return a > b ? a : b; }
#endif

// a b + c, rounded once where kFused says so.
#if defined(PPOK_ISA_AVX512)
constexpr bool kFused = true;
PPOK_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(PPOK_ISA_AVX2)
constexpr bool kFused = true;
PPOK_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
#else
constexpr bool kFused = false;
PPOK_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) { return a * b + c; }
#endif

// ---- half precision ---------------------------------------------------------------------------

PPOK_INLINE vfloat load_bf16(const uint16_t* p) {
#if defined(PPOK_ISA_AVX512)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<vfloat>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(PPOK_ISA_AVX2)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<vfloat>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
  const vhalf_mem half = *reinterpret_cast<const vhalf_mem*>(p);
  return reinterpret_cast<vfloat>(__builtin_convertvector(half, vuint) << 16);
#endif
}

// Two halves in every lane, the first in its low bits.
PPOK_INLINE vuint load_pairs(const uint16_t* p) {
  typedef uint32_t vuint_mem __attribute__((vector_size(PPOK_VECTOR_BYTES), aligned(2), may_alias));
  return *reinterpret_cast<const vuint_mem*>(p);
}

// The low halves of the lanes. GCC 12 turns __builtin_convertvector into one extraction per lane
// here.
PPOK_INLINE void store_low_halves(uint16_t* p, vuint x) {
#if defined(PPOK_ISA_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
#elif defined(PPOK_ISA_AVX2)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(x), _mm256_setzero_si256());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  *reinterpret_cast<vhalf_mem*>(p) = __builtin_convertvector(x, vhalf);
#endif
}

PPOK_INLINE void store_pairs(uint16_t* p, vuint x) { memcpy(p, &x, sizeof x); }

// Rounded to nearest even, in the upper half of each lane (the lower is left as it comes out); NaN
// stays NaN (quiet).
PPOK_INLINE vuint round_to_bf16(vfloat x) {
  const vuint bits = reinterpret_cast<vuint>(x);
  const vuint rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (x != x) ? bits | 0x400000u : rounded;
}

PPOK_INLINE void store_bf16(uint16_t* p, vfloat x) { store_low_halves(p, round_to_bf16(x) >> 16); }

PPOK_INLINE vfloat load_f16(const uint16_t* p) {
#if defined(PPOK_ISA_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(PPOK_ISA_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Magnitude: exponent and mantissa moved into place, exponent re-biased (112) exactly by a
  // multiplication; subnormal halves have no exponent to re-bias and go through an integer
  // conversion instead.
  const vhalf_mem half = *reinterpret_cast<const vhalf_mem*>(p);
  const vuint bits = __builtin_convertvector(half, vuint);
  const vuint magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  const vuint normal =
      (magnitude << 13) + (magnitude >= 0x7c00u ? vuint{} + (224u << 23) : vuint{} + (112u << 23));
  const vfloat subnormal =
      __builtin_convertvector(reinterpret_cast<vint>(magnitude), vfloat) * 0x1p-24f;
  const vuint value = magnitude < 0x400u ? reinterpret_cast<vuint>(subnormal) : normal;
  return reinterpret_cast<vfloat>(value | sign);
#endif
}

PPOK_INLINE void store_f16(uint16_t* p, vfloat x) {
#if defined(PPOK_ISA_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(PPOK_ISA_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const vuint bits = reinterpret_cast<vuint>(x);
  const vuint magnitude = bits & 0x7fffffffu;
  const vuint normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the result is subnormal: adding 0.5 rounds at its last bit, in the current
  // (nearest) mode.
  const vuint subnormal = reinterpret_cast<vuint>(reinterpret_cast<vfloat>(magnitude) + 0.5f) -
                          reinterpret_cast<vuint>(splat(0.5f));
  vuint half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? vuint{} + 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? vuint{} + 0x7e00u : half;
  store_low_halves(p, half | ((bits >> 16) & 0x8000u));
#endif
}

// ---- vectors of doubles -------------------------------------------------------------------------

typedef double vdouble_mem __attribute__((vector_size(PPOK_VECTOR_BYTES), aligned(8), may_alias));

PPOK_INLINE vdouble load_doubles(const double* p) {
  return *reinterpret_cast<const vdouble_mem*>(p);
}
PPOK_INLINE void store_doubles(double* p, vdouble x) { *reinterpret_cast<vdouble_mem*>(p) = x; }

// a b + c, rounded once where the target has the instruction.
PPOK_INLINE vdouble multiply_add(vdouble a, vdouble b, vdouble c) {
#if defined(PPOK_ISA_AVX512)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(PPOK_ISA_AVX2)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__FP_FAST_FMA)
  for (int i = 0; i < kLanes / 2; ++i) c[i] = fma(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

PPOK_INLINE vdouble splat_double(double x) { return x - vdouble{}; }

PPOK_INLINE vdouble widen(const double* p) { return load_doubles(p); }
PPOK_INLINE void narrow(double* p, vdouble x) { store_doubles(p, x); }
#if defined(PPOK_ISA_AVX512)
PPOK_INLINE vdouble widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
PPOK_INLINE void narrow(float* p, vdouble x) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(x)); }
#elif defined(PPOK_ISA_AVX2)
PPOK_INLINE vdouble widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
PPOK_INLINE void narrow(float* p, vdouble x) { _mm_storeu_ps(p, _mm256_cvtpd_ps(x)); }
#else
PPOK_INLINE vdouble widen(const float* p) { return vdouble{p[0], p[1]}; }
PPOK_INLINE void narrow(float* p, vdouble x) {
  for (int i = 0; i < kLanes / 2; ++i) p[i] = static_cast<float>(x[i]);
}
#endif

// Lane i + by in lane i (kDown), or i - by; what lies outside comes from `fill`, the same in every
// lane.
template <bool kDown>
PPOK_INLINE vdouble shifted(vdouble x, vdouble fill, int by) {
#if defined(PPOK_ISA_AVX512)
  const __m512i a = reinterpret_cast<__m512i>(x), b = reinterpret_cast<__m512i>(fill);
  const __m512i y = by == 1 ? (kDown ? _mm512_alignr_epi64(b, a, 1) : _mm512_alignr_epi64(a, b, 7))
                    : by == 2
                        ? (kDown ? _mm512_alignr_epi64(b, a, 2) : _mm512_alignr_epi64(a, b, 6))
                        : (kDown ? _mm512_alignr_epi64(b, a, 4) : _mm512_alignr_epi64(a, b, 4));
  return reinterpret_cast<vdouble>(y);
#elif defined(PPOK_ISA_AVX2)
  if (by == 1)
    return kDown ? _mm256_blend_pd(_mm256_permute4x64_pd(x, 0x39), fill, 8)
                 : _mm256_blend_pd(_mm256_permute4x64_pd(x, 0x93), fill, 1);
  return kDown ? _mm256_permute2f128_pd(x, fill, 0x21) : _mm256_permute2f128_pd(x, fill, 0x02);
#else
  (void)by;  // 1
  return kDown ? vdouble{x[1], fill[0]} : vdouble{fill[0], x[0]};
#endif
}

// The first lane (kFirst) or the last, in every lane.
template <bool kFirst>
PPOK_INLINE vdouble spread_edge(vdouble x) {
#if defined(PPOK_ISA_AVX512)
  return kFirst ? _mm512_broadcastsd_pd(_mm512_castpd512_pd128(x))
                : _mm512_permutexvar_pd(_mm512_set1_epi64(7), x);
#else
  return x[kFirst ? 0 : kLanes / 2 - 1] - vdouble{};
#endif
}

// ---- past the cache ----------------------------------------------------------------------------

// Copies to memory that nobody reads soon, whole lines past the cache; stream_end() before another
// thread may look.
inline void stream_out(void* to, const void* from, size_t bytes) {
#if defined(__SSE2__)
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  size_t head = -reinterpret_cast<uintptr_t>(out) % 64;
  if (head > bytes) head = bytes;
  memcpy(out, in, head);
  size_t i = head;
  for (; i + 64 <= bytes; i += 64)
    for (int k = 0; k < 64; k += PPOK_VECTOR_BYTES) {
#if defined(PPOK_ISA_AVX512)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i + k), _mm512_loadu_si512(in + i + k));
#elif defined(PPOK_ISA_AVX2)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i + k),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i + k)));
#else
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i + k),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i + k)));
#endif
    }
  memcpy(out + i, in + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}

inline void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- elementary functions ---------------------------------------------------------------------

// e^x for any x: NaN stays NaN, overflow gives inf, -inf gives exactly 0. Error below 1.5 ulp of
// the result.
PPOK_INLINE vfloat vexp(vfloat x) {
  // Beyond these bounds the result is 0 or inf; they keep the range reduction finite.
  x = x < splat(-104.f) ? splat(-104.f) : x;
  x = x > splat(89.f) ? splat(89.f) : x;
#if defined(PPOK_ISA_AVX512)
  const vfloat n =
      _mm512_roundscale_ps(x * 1.44269504088896341f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vfloat magic =
      splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const vfloat shifted = x * 1.44269504088896341f + magic;
  const vfloat n = shifted - magic;
#endif
  vfloat r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in 9 bits
  r = r + n * 2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
#if defined(PPOK_ISA_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  const vint exponent =
      float_to_bits(shifted) - float_to_bits(magic);  // in [-150, 129]: two steps of scaling
  const vint half = exponent >> 1;
  return p * bits_to_float((half + 127) << 23) * bits_to_float((exponent - half + 127) << 23);
#endif
}

// 2^y = scale * series for y <= 0 (a rounding error above is fine), left as two factors: whoever
// sums or scales the powers does so in the multiplication. NaN stays NaN, -inf gives exactly 0, the
// error is about 1 ulp; what lies below 2^-126 becomes something between 0 and 2^-126.
//
// y = n / 2^kTableBits + r: adding `magic` rounds to n, whose low bits choose a power from a table
// held in one register, and whose high bits are added to its exponent.
struct Power {
  vfloat scale, series;
};

// Minimax for the relative error over r (below half an ulp), with the constant fixed at 1, so that
// y = 0 gives exactly 1. The table: the bits of 2^(k / 2^kTableBits), less what n = k adds to the
// exponent.
#if defined(PPOK_ISA_AVX512)
constexpr int kTableBits = 5;
constexpr float kPowerSeries[] = {1.f, 0.69315731525f, 0.24022649229f};
alignas(64) constexpr int32_t kPowerTable[] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
PPOK_INLINE vint look_up(vint index) {
  return reinterpret_cast<vint>(_mm512_permutex2var_epi32(_mm512_load_si512(kPowerTable),
                                                          reinterpret_cast<__m512i>(index),
                                                          _mm512_load_si512(kPowerTable + 16)));
}
#elif defined(PPOK_ISA_AVX2)
constexpr int kTableBits = 3;
constexpr float kPowerSeries[] = {1.f, 0.69314724207f, 0.24025763571f, 0.055496223271f};
alignas(32) constexpr int32_t kPowerTable[] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                               0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
PPOK_INLINE vint look_up(vint index) {
  return reinterpret_cast<vint>(
      _mm256_permutevar8x32_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(kPowerTable)),
                                  reinterpret_cast<__m256i>(index)));
}
#else
constexpr int kTableBits = 0;
constexpr float kPowerSeries[] = {1.f,
                                  0.69314721497f,
                                  0.24022652783f,
                                  0.055503105516f,
                                  0.0096176929598f,
                                  0.0013406643715f,
                                  0.00015594681287f};
PPOK_INLINE vint look_up(vint) { return vint{} + 0x3f800000; }
#endif

// The series, times a factor of the caller's.
struct PowerSeries {
  static constexpr int kTerms = sizeof kPowerSeries / sizeof *kPowerSeries;
  vfloat term[kTerms];
  explicit PowerSeries(float factor) {
    for (int k = 0; k < kTerms; ++k) term[k] = splat(factor * kPowerSeries[k]);
  }
};

PPOK_INLINE vfloat above_zero_power(vfloat y) { return max_or_second(splat(-127.f), y); }

PPOK_INLINE Power vexp2_nonpositive(vfloat y, const PowerSeries& series) {
  constexpr int kShift = 23 - kTableBits;
  const vfloat magic = splat(1.5f * (1 << kShift));
  const vfloat shifted = y + magic;
  const vfloat r = y - (shifted - magic);
  vfloat p = series.term[PowerSeries::kTerms - 1];
  for (int k = PowerSeries::kTerms - 2; k >= 0; --k) p = multiply_add(p, r, series.term[k]);
  const vuint n = reinterpret_cast<vuint>(shifted);  // wraps around, and so does what is added
  const vuint scale = reinterpret_cast<vuint>(look_up(reinterpret_cast<vint>(n))) + (n << kShift);
  return {reinterpret_cast<vfloat>(scale), p};
}

// tanh(x): relative error below 2 ulp, NaN stays NaN.
PPOK_INLINE vfloat vtanh(vfloat x) {
  const vfloat size = bits_to_float(float_to_bits(x) & 0x7fffffff);
  const vfloat square = x * x;
  vfloat p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const vfloat small = p * square * x + x;
  const vfloat large = 1.f - 2.f / (vexp(size + size) + 1.f);
  const vfloat signed_large = bits_to_float(float_to_bits(large) | (float_to_bits(x) & INT32_MIN));
  return select(size < splat(0.625f), small, signed_large);
}

typedef int64_t vlong __attribute__((vector_size(PPOK_VECTOR_BYTES)));

// As many bytes as a vector has doubles.
PPOK_INLINE vlong load_bytes_wide(const uint8_t* p) {
#if defined(PPOK_ISA_AVX512)
  return reinterpret_cast<vlong>(
      _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(PPOK_ISA_AVX2)
  int32_t four;
  memcpy(&four, p, sizeof four);
  return reinterpret_cast<vlong>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)));
#else
  return vlong{p[0], p[1]};
#endif
}

// e^x for any x: NaN stays NaN, overflow gives inf, what lies below 2^-1021 gives exactly 0. Error
// below 1.5 ulp of the result.
PPOK_INLINE vdouble vexp(vdouble x) {
  const vdouble bounded = x > 710. ? splat_double(710.) : x < -708. ? splat_double(-708.) : x;
  const vdouble magic = splat_double(6755399441055744.);  // 1.5 * 2^52: see above
  const vdouble rounded = multiply_add(bounded, splat_double(1.44269504088896340736), magic);
  const vdouble n = rounded - magic;
  vdouble r =
      multiply_add(n, splat_double(-0.693147180369123816490), bounded);  // exact: it ends in zeros
  r = multiply_add(n, splat_double(-1.90821492927058770002e-10), r);
  vdouble p = splat_double(1. / 6227020800.);  // 1 / 13!
  constexpr double kSeries[] = {1. / 479001600., 1. / 39916800., 1. / 3628800., 1. / 362880.,
                                1. / 40320.,     1. / 5040.,     1. / 720.,     1. / 120.,
                                1. / 24.,        1. / 6.,        1. / 2.};
  for (double term : kSeries) p = multiply_add(p, r, splat_double(term));
  p = multiply_add(p, r * r, r) + 1.;
  const vlong exponent = reinterpret_cast<vlong>(rounded) - reinterpret_cast<vlong>(magic);
  const vdouble half = reinterpret_cast<vdouble>((exponent + 1022) << 52);  // 2^(n - 1)
  return x < -708. ? vdouble{} : p * half * 2.;
}

// ---- horizontal reductions, in one fixed order ------------------------------------------------

PPOK_INLINE double sum_lanes(vdouble x) {
#if defined(PPOK_ISA_AVX512)
  return _mm512_reduce_add_pd(x);  // by halves, as below
#else
  double lanes[kLanes / 2];
  memcpy(lanes, &x, sizeof x);
  for (int step = kLanes / 4; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
#endif
}

PPOK_INLINE double sum_lanes(double x) { return x; }
PPOK_INLINE double sum_lanes(vfloat x) { return sum_lanes(widen_low(x) + widen_high(x)); }

PPOK_INLINE float max_lanes(vfloat x) {
#if defined(PPOK_ISA_AVX512)
  return _mm512_reduce_max_ps(x);
#else
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

// The same functions on one double: fp64 inputs take the plain path.
}  // namespace PPOK_ISA
}  // namespace ppok
