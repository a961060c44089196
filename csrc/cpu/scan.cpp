// Advantages and discounted returns, and their adjoint: x_t = d_t + c_t x_{t+1}, in double.
//
// A sequence is cut into chunks of kChunk steps and these into blocks of one vector, all counted
// from the end the scan starts at. In a block the steps are combined by doubling distances; the
// chain from block to block is one multiply-add long. A chunk is scanned from zero, and completed
// by the value x carried into it times a power of c.
//
// Chunks count the steps that exist (under the "carry" convention: the live ones), so a sequence's
// bits depend on its own steps alone: not on its place in the batch, on padding, or on the thread
// count.
//
// The advantages scan from the last step to the first (kReverse), their adjoint from the first to
// the last.
#include "cpu/scan_stage.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

constexpr int64_t kAhead = 1024;  // tokens that are fetched before their turn comes

// ---- advantages and returns ---------------------------------------------------------------------

template <class T>
struct Forward {
  static constexpr bool kReverse = true, kVarying = false;
  const ScanForward& a;

  bool skips_masked() const { return masked_ends_add_nothing(a); }

  void load_unit(Slot<T>& s) const {
    const ScanSetting& g = a.setting;
    load_td_errors(a, s);
    set_coefficients<kReverse>(g, s, s.code);
    if (g.chains == 2) memcpy(s.x[1] + s.offset, s.x[0] + s.offset, s.n * sizeof(double));
  }

  void store_unit(Slot<T>& s) const {
    const ScanSetting& g = a.setting;
    const double *x = s.x[0] + s.offset, *target = s.x[g.chains - 1] + s.offset;
    const T* v = s.in_second;
    write(g, s, a.advantages, [&](int64_t i) { return x[i]; });
    write(g, s, a.returns, [&](int64_t i) { return target[i] + v[i]; });
  }
};

// ---- the adjoint --------------------------------------------------------------------------------

// D_t = dL/ddelta_t = g_t + c_{t-1} D_{t-1}; every gradient is one or two terms of D.
template <class T>
struct Backward {
  static constexpr bool kReverse = false, kVarying = false;
  const ScanBackward& a;

  bool skips_masked() const { return true; }

  void load_unit(Slot<T>& s) const {
    const ScanSetting& g = a.setting;
    load(g, s, a.grad_advantages, a.grad_returns, View{}, true);
    for (int64_t i = 0; i < s.n; ++i) s.x[0][i] = s.in_first[i];
    for (int64_t i = 0; i < s.n; ++i)
      s.x[g.chains - 1][i] = (g.chains == 1 ? s.x[0][i] : 0.) + s.in_second[i];
    uint8_t before[kChunk];
    for (int64_t i = 1; i < s.n; ++i) before[i] = s.code[i - 1];
    if (s.n) before[0] = s.unit.neighbour < 0 ? 0 : code_before(s.unit);
    set_coefficients<kReverse>(g, s, before);
  }

  void store_unit(Slot<T>& s) const {
    const ScanSetting& g = a.setting;
    const Unit& u = s.unit;
    double* d = s.x[0];
    double through[kChunk];  // gamma D_{t-1}, where step t - 1 looked at the value of step t
    if (g.chains == 2)
      for (int64_t i = 0; i < s.n; ++i) d[i] += s.x[1][i];
    double carry = u.carry[0];
    if (g.chains == 2) carry += u.carry[1];
    for (int64_t i = 1; i < s.n; ++i) through[i] = s.code[i - 1] & kCut ? 0. : g.gamma * d[i - 1];
    if (s.n) through[0] = u.neighbour < 0 || code_before(u) & kCut ? 0. : g.gamma * carry;
    for (int64_t piece = 0, begin = 0; piece < u.last - u.first; begin = s.ends[piece++]) {
      const int64_t end = s.ends[piece];
      if (begin < end) through[begin] = piece > 0 ? 0. : through[begin];
      if (!a.grad_bootstrap.data || u.continued) continue;
      const Run run = written(g, u, piece);
      const bool unused =
          g.truncate && run.begin < run.end && !is_live(g.mask, run.row, run.end - 1);
      double last = 0.;
      if (begin < end)
        last = s.code[end - 1] & kCut ? 0. : g.gamma * d[end - 1];
      else if (u.neighbour >= 0)
        last = code_before(u) & kCut ? 0. : g.gamma * carry;
      static_cast<T*>(a.grad_bootstrap.data)[u.first + piece] =
          unused ? T(0) : static_cast<T>(last);
    }

    write(g, s, a.grad_rewards, [&](int64_t i) { return d[i]; });
    write(g, s, a.grad_values,
          [&](int64_t i) { return value_gradient(s.in_second[i], d[i], through[i]); });
    write(g, s, a.grad_next_values,
          [&](int64_t i) { return (s.code[i] & kCut) == kTruncated ? g.gamma * d[i] : 0.; });
  }

