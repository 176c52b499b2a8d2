// CUDA C++ on the CPU, for tests: put this folder first on the include path and compile a .cu with g++ -x c++.
//
// A block's threads are fibers that run until a barrier, a warp operation or their end; blocks run one after another,
// those of a cooperative launch side by side (with dynamic shared memory alone: a static array has one copy).
// Covered: index variables, barriers, shuffles, votes, atomics, static and dynamic shared memory, and the launch macros
// of csrc/cuda/launch.cuh. Not covered: inline PTX, cp.async, wgmma, cub, streams that overlap. A barrier or a warp
// operation that not all its threads reach ends the program with a message, and so does spinning (__nanosleep) for what
// no other thread does.
// AddressSanitizer sees each fiber's stack and the ends of shared arrays. ThreadSanitizer sees every CUDA thread as a
// thread: only barriers, __syncwarp, __threadfence and the end of a launch order memory, so a missing one is a reported
// race, within a block as between blocks.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// A device so small that a few units are shared by several blocks, and a few more do not fit their shared memory.
namespace cuda_on_cpu { inline int multiprocessors = 3, shared_bytes = 12 << 10; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::multiprocessors : cuda_on_cpu::shared_bytes;
  return cudaSuccess;
}
template <class F> cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) { return cudaSuccess; }
template <class F> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// Blocks take turns on one thread, and under TSan each has a thread and so a copy of its own. Plain statics, unlike
// thread-local ones, have red zones around them.
#if defined(__SANITIZE_THREAD__)
#define __shared__ static thread_local
#else
#define __shared__ static
#endif

#define PYFLOWGEN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::cuda_on_cpu::launch(grid, block, shared_bytes, [&] { (kernel)(__VA_ARGS__); }))
#define PYFLOWGEN_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::cuda_on_cpu::launch_cooperative(grid, block, shared_bytes, [&] { (kernel)(__VA_ARGS__); }))
#define PYFLOWGEN_POLL(p) (__atomic_load_n(p, __ATOMIC_RELAXED))
#define PYFLOWGEN_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::cuda_on_cpu::dynamic_shared())

namespace cuda_on_cpu {

// By value: a read in a kernel, TSan's instrumented code, would be an access to the scheduler's memory.
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
// All blocks at once; more of them, or more shared memory, than the device above has ends the program.
void launch_cooperative(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
void* dynamic_shared();

// What it did before, any thread that comes to a fence afterwards sees.
void fence();
// Other threads' turn.
void spin();

// A barrier of the block; how many of its threads gave true.
int sync_threads(bool predicate);
void sync_warp(unsigned mask);
// What lane `source` of the warp gave, and a bit for each lane of `mask` that gave an odd value.
struct Exchanged {
  uint64_t value;
  unsigned ballot;
};
Exchanged exchange(unsigned mask, uint64_t value, int source);
int lane();

template <class T> T shuffle(unsigned mask, T v, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  bits = exchange(mask, bits, source).value;
  memcpy(&v, &bits, sizeof v);
  return v;
}

template <class T, class F> T atomic_update(T* p, F f) {
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do next = f(old);
  while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::thread_index())
#define blockIdx (::cuda_on_cpu::block_index())
#define blockDim (::cuda_on_cpu::block_size())
#define gridDim (::cuda_on_cpu::grid_size())
constexpr int warpSize = 32;

inline void __syncthreads() { cuda_on_cpu::sync_threads(false); }
inline int __syncthreads_count(int p) { return cuda_on_cpu::sync_threads(p); }
inline int __syncthreads_or(int p) { return cuda_on_cpu::sync_threads(p) > 0; }
inline int __syncthreads_and(int p) { return cuda_on_cpu::sync_threads(!p) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::sync_warp(mask); }
inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __nanosleep(unsigned) { cuda_on_cpu::spin(); }

template <class T> T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return cuda_on_cpu::shuffle(mask, v, (cuda_on_cpu::lane() & ~(width - 1)) + (source & (width - 1)));
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = cuda_on_cpu::lane(), source = lane + int(delta);
  return cuda_on_cpu::shuffle(mask, v, source / width == lane / width ? source : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle(mask, v, lane % width >= int(delta) ? lane - int(delta) : lane);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ lanes;
  return cuda_on_cpu::shuffle(mask, v, source / width <= lane / width ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  return cuda_on_cpu::exchange(mask, p != 0, cuda_on_cpu::lane()).ballot;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }

template <class T> T atomicAdd(T* p, T v) {
  return cuda_on_cpu::atomic_update(p, [&](T old) { return T(old + v); });
}
template <class T> T atomicMax(T* p, T v) {
  return cuda_on_cpu::atomic_update(p, [&](T old) { return old < v ? v : old; });
}
template <class T> T atomicMin(T* p, T v) {
  return cuda_on_cpu::atomic_update(p, [&](T old) { return v < old ? v : old; });
}
template <class T> T atomicExch(T* p, T v) {
  return cuda_on_cpu::atomic_update(p, [&](T) { return v; });
}
template <class T> T atomicCAS(T* p, T expected, T v) {
  return cuda_on_cpu::atomic_update(p, [&](T old) { return old == expected ? v : old; });
}

template <class T> T __ldg(const T* p) { return *p; }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
