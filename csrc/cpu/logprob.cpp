// Log-probability of one token per row of logits, with entropy, and its gradient.
//
// A row is cut at column 0, kChunk, 2 kChunk, ...; each chunk is summed against its own maximum
// while it sits in the first-level cache, and the chunks are merged in order, in double. Cuts and
// order depend on the vocabulary alone, so a row's bits do not depend on the batch, the thread
// count, or on whether chunks or whole rows are shared out.
#include "math/logprob.h"

#include <stdlib.h>

#include "cpu/tile.h"
#include "kernels.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

constexpr int64_t kChunk = 4096;
constexpr int64_t kTile = 1024;  // backward is elementwise: three tiles fit the cache
constexpr int64_t kWorthThreads =
    1 << 16;  // elements below which waking the other threads costs more

// ---- one chunk --------------------------------------------------------------------------------

constexpr int kWays = 4;  // independent chains of vectors, to hide the latency of each
constexpr int kStep = kWays * kLanes;
constexpr double kLog2E = 1.44269504088896340736;

// The maximum of n values that `next(j)` gives as vectors, from column j on; NaN is passed over.
template <class Next>
PPOK_INLINE float highest(int64_t n, Next next) {
  vfloat top[kWays];
  for (vfloat& t : top) t = splat(-INFINITY);
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep)
    for (int k = 0; k < kWays; ++k) top[k] = max_or_second(next(j + k * kLanes), top[k]);
  for (; j + kLanes <= n; j += kLanes) top[0] = max_or_second(next(j), top[0]);
  return max_lanes(max_or_second(max_or_second(top[0], top[1]), max_or_second(top[2], top[3])));
}

// One chunk as floats, and its maximum. Half-precision columns are widened on the way.
struct FloatChunk {
  const float* u;
  float max;
  const char* next;  // where the columns after it lie: fetched while this chunk is summed
  int bytes;         // of one column there
};

inline FloatChunk chunk_maximum(const float* u, int64_t n) {
  const int64_t full = n / kLanes * kLanes;
  float m = highest(full, [&](int64_t j) __attribute__((always_inline)) { return load(u + j); });
  for (int64_t j = full; j < n; ++j) m = u[j] > m ? u[j] : m;
  return {u, m, reinterpret_cast<const char*>(u + n), sizeof(float)};
}

template <bool kBf16>
inline FloatChunk widened_chunk(const uint16_t* half, int64_t n, float* buffer) {
  const int64_t full = n / kLanes * kLanes;
  float m = highest(full, [&](int64_t j) __attribute__((always_inline)) {
    const vfloat x = kBf16 ? load_bf16(half + j) : load_f16(half + j);
    store(buffer + j, x);
    return x;
  });
  for (int64_t j = full; j < n; ++j) {
    buffer[j] = half_bits_to_float(half[j], kBf16);
    m = buffer[j] > m ? buffer[j] : m;
  }
  return {buffer, m, reinterpret_cast<const char*>(half + n), sizeof(uint16_t)};
}

