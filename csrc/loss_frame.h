// From the losses of tokens to one number: the weights. Host and device.
#pragma once
#include "sequences.h"

namespace ppok {
namespace PPOK_ISA {

PPOK_HD inline Sequences sequences_of(const LossFrame& f) {
  const bool tokens = f.cols || f.cu_seqlens.data;  // rows without columns are no sequences
  return {f.cu_seqlens, f.rows, f.cols, tokens ? f.sequences : 0};
}

struct LiveTotals {
  int64_t tokens, sequences;  // sequences with at least one live token
};

// What the loss is divided by.
PPOK_HD inline double divisor(const LossFrame& f, const LiveTotals& live) {
  double d = f.divisor;
  if (f.denominator.data)
    d = read_one<double>(f.denominator, 0, 0);
  else if (d < 0.)
    d = f.aggregation == kTokenMean ? live.tokens : f.aggregation == kTokenSum ? 1 : live.sequences;
  return f.aggregation == kSeqSumNorm ? d * f.norm_length : d;
}

// The weight of a token; of kSeqMeanTokenMean that of a sequence, which its live tokens share.
PPOK_HD inline double weight_of(double divisor) { return divisor == 0. ? 0. : 1. / divisor; }

template <class T>
PPOK_HD inline T share_of(double weight, int64_t live_tokens) {
  return static_cast<T>(live_tokens ? weight / live_tokens : 0.);
}

// From the sum of the token losses, or of kSeqMeanTokenMean of the weighted ones.
PPOK_HD inline double aggregate(const LossFrame& f, double divisor, double sum, double weighted) {
  if (divisor == 0.) return 0.;
  return f.aggregation == kSeqMeanTokenMean ? weighted : sum * weight_of(divisor);
}

}  // namespace PPOK_ISA
}  // namespace ppok
