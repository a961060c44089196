// One OS thread of the emulator, and the threads of the block that runs on it.
//
// runtime/ is never compiled with a sanitizer: what ThreadSanitizer is to know of the order of
// things is said explicitly, so that the scheduling itself orders nothing.
#pragma once
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../cuda_emulator.h"
#include "fiber.h"

namespace emulator {

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Where a thread stopped: an operation and its line.
struct Stop {
  const char* what = "";
  Where where = {};

  bool operator==(const Stop& other) const {
    return where.line() == other.where.line() && same(what, other.what) &&
           same(where.file_name(), other.where.file_name());
  }
  static bool same(const char* a, const char* b) { return a == b || !strcmp(a, b); }
  std::string str() const {
    return text("%s, %s:%u", what, where.file_name(), unsigned(where.line()));
  }
};

class Worker;

// One launch.
struct Grid {
  const int64_t blocks;
  const int threads;
  const size_t shared_bytes;
  const Body body;
  void* const closure;
  const int workers;
  std::atomic<int> started = 0;  // workers

  std::atomic_flag lock = {};  // of what is below; orders nothing for ThreadSanitizer
  int64_t changes = 0;
  std::vector<Worker*> active = {};
};

// What a lane brings to a warp operation.
struct Offer {
  unsigned mask;
  void (*complete)(Worker&, unsigned group);  // run once, when all of the mask have come
  const void* value = nullptr;
  void* result = nullptr;
  size_t bytes = 0;
  int source = 0;  // of a shuffle
};

struct Warp {
  unsigned live, runnable, polling, offering;  // lanes; a live one in none of the rest runs or is
                                               // at a barrier
  Offer offer[32];
  char before[32], after[32];  // what a __syncwarp orders
};

struct Thread {
  Fiber fiber;
  Stop stop;
};

class Worker {
 public:
  static constexpr int kMostThreads = Stacks::kMost;
  static constexpr size_t kMostShared = 256 << 10;
  static constexpr int kMostArrays = 64;

  Worker();
  void serve(Grid& grid, int first);  // runs block `first`, and others
  static Worker* current();           // of the kernel's thread that calls
  std::string describe() const;

  // Called by a thread of the block.
  int barrier(Stop stop, bool predicate);
  void meet(Stop stop, const Offer& offer);
  void sync_warp(Stop stop, unsigned mask);
  void interleave();  // shuffled: another thread or block may run first
  void look(const void* p, uint64_t value, Stop stop);
  void pause(Stop stop);
  void* shared(const SharedArray& array, size_t bytes);
  void* dynamic_shared() { return arrays_[0].begin; }
  void* block_fence() { return &fence_; }

  // Of the warp that runs.
  Warp& warp() { return warps_[warp_]; }
  const Stop& stop_of(int lane) const { return threads_[warp_ * 32 + lane]->stop; }

  std::atomic<Grid*> grid = nullptr;  // null while there is none to serve
  std::atomic<uint64_t> switches = 0;

 private:
  struct Array {
    const SharedArray* declared;  // null: dynamic
    char* begin;
    size_t bytes;
  };
  struct Seen {
    const void* p;
    uint64_t value;
  };

  void run_block(int64_t index);
  void create_threads();
  void run_thread();
  void exit_thread();
  void go_on();
  int pick();
  int choose(unsigned bits);
  unsigned random();
  void complete_if_all_came(int lane);
  void progress();
  bool livelocked();
  void* add_array(const SharedArray* declared, size_t bytes);
  void check_red_zones() const;
  std::string state_of(int thread) const;

  // Threads. A warp is ready if a lane is runnable.
  Fiber base_;
  Stacks stacks_;
  std::vector<std::unique_ptr<Thread>> threads_;
  Warp warps_[kMostThreads / 32] = {};
  unsigned ready_ = 0, polling_ = 0;  // warps
  int thread_ = 0, warp_ = 0, live_ = 0;
  int64_t block_ = 0;
  uint64_t random_ = 1;

  // The barrier.
  Stop barrier_;
  int arrived_ = 0, true_ = 0, true_at_last_ = 0, phase_ = 0;

  // Shared memory.
  char* const arena_;
  size_t arena_used_ = 0, shared_used_ = 0;
  int array_count_ = 0;
  Array arrays_[kMostArrays];  // the first one is dynamic

  // Looks at what another block may write.
  Seen seen_[256] = {};
  int64_t in_vain_ = 0, stuck_since_ = 0, confirmed_ = 0;
  bool stuck_ = false;

  char start_, end_, fence_, barriers_[2];  // what they order
};

// Says what is wrong and where the worker's threads are; ends the process.
[[noreturn]] void fail(const Worker* worker, const std::string& message);

}  // namespace emulator
