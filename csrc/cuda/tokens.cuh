// Passes over the tokens of [rows, cols] tensors of any floating-point dtype and strides, some
// neighbours at a time by one thread. Which thread has which tokens follows from their number
// alone.
#pragma once
#include "cuda/element.cuh"

namespace ppok {
namespace PPOK_ISA {

constexpr int kThreads = 256;
constexpr int kTokens = 4;                 // neighbours
constexpr int kStep = kThreads * kTokens;  // between two of a thread's
constexpr int kVectors = 2;                // that a thread has in flight
constexpr int kBlock = kVectors * kStep;   // tokens

struct Tokens {
  int64_t count, cols;
};

PPOK_HD inline int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// The blocks of a sum in groups, one CUDA block each: few enough to be merged by one CUDA block.
struct Groups {
  int64_t count, tokens;  // tokens of a group, a multiple of kBlock
  explicit Groups(int64_t all) {
    constexpr int64_t kMost = 1024;
    const int64_t blocks = parts_of(all, kBlock), each = parts_of(blocks, kMost);
    count = blocks ? parts_of(blocks, each) : 0;
    tokens = each * kBlock;
  }
};

// A tensor to read tokens from.
struct Source {
  View view;
  bool line;     // one stride walks all tokens: that of columns, in row 0
  bool vectors;  // and vectors of up to 16 bytes can be read

  Source() = default;
  Source(const View& v, int64_t rows, int64_t cols) : view(v) {
    if (cols == 1) view.stride[1] = v.stride[0];
    line = cols == 1 || rows == 1 || v.stride[0] == cols * v.stride[1];
    vectors = line && view.stride[1] == 1 && is_aligned(v.data);
  }
  // One row of a tensor.
  __device__ Source(const View& v, int64_t row) : view(v), line(true) {
    view.data = address(v, row, 0);
    vectors = v.stride[1] == 1 && is_aligned(view.data);
  }
};

// Up to n tokens from one on.
template <int n>
struct Place {
  int64_t first, row, col, cols;
  int size;  // the tokens that there are

  // Dividing takes long: `lines` says that nobody will ask for rows.
  __device__ Place(const Tokens& tokens, int64_t first, bool lines) : first(first), row(0), col(0) {
    cols = tokens.cols;
    const int64_t left = tokens.count - first;
    size = left < n ? left > 0 ? static_cast<int>(left) : 0 : n;
    if (lines) return;
    if (tokens.count <= UINT32_MAX) {
      row = static_cast<uint32_t>(first) / static_cast<uint32_t>(cols);
      col = static_cast<uint32_t>(first) % static_cast<uint32_t>(cols);
    } else {
      row = first / cols;
      col = first % cols;
    }
  }
  // each(k, row, col) for the tokens there are, as `s` counts rows and columns.
  template <class Each>
  __device__ void walk(const Source& s, Each&& each) const {
    int64_t r = s.line ? 0 : row, c = s.line ? first : col;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      if (k < size) each(k, r, c);
      if (++c == cols && !s.line) {
        c = 0;
        ++r;
      }
    }
  }
};

// Bit k: token k is live. An absent mask is live everywhere.
template <int n>
__device__ unsigned read_live(const Source& mask, const Place<n>& place) {
  if (!mask.view.data) return (1u << place.size) - 1;
  unsigned live = 0;
  if (mask.vectors && place.size == n && element_size(mask.view.dtype) == 1) {
    const auto bytes =
        load_vector<uint8_t, n>(static_cast<const uint8_t*>(mask.view.data) + place.first);
#pragma unroll
    for (int k = 0; k < n; ++k) live |= static_cast<unsigned>(bytes[k] != 0) << k;
  } else {
    place.walk(mask, [&](int k, int64_t row, int64_t col) {
      live |= static_cast<unsigned>(is_live(mask.view, row, col)) << k;
    });
  }
  return live;
}

// Elements that are loaded in one go.
template <class E>
constexpr int kAtOnce = kLanes<E> < kTokens ? kLanes<E> : kTokens;

template <class E, class T>
__device__ void read_as(const Source& s, const Place<kTokens>& place, unsigned live,
                        T (&x)[kTokens]) {
  const E* data = static_cast<const E*>(s.view.data);
  if (s.vectors && place.size == kTokens) {
#pragma unroll
    for (int k = 0; k < kTokens; k += kAtOnce<E>) {
      const auto raw = load_vector<E, kAtOnce<E>>(data + place.first + k);
#pragma unroll
      for (int j = 0; j < kAtOnce<E>; ++j)
        x[k + j] = live >> (k + j) & 1 ? static_cast<T>(widen(raw[j])) : T(0);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) x[k] = T(0);
    place.walk(s, [&](int k, int64_t row, int64_t col) {
      if (live >> k & 1)
        x[k] = static_cast<T>(widen(data[row * s.view.stride[0] + col * s.view.stride[1]]));
    });
  }
}

// The live tokens of a place; the others, whatever they hold, are 0.
template <class T>
__device__ void read(const Source& s, const Place<kTokens>& place, unsigned live, T (&x)[kTokens]) {
  switch (s.view.dtype) {
    case kF32:
      return read_as<float>(s, place, live, x);
    case kBF16:
      return read_as<__nv_bfloat16>(s, place, live, x);
    case kF16:
      return read_as<__half>(s, place, live, x);
    default:
      return read_as<double>(s, place, live, x);
  }
}

template <class E, class T>
__device__ void write_as(const View& out, const Place<kTokens>& place, const T (&x)[kTokens]) {
  E* data = static_cast<E*>(out.data) + place.first;
  if (place.size == kTokens && is_aligned(out.data)) {
#pragma unroll
    for (int k = 0; k < kTokens; k += kAtOnce<E>) {
      Vector<E, kAtOnce<E>> v;
#pragma unroll
      for (int j = 0; j < kAtOnce<E>; ++j) v[j] = narrow<E>(static_cast<Compute<E>>(x[k + j]));
      store_vector(data + k, v);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kTokens; ++k)
      if (k < place.size) data[k] = narrow<E>(static_cast<Compute<E>>(x[k]));
  }
}

// To a contiguous tensor.
template <class T>
__device__ void write(const View& out, const Place<kTokens>& place, const T (&x)[kTokens]) {
  switch (out.dtype) {
    case kF32:
      return write_as<float>(out, place, x);
    case kBF16:
      return write_as<__nv_bfloat16>(out, place, x);
    case kF16:
      return write_as<__half>(out, place, x);
    default:
      return write_as<double>(out, place, x);
  }
}

// Parts of a workspace, each aligned to 16 bytes. Of no workspace: how much they take.
class Parts {
 public:
  explicit Parts(const void* workspace)
      : begin_(reinterpret_cast<uintptr_t>(workspace)), end_(begin_) {}
  template <class T>
  T* take(int64_t n) {
    T* part = reinterpret_cast<T*>(end_);
    end_ += parts_of(n * static_cast<int64_t>(sizeof(T)), kVectorBytes) * kVectorBytes;
    return part;
  }
  int64_t taken() const { return static_cast<int64_t>(end_ - begin_); }

 private:
  uintptr_t begin_, end_;
};

}  // namespace PPOK_ISA
}  // namespace ppok
