// Runs a grid: block after block, the threads of a block as fibers. See cuda_emulation.h for what it watches.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#include <sys/mman.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "cuda_emulation.h"
#include "fiber.h"

namespace trellis::emulation {

Self self;

namespace {

constexpr size_t kStackBytes = size_t{256} << 10;

enum class State { ready, at_barrier, at_warp, done };

struct Thread {
  Fiber fiber;
  State state;
  uint3 index;
  int lane, warp;
  Location where;
  unsigned mask;
  uint64_t value;
  std::array<uint64_t, 32> given;
};

struct SharedVariable {
  void* data;
  size_t bytes;
};

std::vector<SharedVariable>& shared_variables() {
  static std::vector<SharedVariable> all;
  return all;
}

void forget(const SharedVariable& variable) { std::memset(variable.data, 0xff, variable.bytes); }

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(Location where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

char* stacks(size_t threads) {  // kept for the life of the process; pages are used as they are touched
  static char* memory = nullptr;
  static size_t capacity = 0;
  if (threads > capacity) {
    if (memory) munmap(memory, capacity * kStackBytes);
    void* const mapped = mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(mapped);
    capacity = threads;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, threads * kStackBytes);  // frames of threads that an error left in the middle
#endif
  return memory;
}

class Grid {
 public:
  Grid(const char* kernel, dim3 grid, dim3 block, const std::function<void()>& body)
      : kernel_(kernel), body_(body), threads_(size_t{block.x} * block.y * block.z) {
    if (threads_.empty() || threads_.size() > 1024)
      throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": a block of " +
                               std::to_string(threads_.size()) + " threads; it must have 1 to 1024");
    self.grid_size = grid;
    self.block_size = block;
    stacks_ = stacks(threads_.size());
  }

  void run_block(uint3 block) {
    self.block = block_ = block;
    for (const SharedVariable& variable : shared_variables()) forget(variable);
    const dim3 size = self.block_size;
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      const auto n = static_cast<unsigned>(i);
      thread.state = State::ready;
      thread.index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
      thread.lane = static_cast<int>(i % 32);
      thread.warp = static_cast<int>(i / 32);
      thread.fiber.prepare(stacks_ + i * kStackBytes, kStackBytes, [] { current_grid->thread_main(); });
    }
    left_ = threads_.size();
    while (left_ > 0) {
      const bool ran = run_ready_threads();
      const bool released = release_warps() | release_block();
      if (!ran && !released) throw std::runtime_error(deadlock());
    }
  }

  void suspend(State state) {
    Thread& thread = *running_;
    thread.state = state;
    scheduler_.enter_from(thread.fiber, state == State::done);
  }

  Thread& running() { return *running_; }

  void maybe_yield() {
    if ((next_random() & 7) == 0) suspend(State::ready);
  }

  static Grid* current_grid;

 private:
  void thread_main() {
    running_->fiber.entered_first(scheduler_);
    try {
      body_();
    } catch (...) {
      error_ = std::current_exception();
      error_thread_ = running_->index;
    }
    suspend(State::done);
  }

  bool run_ready_threads() {
    // Another order every round: what holds for one order of the threads only is a missing barrier.
    const size_t count = threads_.size(), start = next_random() % count;
    const bool backwards = next_random() & 1;
    bool ran = false;
    for (size_t step = 0; step < count; ++step) {
      Thread& thread = threads_[(start + (backwards ? count - step : step)) % count];
      if (thread.state != State::ready) continue;
      ran = true;
      running_ = &thread;
      self.thread = thread.index;
      self.lane = thread.lane;
      thread.fiber.enter_from(scheduler_);
      if (error_) fail();
      left_ -= thread.state == State::done;
    }
    return ran;
  }

