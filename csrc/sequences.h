// The sequences of a batch: the rows of padded [rows, cols] tensors, or the runs of packed [1,
// cols] ones. Host and device.
#pragma once
#include "view.h"

namespace ppok {
namespace PPOK_ISA {

// A run of tokens: columns [begin, end) of one row.
struct Run {
  int64_t row, begin, end;
};

// Offsets, when given, are cu_seqlens [count + 1]. Whatever they hold, nothing is read outside of
// them.
struct Sequences {
  View offsets;
  int64_t rows, cols, count;

  PPOK_HD_INLINE Run operator[](int64_t i) const {
    if (!offsets.data) return {i, 0, cols};
    return {0, read_index(offsets, 0, i), read_index(offsets, 0, i + 1)};
  }

  // Where sequence i starts among all tokens in row-major order; that of `count` is their number.
  PPOK_HD_INLINE int64_t start(int64_t i) const {
    return offsets.data ? read_index(offsets, 0, i) : i * cols;
  }

  // The sequence that holds a token.
  PPOK_HD inline int64_t find(int64_t token) const {
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
  PPOK_HD_INLINE void parts(int64_t from, int64_t to, Each&& each) const {
    for (int64_t i = from < to && count ? find(from) : count; i < count && from < to; ++i) {
      const int64_t end = start(i + 1), stop = end < to ? end : to;
      if (stop <= from) continue;
      each(i, from, stop);
      from = stop;
    }
  }

  // Whether offset i is where offsets go wrong: they start at 0, never decrease and end at cols.
  PPOK_HD inline bool wrong(int64_t i) const {
    const int64_t at = start(i);
    return (i == 0 && at != 0) || (i > 0 && at < start(i - 1)) || (i == count && at != cols);
  }

  // To be asked before runs are taken from the offsets.
  bool valid() const {
    bool ok = true;
    if (offsets.data)
      for (int64_t i = 0; i <= count; ++i) ok &= !wrong(i);
    return ok;
  }
};

}  // namespace PPOK_ISA
}  // namespace ppok
