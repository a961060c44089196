// Policy and value loss: the aggregated loss, the sums behind every metric and the final gradient,
// in one pass over the tokens and one merge of what its blocks summed. And importance weights, in
// the place of gradients.
//
// Tokens are cut in row-major order into groups, a thread sums every kStep-th vector of its group,
// and a fixed tree adds threads and groups: bits depend on the order of the tokens alone. What the
// weights need of a mask or of offsets is counted before, in whole numbers, by integer atomics.
#include "cuda/block.cuh"
#include "cuda/launchers.h"
#include "cuda/sums.cuh"
#include "cuda/tokens.cuh"
#include "loss_frame.h"
#include "loss_terms.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

using Counter = unsigned long long;  // as atomicAdd takes it

// What is counted on the device.
struct Counted {
  Counter tokens, sequences, wrong;  // wrong: the offsets are
};

// What the kernels of a call are told; `counted` and `per_sequence` are absent if nothing had to be
// counted.
struct Call {
  LossFrame f;
  Sequences sequences;
  Tokens tokens;
  Groups groups;
  Source live, constant, target, mask;
  bool target_per_sequence, lines;
  Counted* counted;
  Counter* per_sequence;
  double* statistics;  // of the sequences, if the loss has them
  double* partials;    // [terms, groups]

  Call(const LossInputs& in, const LossFrame& f, int terms, bool of_sequence, Parts& workspace)
      : f(f),
        sequences(sequences_of(f)),
        tokens{f.rows * f.cols, f.cols},
        groups(tokens.count),
        live(in.live, f.rows, f.cols),
        constant(in.constant, f.rows, f.cols),
        target(in.target, f.rows, f.cols),
        mask(f.mask, f.rows, f.cols),
        target_per_sequence(in.target_per_sequence),
        counted(nullptr),
        per_sequence(nullptr),
        statistics(nullptr) {
    lines = live.line && (constant.line || !in.constant.data) &&
            (target.line || target_per_sequence) && (mask.line || !f.mask.data);
    if (f.mask.data || f.cu_seqlens.data) {
      counted = workspace.take<Counted>(1);
      per_sequence = workspace.take<Counter>(sequences.count);
    }
    if (of_sequence) statistics = workspace.take<double>(sequences.count);
    partials = workspace.take<double>(terms * groups.count);
  }

  __device__ int64_t count_of(int64_t sequence) const {
    return per_sequence ? static_cast<int64_t>(per_sequence[sequence]) : tokens.cols;
  }
  __device__ LiveTotals totals() const {
    if (!counted) return {tokens.count, sequences.count};
    return {static_cast<int64_t>(counted->tokens), static_cast<int64_t>(counted->sequences)};
  }
  // NaN if the offsets are wrong.
  __device__ double divisor() const {
    return counted && counted->wrong ? NAN : PPOK_ISA::divisor(f, totals());
  }
};

// ---- live tokens --------------------------------------------------------------------------------

