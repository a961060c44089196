// Advantages and discounted returns, and their adjoint: x_t = d_t + c_t x_{t+1}, in double.
//
// The chain of one sequence is latency: four cycles a step whatever the vector width. So a sequence
// is cut into chunks of kChunk steps, counted from the end the scan starts at; kWays chunks are
// scanned side by side from zero, and each is then completed by the value x carried into it times a
// power of c. Within a chunk the order is the serial one.
//
// Chunks count the steps that exist (under the "carry" convention: the live ones), so a sequence's
// bits depend on its own steps alone: not on its place in the batch, on padding, or on the thread
// count. Short sequences share a chunk, their chains cut by coefficients of 0.
//
// The advantages scan from the last step to the first (kReverse), their adjoint from the first to
// the last.
#include "math/scan.h"

#include <stdlib.h>

#include "cpu/sequences.h"
#include "cpu/tile.h"
#include "kernels.h"

namespace ppok {
namespace PPOK_ISA {
namespace {

constexpr int64_t kChunk = 1024;
constexpr int kWays = 4;
constexpr int kChains = 2;
constexpr int64_t kSerialTokens = 16384;  // below, a second thread costs more than it gives

Sequences sequences_of(const ScanSetting& a) { return {a.offsets, a.rows, a.cols, a.sequences}; }

// ---- the mask and the flags ---------------------------------------------------------------------

template <class E>
PPOK_INLINE void mark_nonzero(const E* p, int64_t stride, int64_t n, E ignored, uint8_t bit,
                              uint8_t* code) {
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) code[i] |= (p[i] & ~ignored) ? bit : 0;
  else
    for (int64_t i = 0; i < n; ++i) code[i] |= (p[i * stride] & ~ignored) ? bit : 0;
}

// Sets `bit` where the tensor is not zero; integer or float alike, by their bits without the sign
// of a zero.
void mark(const View& v, int64_t row, int64_t col, int64_t n, uint8_t bit, uint8_t* code) {
  const void* p = address(v, row, col);
  const int64_t stride = v.stride[1], size = element_size(v.dtype);
  const bool is_float = v.dtype <= kF64;
  if (size == 1) {
    mark_nonzero(static_cast<const uint8_t*>(p), stride, n, uint8_t{0}, bit, code);
  } else if (size == 2) {
    mark_nonzero(static_cast<const uint16_t*>(p), stride, n, uint16_t(is_float ? 1u << 15 : 0), bit,
                 code);
  } else if (size == 4) {
    mark_nonzero(static_cast<const uint32_t*>(p), stride, n, is_float ? 1u << 31 : 0u, bit, code);
  } else {
    mark_nonzero(static_cast<const uint64_t*>(p), stride, n, is_float ? uint64_t{1} << 63 : 0, bit,
                 code);
  }
}

void read_live(const View& mask, int64_t row, int64_t col, int64_t n, uint8_t* live) {
  memset(live, mask.data ? 0 : kLive, n);
  if (mask.data) mark(mask, row, col, n, kLive, live);
}

// A discount of 0 looks at no later step: it ends the sequence at every one.
void read_codes(const ScanSetting& a, int64_t row, int64_t col, int64_t n, uint8_t* code) {
  read_live(a.mask, row, col, n, code);
  if (a.terminated.data) mark(a.terminated, row, col, n, kTerminated, code);
  if (a.truncated.data) mark(a.truncated, row, col, n, kTruncated, code);
  const uint8_t always = a.gamma == 0. ? kTerminated : 0;
  for (int64_t i = 0; i < n; ++i) code[i] = code[i] & kLive ? code[i] | always : 0;
}

// Masks come in runs: blocks that are live or masked throughout need no test per step.
constexpr int64_t kBlock = 64;

int64_t count_live(const uint8_t* live, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock;
    uint8_t found = 0;
    for (int64_t j = 0; j < size; ++j) found += live[i + j] & kLive;
    count += found;
  }
  return count;
}

// Moves the live elements of n to the front.
template <class E>
void compress(E* x, const uint8_t* live, int64_t n) {
  E* to = x;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock, found = count_live(live + i, size);
    if (found == size) {
      memmove(to, x + i, size * sizeof(E));
    } else if (found) {
      for (int64_t j = i, k = 0; j < i + size; ++j) {
        const uint8_t keep = live[j] & kLive;
        to[k] = x[j];
        k += keep;
      }
    }
    to += found;
  }
}

