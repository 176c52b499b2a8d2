// rational_quadratic_spline on the CPU: an element a lane, parameters transposed into packs, one pass over memory.
//
// Floor, float32, K bins, n transformed elements: forward reads x and 3 K - 1 parameters and writes y, (3 K + 1) 4 n
// bytes; backward reads those and dy and writes their gradients, (6 K + 1) 4 n bytes. The kernel moves just that, and
// is bound by what it computes: 2 K exponentials, 2 softplus and a logarithm an element, the search, and the
// transposes.
//
// Knots are never stored: two loops, the first for the sums of the softmax, the second adds bins up and keeps by blends
// the one that x lies in. Only the derivatives at its two knots are evaluated.
#include "rational_quadratic_spline.h"

#include "cpu/spline_loops.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

// Parameter k of an axis as the softmax takes it, but for the scale.
template <SplineConvention S, bool height, class C>
PYFLOWGEN_INLINE Pack<C> logit(const PackOptions<C>& o, const PackParameters<C>& u, int k) {
  const Pack<C> v = load((height ? u.heights : u.widths) + k * u.stride);
  if constexpr (S == SplineConvention::zuko)  // bounds of ±c/2 for widths and heights: 1 / clip is of the derivatives
    return formula::softclip(v * o.scale, o.inverse_clip + o.inverse_clip).value;
  else if constexpr (height && S == SplineConvention::torchflows)
    return fma(v, broadcast(C(1e-3)), load(u.widths + k * u.stride));
  else return v;
}

// The bin of `value` on axis a, and the same on b.
template <class V> struct Found {
  V a0, a1, b0, b1;  // its ends
  V d0, d1;          // parameters of its derivatives
  V bin;             // its number
};

template <int K, class C> PYFLOWGEN_INLINE Found<Pack<C>> search(Pack<C> value, const PackParameters<C>& u,
                                                                 int number_of_bins, const Axis<C>& a,
                                                                 const Axis<C>& b) {
  using V = Pack<C>;
  const int bins = K ? K : number_of_bins;
  const Sum<C>&total_a = a.sums[bins - 1], &total_b = b.sums[bins - 1];
  const V half = broadcast(C(0.5) * C(bins));
  V number{}, end = a.knot(a.sums[0], broadcast(C(1)) - half, total_a), d = load(u.inner);
  Found<V> f{a.low, end, {}, {}, load(u.first), d, V{}};
  Sum<C> b0 = b.sums[0], b1 = b.sums[0];  // b's knots are made of these in the end
  const auto step = [&](V next, const Sum<C>& begin_b, const Sum<C>& end_b, V next_d) {
    number += 1;
    const auto beyond = value >= end;
    f.a0 = beyond ? end : f.a0, f.a1 = beyond ? next : f.a1;
    b0 = choose(beyond, begin_b, b0), b1 = choose(beyond, end_b, b1);
    f.d0 = beyond ? d : f.d0, f.d1 = beyond ? next_d : f.d1;
    f.bin = beyond ? number : f.bin;
    end = next, d = next_d;
  };
  for (int k = 2; k < bins; ++k)
    step(a.knot(a.sums[k - 1], broadcast(C(k)) - half, total_a), b.sums[k - 2], b.sums[k - 1],
         load(u.inner + (k - 1) * u.stride));
  step(a.high, b.sums[bins - 2], b.sums[bins - 1], load(u.last));
  const V from_middle = f.bin - half;
  f.b0 = f.bin == V{} ? b.low : b.knot(b0, from_middle, total_b);
  f.b1 = f.bin == number ? b.high : b.knot(b1, from_middle + C(1), total_b);
  return f;
}

// Knots and derivatives of the bin that x is in (y, for the inverse).
template <class V> struct Located {
  formula::SplineBin<V> bin;
  V number, slope0, slope1;  // derivatives of d0 and d1 with respect to their parameters
};

template <SplineConvention S, int K, bool keep, class C>
PYFLOWGEN_INLINE Located<Pack<C>> locate(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> value,
                                         Axis<C>& widths, Axis<C>& heights) {
  softmax<K, keep>(o, [&](int k) { return logit<S, false>(o, in.u, k); }, o.min_width, in.left, in.right, widths);
  softmax<K, keep>(o, [&](int k) { return logit<S, true>(o, in.u, k); }, o.min_height, in.bottom, in.top, heights);
  const auto f =
      o.inverse ? search<K>(value, in.u, o.bins, heights, widths) : search<K>(value, in.u, o.bins, widths, heights);
  const auto d0 = formula::knot_derivative<S>(f.d0, o.min_derivative, o.edge, o.inverse_clip),
             d1 = formula::knot_derivative<S>(f.d1, o.min_derivative, o.edge, o.inverse_clip);
  if (o.inverse) return {{f.b0, f.b1, f.a0, f.a1, d0.value, d1.value}, f.bin, d0.derivative, d1.derivative};
  return {{f.a0, f.a1, f.b0, f.b1, d0.value, d1.value}, f.bin, d0.derivative, d1.derivative};
}

// y and l inside, rubbish elsewhere. Not inlined: once for every convention and element type, whatever the storage.
template <SplineConvention S, int K, class C>
__attribute__((noinline)) void forward_pack(const PackOptions<C>& o, const PackInputs<C>& in, PackResult<C>& out) {
  Axis<C> widths, heights;
  const Pack<C> value = is_inside(o, in) ? in.x : o.inverse ? in.bottom : in.left;
  const auto at = locate<S, K, false>(o, in, value, widths, heights);
  const auto [y, l] = formula::rational_quadratic(value, at.bin, o.inverse);
  out = {y, l};
}

