// KL(a || b) of two rows of logits over the whole vocabulary, and its gradient for either.
//
// As in logprob.cu: segments from column 0 on, one block each; a thread sums its columns of both
// rows against their running maxima, a block its threads in a fixed tree, and a second kernel the
// segments of a row in order, in double.
#include <type_traits>

#include "cuda/columns.cuh"
#include "cuda/exp2.cuh"
#include "cuda/launchers.h"
#include "math/categorical_kl.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

constexpr int kVectors = 2;  // that a thread has in flight of each row
template <class E>
constexpr int kResident = sizeof(E) == 8 ? 1 : 3;  // blocks of a multiprocessor
template <class E, bool kAnyDtype>
using Logits = Columns<E, kVectors, kAnyDtype>;

struct Row {
  int64_t position, row, col;
  __device__ Row(int64_t position, int64_t cols)
      : position(position), row(position / cols), col(position % cols) {}
};

// ---- forward ------------------------------------------------------------------------------------

// Logits are summed times this, which is exact: where -3e38 takes the place of -inf, differences of
// the logits themselves overflow, and their sums.
constexpr double kSmall = 0x1p-24;

// What one thread has summed, the slope in units of logits.
template <class T>
struct Running {
  PartialPair<T> sums = empty_pair<T>();

  template <int n>
  __device__ void add(const T (&u)[n], const T (&v)[n], T gain) {
    T top_a = sums.a.max, top_b = sums.b.max;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      top_a = larger(top_a, u[k]);
      top_b = larger(top_b, v[k]);
    }
    if (top_a > sums.a.max || top_b > sums.b.max) {
      const auto up = [&](T from, T to) -> Raise<T> {
        const T gap = from == -INFINITY ? T(0) : from - to;
        return {to, gap, power_of_two(gap * gain)};
      };
      sums = raised(sums, up(sums.a.max, top_a), up(sums.b.max, top_b));
    }
    const T reference_a = top_a == -INFINITY ? T(0) : top_a;
    const T reference_b = top_b == -INFINITY ? T(0) : top_b;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const T da = u[k] - reference_a, db = v[k] - reference_b;
      const T p = power_of_two(da * gain), q = power_of_two(db * gain);
      add(sums.a, da, p);
      add(sums.b, db, q);
      // Nothing where a forbids the token; inf where b alone does, even if p underflows.
      const T gap = u[k] == -INFINITY ? T(0) : da - db;
      sums.slope = fma(v[k] == -INFINITY ? T(1) : p, gap, sums.slope);
    }
  }

  // The sums of all threads of the block, of the logits as they are.
  __device__ PairSums of_block(double gain) const {
    const auto up = [&](T from, T to) -> Raise<T> {
      const double gap = from == to || from == -INFINITY ? 0. : static_cast<double>(from) - to;
      return {to, static_cast<T>(gap), power_of_two_wide<T>(gap * gain)};
    };
    const T max_a = block_max<kThreads>(sums.a.max), max_b = block_max<kThreads>(sums.b.max);
    const PartialPair<T> own = raised(sums, up(sums.a.max, max_a), up(sums.b.max, max_b));
    const T parts[5] = {own.a.at_max, own.a.rest, own.b.at_max, own.b.rest, own.slope};
    double total[5];
    block_sum<kThreads>(parts, total);
    return {{max_a / kSmall, total[0], total[1]},
            {max_b / kSmall, total[2], total[3]},
            total[4] * (gain * kLn2)};
  }

 private:
  static __device__ void add(Mass<T>& mass, T below, T power) {
    if (below == T(0))
      mass.at_max += T(1);
    else
      mass.rest += power;
  }
};

