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
