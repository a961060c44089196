// Reading and writing runs of a tensor of any dtype and stride as contiguous float or double tiles.
//
// A kernel is written once, over tiles that stay in the first-level cache; a run that already is
// contiguous and of the right dtype is read in place.
#pragma once
#include "cpu/simd.h"
#include "view.h"

namespace ppok {
namespace PPOK_ISA {

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr int32_t value = kF32;
};
template <>
struct DTypeOf<double> {
  static constexpr int32_t value = kF64;
};

inline float half_bits_to_float(uint16_t bits, bool bf16) {
  uint16_t lanes[kLanes] = {bits};
  return bf16 ? load_bf16(lanes)[0] : load_f16(lanes)[0];
}

inline uint16_t float_to_half_bits(float x, bool bf16) {
  uint16_t lanes[kLanes];
  bf16 ? store_bf16(lanes, splat(x)) : store_f16(lanes, splat(x));
  return lanes[0];
}

// Contiguous elements of one dtype, two vectors of floats at a time, in an order of their own: for
// sums and maxima. A key orders as its element does, and may be cheaper to make.
template <int32_t kDType>
struct Columns;

template <>
struct Columns<kF32> {
  static constexpr int32_t kType = kF32;
  using Element = float;
  static Element minus_infinity() { return -INFINITY; }
  static PPOK_INLINE void load_two(const Element* p, vfloat* x) {
    x[0] = load(p);
    x[1] = load(p + kLanes);
  }
  static PPOK_INLINE void load_two_keys(const Element* p, vfloat* x) { load_two(p, x); }
  static float from_key(float key) { return key; }
  static PPOK_INLINE void store_two(Element* p, const vfloat* x) {
    store(p, x[0]);
    store(p + kLanes, x[1]);
  }
  static float to_float(Element x) { return x; }
  static Element from_float(float x) { return x; }
};

template <>
struct Columns<kBF16> {
  static constexpr int32_t kType = kBF16;
  using Element = uint16_t;
  static Element minus_infinity() { return 0xff80; }
  static PPOK_INLINE void load_two(const Element* p, vfloat* x) {
    const vuint pairs = load_pairs(p);
    x[0] = reinterpret_cast<vfloat>(pairs << 16);
    x[1] = reinterpret_cast<vfloat>(pairs & 0xffff0000u);
  }
  // The upper element of a pair with the lower one behind it, as if that were more of its mantissa.
  static PPOK_INLINE void load_two_keys(const Element* p, vfloat* x) {
    const vuint pairs = load_pairs(p);
    x[0] = reinterpret_cast<vfloat>(pairs << 16);
    x[1] = reinterpret_cast<vfloat>(pairs);
  }
  static float from_key(float key) {
    uint32_t bits;
    memcpy(&bits, &key, sizeof bits);
    bits &= 0xffff0000u;
    memcpy(&key, &bits, sizeof bits);
    return key;
  }
  static PPOK_INLINE void store_two(Element* p, const vfloat* x) {
    store_pairs(p, round_to_bf16(x[0]) >> 16 | (round_to_bf16(x[1]) & 0xffff0000u));
  }
  static float to_float(Element x) { return half_bits_to_float(x, true); }
  static Element from_float(float x) { return float_to_half_bits(x, true); }
};

template <>
struct Columns<kF16> {
  static constexpr int32_t kType = kF16;
  using Element = uint16_t;
  static Element minus_infinity() { return 0xfc00; }
  static PPOK_INLINE void load_two(const Element* p, vfloat* x) {
    x[0] = load_f16(p);
    x[1] = load_f16(p + kLanes);
  }
  static PPOK_INLINE void load_two_keys(const Element* p, vfloat* x) { load_two(p, x); }
  static float from_key(float key) { return key; }
  static PPOK_INLINE void store_two(Element* p, const vfloat* x) {
    store_f16(p, x[0]);
    store_f16(p + kLanes, x[1]);
  }
  static float to_float(Element x) { return half_bits_to_float(x, false); }
  static Element from_float(float x) { return float_to_half_bits(x, false); }
};

template <>
struct Columns<kF64> {
  static constexpr int32_t kType = kF64;
  using Element = double;
};

template <class T>
inline void read_strided(const void* data, int32_t dtype, int64_t stride, int64_t n, T* out) {
  switch (dtype) {
    case kF32:
      for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<T>(static_cast<const float*>(data)[i * stride]);
      return;
    case kF64:
      for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<T>(static_cast<const double*>(data)[i * stride]);
      return;
    case kBF16:
    case kF16:
      for (int64_t i = 0; i < n; ++i)
        out[i] = half_bits_to_float(static_cast<const uint16_t*>(data)[i * stride], dtype == kBF16);
      return;
    case kI64:
      for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<T>(static_cast<const int64_t*>(data)[i * stride]);
      return;
    case kI32:
      for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<T>(static_cast<const int32_t*>(data)[i * stride]);
      return;
    case kI16:
      for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<T>(static_cast<const int16_t*>(data)[i * stride]);
      return;
    case kI8:
      for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<T>(static_cast<const int8_t*>(data)[i * stride]);
      return;
    default:
      for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<T>(static_cast<const uint8_t*>(data)[i * stride]);
  }
}

// n elements from data on, as T: in place where they already are contiguous T, else converted into
// buffer.
template <class T>
inline const T* read_run(const void* data, int32_t dtype, int64_t stride, int64_t n, T* buffer) {
  if (stride == 1 && dtype == DTypeOf<T>::value) return static_cast<const T*>(data);
  if (stride == 1 && sizeof(T) == 4 && (dtype == kBF16 || dtype == kF16)) {
    const uint16_t* half = static_cast<const uint16_t*>(data);
    float* out = reinterpret_cast<float*>(buffer);
    int64_t i = 0;
    if (dtype == kBF16)
      for (; i + kLanes <= n; i += kLanes) store(out + i, load_bf16(half + i));
    else
      for (; i + kLanes <= n; i += kLanes) store(out + i, load_f16(half + i));
    for (; i < n; ++i) out[i] = half_bits_to_float(half[i], dtype == kBF16);
    return buffer;
  }
  read_strided(data, dtype, stride, n, buffer);
  return buffer;
}

template <class T>
inline const T* read_tile(const View& v, int64_t row, int64_t col, int64_t n, T* buffer) {
  return read_run(address(v, row, col), v.dtype, v.stride[1], n, buffer);
}

template <class T>
PPOK_INLINE T read_one(const View& v, int64_t row, int64_t col) {
  T value;
  read_strided(address(v, row, col), v.dtype, 1, 1, &value);
  return value;
}

// Tokens [from, from + n) in row-major order; `read` is read_run or read_live_run.
template <class E, class Read>
PPOK_INLINE const E* read_flat_with(const View& v, int64_t cols, int64_t from, int64_t n, E* buffer,
                                    Read&& read) {
  int64_t row = from / cols, col = from % cols;
  if (col + n <= cols || v.stride[0] == cols * v.stride[1])
    return read(address(v, row, col), v.dtype, v.stride[1], n, buffer);
  for (int64_t done = 0; done < n; ++row, col = 0) {
    const int64_t length = cols - col < n - done ? cols - col : n - done;
    const E* run = read(address(v, row, col), v.dtype, v.stride[1], length, buffer + done);
    if (run != buffer + done) memcpy(buffer + done, run, length * sizeof(E));
    done += length;
  }
  return buffer;
}

template <class T>
inline const T* read_flat(const View& v, int64_t cols, int64_t from, int64_t n, T* buffer) {
  return read_flat_with(v, cols, from, n, buffer, read_run<T>);
}

template <class E>
inline void nonzero_run(const void* data, int64_t stride, int64_t n, uint8_t* out, E significant) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = (static_cast<const E*>(data)[i * stride] & significant) != 0;
}

