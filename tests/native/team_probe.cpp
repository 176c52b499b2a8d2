// A team of fewer threads than parts, for tests/test_team.py: exit status 0 when every case ends as it should.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/shares.h"
#include "cpu/team.h"

using pyflowgen::Shares;
using pyflowgen::Team;

namespace {

// `members` threads join with the given parts each and add to one another's counters for `rounds` meetings.
bool meets(int64_t parts, const std::vector<int64_t>& taken, int rounds) {
  Team team(parts);
  std::vector<int> counter(taken.size(), 0), places(taken.size(), 0);
  std::atomic<bool> right{true};
  std::atomic<int64_t> late{0};  // on a busy machine a thread may come when the team is closed
  std::vector<std::thread> threads;
  for (size_t i = 0; i < taken.size(); ++i)
    threads.emplace_back([&, i] {
      const int64_t place = team.join(taken[i]);
      if (place < 0) return void(++late);
      ++places[size_t(place)];
      for (int round = 1; round <= rounds; ++round) {
        counter[size_t(place)] = round;
        team.meet();
        for (int64_t other = 0; other < team.size(); ++other)
          if (counter[size_t(other)] != round) right = false;
        team.meet();
      }
    });
  for (auto& thread : threads) thread.join();
  for (int64_t place = 0; place < team.size(); ++place)
    if (places[size_t(place)] != 1) right = false;
  return right && team.size() + late == int64_t(taken.size());
}

// `present` threads of `parts` find every block once; alone in its part, a thread has the order it was promised.
bool shares(int64_t parts, int64_t present, int64_t blocks, bool backwards) {
  Shares all(parts, blocks, backwards);
  std::vector<std::atomic<int>> found(static_cast<size_t>(blocks));
  std::vector<std::vector<int64_t>> order(static_cast<size_t>(present));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < present; ++i)
    threads.emplace_back(
        [&, i] { all.each(i, [&](int64_t b) { ++found[size_t(b)], order[size_t(i)].push_back(b); }); });
  for (auto& thread : threads) thread.join();
  bool right = true;
  for (auto& count : found) right = right && count == 1;
  for (int64_t i = 0; i < present; ++i) {
    const int64_t begin = blocks * i / parts, end = blocks * (i + 1) / parts;
    int64_t next = backwards ? end - 1 : begin;
    for (const int64_t b : order[size_t(i)])
      if (b >= begin && b < end) right = right && b == (backwards ? next-- : next++);
  }
  return right;
}

}  // namespace

int main() {
  int failed = 0;
  const auto expect = [&](bool right, const char* what) {
    if (!right) std::printf("%s\n", what), ++failed;
  };
  expect(meets(1, {1}, 100), "one");
  expect(meets(2, {1, 1}, 2000), "two");
  expect(meets(5, {1, 1, 1, 1, 1}, 200), "more threads than cores");
  expect(meets(5, {2, 2, 1}, 200), "three threads share five parts");
  expect(meets(4, {4}, 100), "one thread is given all parts: a nested region");
  {
    Team team(2);  // the pool is busy: the second part comes when the first is done
    expect(team.join(1) == 0 && team.size() == 1, "alone");
    team.meet();
    expect(team.join(1) == -1, "too late");
  }
  for (const bool backwards : {false, true}) {
    expect(shares(1, 1, 7, backwards), "blocks of one thread");
    expect(shares(2, 2, 1001, backwards), "blocks of two");
    expect(shares(4, 2, 103, backwards), "blocks of those who did not come");
    expect(shares(3, 3, 2, backwards) && shares(2, 2, 0, backwards), "fewer blocks than threads");
  }
  return failed;
}
