// Policy and value loss: the aggregated loss, the sums behind every metric and the final gradient,
// in one pass. And importance weights, in the place of gradients.
//
// Tokens are cut in row-major order into blocks of kBlock. Inside a block each lane sums every
// kLanes-th token of each tile, in double, the terms of kGroup tokens first as floats where they
// are rounded themselves; blocks are merged in order. So the bits depend on the instruction set and
// the order of the tokens alone, never on threads or strides. A first pass over the mask, one byte
// a token, counts what the weights need.
#include <stdlib.h>

#include "cpu/sums.h"
#include "cpu/tile.h"
#include "loss_frame.h"
#include "loss_terms.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

constexpr int64_t kTile = 1024, kBlock = 8 * kTile;
constexpr int kGroup = 4;

PPOK_INLINE int64_t block_count(int64_t tokens) { return (tokens + kBlock - 1) / kBlock; }
PPOK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- live tokens --------------------------------------------------------------------------------

struct LiveCounts : LiveTotals {
  int64_t* per_sequence;

  explicit LiveCounts(const LossFrame& f, const Sequences& bounds)
      : LiveTotals{f.rows * f.cols, 0} {
    per_sequence = static_cast<int64_t*>(calloc(bounds.count + 1, sizeof(int64_t)));
    if (f.mask.data)
      count(f, bounds);
    else
      for (int64_t s = 0; s < bounds.count; ++s)
        per_sequence[s] = bounds.start(s + 1) - bounds.start(s);
    for (int64_t s = 0; s < bounds.count; ++s) sequences += per_sequence[s] != 0;
  }
  ~LiveCounts() { free(per_sequence); }
  LiveCounts(const LiveCounts&) = delete;

 private:
  void count(const LossFrame& f, const Sequences& bounds) {
    const int64_t total = tokens, blocks = block_count(total);
    const int threads = static_cast<int>(f.threads);
    int64_t live = 0;
#pragma omp parallel for num_threads(threads) schedule(static) \
    reduction(+ : live) if (threads > 1 && blocks > 1)
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t buffer[kTile];
      const int64_t stop = smaller(total, (block + 1) * kBlock);
      for (int64_t from = block * kBlock; from < stop; from += kTile) {
        const int64_t to = smaller(stop, from + kTile);
        const uint8_t* mask = read_live(f.mask, f.cols, from, to - from, buffer);
        const auto among = [&](int64_t begin, int64_t end) {
          int32_t n = 0;
          for (int64_t i = begin - from; i < end - from; ++i) n += mask[i] != 0;
          return n;
        };
        live += among(from, to);
        bounds.parts(from, to, [&](int64_t s, int64_t begin, int64_t end) {
          const int64_t n = among(begin, end);
          if (begin == bounds.start(s) && end == bounds.start(s + 1)) {
            per_sequence[s] = n;
          } else {
#pragma omp atomic
            per_sequence[s] += n;
          }
        });
      }
    }
    tokens = live;
  }
};

// ---- the pass over the tokens -------------------------------------------------------------------

// Loss: see loss_terms.h. Its kernel's add() takes a vector of tokens, its store() writes kSums
// sums and behind them kExtremes maxima, of which publish() makes the stats.
template <class T, class Loss>
struct Pass {
  using L = Lanes<T>;
  using V = typename L::V;
  using Mask = typename L::Mask;

  const Loss& loss;
  const LossInputs& in;
  const LossFrame& f;
  const Sequences& bounds;
  const LiveCounts& counts;
  const double scale;  // weight of a token; kSeqMeanTokenMean divides it by its sequence's count
  const double* statistics;  // of the sequences, if the loss has them

  struct Total {
    double weighted;  // of kSeqMeanTokenMean
    double stats[Loss::kSums + Loss::kExtremes];
  };

  struct Tile {
    const T *live, *constant, *target, *weight, *of_sequence;
    const uint8_t* mask;
    T* gradient;
  };

  // Of the live tokens of a sequence, in an order that starts with it: no bit depends on what is
  // packed or padded beside it.
  double statistic(int64_t sequence) const {
    alignas(64) T buffers[3][kTile];
    uint8_t mask_buffer[kTile];
    typename Loss::template OfSequence<Terms<T>> sums(loss);
    const auto add = [&](const Tile& tile, int64_t i) {
      const Token token(tile, i);
      sums.add(token.live, token.constant, token.target);
    };
    const int64_t stop = bounds.start(sequence + 1);
    for (int64_t from = bounds.start(sequence); from < stop; from += kTile) {
      const int64_t n = smaller(kTile, stop - from);
      const Tile tile = read(from, n, buffers, mask_buffer);
      int64_t i = 0;
      for (; i + L::kWidth <= n; i += L::kWidth) add(tile, i);
      if (i < n) add(Padded(tile, i, n - i).tile, 0);
    }
    double totals[Loss::kOfSequenceSums];
    sums.store(totals);
    return loss.statistic(totals, counts.per_sequence[sequence]);
  }

