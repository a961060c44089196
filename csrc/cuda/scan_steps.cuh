// The steps that a scan runs over, and what a step says: the tokens in order, or, under "carry"
// with a mask, a list of the live ones. And the stages before the scan that make this list and look
// at the offsets.
#pragma once
#include "cuda/block.cuh"
#include "cuda/element.cuh"
#include "math/scan.h"

namespace ppok {
namespace PPOK_ISA {

constexpr int kThreads = 256;
constexpr int kTile = 2048;  // tokens, offsets or steps that a block works on
constexpr int kWarps = kThreads / kWarp;

// Zeros before the launch.
struct Progress {
  unsigned ticket;    // the next tile
  unsigned done;      // tiles of the stages before the scan
  unsigned unusable;  // the offsets decrease
};

// Flat positions, in 32 bits if that is enough.
struct TokenList {
  void* data;
  bool wide;

  __device__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const uint32_t*>(data)[i];
  }
  __device__ void set(int64_t i, int64_t token) const {
    if (wide)
      static_cast<int64_t*>(data)[i] = token;
    else
      static_cast<uint32_t*>(data)[i] = static_cast<uint32_t>(token);
  }
};

// Of a call, beside its tensors.
struct Plan {
  int64_t tokens, offset_tiles, list_tiles, scan_tiles;  // the tiles of each stage, in this order
  Progress* progress;
  TokenList live;    // the live tokens, if they are listed
  int64_t* starts;   // where each sequence starts in that list
  int64_t* listed;   // its length
  uint64_t* counts;  // of live tokens, as look_back has them
};

struct Token {
  int64_t row, col;
};

// Sequence -1 is what precedes the first one and `sequences` what follows the last one: nothing,
// but for offsets that are bad.
class Steps {
 public:
  __device__ Steps(const ScanSetting& g, const Plan& plan, int64_t count)
      : g_(g),
        plan_(plan),
        listed_(plan.live.data != nullptr),
        sequences_(g.offsets.data && plan.progress->unusable ? -1 : g.sequences),
        count_(count) {}

  __device__ int64_t count() const { return count_; }
  __device__ int64_t sequences() const { return sequences_; }
  __device__ bool lost(int64_t sequence) const { return sequence < 0 || sequence == sequences_; }

  // Where a sequence starts among the tokens, and among the steps.
  __device__ int64_t first_token(int64_t i) const {
    if (!g_.offsets.data) return i * g_.cols;
    const int64_t offset = read_index(g_.offsets, 0, i);
    return max(int64_t{0}, min(offset, plan_.tokens));
  }
  __device__ int64_t first_step(int64_t i) const {
    if (i < 0) return 0;
    if (i > sequences_) return count_;
    return listed_ ? plan_.starts[i] : first_token(i);
  }

