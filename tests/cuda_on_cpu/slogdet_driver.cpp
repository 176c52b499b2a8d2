// Calls the launchers of csrc/cuda/slogdet.cu as the adapter does, on buffers of exactly the size needed, and compares
// with plain loops: what the sanitizer builds run, where Python would be in the way.
#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/memory.cuh"
#include "slogdet.h"

using namespace pyflowgen;

namespace {

int failures = 0;

template <class T> void close(int64_t n, const char* what, double got, double want, double size) {
  const double eps = std::is_same_v<T, double>  ? 1e-11
                     : std::is_same_v<T, float> ? 1e-6
                     : std::is_same_v<T, bf16>  ? 1e-2
                                                : 2e-3;
  if (std::abs(got - want) <= eps * (size + std::abs(want))) return;
  if (++failures < 20) printf("n = %d: %s is %g, expected %g\n", int(n), what, got, want);
}

// The inverse of m (n, n) in place, by Gauss-Jordan elimination beside a unit matrix, and log |det m| with its sign.
struct Truth { double sign = 1, logabs = 0; };
Truth invert(int64_t n, std::vector<double>& m) {
  Truth truth;
  std::vector<double> wide(size_t(2 * n * n), 0.0);
  const auto at = [&](int64_t i, int64_t j) -> double& { return wide[size_t(i * 2 * n + j)]; };
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) at(i, j) = m[size_t(i * n + j)];
    at(i, n + i) = 1;
  }
  for (int64_t k = 0; k < n; ++k) {
    int64_t row = k;
    for (int64_t i = k; i < n; ++i)
      if (std::abs(at(i, k)) > std::abs(at(row, k))) row = i;
    if (row != k) truth.sign = -truth.sign;
    for (int64_t j = 0; j < 2 * n; ++j) std::swap(at(k, j), at(row, j));
    const double pivot = at(k, k);
    truth.logabs += std::log(std::abs(pivot));
    if (pivot < 0) truth.sign = -truth.sign;
    for (int64_t j = 0; j < 2 * n; ++j) at(k, j) /= pivot;
    for (int64_t i = 0; i < n; ++i) {
      const double f = at(i, k);
      for (int64_t j = 0; i != k && j < 2 * n; ++j) at(i, j) -= f * at(k, j);
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) m[size_t(i * n + j)] = at(i, n + j);
  return truth;
}

template <class T, class A> void check(int64_t batch, int64_t n) {
  std::mt19937 random(static_cast<unsigned>(n));
  std::normal_distribution<float> normal;
  const size_t size = size_t(n * n);
  std::vector<T> a(size_t(batch) * size), da(a.size());
  std::vector<A> sign(size_t(batch), A(NAN)), logabsdet(size_t(batch), A(NAN)), dlogabsdet(size_t(batch), A(0));
  for (int64_t b = 0; b < batch; ++b) {
    dlogabsdet[size_t(b)] = A(0.5 + double(b % 3));
    // The largest entries away from the diagonal: rows have to be exchanged.
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        cuda::narrow(cuda::Compute<T>(normal(random) / std::sqrt(float(n)) + ((i + b) % n == j ? 3.f : 0.f)),
                     a[size_t(b) * size + size_t(i * n + j)]);
  }
  cuda::slogdet(SlogdetForward<T, A>{batch, n, a.data(), sign.data(), logabsdet.data()}, nullptr);
  cuda::slogdet_backward(SlogdetBackward<T, A>{batch, n, dlogabsdet.data(), 1, a.data(), da.data()}, nullptr);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> m(size);
    for (size_t e = 0; e < size; ++e) m[e] = double(cuda::widen(a[size_t(b) * size + e]));
    const Truth truth = invert(n, m);
    close<A>(n, "sign", double(sign[size_t(b)]), truth.sign, 0);
    close<A>(n, "logabsdet", double(logabsdet[size_t(b)]), truth.logabs, double(n));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        close<T>(n, "da", double(cuda::widen(da[size_t(b) * size + size_t(i * n + j)])),
                 double(dlogabsdet[size_t(b)]) * m[size_t(j * n + i)], 1);
  }
}

}  // namespace

int main(int argc, char**) {
  // One and several matrices a warp, several blocks with the last not full, two rows a thread.
  const int64_t cases[][2] = {{70, 5}, {3, 40}, {9, 32}, {40, 1}, {300, 2}, {33, 8}, {5, 17}, {2, 64}, {1, 3}};
  for (const auto& [batch, n] : cases) {
    if (argc > 1 && n == 32) break;  // the short form
    check<float, float>(batch, n);
#ifndef PYFLOWGEN_FLOAT_ONLY
    check<double, double>(batch, n);
    check<bf16, float>(batch, n);
    check<f16, float>(batch, n);
#endif
  }
  printf("%d wrong values\n", failures);
  return failures > 0;
}
