// A matrix as the adapters of recurrences multiply by it, packed beforehand or not. LibTorch stable ABI only.
#pragma once

#include "cpu/dense.h"
#include "cpu/team.h"
#include "linear.h"
#include "packed_row.h"

namespace pyflowgen {

// One of the threads that go through a clip together: each takes its part of a product's panels and of the rows that
// lie between products, and they meet where one needs what another has made.
struct Member {
  int64_t place, size;
  Team* team;
  void meet() const {
    if (team) team->meet();
  }
  int64_t begin(int64_t all) const { return all * place / size; }
  int64_t end(int64_t all) const { return all * (place + 1) / size; }
};

// As many threads as so many multiply-adds between two meetings are worth.
inline int64_t team_size(int64_t work) {
  constexpr int64_t least = 1 << 17;
  return std::clamp<int64_t>(work / least, 1, torch::stable::get_num_threads());
}

// f(member) in so many threads.
template <class F> void in_team(int64_t threads, const F& f) {
  if (threads == 1) return f(Member{0, 1, nullptr});
  Team team(threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t place = team.join(end - begin);
    if (place >= 0) f(Member{place, team.size(), &team});
  });
}

// y = activation(x matrix^T + bias); the rows of x may be x_stride apart.
template <class T> struct Packed {
  int64_t out_features, in;
  const T* panels;  // by linear_pack, or null: then `weight`, packed on the way
  const T* bias = nullptr;
  const T* weight = nullptr;
  // A member's part of it. Of a packed matrix and dense rows: inputs before `skip` are zero, results before `first` are
  // not asked for.
  void share(const Member& m, int64_t rows, const T* x, Activation activation, T* y, int64_t x_stride = 0,
             int64_t skip = 0, int64_t first = 0) const {
    if (rows == 0) return;
    if ((rows == 1 && panels) || skip || first) {
      const PackedRows<T> o{rows,
                            in,
                            out_features,
                            m.size,
                            skip,
                            first / PYFLOWGEN_CALL(packed_panel_width<T>),
                            x,
                            panels,
                            bias,
                            activation == Activation::relu,
                            y};
      const int64_t tasks = PYFLOWGEN_CALL(packed_rows_tasks<T>, o);
      return PYFLOWGEN_CALL(packed_rows<T>, o, m.begin(tasks), m.end(tasks));
    }
    const LinearForward<T> o{rows,   in,     out_features, m.size,     x, x_stride ? x_stride : in,
                             weight, panels, bias,         activation, y, nullptr};
    const int64_t tasks = PYFLOWGEN_CALL(linear_tasks<T>, o);
    PYFLOWGEN_CALL(linear<T>, o, m.begin(tasks), m.end(tasks));
  }
  // All of it, by one thread.
  void alone(int64_t rows, const T* x, Activation activation, T* y) const {
    share({0, 1, nullptr}, rows, x, activation, y);
  }
  // All of it, by as many threads as it is worth.
  void operator()(int64_t rows, const T* x, Activation activation, T* y, int64_t x_stride = 0) const {
    const int64_t threads = threads_for(rows * in * out_features);
    in_threads(threads, [&](int64_t i) { share({i, threads, nullptr}, rows, x, activation, y, x_stride); });
  }
};

}  // namespace pyflowgen
