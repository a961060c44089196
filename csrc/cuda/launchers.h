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

// Whether ppo_rows can hold such a row on the current device.
bool ppo_rows_fit(int64_t vocab, int32_t dtype);

#define PPOK_LAUNCHER(name, Args)                    \
  const char* name(const Args& args, const Launch&); \
  int64_t name##_workspace(const Args& args);  // bytes
PPOK_KERNELS(PPOK_LAUNCHER)
#undef PPOK_LAUNCHER

}  // namespace PPOK_ISA
}  // namespace ppok
