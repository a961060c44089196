// The kernels of logprob.cpp, for kernels that run them on some rows at a time.
#pragma once
#include "cpu/rows.h"
#include "kernels.h"

namespace ppok {
namespace PPOK_ISA {

// Whether a gradient of logits is so large that it should go past the cache.
template <class Args>
bool worth_streaming(const Args& a) {
  const int64_t size = a.rows * a.cols * a.vocab * element_size(a.grad_logits.dtype);
  return a.grad_logits.data != a.logits.data && size >= kStreamBytes;
}

Fault logprob_forward(const LogprobForward& a);
void logprob_backward(const LogprobBackward& a, bool stream);

}  // namespace PPOK_ISA
}  // namespace ppok
