// The sequences of a batch: the rows of padded [rows, cols] tensors, or the runs of packed [1,
// cols] ones.
#pragma once
#include "cpu/tile.h"

namespace ppok {
namespace PPOK_ISA {

// A run of tokens: columns [begin, end) of one row.
struct Run {
  int64_t row, begin, end;
};

// Offsets, when given, are cu_seqlens [count + 1].
struct Sequences {
  View offsets;
  int64_t rows, cols, count;

  PPOK_INLINE Run operator[](int64_t i) const {
    if (!offsets.data) return {i, 0, cols};
    return {0, read_index(offsets, 0, i), read_index(offsets, 0, i + 1)};
  }

  // Where sequence i starts among all tokens in row-major order; that of `count` is their number.
  PPOK_INLINE int64_t start(int64_t i) const {
    return offsets.data ? read_index(offsets, 0, i) : i * cols;
  }

  // The sequence that holds a token.
  int64_t find(int64_t token) const {
    if (!offsets.data) return token / cols;
    int64_t low = 0, high = count - 1;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (start(middle + 1) > token)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  // each(sequence, from, to) for every sequence with tokens in [from, to).
  template <class Each>
  PPOK_INLINE void parts(int64_t from, int64_t to, Each&& each) const {
    if (from >= to || !count) return;
    for (int64_t i = find(from); from < to; ++i) {
      const int64_t end = start(i + 1), stop = end < to ? end : to;
      if (stop == from) continue;
      each(i, from, stop);
      from = stop;
    }
  }

  // To be asked before anything is read through the offsets.
  bool valid() const {
    if (!offsets.data) return true;
    int64_t last = read_index(offsets, 0, 0);
    bool ok = last == 0;
    for (int64_t i = 1; i <= count; ++i) {
      const int64_t next = read_index(offsets, 0, i);
      ok &= next >= last;
      last = next;
    }
    return ok && last == cols;
  }
};

}  // namespace PPOK_ISA
}  // namespace ppok
