// The CUDA C++ of csrc/cuda on the CPU, for tests. README.md says what is modelled and what is not.
//
//   g++ -std=c++20 -include cuda_emulator.h -x c++ kernel.cu -x none runtime.cpp -pthread
//
// A block is an OS thread, a CUDA thread a fiber in it that runs until it waits for another.
#pragma once
#define PPOK_EMULATED 1

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

namespace emulator {

enum class Order { kForward, kReversed, kShuffled };

struct Config {
  int resident_blocks = 4;               // that run at the same time
  Order thread_order = Order::kForward;  // who goes on first, of the threads that can
  Order block_order = Order::kForward;   // forward or reversed: who starts first
  uint64_t seed = 1;                     // of the shuffled order
  size_t shared_bytes = 227 << 10;       // of a block
  int64_t poll_limit = 100'000;          // looks in vain, by every block, that make a livelock
  int hang_seconds = 60;                 // without a switch of threads; 0: any time
};
extern Config config;

// Sets config.<name>. False: there is no such name or value.
bool configure(const char* name, const char* value);

// ---- runtime.cpp --------------------------------------------------------------------------------

using Where = std::source_location;
constexpr unsigned kAllLanes = ~0u;

struct Indices {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
// Initial-exec: one instruction, also in a shared library.
extern constinit thread_local Indices indices __attribute__((tls_model("initial-exec")));

struct SharedArray {
  const char *name, *file;
  int line;
};
void* shared(const SharedArray& array, size_t bytes);
void* dynamic_shared();

int barrier(const char* what, bool predicate, Where where);  // the number of true predicates

// Warp operations: each waits for the lanes of the mask that have not exited.
struct Gathered {
  unsigned lanes;
  uint64_t value[32];  // of each of these lanes
};
void sync_warp(unsigned mask, Where where);
void shuffle(const char* what, unsigned mask, const void* value, void* result, size_t bytes,
             int source_lane, Where where);
Gathered gather(const char* what, unsigned mask, uint64_t value, Where where);

void fence(bool of_device);
void interleave();  // before what other threads may see: in the shuffled order they may come first
// A look at a word that somebody may be waiting for: one in vain lets the other threads run.
void look(const void* p, uint64_t value, const char* what, Where where);
void pause(const char* what, Where where);
void require_aligned(const void* p, size_t bytes);
[[noreturn]] void fail(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));

using Body = void (*)(void* closure);
const char* run(int64_t blocks, int threads, size_t shared_bytes, Body body, void* closure);

// ---- templates over it --------------------------------------------------------------------------

template <class... P, class... A>
const char* launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes,
                   const A&... args) {
  std::tuple<P...> parameters(static_cast<P>(args)...);
  auto call = [&] { std::apply(kernel, parameters); };
  return run(
      blocks, threads, shared_bytes, [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call);
}

template <class T, size_t n>
T (&shared(const SharedArray& array))
[n] {
  static_assert(alignof(T) <= 16 && n > 0);
  return *static_cast<T(*)[n]>(shared(array, n * sizeof(T)));
}

template <class T, class... Allowed>
constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

template <class T>
uint64_t bits_of(const T& value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T load_acquire(const T* p, Where where = Where::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32- or 64-bit words");
  interleave();
  const T value = std::atomic_ref(*const_cast<T*>(p)).load(std::memory_order_acquire);
  look(p, bits_of(value), "load_acquire", where);
  return value;
}

template <class T>
void store_release(T* p, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32- or 64-bit words");
  interleave();
  std::atomic_ref(*p).store(value, std::memory_order_release);
}

inline void add_release(unsigned* p, unsigned value) {
  interleave();
  std::atomic_ref(*p).fetch_add(value, std::memory_order_release);
}

inline void spin_pause(Where where = Where::current()) { pause("spin_pause", where); }

// Relaxed, as CUDA's are: it orders nothing but itself.
template <class T, class Operation>
T read_modify_write(T* p, Operation operation) {
  interleave();
  std::atomic_ref word(*p);
  T old = word.load(std::memory_order_relaxed);
  while (!word.compare_exchange_weak(old, operation(old), std::memory_order_relaxed)) {
  }
  return old;
}

// One that changed nothing may be a wait.
template <class T>
T looked(T* p, T old, T now, const char* what, Where where) {
  if (bits_of(old) == bits_of(now)) look(p, bits_of(old), what, where);
  return old;
}

template <class T>
T shuffle_from(const char* what, unsigned mask, const T& value, int source, Where where) {
  static_assert(is_one_of<T, int, unsigned, long, unsigned long, long long, unsigned long long,
                          float, double, __half, __half2, __nv_bfloat16, __nv_bfloat162>,
                "not a type that CUDA shuffles");
  T result;
  shuffle(what, mask, &value, &result, sizeof value, source, where);
  return result;
}

inline int lane() { return indices.thread.x % 32; }

inline void check_segment(const char* what, unsigned distance, int width, Where where) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail(where, "%s: a width of %d; it must be a power of two up to 32", what, width);
  if (distance > 31) fail(where, "%s: a distance of %u lanes", what, distance);
}

template <class Operation>
unsigned reduce(const char* what, unsigned mask, unsigned value, Where where, Operation operation) {
  const Gathered all = gather(what, mask, value, where);
  unsigned result = all.value[std::countr_zero(all.lanes)];
  for (unsigned rest = all.lanes & (all.lanes - 1); rest; rest &= rest - 1)
    result = operation(result, unsigned(all.value[std::countr_zero(rest)]));
  return result;
}

// The lanes whose value is the same as that of `like`.
inline unsigned lanes_equal(const Gathered& all, uint64_t like) {
  unsigned lanes = 0;
  for (unsigned rest = all.lanes; rest; rest &= rest - 1)
    if (all.value[std::countr_zero(rest)] == like) lanes |= rest & -rest;
  return lanes;
}

}  // namespace emulator

