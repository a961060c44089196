// Rows of logits, cut into chunks of columns from column 0 on and shared out over threads.
//
// Cuts, and the order in which the chunks of a row are merged, depend on the vocabulary and the
// dtype alone: a row's bits do not depend on the batch, the thread count, or on whether chunks or
// whole rows are shared out.
#pragma once
#include <stdlib.h>

#include "cpu/tile.h"

namespace ppok {
namespace PPOK_ISA {

constexpr int64_t kWorthThreads =
    1 << 16;  // elements below which waking the other threads costs more
constexpr int64_t kBackwardChunk = 4096, kTile = 1024;  // elementwise: three tiles fit the cache
constexpr int64_t kStreamBytes = 32 << 20;  // a gradient no cache would hold until it is read

template <class T>
PPOK_INLINE T* at(const View& contiguous, int64_t i) {
  return static_cast<T*>(contiguous.data) + i;
}

// n columns from `from` on as contiguous elements: the logits themselves if they are, else in
// `buffer`. Floats and doubles are converted to, halves are of the logits' own dtype.
template <class Columns, class Element = typename Columns::Element>
inline const Element* columns_of_row(const View& logits, int64_t row, int64_t col, int64_t from,
                                     int64_t n, Element* buffer) {
  const void* data = column(logits, row, col, from);
  const int64_t stride = logits.stride[2];
  if constexpr (sizeof(Element) > 2) return read_run(data, logits.dtype, stride, n, buffer);
  const Element* elements = static_cast<const Element*>(data);
  if (stride == 1) return elements;
  for (int64_t j = 0; j < n; ++j) buffer[j] = elements[j * stride];
  return buffer;
}

inline void zero_columns(const View& out, int64_t row, int64_t col, int64_t from, int64_t n) {
  char* destination = column(out, row, col, from);
  const int64_t size = element_size(out.dtype);
  if (out.stride[2] == 1)
    memset(destination, 0, n * size);
  else
    for (int64_t j = 0; j < n; ++j) memset(destination + j * out.stride[2] * size, 0, size);
}

// ---- one pass that sums rows ------------------------------------------------------------------

// The chunks of one row, merged as they come; the one with the row's maximum is kept apart.
template <class Sums>
struct RowInParts {
  Sums rest, top;
  int64_t top_index = 0;
  explicit RowInParts(const Sums& empty) : rest(empty), top(empty) {}
  void add(int64_t index, const Sums& sums, double c) {
    if (highest(sums) > highest(top)) {
      rest = merge(rest, top, c);
      top = sums;
      top_index = index;
    } else {
      rest = merge(rest, sums, c);
    }
  }
};

// A Kernel says what is summed:
//   Position row(i)               row i: .position, .live()
//   double scale(row)             the c of merge()
//   Piece chunk(row, k, buffer)   one of `chunks`, perhaps in a buffer of kBuffer Elements; Piece{}
//                                 is none
//   Sums sum(row, now, top, next, &next_top)   of chunk `now`, while what must be known of the next
//                                 to sum it is found: memory is read at an even pace, and a chunk
//                                 is in the first-level cache when its turn comes
//   Sums empty(), finish_row(row, parts), skip_row(row)

// emit(task, row, sums) for every chunk of a live row among tasks row * chunks + chunk.
template <class Kernel, class Emit>
inline void sum_chunks(const Kernel& kernel, int64_t begin, int64_t end, Emit&& emit) {
  using Element = typename Kernel::Element;
  struct Task {
    int64_t index;
    typename Kernel::Position row;
    typename Kernel::Piece chunk;
  };
  alignas(64) Element buffers[2][Kernel::kBuffer];
  const int64_t chunks = kernel.chunks;
  const auto seek = [&](typename Kernel::Position row, int64_t task, Element* buffer) {
    for (; task < end; task = (task / chunks + 1) * chunks) {
      if (row.position != task / chunks) row = kernel.row(task / chunks);
      if (row.live()) return Task{task, row, kernel.chunk(row, task % chunks, buffer)};
    }
    return Task{end, row, {}};
  };
  Task now = seek(kernel.row(begin / chunks), begin, buffers[0]);
  typename Kernel::Top top, next_top;
  kernel.sum(now.row, {}, {}, now.chunk, &top);
  for (int turn = 1; now.index < end; turn ^= 1) {
    const Task next = seek(now.row, now.index + 1, buffers[turn]);
    emit(now.index, now.row, kernel.sum(now.row, now.chunk, top, next.chunk, &next_top));
    now = next;
    top = next_top;
  }
}

template <class Kernel>
void sum_rows(const Kernel& kernel, int64_t rows, int64_t vocab, int64_t max_threads) {
  using Sums = typename Kernel::Sums;
  const int64_t chunks = kernel.chunks;
  const int threads = rows * vocab < kWorthThreads ? 1 : static_cast<int>(max_threads);
  if (rows == 0) return;
  Sums* shared = nullptr;  // few long rows: their chunks are shared out instead
  if (threads > 1 && rows < 2 * threads && chunks > 1)
    shared = static_cast<Sums*>(malloc(rows * chunks * sizeof(Sums)));
  if (shared) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; ++part)
      sum_chunks(kernel, rows * chunks * part / threads, rows * chunks * (part + 1) / threads,
                 [&](int64_t task, const auto&, const Sums& sums) { shared[task] = sums; });
  }
  // More parts than threads: masked rows cost nothing, and threads may be held up.
  const int64_t parts = threads == 1 || shared ? 1 : rows < 16 * threads ? rows : 16 * threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    for (int64_t i = begin; i < end; ++i) {
      const auto row = kernel.row(i);
      if (!row.live()) {
        kernel.skip_row(row);
      } else if (shared) {
        RowInParts<Sums> sums(kernel.empty());
        for (int64_t k = 0; k < chunks; ++k) sums.add(k, shared[i * chunks + k], kernel.scale(row));
        kernel.finish_row(row, sums);
      }
    }
    if (shared) continue;
    RowInParts<Sums> sums(kernel.empty());
    sum_chunks(kernel, begin * chunks, end * chunks,
               [&](int64_t task, const auto& row, const Sums& of_chunk) {
                 sums.add(task % chunks, of_chunk, kernel.scale(row));
                 if (task % chunks < chunks - 1) return;
                 kernel.finish_row(row, sums);
                 sums = RowInParts<Sums>(kernel.empty());
               });
  }
  free(shared);
}

// ---- one pass over the elements of rows -------------------------------------------------------

// part(i, from, n) for runs of the columns of every row i.
template <class Part>
void for_parts_of_rows(int64_t rows, int64_t vocab, int64_t max_threads, Part&& part) {
  const int64_t chunks = (vocab + kBackwardChunk - 1) / kBackwardChunk;
  const int threads = rows * vocab < kWorthThreads ? 1 : static_cast<int>(max_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 16)
    for (int64_t task = 0; task < rows * chunks; ++task) {
      const int64_t from = task % chunks * kBackwardChunk;
      part(task / chunks, from, vocab - from < kBackwardChunk ? vocab - from : kBackwardChunk);
    }
    stream_end();
  }
}

}  // namespace PPOK_ISA
}  // namespace ppok
