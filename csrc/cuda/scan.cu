// Advantages and discounted returns, their adjoint, and V-trace: x_t = d_t + c_t x_{t+1}, in
// double, in one launch (see scan_tile.cuh).
//
// Double: a step costs about ten operations, which even at 1/64 of the rate of fp32 take no longer
// than its 17 bytes.
#include "cuda/scan_tile.cuh"

namespace ppok {
namespace PPOK_ISA {
namespace {

// ---- advantages and returns ---------------------------------------------------------------------

template <int kChains_>
struct Forward {
  static constexpr bool kReverse = true, kVarying = false;
  static constexpr int kChains = kChains_;
  using Args = ScanForward;
  const ScanForward& a;
  const Steps& steps;

  // What a step adds in each chain; its code.
  __device__ unsigned load(const Place& p, double (&delta)[kChains]) const {
    const Token t = steps.token(p.step, p.sequence);
    const unsigned code = steps.code(t);
    const double d = td_error_of(p, t, code);
    for (int chain = 0; chain < kChains; ++chain)
      delta[chain] = isnan(steps.coefficient(chain, p.sequence)) ? NAN : d;
    return code & kCut ? code | kCutHere : code;
  }

  __device__ double td_error_of(const Place& p, const Token& t, unsigned code) const {
    const ScanSetting& g = a.setting;
    const double reward = code ? read(a.rewards, t) : 0., value = code ? value_of(t) : 0.;
    double next = 0.;
    if (code & kTerminated)
      next = 0.;
    else if (code & kTruncated && a.next_values.data)
      next = read(a.next_values, t);
    else if (!p.first())
      next = following(steps.token(p.step + 1, p.sequence));
    else if (a.bootstrap.data && !steps.lost(p.sequence) && (code || !g.truncate))
      next = read_one<double>(a.bootstrap, 0, p.sequence);
    return steps.lost(p.sequence) ? NAN : td_error(reward, value, next, g.gamma);
  }

  __device__ void report_lambdas(const Place& p, int64_t* fault) const {
    if (!p.first() || steps.lost(p.sequence)) return;
    for (int chain = kChains - 1; chain >= 0; --chain)
      if (isnan(steps.coefficient(chain, p.sequence)))
        report_fault(fault, p.sequence, chain ? kBadValueLambda : kBadLambda);
  }

  __device__ void store(const Place& p, unsigned code, const double (&x)[kChains],
                        const double (&)[kChains]) const {
    const int64_t at = steps.flat(p.step);
    const Token t = steps.token(p.step, p.sequence);
    const bool live = code & kLive;
    write(a.advantages, at, live ? x[0] : 0.);
    write(a.returns, at, live ? x[kChains - 1] + value_of(t) : 0.);
  }

  __device__ static void clear(const ScanForward& a, int64_t token) {
    write(a.advantages, token, 0.);
    write(a.returns, token, 0.);
  }

  __device__ double value_of(const Token& t) const {
    return a.values.data ? read(a.values, t) : 0.;
  }

 private:
  __device__ double following(const Token& t) const { return steps.live(t) ? value_of(t) : 0.; }
};

// ---- the adjoint --------------------------------------------------------------------------------

// D_t = dL/ddelta_t = g_t + c_{t-1} D_{t-1}; every gradient is one or two terms of D.
template <int kChains_>
struct Backward {
  static constexpr bool kReverse = false, kVarying = false;
  static constexpr int kChains = kChains_;
  using Args = ScanBackward;
  const ScanBackward& a;
  const Steps& steps;

  __device__ unsigned load(const Place& p, double (&delta)[kChains]) const {
    const Token t = steps.token(p.step, p.sequence);
    const unsigned code = steps.code(t);
    const double missing = steps.lost(p.sequence) ? NAN : 0.;
    for (int chain = 0; chain < kChains; ++chain) delta[chain] = missing;
    if (code && a.grad_advantages.data) delta[0] += read(a.grad_advantages, t);
    if (code) delta[kChains - 1] += to_returns(t);
    return is_looked_at(p) ? code : code | kCutHere;
  }

  __device__ void report_lambdas(const Place&, int64_t*) const {}  // forward has

