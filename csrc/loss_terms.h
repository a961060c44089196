// What the tokens add to a loss and its metrics, in the order of ppo_kernels/metrics.py. Host and
// device.
//
// A kernel is written once over Terms: the lanes it works on, and what the terms of each lane are
// summed in (cpu/sums.h and cuda/sums.cuh).
#pragma once
#include <string.h>

#include "kernels.h"
#include "math/kl.h"
#include "math/losses.h"

namespace ppok {
namespace PPOK_ISA {

// What a kernel that merges sums needs of a loss.
struct PolicySums {
  static constexpr int kSums = 9, kExtremes = 2;
  PPOK_HD static void publish(const double* total, double* stats) {
    const double ratio = total[kSums - 2];  // no ratio is negative: NaN if any is
    memcpy(stats, total, kSums * sizeof(double));
    stats[kSums] = ratio == ratio ? total[kSums] : ratio;
    stats[kSums + 1] = ratio == ratio ? -total[kSums + 1] : ratio;
  }
};

template <class Variant, bool kClamp>
struct PolicyLoss : PolicySums {
  using Sums = PolicySums;
  static constexpr bool kOfSequence = Variant::kOfSequence;
  static constexpr int kOfSequenceSums = 2;
  PolicyNumbers<double> numbers;
  double clamp;

  template <class Args>
  PPOK_HD explicit PolicyLoss(const Args& a)
      : numbers{a.low, a.high, a.dual}, clamp(a.log_ratio_clamp) {}

  // The numbers as lanes, and the clamp.
  template <class Terms>
  struct Setting {
    using T = typename Terms::T;
    using V = typename Terms::V;
    const PolicyNumbers<V> numbers;
    const T clamp;
    PPOK_HD explicit Setting(const PolicyLoss& p)
        : numbers{Terms::splat(p.numbers.low), Terms::splat(p.numbers.high),
                  Terms::splat(p.numbers.dual)},
          clamp(static_cast<T>(p.clamp)) {}
    PPOK_HD_INLINE V clamped(V moved) const {
      return kClamp ? clamp_ratio<T>(moved, clamp) : moved;
    }
  };

  // The tokens of one sequence; the masked ones are zeros.
  template <class Terms>
  struct OfSequence {
    using V = typename Terms::V;
    const Setting<Terms> setting;
    typename Terms::Sum log_ratio, advantage;
    PPOK_HD explicit OfSequence(const PolicyLoss& p) : setting(p) {}
    PPOK_HD_INLINE void add(V logprob, V old, V a) {
      log_ratio.add(Variant::term(setting.clamped(logprob - old), a, setting.numbers));
      advantage.add(a);
    }
    PPOK_HD void store(double* out) const {
      out[0] = log_ratio.total();
      out[1] = advantage.total();
    }
  };
  PPOK_HD static double statistic(const double* total, int64_t live) {
    return Variant::statistic(total[0] / live, total[1] / live);
  }

  template <class Terms>
  struct Kernel {
    using T = typename Terms::T;
    using V = typename Terms::V;
    const Setting<Terms> setting;
    typename Terms::SumInGroups loss, unclipped, k1, k3;
    typename Terms::Sum ratio, square;
    typename Terms::Count high, low, dual;
    typename Terms::Maximum largest, negated_smallest;

    PPOK_HD explicit Kernel(const PolicyLoss& p) : setting(p) {}

