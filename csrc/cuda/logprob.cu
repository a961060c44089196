// Log-probability of one token per row of logits, with entropy, and its gradient.
//
// A row is cut into segments from column 0 on, one block each: a thread sums the columns that fall
// to it against their running maximum, the block's threads are added in a fixed tree against the
// segment's maximum, and a second kernel merges the segments of a row in order, in double. All of
// that depends on the vocabulary and the dtype alone, so neither the batch nor the alignment of a
// row nor the grid can change its bits; and few long rows keep as many blocks busy as many.
#include "cuda/launchers.h"
#include "cuda/logprob_segment.cuh"

namespace ppok {
namespace PPOK_ISA {
namespace {

// Blocks that a multiprocessor has registers for, without spills on any architecture.
template <class E, bool kMany>
constexpr int kResident = sizeof(E) == 8 ? 2
                          : kMany        ? 3
                                         : 4;

// ---- forward ------------------------------------------------------------------------------------

template <class E, bool kEntropy, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, kResident<E, kSoftcap>)
    sum_segments(const LogprobForward a, int segments, RowSums* sums) {
  using T = Compute<E>;
  const Row<LogprobForward> r(a, blockIdx.x / segments);
  if (r.kind != kLive) return;
  const int64_t from = static_cast<int64_t>(blockIdx.x % segments) * Logits<E>::kSegment;
  const Logits<E> columns(a.logits, r.row, r.col, from, a.vocab);
  const int target = columns.index_of(r.token - from);
  const double gain = scale_of(a, r.temperature) * kLog2E;
  SegmentSums<E, kEntropy, kSoftcap> segment(a, gain, target, columns.end);

  const int last = columns.last;
  Batch<E, kVectors> next;
  columns.load(0, next);
  columns.load_head(next);
  for (int step = 0; step < columns.steps; ++step) {
    const Batch<E, kVectors> now = next;
    columns.load(step + 1, next);
    const int warp = columns.of_warp(step), after = warp + columns.kOfWarp;
    const bool whole = after <= last && (target < warp || target >= after);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Lanes<E> x = columns.realigned(now, v, next);
      const int j = columns.of_thread(step, v);
      if (whole || j < last) segment.add(x, j, whole);
    }
  }
  columns.for_each_part(last, [&](int j, T(&u)[kLanes<E>]) { segment.add(u, j, false); });
  const RowSums total = segment.running.template of_group<kThreads>(gain);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// One thread per row.
template <class E, bool kSoftcap>
__global__ void __launch_bounds__(kThreads)
    finish_rows(const LogprobForward a, int segments, const RowSums* sums, int64_t* fault) {
  using T = Compute<E>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.rows * a.cols) return;
  const Row<LogprobForward> r(a, i);
  if (r.kind != kLive) {
    if (r.kind == kFaulty) report_fault(fault, i, r.fault);
    const double fill = r.kind == kFaulty ? NAN : 0.;
    return write_row<T>(a, i, {fill, fill, fill, fill, fill});
  }
  const double c = scale_of(a, r.temperature);
  RowSums others = empty_row();
  for (int segment = 0; segment < segments; ++segment)
    others = merge(others, sums[i * segments + segment], c);
  const Logits<E> target(a.logits, r.row, r.col, r.token, a.vocab);
  const T u = Transform<T, kSoftcap>(a)(target.read(0));
  write_row<T>(a, i, finish(others, u, c));
}

// ---- backward -----------------------------------------------------------------------------------

// grad_logits may be logits: a thread writes what it alone has read.
template <class E, bool kEntropy, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, kResident<E, true>)
    make_gradient(const LogprobBackward a, int segments) {
  using T = Compute<E>;
  const Row<LogprobBackward> r(a, blockIdx.x / segments);
  const int64_t from = static_cast<int64_t>(blockIdx.x % segments) * Logits<E>::kSegment -
                       lead_of<E>(a.grad_logits, r.row, r.col);
  if (from >= a.vocab) return;
  const Logits<E> grad(a.grad_logits, r.row, r.col, from, a.vocab);

  Upstream g{0., 0.};
  if (r.kind != kSkipped && a.grad_logprobs.data)
    g.logprob = read_one<double>(a.grad_logprobs, r.row, r.col);
  if (r.kind != kSkipped && a.grad_entropy.data)
    g.entropy = read_one<double>(a.grad_entropy, r.row, r.col);
  const bool asked = g.logprob != 0. || g.entropy != 0.;
  if (!asked || r.kind != kLive) return grad.fill(asked ? T(NAN) : T(0));

  const Logits<E> logits(a.logits, r.row, r.col, from, a.vocab);
  const Gradient<T, kEntropy> gradient(Scored<T>(a, r.position), scale_of(a, r.temperature), g);
  const Transform<T, kSoftcap> transform(a);
  const auto of = [&](T raw) { return gradient(transform(raw)) * transform.slope(raw); };
  const int target = grad.index_of(r.token - from);
  T of_target = 0;
  if (target >= 0) {
    if (threadIdx.x == 0) {
      const T raw = logits.read(target);
      of_target = static_cast<T>(gradient.of_target(transform(raw))) * transform.slope(raw);
    }
    __syncthreads();  // in place it is overwritten from here on
  }
  const Span vectors = vectors_of(grad, logits);
  Batch<E, kVectors> next;
  logits.load(0, next);
  grad.for_each_outside(vectors, [&](int j) { grad.write(j, of(logits.read(j))); });
  for (int step = 0; step < logits.steps; ++step) {
    const Batch<E, kVectors> now = next;
    logits.load(step + 1, next);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Lanes<E> x = logits.realigned(now, v, next);
      const int j = grad.of_thread(step, v);
      if (j < vectors.first || j >= vectors.last) continue;
#pragma unroll
      for (int k = 0; k < kLanes<E>; ++k) x[k] = narrow<E>(of(widen(x[k])));
      store_streaming<E, kLanes<E>>(reinterpret_cast<E*>(grad.data) + j, x);
    }
  }
  if (target >= 0) {
    __syncthreads();
    if (threadIdx.x == 0) grad.write(target, of_target);
  }
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

