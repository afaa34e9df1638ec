// A flow of control with a stack of its own, and the switch from one to another. It owns the few
// instructions this takes and the stacks; it knows nothing of threads, warps or kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace camelid::cuda::emulated {

#if defined(__x86_64__)

// Saves at *save what a called function must preserve, and continues where `resume` was saved.
// swapcontext() would also save the signal mask: a system call, a hundred times slower.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*save*/, void* /*resume*/) {
  asm(R"(
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
    ret)");
}

class Context {
 public:
  // The first switch to this context calls entry(), which must never return.
  void start(std::byte* stack, std::size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t{15};
    void** place = reinterpret_cast<void**>(top);
    *--place = nullptr;  // where entry() would return to; also aligns the stack as a call does
    *--place = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--place = nullptr;
    stack_pointer_ = place;
  }
  static void swap(Context& from, Context& to) {
    switch_stacks(&from.stack_pointer_, to.stack_pointer_);
  }

 private:
  void* stack_pointer_ = nullptr;
};

#else

class Context {
 public:
  void start(std::byte* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_{};
};

#endif

// Stacks for any number of fibers, kept for the next launch. Below each lies a page that nobody may
// touch: a stack that overflows ends the process instead of changing its neighbour.
class Stacks {
 public:
  static constexpr std::size_t kBytes = 124 * 1024;
  static constexpr std::size_t kGuard = 4 * 1024;

  std::byte* get(std::size_t index) {
    while (index >= stacks_.size()) add();
    return stacks_[index];
  }

 private:
  void add() {
    void* pages = mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    mprotect(pages, kGuard, PROT_NONE);
    stacks_.push_back(static_cast<std::byte*>(pages) + kGuard);
  }
  std::vector<std::byte*> stacks_;
};

}  // namespace camelid::cuda::emulated
