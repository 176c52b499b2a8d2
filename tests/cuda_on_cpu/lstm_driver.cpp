// Calls the launchers of csrc/cuda/lstm.cu as the adapter does, on buffers of exactly the size needed, and compares
// with plain loops: what the sanitizer builds run, where Python would be in the way.
#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/memory.cuh"
#include "cuda/recurrence.h"
#include "lstm.h"

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

// Rows of each step; `same` gives the kernel no offsets.
template <class T, class A> void check(std::vector<int64_t> sizes, int64_t batch, int64_t H, bool reverse, bool same) {
  std::mt19937 random(unsigned(batch * 100 + H));
  std::vector<int64_t> offsets{0};
  for (int64_t n : sizes) offsets.push_back(offsets.back() + n);
  const size_t steps = sizes.size(), rows = size_t(offsets.back()), state = size_t(batch * H), h = size_t(H);
  Filled<T> weight(4 * h * h, &random, 0.5f), b1(4 * h, &random), b2(4 * h, &random), h0(state, &random),
      c0(state, &random), gates(rows * 4 * h, &random), dy(rows * h, &random), dh_n(state, &random),
      dc_n(state, &random);
  Filled<T> extra(rows * h, nullptr), y(rows * h, nullptr), h_n(state, nullptr), c_n(state, nullptr),
      dgates(rows * 4 * h, nullptr), before(rows * h, nullptr), dh0(state, nullptr), dc0(state, nullptr),
      turned(4 * h * h, nullptr);
  Filled<A> cell(state, nullptr), dh(state, nullptr), dc(state, nullptr);
  for (size_t j = 0; j < 4 * h; ++j)
    for (size_t k = 0; k < h; ++k) turned.v[k * 4 * h + j] = weight.v[j * h + k];

  // The truth, from the arguments on.
  std::vector<double> a(rows * 4 * h), want_y(rows * h), want_c(rows * h), last_h(state), last_c(state);
  std::vector<double> from_h(rows * h), from_c(rows * h);
  for (size_t i = 0; i < state; ++i) last_h[i] = h0.at(i), last_c[i] = c0.at(i);
  const auto in_order = [&](bool backward, const auto& f) {
    for (size_t i = 0; i < steps; ++i) f(reverse != backward ? steps - 1 - i : i);
  };
  in_order(false, [&](size_t t) {
    for (size_t r = 0; r < size_t(sizes[t]); ++r) {
      const size_t row = size_t(offsets[t]) + r;
      for (size_t k = 0; k < h; ++k) from_h[row * h + k] = last_h[r * h + k], from_c[row * h + k] = last_c[r * h + k];
      for (size_t j = 0; j < 4 * h; ++j) {
        double sum = gates.at(row * 4 * h + j) + b1.at(j) + b2.at(j);
        for (size_t k = 0; k < h; ++k) sum += weight.at(j * h + k) * from_h[row * h + k];
        a[row * 4 * h + j] = j / h == 2 ? std::tanh(sum) : sigmoid(sum);
      }
      for (size_t u = 0; u < h; ++u) {
        const double* const g = &a[row * 4 * h + u];
        const double c = g[h] * from_c[row * h + u] + g[0] * g[2 * h];
        want_c[row * h + u] = last_c[r * h + u] = c;
        want_y[row * h + u] = last_h[r * h + u] = g[3 * h] * std::tanh(c);
      }
    }
  });
  std::vector<double> want_d(rows * 4 * h), d_h(state), d_c(state);
  for (size_t i = 0; i < state; ++i) d_h[i] = dh_n.at(i), d_c[i] = dc_n.at(i);
  in_order(true, [&](size_t t) {
    for (size_t r = 0; r < size_t(sizes[t]); ++r) {
      const size_t row = size_t(offsets[t]) + r;
      for (size_t u = 0; u < h; ++u) {
        const double *g = &a[row * 4 * h + u], i = g[0], f = g[h], n = g[2 * h], o = g[3 * h];
        const double tc = std::tanh(want_c[row * h + u]), dout = d_h[r * h + u] + dy.at(row * h + u);
        const double d = d_c[r * h + u] + dout * o * (1 - tc * tc);
        double* const to = &want_d[row * 4 * h + u];
        to[0] = d * n * i * (1 - i), to[h] = d * from_c[row * h + u] * f * (1 - f);
        to[2 * h] = d * i * (1 - n * n), to[3 * h] = dout * tc * o * (1 - o);
        d_c[r * h + u] = d * f;
      }
      for (size_t k = 0; k < h; ++k) {
        double sum = 0;
        for (size_t j = 0; j < 4 * h; ++j) sum += want_d[row * 4 * h + j] * weight.at(j * h + k);
        d_h[r * h + k] = sum;
      }
    }
  });

  const cuda::RecurrentSteps s{batch, H, int64_t(steps), same ? nullptr : offsets.data(), reverse};
  unsigned arrived = 0;
  cuda::recurrent_forward<Lstm>(cuda::RecurrentForward<T, A>{s, weight.p(), b1.p(), b2.p(), h0.p(), c0.p(), gates.p(),
                                                             extra.p(), y.p(), h_n.p(), c_n.p(), cell.p(), &arrived},
                                nullptr);
  close("y", y, want_y), close("cells", extra, want_c), close("gates", gates, a);
  close("h_n", h_n, last_h), close("c_n", c_n, last_c);
  arrived = 0;
  cuda::recurrent_backward<Lstm>(
      cuda::RecurrentBackward<T, A>{s, dy.p(), dh_n.p(), dc_n.p(), gates.p(), extra.p(), y.p(), h0.p(), c0.p(),
                                    turned.p(), dgates.p(), dgates.p(), before.p(), dh0.p(), dc0.p(), dh.p(), dc.p(),
                                    &arrived},
      nullptr);
  close("dgates", dgates, want_d), close("before", before, from_h);
  close("dh0", dh0, d_h), close("dc0", dc0, d_c);
}

}  // namespace

int main(int argc, char**) {
  // One block and several, the last not full; more rows than a tile; lengths, one of them none; weights that stream.
  const auto all = [&]<class T, class A>() {
    check<T, A>({3, 3}, 3, 13, false, true);
    if (argc > 1) return;  // the short form
    check<T, A>({1}, 1, 3, true, false);
    check<T, A>({7, 5, 2}, 8, 9, true, false);
    check<T, A>({7, 5, 2}, 7, 6, false, false);
    check<T, A>({2, 2}, 2, 44, false, true);
  };
  all.operator()<float, float>();
#ifndef PYFLOWGEN_FLOAT_ONLY
  all.operator()<double, double>();
  all.operator()<bf16, float>();
  all.operator()<f16, float>();
#endif
  printf("%d wrong values\n", failures);
  return failures > 0;
}