// n mask elements as bytes, nonzero = live: in place where they already are contiguous bytes.
inline const uint8_t* read_live_run(const void* data, int32_t dtype, int64_t stride, int64_t n,
                                    uint8_t* buffer) {
  const bool is_float = dtype == kF32 || dtype == kF64 || dtype == kBF16 || dtype == kF16;
  switch (element_size(dtype)) {  // all but the sign of a float's zero
    case 8:
      nonzero_run<uint64_t>(data, stride, n, buffer, is_float ? INT64_MAX : UINT64_MAX);
      return buffer;
    case 4:
      nonzero_run<uint32_t>(data, stride, n, buffer, is_float ? INT32_MAX : UINT32_MAX);
      return buffer;
    case 2:
      nonzero_run<uint16_t>(data, stride, n, buffer, is_float ? INT16_MAX : UINT16_MAX);
      return buffer;
    default:
      if (stride == 1) return static_cast<const uint8_t*>(data);
      nonzero_run<uint8_t>(data, stride, n, buffer, UINT8_MAX);
      return buffer;
  }
}

inline const uint8_t* read_live(const View& mask, int64_t cols, int64_t from, int64_t n,
                                uint8_t* buffer) {
  return read_flat_with(mask, cols, from, n, buffer, read_live_run);
}

// Writes n elements of T from `from` (already in place when it is the destination itself).
template <class T>
inline void write_run(void* data, int32_t dtype, int64_t stride, int64_t n, const T* from) {
  if (dtype == kF32) {
    float* out = static_cast<float*>(data);
    if (static_cast<const void*>(from) == data && sizeof(T) == 4) return;
    for (int64_t i = 0; i < n; ++i) out[i * stride] = static_cast<float>(from[i]);
  } else if (dtype == kF64) {
    double* out = static_cast<double*>(data);
    if (static_cast<const void*>(from) == data && sizeof(T) == 8) return;
    for (int64_t i = 0; i < n; ++i) out[i * stride] = static_cast<double>(from[i]);
  } else {
    uint16_t* out = static_cast<uint16_t*>(data);
    int64_t i = 0;
    if (sizeof(T) == 4 && stride == 1) {
      const float* source = reinterpret_cast<const float*>(from);
      if (dtype == kBF16)
        for (; i + kLanes <= n; i += kLanes) store_bf16(out + i, load(source + i));
      else
        for (; i + kLanes <= n; i += kLanes) store_f16(out + i, load(source + i));
    }
    for (; i < n; ++i)
      out[i * stride] = float_to_half_bits(static_cast<float>(from[i]), dtype == kBF16);
  }
}

template <class T>
inline void write_tile(const View& v, int64_t row, int64_t col, int64_t n, const T* from) {
  write_run(address(v, row, col), v.dtype, v.stride[1], n, from);
}

// Where a kernel writes n elements before write_run: the destination itself when it is contiguous
// T.
template <class T>
inline T* write_target(void* data, int32_t dtype, int64_t stride, T* buffer) {
  return stride == 1 && dtype == DTypeOf<T>::value ? static_cast<T*>(data) : buffer;
}

}  // namespace PPOK_ISA
}  // namespace ppok
