// rational_quadratic_spline: the contract between the adapters that know tensors and the kernels that do not.
//
// Every tensor is seen as (batch, channels, inner) through three strides, in elements; parameters have a fourth, from
// one parameter of an element to the next. x, y, dy, dx have `channels` channels; parameters, bound and circular have
// `count`, and their channel k belongs to x's channel start + k step. Other channels are copied. The mask, where there
// is one, is (channels, inner) bytes. An element has `bins` widths and heights and `derivatives` derivatives: those of
// the inner knots (linear tails), of all but the last (circular), or of all (none and mixed); freia's of the inner
// knots after one or two that say where the interval is (formula/spline_convention.h).
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "formula/spline_convention.h"
#include "storage.h"
#include "strides.h"

namespace pyflowgen {

struct RationalQuadraticSplineOptions {
  int64_t batch, channels, inner;  // of x
  int64_t start, step, count;      // transformed channels
  int64_t bins;
  int64_t derivatives;  // or what an element of a polynomial spline has more than two for each bin
  SplineConvention convention;
  SplineTails tails;
  double left, right, bottom, top;  // -1 and 1 times bound where there is one
  double min_bin_width, min_bin_height, min_derivative;
  double edge;   // parameter of the outer knots' derivatives with linear tails
  double clip;   // bound of zuko's soft clip; of the interval's sizes, of freia's
  double scale;  // of widths and heights
  bool inverse;
  bool elementwise;    // event_dim 0: channels = inner = 1, and a log-derivative for every element
  int64_t degree = 0;  // of a polynomial spline
  // freia, affine tails: what softplus gives a bin's default size, less the least, for.
  double shift_width = 0, shift_height = 0;
};

template <class T> struct SplineParameters {
  T* p;
  Strides strides;    // (batch, count, inner)
  int64_t parameter;  // from one bin to the next
};

// T: storage type. A: type of the log-determinant and of bounds, double for double and float for the rest.
template <class T, class A> struct RationalQuadraticSplineForward {
  RationalQuadraticSplineOptions o;
  const T* x;
  Strides x_strides;  // (batch, channels, inner)
  SplineParameters<const T> widths, heights, derivatives;
  const A* bound;
  Strides bound_strides;  // (1, count, inner); null: left, right, bottom, top as they are
  const uint8_t* circular;
  Strides circular_strides;  // (1, count, inner), of mixed tails; else null
  const uint8_t* mask;
  Strides mask_strides;  // (1, channels, inner); null: all of the part is transformed
  T* y;
  Strides y_strides;  // (batch, channels, inner)
  A* logdet;          // (batch)
};

template <class T, class A> struct RationalQuadraticSplineBackward {
  RationalQuadraticSplineOptions o;
  const T* dy;
  Strides dy_strides;  // (batch, channels, inner); when there is none strides 0 at a zero, on CUDA null
  const A* dlogdet;
  int64_t dlogdet_stride;  // (batch); likewise
  const T* x;
  Strides x_strides;  // as forward
  SplineParameters<const T> widths, heights, derivatives;
  const A* bound;
  Strides bound_strides;
  const uint8_t* circular;
  Strides circular_strides;
  const uint8_t* mask;
  Strides mask_strides;
  T* dx;
  Strides dx_strides;  // (batch, channels, inner)
  SplineParameters<T> dwidths, dheights, dderivatives;
};

// Work is cut the same way for every number of threads: a row's event into `segments` pieces, each summed by itself,
// and the pieces of a row added in order. [begin, end) counts rows, and what is not transformed is copied on the way;
// or rows × segments with `partial` (by_segment), and then the caller has copied it before.
// Neither allocates nor starts threads: a kernel of the same instruction set may call them for a block of rows.
int64_t rational_quadratic_spline_segments(const RationalQuadraticSplineOptions&);

// clang-format off
PYFLOWGEN_PER_ISA(
  template <class T, class A> void rational_quadratic_spline(const RationalQuadraticSplineForward<T, A>&, int64_t begin, int64_t end, double* partial);
  template <class T, class A> void rational_quadratic_spline_backward(const RationalQuadraticSplineBackward<T, A>&, int64_t begin, int64_t end, bool by_segment);
)
// clang-format on

// The launchers of csrc/cuda. Where a row is cut into several segments the forward one needs `partial`,
// (batch, segments). `stream` is a cudaStream_t.
namespace cuda {
int64_t rational_quadratic_spline_segments(const RationalQuadraticSplineOptions&);
template <class T, class A>
void rational_quadratic_spline(const RationalQuadraticSplineForward<T, A>&, double* partial, void* stream);
template <class T, class A>
void rational_quadratic_spline_backward(const RationalQuadraticSplineBackward<T, A>&, void* stream);
}  // namespace cuda

}  // namespace pyflowgen