  // Lanes that have all arrived at one warp operation exchange their values and go on.
  bool release_warps() {
    bool released = false;
    for (size_t i = 0; i < threads_.size(); ++i) {
      const Thread& thread = threads_[i];
      if (thread.state != State::at_warp) continue;
      const size_t first = i - thread.lane;
      const unsigned mask = thread.mask;
      bool complete = true;
      std::array<uint64_t, 32> given{};
      for (size_t lane = 0; lane < 32 && complete; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const size_t other = first + lane;
        complete = other < threads_.size() && threads_[other].state == State::at_warp && threads_[other].mask == mask &&
                   same(threads_[other].where, thread.where);
        if (complete) given[lane] = threads_[other].value;
      }
      if (!complete) continue;
      released = true;
      for (size_t lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        threads_[first + lane].given = given;
        threads_[first + lane].state = State::ready;
      }
    }
    return released;
  }

  bool release_block() {
    const Thread& first = threads_.front();
    for (const Thread& thread : threads_)
      if (thread.state != State::at_barrier || !same(thread.where, first.where)) return false;
    uint64_t votes = 0;
    for (const Thread& thread : threads_) votes += thread.value;
    for (Thread& thread : threads_) {
      thread.value = votes;
      thread.state = State::ready;
    }
    return true;
  }

  static bool same(Location a, Location b) {
    return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
  }

  std::string place() const { return std::string("CUDA kernel ") + kernel_ + ", block " + text(block_); }

  std::string deadlock() const {
    std::string message = place() + ": deadlock:";
    size_t done = 0;
    std::vector<std::pair<std::string, std::pair<size_t, uint3>>> groups;
    for (const Thread& thread : threads_) {
      if (thread.state == State::done) {
        ++done;
        continue;
      }
      const std::string key =
          (thread.state == State::at_barrier ? "wait at the barrier " : "wait at the warp operation ") +
          text(thread.where);
      const auto found =
          std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.first == key; });
      if (found == groups.end())
        groups.push_back({key, {1, thread.index}});
      else
        ++found->second.first;
    }
    for (const auto& [what, who] : groups)
      message += " " + std::to_string(who.first) + " threads (first " + text(who.second) + ") " + what + ";";
    return message + " " + std::to_string(done) + " have finished";
  }

  void fail() {
    const std::string where = " (" + place() + ", thread " + text(error_thread_) + ")";
    try {
      std::rethrow_exception(std::exchange(error_, nullptr));
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(error.what() + where);
    } catch (const std::exception& error) {
      throw std::runtime_error(error.what() + where);
    }
  }

  uint64_t next_random() {  // xorshift: the same schedule every time
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ >> 11;
  }

  const char* kernel_;
  const std::function<void()>& body_;
  std::vector<Thread> threads_;
  char* stacks_ = nullptr;
  Fiber scheduler_;
  Thread* running_ = nullptr;
  size_t left_ = 0;
  uint3 block_;
  std::exception_ptr error_;
  uint3 error_thread_;
  uint64_t random_ = 0x9e3779b97f4a7c15u;
};

Grid* Grid::current_grid = nullptr;

}  // namespace

void run(const char* kernel, dim3 grid, dim3 block, const std::function<void()>& thread) {
  Grid running(kernel, grid, block, thread);
  Grid::current_grid = &running;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) running.run_block({x, y, z});
}

void yield() { Grid::current_grid->maybe_yield(); }

int wait_for_block(bool value, Location where) {
  Thread& thread = Grid::current_grid->running();
  thread.where = where;
  thread.value = value;
  Grid::current_grid->suspend(State::at_barrier);
  return static_cast<int>(thread.value);
}

std::array<uint64_t, 32> wait_for_warp(unsigned mask, uint64_t value, Location where) {
  Thread& thread = Grid::current_grid->running();
  if (!(mask >> thread.lane & 1))
    throw std::logic_error("lane " + std::to_string(thread.lane) + " calls a warp operation whose mask leaves it out");
  thread.where = where;
  thread.mask = mask;
  thread.value = value;
  Grid::current_grid->suspend(State::at_warp);
  return thread.given;
}

void register_shared(void* data, size_t bytes) {
  shared_variables().push_back({data, bytes});
  forget(shared_variables().back());
}

void index_error(const char* name, int64_t index, int64_t extent) {
  throw std::out_of_range("index " + std::to_string(index) + " is outside shared array " + name + ", extent " +
                          std::to_string(extent));
}

}  // namespace trellis::emulation