// out[i] = value(k) where i is the k-th live position, 0 where it is masked.
template <class T, class Value>
PPOK_INLINE void expand(T* out, const uint8_t* live, int64_t n, Value&& value) {
  for (int64_t i = 0, step = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock, found = count_live(live + i, size);
    if (found == size) {
      for (int64_t j = 0; j < size; ++j) out[i + j] = static_cast<T>(value(step + j));
    } else {
      memset(out + i, 0, size * sizeof(T));
      for (int64_t j = 0, k = step; found && j < size; ++j)
        if (live[i + j] & kLive) out[i + j] = static_cast<T>(value(k++));
    }
    step += found;
  }
}

// From one end of the run towards the other: the edge behind the `count`-th live step, or the other
// end.
template <bool kReverse>
int64_t walk(const View& mask, const Run& run, int64_t count) {
  uint8_t live[4 * kBlock];
  for (int64_t left = run.end - run.begin; left > 0;) {
    const int64_t n = left < 4 * kBlock ? left : 4 * kBlock;
    const int64_t col = kReverse ? run.begin + left - n : run.end - left;
    read_live(mask, run.row, col, n, live);
    const int64_t found = count_live(live, n);
    for (int64_t j = 0; found >= count; ++j) {
      const int64_t i = kReverse ? n - 1 - j : j;
      count -= live[i];
      if (count == 0) return kReverse ? col + i : col + i + 1;
    }
    count -= found;
    left -= n;
  }
  return kReverse ? run.begin : run.end;
}

// ---- what is scanned in one go ------------------------------------------------------------------

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

// ---- the buffers of one chunk -------------------------------------------------------------------

constexpr int64_t kSpare = 16;  // keeps equal positions of two arrays out of one cache set

// x and coefficient hold n steps at `offset`, aligned to the end the scan starts from; the rest is
// in order from 0.
template <class T>
struct alignas(64) Slot {
  double x[kChains][kChunk + kSpare], coefficient[kChains][kChunk + kSpare];
  T first[2 * kChunk], second[2 * kChunk], third[2 * kChunk];
  uint8_t code[2 * kChunk + kSpare];
  int32_t ends[kChunk];  // of each sequence in the unit, in steps
  Unit unit;
  const T *in_first, *in_second;  // the steps' numbers: in the buffers above, or in place
  int64_t n, offset;
  bool coded, cut;  // code is filled; some coefficient is 0 and coefficient is filled
};

double lambda_of(const ScanSetting& a, int chain, int64_t sequence) {
  const View& lams = chain ? a.value_lams : a.lams;
  return lams.data ? read_one<double>(lams, 0, sequence) : chain ? a.value_lam : a.lam;
}

// Runs body(run) over the tokens of a unit, in order, at most kChunk at a time.
template <class Body>
PPOK_INLINE void for_runs(const ScanSetting& a, const Unit& u, const Run& chunk, Body&& body) {
  const Sequences sequences = sequences_of(a);
  if (u.chunk) {
    for (int64_t col = chunk.begin; col < chunk.end; col += kChunk)
      body(Run{chunk.row, col, chunk.end - col < kChunk ? chunk.end : col + kChunk});
  } else if (a.offsets.data) {
    body(Run{0, sequences[u.first].begin, sequences[u.last - 1].end});
  } else {
    for (int64_t i = u.first; i < u.last; ++i) body(sequences[i]);
  }
}

// What the unit writes of its sequence number `piece`. In contiguous outputs the pieces follow each
// other.
PPOK_INLINE Run written(const ScanSetting& a, const Unit& u, int64_t piece) {
  if (u.chunk) return u.outer;
  return sequences_of(a)[u.first + piece];
}

PPOK_INLINE int64_t output_position(const ScanSetting& a, const Unit& u) {
  const Run run = written(a, u, 0);
  return run.row * a.cols + run.begin;
}

