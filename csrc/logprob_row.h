// What one position of logprobs_from_logits asks for. Host and device.
#pragma once
#include <math.h>

#include "view.h"

namespace ppok {
namespace PPOK_ISA {

enum RowKind { kLive, kSkipped, kFaulty };

template <class Args>
struct Row {
  int64_t position, row, col, token;
  double temperature;
  RowKind kind;
  int32_t fault;

  PPOK_HD Row(const Args& a, int64_t position)
      : position(position), row(position / a.cols), col(position % a.cols), token(0) {
    temperature = a.temperature;
    kind = kSkipped;
    fault = kNoFault;
    if (!is_live(a.mask, row, col)) return;
    token = read_index(a.tokens, row, col);
    if (token == a.ignore_index) return;
    kind = kFaulty;
    if (token < 0 || token >= a.vocab) {
      fault = kBadToken;
      return;
    }
    if (a.temperatures.data) temperature = read_one<double>(a.temperatures, row, col);
    if (!(temperature > 0.) || temperature == INFINITY) {
      fault = kBadTemperature;
      return;
    }
    kind = kLive;
  }
  PPOK_HD bool live() const { return kind == kLive; }
};

// z = c u with u = logits and c = logit_scale / temperature; or, with a softcap,
// u = softcap tanh(logit_scale logits / softcap) and c = 1 / temperature.
template <class Args>
PPOK_HD inline double scale_of(const Args& a, double temperature) {
  return (a.softcap > 0. ? 1. : a.logit_scale) / temperature;
}

}  // namespace PPOK_ISA
}  // namespace ppok
