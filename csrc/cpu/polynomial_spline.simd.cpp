// polynomial_spline on the CPU: an element a lane, parameters transposed into packs, one pass over memory.
//
// Floor, float32, P parameters and n transformed elements: forward reads x and the parameters and writes y, (P + 2) 4 n
// bytes; backward reads those and dy and writes their gradients, (2 P + 3) 4 n bytes. The kernel moves just that, and
// is bound by what it computes: an exponential for each width and height, two for a density, and the search.
#include "polynomial_spline.h"

#include "cpu/spline_loops.h"
#include "formula/polynomial_spline.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

constexpr double least_density = 1e-3;  // of a quadratic spline's knot, before all are normalised

// What is known of an element's bins, and of the one that x (y, for the inverse) is in.
template <class C> struct Knots {
  using V = Pack<C>;
  Axis<C> widths, heights;
  C density[(max_bins + 1) * lanes<C>];    // degree 2: of each knot
  V outer_share, area;                     // degree 2: 1 less what the outer densities share; the area over the width
  V number, w, h;                          // of the bin, and its sizes
  V w_before, h_before, w_after, h_after;  // degree 3: of its neighbours
  V end0, end1;                            // degree 3: sigmoids of the outer derivatives
  V d0, d1;                                // degree 2: densities at the bin's knots
  formula::PolynomialBin<V> bin;

  PYFLOWGEN_INLINE V u(int k) const { return load(density + k * lanes<C>); }
  // Mean density of bin k before all are normalised.
  PYFLOWGEN_INLINE V mean(int k) const { return (u(k) + u(k + 1)) * broadcast(C(0.5)); }
};

template <class C> PYFLOWGEN_INLINE Pack<C> size(const Axis<C>& axis, int k) {
  return fma(axis.exponential(k), axis.factor, axis.least);
}
template <class C> PYFLOWGEN_INLINE Pack<C> parameter(const PackInputs<C>& in, int j) {
  return load(in.u.widths + j * in.u.stride);
}

// Densities of the knots, as nflows has them: the outer ones of a spline with tails come of the others.
template <class C> PYFLOWGEN_INLINE void densities(const PackOptions<C>& o, const PackInputs<C>& in, Knots<C>& k) {
  using V = Pack<C>;
  const int n = o.bins, first = o.tails ? 1 : 0, count = o.tails ? n - 1 : n + 1;
  for (int j = 0; j < count; ++j)
    store(k.density + (first + j) * lanes<C>,
          formula::softplus(parameter(in, n + j) * o.scale) + broadcast(C(least_density)));
  const V share = broadcast(C(1)) / (in.right - in.left), quarter = broadcast(C(0.25));
  V inner{};  // area of the bins but the outer two
  for (int j = 1; j + 1 < n; ++j) inner = fma(k.mean(j), size(k.widths, j) * share, inner);
  const V w_first = size(k.widths, 0) * share, w_last = size(k.widths, n - 1) * share;
  k.outer_share = broadcast(C(1)) - (w_first + w_last) * quarter;
  if (o.tails) {
    const V outer = (inner + (w_first * k.u(1) + w_last * k.u(n - 1)) * quarter) / k.outer_share;
    store(k.density, outer), store(k.density + n * lanes<C>, outer);
  }
  k.area = fma(k.mean(0), w_first, fma(k.mean(n - 1), w_last, inner));
}

