// What the CUDA kernels offer: one launcher per kernel of csrc/kernels.h, with the same arguments.
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

// Kernels of csrc/kernels.h that there are for CUDA.
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
  X(shape_rewards, ShapeRewards)

#define PPOK_LAUNCHER(name, Args)                    \
  const char* name(const Args& args, const Launch&); \
  int64_t name##_workspace(const Args& args);  // bytes
PPOK_CUDA_KERNELS(PPOK_LAUNCHER)
#undef PPOK_LAUNCHER

}  // namespace PPOK_ISA
}  // namespace ppok
