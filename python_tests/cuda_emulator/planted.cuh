// Kernels with bugs planted in them, one at a time, which the emulator has to notice. kNone: right.
#pragma once
#include "cuda/device.cuh"

namespace planted {

using namespace ppok;

enum Bug {
  kNone,
  // mean_of_rows
  kMissingBarrier,
  kReusedTooSoon,
  kDifferentBarriers,
  kEarlyExit,
  kDeadlock,
  kSharedWrite,
  kSharedRead,
  kGlobalRead,
  kMisaligned,
  kHalfWidth,
  kOddWidth,
  kDivergentMask,
  kLaneOutsideMask,
  kForeignLane,
  kTooMuchShared,
  kOverflow,
  kBusyWait,
  // prefix_sums
  kStaticTiles,
  kPlainFlag,
  kRelaxedFlag,
  // total
  kMissingFence,
  // reverse_warps
  kMissingSyncwarp,
  kShuffleForSyncwarp,
  kDynamicWrite,
};

constexpr int kThreads = 64, kWarps = kThreads / 32;

__device__ inline float warp_sum(float x, Bug bug) {
  const int width = bug == kHalfWidth ? 16 : bug == kOddWidth ? 24 : 32;
  for (int distance = width / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(~0u, x, distance, width);
  return x;
}

__device__ inline float block_sum(float x, Bug bug) {
  PPOK_SHARED(float, sums, kWarps);
  const int warp = threadIdx.x / 32;
  x = warp_sum(x, bug);
  if (threadIdx.x % 32 == 0) sums[bug == kSharedWrite ? warp + 1 : warp] = x;
  if (bug == kDeadlock && threadIdx.x % 32 < 16) __syncwarp();
  if (bug == kDifferentBarriers && warp == 1)
    __syncthreads();
  else if (bug != kMissingBarrier)
    __syncthreads();
  const float* all = sums;
  float sum = 0.f;
  for (int w = 0; w < kWarps + (bug == kSharedRead); ++w) sum += all[w];
  return sum;
}

// y[row] = mean of x[row, :]. A block per row of n elements, n a multiple of 4.
__global__ void __launch_bounds__(kThreads) mean_of_rows(const float* x, float* y, int n, Bug bug) {
  const float* row = x + static_cast<int64_t>(blockIdx.x) * n + (bug == kMisaligned);
  float sum = 0.f, count = 0.f;
  for (int i = 4 * threadIdx.x; i < n + (bug == kGlobalRead); i += 4 * kThreads) {
    const Vector<float, 4> v = load_streaming<float, 4>(row + i);
    sum += (v[0] + v[1]) + (v[2] + v[3]);
    count += 4.f;
  }
  if (bug == kDivergentMask) __syncwarp(threadIdx.x % 32 < 16 ? 0x0001ffffu : ~0u);
  if (bug == kLaneOutsideMask) __syncwarp(0x0000ffffu);
  if (bug == kForeignLane && threadIdx.x < 16) sum += __shfl_xor_sync(0x0000ffffu, sum, 16);
  if (bug == kOverflow) sum += n * (1 << 30);
  if (bug == kBusyWait)
    for (const volatile float* p = row; *p == *p;) {
    }
  if (bug == kTooMuchShared) {
    PPOK_SHARED(float, more, 1024);
    more[threadIdx.x] = sum;
  }
  if (bug == kEarlyExit && threadIdx.x >= 32) return;
  sum = block_sum(sum, bug);
  if (bug == kReusedTooSoon)
    __syncwarp();
  else
    __syncthreads();
  count = block_sum(count, bug);
  if (threadIdx.x == 0) y[blockIdx.x] = sum / count;
}

struct Tile {
  uint32_t state;  // what of the rest is there
  float sum, prefix;
};
enum : uint32_t { kNothing, kSum, kPrefix };

// y = inclusive prefix sums of x, in one pass that looks back. A block per kThreads elements.
__global__ void __launch_bounds__(kThreads)
    prefix_sums(const float* x, float* y, Tile* tiles, unsigned* ticket, Bug bug) {
  PPOK_SHARED(unsigned, drawn, 1);
  PPOK_SHARED(float, sums, kWarps);
  PPOK_SHARED(float, before, 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) drawn[0] = bug == kStaticTiles ? blockIdx.x : atomicAdd(ticket, 1u);
  __syncthreads();
  const unsigned tile = drawn[0];
  const int64_t i = static_cast<int64_t>(tile) * kThreads + threadIdx.x;
  float sum = x[i];
  for (int distance = 1; distance < 32; distance *= 2) {
    const float other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    Tile& mine = tiles[tile];
    float all = 0.f, earlier = 0.f;
    for (int w = 0; w < kWarps; ++w) all += sums[w];
    mine.sum = all;
    if (bug == kPlainFlag)
      mine.state = kSum;
    else if (bug == kRelaxedFlag)
      atomicExch(&mine.state, uint32_t(kSum));
    else
      store_release(&mine.state, uint32_t(kSum));
    for (unsigned t = tile; t-- > 0;) {
      uint32_t state;
      while ((state = load_acquire(&tiles[t].state)) == kNothing) spin_pause();
      if (state == kPrefix) {
        earlier += tiles[t].prefix;
        break;
      }
      earlier += tiles[t].sum;
    }
    mine.prefix = earlier + all;
    store_release(&mine.state, uint32_t(kPrefix));
    before[0] = earlier;
  }
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += sums[w];
  y[i] = before[0] + sum;
}

// y = sum of x, by the block that comes last. A block per kThreads elements.
__global__ void __launch_bounds__(kThreads)
    total(const float* x, float* sums, unsigned* done, float* y, Bug bug) {
  PPOK_SHARED(unsigned, before, 1);
  const float sum = block_sum(x[blockIdx.x * kThreads + threadIdx.x], kNone);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    if (bug != kMissingFence) __threadfence();
    before[0] = atomicAdd(done, 1u);
  }
  __syncthreads();
  if (before[0] != gridDim.x - 1 || threadIdx.x > 0) return;
  __threadfence();
  float all = 0.f;
  for (unsigned block = 0; block < gridDim.x; ++block) all += sums[block];
  *y = all;
}

// y = x with each 32 elements in reverse, through dynamic shared memory of a float a thread.
__global__ void __launch_bounds__(kThreads) reverse_warps(const float* x, float* y, Bug bug) {
  float* buffer = dynamic_shared<float>();
  const int i = blockIdx.x * kThreads + threadIdx.x, lane = threadIdx.x % 32;
  buffer[threadIdx.x + (bug == kDynamicWrite)] = x[i];
  if (bug == kShuffleForSyncwarp)
    __shfl_sync(~0u, lane, 0);
  else if (bug != kMissingSyncwarp)
    __syncwarp();
  y[i] = buffer[threadIdx.x - lane + 31 - lane];
}

}  // namespace planted