  void run(int64_t from, int64_t stop, Total& total) const {
    alignas(64) T buffers[4 + Loss::kOfSequence][kTile];
    uint8_t mask_buffer[kTile];
    typename Loss::template Kernel<Terms<T>> kernel(loss);
    Sum<T> weighted;
    for (; from < stop; from += kTile) {
      const int64_t n = smaller(kTile, stop - from);
      Tile tile = read(from, n, buffers, mask_buffer);
      if (f.aggregation == kSeqMeanTokenMean) {
        tile.weight = buffers[3];
        fill(from, n, buffers[3],
             [&](int64_t s) { return share_of<T>(scale, counts.per_sequence[s]); });
      }
      if (Loss::kOfSequence) {
        tile.of_sequence = buffers[3 + Loss::kOfSequence];
        fill(from, n, buffers[3 + Loss::kOfSequence],
             [&](int64_t s) { return static_cast<T>(statistics[s]); });
      }
      if (f.gradient.data) tile.gradient = static_cast<T*>(f.gradient.data) + from;
      int64_t i = 0;
      for (; i + kGroup * L::kWidth <= n; i += kGroup * L::kWidth) {
        for (int k = 0; k < kGroup; ++k) step(tile, i + k * L::kWidth, kernel, weighted);
        kernel.settle();
      }
      for (; i + L::kWidth <= n; i += L::kWidth) step(tile, i, kernel, weighted);
      if (i < n) tail(tile, i, n - i, kernel, weighted);
      kernel.settle();
    }
    total.weighted = weighted.total();
    kernel.store(total.stats);
  }

  PPOK_INLINE Tile read(int64_t from, int64_t n, T (*buffers)[kTile], uint8_t* mask_buffer) const {
    Tile tile{};
    tile.live = read_flat(in.live, f.cols, from, n, buffers[0]);
    tile.constant =
        in.constant.data ? read_flat(in.constant, f.cols, from, n, buffers[1]) : nullptr;
    tile.target = buffers[2];
    if (in.target_per_sequence)
      fill(from, n, buffers[2], [&](int64_t s) { return read_one<T>(in.target, 0, s); });
    else
      tile.target = read_flat(in.target, f.cols, from, n, buffers[2]);
    if (f.mask.data) tile.mask = read_live(f.mask, f.cols, from, n, mask_buffer);
    return tile;
  }

  template <class Value>
  PPOK_INLINE void fill(int64_t from, int64_t n, T* buffer, Value&& value) const {
    bounds.parts(from, from + n, [&](int64_t s, int64_t begin, int64_t end) {
      const T x = value(s);
      for (int64_t i = begin - from; i < end - from; ++i) buffer[i] = x;
    });
  }

  // A vector of tokens; what lies under the mask may be anything, and is selected away.
  struct Token {
    Mask is_live;
    V live, constant, target;
    PPOK_INLINE Token(const Tile& tile, int64_t i) {
      const V zero{};
      // Tiles are about a page long, and the hardware's prefetcher stops at its end.
      __builtin_prefetch(tile.live + i + kTile);
      __builtin_prefetch(tile.target + i + kTile);
      if (tile.constant) __builtin_prefetch(tile.constant + i + kTile);
      is_live = tile.mask ? L::nonzero(tile.mask + i) : zero == zero;
      live = is_live ? L::load(tile.live + i) : zero;
      constant = tile.constant ? (is_live ? L::load(tile.constant + i) : zero) : zero;
      target = is_live ? L::load(tile.target + i) : zero;
    }
  };

  template <class Kernel>
  PPOK_INLINE void step(const Tile& tile, int64_t i, Kernel& kernel, Sum<T>& weighted) const {
    const Token in(tile, i);
    V of_sequence{};
    if (Loss::kOfSequence) of_sequence = in.is_live ? L::load(tile.of_sequence + i) : of_sequence;
    const auto token = kernel.add(in.live, in.constant, in.target, of_sequence, in.is_live);
    const V weight = tile.weight ? L::load(tile.weight + i) : L::splat(scale);
    if (tile.weight) weighted.add(token.loss * weight);
    if (tile.gradient) L::store(tile.gradient + i, token.slope * weight);
  }

  // The last n tokens of a tile, from i on, fewer than a vector: padded with masked ones.
  struct Padded {
    T tokens[5][L::kWidth] = {}, gradient[L::kWidth];
    uint8_t mask[L::kWidth] = {};
    Tile tile;

