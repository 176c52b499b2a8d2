// slogdet: the contract between the adapters that know tensors and the kernels that do not.
//
// Matrices are dense, row-major and side by side, (batch, n, n), n from 1 to slogdet_largest. T: storage type. A: type
// of the results, double for double and float for the rest. All arithmetic is in double.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "storage.h"

namespace pyflowgen {

inline constexpr int64_t slogdet_largest = 64;

template <class T, class A> struct SlogdetForward {
  int64_t batch, n;
  const T* a;    // (batch, n, n)
  A* sign;       // (batch)
  A* logabsdet;  // (batch)
};

template <class T, class A> struct SlogdetBackward {
  int64_t batch, n;
  const A* dlogabsdet;        // (batch)
  int64_t dlogabsdet_stride;  // 0: one number for all
  const T* a;                 // (batch, n, n)
  T* da;                      // (batch, n, n) = dlogabsdet a^-T
};

// Matrices [begin, end); a matrix's result is the same in whatever company it is computed.
// clang-format off
PYFLOWGEN_PER_ISA(
  template <class T, class A> void slogdet(const SlogdetForward<T, A>&, int64_t begin, int64_t end);
  template <class T, class A> void slogdet_backward(const SlogdetBackward<T, A>&, int64_t begin, int64_t end);
)
// clang-format on

// The launchers of csrc/cuda; `stream` is a cudaStream_t.
namespace cuda {
template <class T, class A> void slogdet(const SlogdetForward<T, A>&, void* stream);
template <class T, class A> void slogdet_backward(const SlogdetBackward<T, A>&, void* stream);
}  // namespace cuda

}  // namespace pyflowgen
