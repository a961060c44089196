// Masked sums, means and whitening on the CPU.
//
// Every sum is made in double over blocks of a fixed size; within a block lane i of a vector sums
// every lanes-th element from i on. Blocks follow the flat order of the tokens, not the rows, so
// strides do not change a bit.
#include "math/moments.h"

#include "cpu/reduce.h"
#include "kernels.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

// ---- sums ------------------------------------------------------------------------------------

constexpr int kDoubles = kLanes / 2;

PPOK_INLINE vdouble select_doubles(const uint8_t* live, vdouble x) {
  return load_bytes_wide(live) != 0 ? x : vdouble{};
}

// The sum over live elements of f(i), the vector of doubles that starts at element i. Two sums in
// flight hide the latency of the addition.
template <class F>
PPOK_INLINE double sum_live(const LiveTile& live, int64_t n, F&& f) {
  vdouble even{}, odd{};
  for (int64_t i = 0; i < n; i += kLanes) {
    even += select_doubles(live.data + i, f(i));
    odd += select_doubles(live.data + i + kDoubles, f(i + kDoubles));
  }
  return sum_lanes(even + odd);
}

PPOK_INLINE double count_live(const LiveTile& live, int64_t n) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += live.data[i] != 0;
  return count;
}

template <class T>
Tally block_sum(const View& x, const View& mask, int64_t cols, int64_t from, int64_t n) {
  const Tile<T> tile(x, cols, from, n);
  const LiveTile live(mask, cols, from, n);
  const double sum = sum_live(
      live, n, [&](int64_t i) __attribute__((always_inline)) { return widen(tile.at(i)); });
  return {count_live(live, n), sum};
}

PPOK_INLINE View moved(View v, int64_t elements) {
  if (v.data) v.data = static_cast<char*>(v.data) + elements * element_size(v.dtype);
  return v;
}

template <class T>
void finish(const MaskedReduce& a, int64_t i, const Tally& s) {
  static_cast<T*>(a.out.data)[i] = static_cast<T>(result_of(s, a.mean));
  static_cast<double*>(a.count.data)[i] = s.count;
}

// One output per (outer, inner), each the sum of one run.
template <class T>
void reduce_runs(const MaskedReduce& a, int64_t outputs) {
  const bool share_outputs = a.threads > 1 && outputs >= 2 * a.threads;
  const auto run = [&](int64_t i, int64_t threads) {
    const int64_t outer = i / a.inner, inner = i % a.inner;
    const View x = moved(a.x, outer * a.x.stride[0] + inner * a.x.stride[2]);
    const View mask = moved(a.mask, outer * a.mask.stride[0] + inner * a.mask.stride[2]);
    finish<T>(a, i, reduce_blocks(a.reduced, threads, Tally{0., 0.}, [&](int64_t from, int64_t n) {
                return block_sum<T>(x, mask, a.reduced, from, n);
              }));
  };
#pragma omp parallel for num_threads(static_cast<int>(a.threads)) \
    schedule(static) if (share_outputs && outputs * a.reduced >= kParallelTokens)
  for (int64_t i = 0; i < outputs; ++i) run(i, share_outputs ? 1 : a.threads);
}

// Many neighbouring outputs: whole runs of them are added up, in the order of the reduced
// dimension.
constexpr int64_t kColumns = 256;

