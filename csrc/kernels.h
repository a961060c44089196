// The C++ face of every kernel: plain pointers, sizes and strides. No torch here or below: one
// binary serves every torch release, and the kernels can be built, run and sanitized without it.
//
// Each kernel takes one argument struct and returns a Fault: the first live position whose data is
// bad.
#pragma once
#include <stdint.h>

namespace ppok {

enum DType : int32_t { kF32, kBF16, kF16, kF64, kBool, kU8, kI8, kI16, kI32, kI64 };

// A tensor as the kernels see it; strides count elements, data == nullptr means "not given".
// Token tensors are [rows, cols] (packed ones have one row); logits are [rows, cols, vocab].
struct View {
  void* data;
  int32_t dtype;
  int64_t stride[3];
};

enum FaultKind : int32_t {
  kNoFault,
  kBadToken,
  kBadTemperature,
  kBadOffsets,
  kBadLambda,
  // Where the kernel cannot say which by looking again: on a GPU.
  kBadValueLambda,
  kBadCoefficient,
  kBadKept
};

struct Fault {
  int32_t kind;
  int64_t where;  // flat position, row * cols + col
};

struct LogprobForward {
  View logits, tokens, mask, temperatures;
  int64_t rows, cols, vocab, ignore_index;
  double temperature, softcap, logit_scale;  // softcap 0: none; temperatures replace temperature
  View logprobs, entropy;
  View state;  // [rows, cols, 3]: maximum, log of the sum, mean of z - max z
  int64_t threads;
};

struct LogprobBackward {
  View grad_logprobs, grad_entropy;  // either may be absent
  View logits, tokens, mask, temperatures, logprobs, state;
  int64_t rows, cols, vocab, ignore_index;
  double temperature, softcap, logit_scale;
  View grad_logits;  // may be logits itself
  int64_t threads;
};

// From rows of logits to their log-probabilities and to the gradient of a loss of each token:
//   slope of the policy's loss * weight + kl_coef * slope of the KL * weight,
//   and for the entropy -entropy_coef * weight; both times loss_scale.
struct PpoRows {
  View logits, tokens, mask, temperatures;
  View old_logprobs, advantages, weights;  // [rows, cols]
  View ref_logprobs, loss_scale;           // may be absent; loss_scale is one number
  int64_t rows, cols, vocab, ignore_index;
  double temperature, softcap, logit_scale;
  int64_t variant;  // of a token's own loss
  double low, high, dual, log_ratio_clamp;
  int64_t estimator;  // of the KL
  double kl_coef, entropy_coef;
  View logprobs, entropy;  // entropy may be absent
  View grad_logits;        // may be logits itself
  int64_t threads;
};

// The same over a set of columns per position: ids[begin] to ids[end - 1], of `count` ids in all.
struct KeptForward {
  View logits, tokens, mask, temperatures, begins, ends, ids;
  int64_t rows, cols, vocab, count, ignore_index;
  double temperature, softcap, logit_scale;
  View logprobs, entropy, state;
  View values;  // [count], the logits of the sets; may be absent
  int64_t threads;
};

struct KeptBackward {
  View grad_logprobs, grad_entropy;  // either may be absent
  View logits, values;               // one of them
  View tokens, mask, temperatures, begins, ends, ids, logprobs, state;
  int64_t rows, cols, vocab, count, ignore_index;
  double temperature, softcap, logit_scale;
  View grad_logits;  // contiguous
  int64_t threads;
};

// What every scan over sequences needs to know: padded rows, or packed ones under offsets
// [sequences + 1].
struct ScanSetting {
  View mask, terminated, truncated;
  View offsets, lams, value_lams;  // lams, when given, are per sequence and replace lam
  int64_t rows, cols, sequences;
  int64_t carry, truncate;  // the mask convention; neither: masked steps count as zeros
  double gamma, lam, value_lam;
  int64_t chains;  // 2: the value targets have a lambda of their own
};

struct ScanForward {
  View rewards, values, next_values, bootstrap;  // all but rewards may be absent: zeros
  ScanSetting setting;
  View advantages, returns;  // contiguous; either may be absent
  int64_t threads;
};

// The ratio of a step is that of the probabilities of its action; a threshold may be infinite but
// for c_clip.
struct VTrace {
  View logprobs, rollout_logprobs;
  double rho_clip, c_clip, pg_rho_clip;
  ScanForward scan;
};

struct ScanBackward {
  View grad_advantages, grad_returns;  // either may be absent
  ScanSetting setting;
  View grad_rewards, grad_values, grad_next_values,
      grad_bootstrap;  // contiguous; any may be absent
  int64_t threads;
};

// How per-token losses become one number; the weights are exact quotients by global counts.
enum Aggregation : int64_t {
  kTokenMean,
  kTokenSum,
  kSeqMeanTokenSum,
  kSeqMeanTokenMean,
  kSeqSumNorm
};
enum PolicyVariant : int64_t { kClip, kCispo, kSapo, kGpg, kGspo, kGmpo };

// What every loss shares. Sequences are the rows, or the parts of a packed tensor between
// cu_seqlens [sequences + 1]; 0 sequences: their boundaries are unknown.
struct LossFrame {
  View mask, cu_seqlens, denominator;  // denominator, one number, replaces divisor
  int64_t rows, cols, sequences, aggregation;
  double divisor, norm_length;  // divisor < 0: counted from the mask
  View loss, stats,
      gradient;  // stats as listed in ppo_kernels/metrics.py; gradient [tokens] may be absent
  int64_t threads;
};

struct ClippedLoss {
  View logprobs, old_logprobs, advantages;
  bool advantage_per_sequence;
  int64_t variant;
  double low, high, dual,
      log_ratio_clamp;  // as the variant uses them; the last two may be inf: off
  LossFrame frame;
};

struct ValueLoss {
  View values, old_values, returns;  // old_values may be absent when clip is inf
  double clip, huber_delta;          // inf: off
  LossFrame frame;
};

// Correction of the samples of another engine. frame.gradient takes the weights, frame.loss their
// sum.
enum Correction : int64_t {
  kTis,
  kTisSequence,
  kTisGeometric,
  kIcepop,
  kMaskSequence,
  kMaskGeometric
};

struct ImportanceWeights {
  View old_logprobs, rollout_logprobs;
  int64_t kind;
  double low, high;
  LossFrame frame;
};

struct ScaleGradient {
  View gradient, upstream;  // upstream is one number
  int64_t count;
  View scaled;
  int64_t threads;
};

// x and mask are [outer, reduced, inner]; all: the sum is over [outer, reduced], and inner is 1.
struct MaskedReduce {
  View x, mask;
  int64_t outer, reduced, inner;
  bool all, mean;
  View out, count;  // contiguous; count is double
  int64_t threads;
};

struct MomentsForward {
  View x, mask;
  int64_t rows, cols;
  View moments;  // three doubles: count, mean, sum of squared deviations
  int64_t threads;
};

struct WhitenForward {
  View x, mask, moments;
  bool find_moments;  // moments are of x and mask, and an output too
  int64_t rows, cols;
  bool shift_mean, unbiased;
  double eps;
  View out;
  int64_t threads;
};

struct WhitenBackward {
  View grad, x, mask, moments;
  int64_t rows, cols;
  bool shift_mean, unbiased;
  double eps;
  View grad_x;
  int64_t threads;
};

struct KlForward {
  View logprobs, ref_logprobs, mask;
  int64_t rows, cols, estimator;
  double log_ratio_clamp;  // infinity: none
  View kl;
  int64_t threads;
};

struct KlBackward {
  View grad_kl, logprobs, ref_logprobs, mask;
  int64_t rows, cols, estimator;
  double log_ratio_clamp;
  View grad_logprobs;
  int64_t threads;
};

// KL(first || second) of [rows, cols, vocab] logits.
struct CategoricalKlForward {
  View first, second, mask;
  int64_t rows, cols, vocab;
  double temperature;
  View kl;
  View state;  // [rows, cols, 4]: maximum and log of the sum, of first and of second
  int64_t threads;
};

struct CategoricalKlBackward {
  View grad_kl, first, second, mask, kl, state;
  int64_t rows, cols, vocab;
  bool of_second;  // the gradient is for second
  double temperature;
  View grad;
  int64_t threads;
};

struct ShapeRewards {
  View scores, logprobs, ref_logprobs, mask,
      cu_seqlens;  // cu_seqlens absent: each row is a sequence
  View kl_coefs;   // one number, replaces kl_coef
  int64_t rows, cols, sequences, estimator;
  double kl_coef, log_ratio_clamp;
  View rewards, kl, last;  // last [sequences], int64: flat position of the last live token, or -1
  int64_t threads;
};

// The list every table, declaration and binding is generated from.
#define PPOK_KERNELS(X)                             \
  X(logprob_forward, LogprobForward)                \
  X(logprob_backward, LogprobBackward)              \
  X(ppo_rows, PpoRows)                              \
  X(kept_forward, KeptForward)                      \
  X(kept_backward, KeptBackward)                    \
  X(scan_forward, ScanForward)                      \
  X(scan_backward, ScanBackward)                    \
  X(vtrace, VTrace)                                 \
  X(clipped_loss, ClippedLoss)                      \
  X(value_loss, ValueLoss)                          \
  X(importance_weights, ImportanceWeights)          \
  X(scale_gradient, ScaleGradient)                  \
  X(masked_reduce, MaskedReduce)                    \
  X(moments, MomentsForward)                        \
  X(whiten, WhitenForward)                          \
  X(whiten_backward, WhitenBackward)                \
  X(kl_forward, KlForward)                          \
  X(kl_backward, KlBackward)                        \
  X(categorical_kl_forward, CategoricalKlForward)   \
  X(categorical_kl_backward, CategoricalKlBackward) \
  X(shape_rewards, ShapeRewards)

struct KernelTable {
  const char* isa;
#define PPOK_FIELD(name, Args) Fault (*name)(const Args&);
  PPOK_KERNELS(PPOK_FIELD)
#undef PPOK_FIELD
};

extern const KernelTable table_generic, table_avx2, table_avx512;

}  // namespace ppok