// ---- CUDA C++ -----------------------------------------------------------------------------------

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ shared_arrays_are_declared_by_PPOK_SHARED  // so that it does not compile

#define threadIdx (std::as_const(::emulator::indices.thread))
#define blockIdx (std::as_const(::emulator::indices.block))
#define blockDim (std::as_const(::emulator::indices.block_size))
#define gridDim (std::as_const(::emulator::indices.grid_size))
constexpr int warpSize = 32;

inline void __syncthreads(emulator::Where where = emulator::Where::current()) {
  emulator::barrier("__syncthreads", false, where);
}
inline int __syncthreads_count(int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::barrier("__syncthreads_count", predicate != 0, where);
}
inline int __syncthreads_or(int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::barrier("__syncthreads_or", predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::barrier("__syncthreads_and", predicate == 0, where) == 0;
}

inline void __syncwarp(unsigned mask = emulator::kAllLanes,
                       emulator::Where where = emulator::Where::current()) {
  emulator::sync_warp(mask, where);
}
inline unsigned __activemask(emulator::Where where = emulator::Where::current()) {
  emulator::fail(where, "__activemask: lanes run one after another here; pass masks instead");
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulator::Where where = emulator::Where::current()) {
  emulator::check_segment("__shfl_sync", 0, width, where);
  const int first = emulator::lane() & -width;
  return emulator::shuffle_from("__shfl_sync", mask, value, first + (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 emulator::Where where = emulator::Where::current()) {
  emulator::check_segment("__shfl_up_sync", distance, width, where);
  const int lane = emulator::lane(), source = lane - int(distance);
  return emulator::shuffle_from("__shfl_up_sync", mask, value,
                                source >= (lane & -width) ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   emulator::Where where = emulator::Where::current()) {
  emulator::check_segment("__shfl_down_sync", distance, width, where);
  const int lane = emulator::lane(), source = lane + int(distance);
  return emulator::shuffle_from("__shfl_down_sync", mask, value,
                                source < (lane & -width) + width ? source : lane, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  emulator::Where where = emulator::Where::current()) {
  emulator::check_segment("__shfl_xor_sync", lane_mask, width, where);
  const int lane = emulator::lane(), source = lane ^ lane_mask;
  return emulator::shuffle_from("__shfl_xor_sync", mask, value,
                                source < (lane & -width) + width ? source : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulator::Where where = emulator::Where::current()) {
  return lanes_equal(emulator::gather("__ballot_sync", mask, predicate != 0, where), 1);
}
inline int __any_sync(unsigned mask, int predicate,
                      emulator::Where where = emulator::Where::current()) {
  return lanes_equal(emulator::gather("__any_sync", mask, predicate != 0, where), 1) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      emulator::Where where = emulator::Where::current()) {
  return lanes_equal(emulator::gather("__all_sync", mask, predicate != 0, where), 0) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value,
                          emulator::Where where = emulator::Where::current()) {
  const uint64_t bits = emulator::bits_of(value);
  return lanes_equal(emulator::gather("__match_any_sync", mask, bits, where), bits);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all_equal,
                          emulator::Where where = emulator::Where::current()) {
  const uint64_t bits = emulator::bits_of(value);
  const emulator::Gathered all = emulator::gather("__match_all_sync", mask, bits, where);
  *all_equal = lanes_equal(all, bits) == all.lanes;
  return *all_equal ? all.lanes : 0;
}

#define EMULATOR_REDUCE(name, T, expression)                                                    \
  inline T name(unsigned mask, T value, emulator::Where where = emulator::Where::current()) {   \
    return T(emulator::reduce(#name, mask, unsigned(value), where, [](unsigned x, unsigned y) { \
      const T a = T(x), b = T(y);                                                               \
      return unsigned(expression);                                                              \
    }));                                                                                        \
  }
EMULATOR_REDUCE(__reduce_add_sync, unsigned, a + b)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMULATOR_REDUCE(__reduce_add_sync, int, unsigned(a) + unsigned(b))
EMULATOR_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMULATOR_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, a& b)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, a | b)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef EMULATOR_REDUCE

inline void __threadfence_block() { emulator::fence(false); }
inline void __threadfence() { emulator::fence(true); }
inline void __threadfence_system() { emulator::fence(true); }
inline void __nanosleep(unsigned, emulator::Where where = emulator::Where::current()) {
  emulator::pause("__nanosleep", where);
}
[[noreturn]] inline void __trap(emulator::Where where = emulator::Where::current()) {
  emulator::fail(where, "__trap");
}

// Types as CUDA has them: what it lacks must not compile here either.
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value,
            emulator::Where where = emulator::Where::current()) {
  static_assert(emulator::is_one_of<T, int, unsigned, unsigned long long, float, double>);
  const T old = emulator::read_modify_write(p, [=](T a) { return T(a + value); });
  return emulator::looked(p, old, T(old + value), "atomicAdd", where);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value,
             emulator::Where where = emulator::Where::current()) {
  static_assert(emulator::is_one_of<T, int, unsigned, unsigned long long, float>);
  emulator::interleave();
  const T old = std::atomic_ref(*p).exchange(value, std::memory_order_relaxed);
  return emulator::looked(p, old, T(value), "atomicExch", where);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value,
            emulator::Where where = emulator::Where::current()) {
  static_assert(emulator::is_one_of<T, int, unsigned, unsigned short, unsigned long long>);
  emulator::interleave();
  T old = expected;
  const bool done =
      std::atomic_ref(*p).compare_exchange_strong(old, value, std::memory_order_relaxed);
  return emulator::looked(p, old, done ? T(value) : old, "atomicCAS", where);
}

#define EMULATOR_ATOMIC(name, expression, ...)                                 \
  template <class T>                                                           \
  T name(T* p, std::type_identity_t<T> b) {                                    \
    static_assert(emulator::is_one_of<T, int, unsigned, __VA_ARGS__>);         \
    return emulator::read_modify_write(p, [=](T a) { return T(expression); }); \
  }
EMULATOR_ATOMIC(atomicSub, a - b, unsigned)
EMULATOR_ATOMIC(atomicMin, a < b ? a : b, long long, unsigned long long)
EMULATOR_ATOMIC(atomicMax, a > b ? a : b, long long, unsigned long long)
EMULATOR_ATOMIC(atomicAnd, a& b, unsigned long long)
EMULATOR_ATOMIC(atomicOr, a | b, unsigned long long)
EMULATOR_ATOMIC(atomicXor, a ^ b, unsigned long long)
#undef EMULATOR_ATOMIC

// Caches are not modelled.
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}

// As CUDA's: of mixed types, and of NaN and a number the number.
template <class A, class B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return T(std::fmin(T(a), T(b)));
  else
    return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return T(std::fmax(T(a), T(b)));
  else
    return T(a) > T(b) ? T(a) : T(b);
}

inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline int __ffsll(long long x) {
  return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0;
}
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
