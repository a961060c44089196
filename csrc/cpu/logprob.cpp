// Log-probability of one token per row of logits, with entropy, and its gradient.
//
// Each chunk of a row is summed against its own maximum, and the chunks are merged in order, in
// double.
#include "cpu/logprob.h"

#include "cpu/chunk_sums.h"
#include "cpu/logprob_parts.h"
#include "cpu/rows.h"
#include "kernels.h"
#include "logprob_row.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

// ---- one row ----------------------------------------------------------------------------------

template <class T, class Args>
inline T target_logit(const Args& a, const Row<Args>& r) {
  T u;
  read_strided(column(a.logits, r.row, r.col, r.token), a.logits.dtype, 1, 1, &u);
  if (a.softcap > 0.) Transform<Args>{a}.cap(&u, 1);
  return u;
}

// ---- forward ----------------------------------------------------------------------------------

template <class T, class Columns, bool kEntropy>
struct Forward {
  static constexpr int64_t kChunk = kChunkBytes / sizeof(typename Columns::Element);
  static constexpr int64_t kBuffer = kChunk;
  using Element = typename Columns::Element;
  using Position = Row<LogprobForward>;
  using Piece = Chunk;
  using Sums = RowSums;
  using Top = T;
  const LogprobForward& a;
  Fault& first;
  const int64_t chunks = (a.vocab + kChunk - 1) / kChunk;

  Position row(int64_t i) const { return Position(a, i); }
  double scale(const Position& r) const { return scale_of(a, r.temperature); }

  // Chunk k of u without the target; in `buffer` where the logits themselves will not do.
  Chunk chunk(const Position& r, int64_t k, Element* buffer) const {
    const int64_t from = k * kChunk, n = a.vocab - from < kChunk ? a.vocab - from : kChunk;
    const Element* u = columns_of_row<Columns>(a.logits, r.row, r.col, from, n, buffer);
    if constexpr (Columns::kType == DTypeOf<T>::value)
      if (a.softcap > 0.) {
        if (u != buffer) memcpy(buffer, u, n * sizeof(T));
        Transform<LogprobForward>{a}.cap(buffer, n);
        u = buffer;
      }
    const bool holds_target = r.token >= from && r.token < from + n;
    return {u, n, holds_target ? r.token - from : -1};
  }

  RowSums sum(const Position& r, const Chunk& now, T max, const Chunk& next, T* max_next) const {
    return sum_chunk<Columns, kEntropy>(now, max, scale(r), next, max_next);
  }

  RowSums empty() const { return empty_row(); }
  void finish_row(const Position& r, RowInParts<RowSums>& parts) const {
    const double c = scale(r);
    RowSums others = merge(parts.rest, parts.top, c);
    if constexpr (kEntropy && sizeof(T) == sizeof(float))
      if (needs_care(others)) {
        alignas(64) Element buffer[kChunk];
        parts.top = careful_sums<Columns>(chunk(r, parts.top_index, buffer),
                                          static_cast<float>(parts.top.max), c);
        others = merge(parts.rest, parts.top, c);
      }
    write_row<T, kEntropy>(a, r.position, finish(others, target_logit<T>(a, r), c));
  }
  void skip_row(const Position& r) const {
    const double fill = r.kind == kFaulty ? NAN : 0.;
    write_row<T, kEntropy>(a, r.position, {fill, fill, fill, fill, fill});
    if (r.kind == kFaulty) keep_first(first, r.fault, r.position);
  }
};

// ---- backward ---------------------------------------------------------------------------------

// Columns from .. from + n of one live row's gradient; n is at most kTile.
template <class T>
inline void gradient_tile(const LogprobBackward& a, const Row<LogprobBackward>& r, Upstream g,
                          int64_t from, int64_t n) {
  alignas(64) T raw_buffer[kTile], buffer[kTile], out_buffer[kTile];
  const T* state = at<T>(a.state, 3 * r.position);
  const Transform<LogprobBackward> transform{a};
  const double c = scale_of(a, r.temperature);
  const View& out = a.grad_logits;
  void* destination = column(out, r.row, r.col, from);
  T* grad = write_target(destination, out.dtype, out.stride[2], out_buffer);

  const T* raw = read_run(column(a.logits, r.row, r.col, from), a.logits.dtype, a.logits.stride[2],
                          n, raw_buffer);
  const T* u = raw;
  if (a.softcap > 0.) {
    memcpy(buffer, raw, n * sizeof(T));
    transform.cap(buffer, n);
    u = buffer;
    if (grad == raw) {  // in place: the raw logits are needed once more
      memcpy(raw_buffer, raw, n * sizeof(T));
      raw = raw_buffer;
    }
  }
  const bool holds_target = r.token >= from && r.token < from + n;
  T target = 0;
  if (holds_target) target = target_gradient(a, r, state, u[r.token - from], g);
  gradient_of_others(u, grad, n, c, state, g);
  if (holds_target) grad[r.token - from] = target;
  if (a.softcap > 0.) transform.uncap(grad, raw, n);
  write_run(destination, out.dtype, out.stride[2], n, grad);
}

