// What one position of logprobs_from_logits with kept sets asks for. Host and device.
#pragma once
#include "logprob_row.h"

namespace ppok {
namespace PPOK_ISA {

// A token that is not in its set counts as a logit of -inf, an empty set as a row of them.
template <class Args>
struct KeptRow : Row<Args> {
  const Args& a;
  int64_t begin, size;

  PPOK_HD KeptRow(const Args& args, int64_t position)
      : Row<Args>(args, position), a(args), begin(read_index(a.begins, 0, position)), size(0) {
    const int64_t end = read_index(a.ends, 0, position);
    if (begin < 0 || end < begin || end > a.count) {  // of masked positions too
      this->kind = kFaulty;
      this->fault = kBadKept;
    } else if (this->kind == kLive) {
      size = end - begin;
    }
  }
  PPOK_HD int64_t id(int64_t k) const { return read_index(a.ids, 0, begin + k); }
  PPOK_HD bool is_column(int64_t id) const { return id >= 0 && id < a.vocab; }
};

}  // namespace PPOK_ISA
}  // namespace ppok
