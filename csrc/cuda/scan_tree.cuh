// The steps of a sequence as the leaves of a tree of which every node has 32 children, and what is
// carried to a step from all steps scanned before it.
//
// A step has a coordinate in its sequence, which grows in the direction of the scan. A node of
// level l is the run of steps whose coordinates are in [32^l i, 32^l (i + 1)), as far as the
// sequence has them. Its transfer is combined from its children's by doubling distances; what is
// carried to a coordinate is that of the largest whole nodes before it, level by level downwards.
// So every result has one association, that its coordinate gives: nothing depends on how the steps
// are cut into tiles, on which tile is done first, or on what else is in the batch.
//
// A node is of use only if its sequence goes on behind it. Ends of such nodes of one level are at
// least 32^l steps apart, also between sequences, so a node's slot is its last step's position
// / 32^l. The tile with a node's last step publishes it; all that it waits for ended in tiles drawn
// before it.
#pragma once
#include "cuda/block.cuh"
#include "math/scan.h"

namespace ppok {
namespace PPOK_ISA {

constexpr int kFan = kWarp, kFanBits = 5;
static_assert(kFan == 1 << kFanBits, "a node has as many children as a warp lanes");

PPOK_HD inline int64_t node_steps(int level) { return int64_t{1} << kFanBits * level; }

// One sequence in the order of the scan: its coordinates, and what a coordinate's position in the
// batch is more.
struct Coordinates {
  int64_t begin, end, shift;
};

template <int kChains>
struct Tree {
  unsigned* ready;  // of each slot, 0 or 1
  Transfer* transfers;
  int64_t steps;  // of the batch
  int levels;     // with nodes behind which a sequence goes on

  // Before those of this level.
  PPOK_HD int64_t slots(int level) const {
    int64_t count = 0;
    for (int below = 1; below < level; ++below) count += (steps >> kFanBits * below) + 1;
    return count;
  }

  // Of the node that ends before `boundary`.
  __device__ int64_t slot(int level, int64_t boundary, int64_t shift) const {
    return slots(level) + ((boundary - 1 + shift) >> kFanBits * level);
  }

  __device__ void publish(int64_t slot, const Transfer (&node)[kChains]) const {
    for (int chain = 0; chain < kChains; ++chain) transfers[slot * kChains + chain] = node[chain];
    store_release(ready + slot, 1u);
  }

  // For each lane the child of that number, out of the first `count` children of the node that
  // begins at `parent`, joined with those before it. All of the warp.
  __device__ void join_children(int level, int64_t parent, int count, const Coordinates& in,
                                Transfer (&node)[kChains]) const {
    const int lane = threadIdx.x % kWarp;
    const int64_t end = parent + (lane + 1) * node_steps(level);
    for (int chain = 0; chain < kChains; ++chain) node[chain] = {0., 1.};
    if (lane < count && end > in.begin) {
      const int64_t from = slot(level, end, in.shift);
      while (!load_acquire(ready + from)) spin_pause();
      for (int chain = 0; chain < kChains; ++chain) node[chain] = transfers[from * kChains + chain];
    }
    for (int chain = 0; chain < kChains; ++chain)
      for (int distance = 1; distance < kFan; distance *= 2) {
        const Transfer earlier = {__shfl_up_sync(kWholeWarp, node[chain].sum, distance),
                                  __shfl_up_sync(kWholeWarp, node[chain].factor, distance)};
        if (lane >= distance) node[chain] = joined(earlier, node[chain]);
      }
  }

  // Publishes the nodes from level 2 up that end before `boundary`. All of the warp.
  __device__ void finish_nodes(int64_t boundary, const Coordinates& in) const {
    for (int level = 2; boundary % node_steps(level) == 0; ++level) {
      Transfer node[kChains];
      join_children(level - 1, boundary - node_steps(level), kFan, in, node);
      if (threadIdx.x % kWarp == kFan - 1) publish(slot(level, boundary, in.shift), node);
    }
  }

  // What is carried to the beginning of a node of level 2. All of the warp.
  __device__ void carry_to(int64_t boundary, const Coordinates& in,
                           double (&carry)[kChains]) const {
    for (int chain = 0; chain < kChains; ++chain) carry[chain] = 0.;
    for (int level = levels; level >= 2; --level) {
      const int64_t parent = boundary & -node_steps(level + 1);
      const int count = static_cast<int>((boundary - parent) >> kFanBits * level);
      if (count == 0 || parent + count * node_steps(level) <= in.begin) continue;
      Transfer node[kChains];
      join_children(level, parent, count, in, node);
      for (int chain = 0; chain < kChains; ++chain) {
        const double sum = __shfl_sync(kWholeWarp, node[chain].sum, count - 1),
                     factor = __shfl_sync(kWholeWarp, node[chain].factor, count - 1);
        carry[chain] = scan_step(factor, carry[chain], sum);
      }
    }
  }
};

}  // namespace PPOK_ISA
}  // namespace ppok
