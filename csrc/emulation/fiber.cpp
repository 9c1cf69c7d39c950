#include "fiber.h"

#include <cstdint>

#if defined(__x86_64__)
// What the System V ABI asks a function to keep: rbx, rbp, r12 to r15, the floating-point control words.
extern "C" void trellis_switch_stack(void** save, void* load);
asm(R"(
.text
.type trellis_switch_stack, @function
.globl trellis_switch_stack
.hidden trellis_switch_stack
trellis_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    stmxcsr (%rsp)
    fnstcw 4(%rsp)
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    ldmxcsr (%rsp)
    fldcw 4(%rsp)
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size trellis_switch_stack, .-trellis_switch_stack
)");
#endif

namespace trellis::emulation {

void Fiber::prepare(char* stack, size_t bytes, void (*entry)()) {
  bottom_ = stack;
  bytes_ = bytes;
  sanitizer_ = nullptr;
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
  *--top = 0;  // a return address for entry to find: it never returns, and unwinding stops here
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  uint32_t mxcsr;
  uint16_t control;
  asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(mxcsr), "=m"(control));
  *--top = mxcsr | uint64_t{control} << 32;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::enter_from(Fiber& from, [[maybe_unused]] bool from_ends) {
  entered_from_ = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.sanitizer_, bottom_, bytes_);
#endif
#if defined(__x86_64__)
  trellis_switch_stack(&from.stack_pointer_, stack_pointer_);
#else
  swapcontext(&from.context_, &context_);
#endif
  from.after_switch(*from.entered_from_);
}

void Fiber::entered_first(Fiber& from) { after_switch(from); }

void Fiber::after_switch([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(sanitizer_, &from.bottom_, &from.bytes_);
#endif
}

}  // namespace trellis::emulation
