// Masked sums, means, moments and whitening. Every sum is made in double, over partitions that
// follow from the logical shape alone, and merged in order.
#include "cuda/block.cuh"
#include "cuda/launchers.h"
#include "cuda/tokens.cuh"
#include "math/moments.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

constexpr int kResident = 4;  // blocks that a multiprocessor has registers for

// The parts of all threads merged by halving, those `stride` threads apart; parts[i] is then that
// of the threads i, i + stride, ... below `n`. All of the block's threads take part.
template <class State>
__device__ void merge_threads(State* parts, int n, int stride) {
  for (int half = n / 2; half >= stride; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
      parts[threadIdx.x] = merge(parts[threadIdx.x], parts[threadIdx.x + half]);
  }
  __syncthreads();
}

// The parts of all groups merged, for every thread.
template <class State>
__device__ State merge_groups(const State* groups, int64_t count) {
  PPOK_SHARED(State, parts, kThreads);
  State own{};
  for (int64_t group = threadIdx.x; group < count; group += kThreads)
    own = merge(own, groups[group]);
  parts[threadIdx.x] = own;
  merge_threads(parts, kThreads, 1);
  return parts[0];
}

// ---- sums ---------------------------------------------------------------------------------------

__device__ inline void write_result(const MaskedReduce& a, int64_t i, const Tally& s) {
  const double result = result_of(s, a.mean);
  if (a.out.dtype == kF64)
    at<double>(a.out, i) = result;
  else
    at<float>(a.out, i) = static_cast<float>(result);
  at<double>(a.count, i) = s.count;
}

constexpr int64_t kRunChunk = 4096, kColumnChunk = 1024;

// One block per run of neighbours and chunk of it. With `all` there is one run, across the rows.
__global__ void __launch_bounds__(kThreads, kResident)
    sum_runs(const MaskedReduce a, const Tokens tokens, const Source x, const Source mask,
             int64_t chunks, Tally* partials) {
  PPOK_SHARED(Tally, parts, kThreads);
  const int64_t run = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const Source own = a.all ? x : Source(a.x, run);
  const Source own_mask = a.all || !a.mask.data ? mask : Source(a.mask, run);
  const bool lines = own.line && (own_mask.line || !a.mask.data);
  Tally sum{};
  const int64_t end = min((chunk + 1) * kRunChunk, tokens.count);
  for (int64_t i = chunk * kRunChunk + threadIdx.x * kTokens; i < end; i += kStep) {
    const Place<kTokens> place(tokens, i, lines);
    const unsigned live = read_live(own_mask, place);
    double v[kTokens];
    read(own, place, live, v);
    sum.sum += v[0] + v[1] + (v[2] + v[3]);
    sum.count += __popc(live);
  }
  parts[threadIdx.x] = sum;
  merge_threads(parts, kThreads, 1);
  if (threadIdx.x) return;
  if (partials)
    partials[blockIdx.x] = parts[0];
  else
    write_result(a, run, parts[0]);
}

// Where the elements of a column are: those of out[i] are i / inner, k, i % inner.
struct Columns {
  View x, mask;
  const Tally* tallies;  // of chunks, instead of elements
  int64_t reduced, inner, outputs;
  int columns;  // of a block, which has kThreads / columns threads for each

  Columns(const View& x, const View& mask, const Tally* tallies, int64_t outer, int64_t reduced,
          int64_t inner)
      : x(x), mask(mask), tallies(tallies), reduced(reduced), inner(inner), outputs(outer * inner) {
    int64_t neighbours = 1, rows = 1;
    while (neighbours < inner && neighbours < kWarp) neighbours *= 2;
    while (rows * kTokens < reduced && rows * neighbours < kThreads) rows *= 2;
    columns = static_cast<int>(kThreads / rows);
  }

  template <class E>
  __device__ Tally element(int64_t outer, int64_t k, int64_t i) const {
    if (tallies) return tallies[(outer * reduced + k) * inner + i];
    const auto at = [&](View v) {
      v.data = address(v, outer, k);
      v.stride[1] = v.stride[2];
      return v;
    };
    if (mask.data && !is_live(at(mask), 0, i)) return {0., 0.};
    const View v = at(x);
    return {1., static_cast<double>(widen(static_cast<const E*>(v.data)[i * v.stride[1]]))};
  }
};