template <class E, bool kAnyDtype>
__global__ void __launch_bounds__(kThreads, kResident<E>)
    sum_segments(const CategoricalKlForward a, int segments, PairSums* sums) {
  using T = Compute<E>;
  using L = Logits<E, kAnyDtype>;
  const Row r(blockIdx.x / segments, a.cols);
  if (!is_live(a.mask, r.row, r.col)) return;
  const int64_t from = static_cast<int64_t>(blockIdx.x % segments) * L::kSegment;
  const L first(a.first, r.row, r.col, from, a.vocab),
      second(a.second, r.row, r.col, from, a.vocab);
  const double gain = kLog2E / a.temperature / kSmall;

  Running<T> running;
  const auto add = [&](T(&u)[kLanes<E>], T(&v)[kLanes<E>]) {
#pragma unroll
    for (int k = 0; k < kLanes<E>; ++k) {
      u[k] *= static_cast<T>(kSmall);
      v[k] *= static_cast<T>(kSmall);
    }
    running.add(u, v, static_cast<T>(gain));
  };

  const int last = min(first.last, second.last);
  Batch<E, kVectors> next_a, next_b;
  first.load(0, next_a);
  second.load(0, next_b);
  first.load_head(next_a);
  second.load_head(next_b);
  for (int step = 0; step < first.steps; ++step) {
    const Batch<E, kVectors> now_a = next_a, now_b = next_b;
    first.load(step + 1, next_a);
    second.load(step + 1, next_b);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const Lanes<E> x = first.realigned(now_a, i, next_a), y = second.realigned(now_b, i, next_b);
      if (first.of_thread(step, i) >= last) continue;
      T u[kLanes<E>], v[kLanes<E>];
#pragma unroll
      for (int k = 0; k < kLanes<E>; ++k) {
        u[k] = widen(x[k]);
        v[k] = widen(y[k]);
      }
      add(u, v);
    }
  }
  first.for_each_part(last, [&](int j, T(&u)[kLanes<E>]) {
    T v[kLanes<E>];
#pragma unroll
    for (int k = 0; k < kLanes<E>; ++k) {
      v[k] = j + k < second.end ? second.read(j + k) : T(-INFINITY);
      if (j + k >= first.end) u[k] = -INFINITY;
    }
    add(u, v);
  });
  const PairSums total = running.of_block(gain);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// One thread per row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_rows(const CategoricalKlForward a, int segments, const PairSums* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.rows * a.cols) return;
  const auto write = [&](double kl, double max_a, double log_a, double max_b, double log_b) {
    at<T>(a.kl, i) = static_cast<T>(kl);
    at<T>(a.state, 4 * i) = static_cast<T>(max_a);
    at<T>(a.state, 4 * i + 1) = static_cast<T>(log_a);
    at<T>(a.state, 4 * i + 2) = static_cast<T>(max_b);
    at<T>(a.state, 4 * i + 3) = static_cast<T>(log_b);
  };
  const Row r(i, a.cols);
  if (!is_live(a.mask, r.row, r.col)) return write(0., 0., 0., 0., 0.);
  PairSums row = empty_pair();
  for (int segment = 0; segment < segments; ++segment)
    row = merge(row, sums[i * segments + segment], 1. / a.temperature);
  write(divergence(row), row.a.max, log_of(row.a), row.b.max, log_of(row.b));
}

// ---- backward -----------------------------------------------------------------------------------

// upstream * c * the slope of one row, in its columns.
template <class T, bool kOfSecond>
struct Gradient {
  T max_a, max_b, c, gain, log2_a, log2_b, gap_of_all, factor;

  __device__ Gradient(const CategoricalKlBackward& a, int64_t i, double upstream)
      : max_a(at<T>(a.state, 4 * i)),
        max_b(at<T>(a.state, 4 * i + 2)),
        c(static_cast<T>(1. / a.temperature)),
        gain(static_cast<T>(kLog2E / a.temperature)),
        factor(static_cast<T>(upstream / a.temperature)) {
    const double log_a = at<T>(a.state, 4 * i + 1), log_b = at<T>(a.state, 4 * i + 3);
    log2_a = static_cast<T>(log_a * kLog2E);
    log2_b = static_cast<T>(log_b * kLog2E);
    gap_of_all = static_cast<T>(log_b - log_a - (kOfSecond ? 0. : at<T>(a.kl, i)));
  }
  __device__ T operator()(T u, T v) const {
    const T da = u - max_a, db = v - max_b, gap = (da - db) * c + gap_of_all;
    const T p = power_of_two(da * gain - log2_a);
    if (!kOfSecond) return factor * slope_of_first<T>(p, gap);
    const T larger = gap > T(0) ? p : power_of_two(db * gain - log2_b);
    return factor * slope_of_second<T>(larger, gap, expm1(-fabs(gap)));
  }
};

