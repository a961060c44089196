// Log-probability of one token per row over a set of its columns, with entropy, and its gradient.
//
// The logits of a set are gathered in chunks, in the order of its ids, which are summed and merged
// as the chunks of a whole row.
#include <stdlib.h>

#include "cpu/logprob_parts.h"
#include "kept_row.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

constexpr int64_t kWorthThreadsOfIds = 1 << 12;

// ---- between a row and the elements of its set ------------------------------------------------

template <class Word, class Index>
void gather_words(const void* row, int64_t stride, const Index* ids, int64_t step, int64_t n,
                  void* to) {
  for (int64_t k = 0; k < n; ++k)
    static_cast<Word*>(to)[k] = static_cast<const Word*>(row)[ids[k * step] * stride];
}

template <class Word, class Index>
void scatter_words(const void* from, const Index* ids, int64_t step, int64_t n, void* row) {
  for (int64_t k = 0; k < n; ++k)
    static_cast<Word*>(row)[ids[k * step]] = static_cast<const Word*>(from)[k];
}

// body(ids, step): those of a set from `from` on, in their dtype.
template <class Args, class Body>
auto with_ids(const KeptRow<Args>& r, int64_t from, Body&& body) {
  const View& ids = r.a.ids;
  const void* first = address(ids, 0, r.begin + from);
  if (ids.dtype == kI64) return body(static_cast<const int64_t*>(first), ids.stride[1]);
  return body(static_cast<const int32_t*>(first), ids.stride[1]);
}

// body(word, ids, step), and an integer as large as an element of the dtype.
template <class Args, class Body>
void with_words(int32_t dtype, const KeptRow<Args>& r, int64_t from, Body&& body) {
  with_ids(r, from, [&](const auto* ids, int64_t step) {
    switch (element_size(dtype)) {
      case 2:
        return body(uint16_t(), ids, step);
      case 4:
        return body(uint32_t(), ids, step);
      default:
        return body(uint64_t(), ids, step);
    }
  });
}

// Logits `from` to `from + n` of a row's set, as T.
template <class T, class Args>
const T* read_kept(const Args& a, const KeptRow<Args>& r, int64_t from, int64_t n, T* buffer) {
  alignas(64) char raw[kChunkBytes];
  const View& logits = a.logits;
  with_words(logits.dtype, r, from, [&](auto word, const auto* ids, int64_t step) {
    gather_words<decltype(word)>(address(logits, r.row, r.col), logits.stride[2], ids, step, n,
                                 raw);
  });
  const T* converted = read_run(raw, logits.dtype, 1, n, buffer);
  if (converted != buffer) memcpy(buffer, converted, n * sizeof(T));
  return buffer;
}

// Where the token is in the set: -1 if nowhere.
template <class Args>
int64_t index_of_token(const KeptRow<Args>& r) {
  return with_ids(r, 0, [&](const auto* ids, int64_t step) {
    for (int64_t k = 0; k < r.size; ++k)
      if (ids[k * step] == r.token) return k;
    return int64_t(-1);
  });
}

// ---- forward ----------------------------------------------------------------------------------

// Finds what is wrong with the ids of a set.
class Judge {
 public:
  explicit Judge(int64_t vocab)
      : seen_(static_cast<uint64_t*>(calloc((vocab + 63) / 64, sizeof(uint64_t)))) {}
  Judge(const Judge&) = delete;
  Judge& operator=(const Judge&) = delete;
  ~Judge() { free(seen_); }

  bool accepts(const KeptRow<KeptForward>& r) {
    return with_ids(r, 0, [&](const auto* ids, int64_t step) {
      int64_t good = 0;
      while (good < r.size && r.is_column(ids[good * step]) && first_time(ids[good * step])) ++good;
      for (int64_t k = 0; seen_ && k < good; ++k) seen_[ids[k * step] / 64] = 0;
      return good == r.size;
    });
  }

 private:
  bool first_time(uint64_t id) {
    if (!seen_) return true;  // without memory nobody looks for repeated ids
    uint64_t& word = seen_[id / 64];
    const uint64_t bit = uint64_t(1) << id % 64, before = word;
    word = before | bit;
    return !(before & bit);
  }
  uint64_t* seen_;  // a bit for each column; zeros between two sets
};