// The same straight from contiguous logits to a contiguous gradient of their dtype. Where that is
// large, it is made in the cache and streamed past it: nobody reads it soon, and the memory is not
// read before it is overwritten.
template <class Columns, bool kCareful>
inline void gradient_direct(const LogprobBackward& a, const Row<LogprobBackward>& r, Upstream g,
                            int64_t from, int64_t n, const GradientOfOthers<kCareful>& gradient,
                            bool stream) {
  using Element = typename Columns::Element;
  alignas(64) Element buffer[kTile];
  const auto* u = reinterpret_cast<const Element*>(column(a.logits, r.row, r.col, from));
  auto* to = reinterpret_cast<Element*>(column(a.grad_logits, r.row, r.col, from));
  Element* made = stream ? buffer : to;
  const bool holds_target = r.token >= from && r.token < from + n;
  float target = 0.f;
  if (holds_target)
    target = target_gradient(a, r, at<float>(a.state, 3 * r.position),
                             Columns::to_float(u[r.token - from]), g);
  gradient_of_others<Columns>(u, made, n, gradient);
  if (holds_target) made[r.token - from] = Columns::from_float(target);
  if (stream) stream_out(to, made, n * sizeof(Element));
}

// tile(row, upstream, from, n) makes a part of a live row's gradient.
template <class Tile>
void backward(const LogprobBackward& a, Tile&& tile) {
  for_parts_of_rows(a.rows * a.cols, a.vocab, a.threads, [&](int64_t i, int64_t from, int64_t n) {
    const Row<LogprobBackward> r(a, i);
    Upstream g{0., 0.};
    if (r.kind == kLive && a.grad_logprobs.data)
      g.logprob = read_one<double>(a.grad_logprobs, r.row, r.col);
    if (r.kind == kLive && a.grad_entropy.data)
      g.entropy = read_one<double>(a.grad_entropy, r.row, r.col);
    if (g.logprob == 0. && g.entropy == 0.)  // nothing asked of this row: it is not read
      zero_columns(a.grad_logits, r.row, r.col, from, n);
    else
      tile(r, g, from, n);
  });
}

template <class T>
void backward_by_tiles(const LogprobBackward& a) {
  backward(a, [&](const Row<LogprobBackward>& r, Upstream g, int64_t from, int64_t n) {
    for (int64_t done = 0; done < n; done += kTile)
      gradient_tile<T>(a, r, g, from + done, n - done < kTile ? n - done : kTile);
  });
}

template <class Columns>
void backward_direct(const LogprobBackward& a, bool stream) {
  backward(a, [&](const Row<LogprobBackward>& r, Upstream g, int64_t from, int64_t n) {
    const float* state = at<float>(a.state, 3 * r.position);
    const double c = scale_of(a, r.temperature);
    const GradientOfOthers<false> plain(state, c, g);
    const bool careful = g.entropy != 0. || plain.exponent.overflows();
    const GradientOfOthers<true> exact(state, c, g);
    for (int64_t done = 0; done < n; done += kTile) {
      const int64_t count = n - done < kTile ? n - done : kTile;
      if (careful)
        gradient_direct<Columns>(a, r, g, from + done, count, exact, stream);
      else
        gradient_direct<Columns>(a, r, g, from + done, count, plain, stream);
    }
  });
}

}  // namespace

Fault logprob_forward(const LogprobForward& a) {
  const bool entropy = a.entropy.data != nullptr;
  const auto run = [&](auto columns, auto zero) {
    using T = decltype(zero);
    using C = decltype(columns);
    Fault first{kNoFault, 0};
    if (entropy)
      sum_rows(Forward<T, C, true>{a, first}, a.rows * a.cols, a.vocab, a.threads);
    else
      sum_rows(Forward<T, C, false>{a, first}, a.rows * a.cols, a.vocab, a.threads);
    return first;
  };
  if (a.logits.dtype == kF64) return run(Columns<kF64>{}, 0.);
  if (a.logits.dtype == kBF16 && a.softcap == 0.) return run(Columns<kBF16>{}, 0.f);
  if (a.logits.dtype == kF16 && a.softcap == 0.) return run(Columns<kF16>{}, 0.f);
  return run(Columns<kF32>{}, 0.f);
}

void logprob_backward(const LogprobBackward& a, bool stream) {
  const bool as_is = a.logits.stride[2] == 1 && a.grad_logits.stride[2] == 1 &&
                     a.logits.dtype == a.grad_logits.dtype && a.softcap == 0.;
  if (a.logits.dtype == kF64)
    backward_by_tiles<double>(a);
  else if (as_is && a.logits.dtype == kF32)
    backward_direct<Columns<kF32>>(a, stream);
  else if (as_is && a.logits.dtype == kBF16)
    backward_direct<Columns<kBF16>>(a, stream);
  else if (as_is && a.logits.dtype == kF16)
    backward_direct<Columns<kF16>>(a, stream);
  else
    backward_by_tiles<float>(a);
}

Fault logprob_backward(const LogprobBackward& a) {
  logprob_backward(a, worth_streaming(a));
  return {kNoFault, 0};
}

}  // namespace PPOK_ISA
}  // namespace ppok