template <class E, bool kAnyDtype, bool kOfSecond>
__global__ void __launch_bounds__(kThreads, kResident<E>)
    make_gradient(const CategoricalKlBackward a, int segments) {
  using T = Compute<E>;
  using L = Logits<E, kAnyDtype>;
  const Row r(blockIdx.x / segments, a.cols);
  const int64_t from =
      static_cast<int64_t>(blockIdx.x % segments) * L::kSegment - lead_of<E>(a.grad, r.row, r.col);
  if (from >= a.vocab) return;
  const L grad(a.grad, r.row, r.col, from, a.vocab);
  const double upstream =
      is_live(a.mask, r.row, r.col) ? read_one<double>(a.grad_kl, r.row, r.col) : 0.;
  const bool defined = fabs(at<T>(a.kl, r.position)) < INFINITY;
  if (upstream == 0. || !defined) return grad.fill(upstream == 0. ? T(0) : T(NAN));

  const L first(a.first, r.row, r.col, from, a.vocab),
      second(a.second, r.row, r.col, from, a.vocab);
  const Gradient<T, kOfSecond> gradient(a, r.position, upstream);
  const Span vectors = vectors_of(grad, first, second);
  Batch<E, kVectors> next_a, next_b;
  first.load(0, next_a);
  second.load(0, next_b);
  grad.for_each_outside(vectors,
                        [&](int j) { grad.write(j, gradient(first.read(j), second.read(j))); });
  for (int step = 0; step < grad.steps; ++step) {
    const Batch<E, kVectors> now_a = next_a, now_b = next_b;
    first.load(step + 1, next_a);
    second.load(step + 1, next_b);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Lanes<E> x = first.realigned(now_a, v, next_a);
      const Lanes<E> y = second.realigned(now_b, v, next_b);
      const int j = grad.of_thread(step, v);
      if (j < vectors.first || j >= vectors.last) continue;
#pragma unroll
      for (int k = 0; k < kLanes<E>; ++k) x[k] = narrow<E>(gradient(widen(x[k]), widen(y[k])));
      store_streaming<E, kLanes<E>>(reinterpret_cast<E*>(grad.data) + j, x);
    }
  }
}

// ---- launchers ----------------------------------------------------------------------------------

// body(element, any): what the logits are read as, and whether they are of other dtypes.
template <class Args, class Body>
const char* with_elements(const Args& a, Body&& body) {
  const int32_t first = a.first.dtype, second = a.second.dtype;
  if (first == second)
    return with_element(first, [&](auto element) { return body(element, std::false_type()); });
  return first == kF64 || second == kF64 ? body(0., std::true_type()) : body(0.f, std::true_type());
}

}  // namespace

int64_t categorical_kl_forward_workspace(const CategoricalKlForward& a) {
  int64_t segments = 0;
  with_elements(a, [&](auto element, auto any) {
    segments = Logits<decltype(element), any.value>::segments_of(a.vocab);
    return nullptr;
  });
  return a.rows * a.cols * segments * static_cast<int64_t>(sizeof(PairSums));
}

const char* categorical_kl_forward(const CategoricalKlForward& a, const Launch& to) {
  if (to.workspace_bytes < categorical_kl_forward_workspace(a)) return "the workspace is too small";
  PairSums* sums = static_cast<PairSums*>(to.workspace);
  const int64_t rows = a.rows * a.cols, blocks = (rows + kThreads - 1) / kThreads;
  return with_elements(a, [&](auto element, auto any) {
    using E = decltype(element);
    const int64_t segments = Logits<E, any.value>::segments_of(a.vocab);
    const int n = static_cast<int>(segments);
    const char* error =
        launch(sum_segments<E, any.value>, rows * segments, kThreads, 0, to.stream, a, n, sums);
    if (error) return error;
    return launch(finish_rows<Compute<E>>, blocks, kThreads, 0, to.stream, a, n, sums);
  });
}

int64_t categorical_kl_backward_workspace(const CategoricalKlBackward&) { return 0; }

const char* categorical_kl_backward(const CategoricalKlBackward& a, const Launch& to) {
  return with_elements(a, [&](auto element, auto any) {
    using E = decltype(element);
    const int64_t segments = Logits<E, any.value>::segments_of(a.vocab + kLanes<E> - 1);
    const auto kernel =
        a.of_second ? make_gradient<E, any.value, true> : make_gradient<E, any.value, false>;
    return launch(kernel, a.rows * a.cols * segments, kThreads, 0, to.stream, a,
                  static_cast<int>(segments));
  });
}

}  // namespace PPOK_ISA
}  // namespace ppok
