// Launches, and the functions that cuda_emulator.h declares.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <mutex>
#include <thread>

#include "worker.h"

namespace emulator {

namespace {

// Workers live as long as the process: ending them when a library is unloaded or the process exits
// could only go wrong.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;
    if (pool->process_ != getpid()) pool = new Pool;  // a fork has its memory but not its threads
    return *pool;
  }

  void run(Grid& grid) {
    std::unique_lock one_at_a_time(launching_);
    std::unique_lock lock(mutex_);
    while (int(workers_.size()) < grid.workers) add_worker();
    for (int i = 0; i < grid.workers; ++i) {
      grid.active.push_back(workers_[i]);
      workers_[i]->grid = &grid;
    }
    running_ = grid.workers;
    work_.notify_all();
    std::vector<Watch> watches(grid.workers);
    while (!done_.wait_for(lock, std::chrono::seconds(1), [&] { return running_ == 0; }))
      for (int i = 0; i < grid.workers; ++i) watch(*workers_[i], watches[i]);
  }

 private:
  struct Watch {
    uint64_t switches = 0;
    int seconds = 0;
  };

  static void watch(const Worker& worker, Watch& watch) {
    const uint64_t before = std::exchange(watch.switches, worker.switches);
    const bool moved = before != watch.switches || !worker.grid.load();
    watch.seconds = moved ? 0 : watch.seconds + 1;
    if (config.hang_seconds && watch.seconds >= config.hang_seconds)
      fail(&worker, text("hang: a thread runs for %d s already", watch.seconds));
  }

  void add_worker() {
    const int first = workers_.size();
    Worker* worker = workers_.emplace_back(new Worker);
    std::thread([this, worker, first] {
      std::unique_lock lock(mutex_);
      for (;;) {
        work_.wait(lock, [&] { return worker->grid.load(); });
        lock.unlock();
        worker->serve(*worker->grid, first);
        lock.lock();
        worker->grid = nullptr;
        if (--running_ == 0) done_.notify_one();
      }
    }).detach();
  }

  const pid_t process_ = getpid();
  std::mutex launching_, mutex_;
  std::condition_variable work_, done_;
  std::vector<Worker*> workers_;
  int running_ = 0;
};

int lowest(unsigned bits) { return std::countr_zero(bits); }

void complete_shuffle(Worker& worker, unsigned group) {
  const Offer* offer = worker.warp().offer;
  for (unsigned rest = group; rest; rest &= rest - 1) {
    const int lane = lowest(rest), source = offer[lane].source;
    if (!(group >> source & 1))
      fail(&worker,
           text("%s: lane %d reads lane %d, which %s", worker.stop_of(lane).str().c_str(), lane,
                source, offer[lane].mask >> source & 1 ? "does not run" : "is not in the mask"));
    // Of constant sizes: a call of memcpy would be seen by ThreadSanitizer.
    if (offer[lane].bytes == 2) memcpy(offer[lane].result, offer[source].value, 2);
    if (offer[lane].bytes == 4) memcpy(offer[lane].result, offer[source].value, 4);
    if (offer[lane].bytes == 8) memcpy(offer[lane].result, offer[source].value, 8);
  }
}

void complete_gather(Worker& worker, unsigned group) {
  const Offer* offer = worker.warp().offer;
  Gathered all{group, {}};
  for (unsigned rest = group; rest; rest &= rest - 1)
    all.value[lowest(rest)] = *static_cast<const uint64_t*>(offer[lowest(rest)].value);
  for (unsigned rest = group; rest; rest &= rest - 1)
    *static_cast<Gathered*>(offer[lowest(rest)].result) = all;
}

Worker& worker(Stop stop) {
  if (!Worker::current()) fail(nullptr, stop.str() + ": outside of a kernel");
  return *Worker::current();
}

}  // namespace

const char* run(int64_t blocks, int threads, size_t shared_bytes, Body body, void* closure) {
  if (Worker::current()) fail(Worker::current(), "a launch inside a kernel");
  if (threads < 1 || threads > Worker::kMostThreads || blocks < 1 || blocks > INT32_MAX)
    return "invalid configuration argument";
  if (shared_bytes > config.shared_bytes) return "invalid argument";
  const int workers = std::min<int64_t>(config.resident_blocks, blocks);
  Grid grid{blocks, threads, shared_bytes, body, closure, workers};
  Pool::instance().run(grid);
  return nullptr;
}

int barrier(const char* what, bool predicate, Where where) {
  return worker({what, where}).barrier({what, where}, predicate);
}

void sync_warp(unsigned mask, Where where) {
  worker({"__syncwarp", where}).sync_warp({"__syncwarp", where}, mask);
}

void shuffle(const char* what, unsigned mask, const void* value, void* result, size_t bytes,
             int source, Where where) {
  worker({what, where}).meet({what, where}, {mask, complete_shuffle, value, result, bytes, source});
}

Gathered gather(const char* what, unsigned mask, uint64_t value, Where where) {
  Gathered all;
  worker({what, where}).meet({what, where}, {mask, complete_gather, &value, &all});
  return all;
}

void fence(bool of_device) {
  static char device_fence;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  void* order = of_device ? &device_fence : worker({"__threadfence_block"}).block_fence();
  acquire(order);
  release(order);
}

void interleave() {
  if (Worker::current()) Worker::current()->interleave();
}

void look(const void* p, uint64_t value, const char* what, Where where) {
  worker({what, where}).look(p, value, {what, where});
}

void pause(const char* what, Where where) { worker({what, where}).pause({what, where}); }

void* shared(const SharedArray& array, size_t bytes) {
  return worker({"a shared array"}).shared(array, bytes);
}

void* dynamic_shared() { return worker({"dynamic_shared"}).dynamic_shared(); }

void require_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail(Worker::current(), text("%p is not aligned to the %zu bytes accessed there", p, bytes));
}

void fail(Where where, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  fail(Worker::current(), Stop{message, where}.str());
}

}  // namespace emulator