// The sums of one chunk against its own maximum; entropy needs more of them, nobody else pays.
template <bool kEntropy>
PPOK_INLINE RowSums chunk_sums(FloatChunk chunk, int64_t n, double c) {
  // All -inf: summed against 0 it gives 0, and a NaN hidden among them still shows.
  const vfloat reference = splat(chunk.max == -INFINITY ? 0.f : chunk.max);
  const float gain = static_cast<float>(c * kLog2E);
  vfloat sum[kWays] = {}, slope[kWays] = {}, equal[kWays] = {};
  const auto add = [&](vfloat x, int k) __attribute__((always_inline)) {
    const vfloat y = (x - reference) * gain;
    const vfloat e = vexp2_nonpositive(y);
    if (kEntropy) {
      equal[k] += select(x == reference, splat(1.f), vfloat{});
      sum[k] += select(x == reference, vfloat{}, e);
      slope[k] += select(e == vfloat{}, vfloat{}, e * y);
    } else {
      sum[k] += e;
    }
  };
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    for (int line = 0; line < kStep * chunk.bytes; line += 64)
      __builtin_prefetch(chunk.next + j * chunk.bytes + line);
    for (int k = 0; k < kWays; ++k) add(load(chunk.u + j + k * kLanes), k);
  }
  for (; j + kLanes <= n; j += kLanes) add(load(chunk.u + j), 0);
  if (j < n) {
    float padded[kLanes];
    for (int i = 0; i < kLanes; ++i) padded[i] = j + i < n ? chunk.u[j + i] : -INFINITY;
    add(load(padded), 0);
  }
  const auto total = [](const vfloat* x) { return sum_lanes((x[0] + x[1]) + (x[2] + x[3])); };
  if (chunk.max == -INFINITY) return {chunk.max, 0., total(sum), 0.};
  return {chunk.max, kEntropy ? total(equal) : 0., total(sum),
          kEntropy ? total(slope) / kLog2E : 0.};
}

template <bool kEntropy>
PPOK_INLINE RowSums chunk_sums(const float* u, int64_t n, double c) {
  return chunk_sums<kEntropy>(chunk_maximum(u, n), n, c);
}

template <bool kEntropy>
inline RowSums chunk_sums(const double* u, int64_t n, double c) {
  double m = -INFINITY;
  for (int64_t j = 0; j < n; ++j) m = u[j] > m ? u[j] : m;
  const double reference = m == -INFINITY ? 0. : m;
  RowSums sums{m, 0., 0., 0.};
  for (int64_t j = 0; j < n; ++j) {
    const double z = (u[j] - reference) * c, e = exp(z);
    if (u[j] == m && m != -INFINITY) {
      sums.at_max += 1.;
    } else {
      sums.rest += e;
      if (e != 0.) sums.slope += e * z;
    }
  }
  return sums;
}

// ---- logits to u: the transforms before the temperature ---------------------------------------

// z = c u with u = logits and c = logit_scale / temperature; or, with a softcap,
// u = softcap tanh(logit_scale logits / softcap) and c = 1 / temperature.
template <class Args>
struct Transform {
  const Args& a;
  double scale(double temperature) const {
    return (a.softcap > 0. ? 1. : a.logit_scale) / temperature;
  }
  PPOK_INLINE void cap(float* u, int64_t n) const {
    const float inner = static_cast<float>(a.logit_scale / a.softcap),
                outer = static_cast<float>(a.softcap);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(u + j, outer * vtanh(load(u + j) * inner));
    if (j < n) {
      float tail[kLanes] = {};
      memcpy(tail, u + j, (n - j) * sizeof(float));
      store(tail, outer * vtanh(load(tail) * inner));
      memcpy(u + j, tail, (n - j) * sizeof(float));
    }
  }
  void cap(double* u, int64_t n) const {
    for (int64_t j = 0; j < n; ++j) u[j] = a.softcap * tanh(a.logit_scale * u[j] / a.softcap);
  }
  // Multiplies the gradient by du / dlogits, from the raw logits.
  PPOK_INLINE void uncap(float* grad, const float* raw, int64_t n) const {
    const float inner = static_cast<float>(a.logit_scale / a.softcap),
                gain = static_cast<float>(a.logit_scale);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
      store(grad + j, load(grad + j) * (gain * vsech2(load(raw + j) * inner)));
    for (; j < n; ++j) grad[j] *= gain * vsech2(splat(raw[j] * inner))[0];
  }
  void uncap(double* grad, const double* raw, int64_t n) const {
    for (int64_t j = 0; j < n; ++j)
      grad[j] *= a.logit_scale * sech2(a.logit_scale * raw[j] / a.softcap);
  }
};

// ---- one row ----------------------------------------------------------------------------------

