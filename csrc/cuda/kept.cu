// Log-probability of one token per row over a set of its columns, with entropy, and its gradient.
//
// A warp has a row: its lanes take the ids of the set in turn, a few at a time, each against its
// own running maximum, and are added in a fixed tree. So the bits of a row depend on the list of
// its ids alone. The gradient is cleared as a whole, then that of the sets is scattered.
#include "cuda/launchers.h"
#include "cuda/logprob_parts.cuh"
#include "kept_row.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

constexpr int kThreads = 256;
constexpr int kIds = 4;  // that a lane has in flight
// Blocks that a multiprocessor has registers for, without spills on any architecture.
template <class E>
constexpr int kResident = sizeof(E) == 8 ? 2 : 3;

int64_t blocks_of(int64_t rows) {
  constexpr int64_t kRows = kThreads / kWarp;
  return (rows + kRows - 1) / kRows;
}
__device__ inline int64_t row_of_warp() {
  return (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
}

// each(k, id) for this lane's part of the set.
template <class Args, class Each>
__device__ inline void for_each_id(const KeptRow<Args>& r, Each&& each) {
  for (int64_t k = threadIdx.x % kWarp; k < r.size; k += kWarp) each(k, r.id(k));
}

template <class E, class Args>
__device__ inline Compute<E> read_logit(const KeptRow<Args>& r, int64_t id) {
  const View& logits = r.a.logits;
  return widen(*reinterpret_cast<const E*>(column(logits, r.row, r.col, id)));
}

// ---- forward ------------------------------------------------------------------------------------

template <class E, bool kEntropy, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, kResident<E>)
    sum_sets(const KeptForward a, int64_t* fault) {
  using T = Compute<E>;
  const int64_t i = row_of_warp();
  if (i >= a.rows * a.cols) return;
  const int lane = threadIdx.x % kWarp;
  const KeptRow<KeptForward> r(a, i);
  const double c = scale_of(a, r.temperature), gain = c * kLog2E;
  const Transform<T, kSoftcap> transform(a);

  Running<T, kEntropy> running;
  T of_token = 0;
  bool found = false, outside = false;
  for (int64_t from = lane; from - lane < r.size; from += kIds * kWarp) {
    T u[kIds];
#pragma unroll
    for (int n = 0; n < kIds; ++n) {
      const int64_t k = from + n * kWarp;
      u[n] = -INFINITY;
      if (k >= r.size) continue;
      const int64_t id = r.id(k);
      if (!r.is_column(id)) {
        outside = true;
        continue;
      }
      const T raw = read_logit<E>(r, id);
      if (a.values.data) at<T>(a.values, r.begin + k) = raw;
      u[n] = transform(raw);
      if (id == r.token) {
        found = true;
        of_token = u[n];
        u[n] = -INFINITY;
      }
    }
    running.add(u, static_cast<T>(gain));
  }
  const RowSums others = running.of_warp(gain);
  const unsigned has_token = __ballot_sync(kWholeWarp, found);
  of_token = __shfl_sync(kWholeWarp, of_token, has_token ? __ffs(has_token) - 1 : 0);
  const bool bad = __any_sync(kWholeWarp, outside) || r.kind == kFaulty;
  if (lane != 0) return;
  if (bad) report_fault(fault, i, r.kind == kFaulty ? r.fault : kBadKept);
  const double fill = bad ? NAN : 0.;
  RowResult result{fill, fill, fill, fill, fill};
  if (r.live() && !bad) result = finish(others, has_token ? of_token : -INFINITY, c);
  write_row<T>(a, i, result);
}

// ---- backward -----------------------------------------------------------------------------------

// grad_logits is all zeros.
template <class E, bool kEntropy, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, kResident<E>) scatter_gradient(const KeptBackward a) {
  using T = Compute<E>;
  const int64_t i = row_of_warp();
  if (i >= a.rows * a.cols) return;
  const KeptRow<KeptBackward> r(a, i);
  Upstream g{0., 0.};
  if (r.kind != kSkipped && a.grad_logprobs.data)
    g.logprob = read_one<double>(a.grad_logprobs, r.row, r.col);
  if (r.kind != kSkipped && a.grad_entropy.data)
    g.entropy = read_one<double>(a.grad_entropy, r.row, r.col);
  if (g.logprob == 0. && g.entropy == 0.) return;

  E* grad = static_cast<E*>(a.grad_logits.data) + i * a.vocab;
  bool found = false, outside = false;
  for_each_id(r, [&](int64_t, int64_t id) {
    found = found || id == r.token;
    outside = outside || !r.is_column(id);
  });
  if (__any_sync(kWholeWarp, outside) || r.kind == kFaulty) {
    for (int64_t j = threadIdx.x % kWarp; j < a.vocab; j += kWarp) grad[j] = narrow<E>(T(NAN));
    return;
  }
  if (!__any_sync(kWholeWarp, found)) g.logprob = 0.;  // -inf, whatever the logits
  const Gradient<T, kEntropy> gradient(Scored<T>(a, r.position), scale_of(a, r.temperature), g);
  const Transform<T, kSoftcap> transform(a);
  for_each_id(r, [&](int64_t k, int64_t id) {
    const T raw = a.values.data ? at<T>(a.values, r.begin + k) : read_logit<E>(r, id);
    const T u = transform(raw);
    const T of_u = id == r.token ? static_cast<T>(gradient.of_target(u)) : gradient(u);
    grad[id] = narrow<E>(of_u * transform.slope(raw));
  });
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

int64_t kept_forward_workspace(const KeptForward&) { return 0; }
int64_t kept_backward_workspace(const KeptBackward&) { return 0; }

const char* kept_forward(const KeptForward& a, const Launch& to) {
  return with_element(a.logits.dtype, [&](auto element) {
    using E = decltype(element);
    const bool entropy = a.entropy.data != nullptr, softcap = a.softcap > 0.;
    const auto sum = entropy   ? softcap ? sum_sets<E, true, true> : sum_sets<E, true, false>
                     : softcap ? sum_sets<E, false, true>
                               : sum_sets<E, false, false>;
    return launch(sum, blocks_of(a.rows * a.cols), kThreads, 0, to.stream, a, to.fault);
  });
}

const char* kept_backward(const KeptBackward& a, const Launch& to) {
  const int64_t rows = a.rows * a.cols;
  const int64_t bytes = rows * a.vocab * element_size(a.grad_logits.dtype);
  if (const char* error = clear(a.grad_logits.data, bytes, to.stream)) return error;
  return with_element(a.grad_logits.dtype, [&](auto element) {
    using E = decltype(element);
    const bool entropy = a.grad_entropy.data != nullptr, softcap = a.softcap > 0.;
    const auto kernel =
        entropy   ? softcap ? scatter_gradient<E, true, true> : scatter_gradient<E, true, false>
        : softcap ? scatter_gradient<E, false, true>
                  : scatter_gradient<E, false, false>;
    return launch(kernel, blocks_of(rows), kThreads, 0, to.stream, a);
  });
}

}  // namespace PPOK_ISA
}  // namespace ppok
