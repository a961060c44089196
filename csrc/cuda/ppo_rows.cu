// From rows of logits to the gradient of a loss that depends on each token alone: a row is read
// from memory once, and kept in shared memory until its gradient is written.
//
// A block has a row, and a group of its threads each segment. They are summed and merged as by
// logprob_forward, and a token's loss is that of clipped_loss and kl_backward: log-probabilities
// and gradients have the bits of these kernels and of logprob_backward, one after the other.
#include "cuda/launchers.h"
#include "cuda/logprob_segment.cuh"
#include "cuda/sums.cuh"
#include "ppo_row.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

// Of a block, and segments of a row that fits in shared memory.
constexpr int kMostGroups = 4;

// ---- rows ---------------------------------------------------------------------------------------

// A row in global memory, for all threads of a block. Vectors of it: columns [first, last).
template <class E>
struct MemoryRow {
  char* data;
  int64_t stride;  // in bytes
  int skip;        // elements of a vector that are before column 0
  int size, first, last;

  __device__ MemoryRow(const View& logits, int64_t row, int64_t col, int64_t vocab)
      : data(column(logits, row, col, 0)),
        stride(logits.stride[2] * static_cast<int64_t>(sizeof(E))),
        skip(0),
        size(static_cast<int>(vocab)),
        first(size),
        last(size) {
    if (stride != sizeof(E)) return;
    skip = static_cast<int>(lead_of<E>(logits, row, col));
    first = min((kLanes<E> - skip) % kLanes<E>, size);
    last = first + (size - first) / kLanes<E> * kLanes<E>;
  }
  __device__ E& operator[](int j) const { return *reinterpret_cast<E*>(data + j * stride); }
  __device__ E* vector(int j) const { return reinterpret_cast<E*>(data) + j; }

  // each(column) for this thread's columns outside of the vectors, and for the first ones of its
  // vectors, `step` columns apart.
  template <class Each>
  __device__ void for_each_outside(Each&& each) const {
    for (int j = threadIdx.x; j < first; j += blockDim.x) each(j);
    for (int j = last + threadIdx.x; j < size; j += blockDim.x) each(j);
  }
  template <class Each>
  __device__ void for_each_vector(int step, Each&& each) const {
    for (int j = first + static_cast<int>(threadIdx.x) * kLanes<E>; j < last; j += step) each(j);
  }
  __device__ int step() const { return static_cast<int>(blockDim.x) * kLanes<E>; }
};

// A row in shared memory, whose vectors are those of memory.
template <class E>
struct SharedRow {
  E* data;  // column 0
  int skip;

  __device__ explicit SharedRow(int skip) : data(dynamic_shared<E>() + skip), skip(skip) {}
  static int64_t bytes_of(int64_t vocab) {
    return ((vocab + 2 * (kLanes<E> - 1)) / kLanes<E> + 1) * kVectorBytes;
  }
  __device__ E& operator[](int64_t j) const { return data[j]; }

  // The vector of columns that begins at any of them.
  __device__ Lanes<E> vector(int j) const {
    const int into = (j + skip) % kLanes<E>;
    const auto low = load_vector<E, kLanes<E>>(data + j - into);
    if (into == 0) return low;
    const auto high = load_vector<E, kLanes<E>>(data + j - into + kLanes<E>);
    return bits_as<Lanes<E>>(
        straddling(bits_as<Words>(low), bits_as<Words>(high), into * static_cast<int>(sizeof(E))));
  }
  __device__ void load(const MemoryRow<E>& row) const {
    const int step = row.step();
    row.for_each_vector(kVectors * step, [&](int j) {
      Lanes<E> x[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (j + v * step < row.last) x[v] = load_streaming<E, kLanes<E>>(row.vector(j + v * step));
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (j + v * step < row.last) store_vector(data + j + v * step, x[v]);
    });
    row.for_each_outside([&](int j) { data[j] = row[j]; });
  }
};

// ---- kernel -------------------------------------------------------------------------------------

// Of this thread's segment.
template <class E, bool kEntropy, bool kSoftcap>
__device__ inline RowSums sum_segment(const PpoRows& a, const Row<PpoRows>& r,
                                      const SharedRow<E>& logits) {
  const int first = static_cast<int>(threadIdx.x) / kThreads * Logits<E>::kSegment;  // column
  const Logits<E> columns(a.logits, r.row, r.col, first, a.vocab);
  const double gain = scale_of(a, r.temperature) * kLog2E;
  SegmentSums<E, kEntropy, kSoftcap> segment(a, gain, columns.index_of(r.token - first),
                                             columns.end);
  for (int step = 0; step < columns.steps; ++step)
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int j = columns.of_thread(step, v);
      if (j < columns.end) segment.add(logits.vector(first + j), j, false);
    }
  return segment.running.template of_group<kThreads, kMostGroups>(gain);
}

// A row's results, and the gradients of its log-probability and entropy.
template <class T>
struct Outcome {
  Scored<T> row;
  Upstream g;
};

