// The fibers behind cuda_runtime.h. Compiled without ThreadSanitizer's instrumentation, which is not to see the
// scheduler's own accesses; -DCUDA_ON_CPU_TSAN or _ASAN make it announce its switches instead.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}

namespace cuda_on_cpu {
namespace {

constexpr size_t stack_bytes = 256 << 10;

// Stacks are kept from block to block; under TSan, which would take two threads' variables at one address for shared
// ones, to the launch's end, and each block has its own, from `first` on.
struct Stacks {
  std::vector<void*> all;
  size_t first = 0;
  void end_block([[maybe_unused]] size_t threads) {
#if defined(CUDA_ON_CPU_TSAN)
    first += threads;
#endif
  }
  void end_launch() {
#if defined(CUDA_ON_CPU_TSAN)
    for (void* p : all) munmap(p, stack_bytes);
    all.clear();
    first = 0;
#endif
  }
  void* operator[](size_t i) {
    while (all.size() <= i) {
      void* p = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) abort();
      all.push_back(p);
    }
    return all[i];
  }
} stacks;

struct Indices { dim3 thread, block, block_size, grid_size; };

struct Fiber {
  enum { ready, at_barrier, at_warp, done } state = ready;
  Indices indices;
  ucontext_t context;
  void* fake_stack = nullptr;  // ASan's
  void* tsan = nullptr;
  unsigned mask = 0;  // of the warp operation it waits at
  int source = 0;
  bool spins = false;  // gave up its turn with nothing done
  uint64_t value = 0;
  Exchanged result{};
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_tsan = nullptr;
  const std::function<void()>* kernel;
  std::vector<std::max_align_t> shared;
  Fiber* current = nullptr;
  size_t live, waiting = 0, stack;  // the first of its stacks
  int count = 0, counted = 0;
  char *barrier, *launch_end;  // addresses that stand for the orderings TSan is told of; after the barrier, the warps
};
thread_local Block* block;

// TSan's fibers of this launch. It forgets what a destroyed one did once it gives its number away again, so they are
// kept to the launch's end; it can number 8,000.
std::vector<void*> ended;
void destroy_ended() {
#if defined(CUDA_ON_CPU_TSAN)
  for (void* fiber : ended) __tsan_destroy_fiber(fiber);
#endif
  ended.clear();
}

// Dynamic shared memory is kept as long: only the end of the launch orders its release after the threads' accesses.
std::vector<std::vector<std::max_align_t>> ended_shared;

// No address serves twice (until they are all used), or one block's barriers would order the next one's accesses: TSan
// remembers an address beyond the end of what was there. It tells them apart by 8 bytes.
char* new_ordering(size_t count) {
  static char addresses[16 << 20];
  static size_t used = 0;
  if (used + 8 * count > sizeof addresses) used = 0;
  char* const first = addresses + used;
  used += 8 * count;
  return first;
}

[[noreturn]] void fail(const char* what) {
  const Indices& i = block->current ? block->current->indices : block->fibers[0].indices;
  fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u), thread (%u, %u, %u): %s\n", i.block.x, i.block.y, i.block.z,
          i.thread.x, i.thread.y, i.thread.z, what);
  abort();
}

void acquire([[maybe_unused]] void* p) {
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_acquire(p);
#endif
}
void release([[maybe_unused]] void* p) {
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_release(p);
#endif
}

// Back to the scheduler; returns when it resumes this fiber.
void yield(Fiber& self) {
  [[maybe_unused]] const bool last = self.state == Fiber::done;
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &self.fake_stack, block->scheduler_stack,
                                 block->scheduler_stack_bytes);
#elif defined(CUDA_ON_CPU_TSAN)
  __tsan_switch_to_fiber(block->scheduler_tsan, 1);  // 1: the switch orders nothing
#endif
  swapcontext(&self.context, &block->scheduler);
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

void pass_barrier() {
  if (block->waiting == 0 || block->waiting < block->live) return;
  for (Fiber& f : block->fibers)
    if (f.state == Fiber::at_barrier) f.state = Fiber::ready;
  block->counted = block->count;
  block->waiting = 0, block->count = 0;
}

void entry() {
  Fiber& self = *block->current;
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
  (*block->kernel)();
  release(block->launch_end);
  self.state = Fiber::done;
  --block->live;
  pass_barrier();
  yield(self);
}

void resume(Fiber& f, [[maybe_unused]] size_t i) {
  block->current = &f;
#if defined(CUDA_ON_CPU_ASAN)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stacks[block->stack + i], stack_bytes);
#elif defined(CUDA_ON_CPU_TSAN)
  __tsan_switch_to_fiber(f.tsan, 1);
#endif
  swapcontext(&block->scheduler, &f.context);
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  block->current = nullptr;
}

std::unique_ptr<Block> make_block(dim3 grid, dim3 size, dim3 index, size_t shared_bytes,
                                  const std::function<void()>& kernel, char* launch_end, size_t stack) {
  auto made = std::make_unique<Block>();
  const size_t n = size_t(size.x) * size.y * size.z;
  made->kernel = &kernel, made->launch_end = launch_end, made->live = n, made->stack = stack;
  made->fibers = std::vector<Fiber>(n);
  made->barrier = new_ordering(1 + (n + 31) / 32);
  made->shared.resize(shared_bytes / sizeof(std::max_align_t) + 1);
  memset(static_cast<void*>(made->shared.data()), 0xff, shared_bytes);  // NaN, as nothing says it is zero
#if defined(CUDA_ON_CPU_TSAN)
  made->scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = made->fibers[i];
    f.indices = {dim3(unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)), index, size,
                 grid};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks[stack + i], f.context.uc_stack.ss_size = stack_bytes, f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