// One block per chunk of some neighbouring columns.
template <class E>
__global__ void __launch_bounds__(kThreads, kResident)
    sum_columns(const MaskedReduce a, const Columns c, int64_t chunks, int64_t chunk_size,
                Tally* partials) {
  PPOK_SHARED(Tally, parts, kThreads);
  const int64_t chunk = blockIdx.x % chunks;
  const int64_t i = blockIdx.x / chunks * c.columns + threadIdx.x % c.columns;
  const int64_t outer = i / c.inner, inner = i % c.inner;
  Tally sum{};
  if (i < c.outputs) {
    const int64_t end = min((chunk + 1) * chunk_size, c.reduced);
    const int rows = kThreads / c.columns;
    for (int64_t k = chunk * chunk_size + threadIdx.x / c.columns; k < end; k += rows)
      sum = merge(sum, c.element<E>(outer, k, inner));
  }
  parts[threadIdx.x] = sum;
  merge_threads(parts, kThreads, c.columns);
  if (threadIdx.x >= c.columns || i >= c.outputs) return;
  if (partials)
    partials[(outer * chunks + chunk) * c.inner + inner] = parts[threadIdx.x];
  else
    write_result(a, i, parts[threadIdx.x]);
}

// How a sum is cut: neighbours in long runs are read in vectors.
struct Cut {
  bool runs;
  int64_t outer, reduced, chunk_size, chunks;

  explicit Cut(const MaskedReduce& a) {
    outer = a.all ? 1 : a.outer;
    reduced = a.all ? a.outer * a.reduced : a.reduced;
    runs = a.all || (a.inner == 1 && reduced > kWarp);
    chunk_size = runs ? kRunChunk : kColumnChunk;
    chunks = reduced > chunk_size ? parts_of(reduced, chunk_size) : 1;
  }
};

// ---- moments ------------------------------------------------------------------------------------

struct Masked {
  Tokens tokens;
  Groups groups;
  Source x, mask;
  bool lines;

  template <class Args>
  explicit Masked(const Args& a)
      : tokens{a.rows * a.cols, a.cols},
        groups(tokens.count),
        x(a.x, a.rows, a.cols),
        mask(a.mask, a.rows, a.cols),
        lines(x.line && (mask.line || !a.mask.data)) {}
};

// The tokens that a thread has of one block of them.
template <class T>
struct BlockTokens {
  unsigned live[kVectors];
  T x[kVectors][kTokens];

  __device__ BlockTokens(const Masked& m, int64_t from) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Place<kTokens> place(m.tokens, from + v * kStep + threadIdx.x * kTokens, m.lines);
      live[v] = read_live(m.mask, place);
      read(m.x, place, live[v], x[v]);
    }
  }
  __device__ bool is_live(int v, int k) const { return live[v] >> k & 1; }
  // The block's sum of f(x) over live tokens.
  template <class F>
  __device__ double sum(F&& f) const {
    double own[1] = {0.}, total[1];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int k = 0; k < kTokens; ++k)
        if (is_live(v, k)) own[0] += f(x[v][k]);
    block_sum<kThreads>(own, total);
    return total[0];
  }
};

// The first pass sums distances to the largest element: a mean far from zero costs no accuracy, and
// equal elements have exactly that mean and no deviation.
__device__ inline Moments moments_of(const BlockTokens<double>& tokens) {
  double largest = -INFINITY;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int k = 0; k < kTokens; ++k)
      if (tokens.is_live(v, k)) largest = larger(largest, tokens.x[v][k]);
  const double count = tokens.sum([](double) { return 1.; });
  const double pivot = block_max<kThreads>(largest);
  if (count == 0.) return {0., 0., 0.};
  const double mean = pivot + tokens.sum([=](double x) { return x - pivot; }) / count;
  return {count, mean, tokens.sum([=](double x) { return (x - mean) * (x - mean); })};
}

