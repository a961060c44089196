#include "worker.h"

#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace emulator {

constinit thread_local Indices indices{};

namespace {

constinit thread_local Worker* self __attribute__((tls_model("initial-exec"))) = nullptr;

constexpr size_t kMostStatic = 48 << 10, kArena = 2 * Worker::kMostShared, kRedZone = 64;

class SpinLock {
 public:
  explicit SpinLock(std::atomic_flag& flag) : flag_(flag) {
    while (flag_.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  }
  ~SpinLock() { flag_.clear(std::memory_order_release); }

 private:
  std::atomic_flag& flag_;
};

unsigned bit(int i) { return 1u << i; }
int lowest(unsigned bits) { return std::countr_zero(bits); }
size_t round16(size_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

std::string text(const char* format, ...) {
  char line[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

void fail(const Worker* worker, const std::string& message) {
  static std::atomic_flag failing;
  if (failing.test_and_set())
    for (;;) ::pause();  // another thread is about to abort
  fprintf(stderr, "cuda emulator: %s\n%s", message.c_str(),
          worker ? worker->describe().c_str() : "");
  abort();
}

Worker::Worker() : arena_(static_cast<char*>(aligned_alloc(128, kArena))) {
  poison(arena_, kArena);
}

Worker* Worker::current() { return self; }

// ---- who runs next ------------------------------------------------------------------------------

unsigned Worker::random() {  // 32 bits; xorshift64
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_ >> 32;
}

int Worker::choose(unsigned bits) {
  if (config.thread_order == Order::kForward) return lowest(bits);
  if (config.thread_order == Order::kReversed) return 31 - std::countl_zero(bits);
  const int first = random() % 32;
  return (first + lowest(std::rotr(bits, first))) % 32;
}

// The next thread, -1 if all have exited. Unless shuffled, a warp runs until all its lanes wait for
// another one: as far from lockstep as can be, which shows most races.
int Worker::pick() {
  while (!ready_) {
    if (live_ == 0) return -1;
    if (!polling_) {
      thread_ = -1;  // waits too
      fail(this, "deadlock: every thread of a block waits for another");
    }
    for (unsigned rest = polling_; rest; rest &= rest - 1) {
      Warp& warp = warps_[lowest(rest)];
      warp.runnable = std::exchange(warp.polling, 0);
    }
    ready_ = std::exchange(polling_, 0);
    std::this_thread::yield();
  }
  if (config.thread_order == Order::kShuffled || !(ready_ & bit(warp_))) warp_ = choose(ready_);
  const int lane = choose(warp().runnable);
  warp().runnable &= ~bit(lane);
  if (!warp().runnable) ready_ &= ~bit(warp_);
  return warp_ * 32 + lane;
}

// Lets the next thread run; returns when this one is the next.
void Worker::go_on() {
  switches.store(switches.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  const int me = thread_, next = pick();
  if (next == me) return;
  indices.thread.x = thread_ = next;
  threads_[me]->fiber.switch_to(next < 0 ? base_ : threads_[next]->fiber);
}

void Worker::interleave() {
  if (config.thread_order != Order::kShuffled) return;
  const unsigned dice = random();
  if (dice & 1) std::this_thread::yield();
  if (dice & 2) return;
  warp().runnable |= bit(lane());
  ready_ |= bit(warp_);
  go_on();
}

void Worker::run_thread() {
  acquire(&start_);
  const Grid& launch = *grid;
  launch.body(launch.closure);
  release(&end_);
  exit_thread();
  go_on();
}

void Worker::exit_thread() {
  if (arrived_) fail(this, "a thread exits while others wait in " + barrier_.str());
  warp().live &= ~bit(lane());
  --live_;
  progress();
  for (unsigned rest = warp().offering; rest; rest &= warp().offering & (rest - 1))
    complete_if_all_came(lowest(rest));
}

// ---- barriers and warp operations ---------------------------------------------------------------

int Worker::barrier(Stop stop, bool predicate) {
  threads_[thread_]->stop = stop;
  if (live_ != grid.load()->threads)
    fail(this, stop.str() + " is reached after threads of the block have exited");
  if (arrived_ && !(barrier_ == stop))
    fail(this, "a block meets in different barriers: " + barrier_.str() + " and " + stop.str());
  barrier_ = stop;
  // Two in turn: who is late to leave must not be ordered after what others have done since.
  void* order = &barriers_[phase_ % 2];
  release(order);
  true_ += predicate;
  if (++arrived_ == live_) {
    arrived_ = 0;
    true_at_last_ = std::exchange(true_, 0);
    ++phase_;
    for (int w = 0; w * 32 < live_; ++w) {
      warps_[w].runnable = warps_[w].live;
      ready_ |= bit(w);
    }
  }
  go_on();
  acquire(order);
  return true_at_last_;
}

void Worker::meet(Stop stop, const Offer& offer) {
  const int me = lane();
  threads_[thread_]->stop = stop;
  if (!(offer.mask & bit(me)))
    fail(this,
         text("%s: lane %d is not in its own mask, %08x", stop.str().c_str(), me, offer.mask));
  warp().offer[me] = offer;
  warp().offering |= bit(me);
  complete_if_all_came(me);
  go_on();
}

// A warp operation is done when all lanes of the mask that have not exited have come to it; until
// then they may be in another one, among fewer.
void Worker::complete_if_all_came(int lane) {
  const Offer& offer = warp().offer[lane];
  const unsigned group = offer.mask & warp().live;
  if ((warp().offering & group) != group) return;
  for (unsigned rest = group; rest; rest &= rest - 1) {
    const int other = lowest(rest);
    if (warp().offer[other].mask != offer.mask || !(stop_of(other) == stop_of(lane))) return;
  }
  offer.complete(*this, group);
  warp().offering &= ~group;
  warp().runnable |= group;
  ready_ |= bit(warp_);
}

void Worker::sync_warp(Stop stop, unsigned mask) {
  const int me = lane();
  release(&warp().before[me]);
  const auto order = [](Worker& worker, unsigned group) {
    Warp& warp = worker.warp();
    for (unsigned rest = group; rest; rest &= rest - 1) acquire(&warp.before[lowest(rest)]);
    for (unsigned rest = group; rest; rest &= rest - 1) release(&warp.after[lowest(rest)]);
  };
  meet(stop, {mask, order});
  acquire(&warp().after[me]);
}

// ---- waiting for other blocks -------------------------------------------------------------------

void Worker::look(const void* p, uint64_t value, Stop stop) {
  Seen& seen = seen_[reinterpret_cast<uintptr_t>(p) / 4 % std::size(seen_)];
  if (seen.p == p && seen.value == value) return pause(stop);
  seen = {p, value};
  progress();
}

void Worker::pause(Stop stop) {
  threads_[thread_]->stop = stop;
  if (++in_vain_ % config.poll_limit == 0 && livelocked())
    fail(this, "livelock: every block that runs waits for what none of them will write, in " +
                   stop.str());
  warp().polling |= bit(lane());
  polling_ |= bit(warp_);
  go_on();
}

void Worker::progress() {
  in_vain_ = 0;
  if (!stuck_) return;
  SpinLock lock(grid.load()->lock);
  stuck_ = false;
}

// After poll_limit looks in vain. A block is stuck after that many, and confirmed after as many
// again since the last other block got stuck, whose last deeds it may not have seen before.
bool Worker::livelocked() {
  Grid& launch = *grid;
  SpinLock lock(launch.lock);
  if (!stuck_) {
    stuck_ = true;
    confirmed_ = -1;
    ++launch.changes;
  } else if (stuck_since_ == launch.changes) {
    confirmed_ = launch.changes;
  }
  stuck_since_ = launch.changes;
  return std::all_of(launch.active.begin(), launch.active.end(), [&](const Worker* worker) {
    return worker->stuck_ && worker->confirmed_ == launch.changes;
  });
}

// ---- shared memory ------------------------------------------------------------------------------

// An array of NaN, with NaN behind it that nobody may touch.
void* Worker::add_array(const SharedArray* declared, size_t bytes) {
  char* begin = arena_ + arena_used_;
  char* end = begin + round16(bytes) + kRedZone;
  if (end > arena_ + kArena || array_count_ == kMostArrays) fail(this, "too many shared arrays");
  arena_used_ = end - arena_;
  shared_used_ += round16(bytes);
  unpoison(begin, bytes);
  // Volatile, lest it become a call of memset, which sanitizers see.
  for (volatile char* p = begin; p < end; p += 8) *reinterpret_cast<volatile int64_t*>(p) = -1;
  arrays_[array_count_++] = {declared, begin, bytes};
  return begin;
}

void* Worker::shared(const SharedArray& array, size_t bytes) {
  for (int i = 0; i < array_count_; ++i)
    if (arrays_[i].declared == &array) return arrays_[i].begin;
  const size_t dynamic = round16(grid.load()->shared_bytes), all = shared_used_ + round16(bytes);
  if (all - dynamic > kMostStatic || all > config.shared_bytes)
    fail(this, text("too much shared memory: %zu bytes, %zu of them dynamic, with '%s', %s:%d", all,
                    dynamic, array.name, array.file, array.line));
  return add_array(&array, bytes);
}

void Worker::check_red_zones() const {
  const char* end = arena_ + arena_used_;
  for (int i = array_count_; i-- > 0; end = arrays_[i].begin) {
    const auto [declared, begin, bytes] = arrays_[i];
    const char* touched = std::find_if(static_cast<const char*>(begin) + bytes, end,
                                       [](char c) { return c != '\xFF'; });
    if (touched == end) continue;
    const std::string array =
        declared ? text("shared memory '%s', %s:%d", declared->name, declared->file, declared->line)
                 : "dynamic shared memory";
    fail(this,
         text("out of bounds: byte %td was written in the %zu bytes of ", touched - begin, bytes) +
             array);
  }
}

// ---- blocks -------------------------------------------------------------------------------------

// Neighbouring blocks have different workers, and all workers begin together: for ThreadSanitizer,
// what one worker does is in order, and so is what it does before another one wakes up.
void Worker::serve(Grid& launch, int first) {
  self = this;
  base_.adopt_thread();
  create_threads();
  ++launch.started;
  while (launch.started < launch.workers) std::this_thread::yield();
  for (int64_t i = first; i < launch.blocks; i += launch.workers)
    run_block(config.block_order == Order::kForward ? i : launch.blocks - 1 - i);
  SpinLock lock(launch.lock);
  std::erase(launch.active, this);
  ++launch.changes;
}

void Worker::create_threads() {
  const int count = grid.load()->threads;
  stacks_.grow(count);
  for (int i = threads_.size(); i < count; ++i) {
    threads_.push_back(std::make_unique<Thread>());
    threads_[i]->fiber.create(stacks_.bottom(i), stacks_.bytes(i), [] {
      Fiber::started();
      for (;;) self->run_thread();  // of one block after another
    });
  }
}

void Worker::run_block(int64_t index) {
  const Grid& launch = *grid;
  block_ = index;
  indices.block.x = index;
  indices.block_size = dim3(launch.threads);
  indices.grid_size = dim3(launch.blocks);
  random_ = (config.seed + index + 1) * 0x9E3779B97F4A7C15;
  live_ = launch.threads;
  for (int w = 0; w * 32 < live_; ++w) {
    warps_[w].live = warps_[w].runnable = kAllLanes >> (32 - std::min(live_ - w * 32, 32));
    ready_ |= bit(w);
  }
  warp_ = choose(ready_);
  poison(arena_, arena_used_);
  arena_used_ = shared_used_ = 0;
  array_count_ = 0;
  add_array(nullptr, launch.shared_bytes);  // the dynamic one
  release(&start_);
  indices.thread.x = thread_ = pick();
  base_.switch_to(threads_[thread_]->fiber);
  acquire(&end_);
  check_red_zones();
}

std::string Worker::state_of(int thread) const {
  const Warp& warp = warps_[thread / 32];
  const unsigned lane = bit(thread % 32);
  if (thread == thread_) return "running";
  if (!(warp.live & lane)) return "exited";
  if (warp.runnable & lane) return "ready to run";
  const std::string where = threads_[thread]->stop.str();
  if (warp.polling & lane) return "looking again and again in " + where;
  if (!(warp.offering & lane)) return "waiting in " + where;
  return "waiting in " + where + text(", mask %08x", warp.offer[thread % 32].mask);
}

std::string Worker::describe() const {
  const Grid& launch = *grid;
  std::string lines = text("  block %lld of %lld, %d threads\n", (long long)block_,
                           (long long)launch.blocks, launch.threads);
  int left = 20;
  for (int first = 0, next; first < launch.threads && left-- > 0; first = next) {
    const std::string state = state_of(first);
    for (next = first + 1; next < launch.threads && state_of(next) == state;) ++next;
    lines += text("  threads %d to %d: ", first, next - 1) + state + "\n";
  }
  return lines;
}

}  // namespace emulator
