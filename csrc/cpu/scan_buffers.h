// The steps of one unit, gathered: whatever the mask, the flags, the strides and dtypes, a scan
// sees contiguous numbers, and what it made of them goes back to where they came from.
#pragma once
#include "cpu/scan_units.h"

namespace ppok {
namespace PPOK_ISA {
namespace {  // of each op's file alone: what one file calls once is inlined

// x and coefficient hold n steps at `offset`, aligned to the end the scan starts from; the rest is
// in order from 0.
template <class T>
struct alignas(64) Slot {
  double x[kChains][kChunk], coefficient[kChains][kChunk];
  T first[2 * kChunk], second[2 * kChunk], third[2 * kChunk];
  uint8_t code[2 * kChunk];
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
      read_live_codes(a.mask, run.row, run.begin, n, live);
      expand(out, live, n, [&](int64_t i) { return value(step + i); });
      step += count_live(live, n);
      out += n;
    });
  }
  memset(out, 0, trailing * sizeof(T));
}

// Fills the coefficients, if some are 0: where a code cuts them - a step's own (kReverse), or that
// of the step before.
template <bool kReverse, class T>
void set_coefficients(const ScanSetting& a, Slot<T>& s, const uint8_t* cutting) {
  s.offset = kReverse ? kChunk - s.n : 0;
  const int64_t pieces = s.unit.last - s.unit.first;
  uint8_t any = 0;
  for (int64_t i = 0; s.coded && i < s.n; ++i) any |= cutting[i];
  any &= kCut;
  s.cut = any != 0;
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int chain = 0; chain < a.chains; ++chain)
      s.cut |= a.gamma * lambda_of(a, chain, s.unit.first + piece) == 0.;
  if (!s.cut) return;
  for (int chain = 0; chain < a.chains; ++chain) {
    double* coefficient = s.coefficient[chain] + s.offset;
    for (int64_t piece = 0, begin = 0; piece < pieces; begin = s.ends[piece++]) {
      const double c = a.gamma * lambda_of(a, chain, s.unit.first + piece);
      if (any)
        for (int64_t i = begin; i < s.ends[piece]; ++i) coefficient[i] = cutting[i] & kCut ? 0. : c;
      else
        for (int64_t i = begin; i < s.ends[piece]; ++i) coefficient[i] = c;
    }
  }
}

}  // namespace
}  // namespace PPOK_ISA
}  // namespace ppok
