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
    default: return -1;
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
  C mean;                // of the bins' gradients, weighed by their sizes less the least
  template <class Axis>
  __device__ __forceinline__ AxisGradient(const Axis& axis, C rest, int number, C offset, C length, C shift, C size) {
    // probabilities of what is before the bin, and of it
    const C share = C(1) / (rest * (axis.high - axis.low));
    const C p_before = (offset - C(number) * axis.least) * share, p_at = (length - axis.least) * share;
    mean = formula::fma(shift, p_before, size * p_at);
    const C factor = axis.scale * (axis.half + axis.half);
    before = (shift - mean) * factor, at = (size - mean) * factor, beyond = -mean * factor;
  }
};
// Bin k's, of those before bin `number`, of that, and of those beyond.
template <class G> __device__ __forceinline__ auto of_bin(const G& g, int k, int number) {
  return k < number ? g.before : k == number ? g.at : g.beyond;
}

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
      C dw = at.widths.exponential(k) * of_bin(w, k, at.number),
        dh = at.heights.exponential(k) * of_bin(h, k, at.number);
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

// freia: the bin that x is in; or the whole interval, with -1 or the number of bins for its number and x at its end.
template <class C> struct OwnPlace {
  int number;
  C value, slope0, slope1;
  formula::SplineBin<C> bin;
};
template <class C, class W, class H>
__device__ __forceinline__ OwnPlace<C> locate_own(const Options<C>& o, const Input<C>& in, const W& widths,
                                                  const H& heights, C slope, const C* inner) {
  const C low = o.inverse ? heights.low : widths.low, high = o.inverse ? heights.high : widths.high;
  if (!(in.x >= low && in.x <= high))
    return {in.x > high ? o.bins : -1,
            in.x > high ? high : low,
            0,
            0,
            {widths.low, widths.high, heights.low, heights.high, slope, slope}};
  const Found<C> f = o.inverse ? search<C>(in.x, o.bins, heights, widths) : search<C>(in.x, o.bins, widths, heights);
  const bool first = f.bin == 0, last = f.bin == o.bins - 1;
  const auto derivative = [&](int k) {
    return formula::knot_derivative<SplineConvention::freia>(inner[k], o.min_derivative, o.edge, C(0));
  };
  const formula::KnotDerivative<C> outer{slope, 0};
  const auto d0 = first ? outer : derivative(f.bin - 1), d1 = last ? outer : derivative(f.bin);
  const C d0_ = d0.value, d1_ = d1.value;
  return {f.bin, in.x, d0.derivative, d1.derivative,
          o.inverse ? formula::SplineBin<C>{f.b0, f.b1, f.a0, f.a1, d0_, d1_}
                    : formula::SplineBin<C>{f.a0, f.a1, f.b0, f.b1, d0_, d1_}};
}
// Of the inner knots' parameters.
template <class C> __device__ __forceinline__ void give_knots(const Options<C>& o, const OwnPlace<C>& at,
                                                              const formula::SplineGradient<C>& g, C* inner) {
  for (int k = 0; k < o.bins - 1; ++k) inner[k] = 0;
  if (at.number > 0 && at.number < o.bins) inner[at.number - 1] += g.d0 * at.slope0;
  if (at.number >= 0 && at.number < o.bins - 1) inner[at.number] += g.d1 * at.slope1;
}

// Bins of sizes softplus(parameter + shift) + least, and a line outside.
template <class C> struct AffineInterval {
  Axis<SplineConvention::freia, false, C> widths, heights;
  C slope;
  OwnPlace<C> at;
  __device__ __forceinline__ AffineInterval(const Options<C>& o, const Input<C>& in, C* u)
      : widths(o, u, o.shift_width, o.min_width, o.left + u[2 * o.bins + 1]),
        heights(o, u + o.bins, o.shift_height, o.min_height, o.bottom + u[2 * o.bins]),
        slope(heights.side.size / widths.side.size),
        at(locate_own(o, in, widths, heights, slope, u + 2 * o.bins + 2)) {}
};
// Shares of an interval of the size that a parameter gives, and the identity outside.
template <class C> struct ResizedInterval {
  formula::KnotDerivative<C> share;
  formula::Clamped<C> size;
  Axis<SplineConvention::nflows, false, C> widths, heights;
  OwnPlace<C> at;
  __device__ __forceinline__ ResizedInterval(const Options<C>& o, const Input<C>& in, C* u)
      : share(formula::softplus_at_least(u[2 * o.bins] + C(0.54132485461291806), C(0))),  // log(e - 1)
        size(formula::clamp_size((o.right - o.left) * share.value, o.inverse_clip, o.inverse_clip > 0)),
        widths(o, u, u, C(0), C(-0.5) * size.value, C(0.5) * size.value),
        heights(o, u, u + o.bins, C(0), C(-0.5) * size.value, C(0.5) * size.value),
        at(locate_own(o, in, widths, heights, C(1), u + 2 * o.bins + 1)) {}
};

