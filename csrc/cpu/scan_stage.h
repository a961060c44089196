// One unit of a scan through buffers, whatever its op makes of the steps.
#pragma once
#include "cpu/scan_buffers.h"
#include "kernels.h"

namespace ppok {
namespace PPOK_ISA {
namespace {  // of each op's file alone: what one file calls once is inlined

// ---- rewards and values -------------------------------------------------------------------------

// The masked steps that the scan meets first are exact zeros.
bool masked_ends_add_nothing(const ScanForward& a) {
  return a.setting.carry || a.setting.truncate || !a.bootstrap.data;
}

// The value of the step after the last one of this piece.
double value_after(const ScanForward& a, const Unit& u, int64_t piece) {
  const ScanSetting& g = a.setting;
  const Run run = written(g, u, piece);
  if (u.neighbour >= 0) {
    const bool none = !a.values.data || !is_live(g.mask, run.row, u.neighbour);
    return none ? 0. : read_one<double>(a.values, run.row, u.neighbour);
  }
  if (!a.bootstrap.data || run.begin == run.end) return 0.;
  if (g.truncate && !is_live(g.mask, run.row, run.end - 1)) return 0.;
  return read_one<double>(a.bootstrap, 0, u.first + piece);
}

// The TD errors, at the end of x[0].
template <class T>
PPOK_INLINE void load_td_errors(const ScanForward& a, Slot<T>& s) {
  const ScanSetting& g = a.setting;
  const int64_t pieces = s.unit.last - s.unit.first;
  const bool coded = g.mask.data || g.terminated.data || g.truncated.data || g.gamma == 0.;
  load(g, s, a.rewards, a.values, a.next_values, coded);
  double* delta = s.x[0] + kChunk - s.n;
  const T *r = s.in_first, *v = s.in_second;
  T after[kChunk];  // the value of what follows each step
  for (int64_t i = 0; i + 1 < s.n; ++i) after[i] = v[i + 1];
  for (int64_t piece = 0, begin = 0; piece < pieces; begin = s.ends[piece++]) {
    const int64_t end = s.ends[piece];
    if (begin < end) after[end - 1] = static_cast<T>(value_after(a, s.unit, piece));
  }
  if (a.next_values.data)
    for (int64_t i = 0; i < s.n; ++i) after[i] = s.code[i] & kTruncated ? s.third[i] : after[i];
  if (coded)
    for (int64_t i = 0; i < s.n; ++i) after[i] = s.code[i] & kTerminated ? T(0) : after[i];
  for (int64_t i = 0; i < s.n; ++i) delta[i] = td_error(r[i], v[i], after[i], g.gamma);
}

// ---- the stage ----------------------------------------------------------------------------------

// Through buffers: whatever the mask, the flags, the strides and dtypes. An op is kVarying if each
// of its steps has a coefficient of its own.
template <class T, class Op, class Steps = Slot<T>>
class Buffered {
 public:
  static constexpr bool kReverse = Op::kReverse;
  explicit Buffered(const Op& op) : op_(op), g_(op.a.setting) {}

  // What a chunk hands on: its last step, and the power of c by which a carry reaches that (0: it
  // does not).
  void summarize(Unit& u) {
    scan(u);
    for (int chain = 0; chain < g_.chains; ++chain) {
      const int64_t last = last_step();
      bool cut = false;
      if (s_.cut)
        for (int64_t i = s_.offset; i < s_.offset + s_.n; ++i)
          cut |= s_.coefficient[chain][i] == 0.;
      u.local[chain] = s_.n ? s_.x[chain][last] : 0.;
      u.factor[chain] = !s_.n ? 1. : cut ? 0. : reach(chain)[last];
    }
  }

  // Writes a unit, given what its neighbour carries into it; leaves what it carries on.
  void finish(const Unit& u, double* carry) {
    scan(u);
    for (int chain = 0; chain < g_.chains; ++chain) {
      s_.unit.carry[chain] = carry[chain];
      if (u.neighbour >= 0) complete(chain);
      if (s_.n) carry[chain] = s_.x[chain][last_step()];
    }
    op_.store_unit(s_);
  }

 private:
  double c(int chain, int64_t sequence) const { return g_.gamma * lambda_of(g_, chain, sequence); }
  int64_t last_step() const { return kReverse ? s_.offset : s_.n - 1; }

  // Of the one sequence in this unit: by what a carry is multiplied on its way to each step.
  const double* reach(int chain) {
    if constexpr (Op::kVarying)
      return op_.products(s_);
    else
      return powers_[chain].of(c(chain, s_.unit.first));
  }

  void scan(const Unit& u) {
    s_.unit = u;
    op_.load_unit(s_);
    for (int chain = 0; chain < g_.chains; ++chain)
      for (int64_t piece = 0, begin = 0; piece < u.last - u.first; begin = s_.ends[piece++]) {
        blocks_[chain].set(c(chain, u.first + piece));
        double* x = s_.x[chain] + s_.offset + begin;
        const double* coefficient = s_.coefficient[chain] + s_.offset + begin;
        if (s_.cut)
          blocks_[chain].template scan<true>(x, coefficient, s_.ends[piece] - begin);
        else
          blocks_[chain].template scan<false>(x, coefficient, s_.ends[piece] - begin);
      }
  }

  // Adds what the neighbouring chunk carries into this one, up to the first cut.
  void complete(int chain) {
    int64_t begin = s_.offset, end = s_.offset + s_.n;
    const double carry = s_.unit.carry[chain];
    const double* coefficient = s_.coefficient[chain];
    for (int64_t i = end; s_.cut && i > begin; --i)
      if (coefficient[i - 1] == 0.) (kReverse ? begin : end) = kReverse ? i : i - 1;
    if (begin >= end) return;
    const double* power = reach(chain);
    double* x = s_.x[chain];
    for (int64_t i = begin; i < end; ++i) x[i] = mul_add(power[i], carry, x[i]);
  }

  const Op& op_;
  const ScanSetting& g_;
  Steps s_;
  Powers<kReverse> powers_[kChains];
  Blocks<kReverse> blocks_[kChains];
};

// ---- entries ------------------------------------------------------------------------------------

bool in_unit_interval(const View& lams, int64_t n) {
  for (int64_t i = 0; lams.data && i < n; ++i) {
    const double lam = read_one<double>(lams, 0, i);
    if (!(lam >= 0. && lam <= 1.)) return false;
  }
  return true;
}

Fault bad_setting(const ScanSetting& g) {
  if (!sequences_of(g).valid()) return {kBadOffsets, 0};
  if (!in_unit_interval(g.lams, g.sequences) || !in_unit_interval(g.value_lams, g.sequences))
    return {kBadLambda, 0};
  return {kNoFault, 0};
}

}  // namespace
}  // namespace PPOK_ISA
}  // namespace ppok
