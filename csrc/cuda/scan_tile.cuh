// One launch of a scan: blocks draw tiles, tiles look back at nodes of a tree. What a step adds and
// what is written of it is an op's.
//
// Blocks draw tiles of 2048 steps in the order of the scan. In a tile one thread scans the steps of
// a node of level 1 (see scan_tree.cuh), once for what the node hands on, and once more with what
// is carried to it. A tile also reads the steps before it, fewer than 32, that complete its first
// node.
//
// An op says how many chains it scans, in which direction, and whether each step has a coefficient
// of its own (kVarying); it gives the numbers that a step adds to each chain, and that coefficient.
#pragma once
#include "cuda/launchers.h"
#include "cuda/scan_steps.cuh"
#include "cuda/scan_tree.cuh"

namespace ppok {
namespace PPOK_ISA {
namespace {

PPOK_HD inline const ScanSetting& setting_of(const ScanForward& a) { return a.setting; }
PPOK_HD inline const ScanSetting& setting_of(const ScanBackward& a) { return a.setting; }
PPOK_HD inline const ScanSetting& setting_of(const VTrace& a) { return a.scan.setting; }

// Beside the bits of StepCode: nothing is carried to this step.
constexpr unsigned kCutHere = 8;

// A step's place: its number in the order of the tokens, its sequence, its coordinate there.
struct Place {
  int64_t step, sequence, coordinate;
  Coordinates in;

  __device__ bool first() const { return coordinate == in.begin; }
  __device__ bool last() const { return coordinate == in.end - 1; }
  // Something is carried into the node that begins here.
  __device__ bool carried_to() const { return coordinate % kFan == 0 && !first(); }
};

// From the last step to the first, coordinates end at 0: the first step is the last of a whole
// node.
template <bool kReverse>
__device__ Place place_of(const Steps& steps, int64_t position, int64_t low, int64_t high) {
  Place p;
  p.step = kReverse ? steps.count() - 1 - position : position;
  p.sequence = steps.find(p.step, low, high);
  const int64_t begin = steps.first_step(p.sequence), end = steps.first_step(p.sequence + 1);
  p.coordinate = kReverse ? begin - 1 - p.step : p.step - begin;
  p.in = {kReverse ? begin - end : 0, kReverse ? 0 : end - begin, position - p.coordinate};
  return p;
}

// ---- one tile -----------------------------------------------------------------------------------

constexpr int kMostSteps = kTile + kFan - 1;
constexpr int kNodes = kMostSteps / kFan + 2;  // that something may be carried to
constexpr int kParents = kMostSteps / kFan / kFan + 2;
// Of step i in shared memory: threads that go through different nodes meet in no bank.
__device__ constexpr int padded(int i) { return i + i / kFan; }
constexpr int kPadded = kMostSteps + kMostSteps / kFan + 1;
using PerStep = double[kPadded];
using PerNode = double[kNodes];

// A node of level 1, as far as it is in the tile: 12 bits for its first step, 6 for its length.
struct Node {
  int first, steps;
  bool carried_to, handed_on;

  __device__ static unsigned pack(int first, int64_t steps, bool carried_to, bool handed_on) {
    return first | static_cast<unsigned>(steps) << 12 | carried_to << 18 | handed_on << 19;
  }
  __device__ explicit Node(unsigned packed)
      : first(packed & 4095),
        steps(packed >> 12 & 63),
        carried_to(packed >> 18 & 1),
        handed_on(packed >> 19 & 1) {}
};

template <class Op>
class Tile {
 public:
  static constexpr int kChains = Op::kChains;
  static constexpr int kNumbers = kChains + Op::kVarying;

  struct Shared {
    PerStep* x;      // of each chain; last, if they vary, the coefficients
    PerNode* carry;  // to the node that begins at step i, at i / kFan
    uint8_t* code;
    unsigned* nodes;
    int16_t *carried, *ended;  // steps that begin such a node; that end one of level 2
    int* count;
  };

  __device__ Tile(const Op& op, const Tree<kChains>& tree, const Shared& shared, int64_t begin,
                  int64_t low, int64_t high)
      : op_(op), steps_(op.steps), tree_(tree), s_(shared), low_(low), high_(high) {
    const Place p = place(begin);
    const int64_t into = p.coordinate & (kFan - 1), before = p.coordinate - p.in.begin;
    own_ = static_cast<int>(min(into, before));
    begin_ = begin - own_;
    size_ = static_cast<int>(min(begin + kTile, steps_.count()) - begin_);
  }