template <class T>
void reduce_columns(const MaskedReduce& a) {
  const int64_t tiles = (a.inner + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(static_cast<int>(a.threads)) \
    schedule(static) if (a.threads > 1 && a.outer * a.inner * a.reduced >= kParallelTokens)
  for (int64_t task = 0; task < a.outer * tiles; ++task) {
    alignas(64) T buffer[kColumns];
    alignas(64) uint8_t live_buffer[kColumns];
    double sums[kColumns] = {};
    int64_t counts[kColumns] = {};
    const int64_t outer = task / tiles, from = task % tiles * kColumns;
    const int64_t n = a.inner - from < kColumns ? a.inner - from : kColumns;
    const auto run_of = [&](const View& v, int64_t k) {
      return moved(v, outer * v.stride[0] + k * v.stride[1] + from * v.stride[2]).data;
    };
    memset(live_buffer, 1, sizeof live_buffer);
    for (int64_t k = 0; k < a.reduced; ++k) {
      const T* x = read_run(run_of(a.x, k), a.x.dtype, a.x.stride[2], n, buffer);
      const uint8_t* live = live_buffer;
      if (a.mask.data)
        live = read_live_run(run_of(a.mask, k), a.mask.dtype, a.mask.stride[2], n, live_buffer);
      for (int64_t i = 0; i < n; ++i) sums[i] += live[i] ? static_cast<double>(x[i]) : 0.;
      for (int64_t i = 0; i < n; ++i) counts[i] += live[i] != 0;
    }
    for (int64_t i = 0; i < n; ++i)
      finish<T>(a, outer * a.inner + from + i, {static_cast<double>(counts[i]), sums[i]});
  }
}

// Which of the two ways is taken depends on the logical shape alone.
template <class T>
void reduce(const MaskedReduce& a) {
  if (a.all) {  // [outer, reduced] is one run, across its rows
    finish<T>(
        a, 0,
        reduce_blocks(a.outer * a.reduced, a.threads, Tally{0., 0.}, [&](int64_t from, int64_t n) {
          return block_sum<T>(a.x, a.mask, a.reduced, from, n);
        }));
  } else if (a.inner < 16) {
    reduce_runs<T>(a, a.outer * a.inner);
  } else {
    reduce_columns<T>(a);
  }
}

// ---- moments ---------------------------------------------------------------------------------

// Two passes over a block in the first-level cache. The first sums distances to an element of the
// block: a mean far from zero costs no accuracy, and equal elements have exactly that mean and no
// deviation.
template <class T>
Moments block_moments(const View& x, const View& mask, int64_t cols, int64_t from, int64_t n) {
  const Tile<T> tile(x, cols, from, n);
  const LiveTile live(mask, cols, from, n);
  const double count = count_live(live, n);
  if (count == 0.) return {0., 0., 0.};
  int64_t first = 0;
  while (!live.data[first]) ++first;

  const double pivot = tile.data[first];
  const double gaps = sum_live(
      live, n, [&](int64_t i) __attribute__((always_inline)) { return widen(tile.at(i)) - pivot; });
  const double mean = pivot + gaps / count;
  const double m2 = sum_live(live, n, [&](int64_t i) __attribute__((always_inline)) {
    const vdouble gap = widen(tile.data + i) - mean;
    return gap * gap;
  });
  return {count, mean, m2};
}

template <class T>
Moments all_moments(const MomentsForward& a) {
  return reduce_blocks(
      a.rows * a.cols, a.threads, Moments{0., 0., 0.},
      [&](int64_t from, int64_t n) { return block_moments<T>(a.x, a.mask, a.cols, from, n); });
}

// ---- whitening -------------------------------------------------------------------------------

template <class T>
void whiten_all(const WhitenForward& a) {
  const WhitenElement<T> element(
      whitening(*static_cast<const Moments*>(a.moments.data), a.shift_mean, a.unbiased, a.eps));
  for_blocks(a.rows * a.cols, a.threads, [&](int64_t from, int64_t n) {
    const Tile<T> x(a.x, a.cols, from, n);
    const LiveTile live(a.mask, a.cols, from, n);
    OutTile<T> out(a.out, from, n);
    for (int64_t i = 0; i < n; i += Lanes<T>::kWidth) out.set(i, live.select<T>(i, element(x[i])));
    out.write();
  });
}

struct Upstream {
  double sum, moment;  // of g, and of g (x - mean)
};

Upstream merge(const Upstream& a, const Upstream& b) {
  return {a.sum + b.sum, a.moment + b.moment};
}

template <class T>
void whiten_gradient(const WhitenBackward& a) {
  const Moments& moments = *static_cast<const Moments*>(a.moments.data);
  const Whitening w = whitening(moments, a.shift_mean, a.unbiased, a.eps);
  const int64_t tokens = a.rows * a.cols;

  const Upstream g =
      reduce_blocks(tokens, a.threads, Upstream{0., 0.}, [&](int64_t from, int64_t n) -> Upstream {
        const Tile<T> grad(a.grad, a.cols, from, n), x(a.x, a.cols, from, n);
        const LiveTile live(a.mask, a.cols, from, n);
        const double sum = sum_live(live, n, [&](int64_t i) __attribute__((always_inline)) {
          return widen(grad.data + i);
        });
        const double moment = sum_live(live, n, [&](int64_t i) __attribute__((always_inline)) {
          return widen(grad.data + i) * (widen(x.data + i) - w.mean);
        });
        return {sum, moment};
      });

  const WhitenElementGradient<T> element(
      w.mean, whitening_gradient(moments, w, a.shift_mean, a.unbiased, g.sum, g.moment));
  for_blocks(tokens, a.threads, [&](int64_t from, int64_t n) {
    const Tile<T> grad(a.grad, a.cols, from, n), x(a.x, a.cols, from, n);
    const LiveTile live(a.mask, a.cols, from, n);
    OutTile<T> out(a.grad_x, from, n);
    for (int64_t i = 0; i < n; i += Lanes<T>::kWidth)
      out.set(i, live.select<T>(i, element(grad[i], x[i])));
    out.write();
  });
}

}  // namespace

Fault moments(const MomentsForward& a) {
  *static_cast<Moments*>(a.moments.data) =
      a.x.dtype == kF64 ? all_moments<double>(a) : all_moments<float>(a);
  return {kNoFault, 0};
}

Fault whiten(const WhitenForward& a) {
  if (a.find_moments) moments({a.x, a.mask, a.rows, a.cols, a.moments, a.threads});
  a.x.dtype == kF64 ? whiten_all<double>(a) : whiten_all<float>(a);
  return {kNoFault, 0};
}

Fault whiten_backward(const WhitenBackward& a) {
  a.x.dtype == kF64 ? whiten_gradient<double>(a) : whiten_gradient<float>(a);
  return {kNoFault, 0};
}

Fault masked_reduce(const MaskedReduce& a) {
  a.x.dtype == kF64 ? reduce<double>(a) : reduce<float>(a);
  return {kNoFault, 0};
}

}  // namespace PPOK_ISA
}  // namespace ppok
