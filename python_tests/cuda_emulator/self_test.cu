// self_test: that the emulator computes what CUDA defines, in every schedule.
// self_test NAME: runs a planted bug, as configured by the environment; fails if its result is
// wrong.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "planted.cuh"

namespace {

using namespace planted;
using emulator::Order;

void check(bool good, const char* what, int line) {
  if (good) return;
  fprintf(stderr, "self_test.cu:%d: wrong: %s\n", line, what);
  exit(1);
}
#define CHECK(condition) check(condition, #condition, __LINE__)

template <class Kernel, class... A>
void run(Kernel kernel, int64_t blocks, int threads, size_t shared_bytes, A... args) {
  const char* error = launch(kernel, blocks, threads, shared_bytes, nullptr, args...);
  if (error) fprintf(stderr, "launch: %s\n", error), exit(1);
}

// ---- the planted kernels, which are right without a bug -----------------------------------------

// Small integers: their sums are exact in any order.
std::vector<float> numbers(int n) {
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = i * 7 % 16;
  return x;
}

bool means_are_right(Bug bug) {
  const int rows = 8, n = 300;
  const auto x = numbers(rows * n);
  std::vector<float> y(rows);
  const size_t dynamic = bug == kTooMuchShared ? emulator::config.shared_bytes - 1024 : 0;
  run(mean_of_rows, rows, kThreads, dynamic, x.data(), y.data(), n, bug);
  bool right = true;
  for (int row = 0; row < rows; ++row) {
    float sum = 0.f;
    for (int i = 0; i < n; ++i) sum += x[row * n + i];
    right &= y[row] == sum / n;
  }
  return right;
}

bool prefix_sums_are_right(Bug bug) {
  const int count = 24, n = count * kThreads;
  const auto x = numbers(n);
  std::vector<float> y(n);
  std::vector<Tile> tiles(count);
  std::vector<unsigned> ticket(1);
  run(prefix_sums, count, kThreads, 0, x.data(), y.data(), tiles.data(), ticket.data(), bug);
  bool right = true;
  float sum = 0.f;
  for (int i = 0; i < n; ++i) right &= y[i] == (sum += x[i]);
  return right;
}

bool total_is_right(Bug bug) {
  const int blocks = 12;
  const auto x = numbers(blocks * kThreads);
  std::vector<float> sums(blocks), y(1);
  std::vector<unsigned> done(1);
  run(total, blocks, kThreads, 0, x.data(), sums.data(), done.data(), y.data(), bug);
  float sum = 0.f;
  for (float v : x) sum += v;
  return y[0] == sum;
}

bool reverse_warps_is_right(Bug bug) {
  const int n = 2 * kThreads;
  const auto x = numbers(n);
  std::vector<float> y(n);
  run(reverse_warps, 2, kThreads, kThreads * sizeof(float), x.data(), y.data(), bug);
  bool right = true;
  for (int i = 0; i < n; ++i) right &= y[i] == x[i / 32 * 32 + 31 - i % 32];
  return right;
}

struct Plant {
  const char* name;
  bool (*is_right)(Bug);
  Bug bug;
};
constexpr Plant kPlants[] = {
    {"missing_barrier", means_are_right, kMissingBarrier},
    {"reused_too_soon", means_are_right, kReusedTooSoon},
    {"different_barriers", means_are_right, kDifferentBarriers},
    {"early_exit", means_are_right, kEarlyExit},
    {"deadlock", means_are_right, kDeadlock},
    {"shared_write", means_are_right, kSharedWrite},
    {"shared_read", means_are_right, kSharedRead},
    {"global_read", means_are_right, kGlobalRead},
    {"misaligned", means_are_right, kMisaligned},
    {"half_width", means_are_right, kHalfWidth},
    {"odd_width", means_are_right, kOddWidth},
    {"divergent_mask", means_are_right, kDivergentMask},
    {"lane_outside_mask", means_are_right, kLaneOutsideMask},
    {"foreign_lane", means_are_right, kForeignLane},
    {"too_much_shared", means_are_right, kTooMuchShared},
    {"overflow", means_are_right, kOverflow},
    {"busy_wait", means_are_right, kBusyWait},
    {"static_tiles", prefix_sums_are_right, kStaticTiles},
    {"plain_flag", prefix_sums_are_right, kPlainFlag},
    {"relaxed_flag", prefix_sums_are_right, kRelaxedFlag},
    {"missing_fence", total_is_right, kMissingFence},
    {"missing_syncwarp", reverse_warps_is_right, kMissingSyncwarp},
    {"shuffle_for_syncwarp", reverse_warps_is_right, kShuffleForSyncwarp},
    {"dynamic_write", reverse_warps_is_right, kDynamicWrite},
};

// ---- shuffles, votes and reductions against their definitions -----------------------------------

struct Shuffled {
  int indexed, up, down, crossed;
};

__global__ void shuffle_all(Shuffled* out, int distance, int width) {
  const int value = 100 + threadIdx.x;
  out[threadIdx.x] = {
      __shfl_sync(~0u, value, distance, width), __shfl_up_sync(~0u, value, distance, width),
      __shfl_down_sync(~0u, value, distance, width), __shfl_xor_sync(~0u, value, distance, width)};
}

void test_shuffles() {
  const int threads = 64;
  std::vector<Shuffled> out(threads);
  for (int width = 1; width <= 32; width *= 2)
    for (int d = 0; d < 32; ++d) {
      run(shuffle_all, 1, threads, 0, out.data(), d, width);
      for (int i = 0; i < threads; ++i) {
        const int place = i % width, first = i - place, own = 100 + i;
        CHECK(out[i].indexed == 100 + first + d % width);
        CHECK(out[i].up == (place >= d ? own - d : own));
        CHECK(out[i].down == (place + d < width ? own + d : own));
        const int partner = (i & ~31) + ((i % 32) ^ d);
        CHECK(out[i].crossed == (partner / width <= i / width ? 100 + partner : own));
      }
    }
}

template <class T>
__global__ void shuffle_type(T* out) {
  const T value = T(float(threadIdx.x));
  out[threadIdx.x] = __shfl_xor_sync(~0u, value, 1);
}

template <class T>
void test_shuffled_type() {
  std::vector<T> out(32);
  run(shuffle_type<T>, 1, 32, 0, out.data());
  for (int i = 0; i < 32; ++i) CHECK(float(out[i]) == float(i ^ 1));
}

struct Votes {
  unsigned ballot, match_any, match_all, lanes;
  int any, all, all_equal;
  unsigned add, least, most, conjunction, disjunction, parity;
  int signed_add, signed_least, signed_most;
};

// Lanes of the mask and the others vote at the same time, each among themselves, while some may
// already wait for all.
__global__ void vote_all(const unsigned* values, unsigned mask, Votes* out) {
  const int i = threadIdx.x;
  const unsigned mine = mask >> i % 32 & 1 ? mask : ~mask, value = values[i];
  if (mine == mask) __syncwarp(mask);
  __syncwarp();
  Votes& v = out[i];
  v.ballot = __ballot_sync(mine, value & 1);
  v.any = __any_sync(mine, value & 1);
  v.all = __all_sync(mine, value & 1);
  v.match_any = __match_any_sync(mine, value);
  v.match_all = __match_all_sync(mine, value & 1, &v.all_equal);
  v.add = __reduce_add_sync(mine, value);
  v.least = __reduce_min_sync(mine, value);
  v.most = __reduce_max_sync(mine, value);
  v.conjunction = __reduce_and_sync(mine, value);
  v.disjunction = __reduce_or_sync(mine, value);
  v.parity = __reduce_xor_sync(mine, value);
  v.signed_add = __reduce_add_sync(mine, int(value));
  v.signed_least = __reduce_min_sync(mine, int(value));
  v.signed_most = __reduce_max_sync(mine, int(value));
}

void test_votes() {
  const int threads = 48;  // the second warp is half a warp
  uint64_t random = 1;
  for (unsigned mask : {~0u, 0x0000ffffu, 0x55555555u, 0x80000001u, 0x00010000u})
    for (unsigned range : {1u, 2u, 3u, ~0u}) {
      std::vector<unsigned> values(threads);
      std::vector<Votes> out(threads);
      for (unsigned& v : values) v = ((random = random * 6364136223846793005 + 1) >> 32) % range;
      if (range == 1) values[5] = 1;
      run(vote_all, 1, threads, 0, values.data(), mask, out.data());
      for (int i = 0; i < threads; ++i) {
        const unsigned mine = mask >> i % 32 & 1 ? mask : ~mask;
        Votes v{};
        v.any = v.signed_add = 0, v.all = v.all_equal = 1;
        v.least = v.conjunction = ~0u, v.signed_least = INT32_MAX, v.signed_most = INT32_MIN;
        for (int j = i / 32 * 32; j < threads && j < i / 32 * 32 + 32; ++j) {
          if (!(mine >> j % 32 & 1)) continue;
          const unsigned x = values[j], bit = 1u << j % 32;
          v.lanes |= bit;
          if (x & 1) v.ballot |= bit, v.any = 1;
          if (!(x & 1)) v.all = 0;
          if (x == values[i]) v.match_any |= bit;
          if ((x & 1) != (values[i] & 1)) v.all_equal = 0;
          v.add += x, v.conjunction &= x, v.disjunction |= x, v.parity ^= x;
          v.least = std::min(v.least, x), v.most = std::max(v.most, x);
          v.signed_add = int(unsigned(v.signed_add) + x);
          v.signed_least = std::min(v.signed_least, int(x));
          v.signed_most = std::max(v.signed_most, int(x));
        }
        if (v.all_equal) v.match_all = v.lanes;
        out[i].lanes = v.lanes;
        CHECK(memcmp(&v, &out[i], sizeof v) == 0);
      }
    }
}

// ---- barriers, atomics, indices, shared memory --------------------------------------------------

__global__ void count_at_barriers(int* out) {
  const int i = threadIdx.x;
  const bool good = __syncthreads_count(i % 3 == 0) == 32 && __syncthreads_or(i == 77) != 0 &&
                    __syncthreads_or(0) == 0 && __syncthreads_and(i < 95) == 0 &&
                    __syncthreads_and(i < 96) != 0;
  out[i] = good;
}

__global__ void write_indices(unsigned* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      threadIdx.x + 1000 * blockIdx.x + 100'000 * blockDim.x + 10'000'000 * gridDim.x;
}

__global__ void add_all(float* f, double* d, int* i, unsigned long long* u, int64_t* least) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(f, 1.f);
  atomicAdd(d, 0.5);
  atomicSub(i, 2);
  atomicMax(u, static_cast<unsigned long long>(n));
  atomic_min(least, -n);
}