enum RowKind { kLive, kSkipped, kFaulty };

template <class Args>
struct Row {
  int64_t row, col, token;
  double temperature;
  RowKind kind;
  int32_t fault;

  Row(const Args& a, int64_t position) : row(position / a.cols), col(position % a.cols), token(0) {
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
};

PPOK_INLINE const char* column(const View& logits, int64_t row, int64_t col, int64_t v) {
  return address(logits, row, col) + v * logits.stride[2] * element_size(logits.dtype);
}

// The chunk of u that starts at column `from`, with the target column (if inside) replaced by -inf.
template <class T, class Args>
inline const T* others_chunk(const Args& a, const Row<Args>& r, int64_t from, int64_t n,
                             T* buffer) {
  const T* u =
      read_run(column(a.logits, r.row, r.col, from), a.logits.dtype, a.logits.stride[2], n, buffer);
  const bool holds_target = r.token >= from && r.token < from + n;
  if ((a.softcap > 0. || holds_target) && u != buffer) {
    memcpy(buffer, u, n * sizeof(T));
    u = buffer;
  }
  if (a.softcap > 0.) Transform<Args>{a}.cap(buffer, n);
  if (holds_target) buffer[r.token - from] = static_cast<T>(-INFINITY);
  return u;
}

template <class T, class Args>
inline T target_logit(const Args& a, const Row<Args>& r) {
  T u;
  read_strided(column(a.logits, r.row, r.col, r.token), a.logits.dtype, 1, 1, &u);
  if (a.softcap > 0.) Transform<Args>{a}.cap(&u, 1);
  return u;
}

template <class T>
PPOK_INLINE T* at(const View& contiguous, int64_t i) {
  return static_cast<T*>(contiguous.data) + i;
}

void keep_first(Fault& first, int32_t kind, int64_t where) {
#pragma omp critical(ppok_fault)
  if (first.kind == kNoFault || where < first.where) first = {kind, where};
}

// ---- forward ----------------------------------------------------------------------------------

template <class T, bool kEntropy>
Fault forward(const LogprobForward& a) {
  const int64_t rows = a.rows * a.cols, chunks = (a.vocab + kChunk - 1) / kChunk;
  const int threads = rows * a.vocab < kWorthThreads ? 1 : static_cast<int>(a.threads);
  Fault first{kNoFault, 0};

  const auto sums_of = [&](const Row<LogprobForward>& r, int64_t chunk, double c) {
    alignas(64) T buffer[kChunk];
    const int64_t from = chunk * kChunk, n = a.vocab - from < kChunk ? a.vocab - from : kChunk;
    const bool half = a.logits.dtype == kBF16 || a.logits.dtype == kF16;
    const bool holds_target = r.token >= from && r.token < from + n;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (half && a.logits.stride[2] == 1 && a.softcap == 0. && !holds_target) {
        const auto* p = reinterpret_cast<const uint16_t*>(column(a.logits, r.row, r.col, from));
        return chunk_sums<kEntropy>(a.logits.dtype == kBF16 ? widened_chunk<true>(p, n, buffer)
                                                            : widened_chunk<false>(p, n, buffer),
                                    n, c);
      }
    }
    return chunk_sums<kEntropy>(others_chunk(a, r, from, n, buffer), n, c);
  };
  const auto write = [&](int64_t i, const RowResult& result) {
    *at<T>(a.logprobs, i) = static_cast<T>(result.logprob);
    if (kEntropy) *at<T>(a.entropy, i) = static_cast<T>(result.entropy);
    T* state = at<T>(a.state, 3 * i);
    state[0] = static_cast<T>(result.max);
    state[1] = static_cast<T>(result.log_sum);
    state[2] = static_cast<T>(result.mean);
  };
  const auto finish_row = [&](int64_t i, const Row<LogprobForward>& r, auto&& chunk_state) {
    if (r.kind != kLive) {
      const double fill = r.kind == kFaulty ? NAN : 0.;
      write(i, {fill, fill, fill, fill, fill});
      if (r.kind == kFaulty) keep_first(first, r.fault, i);
      return;
    }
    const double c = Transform<LogprobForward>{a}.scale(r.temperature);
    RowSums others = empty_row();
    for (int64_t k = 0; k < chunks; ++k) others = merge(others, chunk_state(k, c), c);
    write(i, finish(others, target_logit<T>(a, r), c));
  };