 private:
  uint8_t code_before(const Unit& u) const {
    uint8_t code;
    read_codes(a.setting, u.run.row, u.neighbour, 1, &code);
    return code;
  }
};

// ---- one unit -----------------------------------------------------------------------------------

// Straight from the rewards and values to the advantages and returns, in one pass, where live steps
// follow each other and none ends an episode: the same operations on the same steps as through
// buffers, and so the same bits.
template <class T>
class Direct {
 public:
  explicit Direct(const Forward<T>& op)
      : a_(op.a), gamma_(a_.setting.gamma), c_(gamma_ * a_.setting.lam) {
    blocks_.set(c_);
  }

  static bool fits(const ScanForward& a) {
    const ScanSetting& g = a.setting;
    const auto as_is = [](const View& v) {
      return !v.data || (v.dtype == DTypeOf<T>::value && v.stride[1] == 1);
    };
    return !g.terminated.data && !g.truncated.data && !g.lams.data && g.chains == 1 &&
           g.gamma * g.lam > 0. && as_is(a.rewards) && as_is(a.values);
  }

  // Masked steps may surround the live ones if no time passes in them, else there must be none.
  bool fits(const Unit& u) {
    const ScanSetting& g = a_.setting;
    for (int64_t piece = 0; piece < u.last - u.first; ++piece) {
      const Run all = u.chunk ? u.run : written(g, u, piece);
      Run& live = live_[piece] = all;
      if (!narrow_to_live(g.mask, live)) return false;
      if (!g.carry && live.end - live.begin < all.end - all.begin) return false;
    }
    return true;
  }

  // Both for a unit that was found to fit just before.
  void summarize(Unit& u) {
    const int64_t n = live_[0].end - live_[0].begin;
    u.local[0] = steps<false, false>(live_[0], value_after(a_, u, 0), 0.);
    u.factor[0] = n ? powers_.of(c_)[kChunk - n] : 1.;
  }

  void finish(const Unit& u, double* carry) {
    for (int64_t piece = 0; piece < u.last - u.first; ++piece) {
      const Run live = live_[piece], all = written(a_.setting, u, piece);
      clear(Run{all.row, all.begin, live.begin});
      clear(Run{all.row, live.end, all.end});
      if (u.neighbour >= 0)
        *carry = steps<true, true>(live, value_after(a_, u, 0), *carry);
      else
        *carry = steps<true, false>(live, value_after(a_, u, piece), 0.);
    }
  }

 private:
  void clear(const Run& run) const {
    const View outputs[] = {a_.advantages, a_.returns};
    const int64_t position = run.row * a_.setting.cols + run.begin, n = run.end - run.begin;
    for (const View& out : outputs)
      if (out.data && n) memset(static_cast<T*>(out.data) + position, 0, n * sizeof(T));
  }

