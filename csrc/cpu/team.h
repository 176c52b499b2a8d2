// Threads that work on one sequence together and meet after every step.
//
// torch's pool may run fewer threads than it was asked for: nested regions, one thread, a busy pool. So the team is
// made of those that have come: the first waits a while for the parts to be taken, then closes the team; who comes
// later finds nothing to do. A team lives on the caller's stack; there is no state between calls.
#pragma once

#include <atomic>
#include <cstdint>

namespace pyflowgen {

class Team {
 public:
  explicit Team(int64_t parts) : parts_(parts) {}
  // Called once by each thread, with how many of the parts it was given: its place 0 <= i < size(), or -1: too late.
  int64_t join(int64_t parts);
  int64_t size() const { return size_.load(std::memory_order_relaxed); }
  // Returns when all have called it; what they wrote before is seen after.
  void meet();

 private:
  static constexpr uint64_t closed = uint64_t(1) << 63, member = uint64_t(1) << 32;
  int64_t parts_;
  std::atomic<uint64_t> joined_{0};  // closed?, members, parts taken
  std::atomic<int64_t> size_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> meetings_{0};
};

}  // namespace pyflowgen
