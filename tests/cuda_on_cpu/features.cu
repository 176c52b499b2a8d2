// What cuda_runtime.h of this folder claims to cover, each feature with a result known beforehand.
#include <cstdio>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace {

struct Results {
  int shuffled[64], ballots[64], counts[64], any[64], all[64], reversed[64];
  unsigned long long total;
  float sum;
  int most, least, exchanged;
};

__global__ void features(Results* r) {
  PYFLOWGEN_DYNAMIC_SHARED(int, dynamic);
  __shared__ int fixed[64];
  const int i = int(threadIdx.y * blockDim.x + threadIdx.x), lane = i % 32;
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  int v = i;
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  v += 1000 * __shfl_up_sync(0xffffffffu, lane, 1, 8);
  v += 100000 * __shfl_down_sync(half, lane, 2, 16);  // each half warp for itself
  v += 10000000 * __shfl_sync(0xffffffffu, lane, 3, 4);
  r->shuffled[i] = v;
  r->ballots[i] = int(__ballot_sync(0xffffffffu, lane % 3 == 0));
  r->any[i] = __any_sync(half, i == 5);
  r->all[i] = __all_sync(half, i < 48);
  fixed[i] = i;
  dynamic[i] = -i;
  __syncthreads();
  r->reversed[i] = fixed[63 - i] * 100 + dynamic[63 - i];
  r->counts[i] = __syncthreads_count(i % 5 == 0) + 100 * __syncthreads_or(i == 9) + 1000 * __syncthreads_and(i < 63);
  atomicAdd(&r->total, 1ull << blockIdx.x);
  atomicAdd(&r->sum, 0.5f);
  atomicMax(&r->most, i);
  atomicMin(&r->least, -i);
  atomicCAS(&r->exchanged, 0, 7);
}

__global__ void divide(pyflowgen::cuda::Divider by, int64_t n, int64_t* result) { *result = by(n); }

__global__ void convert(const float* v, pyflowgen::f16* half, pyflowgen::bf16* brain, float* from_half, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  pyflowgen::cuda::narrow(v[i], half[i]);
  pyflowgen::cuda::narrow(v[i], brain[i]);
  from_half[i] = pyflowgen::cuda::widen(pyflowgen::f16{uint16_t(i)});
}

}  // namespace

#if !defined(__CUDACC__)
int main() {
  int wrong = 0;
  const auto expect = [&](const char* what, int i, long long got, long long want) {
    if (got != want && ++wrong < 20) printf("%s[%d] is %lld, expected %lld\n", what, i, got, want);
  };
  Results r{};
  PYFLOWGEN_LAUNCH(&features, 3, dim3(16, 4), 64 * sizeof(int), nullptr, &r);
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, warp_sum = i < 32 ? 496 : 1520, up = lane % 8 ? lane - 1 : lane,
              down = lane % 16 < 14 ? lane + 2 : lane;
    expect("shuffled", i, r.shuffled[i], warp_sum + 1000 * up + 100000 * down + 10000000 * (lane / 4 * 4 + 3));
    expect("ballots", i, r.ballots[i], 0x49249249);
    expect("any", i, r.any[i], i < 16);
    expect("all", i, r.all[i], i < 48);
    expect("reversed", i, r.reversed[i], (63 - i) * 99);
    expect("counts", i, r.counts[i], 13 + 100);
  }
  expect("total", 0, (long long)r.total, 64 * (1 + 2 + 4));
  expect("sum", 0, (long long)(r.sum * 2), 3 * 64);
  expect("most", 0, r.most, 63);
  expect("least", 0, r.least, -63);
  expect("exchanged", 0, r.exchanged, 7);

  const int64_t top = INT64_MAX;
  for (int64_t d : {int64_t(1), int64_t(2), int64_t(3), int64_t(7), int64_t(49), int64_t(1) << 31,
                    (int64_t(1) << 31) + 1, int64_t(1) << 62, top})
    for (int64_t n :
         {int64_t(0), int64_t(1), d - 1, d, d < top / 2 ? 2 * d - 1 : d, (int64_t(1) << 32) + 5, top - 1, top}) {
      int64_t q = -1;
      PYFLOWGEN_LAUNCH(&divide, 1, 1, 0, nullptr, pyflowgen::cuda::Divider(d), n, &q);
      expect("quotient", int(d % 1000), q, n / d);
    }

  // Every pattern of 16 bits: as the upper half of a float with the lower at and around the ties, and as a float16.
  constexpr int n = 1 << 16;
  std::vector<float> v(n), back(n);
  std::vector<pyflowgen::f16> half(n);
  std::vector<pyflowgen::bf16> brain(n);
  for (uint32_t low : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
    for (uint32_t i = 0; i < n; ++i) v[i] = pyflowgen::cuda::float_of(i << 16 | low);
    PYFLOWGEN_LAUNCH(&convert, n / 256, 256, 0, nullptr, v.data(), half.data(), brain.data(), back.data(), n);
    for (int i = 0; i < n; ++i) {
      const _Float16 h = _Float16(v[size_t(i)]);
      uint16_t bits;
      memcpy(&bits, &h, 2);
      if (v[size_t(i)] == v[size_t(i)]) expect("float16", i, half[size_t(i)].bits, bits);
      else expect("float16 NaN", i, half[size_t(i)].bits & 0x7fff, 0x7e00);
      // The nearest of the two bfloat16 around v, the even one on a tie.
      const uint32_t b = uint32_t(i) << 16 | low, down = b >> 16,
                     up = down + (low > 0x8000 || (low == 0x8000 && down % 2));
      if (v[size_t(i)] == v[size_t(i)]) expect("bfloat16", i, brain[size_t(i)].bits, up);
      else expect("bfloat16 NaN", i, brain[size_t(i)].bits, 0x7fc0);
      _Float16 g;
      const uint16_t pattern = uint16_t(i);
      memcpy(&g, &pattern, 2);
      const float want = float(g);
      if (want == want)
        expect("from float16", i, pyflowgen::cuda::bits_of(back[size_t(i)]), pyflowgen::cuda::bits_of(want));
      else expect("from float16 NaN", i, back[size_t(i)] != back[size_t(i)], 1);
    }
  }
  printf("%d wrong values\n", wrong);
  return wrong > 0;
}
#endif
