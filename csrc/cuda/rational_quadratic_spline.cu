// rational_quadratic_spline on CUDA: a thread an element, parameters staged in shared memory, log-determinants summed
// on the way. Not yet run on a GPU.
//
// Floor, K bins, n transformed elements of b bytes and r copied ones: forward reads x and 3 K - 1 parameters and writes
// y, ((3 K + 1) n + 2 r) b bytes; backward reads those and dy and writes their gradients, ((6 K + 1) n + 2 r) b bytes.
// The kernels move just that, plus a mask's byte for each element and 16 bytes for each of at most 2048 + batch partial
// sums where a row is cut. About 100 operations a bin forward and 110 backward (two exponentials, two sums twice
// without error, two knots), 10 a parameter to stage it, and 300 an element: in float32 with 8 bins some 1,300 where an
// H100 has 850 instruction slots an element at its memory's speed, and 1,700 of 1,700 backward: arithmetic is the limit
// forward.
//
// How work is cut and parameters are reached: spline.cuh.
#include "cuda/spline.cuh"
#include "rational_quadratic_spline.h"

namespace pyflowgen::cuda {
namespace {

// Which parameter is the derivative of knot k, or -1 where the tail is.
template <class C> __device__ __forceinline__ int derivative_at(const Options<C>& o, int k, bool circular) {
  switch (o.tails) {
    case SplineTails::none: return k;
    case SplineTails::linear: return k == o.bins ? -1 : k - 1;
    case SplineTails::circular: return k == o.bins ? 0 : k;
    case SplineTails::mixed: return k > 0 && k < o.bins ? k : circular ? 0 : -1;
  }
  return -1;
}

// Both axes, and the bin that x is in (y, for the inverse).
template <SplineConvention S, class C> struct Located {
  Axis<S, false, C> widths;
  Axis<S, true, C> heights;
  int number, index0, index1;  // of the bin; of its derivatives' parameters
  formula::SplineBin<C> bin;
  C slope0, slope1;  // derivatives of d0 and d1 with respect to their parameters

  // torchflows' heights are made of the widths too, which nflows' no longer are by then
  __device__ __forceinline__ Located(const Options<C>& o, const Input<C>& in, C* u)
      : widths(o, u, u, o.min_width, in.left, in.right), heights(o, u, u + o.bins, o.min_height, in.bottom, in.top) {
    const Found<C> f = o.inverse ? search<C>(in.x, o.bins, heights, widths) : search<C>(in.x, o.bins, widths, heights);
    number = f.bin;
    index0 = derivative_at(o, number, in.circular), index1 = derivative_at(o, number + 1, in.circular);
    const C* const d = u + 2 * o.bins;
    const auto d0 =
        formula::knot_derivative<S>(index0 < 0 ? o.edge : d[index0], o.min_derivative, o.edge, o.inverse_clip);
    const auto d1 =
        formula::knot_derivative<S>(index1 < 0 ? o.edge : d[index1], o.min_derivative, o.edge, o.inverse_clip);
    slope0 = d0.derivative, slope1 = d1.derivative;
    if (o.inverse) bin = {f.b0, f.b1, f.a0, f.a1, d0.value, d1.value};
    else bin = {f.a0, f.a1, f.b0, f.b1, d0.value, d1.value};
  }
};

// The gradients of an axis' parameters in their place. `shift` is that of the bin's beginning, `size` that of its size:
// bin j of the axis has the gradient `shift` where j is before the bin, `size` where it is it, and 0 beyond; then
// through the softmax.
template <class C> struct AxisGradient {
  C before, at, beyond;  // times e[k]
  template <class Axis>
  __device__ __forceinline__ AxisGradient(const Axis& axis, C rest, int number, C offset, C length, C shift, C size) {
    // probabilities of what is before the bin, and of it
    const C share = C(1) / (rest * (axis.high - axis.low));
    const C p_before = (offset - C(number) * axis.least) * share, p_at = (length - axis.least) * share;
    const C mean = formula::fma(shift, p_before, size * p_at), factor = axis.scale * (axis.half + axis.half);
    before = (shift - mean) * factor, at = (size - mean) * factor, beyond = -mean * factor;
  }
  __device__ __forceinline__ C operator()(int k, int number) const {
    return k < number ? before : k == number ? at : beyond;
  }
};

template <SplineConvention S> struct RationalQuadratic {
  template <class C>
  static __device__ __forceinline__ formula::Splined<C> forward(const Options<C>& o, const Input<C>& in, C* u) {
    const Located<S, C> at(o, in, u);
    return formula::rational_quadratic(in.x, at.bin, o.inverse);
  }
  template <class C>
  static __device__ __forceinline__ C backward(const Options<C>& o, const Input<C>& in, C dy, C dlogdet, C* u) {
    const Located<S, C> at(o, in, u);
    const auto& bin = at.bin;
    const auto g = formula::rational_quadratic_backward(dy, dlogdet, in.x, bin, o.inverse);
    const AxisGradient<C> w(at.widths, o.rest_width, at.number, bin.x0 - in.left, bin.x1 - bin.x0, g.shift_x, g.width);
    const AxisGradient<C> h(at.heights, o.rest_height, at.number, bin.y0 - in.bottom, bin.y1 - bin.y0, g.shift_y,
                            g.height);
    for (int k = 0; k < o.bins; ++k) {
      C dw = at.widths.exponential(k) * w(k, at.number), dh = at.heights.exponential(k) * h(k, at.number);
      if constexpr (S == SplineConvention::zuko) {
        dw *= formula::softclip(u[k] * o.scale, at.widths.softclip).derivative;
        dh *= formula::softclip(u[o.bins + k] * o.scale, at.heights.softclip).derivative;
      } else if constexpr (S == SplineConvention::torchflows) {
        dw += dh;
        dh *= C(1e-3);
      }
      u[k] = dw, u[o.bins + k] = dh;
    }
    C* const d = u + 2 * o.bins;
    for (int k = 0; k < o.derivatives; ++k) d[k] = 0;
    if (at.index0 >= 0) d[at.index0] += g.d0 * at.slope0;
    if (at.index1 >= 0) d[at.index1] += g.d1 * at.slope1;
    return g.input;
  }
};

template <class F> void with_convention(SplineConvention convention, F f) {
  switch (convention) {
    case SplineConvention::nflows: return f.template operator()<SplineConvention::nflows>();
    case SplineConvention::zuko: return f.template operator()<SplineConvention::zuko>();
    case SplineConvention::torchflows: return f.template operator()<SplineConvention::torchflows>();
  }
}

}  // namespace

int64_t rational_quadratic_spline_segments(const RationalQuadraticSplineOptions& o) { return spline_segments(o); }

template <class T, class A>
void rational_quadratic_spline(const RationalQuadraticSplineForward<T, A>& a, double* partial, void* stream) {
  with_convention(a.o.convention,
                  [&]<SplineConvention S>() { launch_forward<RationalQuadratic<S>>(a, partial, stream); });
}

template <class T, class A>
void rational_quadratic_spline_backward(const RationalQuadraticSplineBackward<T, A>& a, void* stream) {
  with_convention(a.o.convention, [&]<SplineConvention S>() { launch_backward<RationalQuadratic<S>>(a, stream); });
}

#define PYFLOWGEN_INSTANTIATE(T, A) \
  template void rational_quadratic_spline<T, A>(const RationalQuadraticSplineForward<T, A>&, double*, void*); \
  template void rational_quadratic_spline_backward<T, A>(const RationalQuadraticSplineBackward<T, A>&, void*);
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(float, float)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)

}  // namespace pyflowgen::cuda