// Reads up to three token tensors and the codes of a unit into the slot: masked steps become zeros,
// or leave.
template <class T>
void load(const ScanSetting& a, Slot<T>& s, const View& first, const View& second,
          const View& third, bool coded) {
  const Unit& u = s.unit;
  const bool compact = a.carry && a.mask.data, pieces = u.last - u.first > 1;
  s.coded = coded;
  s.in_first = s.first;
  s.in_second = s.second;
  s.n = 0;
  int64_t piece = 0;
  for_runs(a, u, u.run, [&](const Run& run) {
    const int64_t n = run.end - run.begin, at = s.n;
    const bool in_place = !a.mask.data && (!pieces || a.offsets.data);
    const auto read = [&](const View& v, T* buffer) -> const T* {
      if (!v.data) return static_cast<const T*>(memset(buffer + at, 0, n * sizeof(T)));
      const T* from = read_tile(v, run.row, run.begin, n, buffer + at);
      if (from == buffer + at || in_place) return from;
      return static_cast<const T*>(memcpy(buffer + at, from, n * sizeof(T)));
    };
    const T *r = read(first, s.first), *v = read(second, s.second);
    if (in_place) s.in_first = r, s.in_second = v;
    if (third.data)
      memmove(s.third + at, read_tile(third, run.row, run.begin, n, s.third + at), n * sizeof(T));
    if (coded) read_codes(a, run.row, run.begin, n, s.code + at);

    if (pieces && !a.offsets.data) s.ends[piece++] = static_cast<int32_t>(at + n);
    if (pieces && a.offsets.data) {
      const Sequences sequences = sequences_of(a);
      for (; piece < u.last - u.first; ++piece)
        s.ends[piece] = static_cast<int32_t>(sequences[u.first + piece].end - run.begin);
    }
    s.n += n;
    if (compact) {
      const uint8_t* live = s.code + at;
      const int64_t found = count_live(live, n);
      s.n = at + found;
      if (pieces && !a.offsets.data) s.ends[piece - 1] = static_cast<int32_t>(s.n);
      if (found == n) return;
      if (pieces && a.offsets.data)
        for (int64_t i = 0, begin = 0, steps = 0; i < piece; ++i) {
          steps += count_live(live + begin, s.ends[i] - begin);
          begin = s.ends[i];
          s.ends[i] = static_cast<int32_t>(steps);
        }
      compress(s.first + at, live, n);
      compress(s.second + at, live, n);
      if (third.data) compress(s.third + at, live, n);
      compress(s.code + at, live, n);
    } else if (a.mask.data) {
      for (int64_t i = at; i < at + n; ++i) {
        s.first[i] = s.code[i] ? s.first[i] : T(0);
        s.second[i] = s.code[i] ? s.second[i] : T(0);
      }
    }
  });
  if (!pieces) s.ends[0] = static_cast<int32_t>(s.n);
}

// Writes value(i) for every live step i of the unit to a contiguous output, and 0 elsewhere.
template <class T, class Value>
PPOK_INLINE void write(const ScanSetting& a, const Slot<T>& s, const View& view, Value&& value) {
  if (!view.data) return;
  const Unit& u = s.unit;
  T* out = static_cast<T*>(view.data) + output_position(a, u);
  const int64_t leading = u.run.begin - u.outer.begin, trailing = u.outer.end - u.run.end;
  memset(out, 0, leading * sizeof(T));
  out += leading;
  if (!a.mask.data) {
    for (int64_t i = 0; i < s.n; ++i) out[i] = static_cast<T>(value(i));
    out += s.n;
  } else if (!a.carry) {
    for (int64_t i = 0; i < s.n; ++i) {
      const T x = static_cast<T>(value(i));
      out[i] = s.code[i] & kLive ? x : T(0);
    }
    out += s.n;
  } else {
    int64_t step = 0;
    for_runs(a, u, u.run, [&](const Run& run) {
      uint8_t live[kChunk];
      const int64_t n = run.end - run.begin;
      read_live(a.mask, run.row, run.begin, n, live);
      expand(out, live, n, [&](int64_t i) { return value(step + i); });
      step += count_live(live, n);
      out += n;
    });
  }
  memset(out, 0, trailing * sizeof(T));
}

// ---- the chains ---------------------------------------------------------------------------------

