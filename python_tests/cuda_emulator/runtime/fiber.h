// Fibers: stacks that take turns on one OS thread, known to whichever sanitizer is in the process.
#pragma once
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_HAS_UCONTEXT 1
#include <ucontext.h>
#endif

// Weak: null unless the program runs under that sanitizer. This file itself is never instrumented.
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* saved, const void** old_bottom,
                                                   size_t* old_size);
[[gnu::weak]] void __asan_poison_memory_region(const volatile void* p, size_t bytes);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* p, size_t bytes);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* p);
[[gnu::weak]] void __tsan_release(void* p);
}

namespace emulator {

inline void poison(const void* p, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, bytes);
}
inline void unpoison(const void* p, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, bytes);
}

// What a real barrier, fence or wait orders, for ThreadSanitizer: what came before a release of p
// happens before what comes after an acquire of p.
inline void release(void* p) {
  if (__tsan_release) __tsan_release(p);
}
inline void acquire(void* p) {
  if (__tsan_acquire) __tsan_acquire(p);
}

#ifndef EMULATOR_HAS_UCONTEXT
// Saves the registers that a call preserves on this stack, and takes those of the other one.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");
#endif

class Fiber {
 public:
  // The OS thread itself, on its own stack.
  void adopt_thread() {
    pthread_attr_t attributes;
    void* bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &bytes_);
    pthread_attr_destroy(&attributes);
    bottom_ = bottom;
    if (__tsan_get_current_fiber) tsan_ = __tsan_get_current_fiber();
  }

  // entry starts at the first switch to the fiber, calls started() and never returns.
  void create(char* stack, size_t bytes, void (*entry)()) {
    bottom_ = stack;
    bytes_ = bytes;
    if (__tsan_create_fiber) tsan_ = __tsan_create_fiber(0);
#ifdef EMULATOR_HAS_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    makecontext(&context_, entry, 0);
#else
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    top_ = top - 6;  // registers, of any value
#endif
  }

  void switch_to(Fiber& next) {
    constexpr unsigned kOrdersNothing = 1;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(next.tsan_, kOrdersNothing);
    if (__sanitizer_start_switch_fiber)
      __sanitizer_start_switch_fiber(&asan_, next.bottom_, next.bytes_);
#ifdef EMULATOR_HAS_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    emulator_switch_stack(&top_, next.top_);
#endif
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(asan_, nullptr, nullptr);
  }

  // To be called first in entry.
  static void started() {
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  }

 private:
#ifdef EMULATOR_HAS_UCONTEXT
  ucontext_t context_;
#else
  void* top_ = nullptr;
#endif
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void *tsan_ = nullptr, *asan_ = nullptr;
};

// Stacks with an unreadable page below each. Only pages that are touched take memory; tops lie at
// different offsets in their pages, else all would share a few lines of the cache.
class Stacks {
 public:
  static constexpr int kMost = 1024;

  void grow(int count) {
    for (; count_ < count; count_ += kChunk) {
      void* memory = mmap(nullptr, kChunk * kBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
      if (memory == MAP_FAILED) perror("cuda emulator: no memory for stacks"), abort();
      char* chunk = chunks_[count_ / kChunk] = static_cast<char*>(memory);
      for (int i = 0; i < kChunk; ++i) mprotect(chunk + i * kBytes, guard_, PROT_NONE);
    }
  }
  char* bottom(int i) const { return chunks_[i / kChunk] + i % kChunk * kBytes + guard_; }
  size_t bytes(int i) const { return kBytes - guard_ - i * 192 % 4096; }

 private:
  static constexpr int kChunk = 32;
  static constexpr size_t kBytes = 256 << 10;
  const size_t guard_ = sysconf(_SC_PAGESIZE);
  char* chunks_[kMost / kChunk] = {};
  int count_ = 0;
};

}  // namespace emulator