  // What every step adds, where nodes begin, and which wait for what.
  __device__ void load(int64_t* fault) {
    for (int i = threadIdx.x; i < kNodes; i += kThreads) s_.carried[i] = -1;
    if (threadIdx.x < kParents) s_.ended[threadIdx.x] = -1;
    if (threadIdx.x == 0) *s_.count = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < size_; i += kThreads) {
      const Place p = place(begin_ + i);
      double numbers[kNumbers];
      const unsigned code = op_.load(p, numbers);
      for (int n = 0; n < kNumbers; ++n) s_.x[n][padded(i)] = numbers[n];
      s_.code[padded(i)] = static_cast<uint8_t>(code);
      if (i >= own_) op_.report_lambdas(p, fault);
      if (p.carried_to() && is_first_of_parent(p, i))
        s_.carried[i / kFan] = static_cast<int16_t>(i);
      if (i >= own_ && (p.coordinate + 1) % node_steps(2) == 0 && !p.last())
        s_.ended[i / (kFan * kFan)] = static_cast<int16_t>(i);
      if (p.first() || p.carried_to()) {
        const int64_t left = min(p.in.end - p.coordinate, int64_t{size_ - i});
        const int64_t n = min(kFan - (p.coordinate & (kFan - 1)), left), end = p.coordinate + n;
        const bool handed_on = end % kFan == 0 && end < p.in.end;
        s_.nodes[atomicAdd(s_.count, 1)] = Node::pack(i, n, p.carried_to(), handed_on);
      }
    }
    __syncthreads();
  }

  // The transfers of the nodes of level 1 that end in the tile and hand something on.
  __device__ void publish_nodes() {
    for (int n = threadIdx.x; n < *s_.count; n += kThreads) {
      const Node node(s_.nodes[n]);
      if (!node.handed_on) continue;
      double c[kChains];
      coefficients(node, c);
      Transfer all[kChains];
      for (int chain = 0; chain < kChains; ++chain) all[chain] = {0., 1.};
      for (int i = padded(node.first), left = node.steps; left; --left, i = next(i))
        for (int chain = 0; chain < kChains; ++chain)
          all[chain] = joined(all[chain], {s_.x[chain][i], coefficient(i, c[chain])});
      tree_.publish((begin_ + node.first + node.steps - 1) >> kFanBits, all);
    }
    __syncwarp();  // before a lane waits for another; other warps publish whatever this one does
  }

  // The nodes above that end in the tile, then what is carried to those of level 1.
  __device__ void carry() {
    const int warp = threadIdx.x / kWarp;
    static_assert(kParents <= kWarps, "one each: they wait for each other");
    if (warp < kParents && s_.ended[warp] >= 0) {
      const Place p = place(begin_ + s_.ended[warp]);
      tree_.finish_nodes(p.coordinate + 1, p.in);
    }
    for (int i = warp; i < kNodes; i += kWarps)
      if (s_.carried[i] >= 0) carry_to(s_.carried[i]);
    __syncthreads();
  }

  // Every step, given what is carried to its node.
  __device__ void finish_steps() {
    for (int n = threadIdx.x; n < *s_.count; n += kThreads) {
      const Node node(s_.nodes[n]);
      double c[kChains], x[kChains];
      coefficients(node, c);
      for (int chain = 0; chain < kChains; ++chain)
        x[chain] = node.carried_to ? s_.carry[chain][node.first / kFan] : 0.;
      for (int i = padded(node.first), left = node.steps; left; --left, i = next(i))
        for (int chain = 0; chain < kChains; ++chain)
          s_.x[chain][i] = x[chain] = scan_step(coefficient(i, c[chain]), x[chain], s_.x[chain][i]);
    }
    __syncthreads();
  }

