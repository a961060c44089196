// V-trace: the scan of the advantages with a coefficient for each step, which its probability ratio
// truncates, and advantages made of what the scan made of the next step.
//
// Chunks, blocks and what they promise are those of scan.cpp, all through buffers.
#include "cpu/scan_stage.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

template <class T>
struct alignas(64) Steps : Slot<T> {
  double ratio[2 * kChunk];  // first its logarithm
  double td_error[kChunk], product[kChunk];
};

template <class T>
struct Op {
  static constexpr bool kReverse = true, kVarying = true;
  const VTrace& v;
  const ScanForward& a;

  bool skips_masked() const { return masked_ends_add_nothing(a); }

  void load_unit(Steps<T>& s) const {
    const ScanSetting& g = a.setting;
    load_td_errors(a, s);
    load_ratios(s);
    s.offset = kChunk - s.n;
    s.cut = true;
    double *x = s.x[0] + s.offset, *coefficient = s.coefficient[0] + s.offset;
    memcpy(s.td_error, x, s.n * sizeof(double));
    const double rho_clip = v.rho_clip, c_clip = v.c_clip;  // in registers, whatever is written
    for (int64_t i = 0; i < s.n; ++i) x[i] *= truncated(s.ratio[i], rho_clip);
    for (int64_t piece = 0, begin = 0; piece < s.unit.last - s.unit.first;
         begin = s.ends[piece++]) {
      const double c = g.gamma * lambda_of(g, 0, s.unit.first + piece);
      for (int64_t i = begin; i < s.ends[piece]; ++i)
        coefficient[i] = c * truncated(s.ratio[i], c_clip);
    }
    for (int64_t i = 0; s.coded && i < s.n; ++i)
      coefficient[i] = s.code[i] & kCut ? 0. : coefficient[i];
  }

  const double* products(Steps<T>& s) const {
    products_to_end(s.coefficient[0] + s.offset, s.n, s.product + s.offset);
    return s.product;
  }

  void store_unit(Steps<T>& s) const {
    const ScanSetting& g = a.setting;
    const double *x = s.x[0] + s.offset, pg_rho_clip = v.pg_rho_clip, gamma = g.gamma;
    double beyond[kChunk];
    for (int64_t i = 0; i + 1 < s.n; ++i) beyond[i] = x[i + 1];
    for (int64_t piece = 0, begin = 0; piece < s.unit.last - s.unit.first; begin = s.ends[piece++])
      if (begin < s.ends[piece])
        beyond[s.ends[piece] - 1] = s.unit.neighbour < 0 ? 0. : s.unit.carry[0];
    for (int64_t i = 0; s.coded && i < s.n; ++i) beyond[i] = s.code[i] & kCut ? 0. : beyond[i];
    write(g, s, a.advantages, [&](int64_t i) {
      return vtrace_advantage(truncated(s.ratio[i], pg_rho_clip), s.td_error[i], beyond[i], gamma);
    });
    write(g, s, a.returns, [&](int64_t i) { return x[i] + s.in_second[i]; });
  }

 private:
  // Of the steps that the scan visits; 1 where masked.
  void load_ratios(Steps<T>& s) const {
    const ScanSetting& g = a.setting;
    double* end = s.ratio;
    for_runs(g, s.unit, s.unit.run, [&](const Run& run) {
      T buffers[2][kChunk];
      uint8_t live[kChunk];
      const int64_t n = run.end - run.begin;
      const T *p = read_tile(v.logprobs, run.row, run.begin, n, buffers[0]),
              *q = read_tile(v.rollout_logprobs, run.row, run.begin, n, buffers[1]);
      for (int64_t i = 0; i < n; ++i) end[i] = static_cast<double>(p[i]) - q[i];
      int64_t steps = n;
      if (g.mask.data) read_live_codes(g.mask, run.row, run.begin, n, live);
      if (g.mask.data && g.carry) {
        compress(end, live, n);
        steps = count_live(live, n);
      } else if (g.mask.data) {
        for (int64_t i = 0; i < n; ++i) end[i] = live[i] ? end[i] : 0.;
      }
      end += steps;
    });
    for (int i = 0; i < kSteps; ++i) end[i] = 0.;
    for (double* at = s.ratio; at < end; at += kSteps) store_doubles(at, vexp(load_doubles(at)));
  }
};

template <class T>
void run(const VTrace& v) {
  using Stage = Buffered<T, Op<T>, Steps<T>>;
  drive<Stage>(Op<T>{v, v.scan});
}

}  // namespace

Fault vtrace(const VTrace& v) {
  const Fault fault = bad_setting(v.scan.setting);
  if (fault.kind != kNoFault) return fault;
  v.scan.advantages.dtype == kF64 ? run<double>(v) : run<float>(v);
  return fault;
}

}  // namespace PPOK_ISA
}  // namespace ppok
