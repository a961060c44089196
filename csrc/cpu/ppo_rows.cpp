// From rows of logits to the gradient of a loss that depends on each token alone: a block of rows
// is summed and differentiated while it is in the cache, so that it is read from memory once.
//
// The work is that of logprob_forward and logprob_backward, and so are the bits.
#include <stdlib.h>

#include "cpu/logprob.h"
#include "cpu/logprob_parts.h"
#include "cpu/sums.h"
#include "ppo_row.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;  // of logits, for each thread
constexpr int64_t kRowsPerThread = 4;     // fewer, and some threads would have none

Fault first_fault(const PpoRows& a) {
  for (int64_t i = 0; i < a.rows * a.cols; ++i) {
    const Row<PpoRows> r(a, i);
    if (r.kind == kFaulty) return {r.fault, i};
  }
  return {kNoFault, 0};
}

// `count` positions of one row, from column `col` on.
PpoRows some_of(const PpoRows& a, int64_t row, int64_t col, int64_t count) {
  PpoRows part = a;
  part.rows = 1;
  part.cols = count;
  View* const by_position[] = {&part.logits,       &part.tokens,       &part.mask,
                               &part.temperatures, &part.old_logprobs, &part.advantages,
                               &part.weights,      &part.ref_logprobs, &part.logprobs,
                               &part.entropy,      &part.grad_logits};
  for (View* v : by_position)
    if (v->data) v->data = address(*v, row, col);
  return part;
}

// `scratch` has five numbers for each position.
template <class T>
void score_and_differentiate(const PpoRows& a, T* scratch, int64_t threads, bool stream) {
  const int64_t count = a.rows * a.cols;
  const auto positions = [&](T* data, int64_t each) {
    return View{data, DTypeOf<T>::value, {a.cols * each, each, 1}};
  };
  const View of_logprobs = positions(scratch, 1), of_entropy = positions(scratch + count, 1),
             state = positions(scratch + 2 * count, 3);
  logprob_forward({a.logits, a.tokens, a.mask, a.temperatures, a.rows, a.cols, a.vocab,
                   a.ignore_index, a.temperature, a.softcap, a.logit_scale, a.logprobs, a.entropy,
                   state, threads});
  for (int64_t i = 0; i < count; ++i) {
    const Row<PpoRows> r(a, i);
    const Upstream g =
        r.live() ? upstream_of<Terms<T>>(a, r, *at<T>(a.logprobs, i)) : Upstream{0., 0.};
    *at<T>(of_logprobs, i) = static_cast<T>(g.logprob);
    *at<T>(of_entropy, i) = static_cast<T>(g.entropy);
  }
  logprob_backward({of_logprobs, of_entropy, a.logits, a.tokens, a.mask, a.temperatures, a.logprobs,
                    state, a.rows, a.cols, a.vocab, a.ignore_index, a.temperature, a.softcap,
                    a.logit_scale, a.grad_logits, threads},
                   stream);
}

template <class T>
void by_blocks(const PpoRows& a) {
  const int64_t rows = a.rows * a.cols, bytes = a.vocab * element_size(a.logits.dtype);
  const bool stream = worth_streaming(a);
  T* scratch = static_cast<T*>(malloc(5 * rows * sizeof(T) + 1));
  if (a.threads > 1 && rows < kRowsPerThread * a.threads) {
    score_and_differentiate(a, scratch, a.threads, stream);
  } else {
    const int64_t most = bytes < kBlockBytes ? kBlockBytes / bytes : 1;
    const int64_t each = a.cols < most ? a.cols : most, per_row = (a.cols + each - 1) / each;
    const int threads = rows * a.vocab < kWorthThreads ? 1 : static_cast<int>(a.threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t block = 0; block < a.rows * per_row; ++block) {
      const int64_t row = block / per_row, col = block % per_row * each;
      const int64_t count = a.cols - col < each ? a.cols - col : each;
      score_and_differentiate(some_of(a, row, col, count), scratch + 5 * (row * a.cols + col), 1,
                              stream);
    }
  }
  free(scratch);
}

}  // namespace

// A fault is found before anything is written: the gradient may replace the logits.
Fault ppo_rows(const PpoRows& a) {
  const Fault fault = first_fault(a);
  if (fault.kind == kNoFault && a.rows * a.cols > 0)
    a.logits.dtype == kF64 ? by_blocks<double>(a) : by_blocks<float>(a);
  return fault;
}

}  // namespace PPOK_ISA
}  // namespace ppok
