// What every .cu stands on: the launch, its error check, block and grid sizes, accumulation types, sums over threads.
//
// The same source compiles with nvcc and, with tests/cuda_on_cpu first on the include path, with g++: kernels are
// launched with PYFLOWGEN_LAUNCH or PYFLOWGEN_LAUNCH_COOPERATIVE, dynamic shared memory is named with
// PYFLOWGEN_DYNAMIC_SHARED, and that folder's cuda_runtime.h supplies these. No inline PTX, so nothing runs on a GPU
// that the CPU does not run too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#define PYFLOWGEN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  do { \
    const auto pyflowgen_kernel = kernel; \
    pyflowgen_kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::pyflowgen::cuda::check(cudaGetLastError(), #kernel); \
  } while (0)
// All blocks of the grid are on the device at once, or the launch fails.
#define PYFLOWGEN_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  ::pyflowgen::cuda::launch_cooperative(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
// A word that other blocks write.
#define PYFLOWGEN_POLL(p) (*static_cast<const volatile unsigned*>(p))
#define PYFLOWGEN_DYNAMIC_SHARED(type, name) \
  extern __shared__ __align__(16) unsigned char pyflowgen_shared[]; \
  type* const name = reinterpret_cast<type*>(pyflowgen_shared)
#endif

namespace pyflowgen::cuda {

// A launch that failed names its kernel. Errors of the kernel's run surface at the caller's next synchronisation.
inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("pyflowgen: launch of ") + kernel + ": " + cudaGetErrorString(error));
}

#if defined(__CUDACC__)
template <class... P> void launch_cooperative(const char* name, void (*kernel)(P...), dim3 grid, dim3 block,
                                              size_t shared_bytes, void* stream, P... arguments) {
  void* pointers[] = {&arguments...};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes,
                                    static_cast<cudaStream_t>(stream)),
        name);
}
#endif

// Threads of a block: at 32 registers 8 blocks fill a multiprocessor, at 64 four keep half of it busy.
inline constexpr int threads = 256, warp = 32;

// Blocks that keep a large GPU busy (132 multiprocessors with 8 to 16 blocks each). A constant, so that work is cut
// the same way, and sums round the same way, on every device.
inline constexpr int64_t busy_blocks = 2048;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many threads of a block share a row of `units` pieces of work: a power of two.
constexpr int lanes_for(int64_t units) {
  int lanes = 1;
  while (lanes < threads && lanes < units) lanes *= 2;
  return lanes;
}

// n / d for 0 <= n < 2^63 in one wide multiplication, an addition and a shift (Granlund and Montgomery, 1994).
struct Divider {
  uint64_t d, magic;
  int shift;
  explicit Divider(int64_t divisor) : d(uint64_t(divisor)), shift(0) {
    while (shift < 63 && (uint64_t(1) << shift) < d) ++shift;
    magic = uint64_t((((unsigned __int128)1 << 64) * ((uint64_t(1) << shift) - d)) / d) + 1;
  }
  __device__ __forceinline__ int64_t operator()(int64_t n) const {
    return int64_t((__umul64hi(magic, uint64_t(n)) + uint64_t(n)) >> shift);
  }
};

// Sum of v over each group of `lanes` consecutive threads (a power of two), in the group's first thread; always in the
// same order. All threads of the block call it, with the same `lanes`. In double: a long event loses nothing, and at
// one addition a thread and step it hides behind memory.
__device__ __forceinline__ double sum_lanes(double v, int lanes) {
  __shared__ double sums[threads / warp];
  const int width = lanes < warp ? lanes : warp;
  for (int step = width / 2; step > 0; step /= 2) v += __shfl_down_sync(0xffffffffu, v, step, width);
  if (lanes > warp) {
    if (threadIdx.x % warp == 0) sums[threadIdx.x / warp] = v;
    __syncthreads();
    v = 0;
    if (threadIdx.x % lanes == 0)
      for (int w = 0; w < lanes / warp; ++w) v += sums[threadIdx.x / warp + w];
  }
  return v;
}

// logdet[row] from the row's partial sums; a block a row.
template <class A> static __global__ void __launch_bounds__(threads)
    sum_segments(const double* partial, int64_t segments, bool inverse, A* logdet) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < segments; i += threads) total += partial[blockIdx.x * segments + i];
  total = sum_lanes(total, threads);
  if (threadIdx.x == 0) logdet[blockIdx.x] = A(inverse ? -total : total);
}

}  // namespace pyflowgen::cuda