template <class T, bool kEntropy>
RowResult sum_set(const KeptForward& a, const KeptRow<KeptForward>& r) {
  using C = Columns<DTypeOf<T>::value>;
  constexpr int64_t kChunk = kChunkBytes / sizeof(T);
  alignas(64) T buffers[2][kChunk];
  const double c = scale_of(a, r.temperature);
  const int64_t target = index_of_token(r);
  T of_target = -INFINITY;
  const auto chunk = [&](int64_t k, T* u) {
    const int64_t from = k * kChunk, left = r.size - from, n = left < kChunk ? left : kChunk;
    if (n <= 0) return Chunk{};
    read_kept(a, r, from, n, u);
    if (a.values.data) memcpy(at<T>(a.values, r.begin + from), u, n * sizeof(T));
    if (a.softcap > 0.) Transform<KeptForward>{a}.cap(u, n);
    const bool holds_target = target >= from && target < from + n;
    if (holds_target) of_target = u[target - from];
    return Chunk{u, n, holds_target ? target - from : -1};
  };

  RowInParts<RowSums> parts(empty_row());
  Chunk now = chunk(0, buffers[0]);
  T top, next_top;
  sum_chunk<C, kEntropy>(Chunk{}, T(0), c, now, &top);
  for (int64_t k = 0; now.n; ++k) {
    const Chunk next = chunk(k + 1, buffers[(k + 1) % 2]);
    parts.add(k, sum_chunk<C, kEntropy>(now, top, c, next, &next_top), c);
    now = next;
    top = next_top;
  }
  RowSums others = merge(parts.rest, parts.top, c);
  if constexpr (kEntropy && sizeof(T) == sizeof(float))
    if (needs_care(others)) {
      parts.top = careful_sums<C>(chunk(parts.top_index, buffers[0]), parts.top.max, c);
      others = merge(parts.rest, parts.top, c);
    }
  return finish(others, of_target, c);
}

template <class T, bool kEntropy>
Fault forward(const KeptForward& a) {
  Fault first{kNoFault, 0};
  const int threads = a.count < kWorthThreadsOfIds ? 1 : static_cast<int>(a.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Judge judge(a.vocab);
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < a.rows * a.cols; ++i) {
      const KeptRow<KeptForward> r(a, i);
      if (r.live() && judge.accepts(r)) {
        write_row<T, kEntropy>(a, i, sum_set<T, kEntropy>(a, r));
        continue;
      }
      write_row<T, kEntropy>(a, i, {0., 0., 0., 0., 0.});
      if (r.kind != kSkipped) keep_first(first, r.live() ? kBadKept : r.fault, i);
    }
  }
  return first;
}

// ---- backward ---------------------------------------------------------------------------------

template <class T>
void scatter_gradient(const KeptBackward& a, const KeptRow<KeptBackward>& r, Upstream g,
                      int64_t target) {
  alignas(64) T raw_buffer[kTile], buffer[kTile], grad[kTile];
  alignas(64) char narrowed[kTile * sizeof(T)];
  const T* state = at<T>(a.state, 3 * r.position);
  const Transform<KeptBackward> transform{a};
  const double c = scale_of(a, r.temperature);
  const View& out = a.grad_logits;
  for (int64_t from = 0; from < r.size; from += kTile) {
    const int64_t n = r.size - from < kTile ? r.size - from : kTile;
    const T* raw =
        a.values.data ? at<T>(a.values, r.begin + from) : read_kept(a, r, from, n, raw_buffer);
    memcpy(buffer, raw, n * sizeof(T));
    if (a.softcap > 0.) transform.cap(buffer, n);
    gradient_of_others(buffer, grad, n, c, state, g);
    if (target >= from && target < from + n)
      grad[target - from] = target_gradient(a, r, state, buffer[target - from], g);
    if (a.softcap > 0.) transform.uncap(grad, raw, n);
    write_run(narrowed, out.dtype, 1, n, grad);
    with_words(out.dtype, r, from, [&](auto word, const auto* ids, int64_t step) {
      scatter_words<decltype(word)>(narrowed, ids, step, n, address(out, r.row, r.col));
    });
  }
}

template <class T>
void backward(const KeptBackward& a) {
  const int64_t rows = a.rows * a.cols;
  const int threads = rows * a.vocab < kWorthThreads ? 1 : static_cast<int>(a.threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const KeptRow<KeptBackward> r(a, i);
    zero_columns(a.grad_logits, r.row, r.col, 0, a.vocab);
    if (!r.live()) continue;
    Upstream g{0., 0.};
    if (a.grad_logprobs.data) g.logprob = read_one<double>(a.grad_logprobs, r.row, r.col);
    if (a.grad_entropy.data) g.entropy = read_one<double>(a.grad_entropy, r.row, r.col);
    if (g.logprob == 0. && g.entropy == 0.) continue;
    const int64_t target = index_of_token(r);
    if (target < 0) g.logprob = 0.;  // -inf, whatever the logits
    scatter_gradient<T>(a, r, g, target);
  }
}

}  // namespace

Fault kept_forward(const KeptForward& a) {
  const bool entropy = a.entropy.data != nullptr;
  if (a.logits.dtype == kF64) return entropy ? forward<double, true>(a) : forward<double, false>(a);
  return entropy ? forward<float, true>(a) : forward<float, false>(a);
}

Fault kept_backward(const KeptBackward& a) {
  a.grad_logits.dtype == kF64 ? backward<double>(a) : backward<float>(a);
  return {kNoFault, 0};
}

}  // namespace PPOK_ISA
}  // namespace ppok