  __device__ void store() const {
    for (int i = own_ + threadIdx.x; i < size_; i += kThreads) {
      const Place p = place(begin_ + i);
      double x[kChains], before[kChains];
      for (int chain = 0; chain < kChains; ++chain) {
        x[chain] = s_.x[chain][padded(i)];
        before[chain] = p.carried_to() ? s_.carry[chain][i / kFan]
                        : p.first()    ? 0.
                                       : s_.x[chain][padded(i - 1)];
      }
      op_.store(p, s_.code[padded(i)], x, before);
    }
  }

 private:
  __device__ Place place(int64_t position) const {
    return place_of<Op::kReverse>(steps_, position, low_, high_);
  }
  __device__ static int next(int i) { return i + 1 + ((i + 2) % (kFan + 1) == 0); }

  // Of the nodes of one parent that something is carried to, the tile's first.
  __device__ static bool is_first_of_parent(const Place& p, int i) {
    return i < kFan || p.coordinate % node_steps(2) == 0 || p.coordinate - kFan <= p.in.begin;
  }

  // Of all steps of a node, if they do not vary.
  __device__ void coefficients(const Node& node, double (&c)[kChains]) const {
    const int64_t sequence = place(begin_ + node.first).sequence;
    for (int chain = 0; chain < kChains; ++chain) c[chain] = steps_.coefficient(chain, sequence);
  }
  __device__ double coefficient(int i, double of_node) const {
    if (s_.code[i] & kCutHere) return 0.;
    return Op::kVarying ? s_.x[kNumbers - 1][i] : of_node;
  }

  // To the node that begins at step i, and those after it that have the same parent. All of the
  // warp.
  __device__ void carry_to(int i) {
    const Place p = place(begin_ + i);
    const int64_t parent = p.coordinate & -node_steps(2);
    const int64_t last = min(p.in.end, p.coordinate + size_ - i) - 1;  // in the tile
    const int first_child = static_cast<int>(p.coordinate - parent) / kFan;
    const int last_child = static_cast<int>(min(last - parent, node_steps(2) - 1)) / kFan;
    double to_parent[kChains];
    tree_.carry_to(parent, p.in, to_parent);
    Transfer children[kChains];
    tree_.join_children(1, parent, last_child, p.in, children);
    const int child = threadIdx.x % kWarp;
    for (int chain = 0; chain < kChains; ++chain) {
      const Transfer before = {__shfl_up_sync(kWholeWarp, children[chain].sum, 1),
                               __shfl_up_sync(kWholeWarp, children[chain].factor, 1)};
      if (child < first_child || child > last_child) continue;
      s_.carry[chain][(i + (child - first_child) * kFan) / kFan] =
          child ? scan_step(before.factor, to_parent[chain], before.sum) : to_parent[chain];
    }
  }