#if defined(CUDA_ON_CPU_TSAN)
    f.tsan = __tsan_create_fiber(0);
    ended.push_back(f.tsan);
#endif
  }
  return made;
}

// Runs blocks, side by side, to their ends.
void run_blocks(std::vector<std::unique_ptr<Block>> blocks) {
  // Passes run upwards and downwards in turn, and so do blocks' first ones; of blocks side by side, one runs as far as
  // it gets before the next does: no order is to be relied on.
  const dim3 index = blocks[0]->fibers[0].indices.block;
  bool up = (index.x + index.y + index.z) % 2 == 0;
  int idle = 0;  // passes in which threads did no more than spin
  for (size_t live = 1; live > 0;) {
    bool any = false;
    const bool forwards = up;
    live = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
      block = blocks[forwards ? b : blocks.size() - 1 - b].get();
      const size_t n = block->fibers.size();
      for (bool progress = true; progress; up = !up) {
        progress = false;
        for (size_t k = 0; k < n; ++k) {
          const size_t i = up ? k : n - 1 - k;
          Fiber& f = block->fibers[i];
          if (f.state != Fiber::ready) continue;
          f.spins = false;
          resume(f, i);
          progress |= !f.spins;
        }
        any |= progress;
      }
      live += block->live;
    }
    idle = any ? 0 : idle + 1;
    if (live > 0 && idle > 2) fail("waits at a barrier or warp operation that other threads never reach, or spins");
  }
  for (auto& each : blocks) {
    ended_shared.push_back(std::move(each->shared));
    stacks.end_block(each->fibers.size());
  }
  block = nullptr;
}

}  // namespace

dim3 thread_index() { return block->current->indices.thread; }
dim3 block_index() { return block->current->indices.block; }
dim3 block_size() { return block->current->indices.block_size; }
dim3 grid_size() { return block->current->indices.grid_size; }
int lane() {
  const Indices& i = block->current->indices;
  return int(((i.thread.z * i.block_size.y + i.thread.y) * i.block_size.x + i.thread.x) % 32);
}
void* dynamic_shared() { return block->shared.data(); }

void end_launch(char* end) {
  acquire(end);
  destroy_ended();
  ended_shared.clear();
  stacks.end_launch();
}

void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  char* const end = new_ordering(1);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        if (ended.size() > 7000) destroy_ended();
        const auto run = [&] {
          std::vector<std::unique_ptr<Block>> one;
          one.push_back(make_block(grid, size, dim3(x, y, z), shared_bytes, kernel, end, stacks.first));
          run_blocks(std::move(one));
        };
#if defined(CUDA_ON_CPU_TSAN)
        std::thread(run).join();  // shared memory is thread-local; the fibers, not this thread, carry the ordering
#else
        run();
#endif
      }
  end_launch(end);
}

void launch_cooperative(dim3 grid, dim3 size, size_t bytes, const std::function<void()>& kernel) {
  const size_t n = size_t(size.x) * size.y * size.z, count = size_t(grid.x) * grid.y * grid.z;
  if (count > size_t(multiprocessors) || bytes > size_t(shared_bytes)) {
    fprintf(stderr, "cuda_on_cpu: a cooperative launch larger than the device\n");
    abort();
  }
  char* const end = new_ordering(1);
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned i = 0; i < count; ++i) {
    const dim3 index(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    blocks.push_back(make_block(grid, size, index, bytes, kernel, end, stacks.first + i * n));
  }
  run_blocks(std::move(blocks));
  end_launch(end);
}

void fence() {
  static char every[8];  // one address for all fences: TSan takes them for one lock
  acquire(every);
  release(every);
}

void spin() {
  block->current->spins = true;
  yield(*block->current);
}

int sync_threads(bool predicate) {
  Fiber& self = *block->current;
  release(block->barrier);
  self.state = Fiber::at_barrier;
  ++block->waiting;
  block->count += predicate;
  pass_barrier();
  yield(self);
  acquire(block->barrier);
  return block->counted;
}

Exchanged exchange(unsigned mask, uint64_t value, int source) {
  Fiber& self = *block->current;
  const size_t own = size_t(&self - block->fibers.data()), first = own / 32 * 32;
  if (!(mask >> (own % 32) & 1)) fail("calls a warp operation whose mask leaves it out");
  if (!(mask >> source & 1)) fail("reads from a lane outside the mask");
  self.state = Fiber::at_warp, self.mask = mask, self.value = value, self.source = source;
  bool complete = true;
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= block->fibers.size() || block->fibers[first + i].state == Fiber::done)
      fail("waits for a lane that has ended");
    const Fiber& f = block->fibers[first + i];
    complete &= f.state == Fiber::at_warp && f.mask == mask;
    ballot |= unsigned(f.value & 1) << i;
  }
  if (complete) {
    for (unsigned i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      Fiber& f = block->fibers[first + i];
      f.result = {block->fibers[first + size_t(f.source)].value, ballot};
      f.state = Fiber::ready;
    }
  }
  yield(self);
  return self.result;
}

void sync_warp(unsigned mask) {
  char* const warp = block->barrier + 8 * (1 + size_t(block->current - block->fibers.data()) / 32);
  release(warp);
  exchange(mask, 0, lane());
  acquire(warp);
}

}  // namespace cuda_on_cpu