  __device__ void store(const Place& p, unsigned code, const double (&x)[kChains],
                        const double (&x_before)[kChains]) const {
    const int64_t at = steps.flat(p.step);
    const Token t = steps.token(p.step, p.sequence);
    const double gamma = a.setting.gamma, d = sum(x);
    const bool live = code & kLive;
    write(a.grad_rewards, at, live ? d : 0.);
    if (a.grad_values.data) {
      const double discounted = code & kCutHere ? 0. : gamma * sum(x_before);
      write(a.grad_values, at, live ? value_gradient(to_returns(t), d, discounted) : 0.);
    }
    write(a.grad_next_values, at, (code & kCut) == kTruncated ? gamma * d : 0.);
    const bool used = (live || !a.setting.truncate) && !(code & kCut) && gamma > 0.;
    if (p.last() && !steps.lost(p.sequence))
      write(a.grad_bootstrap, p.sequence, used ? gamma * d : 0.);
  }

  __device__ static void clear(const ScanBackward& a, int64_t token) {
    write(a.grad_rewards, token, 0.);
    write(a.grad_values, token, 0.);
    write(a.grad_next_values, token, 0.);
  }

 private:
  __device__ static double sum(const double (&x)[kChains]) {
    return kChains == 1 ? x[0] : x[0] + x[kChains - 1];
  }
  // The step before is one of the sequence and looked at this one.
  __device__ bool is_looked_at(const Place& p) const {
    if (p.first() || a.setting.gamma == 0.) return false;
    return !(steps.code(steps.token(p.step - 1, p.sequence)) & kCut);
  }
  __device__ double to_returns(const Token& t) const {
    return a.grad_returns.data ? read(a.grad_returns, t) : 0.;
  }
};

// ---- V-trace ------------------------------------------------------------------------------------

// What the scan does not keep of a step is read once more to make its advantage.
struct VTraceOp {
  static constexpr bool kReverse = true, kVarying = true;
  static constexpr int kChains = 1;
  using Args = VTrace;
  const VTrace& a;
  const Steps& steps;

  __device__ unsigned load(const Place& p, double (&numbers)[2]) const {
    const Token t = steps.token(p.step, p.sequence);
    const unsigned code = steps.code(t);
    const double ratio = ratio_of(t, code);
    numbers[0] = truncated(ratio, a.rho_clip) * td_error_of(p, t, code);
    numbers[1] = steps.coefficient(0, p.sequence) * truncated(ratio, a.c_clip);
    return code & kCut ? code | kCutHere : code;
  }

  __device__ void report_lambdas(const Place& p, int64_t* fault) const {
    scan().report_lambdas(p, fault);
  }

  __device__ void store(const Place& p, unsigned code, const double (&x)[1],
                        const double (&x_after)[1]) const {
    const int64_t at = steps.flat(p.step);
    const Token t = steps.token(p.step, p.sequence);
    const bool live = code & kLive;
    const double rho = truncated(ratio_of(t, code), a.pg_rho_clip),
                 beyond = code & kCut ? 0. : x_after[0];
    write(a.scan.advantages, at,
          live ? vtrace_advantage(rho, td_error_of(p, t, code), beyond, a.scan.setting.gamma) : 0.);
    write(a.scan.returns, at, live ? x[0] + scan().value_of(t) : 0.);
  }

  __device__ static void clear(const VTrace& a, int64_t token) { Forward<1>::clear(a.scan, token); }

 private:
  __device__ Forward<1> scan() const { return {a.scan, steps}; }
  __device__ double td_error_of(const Place& p, const Token& t, unsigned code) const {
    const bool bad = isnan(steps.coefficient(0, p.sequence));
    return bad ? NAN : scan().td_error_of(p, t, code);
  }
  __device__ double ratio_of(const Token& t, unsigned code) const {
    return code ? exp(read(a.logprobs, t) - read(a.rollout_logprobs, t)) : 1.;
  }
};

}  // namespace

int64_t scan_forward_workspace(const ScanForward& a) { return workspace_bytes(a); }

const char* scan_forward(const ScanForward& a, const Launch& to) {
  return a.setting.chains == 2 ? run<Forward<2>>(a, to) : run<Forward<1>>(a, to);
}

int64_t scan_backward_workspace(const ScanBackward& a) { return workspace_bytes(a); }

const char* scan_backward(const ScanBackward& a, const Launch& to) {
  const View& ends = a.grad_bootstrap;  // sequences without a step have a gradient too
  if (ends.data)
    if (const char* error =
            clear(ends.data, a.setting.sequences * element_size(ends.dtype), to.stream))
      return error;
  return a.setting.chains == 2 ? run<Backward<2>>(a, to) : run<Backward<1>>(a, to);
}

int64_t vtrace_workspace(const VTrace& a) { return workspace_bytes(a); }

const char* vtrace(const VTrace& a, const Launch& to) { return run<VTraceOp>(a, to); }

}  // namespace PPOK_ISA
}  // namespace ppok
