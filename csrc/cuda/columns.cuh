// The columns of a row of logits, cut into segments, each for a group of kThreads threads: a block,
// or one of several groups in it.
//
// Which columns a thread has, and in what order, follows from their number alone, never from where
// the row begins: where vectors of memory are not vectors of columns, the lanes of a warp make the
// ones from the others. No vector is read that is not the row's from end to end.
#pragma once
#include "cuda/block.cuh"
#include "cuda/element.cuh"

namespace ppok {
namespace PPOK_ISA {

constexpr int kThreads = 256;
constexpr int kSteps = 4;  // of a segment

// This thread's number in its group.
__device__ inline int thread_of_group() { return static_cast<int>(threadIdx.x) % kThreads; }

// What a thread has in flight.
template <class E, int kVectors>
struct Batch {
  Lanes<E> vector[kVectors] = {};
};

// Columns [first, last), in whole vectors.
struct Span {
  int first, last;
};

// How far a row is behind an address that vectors can be written to.
template <class E>
__device__ inline int64_t lead_of(const View& logits, int64_t row, int64_t col) {
  return reinterpret_cast<uintptr_t>(address(logits, row, col)) % kVectorBytes / sizeof(E);
}

using Words = Vector<unsigned, 4>;

// 16 of the bytes of both, from one of the first on.
__device__ inline Words straddling(const Words& low, const Words& high, int from) {
  unsigned two[6], one[5];
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    const unsigned here = i < 4 ? low[i % 4] : high[i % 4];
    const unsigned there = i < 2 ? low[i + 2] : high[i - 2];
    two[i] = from & 8 ? there : here;
  }
#pragma unroll
  for (int i = 0; i < 5; ++i) one[i] = from & 4 ? two[i + 1] : two[i];
  Words x;
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = funnel_right(one[i], one[i + 1], from % 4 * 8);
  return x;
}

// Of a segment of a row, counted from `from` on, which may be less than a vector before the row.
// A group takes them in steps, in which each thread has kVectors vectors; those of a warp, in all
// steps, are neighbours.
// kAnyDtype: they are not of type E, but read and written as if they were, one by one.
template <class E, int kVectors, bool kAnyDtype = false>
struct Columns {
  using T = Compute<E>;
  static constexpr int kLane = kLanes<E>;
  static constexpr int kOfWarp = kVectors * kWarp * kLane;  // in a step
  static constexpr int kStep = kThreads / kWarp * kOfWarp;
  static constexpr int kSegment = kSteps * kStep;

  char* data;
  int64_t stride;  // in bytes
  int32_t dtype;
  int begin, end;  // the columns that there are
  int steps;
  int skip;           // elements of a vector of memory that are before column 0
  int first, loaded;  // vectors of memory: [first, loaded), counted from column -skip
  int last;           // vectors of columns that they make: [first, last)

  __device__ Columns(const View& logits, int64_t row, int64_t col, int64_t from, int64_t vocab)
      : data(column(logits, row, col, from)),
        stride(logits.stride[2] * element_size(logits.dtype)),
        dtype(logits.dtype),
        begin(from < 0 ? static_cast<int>(-from) : 0),
        end(vocab - from < kSegment ? static_cast<int>(vocab - from) : kSegment),
        steps((end + kStep - 1) / kStep),
        skip(0),
        first(begin),
        loaded(begin),
        last(begin) {
    if (kAnyDtype || stride != sizeof(E)) return;
    skip = static_cast<int>(reinterpret_cast<uintptr_t>(data) % kVectorBytes / sizeof(E));
    const int before = from < kLane ? static_cast<int>(from) : kLane;  // columns of the row
    const int64_t rest = vocab - from, most = kSegment + kLane;
    first = max(skip - before + kLane - 1, 0) / kLane * kLane;
    loaded = ((rest < most ? static_cast<int>(rest) : most) + skip) / kLane * kLane;
    last = min(max(skip ? loaded - kLane : loaded, 0), kSegment);
  }

