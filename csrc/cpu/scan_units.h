// How sequences are cut into what is scanned in one go, and who scans it: one thread whole
// sequences one after the other, or, of few long sequences, all threads the chunks.
#pragma once
#include <stdlib.h>

#include "cpu/block_scan.h"
#include "cpu/steps.h"
#include "kernels.h"

namespace ppok {
namespace PPOK_ISA {
namespace {  // of each op's file alone: what one file calls once is inlined

constexpr int kChains = 2;
constexpr int64_t kSerialTokens = 16384;  // below, a second thread costs more than it gives

Sequences sequences_of(const ScanSetting& a) { return {a.offsets, a.rows, a.cols, a.sequences}; }

// ---- units --------------------------------------------------------------------------------------

// Either the whole sequences [first, last), at most kChunk tokens together, or one chunk of
// sequence `first`.
struct Unit {
  int64_t first, last;
  Run run;            // of a chunk: the tokens that are scanned
  Run outer;          // and those that are written: also the masked ones before the scan's start
  int64_t neighbour;  // the step scanned just before this chunk, -1: none
  bool chunk, continued;
  double carry[kChains], local[kChains], factor[kChains];
};

// Hands out the units of the sequences [next_sequence, end) in the order of the scan.
template <bool kReverse>
class Walker {
 public:
  Walker(const ScanSetting& a, bool skip_masked, int64_t first, int64_t end)
      : a_(a), sequences_(sequences_of(a)), skip_(skip_masked), next_(first), end_(end) {}

  bool next(Unit& u) {
    if (left_.begin < left_.end) return take_chunk(u);
    u = Unit{};
    u.first = next_;
    u.neighbour = -1;
    for (int64_t total = 0; next_ < end_ && next_ - u.first < kChunk; ++next_) {
      const Run run = sequences_[next_];
      const int64_t n = run.end - run.begin;
      if (n > kChunk && next_ == u.first) {
        ++next_;
        left_ = run;
        neighbour_ = -1;
        return take_chunk(u);
      }
      if ((total += n) > kChunk) break;
    }
    u.last = next_;
    return u.last > u.first;
  }

 private:
  bool take_chunk(Unit& u) {
    u = Unit{};
    u.first = next_ - 1;
    u.last = next_;
    u.chunk = true;
    u.neighbour = neighbour_;
    u.outer = u.run = left_;
    // Masked steps that the scan meets first are exact zeros; skipped, they shift no chunk.
    if (a_.mask.data && skip_ && neighbour_ < 0) {
      const int64_t edge = walk<kReverse>(a_.mask, left_, 1);
      if (kReverse)
        u.run.end = edge + (edge < u.run.end);
      else
        u.run.begin = edge - (edge > u.run.begin);
    }
    const int64_t n = u.run.end - u.run.begin;
    int64_t edge;
    if (a_.carry && a_.mask.data)
      edge = walk<kReverse>(a_.mask, u.run, kChunk);
    else
      edge = kReverse ? u.run.end - (n < kChunk ? n : kChunk)
                      : u.run.begin + (n < kChunk ? n : kChunk);
    if (kReverse) {
      u.run.begin = u.outer.begin = left_.end = edge;
      neighbour_ = edge;
    } else {
      u.run.end = u.outer.end = left_.begin = edge;
      neighbour_ = edge - 1;
    }
    u.continued = left_.begin < left_.end;
    return true;
  }

  const ScanSetting& a_;
  const Sequences sequences_;
  const bool skip_;
  int64_t next_;
  const int64_t end_;
  Run left_{0, 0, 0};
  int64_t neighbour_ = -1;
};

// ---- threads ------------------------------------------------------------------------------------

// Whole sequences, one after the other.
template <class Stage, class Op>
void run_sequences(const Op& op, int64_t first, int64_t end) {
  Stage stage(op);
  Walker<Stage::kReverse> walker(op.a.setting, op.skips_masked(), first, end);
  double carry[kChains] = {};
  for (Unit u; walker.next(u);) stage.finish(u, carry);
}

// Few long sequences: every chunk is scanned for what it hands on, the carries follow, then every
// chunk again.
template <class Stage, class Op>
bool run_chunks(const Op& op, int threads) {
  const ScanSetting& g = op.a.setting;
  int64_t total = 0, room = 3 * g.rows * g.cols / kChunk + 2 * g.sequences + 4;
  Unit* units = static_cast<Unit*>(malloc(room * sizeof(Unit)));
  if (!units) return false;
  Walker<Stage::kReverse> walker(g, op.skips_masked(), 0, g.sequences);
  while (walker.next(units[total])) ++total;

#pragma omp parallel num_threads(threads)
  {
    Stage stage(op);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < total; ++i) stage.summarize(units[i]);
#pragma omp single
    for (int64_t i = 1; i < total; ++i)
      for (int chain = 0; chain < g.chains && units[i].neighbour >= 0; ++chain) {
        const Unit& before = units[i - 1];
        const bool alone = before.neighbour < 0 || before.factor[chain] == 0.;
        units[i].carry[chain] =
            alone ? before.local[chain]
                  : mul_add(before.factor[chain], before.carry[chain], before.local[chain]);
      }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < total; ++i) stage.finish(units[i], units[i].carry);
  }
  free(units);
  return true;
}

// The first sequence of the share of thread `t`: shares hold about the same number of tokens.
int64_t share(const ScanSetting& g, int64_t t, int64_t threads) {
  if (!g.offsets.data) return g.sequences * t / threads;
  int64_t low = 0, high = g.sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (read_index(g.offsets, 0, middle) < g.cols * t / threads)
      low = middle + 1;
    else
      high = middle;
  }
  return t == threads ? g.sequences : low;
}

template <class Stage, class Op>
void drive(const Op& op) {
  const ScanSetting& g = op.a.setting;
  const int threads = g.rows * g.cols < kSerialTokens ? 1 : static_cast<int>(op.a.threads);
  int64_t busiest = 0;
  const Sequences sequences = sequences_of(g);
  for (int t = 0; t < threads && g.sequences; ++t) {
    int64_t tokens = 0;
    const int64_t first = share(g, t, threads), end = share(g, t + 1, threads);
    if (first < end)
      tokens =
          g.offsets.data ? sequences[end - 1].end - sequences[first].begin : (end - first) * g.cols;
    busiest = tokens > busiest ? tokens : busiest;
  }
  // Scanning twice, evenly shared, against once with one thread late.
  if (threads > 1 && 4 * threads * busiest > 7 * g.rows * g.cols && run_chunks<Stage>(op, threads))
    return;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t)
    run_sequences<Stage>(op, share(g, t, threads), share(g, t + 1, threads));
}

}  // namespace
}  // namespace PPOK_ISA
}  // namespace ppok
