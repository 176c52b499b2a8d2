// Blocks of work for a few threads, each block nearly as long as any other. A thread takes those of its own part in
// order, so that from call to call it finds the same ones in its cache; done with them, it takes the last ones of
// another's part. Who came late, or shares its core, so keeps nobody waiting for more than a block.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace pyflowgen {

class Shares {
 public:
  // backwards: from the last block of each part to its first.
  Shares(int64_t parts, int64_t blocks, bool backwards) : left_(size_t(parts)), backwards_(backwards) {
    for (int64_t i = 0; i < parts; ++i)
      left_[size_t(i)].range.store(range(blocks * i / parts, blocks * (i + 1) / parts), std::memory_order_relaxed);
  }
  // f(block) until none is left.
  template <class F> void each(int64_t part, const F& f) {
    const int64_t parts = int64_t(left_.size());
    for (int64_t b; (b = take(part, !backwards_)) >= 0;) f(b);
    for (int64_t i = 1; i < parts; ++i)
      for (int64_t b; (b = take((part + i) % parts, backwards_)) >= 0;) f(b);
  }

 private:
  struct alignas(64) Left { std::atomic<uint64_t> range{0}; };
  static uint64_t range(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }
  int64_t take(int64_t part, bool first) {
    std::atomic<uint64_t>& left = left_[size_t(part)].range;
    uint64_t now = left.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = int64_t(now >> 32), end = int64_t(now & 0xffffffff);
      if (begin >= end) return -1;
      if (left.compare_exchange_weak(now, first ? range(begin + 1, end) : range(begin, end - 1),
                                     std::memory_order_relaxed))
        return first ? begin : end - 1;
    }
  }
  std::vector<Left> left_;
  bool backwards_;
};

}  // namespace pyflowgen