  static int64_t segments_of(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

  // The first column of this warp in a step, and of this thread's vector v.
  __device__ int of_warp(int step) const {
    return (thread_of_group() / kWarp * steps + step) * kOfWarp;
  }
  __device__ int of_thread(int step, int v) const {
    return of_warp(step) + (v * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kLane;
  }
  // The column so many after `from`, or -1 if it is not of this segment.
  __device__ int index_of(int64_t offset) const {
    return offset >= begin && offset < end ? static_cast<int>(offset) : -1;
  }

  __device__ T read(int j) const {
    if (kAnyDtype) return read_element<T>(data + j * stride, dtype);
    return widen(*reinterpret_cast<const E*>(data + j * stride));
  }
  __device__ void write(int j, T x) const {
    if (kAnyDtype)
      write_element<T>(data + j * stride, dtype, x);
    else
      *reinterpret_cast<E*>(data + j * stride) = narrow<E>(x);
  }

  // Vectors of memory. After the last step the one that its columns may need besides.
  __device__ void load(int step, Batch<E, kVectors>& batch) const {
    const E* memory = reinterpret_cast<const E*>(data) - skip;
    const bool behind = step == steps;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = of_thread(step, v);
      if (behind && (v > 0 || threadIdx.x % kWarp > 0 || skip == 0)) continue;
      if (at >= first && at < loaded) batch.vector[v] = load_streaming<E, kLane>(memory + at);
    }
  }
  // What there is of the vector that begins before the row.
  __device__ void load_head(Batch<E, kVectors>& batch) const {
    if (first == 0 || last == 0 || threadIdx.x != 0) return;
#pragma unroll
    for (int k = 0; k < kLane; ++k)
      if (k >= skip) batch.vector[0][k] = reinterpret_cast<const E*>(data)[k - skip];
  }
  // Vector v of columns, of the vectors of memory of this step and the next. For whole warps.
  __device__ Lanes<E> realigned(const Batch<E, kVectors>& batch, int v,
                                const Batch<E, kVectors>& next) const {
    if (skip == 0) return batch.vector[v];
    const int lane = threadIdx.x % kWarp, neighbour = (lane + 1) % kWarp;
    const Words own = bits_as<Words>(batch.vector[v]);
    Words behind =
        bits_as<Words>(v + 1 < kVectors ? batch.vector[(v + 1) % kVectors] : next.vector[0]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      behind[i] = __shfl_sync(kWholeWarp, lane == 0 ? behind[i] : own[i], neighbour);
    return bits_as<Lanes<E>>(straddling(own, behind, skip * static_cast<int>(sizeof(E))));
  }

  // each(column, elements) for this thread's vectors from `from` on, the elements read one by one.
  template <class Each>
  __device__ void for_each_part(int from, Each&& each) const {
    for (int step = 0; step < steps; ++step)
#pragma unroll 1
      for (int v = 0; v < kVectors; ++v) {
        const int j = of_thread(step, v);
        if (j < from || j >= end) continue;
        T x[kLane] = {};
#pragma unroll
        for (int k = 0; k < kLane; ++k)
          if (j + k < end) x[k] = read(j + k);
        each(j, x);
      }
  }

  // ---- of columns that are written --------------------------------------------------------------

  // each(column) for this thread's columns outside of the span.
  template <class Each>
  __device__ void for_each_outside(const Span& span, Each&& each) const {
    for (int j = begin + threadIdx.x; j < span.first; j += kThreads) each(j);
    for (int j = span.last + threadIdx.x; j < end; j += kThreads) each(j);
  }
  __device__ void fill(T x) const {
    const Span span = vectors_of(*this);
    Lanes<E> filled;
#pragma unroll
    for (int k = 0; k < kLane; ++k) filled[k] = narrow<E>(x);
    for (int j = span.first + threadIdx.x * kLane; j < span.last; j += kThreads * kLane)
      store_streaming<E, kLane>(reinterpret_cast<E*>(data) + j, filled);
    for_each_outside(span, [&](int j) { write(j, x); });
  }
};

// The vectors that all of these columns can make.
template <class First, class... Rest>
__device__ inline Span vectors_of(const First& columns, const Rest&... rest) {
  Span span{columns.first, columns.last};
  ((span = {max(span.first, rest.first), min(span.last, rest.last)}), ...);
  span.first = min(span.first, columns.end);
  return {span.first, max(span.first, span.last)};
}

}  // namespace PPOK_ISA
}  // namespace ppok