    PPOK_HD_INLINE PolicyToken<V> add(V logprob, V old, V advantage, V of_sequence,
                                      typename Terms::Mask live) {
      const V zero{}, lowest = Terms::splat(-INFINITY);
      const V moved = logprob - old, x = setting.clamped(moved);
      const Exponential<V> exp = exponential<T>(x, Terms::exp_where);
      const V r = exp.exp, live_r = live ? r : zero;
      PolicyToken<V> token =
          Variant::of(PolicyInput<V>{logprob, x, r, exp.minus_one, advantage, of_sequence},
                      setting.numbers, Terms::exp_where);
      if (kClamp && Variant::kThroughRatio) {
        const T clamp = setting.clamp;
        token.slope = (moved > clamp) | (moved < -clamp) ? zero : token.slope;
      }
      loss.add(token.loss);
      unclipped.add(zero - advantage * r);
      high.add(token.above_high);
      low.add(token.below_low);
      dual.add(token.above_dual);
      k1.add(zero - x);
      k3.add(exp.minus_one_and_t);
      ratio.add(live_r);
      square.add_square(live_r);
      largest.add(live ? r : lowest);
      negated_smallest.add(live ? zero - r : lowest);
      return token;
    }

    PPOK_HD_INLINE void settle() {
      loss.settle();
      unclipped.settle();
      k1.settle();
      k3.settle();
    }

    PPOK_HD void store(double* out) const {
      const double all[] = {loss.total(),
                            unclipped.total(),
                            high.total(),
                            low.total(),
                            dual.total(),
                            k1.total(),
                            k3.total(),
                            ratio.total(),
                            square.total(),
                            largest.total(),
                            negated_smallest.total()};
      memcpy(out, all, sizeof all);
    }
  };
};

template <int kCount>
struct PlainSums {
  static constexpr int kSums = kCount, kExtremes = 0;
  PPOK_HD static void publish(const double* total, double* stats) {
    memcpy(stats, total, kSums * sizeof(double));
  }
};

struct SquaredError : PlainSums<7> {
  using Sums = PlainSums<7>;
  static constexpr bool kOfSequence = false;
  double clip, huber_delta;

  explicit SquaredError(const ValueLoss& a) : clip(a.clip), huber_delta(a.huber_delta) {}

  template <class Terms>
  struct Kernel {
    using V = typename Terms::V;
    const ClippedValue<V> token_loss;
    typename Terms::Sum loss, values, targets, errors, error_squares, target_squares;
    typename Terms::Count clipped;

    PPOK_HD explicit Kernel(const SquaredError& p)
        : token_loss{Terms::splat(p.clip), Terms::splat(p.huber_delta)} {}

    PPOK_HD_INLINE ValueToken<V> add(V value, V old, V target, V, typename Terms::Mask) {
      const ValueToken<V> token = token_loss(value, old, target);
      const V error = value - target;
      loss.add(token.loss);
      clipped.add(token.clipped);
      values.add(value);
      targets.add(target);
      errors.add(error);
      error_squares.add_square(error);
      target_squares.add_square(target);
      return token;
    }

    PPOK_HD_INLINE void settle() {}

    PPOK_HD void store(double* out) const {
      const double all[] = {loss.total(),          clipped.total(), values.total(),
                            targets.total(),       errors.total(),  error_squares.total(),
                            target_squares.total()};
      memcpy(out, all, sizeof all);
    }
  };
};

// Weights as if they were slopes of a loss, the ratio that of the token or, if kBySequence, of its
// sequence: the product or the geometric mean of those of its tokens.
template <class Weigh, bool kBySequence>
struct ImportanceRatio : PlainSums<5> {
  using Sums = PlainSums<5>;
  static constexpr bool kOfSequence = kBySequence;
  static constexpr int kOfSequenceSums = 1;
  double low, high;
  bool mean;

  explicit ImportanceRatio(const ImportanceWeights& a)
      : low(a.low), high(a.high), mean(a.kind == kTisGeometric || a.kind == kMaskGeometric) {}

  template <class Terms>
  struct OfSequence {
    using V = typename Terms::V;
    typename Terms::Sum log_ratio;
    PPOK_HD explicit OfSequence(const ImportanceRatio&) {}
    PPOK_HD_INLINE void add(V old, V, V rollout) { log_ratio.add_difference(old, rollout); }
    PPOK_HD void store(double* out) const { out[0] = log_ratio.total(); }
  };
  PPOK_HD double statistic(const double* total, int64_t live) const {
    return exp(mean ? total[0] / live : total[0]);
  }

