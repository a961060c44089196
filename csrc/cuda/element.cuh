// Elements of tensors: from and to the type a kernel computes in, alone and in vectors.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/device.cuh"
#include "view.h"

namespace ppok {
namespace PPOK_ISA {

template <class E>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class E>
using Compute = typename ComputeOf<E>::type;

// body(E()) for the floating-point dtype.
template <class Body>
const char* with_element(int32_t dtype, Body&& body) {
  switch (dtype) {
    case kF32:
      return body(float());
    case kBF16:
      return body(__nv_bfloat16());
    case kF16:
      return body(__half());
    default:
      return body(double());
  }
}

PPOK_HD inline float widen(float x) { return x; }
PPOK_HD inline double widen(double x) { return x; }
PPOK_HD inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
PPOK_HD inline float widen(__half x) { return __half2float(x); }

// Rounded once, to nearest even.
template <class E>
PPOK_HD inline E narrow(Compute<E> x) {
  return x;
}
template <>
PPOK_HD inline __nv_bfloat16 narrow(float x) {
  return __float2bfloat16_rn(x);
}
template <>
PPOK_HD inline __half narrow(float x) {
  return __float2half_rn(x);
}

// What p points to, of any dtype.
template <class T>
PPOK_HD inline T read_element(const void* p, int32_t dtype) {
  switch (dtype) {
    case kF32:
      return static_cast<T>(*static_cast<const float*>(p));
    case kF64:
      return static_cast<T>(*static_cast<const double*>(p));
    case kBF16:
      return widen(*static_cast<const __nv_bfloat16*>(p));
    case kF16:
      return widen(*static_cast<const __half*>(p));
    case kI64:
      return static_cast<T>(*static_cast<const int64_t*>(p));
    case kI32:
      return static_cast<T>(*static_cast<const int32_t*>(p));
    case kI16:
      return static_cast<T>(*static_cast<const int16_t*>(p));
    case kI8:
      return static_cast<T>(*static_cast<const int8_t*>(p));
    default:
      return static_cast<T>(*static_cast<const uint8_t*>(p));
  }
}

template <class T>
PPOK_HD inline T read_one(const View& v, int64_t row, int64_t col) {
  return read_element<T>(address(v, row, col), v.dtype);
}

// Of a floating-point dtype.
template <class T>
__device__ inline void write_element(void* p, int32_t dtype, T x) {
  switch (dtype) {
    case kF32:
      *static_cast<float*>(p) = static_cast<float>(x);
      return;
    case kBF16:
      *static_cast<__nv_bfloat16*>(p) = narrow<__nv_bfloat16>(static_cast<float>(x));
      return;
    case kF16:
      *static_cast<__half*>(p) = narrow<__half>(static_cast<float>(x));
      return;
    default:
      *static_cast<double*>(p) = x;
  }
}

// Element i of a contiguous tensor of Ts.
template <class T>
__device__ inline T& at(const View& contiguous, int64_t i) {
  return static_cast<T*>(contiguous.data)[i];
}

constexpr int kVectorBytes = 16;
template <class E>
constexpr int kLanes = kVectorBytes / sizeof(E);
template <class E>
using Lanes = Vector<E, kLanes<E>>;

PPOK_HD inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
}

// The first fault of a device, by position: see ppo_kernels/_checks.py.
__device__ inline void report_fault(int64_t* fault, int64_t position, int32_t kind) {
  constexpr int kKindBits = 8;
  atomic_min(fault, position << kKindBits | kind);
}

}  // namespace PPOK_ISA
}  // namespace ppok
