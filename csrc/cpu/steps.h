// The live steps of a run of tokens: reading masks and flags, squeezing masked steps out of a run
// and putting them back.
#pragma once
#include "cpu/tile.h"
#include "math/scan.h"
#include "sequences.h"

namespace ppok {
namespace PPOK_ISA {

template <class E>
PPOK_INLINE void mark_nonzero(const E* p, int64_t stride, int64_t n, E ignored, uint8_t bit,
                              uint8_t* code) {
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) code[i] |= (p[i] & ~ignored) ? bit : 0;
  else
    for (int64_t i = 0; i < n; ++i) code[i] |= (p[i * stride] & ~ignored) ? bit : 0;
}

// Sets `bit` where the tensor is not zero; integer or float alike, by their bits without the sign
// of a zero.
inline void mark(const View& v, int64_t row, int64_t col, int64_t n, uint8_t bit, uint8_t* code) {
  const void* p = address(v, row, col);
  const int64_t stride = v.stride[1], size = element_size(v.dtype);
  const bool is_float = v.dtype <= kF64;
  if (size == 1) {
    mark_nonzero(static_cast<const uint8_t*>(p), stride, n, uint8_t{0}, bit, code);
  } else if (size == 2) {
    mark_nonzero(static_cast<const uint16_t*>(p), stride, n, uint16_t(is_float ? 1u << 15 : 0), bit,
                 code);
  } else if (size == 4) {
    mark_nonzero(static_cast<const uint32_t*>(p), stride, n, is_float ? 1u << 31 : 0u, bit, code);
  } else {
    mark_nonzero(static_cast<const uint64_t*>(p), stride, n, is_float ? uint64_t{1} << 63 : 0, bit,
                 code);
  }
}

inline void read_live_codes(const View& mask, int64_t row, int64_t col, int64_t n, uint8_t* live) {
  memset(live, mask.data ? 0 : kLive, n);
  if (mask.data) mark(mask, row, col, n, kLive, live);
}

// The same, in place if the mask is of bytes: nonzero = live.
inline const uint8_t* live_bytes(const View& mask, int64_t row, int64_t col, int64_t n,
                                 uint8_t* buffer) {
  if (mask.data && element_size(mask.dtype) == 1 && mask.stride[1] == 1)
    return reinterpret_cast<const uint8_t*>(address(mask, row, col));
  read_live_codes(mask, row, col, n, buffer);
  return buffer;
}

// A discount of 0 looks at no later step: it ends the sequence at every one.
inline void read_codes(const ScanSetting& a, int64_t row, int64_t col, int64_t n, uint8_t* code) {
  read_live_codes(a.mask, row, col, n, code);
  if (a.terminated.data) mark(a.terminated, row, col, n, kTerminated, code);
  if (a.truncated.data) mark(a.truncated, row, col, n, kTruncated, code);
  const uint8_t always = a.gamma == 0. ? kTerminated : 0;
  for (int64_t i = 0; i < n; ++i) code[i] = code[i] & kLive ? code[i] | always : 0;
}

// Masks come in runs: blocks that are live or masked throughout need no test per step.
constexpr int64_t kBlock = 64;

inline int64_t count_live(const uint8_t* live, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock;
    uint8_t found = 0;
    for (int64_t j = 0; j < size; ++j) found += live[i + j] != 0;
    count += found;
  }
  return count;
}

// Moves the live elements of n to the front.
template <class E>
void compress(E* x, const uint8_t* live, int64_t n) {
  E* to = x;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock, found = count_live(live + i, size);
    if (found == size) {
      memmove(to, x + i, size * sizeof(E));
    } else if (found) {
      for (int64_t j = i, k = 0; j < i + size; ++j) {
        const uint8_t keep = live[j] & kLive;
        to[k] = x[j];
        k += keep;
      }
    }
    to += found;
  }
}

// out[i] = value(k) where i is the k-th live position, 0 where it is masked.
template <class T, class Value>
PPOK_INLINE void expand(T* out, const uint8_t* live, int64_t n, Value&& value) {
  for (int64_t i = 0, step = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock, found = count_live(live + i, size);
    if (found == size) {
      for (int64_t j = 0; j < size; ++j) out[i + j] = static_cast<T>(value(step + j));
    } else {
      memset(out + i, 0, size * sizeof(T));
      for (int64_t j = 0, k = step; found && j < size; ++j)
        if (live[i + j] & kLive) out[i + j] = static_cast<T>(value(k++));
    }
    step += found;
  }
}

// Narrows the run to its live steps; false if masked ones lie between them.
inline bool narrow_to_live(const View& mask, Run& run) {
  if (!mask.data) return true;
  uint8_t buffer[4 * kBlock];
  int64_t begin = run.end, end = run.begin, count = 0;
  for (int64_t col = run.begin; col < run.end; col += 4 * kBlock) {
    const int64_t n = run.end - col < 4 * kBlock ? run.end - col : 4 * kBlock;
    const uint8_t* live = live_bytes(mask, run.row, col, n, buffer);
    const int64_t found = count_live(live, n);
    if (!found) continue;
    int64_t first = 0, last = n;
    while (!live[first]) ++first;
    while (!live[last - 1]) --last;
    if (!count) begin = col + first;
    end = col + last;
    count += found;
    if (count < end - begin) return false;
  }
  run.begin = count ? begin : end;
  run.end = end;
  return true;
}

// From one end of the run towards the other: the edge behind the `count`-th live step, or the other
// end.
template <bool kReverse>
int64_t walk(const View& mask, const Run& run, int64_t count) {
  uint8_t buffer[4 * kBlock];
  for (int64_t left = run.end - run.begin; left > 0;) {
    const int64_t n = left < 4 * kBlock ? left : 4 * kBlock;
    const int64_t col = kReverse ? run.begin + left - n : run.end - left;
    const uint8_t* live = live_bytes(mask, run.row, col, n, buffer);
    const int64_t found = count_live(live, n);
    for (int64_t j = 0; found >= count; ++j) {
      const int64_t i = kReverse ? n - 1 - j : j;
      count -= live[i] != 0;
      if (count == 0) return kReverse ? col + i : col + i + 1;
    }
    count -= found;
    left -= n;
  }
  return kReverse ? run.begin : run.end;
}

}  // namespace PPOK_ISA
}  // namespace ppok