  template <class Terms>
  struct Kernel {
    using T = typename Terms::T;
    using V = typename Terms::V;
    struct Token {
      V loss, slope;
    };
    const V low, high;
    typename Terms::Sum weight, square;
    typename Terms::SumInGroups k1, k3;
    typename Terms::Count limited;

    PPOK_HD explicit Kernel(const ImportanceRatio& c)
        : low(Terms::splat(c.low)), high(Terms::splat(c.high)) {}

    PPOK_HD_INLINE Token add(V old, V, V rollout, V of_sequence, typename Terms::Mask live) {
      const V zero{}, x = old - rollout;
      const Exponential<V> exp = exponential<T>(x, Terms::exp_where);
      const Weight<V> made = Weigh::of(kBySequence ? of_sequence : exp.exp, low, high);
      const V w = live ? made.weight : zero;
      weight.add(w);
      square.add_square(w);
      limited.add(live & made.limited);
      k1.add(zero - x);
      k3.add(exp.minus_one_and_t);
      return {w, w};
    }

    PPOK_HD_INLINE void settle() {
      k1.settle();
      k3.settle();
    }

    PPOK_HD void store(double* out) const {
      const double all[] = {weight.total(), square.total(), limited.total(), k1.total(),
                            k3.total()};
      memcpy(out, all, sizeof all);
    }
  };
};

// body(loss) for the loss that the arguments ask for. Of a policy's they name its variant, low,
// high, dual and log_ratio_clamp.
PPOK_EITHER
template <class Args, class Body>
PPOK_HD auto with_token_loss(const Args& a, Body&& body) {
  const bool bounded = a.dual < INFINITY || a.log_ratio_clamp < INFINITY;
  switch (a.variant) {
    case kCispo:
      return body(PolicyLoss<WeightedLogprob, true>(a));
    case kSapo:
      return body(PolicyLoss<SoftGate, true>(a));
    case kGpg:
      return body(PolicyLoss<PolicyGradient, true>(a));
    default:  // kClip
      if (bounded) return body(PolicyLoss<ClippedRatio<true>, true>(a));
      return body(PolicyLoss<ClippedRatio<false>, false>(a));
  }
}

template <class Body>
auto with_loss(const ClippedLoss& a, Body&& body) {
  switch (a.variant) {
    case kGspo:
      return body(PolicyLoss<ClippedSequenceRatio, true>(a));
    case kGmpo:
      return body(PolicyLoss<GeometricMean, true>(a));
    default:
      return with_token_loss(a, body);
  }
}

template <class Body>
auto with_loss(const ValueLoss& a, Body&& body) {
  return body(SquaredError(a));
}

template <class Body>
auto with_loss(const ImportanceWeights& a, Body&& body) {
  switch (a.kind) {
    case kIcepop:
      return body(ImportanceRatio<BandedWeight, false>(a));
    case kTisSequence:
    case kTisGeometric:
      return body(ImportanceRatio<ClampedWeight, true>(a));
    case kMaskSequence:
    case kMaskGeometric:
      return body(ImportanceRatio<KeptWeight, true>(a));
    default:  // kTis
      return body(ImportanceRatio<ClampedWeight, false>(a));
  }
}

// Three inputs per token; the second may be absent, the third come as one value per sequence.
struct LossInputs {
  View live, constant, target;
  bool target_per_sequence;
};

inline LossInputs inputs_of(const ClippedLoss& a) {
  return {a.logprobs, a.old_logprobs, a.advantages, a.advantage_per_sequence};
}
inline LossInputs inputs_of(const ValueLoss& a) {
  return {a.values, a.old_values, a.returns, false};
}
inline LossInputs inputs_of(const ImportanceWeights& a) {
  return {a.old_logprobs, View{}, a.rollout_logprobs, false};
}

}  // namespace PPOK_ISA
}  // namespace ppok