template <int degree, class C>
PYFLOWGEN_INLINE void locate(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> value, Knots<C>& k) {
  using V = Pack<C>;
  const int n = o.bins;
  const V one = broadcast(C(1)), half = broadcast(C(0.5) * C(n)), range_x = in.right - in.left;
  Axis<C>&x = k.widths, &y = k.heights;
  if constexpr (degree != 1)
    softmax<0, true>(o, [&](int j) { return parameter(in, j); }, o.min_width, in.left, in.right, x);
  if constexpr (degree != 2)
    softmax<0, true>(
        o, [&](int j) { return parameter(in, j + (degree == 3 ? n : 0)); }, o.min_height, in.bottom, in.top, y);
  if constexpr (degree == 2) densities(o, in, k);
  const V equal = range_x * broadcast(C(1.0 / n)), rho = (in.top - in.bottom) / range_x;
  const auto width = [&](int j) { return degree == 1 ? equal : size(x, j); };
  const V q = degree == 2 ? (one - o.min_height) / k.area : V{};
  const auto height = [&](int j) {
    return degree == 2 ? rho * size(x, j) * fma(k.mean(j), q, o.min_height) : size(y, j);
  };

  // What each addition loses is kept, and the sum of all heights brought to the interval's: a knot errs no more than
  // its heights do.
  const auto add = [](V& sum, V& lost, V h) {
    const V step = h + lost, next = sum + step;
    lost = step - (next - sum), sum = next;
  };
  V to_range = one;
  if constexpr (degree == 2) {
    V total{}, lost{};
    for (int j = 0; j < n; ++j) add(total, lost, height(j));
    to_range = (in.top - in.bottom) / total;
  }
  V begin_x = in.left, begin_y = in.bottom, number{}, rise{}, lost{};
  k.w_before = k.h_before = V{};
  for (int j = 0; j < n; ++j) {
    // The bin from knot j to the next.
    V end_x = in.right, end_y = in.top;
    const V w = width(j), h = height(j);
    if (j + 1 < n) {
      const V from_middle = broadcast(C(j + 1)) - half;
      end_x = degree == 1 ? fma(broadcast(C(j + 1)), equal, in.left) : x.knot(x.sums[j], from_middle, x.sums[n - 1]);
      add(rise, lost, h);
      end_y = degree == 2 ? fma(rise, to_range, in.bottom) : y.knot(y.sums[j], from_middle, y.sums[n - 1]);
    }
    const auto here = value >= (o.inverse ? begin_y : begin_x);
    if (j == 0) {
      k.bin.x0 = begin_x, k.bin.x1 = end_x, k.bin.y0 = begin_y, k.bin.y1 = end_y, k.w = w, k.h = h, k.number = number;
      if constexpr (degree == 2) k.d0 = k.u(0), k.d1 = k.u(1);
      if constexpr (degree == 3) k.w_after = width(1), k.h_after = height(1);
    } else {
      k.bin.x0 = here ? begin_x : k.bin.x0, k.bin.x1 = here ? end_x : k.bin.x1;
      k.bin.y0 = here ? begin_y : k.bin.y0, k.bin.y1 = here ? end_y : k.bin.y1;
      if constexpr (degree == 2) k.d0 = here ? k.u(j) : k.d0, k.d1 = here ? k.u(j + 1) : k.d1;
      if constexpr (degree == 3) {
        const int next = j + 1 < n ? j + 1 : j;
        k.w_before = here ? width(j - 1) : k.w_before, k.h_before = here ? height(j - 1) : k.h_before;
        k.w_after = here ? width(next) : k.w_after, k.h_after = here ? height(next) : k.h_after;
      }
      k.w = here ? w : k.w, k.h = here ? h : k.h, k.number = here ? number : k.number;
    }
    begin_x = end_x, begin_y = end_y, number += one;
  }
  k.bin.slope = k.h / k.w, k.bin.a = k.bin.b = one;
  if constexpr (degree == 2) {
    k.d0 = fma(k.d0, q, o.min_height), k.d1 = fma(k.d1, q, o.min_height);
    const V share = broadcast(C(2)) / (k.d0 + k.d1);
    k.bin.a = k.d0 * share, k.bin.b = k.d1 * share;
  }
  if constexpr (degree == 3) {
    const V three = broadcast(C(3)), last = broadcast(C(n - 1)), slope = k.bin.slope, share = one / slope;
    k.end0 = formula::sigmoid(parameter(in, 2 * n)), k.end1 = formula::sigmoid(parameter(in, 2 * n + 1));
    const V d0 = formula::limited_derivative(k.w_before, k.h_before / k.w_before, k.w, slope).value * share;
    const V d1 = formula::limited_derivative(k.w, slope, k.w_after, k.h_after / k.w_after).value * share;
    k.bin.a = k.number == V{} ? three * k.end0 : d0, k.bin.b = k.number == last ? three * k.end1 : d1;
  }
}

template <class C> PYFLOWGEN_INLINE Pack<C> value_inside(const PackOptions<C>& o, const PackInputs<C>& in) {
  return is_inside(o, in) ? in.x : o.inverse ? in.bottom : in.left;
}

// Not inlined: once for every degree and element type, whatever the storage.
template <int degree, class C>
__attribute__((noinline)) void forward_pack(const PackOptions<C>& o, const PackInputs<C>& in, PackResult<C>& out) {
  Knots<C> k;
  const Pack<C> value = value_inside(o, in);
  locate<degree>(o, in, value, k);
  const auto [y, l] = formula::polynomial<degree>(value, k.bin, o.inverse);
  out = {y, l};
}