// Every thread takes the lock in turn.
__global__ void add_under_lock(unsigned* lock, int* sum) {
  while (atomicCAS(lock, 0u, 1u) != 0u) {
  }
  __threadfence();
  *sum += 1;
  __threadfence();
  atomicExch(lock, 0u);
}

__global__ void read_fresh_shared(float* out) {
  PPOK_SHARED(float, fresh, 64);
  const float* dynamic = dynamic_shared<float>();
  out += 128 * blockIdx.x;
  out[threadIdx.x] = fresh[threadIdx.x];
  out[64 + threadIdx.x] = dynamic[threadIdx.x];
  __syncthreads();
  fresh[threadIdx.x] = 0.f;
}

__global__ void leave_early(int* out, int stay) {
  if (int(threadIdx.x) >= stay) return;
  out[threadIdx.x] = __popc(__ballot_sync(~0u, 1));
}

void test_block() {
  std::vector<int> flags(96);
  run(count_at_barriers, 1, 96, 0, flags.data());
  for (int flag : flags) CHECK(flag);

  std::vector<unsigned> indices(5 * 70);
  run(write_indices, 5, 70, 0, indices.data());
  for (unsigned i = 0; i < indices.size(); ++i)
    CHECK(indices[i] == i % 70 + 1000 * (i / 70) + 7'000'000 + 50'000'000);

  float f = 0;
  double d = 0;
  int i = 0;
  unsigned long long u = 0;
  int64_t least = 0;
  run(add_all, 10, 100, 0, &f, &d, &i, &u, &least);
  CHECK(f == 1000 && d == 500 && i == -2000 && u == 999 && least == -999);

  unsigned lock = 0;
  int sum = 0;
  run(add_under_lock, 6, 40, 0, &lock, &sum);
  CHECK(sum == 240);

  std::vector<float> fresh(10 * 128);
  run(read_fresh_shared, 10, 64, 64 * sizeof(float), fresh.data());
  for (float v : fresh) CHECK(v != v);

  std::vector<int> ballots(40);
  run(leave_early, 1, 64, 0, ballots.data(), 40);  // lanes that have exited are not waited for
  for (int n = 0; n < 40; ++n) CHECK(ballots[n] == (n < 32 ? 32 : 8));
}