  // The sequence of a step, out of [low, high].
  __device__ int64_t find(int64_t step, int64_t low, int64_t high) const {
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (first_step(middle + 1) > step)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  // The same out of all, by a whole warp.
  __device__ int64_t find(int64_t step) const {
    const int lane = threadIdx.x % kWarp;
    int64_t low = -1, high = sequences_;
    while (low < high) {
      const int64_t width = (high - low) / kWarp + 1;
      const int64_t probe = min(low + (lane + 1) * width - 1, high);
      const int nearest = __ffs(__ballot_sync(kWholeWarp, first_step(probe + 1) > step)) - 1;
      high = min(low + (nearest + 1) * width - 1, high);
      low += nearest * width;
    }
    return low;
  }

  __device__ int64_t flat(int64_t step) const { return listed_ ? plan_.live[step] : step; }
  __device__ Token token(int64_t step, int64_t sequence) const {
    if (g_.offsets.data) return {0, flat(step)};
    return {sequence, flat(step) - sequence * g_.cols};
  }

  __device__ bool live(const Token& t) const { return listed_ || is_live(g_.mask, t.row, t.col); }
  // A discount of 0 looks at no later step: it ends the sequence at every one.
  __device__ unsigned code(const Token& t) const {
    if (!live(t)) return 0;
    unsigned code = kLive;
    if (g_.gamma == 0. || (g_.terminated.data && is_live(g_.terminated, t.row, t.col)))
      code |= kTerminated;
    if (g_.truncated.data && is_live(g_.truncated, t.row, t.col)) code |= kTruncated;
    return code;
  }

  __device__ double lambda(int chain, int64_t sequence) const {
    const View& lams = chain ? g_.value_lams : g_.lams;
    if (!lams.data) return chain ? g_.value_lam : g_.lam;
    return lost(sequence) ? 0. : read_one<double>(lams, 0, sequence);
  }
  // NaN for a lambda that is out of range.
  __device__ double coefficient(int chain, int64_t sequence) const {
    const double lam = lambda(chain, sequence);
    return lam >= 0. && lam <= 1. ? g_.gamma * lam : NAN;
  }

 private:
  const ScanSetting& g_;
  const Plan& plan_;
  const bool listed_;
  const int64_t sequences_, count_;
};

// Most inputs are fp32.
__device__ inline double read(const View& v, const Token& t) {
  if (v.dtype == kF32)
    return static_cast<const float*>(v.data)[t.row * v.stride[0] + t.col * v.stride[1]];
  return read_one<double>(v, t.row, t.col);
}

// Into a contiguous output of fp32 or fp64, which may be absent.
__device__ inline void write(const View& v, int64_t i, double x) {
  if (!v.data) return;
  if (v.dtype == kF64)
    at<double>(v, i) = x;
  else
    at<float>(v, i) = static_cast<float>(x);
}

// ---- stages before the scan ---------------------------------------------------------------------

// The end of a tile of such a stage.
__device__ inline void done(const Plan& plan) {
  __syncthreads();
  if (threadIdx.x == 0) add_release(&plan.progress->done, 1u);
}

// Waits for that of so many tiles: they were drawn before.
__device__ inline void await_done(const Plan& plan, int64_t tiles) {
  if (threadIdx.x == 0)
    while (load_acquire(&plan.progress->done) < tiles) spin_pause();
  __syncthreads();
}

__device__ inline void check_offsets(const ScanSetting& g, const Plan& plan, int64_t tile,
                                     int64_t* fault) {
  const int64_t end = min((tile + 1) * kTile, g.sequences + 1);
  for (int64_t i = tile * kTile + threadIdx.x; i < end; i += kThreads) {
    const int64_t offset = read_index(g.offsets, 0, i);
    const bool decreases = i && offset < read_index(g.offsets, 0, i - 1);
    if (decreases) atomicExch(&plan.progress->unusable, 1u);
    if (decreases || (i == 0 && offset != 0) || (i == g.sequences && offset != plan.tokens))
      report_fault(fault, i, kBadOffsets);
  }
}

// How many live tokens precede this tile, which has `own` of them: sums of integers, for which it
// does not matter what is ready first. All of the warp.
__device__ inline int64_t look_back(uint64_t* counts, int64_t tile, int64_t own) {
  enum : uint64_t { kOfTile = 1, kOfAll = 2, kKind = 3 };
  constexpr int kKindBits = 2;
  const int lane = threadIdx.x % kWarp;
  const auto publish = [&](int64_t count, uint64_t kind) {
    if (lane == 0) store_release(counts + tile, static_cast<uint64_t>(count) << kKindBits | kind);
  };
  publish(own, kOfTile);
  int64_t before = 0;
  bool all = false;
  for (int64_t last = tile - 1; !all; last -= kWarp) {
    uint64_t word = kOfAll;
    if (last >= lane)
      while (!(word = load_acquire(counts + last - lane))) spin_pause();
    const unsigned whole = __ballot_sync(kWholeWarp, (word & kKind) == kOfAll);
    all = whole != 0;
    const bool counts_here = !all || lane <= __ffs(whole) - 1;
    before += warp_sum(counts_here ? static_cast<int64_t>(word >> kKindBits) : 0);
  }
  publish(before + own, kOfAll);
  return before;
}

// Lists the live tokens of a tile, and the sequences that start in it; clear(token) for the others.
template <class Clear>
__device__ void list_live(const ScanSetting& g, const Plan& plan, int64_t tile, Clear&& clear) {
  constexpr int kGroups = kTile / kWarp;
  PPOK_SHARED(unsigned, live, kGroups);  // a bit for each of 32 tokens
  PPOK_SHARED(int, before, kGroups);     // live tokens before these, in the tile
  PPOK_SHARED(int64_t, base, 2);         // before the tile, and its own
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t begin = tile * kTile, end = min(begin + kTile, plan.tokens);
  for (int group = warp; group < kGroups; group += kWarps) {
    const int64_t t = begin + group * kWarp + lane, row = g.rows == 1 ? 0 : t / g.cols;
    const bool is = t < end && is_live(g.mask, row, t - row * g.cols);
    const unsigned bits = __ballot_sync(kWholeWarp, is);
    if (lane == 0) live[group] = bits;
  }
  __syncthreads();
  if (warp == 0) {
    static_assert(kGroups == 2 * kWarp, "two groups to a lane");
    const int first = __popc(live[2 * lane]), own = first + __popc(live[2 * lane + 1]);
    int upto = own;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(kWholeWarp, upto, distance);
      if (lane >= distance) upto += other;
    }
    before[2 * lane] = upto - own;
    before[2 * lane + 1] = upto - own + first;
    const int total = __shfl_sync(kWholeWarp, upto, kWarp - 1);
    const int64_t earlier = look_back(plan.counts, tile, total);
    if (lane == 0) {
      base[0] = earlier;
      base[1] = total;
      if (end == plan.tokens) *plan.listed = earlier + total;
    }
  }
  __syncthreads();
  // The number of live tokens before one of this tile, or before its end.
  const auto rank = [&](int64_t t) {
    if (t == begin + kTile) return base[0] + base[1];
    const int group = static_cast<int>(t - begin) / kWarp,
              bit = static_cast<int>(t - begin) % kWarp;
    return base[0] + before[group] + __popc(live[group] & ((1u << bit) - 1));
  };
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    if (live[(t - begin) / kWarp] >> (t - begin) % kWarp & 1)
      plan.live.set(rank(t), t);
    else
      clear(t);
  }
  const Steps steps(g, plan, 0);
  const auto first_from = [&](int64_t t) {  // the first sequence that starts at t or later
    int64_t low = 0, high = steps.sequences() + 1;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (steps.first_token(middle) >= t)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  };
  const int64_t last = end == plan.tokens ? steps.sequences() + 1 : first_from(end);
  for (int64_t i = first_from(begin) + threadIdx.x; i < last; i += kThreads)
    plan.starts[i] = rank(steps.first_token(i));
}

}  // namespace PPOK_ISA
}  // namespace ppok