  RowSums* shared = nullptr;  // few long rows: their chunks are shared out instead
  if (threads > 1 && rows < 2 * threads && chunks > 1)
    shared = static_cast<RowSums*>(malloc(rows * chunks * sizeof(RowSums)));
  if (shared) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < rows * chunks; ++task) {
      const Row<LogprobForward> r(a, task / chunks);
      if (r.kind == kLive)
        shared[task] = sums_of(r, task % chunks, Transform<LogprobForward>{a}.scale(r.temperature));
    }
    for (int64_t i = 0; i < rows; ++i)
      finish_row(i, Row<LogprobForward>(a, i),
                 [&](int64_t k, double) { return shared[i * chunks + k]; });
    free(shared);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < rows; ++i) {
      const Row<LogprobForward> r(a, i);
      finish_row(i, r, [&](int64_t k, double c) { return sums_of(r, k, c); });
    }
  }
  return first;
}

// ---- backward ---------------------------------------------------------------------------------

struct Upstream {
  double logprob, entropy;
};

// grad = c (-g_logprob p + g_entropy p (mean - z)), the target column excepted.
template <bool kEntropy>
PPOK_INLINE void gradient_of_others(const float* u, float* grad, int64_t n, double c,
                                    const float* state, Upstream g) {
  const float gain = static_cast<float>(c * kLog2E);
  const vfloat reference = splat(state[0]), mean = splat(static_cast<float>(state[2] * kLog2E)),
               log_sum = splat(static_cast<float>(state[1] * kLog2E));
  const vfloat g_logprob = splat(static_cast<float>(-g.logprob * c)),
               g_entropy = splat(static_cast<float>(g.entropy * c / kLog2E));
  const auto gradient = [&](vfloat x) __attribute__((always_inline)) {
    const vfloat y = (x - reference) * gain;
    const vfloat p = vexp2_nonpositive(y - log_sum);
    if (!kEntropy) return g_logprob * p;
    return g_logprob * p + select(p == vfloat{}, p, g_entropy * (p * (mean - y)));
  };
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(grad + j, gradient(load(u + j)));
  if (j < n) {
    float tail[kLanes] = {};
    memcpy(tail, u + j, (n - j) * sizeof(float));
    store(tail, gradient(load(tail)));
    memcpy(grad + j, tail, (n - j) * sizeof(float));
  }
}

template <bool kEntropy>
inline void gradient_of_others(const double* u, double* grad, int64_t n, double c,
                               const double* state, Upstream g) {
  for (int64_t j = 0; j < n; ++j) {
    const double z = (u[j] - state[0]) * c, p = exp(z - state[1]);
    grad[j] = -g.logprob * c * p + (kEntropy && p != 0. ? g.entropy * c * p * (state[2] - z) : 0.);
  }
}

