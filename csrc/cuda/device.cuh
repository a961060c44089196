// What kernels need that is PTX or launch syntax, once for nvcc and once for the emulator of the
// tests (python_tests/cuda_emulator). Everything else in csrc/cuda is CUDA C++ that both compile.
#pragma once
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifndef PPOK_EMULATED
#include <cuda_runtime.h>
#endif

namespace ppok {

// ---- shared memory ------------------------------------------------------------------------------

// PPOK_SHARED(T, name, n): an uninitialised array name[n] of the block.
#ifdef PPOK_EMULATED
#define PPOK_SHARED(T, name, n)                                                     \
  static constexpr ::emulator::SharedArray name##_array{#name, __FILE__, __LINE__}; \
  T(&name)[n] = ::emulator::shared<T, n>(name##_array)
#else
#define PPOK_SHARED(T, name, n) __shared__ T name[n]
#endif

// The bytes asked for at launch, aligned to 16.
template <class T>
__device__ inline T* dynamic_shared() {
  static_assert(alignof(T) <= 16, "dynamic shared memory is aligned to 16 bytes");
#ifdef PPOK_EMULATED
  return reinterpret_cast<T*>(::emulator::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char ppok_dynamic_shared[];
  return reinterpret_cast<T*>(ppok_dynamic_shared);
#endif
}

// ---- between blocks: words in global memory, ordered at the scope of the device -----------------

#ifdef PPOK_EMULATED
using ::emulator::add_release;
using ::emulator::load_acquire;
using ::emulator::spin_pause;
using ::emulator::store_release;
#else
template <class T>
__device__ inline T load_acquire(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32- or 64-bit words");
  T value;
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  else
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}

template <class T>
__device__ inline void store_release(T* p, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32- or 64-bit words");
  if constexpr (sizeof(T) == 4)
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
  else
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

__device__ inline void add_release(unsigned* p, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// Between two looks at a word that another block will write.
__device__ inline void spin_pause() { __nanosleep(32); }
#endif

__device__ inline void atomic_min(int64_t* p, int64_t value) {
  atomicMin(reinterpret_cast<long long*>(p), static_cast<long long>(value));
}

// ---- vectors: N elements in one access, at an address aligned to all of them --------------------

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
  __device__ T& operator[](int i) { return element[i]; }
  __device__ const T& operator[](int i) const { return element[i]; }
};

template <int bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// By value: through a reference the copy would read global memory byte by byte.
template <class To, class From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The word that begins so many bits, fewer than 32, above the lowest of two.
__device__ inline unsigned funnel_right(unsigned low, unsigned high, int bits) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> bits);
}

// Where p points, as one word of so many bytes; a kernel stops where it is not aligned to them.
template <int bytes, class T>
__device__ inline typename Word<bytes>::type* word_at(T* p) {
#ifdef PPOK_EMULATED
  ::emulator::require_aligned(p, bytes);
#endif
  return reinterpret_cast<typename Word<bytes>::type*>(
      const_cast<void*>(static_cast<const void*>(p)));
}

template <class T, int N>
__device__ inline Vector<T, N> load_vector(const T* p) {
  return bits_as<Vector<T, N>>(*word_at<sizeof(T) * N>(p));
}
template <class T, int N>
__device__ inline void store_vector(T* p, const Vector<T, N>& v) {
  *word_at<sizeof(T) * N>(p) = bits_as<typename Word<sizeof(T) * N>::type>(v);
}

// Streaming: data touched once, first to leave the caches.
template <class T, int N>
__device__ inline Vector<T, N> load_streaming(const T* p) {
  return bits_as<Vector<T, N>>(__ldcs(word_at<sizeof(T) * N>(p)));
}
template <class T, int N>
__device__ inline void store_streaming(T* p, const Vector<T, N>& v) {
  __stcs(word_at<sizeof(T) * N>(p), bits_as<typename Word<sizeof(T) * N>::type>(v));
}

// ---- numbers ------------------------------------------------------------------------------------

// 2^x and log2(x) of the special function unit: about 2 ulp, subnormal numbers count as 0.
__device__ inline float exp2_approx(float x) {
#ifdef PPOK_EMULATED
  const float y = exp2f(x);
  return y < FLT_MIN ? 0.f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ inline float log2_approx(float x) {
#ifdef PPOK_EMULATED
  return log2f(fabsf(x) < FLT_MIN ? 0.f : x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// ---- host -------------------------------------------------------------------------------------

// Bytes of shared memory that a block may have on the current device.
inline int64_t most_shared() {
#ifdef PPOK_EMULATED
  return ::emulator::config.shared_bytes;
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
#endif
}

// Zeros, on the stream. Returns nullptr or what is wrong, as `launch` does.
inline const char* clear(void* p, int64_t bytes, void* stream) {
  if (bytes == 0) return nullptr;
#ifdef PPOK_EMULATED
  static_cast<void>(stream);
  memset(p, 0, bytes);
  return nullptr;
#else
  const cudaError_t error = cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

// A one-dimensional grid; no block, no launch. Returns nullptr or what is wrong; waits for nothing.
template <class Kernel, class... A>
const char* launch(Kernel kernel, int64_t blocks, int threads, size_t shared_bytes, void* stream,
                   A... args) {
  if (blocks == 0) return nullptr;
  if (blocks < 0 || blocks > INT32_MAX) return "more blocks than a grid holds";
#ifdef PPOK_EMULATED
  static_cast<void>(stream);  // every launch is over when it returns
  return ::emulator::launch(kernel, blocks, threads, shared_bytes, args...);
#else
  constexpr size_t kSharedWithoutAsking = 48 << 10;
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace ppok