__device__ inline int64_t between(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// One block: whether the offsets are right, and what can be counted without the mask.
__global__ void __launch_bounds__(kThreads) count_sequences(const Call c, int64_t* fault) {
  int64_t live[1] = {0};
  int wrong = 0;
  for (int64_t s = threadIdx.x; s <= c.sequences.count; s += kThreads) {
    if (c.sequences.offsets.data && c.sequences.wrong(s)) {
      report_fault(fault, s, kBadOffsets);
      wrong = 1;
    }
    if (s == c.sequences.count) break;
    int64_t n = 0;
    if (!c.mask.view.data) {
      const int64_t begin = between(c.sequences.start(s), 0, c.tokens.count);
      n = between(c.sequences.start(s + 1), begin, c.tokens.count) - begin;
    }
    c.per_sequence[s] = n;
    live[0] += n > 0;
  }
  double sequences[1];
  block_sum<kThreads>(live, sequences);
  wrong = __syncthreads_or(wrong);
  if (threadIdx.x == 0)
    *c.counted = {static_cast<Counter>(c.mask.view.data ? 0 : c.tokens.count),
                  static_cast<Counter>(sequences[0]), static_cast<Counter>(wrong)};
}

constexpr int kMaskTokens = 16;  // a thread's neighbours

// The masked tokens of one warp, of all sequences that they are of.
__global__ void __launch_bounds__(kThreads) count_tokens(const Call c) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t from = warp * kWarp * kMaskTokens, first = from + lane * kMaskTokens;
  if (from >= c.tokens.count) return;
  const int64_t to = min(from + kWarp * kMaskTokens, c.tokens.count);
  const unsigned live = read_live(c.mask, Place<kMaskTokens>(c.tokens, first, c.mask.line));
  const int all = warp_sum(__popc(live));
  if (lane == 0 && all) atomicAdd(&c.counted->tokens, all);
  c.sequences.parts(from, to, [&](int64_t s, int64_t begin, int64_t end) {
    const int low = static_cast<int>(between(begin - first, 0, kMaskTokens));
    const int high = static_cast<int>(between(end - first, 0, kMaskTokens));
    const int n = warp_sum(__popc(live & ((1u << high) - (1u << low))));
    if (lane == 0 && n && !atomicAdd(c.per_sequence + s, n)) atomicAdd(&c.counted->sequences, 1);
  });
}

// ---- statistics of sequences --------------------------------------------------------------------

constexpr int kResident = 2;  // blocks that a multiprocessor has registers for

// A block for each sequence, a thread for every kThreads-th of its tokens: no bit depends on what
// is packed or padded beside it.
template <class T, class Loss>
__global__ void __launch_bounds__(kThreads, kResident)
    find_statistics(const Call c, const Loss loss) {
  const int64_t s = blockIdx.x;
  const Run run = c.sequences[s];
  const int64_t begin = between(run.begin, 0, c.tokens.cols);
  const int64_t end = between(run.end, begin, c.tokens.cols);
  typename Loss::template OfSequence<Terms<T>> sequence(loss);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    if (!is_live(c.mask.view, run.row, i)) continue;
    sequence.add(read_one<T>(c.live.view, run.row, i),
                 c.constant.view.data ? read_one<T>(c.constant.view, run.row, i) : T(0),
                 c.target_per_sequence ? read_one<T>(c.target.view, 0, s)
                                       : read_one<T>(c.target.view, run.row, i));
  }
  double sums[Loss::kOfSequenceSums], totals[Loss::kOfSequenceSums];
  sequence.store(sums);
  block_sum<kThreads>(sums, totals);
  if (threadIdx.x == 0) c.statistics[s] = loss.statistic(totals, c.count_of(s));
}

// ---- the pass over the tokens -------------------------------------------------------------------

template <class Loss>
constexpr int kSummed = Loss::kSums + 1;  // and the weighted losses
template <class Loss>
constexpr int kTerms = kSummed<Loss> + Loss::kExtremes;

// What a token gets from its sequence.
template <class T>
class OfSequence {
 public:
  __device__ OfSequence(const Call& c, double weight) : c_(c), weight_(weight) {}
  __device__ void find(int64_t token) {
    if (token < end_) return;
    const int64_t s = c_.sequences.find(token);
    if (s >= c_.sequences.count) return;
    end_ = c_.sequences.start(s + 1);
    if (c_.target_per_sequence) target = read_one<T>(c_.target.view, 0, s);
    if (c_.statistics) statistic = static_cast<T>(c_.statistics[s]);
    if (c_.f.aggregation == kSeqMeanTokenMean) weight = share_of<T>(weight_, c_.count_of(s));
  }
  T target = T(0), statistic = T(0),
    weight = T(NAN);  // NaN: of no sequence, as the offsets are wrong

 private:
  const Call& c_;
  const double weight_;
  int64_t end_ = 0;
};

template <class T>
struct Inputs {
  Place<kTokens> place;
  unsigned live;
  T x[kTokens], constant[kTokens] = {}, target[kTokens] = {};

  __device__ Inputs(const Call& c, int64_t first)
      : place(c.tokens, first, c.lines), live(read_live(c.mask, place)) {
    read(c.live, place, live, x);
    if (c.constant.view.data) read(c.constant, place, live, constant);
    if (!c.target_per_sequence) read(c.target, place, live, target);
  }
};

