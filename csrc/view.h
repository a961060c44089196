// Elements of a View. Host and device; where they are converted is each one's own (`read_one`).
#pragma once
#include "kernels.h"
#include "math/host_device.h"

namespace ppok {
namespace PPOK_ISA {

PPOK_HD inline int64_t element_size(int32_t dtype) {
  switch (dtype) {
    case kF64:
    case kI64:
      return 8;
    case kF32:
    case kI32:
      return 4;
    case kBF16:
    case kF16:
    case kI16:
      return 2;
    default:
      return 1;
  }
}

PPOK_HD inline char* address(const View& v, int64_t row, int64_t col) {
  return static_cast<char*>(v.data) +
         (row * v.stride[0] + col * v.stride[1]) * element_size(v.dtype);
}

PPOK_HD inline char* column(const View& logits, int64_t row, int64_t col, int64_t v) {
  return address(logits, row, col) + v * logits.stride[2] * element_size(logits.dtype);
}

// One element of any dtype as T.
template <class T>
PPOK_HD T read_one(const View& v, int64_t row, int64_t col);

PPOK_HD inline int64_t read_index(const View& v, int64_t row, int64_t col) {
  const void* p = address(v, row, col);
  return v.dtype == kI64 ? *static_cast<const int64_t*>(p) : *static_cast<const int32_t*>(p);
}

// Any nonzero counts as live, whatever the mask's dtype; an absent mask is live everywhere.
PPOK_HD inline bool is_live(const View& mask, int64_t row, int64_t col) {
  if (!mask.data) return true;
  const void* p = address(mask, row, col);
  if (mask.dtype == kI64) return *static_cast<const int64_t*>(p) != 0;
  return element_size(mask.dtype) == 1 ? *static_cast<const uint8_t*>(p) != 0
                                       : read_one<double>(mask, row, col) != 0.;
}

}  // namespace PPOK_ISA
}  // namespace ppok