// Gradients of an axis' parameters: `shift` is that of the bin's beginning, `size` that of its size. Bin j of the axis
// has the gradient `shift` where j is before the bin, `size` where it is it, and 0 beyond; then through the softmax.
template <class C> struct AxisGradient {
  Pack<C> before, at, beyond;  // times e[k]
  AxisGradient(const Axis<C>& axis, const PackOptions<C>& o, Pack<C> rest, Pack<C> number, Pack<C> offset,
               Pack<C> length, Pack<C> shift, Pack<C> size) {
    // probabilities of what is before the bin, and of it
    const Pack<C> share = broadcast(C(1)) / (rest * (axis.high - axis.low));
    const Pack<C> p_before = (offset - number * axis.least) * share, p_at = (length - axis.least) * share;
    const Pack<C> mean = fma(shift, p_before, size * p_at);
    const Pack<C> factor = o.scale * axis.factor;
    before = (shift - mean) * factor, at = (size - mean) * factor, beyond = -mean * factor;
  }
};

template <SplineConvention S, int K, class C>
__attribute__((noinline)) void backward_pack(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> dy,
                                             Pack<C> dlogdet, PackGradients<C>& out, Pack<C>& dx) {
  using V = Pack<C>;
  Axis<C> widths, heights;
  const auto inside = is_inside(o, in);
  const V zero{}, value = inside ? in.x : o.inverse ? in.bottom : in.left;
  const auto at = locate<S, K, true>(o, in, value, widths, heights);
  const auto g =
      formula::rational_quadratic_backward(inside ? dy : zero, inside ? dlogdet : zero, value, at.bin, o.inverse);
  dx = g.input;
  const auto& bin = at.bin;
  const AxisGradient<C> w(widths, o, o.rest_width, at.number, bin.x0 - in.left, bin.x1 - bin.x0, g.shift_x, g.width);
  const AxisGradient<C> h(heights, o, o.rest_height, at.number, bin.y0 - in.bottom, bin.y1 - bin.y0, g.shift_y,
                          g.height);
  const V d0 = g.d0 * at.slope0, d1 = g.d1 * at.slope1;
  V number{};
  auto reached = number == number;  // whether bin k is not beyond
  V previous = zero;                // of knot k, from the bin before
  const int n = K ? K : o.bins;
  for (int k = 0; k < n; ++k) {
    const auto next = at.number > number;
    V dw = widths.exponential(k) * (next ? w.before : reached ? w.at : w.beyond);
    V dh = heights.exponential(k) * (next ? h.before : reached ? h.at : h.beyond);
    if constexpr (S == SplineConvention::zuko) {
      const V twice = o.inverse_clip + o.inverse_clip;
      dw *= formula::softclip(load(in.u.widths + k * in.u.stride) * o.scale, twice).derivative;
      dh *= formula::softclip(load(in.u.heights + k * in.u.stride) * o.scale, twice).derivative;
    } else if constexpr (S == SplineConvention::torchflows) {
      dw += dh;
      dh *= broadcast(C(1e-3));
    }
    store(out.widths + k * out.stride, dw), store(out.heights + k * out.stride, dh);
    const auto here = at.number == number;
    const V d = here ? d0 : previous;
    if (k == 0) out.ends[0] = d;
    else store(out.inner + (k - 1) * out.stride, d);
    previous = here ? d1 : zero;
    reached = next;
    number += 1;
  }
  out.ends[1] = previous;
}

template <SplineConvention S> struct RationalQuadratic {
  static constexpr bool every_knot = true;
  template <class C>
  static PYFLOWGEN_INLINE void forward(const PackOptions<C>& o, const PackInputs<C>& in, PackResult<C>& out) {
    if (S == SplineConvention::nflows && o.bins == 8) forward_pack<S, 8>(o, in, out);
    else forward_pack<S, 0>(o, in, out);
  }
  template <class C> static PYFLOWGEN_INLINE void backward(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> dy,
                                                           Pack<C> dlogdet, PackGradients<C>& out, Pack<C>& dx) {
    if (S == SplineConvention::nflows && o.bins == 8) backward_pack<S, 8>(o, in, dy, dlogdet, out, dx);
    else backward_pack<S, 0>(o, in, dy, dlogdet, out, dx);
  }
};

// Call f<S>() for the convention chosen at run time.
template <class F> void with_convention(SplineConvention convention, F f) {
  switch (convention) {
    case SplineConvention::nflows: return f.template operator()<SplineConvention::nflows>();
    case SplineConvention::zuko: return f.template operator()<SplineConvention::zuko>();
    case SplineConvention::torchflows: return f.template operator()<SplineConvention::torchflows>();
  }
}
}  // namespace

template <class T, class A> void rational_quadratic_spline(const RationalQuadraticSplineForward<T, A>& a, int64_t begin,
                                                           int64_t end, double* partial) {
  with_convention(a.o.convention, [&]<SplineConvention S>() { forward<RationalQuadratic<S>>(a, begin, end, partial); });
}
template <class T, class A> void rational_quadratic_spline_backward(const RationalQuadraticSplineBackward<T, A>& a,
                                                                    int64_t begin, int64_t end, bool by_segment) {
  with_convention(a.o.convention,
                  [&]<SplineConvention S>() { backward<RationalQuadratic<S>>(a, begin, end, by_segment); });
}

#define PYFLOWGEN_INSTANTIATE(T, A) \
  template void rational_quadratic_spline<T, A>(const RationalQuadraticSplineForward<T, A>&, int64_t, int64_t, \
                                                double*); \
  template void rational_quadratic_spline_backward<T, A>(const RationalQuadraticSplineBackward<T, A>&, int64_t, \
                                                         int64_t, bool);
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(float, float)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)

}  // namespace pyflowgen::PYFLOWGEN_ISA
