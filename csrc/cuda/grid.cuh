// What kernels that stay on the device for a whole sequence share: a barrier of the grid, weights held in shared
// memory, products of a few rows by a warp.
//
// Blocks share the outputs of a product; a block keeps the weights of its own outputs in shared memory from the first
// step to the last, or, where they do not fit, reads them from L2 at every step. All sums run over the inputs in one
// order: neither the split, nor where weights lie, nor the other rows of the batch change a result.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace pyflowgen::cuda {

// Rows that a warp multiplies at once, by as many outputs: 16 sums from 8 loads a lane.
inline constexpr int tile = 4;
inline constexpr unsigned full_warp = 0xffffffffu;

// All threads of all blocks meet; what they wrote before is seen after. `arrived` is 0 when the kernel starts and only
// grows: no block can leave before the last has come, nor take a later meeting for this one.
struct GridBarrier {
  unsigned* arrived;
  unsigned target = 0;
  __device__ __forceinline__ void meet() {
    target += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1u);
      while (int(PYFLOWGEN_POLL(arrived) - target) < 0) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  }
};

// Outputs [first, first + count) are this block's.
struct Own { int first, count; };
__device__ __forceinline__ Own own_outputs(int each, int outputs) {
  const int first = int(blockIdx.x) * each, rest = outputs - first;
  return {first, rest < each ? (rest > 0 ? rest : 0) : each};
}

// Rows of weights: unit u's row of part p begins at `at` + u * unit + p * part.
template <class T> struct Rows {
  const T* at;
  int64_t unit, part;
};

// The rows of `own` units of a matrix (parts * units, depth), a row of each part a unit; in shared memory if `held`.
// A barrier has to follow.
template <class T> __device__ __forceinline__ Rows<T> hold(const T* matrix, int units, int parts, int depth,
                                                           const Own& own, bool held, T* shared) {
  const T* const from = matrix + int64_t(own.first) * depth;
  const int64_t part = int64_t(units) * depth;
  if (!held) return {from, depth, part};
  for (int row = 0; row < own.count * parts; ++row) {
    const T* const source = from + row / parts * int64_t(depth) + row % parts * part;
    for (int k = int(threadIdx.x); k < depth; k += int(blockDim.x)) shared[int64_t(row) * depth + k] = source[k];
  }
  return {shared, int64_t(parts) * depth, depth};
}

// Sum over the warp of each of `count` (a power of two) values a lane; lane l gets that of value l % count. Lanes give
// away half of their values and take the other half of their neighbour's, as long as there are several.
template <int count, int half = count / 2, class A> __device__ __forceinline__ A sum_warp(A (&v)[count]) {
  if constexpr (half > 0) {
    const bool upper = int(threadIdx.x) & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A give = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(full_warp, give, half);
    }
    return sum_warp<count, half / 2>(v);
  } else {
#pragma unroll
    for (int step = count; step < warp; step *= 2) v[0] += __shfl_xor_sync(full_warp, v[0], step);
    return v[0];
  }
}

// N <= 4 outputs of `tile` rows: lane n * tile + r of each half warp gets sum_k w[min(n, last)][k] x[r][k].
template <int N, class T, class X>
__device__ __forceinline__ Compute<T> products(const T* w, int64_t stride, int last, X (&x)[tile], int depth) {
  using A = Compute<T>;
  A sums[4 * tile] = {};
#pragma unroll 2
  for (int k = int(threadIdx.x) % warp; k < depth; k += warp) {
    A at[tile];
#pragma unroll
    for (int r = 0; r < tile; ++r) at[r] = widen(x[r][k]);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A weight = widen(w[(n < last ? n : last) * stride + k]);
#pragma unroll
      for (int r = 0; r < tile; ++r) sums[n * tile + r] += weight * at[r];
    }
  }
  return sum_warp(sums);
}

// f(n, row, sum_k w[n][k] x(row)[k]) for each of `count` outputs and `rows` rows, each by one thread.
template <class T, class X, class F> __device__ __forceinline__ void each_output(const Rows<T>& w, int count,
                                                                                 int64_t rows, int depth, const X& x,
                                                                                 const F& f) {
  const int lane = int(threadIdx.x) % warp, groups = (count + tile - 1) / tile;
  const int64_t tasks = ceil_div(rows, tile) * groups;
  for (int64_t task = int(threadIdx.x) / warp; task < tasks; task += int(blockDim.x) / warp) {
    const int first = int(task % groups) * tile;
    const int64_t row = task / groups * tile;
    decltype(x(int64_t())) from[tile];
#pragma unroll
    for (int r = 0; r < tile; ++r) from[r] = x(row + r < rows ? row + r : rows - 1);
    const auto sum = products<tile>(w.at + first * w.unit, w.unit, count - 1 - first, from, depth);
    const int n = first + lane / tile;
    if (lane < tile * tile && n < count && row + lane % tile < rows) f(n, row + lane % tile, sum);
  }
}

// f(unit, row, a) likewise for units with `parts` outputs each, a[p] being those of part p.
template <int parts, class T, class X, class F> __device__ __forceinline__ void each_unit(const Rows<T>& w, int count,
                                                                                          int64_t rows, int depth,
                                                                                          const X& x, const F& f) {
  const int lane = int(threadIdx.x) % warp;
  const int64_t tasks = ceil_div(rows, tile) * count;
  for (int64_t task = int(threadIdx.x) / warp; task < tasks; task += int(blockDim.x) / warp) {
    const int unit = int(task % count);
    const int64_t row = task / count * tile;
    decltype(x(int64_t())) from[tile];
#pragma unroll
    for (int r = 0; r < tile; ++r) from[r] = x(row + r < rows ? row + r : rows - 1);
    const auto sum = products<parts>(w.at + unit * w.unit, w.part, parts - 1, from, depth);
    Compute<T> a[4] = {};
#pragma unroll
    for (int p = 0; p < parts; ++p) a[p] = __shfl_sync(full_warp, sum, p * tile + lane % tile);
    if (lane < tile && row + lane < rows) f(unit, row + lane, a);
  }
}

// f(n, row) for each of this block's outputs and the rows, each by one thread; neighbours have neighbouring outputs.
template <class F> __device__ __forceinline__ void each(int count, int64_t rows, const F& f) {
  for (int64_t e = threadIdx.x; e < rows * count; e += blockDim.x) f(int(e % count), e / count);
}

// The device as the launches see it.
struct Device {
  int multiprocessors = 0, shared_bytes = 0;  // shared memory a block may ask for
  Device() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  }
};

// Blocks of which each multiprocessor has one; the kernel must have been given `shared_bytes`.
template <class K> int blocks_at_once(K kernel, const Device& device, int block, size_t shared_bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), "shared memory");
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, block, shared_bytes), "occupancy");
  return each > 0 ? device.multiprocessors : 0;
}

}  // namespace pyflowgen::cuda