// From the gradients of an axis' sizes to those of its parameters, through the softmax.
template <class C> PYFLOWGEN_INLINE void softmax_backward(const PackOptions<C>& o, const Axis<C>& axis, const C* sizes,
                                                          C* out, int64_t stride) {
  using V = Pack<C>;
  V sum{}, total{};
  for (int j = 0; j < o.bins; ++j)
    sum = fma(axis.exponential(j), load(sizes + j * lanes<C>), sum), total += axis.exponential(j);
  const V mean = sum / total, factor = o.scale * axis.factor;
  for (int j = 0; j < o.bins; ++j)
    store(out + j * stride, axis.exponential(j) * factor * (load(sizes + j * lanes<C>) - mean));
}

// Gradients of the densities' parameters, and what they add to those of the widths.
template <class C>
PYFLOWGEN_INLINE void densities_backward(const PackOptions<C>& o, const PackInputs<C>& in, const Knots<C>& k,
                                         const formula::SplineGradient<Pack<C>>& g, C* widths, C* out, int64_t stride) {
  using V = Pack<C>;
  const int n = o.bins;
  const V zero{}, one = broadcast(C(1)), half = broadcast(C(0.5)), quarter = broadcast(C(0.25));
  const V share = one / (in.right - in.left), rho = (in.top - in.bottom) * share;
  const V rest = one - o.min_height, q = rest / k.area;
  // a = 2 d0 / (d0 + d1), b = 2 - a; as densities before they are normalised
  const V sum = k.d0 + k.d1, ends = (g.d0 - g.d1) * (one + one) / (sum * sum);
  const V end0 = ends * k.d1, end1 = -ends * k.d0;
  // of q: y0 and h hold q times an area, d0 and d1 q times a density
  const V to_y = rho * g.shift_y, to_h = rho * g.height;
  const V d_q =
      ((k.bin.y0 - in.bottom - o.min_height * rho * (k.bin.x0 - in.left)) * g.shift_y +
       (k.h - o.min_height * rho * k.w) * g.height + end0 * (k.d0 - o.min_height) + end1 * (k.d1 - o.min_height)) /
      q;
  const V d_area = -d_q * q / k.area * share;
  C of_u[(max_bins + 1) * lanes<C>];
  store(of_u + n * lanes<C>, zero);
  V number{}, carried{};  // from the bin before to the knot between
  for (int j = 0; j <= n; ++j, number += one) {
    V d = carried;
    carried = zero;
    d += k.number == number ? end0 * q : zero;
    d += k.number == number - one ? end1 * q : zero;
    if (j < n) {
      const V both = k.number > number ? to_y : k.number == number ? to_h : zero;
      const V area = fma(both, q, d_area), w = size(k.widths, j);
      carried = area * w * half;
      d += carried;
      C* const to = widths + j * lanes<C>;
      store(to, load(to) + fma(area, k.mean(j), both * o.min_height));
    }
    store(of_u + j * lanes<C>, d);
  }
  const auto add = [&](C* to, int j, V d) { store(to + j * lanes<C>, load(to + j * lanes<C>) + d); };
  if (o.tails) {  // the outer densities are N / outer_share
    const V outer = (load(of_u) + load(of_u + n * lanes<C>)) / k.outer_share, by_width = outer * share;
    for (int j = 1; j + 1 < n; ++j) {
      const V to_u = by_width * size(k.widths, j) * half;
      add(of_u, j, to_u), add(of_u, j + 1, to_u), add(widths, j, by_width * k.mean(j));
    }
    add(of_u, 1, by_width * size(k.widths, 0) * quarter), add(of_u, n - 1, by_width * size(k.widths, n - 1) * quarter);
    add(widths, 0, by_width * (k.u(1) + k.u(0)) * quarter);
    add(widths, n - 1, by_width * (k.u(n - 1) + k.u(0)) * quarter);
  }
  const int first = o.tails ? 1 : 0, count = o.tails ? n - 1 : n + 1;
  for (int j = 0; j < count; ++j)
    store(out + j * stride,
          load(of_u + (first + j) * lanes<C>) * o.scale * formula::sigmoid(parameter(in, n + j) * o.scale));
}

