// Calls the launchers of csrc/cuda/trn.cu as the adapter does, on buffers of exactly the size needed: what the
// sanitizer builds run, where Python would be in the way. Values are run_trn.py's affair; here one block with all
// weights in its shared memory and three with little of it have to give the same bits.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/trn.h"

using namespace pyflowgen;

namespace {

int failures = 0;

template <class T> class Buffers {
 public:
  T* filled(int64_t n, float scale = 1) {
    std::normal_distribution<float> normal;
    T* const p = empty(n);
    for (int64_t i = 0; i < n; ++i) p[i] = T(scale * normal(random_));
    return p;
  }
  T* empty(int64_t n) {
    all_.emplace_back(size_t(n), T(0) / T(0));
    all_.back().shrink_to_fit();
    return all_.back().data();
  }
  void compare(const Buffers& other, const char* what) const {
    for (size_t i = 0; i < all_.size(); ++i) {
      const size_t bytes = all_[i].size() * sizeof(T);
      if (bytes && memcmp(all_[i].data(), other.all_[i].data(), bytes) && ++failures < 20)
        printf("%s: buffer %d hangs on the split\n", what, int(i));
    }
  }

 private:
  std::mt19937 random_;
  std::vector<std::vector<T>> all_;
};

template <class T> Buffers<T> run(const cuda::TrnSizes& s, bool dropout) {
  Buffers<T> b;
  const int64_t N = s.frames, B = s.batch, H = s.hidden, F = s.features, C = s.classes, L = s.steps, n = s.slots;
  const int64_t wide = s.before ? 1 : L;
  const float w = 0.5f;
  const auto matrices = [&] {  // the transposed ones have as many elements
    return cuda::TrnMatrices<T>{
        b.filled(4 * H * (F + H), w), b.filled(8 * H * H, w), b.filled(H * H, w), b.filled(H * H, w),
        b.filled(H * C, w),           b.filled(F * H, w),     b.filled(C * H, w)};
  };
  cuda::TrnMasks<T> mask{nullptr, nullptr, nullptr};
  if (dropout) mask = {b.filled(N * B * F), b.filled(N * L * B * H), b.filled(N * L * B * H)};
  unsigned arrived = 0;
  T *states = b.empty((N + 1) * B * H), *scores = b.empty(N * L * B * C), *cells = b.empty((n + 1) * B * H),
    *futures = b.empty(n * B * F), *enc_in = b.empty(n * B * (F + H)), *enc_gates = b.empty(n * B * 4 * H),
    *dec_in = b.empty(n * L * B * 2 * H), *dec_gates = b.empty(n * L * B * 4 * H), *gs = b.empty(n * (L + 1) * B * H),
    *ks = b.empty(n * (L + 1) * B * H), *rows = b.empty(n * wide * B * (s.before ? H : F));
  cuda::trn_forward(cuda::TrnForward<T>{s,
                                        matrices(),
                                        b.filled(4 * H),
                                        b.filled(H),
                                        b.filled(H),
                                        b.filled(H),
                                        b.filled(F),
                                        b.filled(C),
                                        mask,
                                        b.filled(N * B * 4 * H),
                                        b.filled(B * H),
                                        b.filled(B * H),
                                        b.filled(B * F),
                                        states,
                                        scores,
                                        cells,
                                        futures,
                                        enc_in,
                                        enc_gates,
                                        dec_in,
                                        dec_gates,
                                        gs,
                                        ks,
                                        rows,
                                        dropout ? b.empty(L * B * H) : nullptr,
                                        &arrived},
                    nullptr);
  if (n < N) return b;
  arrived = 0;
  cuda::trn_backward(cuda::TrnBackward<T>{s,
                                          matrices(),
                                          mask,
                                          b.filled(N * B * H),
                                          b.filled(B * H),
                                          b.filled(B * F),
                                          b.filled(N * L * B * C),
                                          cells,
                                          futures,
                                          enc_gates,
                                          dec_in,
                                          dec_gates,
                                          gs,
                                          ks,
                                          rows,
                                          b.empty(N * B * 4 * H),
                                          b.empty(N * L * B * 4 * H),
                                          b.empty(N * L * B * C),
                                          b.empty(N * L * B * H),
                                          b.empty(N * wide * B * F),
                                          b.empty(N * B * H),
                                          b.empty(N * B * H),
                                          b.empty(B * H),
                                          b.empty(B * H),
                                          b.empty(B * F),
                                          b.empty(L * B * H),
                                          b.empty(B * H),
                                          &arrived},
                     nullptr);
  return b;
}

template <class T> void check(const char* what, const cuda::TrnSizes& s, bool dropout) {
  const int multiprocessors = cuda_on_cpu::multiprocessors, shared_bytes = cuda_on_cpu::shared_bytes;
  const Buffers<T> several = run<T>(s, dropout);
  cuda_on_cpu::multiprocessors = 1, cuda_on_cpu::shared_bytes = 1 << 20;
  several.compare(run<T>(s, dropout), what);
  cuda_on_cpu::multiprocessors = multiprocessors, cuda_on_cpu::shared_bytes = shared_bytes;
}

}  // namespace

int main(int argc, char**) {
  // Frames, batch, hidden, features, classes, steps, before, previous, slots.
  check<float>("kept", {2, 5, 9, 6, 3, 2, false, false, 2}, true);
  if (argc == 1) {
    check<float>("before and previous", {2, 3, 13, 10, 5, 3, true, true, 2}, false);
    check<float>("nothing kept", {4, 3, 6, 13, 6, 2, false, false, 2}, false);
  }
  printf("%d wrong values\n", failures);
  return failures > 0;
}