// Fills the coefficients, if some are 0: at the ends of sequences, and where a code cuts them - a
// step's own (kReverse), or that of the step before.
template <bool kReverse, class T>
void set_coefficients(const ScanSetting& a, Slot<T>& s, const uint8_t* cutting) {
  s.offset = kReverse ? kChunk - s.n : 0;
  const int64_t pieces = s.unit.last - s.unit.first;
  s.cut = pieces > 1;
  for (int chain = 0; chain < a.chains; ++chain)
    s.cut |= a.gamma * lambda_of(a, chain, s.unit.first) == 0.;
  uint8_t any = 0;
  for (int64_t i = 0; s.coded && i < s.n; ++i) any |= cutting[i];
  any &= kCut;
  s.cut |= any != 0;
  if (!s.cut) return;
  for (int chain = 0; chain < a.chains; ++chain) {
    double* coefficient = s.coefficient[chain] + s.offset;
    for (int64_t piece = 0, begin = 0; piece < pieces; begin = s.ends[piece++]) {
      const double c = a.gamma * lambda_of(a, chain, s.unit.first + piece);
      const int64_t end = s.ends[piece];
      if (any)
        for (int64_t i = begin; i < end; ++i) coefficient[i] = cutting[i] & kCut ? 0. : c;
      else
        for (int64_t i = begin; i < end; ++i) coefficient[i] = c;
      if (begin < end && pieces > 1) coefficient[kReverse ? end - 1 : begin] = 0.;
    }
  }
}

template <bool kReverse, bool kCuts, class T>
void scan(Slot<T>* slots, int chain, const double* c, int64_t n) {
  double x[kWays] = {};
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = kReverse ? kChunk - 1 - j : j;
    for (int k = 0; k < kWays; ++k) {
      double* at = slots[k].x[chain] + i;
      if (kCuts)
        x[k] = scan_step(slots[k].coefficient[chain][i], x[k], *at);
      else
        x[k] = mul_add(c[k], x[k], *at);
      *at = x[k];
    }
  }
}

// c^1, c^2, ... from the end the scan starts at.
template <bool kReverse>
struct Powers {
  double c = 0.;
  double table[kChunk];

  const double* of(double coefficient) {
    if (c == coefficient) return table;
    c = coefficient;
    constexpr int kStep = 8;
    double power[kStep], stride = 1.;
    for (int k = 0; k < kStep; ++k) power[k] = stride = stride * c;
    for (int64_t j = 0; j < kChunk; j += kStep)
      for (int k = 0; k < kStep; ++k) {
        table[kReverse ? kChunk - 1 - j - k : j + k] = power[k];
        power[k] = clamp_power(power[k] * stride);
      }
    return table;
  }
};

// ---- advantages and returns ---------------------------------------------------------------------

template <class T>
struct Forward {
  static constexpr bool kReverse = true;
  const ScanForward& a;

  bool skips_masked() const { return a.setting.carry || a.setting.truncate || !a.bootstrap.data; }

  // The value of the step after the last one of this piece.
  double value_after(const Unit& u, int64_t piece) const {
    const ScanSetting& g = a.setting;
    const Run run = written(g, u, piece);
    if (u.neighbour >= 0) {
      const bool none = !a.values.data || !is_live(g.mask, run.row, u.neighbour);
      return none ? 0. : read_one<double>(a.values, run.row, u.neighbour);
    }
    if (!a.bootstrap.data || run.begin == run.end) return 0.;
    if (g.truncate && !is_live(g.mask, run.row, run.end - 1)) return 0.;
    return read_one<double>(a.bootstrap, 0, u.first + piece);
  }