template <class T, class Loss>
struct Pass {
  const Call& c;
  const double weight;
  typename Loss::template Kernel<Terms<T>> kernel;
  double weighted = 0.;

  __device__ Pass(const Call& c, const Loss& loss, double weight)
      : c(c), weight(weight), kernel(loss) {}

  __device__ void add(Inputs<T>& in) {
    const bool by_sequence = c.f.aggregation == kSeqMeanTokenMean;
    OfSequence<T> sequence(c, weight);
    T gradient[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const bool live = in.live >> k & 1;
      if (live && (Loss::kOfSequence || by_sequence || c.target_per_sequence)) {
        sequence.find(in.place.first + k);
        if (c.target_per_sequence) in.target[k] = sequence.target;
      }
      const T of_sequence = Loss::kOfSequence && live ? sequence.statistic : T(0);
      const auto token = kernel.add(in.x[k], in.constant[k], in.target[k], of_sequence, live);
      const T share = by_sequence ? sequence.weight : static_cast<T>(weight);
      if (by_sequence && live) weighted += token.loss * share;
      gradient[k] = live ? token.slope * share : T(0);
    }
    kernel.settle();
    if (c.f.gradient.data) write(c.f.gradient, in.place, gradient);
  }
};

template <class T, class Loss>
__global__ void __launch_bounds__(kThreads, kResident)
    pass_over_tokens(const Call c, const Loss loss) {
  PPOK_SHARED(double, weight, 1);
  if (threadIdx.x == 0) weight[0] = weight_of(c.divisor());
  __syncthreads();
  Pass<T, Loss> pass(c, loss, weight[0]);
  const int64_t begin = blockIdx.x * c.groups.tokens;
  const int64_t end = min(begin + c.groups.tokens, c.tokens.count);
  for (int64_t i = begin + threadIdx.x * kTokens; i < end; i += kBlock) {
    Inputs<T> even(c, i), odd(c, i + kStep);
    pass.add(even);
    pass.add(odd);
  }
  double terms[Loss::kSums + Loss::kExtremes], sums[kSummed<Loss>], totals[kSummed<Loss>];
  pass.kernel.store(terms);
  for (int k = 0; k < Loss::kSums; ++k) sums[k] = terms[k];
  sums[Loss::kSums] = pass.weighted;
  block_sum<kThreads>(sums, totals);
  double* partial = c.partials + blockIdx.x;
  for (int k = 0; k < kSummed<Loss>; ++k)
    if (threadIdx.x == 0) partial[k * c.groups.count] = totals[k];
  for (int k = 0; k < Loss::kExtremes; ++k) {
    const double largest = block_max<kThreads>(terms[Loss::kSums + k]);
    if (threadIdx.x == 0) partial[(kSummed<Loss> + k) * c.groups.count] = largest;
  }
}

// One block, a warp for each term.
template <class T, class Loss>
__global__ void __launch_bounds__(kWarp* kTerms<Loss>) merge_groups(const Call c) {
  PPOK_SHARED(double, totals, kTerms<Loss>);
  const int term = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const double* partial = c.partials + term * c.groups.count;
  if (term < kSummed<Loss>) {
    double sum = 0.;
    for (int64_t group = lane; group < c.groups.count; group += kWarp) sum += partial[group];
    sum = warp_sum(sum);
    if (lane == 0) totals[term] = sum;
  } else {
    double largest = -INFINITY;
    for (int64_t group = lane; group < c.groups.count; group += kWarp)
      largest = larger(largest, partial[group]);
    largest = warp_max(largest);
    if (lane == 0) totals[term] = largest;
  }
  __syncthreads();
  if (threadIdx.x) return;
  const LiveTotals live = c.totals();
  double stats[Loss::kSums + Loss::kExtremes];
  for (int k = 0; k < Loss::kSums; ++k) stats[k] = totals[k];
  for (int k = 0; k < Loss::kExtremes; ++k) stats[Loss::kSums + k] = totals[kSummed<Loss> + k];
  at<double>(c.f.stats, 0) = live.tokens;
  at<double>(c.f.stats, 1) = live.sequences;
  Loss::publish(stats, &at<double>(c.f.stats, 2));
  at<T>(c.f.loss, 0) = static_cast<T>(aggregate(c.f, c.divisor(), totals[0], totals[Loss::kSums]));
}