// By one thread.
template <class E, bool kSoftcap>
__device__ inline Outcome<Compute<E>> score(const PpoRows& a, const Row<PpoRows>& r,
                                            const SharedRow<E>& logits, const RowSums* sums) {
  using T = Compute<E>;
  const double fill = r.kind == kFaulty ? NAN : 0.;
  RowResult result{fill, fill, fill, fill, fill};
  if (r.live()) {
    const double c = scale_of(a, r.temperature);
    RowSums others = empty_row();
    for (int segment = 0; segment < static_cast<int>(blockDim.x) / kThreads; ++segment)
      others = merge(others, sums[segment], c);
    result = finish(others, Transform<T, kSoftcap>(a)(widen(logits[r.token])), c);
  }
  const Scored<T> row(result);
  at<T>(a.logprobs, r.position) = row.logprob;
  if (a.entropy.data) at<T>(a.entropy, r.position) = static_cast<T>(result.entropy);
  return {row, r.kind == kSkipped ? Upstream{0., 0.} : upstream_of<Terms<T>>(a, r, row.logprob)};
}

template <class E, class Of>
__device__ inline void write(const MemoryRow<E>& grad, const SharedRow<E>& logits, Of&& of) {
  grad.for_each_outside([&](int j) { grad[j] = narrow<E>(of(logits[j])); });
  grad.for_each_vector(grad.step(), [&](int j) {
    Lanes<E> x = logits.vector(j);
#pragma unroll
    for (int k = 0; k < kLanes<E>; ++k) x[k] = narrow<E>(of(x[k]));
    store_streaming<E, kLanes<E>>(grad.vector(j), x);
  });
}

template <class E>
__device__ inline void fill(const MemoryRow<E>& grad, Compute<E> x) {
  Lanes<E> filled;
#pragma unroll
  for (int k = 0; k < kLanes<E>; ++k) filled[k] = narrow<E>(x);
  grad.for_each_outside([&](int j) { grad[j] = filled[0]; });
  grad.for_each_vector(grad.step(),
                       [&](int j) { store_streaming<E, kLanes<E>>(grad.vector(j), filled); });
}

// grad_logits may be logits: all of the row is read before any of it is written.
template <class E, bool kEntropy, bool kSoftcap>
__global__ void __launch_bounds__(kThreads* kMostGroups)
    score_and_differentiate(const PpoRows a, int64_t* fault) {
  using T = Compute<E>;
  PPOK_SHARED(RowSums, sums, kMostGroups);
  PPOK_SHARED(Outcome<T>, outcome, 1);
  const Row<PpoRows> r(a, blockIdx.x);
  const MemoryRow<E> row(a.logits, r.row, r.col, a.vocab);
  const SharedRow<E> logits(row.skip);
  if (r.live()) {
    logits.load(row);
    __syncthreads();
    const RowSums total = sum_segment<E, kEntropy, kSoftcap>(a, r, logits);
    if (thread_of_group() == 0) sums[threadIdx.x / kThreads] = total;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    outcome[0] = score<E, kSoftcap>(a, r, logits, sums);
    if (r.kind == kFaulty) report_fault(fault, r.position, r.fault);
  }
  __syncthreads();

  const MemoryRow<E> grad(a.grad_logits, r.row, r.col, a.vocab);
  const Upstream g = outcome[0].g;
  const bool asked = g.logprob != 0. || g.entropy != 0.;
  if (!asked || !r.live()) return fill(grad, asked ? T(NAN) : T(0));
  const Gradient<T, kEntropy> gradient(outcome[0].row, scale_of(a, r.temperature), g);
  const Transform<T, kSoftcap> transform(a);
  write(grad, logits, [&](E logit) {
    const T raw = widen(logit);
    return gradient(transform(raw)) * transform.slope(raw);
  });
  __syncthreads();  // another thread has written the target's column
  if (threadIdx.x != 0) return;
  const T raw = widen(logits[r.token]);
  grad[static_cast<int>(r.token)] =
      narrow<E>(static_cast<T>(gradient.of_target(transform(raw))) * transform.slope(raw));
}

constexpr int64_t kOwnShared = 704;  // bytes that the arrays of a block take, rounded up

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

bool ppo_rows_fit(int64_t vocab, int32_t dtype) {
  bool fit = false;
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    fit = sizeof(E) < sizeof(double) && vocab > 0 && Logits<E>::segments_of(vocab) <= kMostGroups &&
          SharedRow<E>::bytes_of(vocab) + kOwnShared <= most_shared();
    return nullptr;
  });
  return fit;
}

int64_t ppo_rows_workspace(const PpoRows&) { return 0; }

const char* ppo_rows(const PpoRows& a, const Launch& to) {
  return with_element(a.logits.dtype, [&](auto element) -> const char* {
    using E = decltype(element);
    if constexpr (sizeof(E) < sizeof(double)) {
      const bool entropy = a.entropy.data != nullptr, softcap = a.softcap > 0.;
      const auto kernel = entropy   ? softcap ? score_and_differentiate<E, true, true>
                                              : score_and_differentiate<E, true, false>
                          : softcap ? score_and_differentiate<E, false, true>
                                    : score_and_differentiate<E, false, false>;
      const int threads = kThreads * static_cast<int>(Logits<E>::segments_of(a.vocab));
      return launch(kernel, a.rows * a.cols, threads, SharedRow<E>::bytes_of(a.vocab), to.stream, a,
                    to.fault);
    }
    return "rows of fp64 are not kept";
  });
}

}  // namespace PPOK_ISA
}  // namespace ppok
