// Fibers: stacks to switch between. On x86-64 by twenty instructions, elsewhere by ucontext.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace trellis::emulation {

// Something that can be switched to: the thread that calls `run`, or a fiber made by `prepare`.
class Fiber {
 public:
  // Ready to run `entry`, which never returns, on this stack; what ran there before is forgotten.
  void prepare(char* stack, size_t bytes, void (*entry)());
  // Leave `from`, which is running, for this one; returns when someone switches to `from` again.
  void enter_from(Fiber& from, bool from_ends = false);
  // To be called first in `entry`, with the fiber that entered it.
  void entered_first(Fiber& from);

 private:
  void after_switch(Fiber& from);
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
  void* sanitizer_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  Fiber* entered_from_ = nullptr;
};

}  // namespace trellis::emulation
