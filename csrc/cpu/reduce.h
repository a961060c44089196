// Passes over all tokens of a tensor, in blocks of a fixed size; sums of blocks are merged in index
// order, so that the thread count cannot change a bit.
#pragma once
#include <stdlib.h>

#include "cpu/sums.h"
#include "cpu/tile.h"

namespace ppok {
namespace PPOK_ISA {

constexpr int64_t kBlock = 2048;              // tokens
constexpr int64_t kParallelTokens = 1 << 14;  // fewer are not worth waking a second thread

PPOK_INLINE int64_t blocks_of(int64_t tokens) { return (tokens + kBlock - 1) / kBlock; }
PPOK_INLINE int64_t block_size(int64_t tokens, int64_t block) {
  return tokens - block * kBlock < kBlock ? tokens - block * kBlock : kBlock;
}

// body(from, n) for every block.
template <class Body>
inline void for_blocks(int64_t tokens, int64_t threads, Body&& body) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) \
    schedule(static) if (threads > 1 && tokens >= kParallelTokens)
  for (int64_t b = 0; b < blocks_of(tokens); ++b) body(b * kBlock, block_size(tokens, b));
}

// merge(... merge(merge(empty, part(0, n)), part(kBlock, n)) ...): part(from, n) is the state of
// one block.
template <class State, class Part>
inline State reduce_blocks(int64_t tokens, int64_t threads, State empty, Part&& part) {
  State total = empty;
  State* shared = nullptr;
  const int64_t blocks = blocks_of(tokens);
  if (threads > 1 && tokens >= kParallelTokens)
    shared = static_cast<State*>(malloc(blocks * sizeof(State)));
  if (!shared) {
    for (int64_t b = 0; b < blocks; ++b)
      total = merge(total, part(b * kBlock, block_size(tokens, b)));
    return total;
  }
  for_blocks(tokens, threads,
             [&](int64_t from, int64_t n) { shared[from / kBlock] = part(from, n); });
  for (int64_t b = 0; b < blocks; ++b) total = merge(total, shared[b]);
  free(shared);
  return total;
}

// ---- blocks as whole vectors: kernels need no tail --------------------------------------------

template <class E>
inline const E* padded(const E* tile, int64_t n, E* buffer) {
  if (n % kLanes == 0) return tile;
  if (tile != buffer) memcpy(buffer, tile, n * sizeof(E));
  for (int64_t i = n; i % kLanes; ++i) buffer[i] = 0;
  return buffer;
}

// One block of a token tensor, zeros behind it.
template <class T>
struct Tile {
  alignas(64) T buffer[kBlock];
  const T* data;
  Tile(const View& v, int64_t cols, int64_t from, int64_t n)
      : data(padded(read_flat(v, cols, from, n, buffer), n, buffer)) {}
  PPOK_INLINE typename Lanes<T>::V operator[](int64_t i) const { return Lanes<T>::load(at(i)); }
  // Element i; the one a block later is fetched meanwhile, as the hardware's prefetcher stops at
  // the end of every page.
  PPOK_INLINE const T* at(int64_t i) const {
    __builtin_prefetch(data + i + kBlock);
    return data + i;
  }
};

// One block of the mask, dead behind it; an absent mask is live everywhere.
struct LiveTile {
  alignas(64) uint8_t buffer[kBlock];
  const uint8_t* data;
  LiveTile(const View& mask, int64_t cols, int64_t from, int64_t n) : data(buffer) {
    if (mask.data)
      data = read_live(mask, cols, from, n, buffer);
    else
      memset(buffer, 1, n);
    data = padded(data, n, buffer);
  }
  template <class T>
  PPOK_INLINE typename Lanes<T>::V select(int64_t i, typename Lanes<T>::V x) const {
    return Lanes<T>::nonzero(data + i) ? x : typename Lanes<T>::V{};
  }
};

// Where one block of a contiguous token tensor is made, in place if possible; write() when it is
// done.
template <class T>
struct OutTile {
  alignas(64) T buffer[kBlock];
  char* destination;
  int32_t dtype;
  int64_t n;
  T* data;
  OutTile(const View& contiguous, int64_t from, int64_t count)
      : destination(static_cast<char*>(contiguous.data) + from * element_size(contiguous.dtype)),
        dtype(contiguous.dtype),
        n(count),
        data(n % kLanes ? buffer : write_target(destination, dtype, 1, buffer)) {}
  PPOK_INLINE void set(int64_t i, typename Lanes<T>::V x) { Lanes<T>::store(data + i, x); }
  void write() const { write_run(destination, dtype, 1, n, data); }
};

}  // namespace PPOK_ISA
}  // namespace ppok