int64_t logprob_forward_workspace(const LogprobForward& a) {
  int64_t segments = 0;
  with_element(a.logits.dtype, [&](auto element) {
    segments = Logits<decltype(element)>::segments_of(a.vocab);
    return nullptr;
  });
  return a.rows * a.cols * segments * static_cast<int64_t>(sizeof(RowSums));
}

const char* logprob_forward(const LogprobForward& a, const Launch& to) {
  if (to.workspace_bytes < logprob_forward_workspace(a)) return "the workspace is too small";
  RowSums* sums = static_cast<RowSums*>(to.workspace);
  const int64_t rows = a.rows * a.cols, blocks = (rows + kThreads - 1) / kThreads;
  return with_element(a.logits.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t segments = Logits<E>::segments_of(a.vocab);
    const bool entropy = a.entropy.data != nullptr, softcap = a.softcap > 0.;
    const auto sum = entropy ? softcap ? sum_segments<E, true, true> : sum_segments<E, true, false>
                     : softcap ? sum_segments<E, false, true>
                               : sum_segments<E, false, false>;
    const auto finish = softcap ? finish_rows<E, true> : finish_rows<E, false>;
    const int n = static_cast<int>(segments);
    const char* error = launch(sum, rows * segments, kThreads, 0, to.stream, a, n, sums);
    if (error) return error;
    return launch(finish, blocks, kThreads, 0, to.stream, a, n, sums, to.fault);
  });
}

int64_t logprob_backward_workspace(const LogprobBackward&) { return 0; }

const char* logprob_backward(const LogprobBackward& a, const Launch& to) {
  return with_element(a.logits.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t segments = Logits<E>::segments_of(a.vocab + kLanes<E> - 1);  // and a lead
    const bool entropy = a.grad_entropy.data != nullptr, softcap = a.softcap > 0.;
    const auto kernel = entropy
                            ? softcap ? make_gradient<E, true, true> : make_gradient<E, true, false>
                        : softcap ? make_gradient<E, false, true>
                                  : make_gradient<E, false, false>;
    return launch(kernel, a.rows * a.cols * segments, kThreads, 0, to.stream, a,
                  static_cast<int>(segments));
  });
}

}  // namespace PPOK_ISA
}  // namespace ppok