// Exact zeros, such as masked tokens have, stay: whatever they are multiplied by.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_tokens(const ScaleGradient a, const Tokens tokens, const Source gradient) {
  const int64_t first = blockIdx.x * static_cast<int64_t>(kStep) + threadIdx.x * kTokens;
  const Place<kTokens> place(tokens, first, true);
  const T by = read_one<T>(a.upstream, 0, 0);
  if (by == T(1) && a.scaled.data == a.gradient.data) return;
  T g[kTokens];
  read(gradient, place, (1u << place.size) - 1, g);
#pragma unroll
  for (int k = 0; k < kTokens; ++k) g[k] = g[k] == T(0) ? T(0) : g[k] * by;
  write(a.scaled, place, g);
}

// ---- launchers ----------------------------------------------------------------------------------

template <class T, class Loss>
const char* launch_loss(const Call& c, const Loss& loss, const Launch& to) {
  const char* error = nullptr;
  if (c.counted) error = launch(count_sequences, 1, kThreads, 0, to.stream, c, to.fault);
  if (!error && c.f.mask.data)
    error = launch(count_tokens, parts_of(c.tokens.count, kThreads * kMaskTokens), kThreads, 0,
                   to.stream, c);
  if constexpr (Loss::kOfSequence)
    if (!error && c.sequences.count)
      error = launch(find_statistics<T, Loss>, c.sequences.count, kThreads, 0, to.stream, c, loss);
  if (!error)
    error = launch(pass_over_tokens<T, Loss>, c.groups.count, kThreads, 0, to.stream, c, loss);
  using Sums = typename Loss::Sums;
  if (!error) error = launch(merge_groups<T, Sums>, 1, kWarp * kTerms<Sums>, 0, to.stream, c);
  return error;
}

template <class Args>
int64_t workspace_of(const Args& a) {
  Parts parts(nullptr);
  with_loss(a, [&](auto loss) {
    using Loss = decltype(loss);
    Call(inputs_of(a), a.frame, kTerms<Loss>, Loss::kOfSequence, parts);
    return nullptr;
  });
  return parts.taken();
}

template <class Args>
const char* launch_of(const Args& a, const Launch& to) {
  if (to.workspace_bytes < workspace_of(a)) return "the workspace is too small";
  return with_loss(a, [&](auto loss) {
    Parts parts(to.workspace);
    using Loss = decltype(loss);
    const Call c(inputs_of(a), a.frame, kTerms<Loss>, Loss::kOfSequence, parts);
    return a.frame.loss.dtype == kF64 ? launch_loss<double>(c, loss, to)
                                      : launch_loss<float>(c, loss, to);
  });
}

}  // namespace

int64_t clipped_loss_workspace(const ClippedLoss& a) { return workspace_of(a); }
const char* clipped_loss(const ClippedLoss& a, const Launch& to) { return launch_of(a, to); }

int64_t value_loss_workspace(const ValueLoss& a) { return workspace_of(a); }
const char* value_loss(const ValueLoss& a, const Launch& to) { return launch_of(a, to); }

int64_t importance_weights_workspace(const ImportanceWeights& a) { return workspace_of(a); }
const char* importance_weights(const ImportanceWeights& a, const Launch& to) {
  return launch_of(a, to);
}

int64_t scale_gradient_workspace(const ScaleGradient&) { return 0; }
const char* scale_gradient(const ScaleGradient& a, const Launch& to) {
  const Tokens tokens{a.count, a.count};
  const Source gradient(a.gradient, 1, a.count);
  const auto kernel = a.gradient.dtype == kF64 ? scale_tokens<double> : scale_tokens<float>;
  return launch(kernel, parts_of(a.count, kStep), kThreads, 0, to.stream, a, tokens, gradient);
}

}  // namespace PPOK_ISA
}  // namespace ppok