  const Op& op_;
  const Steps& steps_;
  const Tree<kChains>& tree_;
  const Shared s_;
  const int64_t low_, high_;  // its sequences
  int64_t begin_;             // position of its step 0
  int own_, size_;            // its own steps are [own_, size_)
};

// ---- kernel -------------------------------------------------------------------------------------

template <class Op>
__device__ void scan_tile(const typename Op::Args& a, const Plan& plan,
                          const Tree<Op::kChains>& tree, int64_t tile, int64_t* fault) {
  constexpr int kChains = Op::kChains;
  PPOK_SHARED(PerStep, x, Tile<Op>::kNumbers);
  PPOK_SHARED(PerNode, carry, kChains);
  PPOK_SHARED(uint8_t, code, kPadded);
  PPOK_SHARED(unsigned, nodes, kMostSteps);
  PPOK_SHARED(int16_t, carried, kNodes);
  PPOK_SHARED(int16_t, ended, kParents);
  PPOK_SHARED(int, count, 1);
  PPOK_SHARED(int64_t, sequences, 2);

  const Steps steps(setting_of(a), plan, plan.live.data ? *plan.listed : plan.tokens);
  const int64_t begin = tile * kTile, last = min(begin + kTile, steps.count()) - 1;
  if (begin > last) return;
  const int warp = threadIdx.x / kWarp;
  if (warp < 2) {
    const int64_t position = warp ? last : begin;
    const int64_t sequence = steps.find(Op::kReverse ? steps.count() - 1 - position : position);
    if (threadIdx.x % kWarp == 0) sequences[warp] = sequence;
  }
  __syncthreads();
  const int64_t low = sequences[Op::kReverse], high = sequences[!Op::kReverse];
  const Op op{a, steps};
  Tile<Op> of(op, tree,
              {reinterpret_cast<double (*)[kPadded]>(x),
               reinterpret_cast<double (*)[kNodes]>(carry), code, nodes, carried, ended, count},
              begin, low, high);
  of.load(fault);
  of.publish_nodes();
  of.carry();
  of.finish_steps();
  of.store();
}

// A tile of a stage waits only for tiles that were drawn before it, so blocks may run in any order
// and number.
// Of a multiprocessor; as many as share its memory under two chains. Left to itself, the compiler
// spills registers to make room for more.
constexpr int kResident = 4;

template <class Op>
__global__ void __launch_bounds__(kThreads, kResident)
    scan(const typename Op::Args a, const Plan plan, const Tree<Op::kChains> tree, int64_t* fault) {
  PPOK_SHARED(unsigned, drawn, 1);
  if (threadIdx.x == 0) drawn[0] = atomicAdd(&plan.progress->ticket, 1u);
  __syncthreads();
  int64_t tile = drawn[0];
  if (tile < plan.offset_tiles) {
    check_offsets(setting_of(a), plan, tile, fault);
    return done(plan);
  }
  tile -= plan.offset_tiles;
  if (tile < plan.list_tiles) {
    await_done(plan, plan.offset_tiles);
    list_live(setting_of(a), plan, tile, [&](int64_t token) { Op::clear(a, token); });
    return done(plan);
  }
  await_done(plan, plan.offset_tiles + plan.list_tiles);
  scan_tile<Op>(a, plan, tree, tile - plan.list_tiles, fault);
}

// ---- launchers ----------------------------------------------------------------------------------

int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// Where everything is in the workspace; `zeroed` bytes at its beginning are to be zeros.
template <int kChains>
struct Workspace {
  Plan plan{};
  Tree<kChains> tree{};
  int64_t bytes = 0, zeroed = 0;

  Workspace(const ScanSetting& g, void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {
    plan.tokens = g.rows * g.cols;
    const bool lists = g.carry && g.mask.data;
    plan.offset_tiles = g.offsets.data ? tiles_of(g.sequences + 1) : 0;
    plan.list_tiles = lists ? tiles_of(plan.tokens) : 0;
    plan.scan_tiles = tiles_of(plan.tokens);
    tree.steps = plan.tokens;
    while (node_steps(tree.levels + 1) < g.cols) ++tree.levels;
    const int64_t slots = tree.slots(tree.levels + 1);

    plan.progress = take<Progress>(1);
    tree.ready = take<unsigned>(slots);
    if (lists) plan.counts = take<uint64_t>(plan.list_tiles);
    zeroed = bytes;
    tree.transfers = take<Transfer>(slots * kChains);
    if (!lists) return;
    plan.live.wide = plan.tokens > UINT32_MAX;
    plan.live.data = take<char>(plan.tokens * (plan.live.wide ? 8 : 4));
    plan.starts = take<int64_t>(g.sequences + 1);
    plan.listed = take<int64_t>(1);
  }

 private:
  template <class T>
  T* take(int64_t n) {
    constexpr int64_t kAlign = 16;
    T* taken = reinterpret_cast<T*>(memory_ + bytes);
    bytes += (n * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    return taken;
  }
  uintptr_t memory_;
};

template <class Args>
int64_t workspace_bytes(const Args& a) {
  const ScanSetting& g = setting_of(a);
  return g.chains == 2 ? Workspace<2>(g, nullptr).bytes : Workspace<1>(g, nullptr).bytes;
}

template <class Op>
const char* run(const typename Op::Args& a, const Launch& to) {
  const Workspace<Op::kChains> w(setting_of(a), to.workspace);
  if (to.workspace_bytes < w.bytes) return "the workspace is too small";
  if (w.plan.tokens == 0) return nullptr;
  if (const char* error = clear(to.workspace, w.zeroed, to.stream)) return error;
  const int64_t blocks = w.plan.offset_tiles + w.plan.list_tiles + w.plan.scan_tiles;
  return launch(scan<Op>, blocks, kThreads, 0, to.stream, a, w.plan, w.tree, to.fault);
}

}  // namespace
}  // namespace PPOK_ISA
}  // namespace ppok
