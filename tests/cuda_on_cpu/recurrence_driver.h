// Calls a recurrence's launchers as the adapter does, on buffers of exactly the size needed, and compares with plain
// loops: what the sanitizer builds run, where Python would be in the way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/memory.cuh"
#include "cuda/recurrence.h"

using namespace pyflowgen;

namespace {

int failures = 0;

template <class T> struct Filled {
  std::vector<T> v;
  Filled(size_t n, std::mt19937* random, float scale = 1) : v(n) {
    std::normal_distribution<float> normal;
    for (T& e : v) cuda::narrow(random ? cuda::Compute<T>(scale * normal(*random)) : cuda::Compute<T>(NAN), e);
    v.shrink_to_fit();
  }
  T* p() { return v.data(); }
  double at(size_t i) const { return double(cuda::widen(v[i])); }
};

template <class T> void close(const char* what, const Filled<T>& got, const std::vector<double>& want) {
  const double eps = std::is_same_v<T, double>  ? 1e-12
                     : std::is_same_v<T, float> ? 2e-5
                     : std::is_same_v<T, bf16>  ? 6e-2
                                                : 1e-2;
  for (size_t i = 0; i < want.size(); ++i)
    if (!(std::abs(got.at(i) - want[i]) <= eps * (1 + std::abs(want[i]))) && ++failures < 20)
      printf("%s[%d] is %g, expected %g\n", what, int(i), got.at(i), want[i]);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// What a unit of one row makes: its gates, what is kept besides, and its state.
struct Made { double gate[4], extra, h, c; };
// From the gradients of h and c to those of the gates' arguments, x's and h's part, and to h and c of the step before,
// but for what goes through the weights.
struct Back { double x[4], h[4], to_h, to_c; };

// Op: its Cell, forward(x's part, h's part, h, c) and backward(made, h, c, dh, dc). Rows of each step; `same` gives
// the kernel no offsets.
template <class Op, class T, class A>
void check(std::vector<int64_t> sizes, int64_t batch, int64_t H, bool reverse, bool same) {
  using Cell = typename Op::Cell;
  constexpr size_t G = Cell::gates;
  constexpr bool has_cell = Cell::has_cell, split = Cell::split_gate;
  std::mt19937 random(unsigned(batch * 100 + H));
  std::vector<int64_t> offsets{0};
  for (int64_t n : sizes) offsets.push_back(offsets.back() + n);
  const size_t steps = sizes.size(), rows = size_t(offsets.back()), state = size_t(batch * H), h = size_t(H);
  Filled<T> weight(G * h * h, &random, 0.5f), b1(G * h, &random), b2(G * h, &random), h0(state, &random),
      c0(state, &random), gates(rows * G * h, &random), dy(rows * h, &random), dh_n(state, &random),
      dc_n(state, &random);
  Filled<T> extra(rows * h, nullptr), y(rows * h, nullptr), h_n(state, nullptr), c_n(state, nullptr),
      dgates(rows * G * h, nullptr), dgates_h(split ? rows * G * h : 0, nullptr), before(rows * h, nullptr),
      dh0(state, nullptr), dc0(state, nullptr), turned(G * h * h, nullptr);
  Filled<A> cell(state, nullptr), dh(state, nullptr), dc(state, nullptr);
  for (size_t j = 0; j < G * h; ++j)
    for (size_t k = 0; k < h; ++k) turned.v[k * G * h + j] = weight.v[j * h + k];

  // The truth, from the arguments on.
  std::vector<Made> made(rows * h);
  std::vector<double> a(rows * G * h), want_extra(rows * h), want_y(rows * h), last_h(state), last_c(state);
  std::vector<double> from_h(rows * h), from_c(rows * h);
  for (size_t i = 0; i < state; ++i) last_h[i] = h0.at(i), last_c[i] = c0.at(i);
  const auto in_order = [&](bool backward, const auto& f) {
    for (size_t i = 0; i < steps; ++i) f(reverse != backward ? steps - 1 - i : i);
  };
  in_order(false, [&](size_t t) {
    for (size_t r = 0; r < size_t(sizes[t]); ++r) {
      const size_t row = size_t(offsets[t]) + r;
      for (size_t k = 0; k < h; ++k) from_h[row * h + k] = last_h[r * h + k], from_c[row * h + k] = last_c[r * h + k];
      for (size_t u = 0; u < h; ++u) {
        double of_x[4], of_h[4];
        for (size_t p = 0; p < G; ++p) {
          const size_t j = p * h + u;
          of_x[p] = gates.at(row * G * h + j) + b1.at(j), of_h[p] = b2.at(j);
          for (size_t k = 0; k < h; ++k) of_h[p] += weight.at(j * h + k) * from_h[row * h + k];
        }
        const size_t at = row * h + u;
        const Made m = made[at] = Op::forward(of_x, of_h, from_h[at], from_c[at]);
        for (size_t p = 0; p < G; ++p) a[row * G * h + p * h + u] = m.gate[p];
        want_extra[at] = m.extra, want_y[at] = last_h[r * h + u] = m.h, last_c[r * h + u] = m.c;
      }
    }
  });
  std::vector<double> want_x(rows * G * h), want_h(rows * G * h), d_h(state), d_c(state);
  for (size_t i = 0; i < state; ++i) d_h[i] = dh_n.at(i), d_c[i] = has_cell ? dc_n.at(i) : 0;
  in_order(true, [&](size_t t) {
    for (size_t r = 0; r < size_t(sizes[t]); ++r) {
      const size_t row = size_t(offsets[t]) + r;
      for (size_t u = 0; u < h; ++u) {
        const size_t at = row * h + u;
        const Back b = Op::backward(made[at], from_h[at], from_c[at], d_h[r * h + u] + dy.at(at), d_c[r * h + u]);
        for (size_t p = 0; p < G; ++p)
          want_x[row * G * h + p * h + u] = b.x[p], want_h[row * G * h + p * h + u] = b.h[p];
        d_h[r * h + u] = b.to_h, d_c[r * h + u] = b.to_c;
      }
      for (size_t k = 0; k < h; ++k)
        for (size_t j = 0; j < G * h; ++j) d_h[r * h + k] += want_h[row * G * h + j] * weight.at(j * h + k);
    }
  });

  const cuda::RecurrentSteps s{batch, H, int64_t(steps), same ? nullptr : offsets.data(), reverse};
  unsigned arrived = 0;
  const auto cell_only = [](T* p) { return has_cell ? p : nullptr; };
  cuda::recurrent_forward<Cell>(
      cuda::RecurrentForward<T, A>{s, weight.p(), b1.p(), b2.p(), h0.p(), cell_only(c0.p()), gates.p(), extra.p(),
                                   y.p(), h_n.p(), cell_only(c_n.p()), cell.p(), &arrived},
      nullptr);
  close("y", y, want_y), close("extra", extra, want_extra), close("gates", gates, a), close("h_n", h_n, last_h);
  if (has_cell) close("c_n", c_n, last_c);
  arrived = 0;
  cuda::recurrent_backward<Cell>(
      cuda::RecurrentBackward<T, A>{s, dy.p(), dh_n.p(), cell_only(dc_n.p()), gates.p(), extra.p(), y.p(), h0.p(),
                                    cell_only(c0.p()), turned.p(), dgates.p(), split ? dgates_h.p() : dgates.p(),
                                    before.p(), dh0.p(), cell_only(dc0.p()), dh.p(), dc.p(), &arrived},
      nullptr);
  close("dgates", dgates, want_x), close("before", before, from_h), close("dh0", dh0, d_h);
  if (split) close("dgates_h", dgates_h, want_h);
  if (has_cell) close("dc0", dc0, d_c);
}

// All cases, or with an argument the first, enough for a planted bug.
template <class Op> int run(bool all_cases) {
  // One block and several, the last not full; more rows than a tile; lengths, one of them none; weights that stream.
  const auto all = [&]<class T, class A>() {
    check<Op, T, A>({3, 3}, 3, 13, false, true);
    if (!all_cases) return;
    check<Op, T, A>({1}, 1, 3, true, false);
    check<Op, T, A>({7, 5, 2}, 8, 9, true, false);
    check<Op, T, A>({7, 5, 2}, 7, 6, false, false);
    check<Op, T, A>({2, 2}, 2, 44, false, true);
  };
  all.template operator()<float, float>();
#ifndef PYFLOWGEN_FLOAT_ONLY
  all.template operator()<double, double>();
  all.template operator()<bf16, float>();
  all.template operator()<f16, float>();
#endif
  printf("%d wrong values\n", failures);
  return failures > 0;
}

}  // namespace
