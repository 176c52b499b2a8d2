// invertible_linear: the contract between the adapters that know tensors and the kernels that do not.
//
// x and y are (batch, channels, inner) through three strides, in elements; a pixel is one place of batch and inner, and
// every pixel's channels go through the same matrix: y = A x + b. Compute<T> is double for double, float for the rest.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "storage.h"
#include "strides.h"

namespace pyflowgen {

// The widest matrix the kernels take: beyond, a BLAS is as fast.
inline constexpr int64_t invertible_linear_channels = 64;

struct InvertibleLinearSizes { int64_t batch, channels, inner; };

template <class T> struct Image {
  T* p;
  Strides s;
};

// y = A x + b; b may be null. The first `head` channels of y go to `part` as well.
template <class T, class C> struct ChannelProduct {
  InvertibleLinearSizes n;
  const C* matrix;  // (channels, channels)
  const C* bias;    // (channels)
  Image<const T> x;
  Image<T> y;
  int64_t head;
  Image<T> part;
};

// Two triangular systems: v[i] = x[from[i]] in_scale[i]; M1 u = v, M2 w = u with M1 lower and M2 upper triangular, the
// reciprocals of their diagonals beside them; y[to[i]] = w[i] out_scale[i] + out_shift[i]. Null: no scale, no shift.
template <class T, class C> struct ChannelSolve {
  InvertibleLinearSizes n;
  const C *lower, *lower_reciprocal, *upper, *upper_reciprocal;
  const int64_t *from, *to;
  const C *in_scale, *out_scale, *out_shift;
  Image<const T> x;
  Image<T> y;
};

// dmatrix = sum of dy x^T and dbias = sum of dy over pixels; with `dx` also dx = A^T dy. Where `head` is not 0, dpart
// is added to dy's first channels.
template <class T, class C> struct ChannelBackward {
  InvertibleLinearSizes n;
  const C* transposed;  // A^T
  Image<const T> dy, x;
  Image<T> dx;  // null: not wanted
  int64_t head;
  Image<const T> dpart;
};

// Pixels are cut into chunks that fit the cache, whose number and borders depend on sizes alone.
int64_t invertible_linear_chunk(const InvertibleLinearSizes&);
int64_t invertible_linear_chunks(const InvertibleLinearSizes&);
// Elements of Compute<T> that a kernel's `scratch` needs.
int64_t invertible_linear_scratch(const InvertibleLinearSizes&);

// Chunks [begin, end). Backward adds to dmatrix (channels, channels) and dbias (channels).
// clang-format off
PYFLOWGEN_PER_ISA(
  template <class T, class C> void channel_product(const ChannelProduct<T, C>&, int64_t begin, int64_t end, C* scratch);
  template <class T, class C> void channel_solve(const ChannelSolve<T, C>&, int64_t begin, int64_t end, C* scratch);
  template <class T, class C> void channel_backward(const ChannelBackward<T, C>&, int64_t begin, int64_t end, C* scratch, double* dmatrix, double* dbias);
)
// clang-format on

}  // namespace pyflowgen