  // At most kChunk steps of one sequence; the first one's advantage.
  template <bool kWrite, bool kComplete>
  double steps(const Run& run, double after_last, double carried) {
    const int64_t n = run.end - run.begin, position = run.row * a_.setting.cols + run.begin;
    const auto from = [&](const View& v) {
      return v.data ? reinterpret_cast<const T*>(address(v, run.row, run.begin)) : zeros_;
    };
    const auto to = [&](const View& v) {
      return v.data ? static_cast<T*>(v.data) + position : nullptr;
    };
    const T *r = from(a_.rewards), *v = from(a_.values), after = static_cast<T>(after_last);
    T *advantages = to(a_.advantages), *returns = to(a_.returns);
    const double* power = kComplete ? powers_.of(c_) + kChunk - n : nullptr;
    const auto write = [&](int64_t i, double x) {
      if (kWrite && advantages) advantages[i] = static_cast<T>(x);
      if (kWrite && returns) returns[i] = static_cast<T>(x + v[i]);
    };

    double x = 0.;
    int64_t end = n;
    for (; end; --end) {  // see Blocks::scan
      const double next = end == n ? after : v[end];
      const double delta = td_error(r[end - 1], v[end - 1], next, gamma_);
      if (delta != 0.) break;
      x = kComplete ? mul_add(power[end - 1], carried, delta) : delta;
      write(end - 1, x);
    }
    const Blocks<true> blocks = blocks_;  // in registers, whatever is written
    const vdouble gamma = splat_double(gamma_), across = splat_double(blocks.across),
                  carried_in = splat_double(carried);
    vdouble carry{};
    for (int64_t left = end; left; left -= left < kSteps ? left : kSteps) {
      const int64_t count = left < kSteps ? left : kSteps, at = left - count;
      const bool inner = count == kSteps && left < n;
      __builtin_prefetch(r + at - kAhead);
      __builtin_prefetch(v + at - kAhead);
      T edge[3][kSteps] = {};  // of a block that is not whole, or has no step behind it
      const int64_t into = kSteps - count;
      if (!inner) {
        memcpy(edge[0] + into, r + at, count * sizeof(T));
        memcpy(edge[1] + into, v + at, count * sizeof(T));
        memcpy(edge[2] + into, v + at + 1, (count - (left == n)) * sizeof(T));
        if (left == n) edge[2][kSteps - 1] = after;
      }
      const vdouble reward = widen(inner ? r + at : edge[0]),
                    value = widen(inner ? v + at : edge[1]),
                    next = widen(inner ? v + at + 1 : edge[2]);
      const vdouble local = blocks.from_zero(multiply_add(gamma, next, reward - value));
      vdouble y = multiply_add(blocks.reach, carry, local);
      carry = multiply_add(across, carry, blocks.edge(local));
      if (count == kSteps) {
        if (kComplete) y = multiply_add(load_doubles(power + at), carried_in, y);
        if (kWrite && advantages) narrow(advantages + at, y);
        if (kWrite && returns) narrow(returns + at, y + value);
        x = y[0];
      } else {
        for (int64_t i = count; i--;) {
          x = kComplete ? mul_add(power[at + i], carried, y[into + i]) : y[into + i];
          write(at + i, x);
        }
      }
    }
    return x;
  }

  const ScanForward& a_;
  const double gamma_, c_;
  Powers<true> powers_;
  Blocks<true> blocks_;
  Run live_[kChunk];
  const T zeros_[kChunk + 1] = {};
};

// Each unit in the way that fits it.
template <class T>
class Either {
 public:
  static constexpr bool kReverse = true;
  explicit Either(const Forward<T>& op) : direct_(op), buffered_(op) {}

  void summarize(Unit& u) { direct_.fits(u) ? direct_.summarize(u) : buffered_.summarize(u); }
  void finish(const Unit& u, double* carry) {
    direct_.fits(u) ? direct_.finish(u, carry) : buffered_.finish(u, carry);
  }

 private:
  Direct<T> direct_;
  Buffered<T, Forward<T>> buffered_;
};

// ---- entries ------------------------------------------------------------------------------------

template <class T>
void forward(const ScanForward& a) {
  const Forward<T> op{a};
  if (Direct<T>::fits(a))
    drive<Either<T>>(op);
  else
    drive<Buffered<T, Forward<T>>>(op);
}

}  // namespace

Fault scan_forward(const ScanForward& a) {
  const Fault fault = bad_setting(a.setting);
  if (fault.kind != kNoFault) return fault;
  const View& out = a.advantages.data ? a.advantages : a.returns;
  out.dtype == kF64 ? forward<double>(a) : forward<float>(a);
  return fault;
}

Fault scan_backward(const ScanBackward& a) {
  const View& grad = a.grad_advantages.data ? a.grad_advantages : a.grad_returns;
  if (grad.dtype == kF64)
    drive<Buffered<double, Backward<double>>>(Backward<double>{a});
  else
    drive<Buffered<float, Backward<float>>>(Backward<float>{a});
  return {kNoFault, 0};
}

}  // namespace PPOK_ISA
}  // namespace ppok
