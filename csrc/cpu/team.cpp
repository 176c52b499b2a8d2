#include "cpu/team.h"

#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyflowgen {
namespace {

// Spins for some microseconds, as long as a step takes, then lets others have the core: they may be the ones awaited.
void pause(int round) {
  if (round > 2000) return std::this_thread::yield();
#if defined(__x86_64__)
  _mm_pause();
#endif
}
// Rounds that the first waits for the others, some 0.1 to 0.5 ms: a sleeping thread needs 0.1 ms to wake.
constexpr int patience = 6000;

}  // namespace

int64_t Team::join(int64_t parts) {
  const uint64_t before = joined_.fetch_add(member + uint64_t(parts), std::memory_order_acq_rel);
  if (before & closed) return -1;
  const int64_t place = int64_t(before / member);
  if (place == 0) {
    for (int round = 0; round < patience; ++round) {
      if (int64_t(joined_.load(std::memory_order_acquire) % member) >= parts_) break;
      pause(round);
    }
    const uint64_t all = joined_.fetch_or(closed, std::memory_order_acq_rel);
    size_.store(int64_t(all / member), std::memory_order_release);
  } else {
    for (int round = 0; size_.load(std::memory_order_acquire) == 0; ++round) pause(round);
  }
  return place;
}

void Team::meet() {
  const int64_t meeting = meetings_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
    arrived_.store(0, std::memory_order_relaxed);
    meetings_.store(meeting + 1, std::memory_order_release);
  } else {
    for (int round = 0; meetings_.load(std::memory_order_acquire) == meeting; ++round) pause(round);
  }
}

}  // namespace pyflowgen