// One block per group.
__global__ void __launch_bounds__(kThreads, kResident)
    find_moments(const Masked m, Moments* groups) {
  const int64_t begin = blockIdx.x * m.groups.tokens;
  const int64_t end = min(begin + m.groups.tokens, m.tokens.count);
  Moments total{};
  for (int64_t from = begin; from < end; from += kBlock)
    total = merge(total, moments_of(BlockTokens<double>(m, from)));
  if (threadIdx.x == 0) groups[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads, kResident)
    merge_moments(const Moments* groups, int64_t count, Moments* moments) {
  const Moments all = merge_groups(groups, count);
  if (threadIdx.x == 0) *moments = all;
}

// ---- whitening ----------------------------------------------------------------------------------

// If the moments are to be found, those of the groups are merged, and written.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    whiten_tokens(const WhitenForward a, const Masked m, const Moments* groups) {
  Moments& written = at<Moments>(a.moments, 0);
  const Moments moments = a.find_moments ? merge_groups(groups, m.groups.count) : written;
  if (a.find_moments && blockIdx.x == 0 && threadIdx.x == 0) written = moments;
  const WhitenElement<T> element(whitening(moments, a.shift_mean, a.unbiased, a.eps));
  const int64_t step = static_cast<int64_t>(gridDim.x) * kStep;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kStep) + threadIdx.x * kTokens;
       i < m.tokens.count; i += step) {
    const Place<kTokens> place(m.tokens, i, m.lines);
    const unsigned live = read_live(m.mask, place);
    T x[kTokens];
    read(m.x, place, live, x);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) x[k] = live >> k & 1 ? element(x[k]) : T(0);
    write(a.out, place, x);
  }
}

struct Upstream {
  double sum, moment;  // of g, and of g (x - mean)
};

__device__ inline Upstream merge(const Upstream& a, const Upstream& b) {
  return {a.sum + b.sum, a.moment + b.moment};
}

struct MaskedPair : Masked {
  Source grad;
  explicit MaskedPair(const WhitenBackward& a) : Masked(a), grad(a.grad, a.rows, a.cols) {
    lines = lines && grad.line;
  }
};

// One block per group.
__global__ void __launch_bounds__(kThreads, kResident)
    sum_upstream(const WhitenBackward a, const MaskedPair m, Upstream* groups) {
  const double mean = at<Moments>(a.moments, 0).mean;
  const int64_t begin = blockIdx.x * m.groups.tokens;
  const int64_t end = min(begin + m.groups.tokens, m.tokens.count);
  double own[2] = {0., 0.}, total[2];
  for (int64_t i = begin + threadIdx.x * kTokens; i < end; i += kStep) {
    const Place<kTokens> place(m.tokens, i, m.lines);
    const unsigned live = read_live(m.mask, place);
    double x[kTokens], g[kTokens];
    read(m.x, place, live, x);
    read(m.grad, place, live, g);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (!(live >> k & 1)) continue;
      own[0] += g[k];
      own[1] += g[k] * (x[k] - mean);
    }
  }
  block_sum<kThreads>(own, total);
  if (threadIdx.x == 0) groups[blockIdx.x] = {total[0], total[1]};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    make_gradient(const WhitenBackward a, const MaskedPair m, const Upstream* groups) {
  const Moments moments = at<Moments>(a.moments, 0);
  const Upstream g = merge_groups(groups, m.groups.count);
  const WhitenElementGradient<T> element(
      moments.mean, whitening_gradient(moments, whitening(moments, a.shift_mean, a.unbiased, a.eps),
                                       a.shift_mean, a.unbiased, g.sum, g.moment));
  const int64_t step = static_cast<int64_t>(gridDim.x) * kStep;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kStep) + threadIdx.x * kTokens;
       i < m.tokens.count; i += step) {
    const Place<kTokens> place(m.tokens, i, m.lines);
    const unsigned live = read_live(m.mask, place);
    T x[kTokens], grad[kTokens];
    read(m.x, place, live, x);
    read(m.grad, place, live, grad);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) x[k] = live >> k & 1 ? element(grad[k], x[k]) : T(0);
    write(a.grad_x, place, x);
  }
}

