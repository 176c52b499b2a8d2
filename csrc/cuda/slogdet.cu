// slogdet on CUDA: elimination with partial pivoting in shared memory, the gradient by Gauss-Jordan elimination in
// place. Not yet run on a GPU.
//
// Floor, matrices of n^2 elements of b bytes: forward reads n^2 b bytes, backward reads and writes as many; n^3 / 3 and
// n^3 multiply-adds in double. The kernels move just that. At n = 8 in float32 that is 0.7 and 1.0 operations a byte:
// memory is the limit where double runs at half the speed of float (A100, H100), arithmetic where it runs at a 64th.
//
// A matrix belongs to as many threads as it has rows (a power of two, at most a warp, then two rows a thread): a thread
// updates its own rows, reading the pivot's row, which all of them read at once. An odd pitch keeps the rows of
// neighbouring threads in different banks. Threads of one matrix are in one warp, so no barrier of the block is needed;
// the pivot is found by shuffles.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "formula/slogdet.h"
#include "slogdet.h"

namespace pyflowgen::cuda {
namespace {

namespace formula = pyflowgen::PYFLOWGEN_ISA::formula;

// Shared memory every device gives a block without being asked for more.
constexpr int64_t shared_bytes = 48 << 10;

struct Cut {
  int64_t batch;
  int n, pitch, lanes, matrices;  // threads of a matrix; matrices of a block
};

// Doubles of one matrix, and the rows' order as it was exchanged.
__host__ __device__ __forceinline__ int matrix_doubles(const Cut& cut) { return cut.n * cut.pitch; }

// The matrix and the place in it that are this thread's; all threads of a warp run through the same steps, those
// without a matrix on one of zeros.
struct Place {
  int lane;
  int64_t matrix;
  bool mine;  // there is such a matrix
  double* m;
  int* order;
};
__device__ __forceinline__ Place place(const Cut& cut, double* shared) {
  const int slot = int(threadIdx.x) / cut.lanes;
  const int64_t matrix = int64_t(blockIdx.x) * cut.matrices + slot;
  int* const orders = reinterpret_cast<int*>(shared + cut.matrices * matrix_doubles(cut));
  return {int(threadIdx.x) % cut.lanes, matrix, matrix < cut.batch, shared + slot * matrix_doubles(cut),
          orders + slot * cut.n};
}

template <class T> __device__ __forceinline__ void load_matrix(const Cut& cut, const Place& here, const T* a) {
  for (int e = here.lane; e < cut.n * cut.n; e += cut.lanes)
    here.m[e / cut.n * cut.pitch + e % cut.n] = here.mine ? double(widen(a[here.matrix * cut.n * cut.n + e])) : 0.0;
  for (int i = here.lane; i < cut.n; i += cut.lanes) here.order[i] = i;
  __syncwarp();
}

// The row of column k's largest entry from row k on, the first of equals, the same in all threads of the matrix.
__device__ __forceinline__ int find_pivot(const Cut& cut, const Place& here, int k) {
  double size = -1;
  int row = k;
  for (int i = here.lane; i < cut.n; i += cut.lanes) {
    const double candidate = formula::abs(here.m[i * cut.pitch + k]);
    if (i >= k && candidate > size) size = candidate, row = i;
  }
  for (int step = cut.lanes / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(0xffffffffu, size, step, cut.lanes);
    const int other_row = __shfl_xor_sync(0xffffffffu, row, step, cut.lanes);
    if (other > size || (other == size && other_row < row)) size = other, row = other_row;
  }
  return row;
}

// Step k: rows k and `row` change places.
__device__ __forceinline__ void exchange_rows(const Cut& cut, const Place& here, int k, int row, int first) {
  __syncwarp();
  if (row != k) {
    for (int j = first + here.lane; j < cut.n; j += cut.lanes) {
      const double was = here.m[k * cut.pitch + j];
      here.m[k * cut.pitch + j] = here.m[row * cut.pitch + j];
      here.m[row * cut.pitch + j] = was;
    }
    if (here.lane == 0) {
      const int was = here.order[k];
      here.order[k] = here.order[row], here.order[row] = was;
    }
  }
  __syncwarp();
}

template <class T, class A> __global__ void __launch_bounds__(threads, 4)
    forward_kernel(const SlogdetForward<T, A> t, const Cut cut) {
  PYFLOWGEN_DYNAMIC_SHARED(double, shared);
  const Place here = place(cut, shared);
  load_matrix(cut, here, t.a);
  formula::PivotProduct<double> product;
  for (int k = 0; k < cut.n; ++k) {
    const int row = find_pivot(cut, here, k);
    exchange_rows(cut, here, k, row, k);
    const double* const top = here.m + k * cut.pitch;
    const double pivot = top[k];
    const auto [scale, rest] = formula::reciprocal(pivot);
    product.multiply(row == k ? pivot : -pivot);
    for (int i = here.lane; i < cut.n; i += cut.lanes) {
      if (i <= k) continue;
      double* const mine = here.m + i * cut.pitch;
      const double factor = -mine[k] * scale * rest;
      for (int j = k + 1; j < cut.n; ++j) mine[j] = formula::fma(factor, top[j], mine[j]);
    }
    __syncwarp();
  }
  if (here.mine && here.lane == 0) {
    t.sign[here.matrix] = A(product.sign());
    t.logabsdet[here.matrix] = A(product.logabs());
  }
}

template <class T, class A> __global__ void __launch_bounds__(threads, 4)
    backward_kernel(const SlogdetBackward<T, A> t, const Cut cut) {
  PYFLOWGEN_DYNAMIC_SHARED(double, shared);
  const Place here = place(cut, shared);
  load_matrix(cut, here, t.a);
  for (int k = 0; k < cut.n; ++k) {
    const int row = find_pivot(cut, here, k);
    exchange_rows(cut, here, k, row, 0);
    double* const top = here.m + k * cut.pitch;
    const double d = 1 / top[k];
    __syncwarp();
    for (int j = here.lane; j < cut.n; j += cut.lanes) top[j] = j == k ? d : top[j] * d;
    __syncwarp();
    for (int i = here.lane; i < cut.n; i += cut.lanes) {
      if (i == k) continue;
      double* const mine = here.m + i * cut.pitch;
      const double factor = -mine[k];
      mine[k] = 0;
      for (int j = 0; j < cut.n; ++j) mine[j] = formula::fma(factor, top[j], mine[j]);
    }
    __syncwarp();
  }
  if (!here.mine) return;
  // The inverse of the matrix with rows exchanged has the inverse's columns in another order; da is its transpose.
  const double scale = double(t.dlogabsdet[here.matrix * t.dlogabsdet_stride]);
  T* const da = t.da + here.matrix * cut.n * cut.n;
  for (int e = here.lane; e < cut.n * cut.n; e += cut.lanes) {
    const int j = e / cut.n, i = e % cut.n;
    narrow(Compute<T>(here.m[i * cut.pitch + j] * scale), da[here.order[j] * cut.n + i]);
  }
}

Cut make_cut(int64_t batch, int64_t n) {
  Cut cut{batch, int(n), int(n | 1), 1, 0};
  while (cut.lanes < warp && cut.lanes < n) cut.lanes *= 2;
  const int64_t bytes = int64_t(matrix_doubles(cut)) * 8 + n * 4;
  cut.matrices = threads / cut.lanes;
  while (cut.matrices > 1 && cut.matrices * cut.lanes > warp && cut.matrices * bytes > shared_bytes) cut.matrices /= 2;
  return cut;
}

}  // namespace

template <class T, class A> void slogdet(const SlogdetForward<T, A>& t, void* stream) {
  const Cut cut = make_cut(t.batch, t.n);
  const size_t bytes = size_t(cut.matrices) * (size_t(matrix_doubles(cut)) * 8 + size_t(cut.n) * 4);
  PYFLOWGEN_LAUNCH((&forward_kernel<T, A>), dim3(unsigned(ceil_div(t.batch, cut.matrices))),
                   dim3(unsigned(cut.matrices * cut.lanes)), bytes, stream, t, cut);
}

template <class T, class A> void slogdet_backward(const SlogdetBackward<T, A>& t, void* stream) {
  const Cut cut = make_cut(t.batch, t.n);
  const size_t bytes = size_t(cut.matrices) * (size_t(matrix_doubles(cut)) * 8 + size_t(cut.n) * 4);
  PYFLOWGEN_LAUNCH((&backward_kernel<T, A>), dim3(unsigned(ceil_div(t.batch, cut.matrices))),
                   dim3(unsigned(cut.matrices * cut.lanes)), bytes, stream, t, cut);
}

#define PYFLOWGEN_INSTANTIATE(T, A) \
  template void slogdet<T, A>(const SlogdetForward<T, A>&, void*); \
  template void slogdet_backward<T, A>(const SlogdetBackward<T, A>&, void*);
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(float, float)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)

}  // namespace pyflowgen::cuda
