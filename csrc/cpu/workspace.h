// Memory of a thread. LibTorch stable ABI only.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyflowgen {

// A thread's scratch, kept between calls: as fresh memory its page faults would cost as much as a small layer.
template <class T> inline T* workspace(int64_t elements, int slot) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory[2];
  thread_local size_t capacity[2];
  // In large pages what fits the second-level cache stays there: small ones may share the same places in it by chance.
  constexpr size_t large = 2 << 20;
  const size_t wanted = size_t(elements) * sizeof(T), page = wanted > large / 4 ? large : 4096;
  const size_t bytes = (wanted + page - 1) / page * page;
  if (bytes > capacity[slot]) {
    memory[slot].reset();
    capacity[slot] = 0;
    memory[slot].reset(std::aligned_alloc(page, bytes));
    STD_TORCH_CHECK(memory[slot], "no memory for ", bytes, " bytes of workspace");
#if defined(MADV_HUGEPAGE)
    if (page == large) madvise(memory[slot].get(), bytes, MADV_HUGEPAGE);
#endif
    capacity[slot] = bytes;
  }
  return static_cast<T*>(memory[slot].get());
}

}  // namespace pyflowgen