template <> struct RationalQuadratic<SplineConvention::freia> {
  template <class C>
  static __device__ __forceinline__ formula::Splined<C> forward(const Options<C>& o, const Input<C>& in, C* u) {
    const bool affine = o.tails == SplineTails::affine;
    const OwnPlace<C> at = affine ? AffineInterval<C>(o, in, u).at : ResizedInterval<C>(o, in, u).at;
    if (!affine && (at.number < 0 || at.number == o.bins)) return {in.x, C(0)};
    const auto r = formula::rational_quadratic(at.value, at.bin, o.inverse);
    const C beyond = in.x - at.value;
    return {r.y + (o.inverse ? beyond / at.bin.d0 : beyond * at.bin.d0), r.l};
  }
  template <class C>
  static __device__ __forceinline__ C backward(const Options<C>& o, const Input<C>& in, C dy, C dlogdet, C* u) {
    return o.tails == SplineTails::affine ? affine(o, in, dy, dlogdet, u) : resized(o, in, dy, dlogdet, u);
  }
  template <class C>
  static __device__ __forceinline__ C affine(const Options<C>& o, const Input<C>& in, C dy, C dlogdet, C* u) {
    const AffineInterval<C> i(o, in, u);
    const auto& [number, value, slope0, slope1, bin] = i.at;
    const auto &w = i.widths.side, &h = i.heights.side;
    const bool above = number == o.bins;
    formula::SplineGradient<C> g{};
    C of_slope;
    if (above || number < 0) {
      const auto tail = formula::tail_backward(dy, dlogdet, in.x - value, i.slope, o.inverse);
      g.input = tail.input, g.shift_x = tail.shift_x, g.shift_y = tail.shift_y, of_slope = tail.slope;
    } else {
      g = formula::rational_quadratic_backward(dy, dlogdet, value, bin, o.inverse);
      of_slope = (number == 0 ? g.d0 : C(0)) + (number == o.bins - 1 ? g.d1 : C(0));
    }
    of_slope /= w.size;
    const auto gw = formula::own_gradient(w, above ? w.size : bin.x0 - w.begin, bin.x1 - bin.x0, g.shift_x, g.width,
                                          -of_slope * i.slope);
    const auto gh =
        formula::own_gradient(h, above ? h.size : bin.y0 - h.begin, bin.y1 - bin.y0, g.shift_y, g.height, of_slope);
    for (int k = 0; k < o.bins; ++k) {
      u[k] = i.widths.size(k).derivative * of_bin(gw, k, number);
      u[o.bins + k] = i.heights.size(k).derivative * of_bin(gh, k, number);
    }
    u[2 * o.bins] = gh.begin, u[2 * o.bins + 1] = gw.begin;
    give_knots(o, i.at, g, u + 2 * o.bins + 2);
    return g.input;
  }
  template <class C>
  static __device__ __forceinline__ C resized(const Options<C>& o, const Input<C>& in, C dy, C dlogdet, C* u) {
    const ResizedInterval<C> i(o, in, u);
    const int number = i.at.number;
    if (number < 0 || number == o.bins) {
      for (int k = 0; k < 3 * o.bins; ++k) u[k] = 0;
      return dy;
    }
    const auto& bin = i.at.bin;
    const auto g = formula::rational_quadratic_backward(dy, dlogdet, i.at.value, bin, o.inverse);
    const C low = i.widths.low;
    const AxisGradient<C> w(i.widths, C(1), number, bin.x0 - low, bin.x1 - bin.x0, g.shift_x, g.width);
    const AxisGradient<C> h(i.heights, C(1), number, bin.y0 - low, bin.y1 - bin.y0, g.shift_y, g.height);
    for (int k = 0; k < o.bins; ++k) {
      u[k] = i.widths.exponential(k) * of_bin(w, k, number);
      u[o.bins + k] = i.heights.exponential(k) * of_bin(h, k, number);
    }
    u[2 * o.bins] = (w.mean + h.mean - C(0.5) * (g.shift_x + g.shift_y)) * i.size.derivative * (o.right - o.left) *
                    i.share.derivative;
    give_knots(o, i.at, g, u + 2 * o.bins + 1);
    return g.input;
  }
};

template <class F> void with_convention(SplineConvention convention, F f) {
  switch (convention) {
    case SplineConvention::nflows: return f.template operator()<SplineConvention::nflows>();
    case SplineConvention::zuko: return f.template operator()<SplineConvention::zuko>();
    case SplineConvention::torchflows: return f.template operator()<SplineConvention::torchflows>();
    case SplineConvention::freia: return f.template operator()<SplineConvention::freia>();
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
