// What the CUDA kernels offer: one launcher per kernel, with the arguments of csrc/kernels.h.
//
// A launcher checks nothing that its caller can, works on the current device and the caller's
// stream, allocates nothing and waits for nothing. It returns nullptr, or what went wrong.
#pragma once
#include "kernels.h"

namespace ppok {

// Instead of a thread count. A fault that only the data can tell is kept in `fault` (see
// ppo_kernels/_faults.py).
struct Launch {
  void* stream;
  int64_t* fault;
  void* workspace;  // aligned to 16 bytes, and as large as the kernel's `_workspace` says
  int64_t workspace_bytes;
  int64_t processors;  // multiprocessors of the device
};

namespace PPOK_ISA {

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

// Whether ppo_rows can hold such a row on the current device.
bool ppo_rows_fit(int64_t vocab, int32_t dtype);

// Kernels of csrc/kernels.h that there are for CUDA, and its own.
#define PPOK_CUDA_KERNELS(X)                        \
  X(logprob_forward, LogprobForward)                \
  X(logprob_backward, LogprobBackward)              \
  X(kept_forward, KeptForward)                      \
  X(kept_backward, KeptBackward)                    \
  X(scan_forward, ScanForward)                      \
  X(scan_backward, ScanBackward)                    \
  X(vtrace, VTrace)                                 \
  X(clipped_loss, ClippedLoss)                      \
  X(value_loss, ValueLoss)                          \
  X(scale_gradient, ScaleGradient)                  \
  X(masked_reduce, MaskedReduce)                    \
  X(moments, MomentsForward)                        \
  X(whiten, WhitenForward)                          \
  X(whiten_backward, WhitenBackward)                \
  X(kl_forward, KlForward)                          \
  X(kl_backward, KlBackward)                        \
  X(categorical_kl_forward, CategoricalKlForward)   \
  X(categorical_kl_backward, CategoricalKlBackward) \
  X(shape_rewards, ShapeRewards)                    \
  X(ppo_rows, PpoRows)

#define PPOK_LAUNCHER(name, Args)                    \
  const char* name(const Args& args, const Launch&); \
  int64_t name##_workspace(const Args& args);  // bytes
PPOK_CUDA_KERNELS(PPOK_LAUNCHER)
#undef PPOK_LAUNCHER

}  // namespace PPOK_ISA
}  // namespace ppok