// Every block merges the groups first, so there are no more than run at the same time.
int64_t blocks_of(int64_t tokens, const Launch& to) {
  const int64_t blocks = parts_of(tokens, kStep), most = kResident * to.processors;
  return blocks > most ? most : blocks ? blocks : 1;
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

int64_t masked_reduce_workspace(const MaskedReduce& a) {
  const Cut cut(a);
  return cut.chunks == 1 ? 0 : cut.outer * cut.chunks * a.inner * int64_t(sizeof(Tally));
}

const char* masked_reduce(const MaskedReduce& a, const Launch& to) {
  if (to.workspace_bytes < masked_reduce_workspace(a)) return "the workspace is too small";
  const Cut cut(a);
  Tally* partials = cut.chunks == 1 ? nullptr : static_cast<Tally*>(to.workspace);
  const auto sum_up = [&](const Columns& c, int64_t chunks, int64_t size, Tally* to_partials) {
    const int64_t blocks = parts_of(c.outputs, c.columns) * chunks;
    return with_element(a.x.dtype, [&](auto element) {
      return launch(sum_columns<decltype(element)>, blocks, kThreads, 0, to.stream, a, c, chunks,
                    size, to_partials);
    });
  };
  const char* error;
  if (cut.runs) {
    const Tokens tokens{cut.reduced, a.all ? a.reduced : cut.reduced};
    error = launch(sum_runs, cut.outer * cut.chunks, kThreads, 0, to.stream, a, tokens,
                   Source(a.x, a.outer, a.reduced), Source(a.mask, a.outer, a.reduced), cut.chunks,
                   partials);
  } else {
    const Columns columns(a.x, a.mask, nullptr, cut.outer, cut.reduced, a.inner);
    error = sum_up(columns, cut.chunks, cut.chunk_size, partials);
  }
  if (error || !partials) return error;
  return sum_up(Columns(a.x, a.mask, partials, cut.outer, cut.chunks, a.inner), 1, cut.chunks,
                nullptr);
}

int64_t moments_workspace(const MomentsForward& a) {
  return Groups(a.rows * a.cols).count * int64_t(sizeof(Moments));
}

const char* moments(const MomentsForward& a, const Launch& to) {
  if (to.workspace_bytes < moments_workspace(a)) return "the workspace is too small";
  const Masked m(a);
  Moments* groups = static_cast<Moments*>(to.workspace);
  const char* error = launch(find_moments, m.groups.count, kThreads, 0, to.stream, m, groups);
  if (error) return error;
  return launch(merge_moments, 1, kThreads, 0, to.stream, groups, m.groups.count,
                static_cast<Moments*>(a.moments.data));
}

int64_t whiten_workspace(const WhitenForward& a) {
  return a.find_moments ? Groups(a.rows * a.cols).count * int64_t(sizeof(Moments)) : 0;
}

const char* whiten(const WhitenForward& a, const Launch& to) {
  if (to.workspace_bytes < whiten_workspace(a)) return "the workspace is too small";
  const Masked m(a);
  Moments* groups = static_cast<Moments*>(to.workspace);
  if (a.find_moments) {
    const char* error = launch(find_moments, m.groups.count, kThreads, 0, to.stream, m, groups);
    if (error) return error;
  }
  const auto kernel = a.x.dtype == kF64 ? whiten_tokens<double> : whiten_tokens<float>;
  return launch(kernel, blocks_of(m.tokens.count, to), kThreads, 0, to.stream, a, m, groups);
}

int64_t whiten_backward_workspace(const WhitenBackward& a) {
  return Groups(a.rows * a.cols).count * int64_t(sizeof(Upstream));
}

const char* whiten_backward(const WhitenBackward& a, const Launch& to) {
  if (to.workspace_bytes < whiten_backward_workspace(a)) return "the workspace is too small";
  const MaskedPair m(a);
  Upstream* groups = static_cast<Upstream*>(to.workspace);
  const char* error = launch(sum_upstream, m.groups.count, kThreads, 0, to.stream, a, m, groups);
  if (error) return error;
  const auto kernel = a.x.dtype == kF64 ? make_gradient<double> : make_gradient<float>;
  return launch(kernel, blocks_of(m.tokens.count, to), kThreads, 0, to.stream, a, m, groups);
}

}  // namespace PPOK_ISA
}  // namespace ppok
