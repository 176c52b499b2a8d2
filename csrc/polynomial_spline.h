// polynomial_spline: splines of degree 1, 2 and 3. The contract is that of rational_quadratic_spline.h, with all
// parameters of an element in one run: `bins` heights; `bins` widths, then densities; widths, heights, two derivatives.
#pragma once

#include "rational_quadratic_spline.h"

namespace pyflowgen {

// clang-format off
PYFLOWGEN_PER_ISA(
  template <class T, class A> void polynomial_spline(const RationalQuadraticSplineForward<T, A>&, int64_t begin, int64_t end, double* partial);
  template <class T, class A> void polynomial_spline_backward(const RationalQuadraticSplineBackward<T, A>&, int64_t begin, int64_t end, bool by_segment);
)
// clang-format on

// The launchers of csrc/cuda, as those of rational_quadratic_spline.
namespace cuda {
int64_t polynomial_spline_segments(const RationalQuadraticSplineOptions&);
template <class T, class A>
void polynomial_spline(const RationalQuadraticSplineForward<T, A>&, double* partial, void* stream);
template <class T, class A> void polynomial_spline_backward(const RationalQuadraticSplineBackward<T, A>&, void* stream);
}  // namespace cuda

}  // namespace pyflowgen