  void load_unit(Slot<T>& s) const {
    const ScanSetting& g = a.setting;
    const int64_t pieces = s.unit.last - s.unit.first;
    const bool coded = g.mask.data || g.terminated.data || g.truncated.data || g.gamma == 0.;
    load(g, s, a.rewards, a.values, a.next_values, coded);
    double* delta = s.x[0] + kChunk - s.n;
    const T *r = s.in_first, *v = s.in_second;
    T after[kChunk];  // the value of what follows each step
    for (int64_t i = 0; i + 1 < s.n; ++i) after[i] = v[i + 1];
    for (int64_t piece = 0, begin = 0; piece < pieces; begin = s.ends[piece++]) {
      const int64_t end = s.ends[piece];
      if (begin < end) after[end - 1] = static_cast<T>(value_after(s.unit, piece));
    }
    if (a.next_values.data)
      for (int64_t i = 0; i < s.n; ++i) after[i] = s.code[i] & kTruncated ? s.third[i] : after[i];
    if (coded)
      for (int64_t i = 0; i < s.n; ++i) after[i] = s.code[i] & kTerminated ? T(0) : after[i];
    for (int64_t i = 0; i < s.n; ++i) delta[i] = td_error(r[i], v[i], after[i], g.gamma);
    set_coefficients<kReverse>(g, s, s.code);
    if (g.chains == 2) memcpy(s.x[1] + kChunk - s.n, delta, s.n * sizeof(double));
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
  static constexpr bool kReverse = false;
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
    write(g, s, a.grad_values, [&](int64_t i) { return s.in_second[i] - d[i] + through[i]; });
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

// ---- the drive ----------------------------------------------------------------------------------

// Scans up to kWays units side by side from zero.
template <class T, class Op>
void scan_units(const Op& op, Slot<T>* slots, int count) {
  constexpr bool kReverse = Op::kReverse;
  const ScanSetting& g = op.a.setting;
  int64_t longest = 0;
  bool cut = false;
  for (int k = 0; k < count; ++k) {
    op.load_unit(slots[k]);
    longest = slots[k].n > longest ? slots[k].n : longest;
    cut |= slots[k].cut;
  }
  for (int chain = 0; chain < g.chains; ++chain) {
    double c[kWays] = {};
    for (int k = 0; k < kWays; ++k) {  // shorter chunks, and unused slots, end in zeros
      Slot<T>& s = slots[k];
      const int64_t n = k < count ? s.n : 0, from = kReverse ? kChunk - longest : n;
      memset(s.x[chain] + from, 0, (longest - n) * sizeof(double));
      if (k < count) c[k] = g.gamma * lambda_of(g, chain, s.unit.first);
      if (!cut) continue;
      memset(s.coefficient[chain] + from, 0, (longest - n) * sizeof(double));
      if (n && !s.cut)
        for (int64_t i = s.offset; i < s.offset + n; ++i) s.coefficient[chain][i] = c[k];
    }
    if (cut)
      scan<kReverse, true>(slots, chain, c, longest);
    else
      scan<kReverse, false>(slots, chain, c, longest);
  }
}

// The last step of the scan, and the power of c by which a carry reaches it (0: it does not).
template <bool kReverse, class T>
void summarize(const ScanSetting& g, Slot<T>& s, Powers<kReverse>* powers, Unit& u) {
  for (int chain = 0; chain < g.chains; ++chain) {
    const int64_t last = kReverse ? s.offset : s.n - 1;
    bool cut = false;
    if (s.cut)
      for (int64_t i = s.offset; i < s.offset + s.n; ++i) cut |= s.coefficient[chain][i] == 0.;
    u.local[chain] = s.n ? s.x[chain][last] : 0.;
    u.factor[chain] = !s.n  ? 1.
                      : cut ? 0.
                            : powers[chain].of(g.gamma * lambda_of(g, chain, u.first))[last];
  }
}

// Adds what the neighbouring chunk carries into this one, up to the first cut.
template <bool kReverse, class T>
void complete(const ScanSetting& g, Slot<T>& s, Powers<kReverse>* powers) {
  for (int chain = 0; chain < g.chains; ++chain) {
    int64_t begin = s.offset, end = s.offset + s.n;
    const double c = g.gamma * lambda_of(g, chain, s.unit.first), carry = s.unit.carry[chain];
    const double* coefficient = s.coefficient[chain];
    for (int64_t i = end; s.cut && i > begin; --i)
      if (coefficient[i - 1] == 0.) (kReverse ? begin : end) = kReverse ? i : i - 1;
    if (begin >= end) continue;
    const double* power = powers[chain].of(c);
    double* x = s.x[chain];
    for (int64_t i = begin; i < end; ++i) x[i] = mul_add(power[i], carry, x[i]);
  }
}

// Whole sequences, one after the other.
template <class T, class Op>
void run_sequences(const Op& op, int64_t first, int64_t end) {
  constexpr bool kReverse = Op::kReverse;
  const ScanSetting& g = op.a.setting;
  Slot<T> slots[kWays];
  Powers<kReverse> powers[kChains];
  Walker<kReverse> walker(g, op.skips_masked(), first, end);
  double carry[kChains] = {};
  for (;;) {
    int count = 0;
    while (count < kWays && walker.next(slots[count].unit)) ++count;
    if (!count) return;
    scan_units(op, slots, count);
    for (int k = 0; k < count; ++k) {
      Slot<T>& s = slots[k];
      if (s.unit.neighbour >= 0) {
        memcpy(s.unit.carry, carry, sizeof(carry));
        complete<kReverse>(g, s, powers);
      }
      if (s.n)
        for (int chain = 0; chain < g.chains; ++chain)
          carry[chain] = s.x[chain][kReverse ? s.offset : s.n - 1];
      op.store_unit(s);
    }
  }
}

// Few long sequences: every chunk is scanned for what it hands on, the carries follow, then every
// chunk again.
template <class T, class Op>
bool run_chunks(const Op& op, int threads) {
  constexpr bool kReverse = Op::kReverse;
  const ScanSetting& g = op.a.setting;
  int64_t total = 0, room = 3 * g.rows * g.cols / kChunk + 2 * g.sequences + 4;
  Unit* units = static_cast<Unit*>(malloc(room * sizeof(Unit)));
  if (!units) return false;
  Walker<kReverse> walker(g, op.skips_masked(), 0, g.sequences);
  while (walker.next(units[total])) ++total;
  const int64_t groups = (total + kWays - 1) / kWays;

#pragma omp parallel num_threads(threads)
  {
    Slot<T> slots[kWays];
    Powers<kReverse> powers[kChains];
    const auto scan_group = [&](int64_t group) {
      const int64_t from = group * kWays;
      const int count = static_cast<int>(total - from < kWays ? total - from : kWays);
      for (int k = 0; k < count; ++k) slots[k].unit = units[from + k];
      scan_units(op, slots, count);
      return count;
    };
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const int count = scan_group(group);
      for (int k = 0; k < count; ++k)
        summarize<kReverse>(g, slots[k], powers, units[group * kWays + k]);
    }
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
    for (int64_t group = 0; group < groups; ++group) {
      const int count = scan_group(group);
      for (int k = 0; k < count; ++k) {
        if (slots[k].unit.neighbour >= 0) complete<kReverse>(g, slots[k], powers);
        op.store_unit(slots[k]);
      }
    }
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

bool in_unit_interval(const View& lams, int64_t n) {
  for (int64_t i = 0; lams.data && i < n; ++i) {
    const double lam = read_one<double>(lams, 0, i);
    if (!(lam >= 0. && lam <= 1.)) return false;
  }
  return true;
}

template <class T, class Op>
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
  if (threads > 1 && 4 * threads * busiest > 7 * g.rows * g.cols && run_chunks<T>(op, threads))
    return;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t)
    run_sequences<T>(op, share(g, t, threads), share(g, t + 1, threads));
}

Fault bad_setting(const ScanSetting& g) {
  if (!sequences_of(g).valid()) return {kBadOffsets, 0};
  if (!in_unit_interval(g.lams, g.sequences) || !in_unit_interval(g.value_lams, g.sequences))
    return {kBadLambda, 0};
  return {kNoFault, 0};
}

}  // namespace

Fault scan_forward(const ScanForward& a) {
  const Fault fault = bad_setting(a.setting);
  if (fault.kind != kNoFault) return fault;
  const View& out = a.advantages.data ? a.advantages : a.returns;
  if (out.dtype == kF64)
    drive<double>(Forward<double>{a});
  else
    drive<float>(Forward<float>{a});
  return fault;
}

Fault scan_backward(const ScanBackward& a) {
  const View& grad = a.grad_advantages.data ? a.grad_advantages : a.grad_returns;
  if (grad.dtype == kF64)
    drive<double>(Backward<double>{a});
  else
    drive<float>(Backward<float>{a});
  return {kNoFault, 0};
}

}  // namespace PPOK_ISA
}  // namespace ppok
