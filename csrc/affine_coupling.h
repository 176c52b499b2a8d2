// affine_coupling: the contract between the adapters that know tensors and the kernels that do not.
//
// Every tensor is seen as (batch, channels, inner) through three strides, in elements. x, y, dy, dx have `channels`
// channels; the parameters have `count`, and parameter channel k belongs to x's channel start + k step. Other channels
// are copied. The mask, where there is one, is (channels, inner) bytes.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "formula/affine_scale.h"
#include "storage.h"
#include "strides.h"

namespace pyflowgen {

struct AffineCouplingOptions {
  int64_t batch, channels, inner;  // of x
  int64_t start, step, count;      // transformed channels
  AffineScale scale;
  double clamp;
  bool shift_first, inverse;
  bool elementwise;  // event_dim 0: channels = inner = 1, and a log-derivative for every element
  double gain = 1;   // what log_scale is multiplied by before its map
};

// T: storage type. A: type of the log-determinant, double for double and float for the rest.
template <class T, class A> struct AffineCouplingForward {
  AffineCouplingOptions o;
  const T* x;
  Strides x_strides;  // (batch, channels, inner)
  const T* shift;
  Strides shift_strides;  // (batch, count, inner)
  const T* log_scale;
  Strides log_scale_strides;  // (batch, count, inner); null when additive
  const uint8_t* mask;
  Strides mask_strides;  // (1, channels, inner); null: all of the part is transformed
  T* y;
  Strides y_strides;  // (batch, channels, inner)
  A* logdet;          // (batch)
};

template <class T, class A> struct AffineCouplingBackward {
  AffineCouplingOptions o;
  const T* dy;
  Strides dy_strides;  // (batch, channels, inner); when there is none strides 0 at a zero, on CUDA null
  const A* dlogdet;
  int64_t dlogdet_stride;  // (batch); likewise
  const T* x;
  Strides x_strides;  // as forward
  const T* shift;
  Strides shift_strides;
  const T* log_scale;
  Strides log_scale_strides;
  const uint8_t* mask;
  Strides mask_strides;
  T* dx;
  Strides dx_strides;  // (batch, channels, inner)
  T* dshift;
  Strides dshift_strides;  // (batch, count, inner)
  T* dlog_scale;
  Strides dlog_scale_strides;  // (batch, count, inner); null when additive
};

// Work is cut the same way for every number of threads: a row's event into `segments` pieces, each summed by itself,
// and the pieces of a row added in order. [begin, end) counts rows, and what is not transformed is copied on the way;
// or rows × segments with `partial` (by_segment), and then the caller has copied it before.
int64_t affine_coupling_segments(const AffineCouplingOptions&);

// clang-format off
PYFLOWGEN_PER_ISA(
  template <class T, class A> void affine_coupling(const AffineCouplingForward<T, A>&, int64_t begin, int64_t end, double* partial);
  template <class T, class A> void affine_coupling_backward(const AffineCouplingBackward<T, A>&, int64_t begin, int64_t end, bool by_segment);
)
// clang-format on

// The launchers of csrc/cuda. Where an event is cut into several segments the forward one needs `partial`,
// (batch, segments). `stream` is a cudaStream_t.
namespace cuda {
int64_t affine_coupling_segments(const AffineCouplingOptions&);
template <class T, class A> void affine_coupling(const AffineCouplingForward<T, A>&, double* partial, void* stream);
template <class T, class A> void affine_coupling_backward(const AffineCouplingBackward<T, A>&, void* stream);
}  // namespace cuda

}  // namespace pyflowgen