    Padded(const Tile& whole, int64_t i, int64_t n) {
      const auto pad = [&](const T* from, T* to) {
        return from ? static_cast<const T*>(memcpy(to, from + i, n * sizeof(T))) : nullptr;
      };
      if (whole.mask)
        memcpy(mask, whole.mask + i, n);
      else
        memset(mask, 1, n);
      tile = {pad(whole.live, tokens[0]),         pad(whole.constant, tokens[1]),
              pad(whole.target, tokens[2]),       pad(whole.weight, tokens[3]),
              pad(whole.of_sequence, tokens[4]),  mask,
              whole.gradient ? gradient : nullptr};
    }
    Padded(const Padded&) = delete;
  };

  template <class Kernel>
  void tail(const Tile& tile, int64_t i, int64_t n, Kernel& kernel, Sum<T>& weighted) const {
    const Padded rest(tile, i, n);
    step(rest.tile, 0, kernel, weighted);
    if (tile.gradient) memcpy(tile.gradient + i, rest.gradient, n * sizeof(T));
  }

  static void merge(Total& total, const Total& block) {
    total.weighted += block.weighted;
    for (int k = 0; k < Loss::kSums; ++k) total.stats[k] += block.stats[k];
    for (int k = Loss::kSums; k < Loss::kSums + Loss::kExtremes; ++k)
      if (block.stats[k] > total.stats[k]) total.stats[k] = block.stats[k];
  }
};

template <class T, class Loss>
Fault reduce(const Loss& loss, const LossInputs& in, const LossFrame& f) {
  using P = Pass<T, Loss>;
  const int64_t tokens = f.rows * f.cols, blocks = tokens ? block_count(tokens) : 1;
  const Sequences bounds = sequences_of(f);
  if (!bounds.valid()) return {kBadOffsets, 0};
  const LiveCounts counts(f, bounds);
  const double denominator = divisor(f, counts), scale = weight_of(denominator);
  const int threads = static_cast<int>(f.threads);
  double* statistics = nullptr;
  if constexpr (Loss::kOfSequence)
    statistics = static_cast<double*>(malloc((bounds.count + 1) * sizeof(double)));
  const P pass{loss, in, f, bounds, counts, scale, statistics};
  if constexpr (Loss::kOfSequence) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && blocks > 1)
    for (int64_t s = 0; s < bounds.count; ++s) statistics[s] = pass.statistic(s);
  }

  typename P::Total total, *parts = &total;
  if (blocks > 1) parts = static_cast<typename P::Total*>(malloc(blocks * sizeof(total)));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && blocks > 1)
  for (int64_t block = 0; block < blocks; ++block)
    pass.run(block * kBlock, smaller(tokens, (block + 1) * kBlock), parts[block]);
  if (blocks > 1) {
    total = parts[0];
    for (int64_t block = 1; block < blocks; ++block) P::merge(total, parts[block]);
    free(parts);
  }
  free(statistics);

  *static_cast<T*>(f.loss.data) =
      static_cast<T>(aggregate(f, denominator, total.stats[0], total.weighted));
  double* stats = static_cast<double*>(f.stats.data);
  stats[0] = counts.tokens;
  stats[1] = counts.sequences;
  loss.publish(total.stats, stats + 2);
  return {kNoFault, 0};
}

template <class Loss>
Fault reduce(const Loss& loss, const LossInputs& in, const LossFrame& f) {
  return f.loss.dtype == kF64 ? reduce<double>(loss, in, f) : reduce<float>(loss, in, f);
}

template <class T>
void scale(const ScaleGradient& a) {
  const T by = read_one<T>(a.upstream, 0, 0);
  const int64_t blocks = block_count(a.count);
  const int threads = static_cast<int>(a.threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && blocks > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    alignas(64) T in_buffer[kTile], buffer[kTile];
    const int64_t stop = smaller(a.count, (block + 1) * kBlock);
    for (int64_t from = block * kBlock; from < stop; from += kTile) {
      const int64_t n = smaller(kTile, stop - from);
      const T* gradient = read_run(address(a.gradient, 0, from), a.gradient.dtype, 1, n, in_buffer);
      T* out = write_target(address(a.scaled, 0, from), a.scaled.dtype, 1, buffer);
      for (int64_t i = 0; i < n; ++i) out[i] = gradient[i] == 0 ? 0 : gradient[i] * by;
      write_tile(a.scaled, 0, from, n, out);
    }
  }
}

}  // namespace

Fault clipped_loss(const ClippedLoss& a) {
  return with_loss(a, [&](auto loss) { return reduce(loss, inputs_of(a), a.frame); });
}

Fault value_loss(const ValueLoss& a) {
  return with_loss(a, [&](auto loss) { return reduce(loss, inputs_of(a), a.frame); });
}

Fault importance_weights(const ImportanceWeights& a) {
  return with_loss(a, [&](auto loss) { return reduce(loss, inputs_of(a), a.frame); });
}

Fault scale_gradient(const ScaleGradient& a) {
  a.gradient.dtype == kF64 ? scale<double>(a) : scale<float>(a);
  return {kNoFault, 0};
}

}  // namespace PPOK_ISA
}  // namespace ppok