// Columns from .. from + n of one live row's gradient; n is at most kTile.
template <class T, bool kEntropy>
inline void gradient_tile(const LogprobBackward& a, const Row<LogprobBackward>& r, Upstream g,
                          int64_t from, int64_t n) {
  alignas(64) T raw_buffer[kTile], buffer[kTile], out_buffer[kTile];
  const int64_t i = r.row * a.cols + r.col;
  const T* state = at<T>(a.state, 3 * i);
  const Transform<LogprobBackward> transform{a};
  const double c = transform.scale(r.temperature);
  const View& out = a.grad_logits;
  void* destination = const_cast<char*>(column(out, r.row, r.col, from));
  T* grad = write_target(destination, out.dtype, out.stride[2], out_buffer);

  const T* raw = read_run(column(a.logits, r.row, r.col, from), a.logits.dtype, a.logits.stride[2],
                          n, raw_buffer);
  const T* u = raw;
  if (a.softcap > 0.) {
    memcpy(buffer, raw, n * sizeof(T));
    transform.cap(buffer, n);
    u = buffer;
    if (grad == raw) {  // in place: the raw logits are needed once more
      memcpy(raw_buffer, raw, n * sizeof(T));
      raw = raw_buffer;
    }
  }
  const bool holds_target = r.token >= from && r.token < from + n;
  T target_gradient = 0;
  if (holds_target) {
    // 1 - p by expm1: exact where p is near 1.
    const double logprob = *at<T>(a.logprobs, i), p = exp(logprob);
    const double z = (static_cast<double>(u[r.token - from]) - state[0]) * c;
    const double through_entropy = kEntropy && p != 0. ? g.entropy * p * (state[2] - z) : 0.;
    target_gradient = static_cast<T>(c * (-g.logprob * expm1(logprob) + through_entropy));
  }
  gradient_of_others<kEntropy>(u, grad, n, c, state, g);
  if (holds_target) grad[r.token - from] = target_gradient;
  if (a.softcap > 0.) transform.uncap(grad, raw, n);
  write_run(destination, out.dtype, out.stride[2], n, grad);
}

inline void zero_columns(const View& out, int64_t row, int64_t col, int64_t from, int64_t n) {
  char* destination = const_cast<char*>(column(out, row, col, from));
  const int64_t size = element_size(out.dtype);
  if (out.stride[2] == 1)
    memset(destination, 0, n * size);
  else
    for (int64_t j = 0; j < n; ++j) memset(destination + j * out.stride[2] * size, 0, size);
}

template <class T, bool kEntropy>
void backward(const LogprobBackward& a) {
  const int64_t chunks = (a.vocab + kChunk - 1) / kChunk, tasks = a.rows * a.cols * chunks;
  const int threads = a.rows * a.cols * a.vocab < kWorthThreads ? 1 : static_cast<int>(a.threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t from = task % chunks * kChunk;
    const int64_t end = from + kChunk < a.vocab ? from + kChunk : a.vocab;
    const Row<LogprobBackward> r(a, task / chunks);
    Upstream g{0., 0.};
    if (r.kind == kLive && a.grad_logprobs.data)
      g.logprob = read_one<double>(a.grad_logprobs, r.row, r.col);
    if (r.kind == kLive && a.grad_entropy.data)
      g.entropy = read_one<double>(a.grad_entropy, r.row, r.col);
    if (g.logprob == 0. && g.entropy == 0.) {  // nothing asked of this row: its logits are not read
      zero_columns(a.grad_logits, r.row, r.col, from, end - from);
      continue;
    }
    for (int64_t tile = from; tile < end; tile += kTile)
      gradient_tile<T, kEntropy>(a, r, g, tile, end - tile < kTile ? end - tile : kTile);
  }
}

}  // namespace

Fault logprob_forward(const LogprobForward& a) {
  const bool entropy = a.entropy.data != nullptr;
  if (a.logits.dtype == kF64) return entropy ? forward<double, true>(a) : forward<double, false>(a);
  return entropy ? forward<float, true>(a) : forward<float, false>(a);
}

Fault logprob_backward(const LogprobBackward& a) {
  const bool entropy = a.grad_entropy.data != nullptr;
  if (a.logits.dtype == kF64)
    entropy ? backward<double, true>(a) : backward<double, false>(a);
  else
    entropy ? backward<float, true>(a) : backward<float, false>(a);
  return {kNoFault, 0};
}

}  // namespace PPOK_ISA
}  // namespace ppok