// ---- launches, schedules and settings -----------------------------------------------------------

__global__ void log_order(int* log, int* count, int times) {
  for (int i = 0; i < times; ++i) log[atomicAdd(count, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

std::vector<int> order_of(int blocks, int threads, int times = 1) {
  std::vector<int> log(blocks * threads * times);
  int count = 0;
  run(log_order, blocks, threads, 0, log.data(), &count, times);
  return log;
}

void test_orders() {
  emulator::config.resident_blocks = 1;
  emulator::config.block_order = Order::kForward;
  emulator::config.thread_order = Order::kForward;
  std::vector<int> forward(192);
  for (int i = 0; i < 192; ++i) forward[i] = i;
  CHECK(order_of(2, 96) == forward);
  emulator::config.block_order = emulator::config.thread_order = Order::kReversed;
  CHECK(order_of(2, 96) == std::vector<int>(forward.rbegin(), forward.rend()));
  emulator::config.thread_order = Order::kShuffled;
  emulator::config.seed = 1;
  const auto first = order_of(2, 96);
  CHECK(first != forward && first == order_of(2, 96));
  emulator::config.seed = 2;
  CHECK(first != order_of(2, 96));
  int changes = 0;  // of the thread, from one atomic operation to the next
  const auto twice = order_of(1, 96, 2);
  for (int i = 0; i < 191; ++i) changes += twice[i] != twice[i + 1];
  CHECK(changes > 96);
  emulator::config = {};
}

void test_launches() {
  int* none = nullptr;
  CHECK(launch(log_order, 0, 32, 0, nullptr, none, none, 1) == nullptr);
  for (int threads : {0, 1025}) CHECK(launch(log_order, 1, threads, 0, nullptr, none, none, 1));
  CHECK(launch(log_order, -1, 32, 0, nullptr, none, none, 1));
  CHECK(launch(log_order, int64_t{1} << 31, 32, 0, nullptr, none, none, 1));
  CHECK(launch(log_order, 1, 32, emulator::config.shared_bytes + 1, nullptr, none, none, 1));
  CHECK(order_of(1, 1024).size() == 1024);
  for (int i = 0; i < 1000; ++i) order_of(1 + i % 7, 1 + i % 65);
}

// Blocks take turns; all the others wait.
__global__ void take_turns(uint32_t* turn, uint32_t* log, int rounds) {
  for (int i = 0; i < rounds; ++i) {
    const uint32_t mine = i * gridDim.x + blockIdx.x;
    while (load_acquire(turn) != mine) spin_pause();
    log[mine] = blockIdx.x;
    store_release(turn, mine + 1);
  }
}

// A wait that ends is no livelock, when as many looks are enough for one as a turn of its loop has.
void test_waits() {
  const int blocks = 4, rounds = 2000;
  for (int limit : {2, 3, 10}) {
    uint32_t turn = 0;
    std::vector<uint32_t> log(blocks * rounds);
    emulator::config.poll_limit = limit;
    run(take_turns, blocks, 1, 0, &turn, log.data(), rounds);
    for (int i = 0; i < blocks * rounds; ++i) CHECK(log[i] == uint32_t(i % blocks));
  }
  emulator::config = {};
}

void test_settings() {
  using emulator::configure;
  CHECK(configure("thread_order", "shuffled") && emulator::config.thread_order == Order::kShuffled);
  CHECK(configure("block_order", "reversed") && emulator::config.block_order == Order::kReversed);
  CHECK(configure("resident_blocks", "7") && emulator::config.resident_blocks == 7);
  for (const char* bad : {"0", "-1", "7x", "", "many"}) CHECK(!configure("resident_blocks", bad));
  CHECK(!configure("block_order", "shuffled") && !configure("blocks", "7"));
  CHECK(emulator::config.resident_blocks == 7);
  emulator::config = {};
}

void test_all() {
  test_settings();
  test_orders();
  test_launches();
  test_waits();
  test_shuffled_type<double>();
  test_shuffled_type<float>();
  test_shuffled_type<__half>();
  test_shuffled_type<__nv_bfloat16>();
  for (Order threads : {Order::kForward, Order::kReversed, Order::kShuffled})
    for (Order blocks : {Order::kForward, Order::kReversed})
      for (int resident : {1, 2, 4}) {
        emulator::config.thread_order = threads;
        emulator::config.block_order = blocks;
        emulator::config.resident_blocks = resident;
        for (const Plant& plant : kPlants) CHECK(plant.is_right(kNone));
        test_block();
        if (resident == 1) test_votes();
      }
  test_shuffles();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    test_all();
    puts("right");
    return 0;
  }
  for (const Plant& plant : kPlants)
    if (!strcmp(plant.name, argv[1])) {
      // Earlier blocks with more shared memory: theirs is not that of the next.
      std::vector<float> fresh(8 * 128);
      run(read_fresh_shared, 8, 64, 1024, fresh.data());
      const bool right = plant.is_right(plant.bug);
      puts(right ? "right" : "wrong result");
      return !right;
    }
  fprintf(stderr, "no bug is called %s\n", argv[1]);
  return 2;
}