template <int degree, class C>
__attribute__((noinline)) void backward_pack(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> dy,
                                             Pack<C> dlogdet, PackGradients<C>& out, Pack<C>& dx) {
  using V = Pack<C>;
  const int n = o.bins;
  Knots<C> k;
  const auto inside = is_inside(o, in);
  const V zero{}, one = broadcast(C(1)), value = value_inside(o, in);
  locate<degree>(o, in, value, k);
  formula::SplineGradient<V> g = formula::polynomial_backward<degree>(inside ? dy : zero, inside ? dlogdet : zero,
                                                                      value, k.bin, k.w, k.h, o.inverse);
  dx = g.input;
  V before_w{}, before_h{}, after_w{}, after_h{};  // gradients of the neighbours' sizes
  V end0{}, end1{};
  if constexpr (degree == 3) {
    // a = d0 / slope, and the slopes h / w
    const V three = broadcast(C(3)), slope = k.bin.slope, share = one / slope;
    const auto first = k.number == zero, last = k.number == broadcast(C(n - 1));
    const auto at0 = formula::limited_derivative(k.w_before, k.h_before / k.w_before, k.w, slope);
    const auto at1 = formula::limited_derivative(k.w, slope, k.w_after, k.h_after / k.w_after);
    const V d0 = first ? zero : g.d0 * share, d1 = last ? zero : g.d1 * share;
    end0 = first ? g.d0 * three * k.end0 * (one - k.end0) : zero;
    end1 = last ? g.d1 * three * k.end1 * (one - k.end1) : zero;
    const V d_slope = (first ? zero : d0 * (at0.s1 - k.bin.a)) + (last ? zero : d1 * (at1.s0 - k.bin.b));
    const V s0 = first ? zero : d0 * at0.s0 / k.w_before, s1 = last ? zero : d1 * at1.s1 / k.w_after;
    g.width += (first ? zero : d0 * at0.w1) + (last ? zero : d1 * at1.w0) - d_slope * slope / k.w;
    g.height += d_slope / k.w;
    before_h = s0, after_h = s1;
    before_w = first ? zero : d0 * at0.w0 - s0 * k.h_before / k.w_before;
    after_w = last ? zero : d1 * at1.w1 - s1 * k.h_after / k.w_after;
  }
  C of_widths[max_bins * lanes<C>], of_heights[max_bins * lanes<C>];
  V number{};
  for (int j = 0; j < n; ++j, number += one) {
    const auto before = k.number > number, at = k.number == number;
    V w = before ? g.shift_x : at ? g.width : zero, h = before ? g.shift_y : at ? g.height : zero;
    if constexpr (degree == 3) {
      const auto previous = k.number == number + one, next = k.number == number - one;
      w += previous ? before_w : next ? after_w : zero, h += previous ? before_h : next ? after_h : zero;
    }
    store(of_widths + j * lanes<C>, w), store(of_heights + j * lanes<C>, h);
  }
  C* const to = out.widths;
  if constexpr (degree == 1) softmax_backward(o, k.heights, of_heights, to, out.stride);
  if constexpr (degree == 2) densities_backward(o, in, k, g, of_widths, to + n * out.stride, out.stride);
  if constexpr (degree != 1) softmax_backward(o, k.widths, of_widths, to, out.stride);
  if constexpr (degree == 3) {
    softmax_backward(o, k.heights, of_heights, to + n * out.stride, out.stride);
    store(to + 2 * n * out.stride, end0), store(to + (2 * n + 1) * out.stride, end1);
  }
}

// The degree is chosen for each pack: loops for every one of them would be most of the code.
struct Polynomial {
  static constexpr bool every_knot = false, in_steps = false;
  template <class C>
  static PYFLOWGEN_INLINE void forward(const PackOptions<C>& o, const PackInputs<C>& in, PackResult<C>& out) {
    switch (o.degree) {
      case 1: return forward_pack<1>(o, in, out);
      case 2: return forward_pack<2>(o, in, out);
      default: return forward_pack<3>(o, in, out);
    }
  }
  template <class C> static PYFLOWGEN_INLINE void backward(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> dy,
                                                           Pack<C> dlogdet, PackGradients<C>& out, Pack<C>& dx) {
    switch (o.degree) {
      case 1: return backward_pack<1>(o, in, dy, dlogdet, out, dx);
      case 2: return backward_pack<2>(o, in, dy, dlogdet, out, dx);
      default: return backward_pack<3>(o, in, dy, dlogdet, out, dx);
    }
  }
};
}  // namespace

template <class T, class A>
void polynomial_spline(const RationalQuadraticSplineForward<T, A>& a, int64_t begin, int64_t end, double* partial) {
  forward<Polynomial>(a, begin, end, partial);
}
template <class T, class A> void polynomial_spline_backward(const RationalQuadraticSplineBackward<T, A>& a,
                                                            int64_t begin, int64_t end, bool by_segment) {
  backward<Polynomial>(a, begin, end, by_segment);
}

#define PYFLOWGEN_INSTANTIATE(T, A) \
  template void polynomial_spline<T, A>(const RationalQuadraticSplineForward<T, A>&, int64_t, int64_t, double*); \
  template void polynomial_spline_backward<T, A>(const RationalQuadraticSplineBackward<T, A>&, int64_t, int64_t, bool);
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(float, float)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)

}  // namespace pyflowgen::PYFLOWGEN_ISA
