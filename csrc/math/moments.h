// Sums; count, mean and sum of squared deviations: how parts merge, and what whitening makes of
// them. Host and device.
#pragma once
#include <math.h>

#include "math/host_device.h"

namespace ppok {
namespace PPOK_ISA {

// The layout of the moments tensor. The empty state is {0, 0, 0}.
struct Moments {
  double count, mean, m2;
};

// Chan, Golub & LeVeque (1979). Equal means give exactly that mean, and add nothing to m2.
PPOK_HD inline Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0.) return b;
  if (b.count == 0.) return a;
  const double count = a.count + b.count, share = b.count / count, gap = b.mean - a.mean;
  return {count, a.mean + gap * share, a.m2 + b.m2 + gap * gap * a.count * share};
}

struct Tally {
  double count, sum;
};

PPOK_HD inline Tally merge(const Tally& a, const Tally& b) {
  return {a.count + b.count, a.sum + b.sum};
}

// The sum, or the mean; of nothing 0.
PPOK_HD inline double result_of(const Tally& s, bool mean) {
  return mean && s.count > 0. ? s.sum / s.count : s.sum;
}

// y = (x - mean) scale + shift
struct Whitening {
  double mean, scale, shift;
};

PPOK_HD inline double freedom(const Moments& m, bool unbiased) {
  return m.count - (unbiased ? 1. : 0.);
}

PPOK_HD inline Whitening whitening(const Moments& m, bool shift_mean, bool unbiased, double eps) {
  const double n = freedom(m, unbiased), variance = n > 0. ? m.m2 / n : 0.;
  return {m.mean, 1. / sqrt(variance + eps), shift_mean ? 0. : m.mean};
}

// dL/dx_i = scale (g_i - mean) + shift + slope (x_i - mean of x), from the sums of g_i and of
// g_i (x_i - mean of x).
struct WhiteningGradient {
  double scale, mean, shift, slope;
};

PPOK_HD inline WhiteningGradient whitening_gradient(const Moments& m, const Whitening& w,
                                                    bool shift_mean, bool unbiased, double sum,
                                                    double moment) {
  const double n = freedom(m, unbiased), mean = m.count > 0. ? sum / m.count : 0.;
  return {w.scale, mean, shift_mean ? 0. : mean,
          n > 0. ? -w.scale * w.scale * w.scale * moment / n : 0.};
}

// ---- one element --------------------------------------------------------------------------------

// x - mean with the mean in two parts of T: where x is near the mean, the first difference is
// exact.
template <class T>
struct Center {
  T high, low;
  PPOK_HD explicit Center(double mean)
      : high(static_cast<T>(mean)), low(static_cast<T>(mean - high)) {}
  template <class V>
  PPOK_HD_INLINE V operator()(V x) const {
    return (x - high) - low;
  }
};

template <class T>
struct WhitenElement {
  Center<T> center;
  T scale, shift;
  PPOK_HD explicit WhitenElement(const Whitening& w)
      : center(w.mean), scale(static_cast<T>(w.scale)), shift(static_cast<T>(w.shift)) {}
  template <class V>
  PPOK_HD_INLINE V operator()(V x) const {
    return center(x) * scale + shift;
  }
};

template <class T>
struct WhitenElementGradient {
  Center<T> center, center_grad;
  T scale, shift, slope;
  PPOK_HD WhitenElementGradient(double mean, const WhiteningGradient& d)
      : center(mean),
        center_grad(d.mean),
        scale(static_cast<T>(d.scale)),
        shift(static_cast<T>(d.shift)),
        slope(static_cast<T>(d.slope)) {}
  template <class V>
  PPOK_HD_INLINE V operator()(V grad, V x) const {
    return center_grad(grad) * scale + shift + center(x) * slope;
  }
};

}  // namespace PPOK_ISA
}  // namespace ppok
