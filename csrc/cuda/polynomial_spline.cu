// polynomial_spline on CUDA: a thread an element, parameters staged in shared memory, log-determinants summed on the
// way. Not yet run on a GPU.
//
// Floor, P parameters and n transformed elements of b bytes and r copied ones: forward reads x and the parameters and
// writes y, ((P + 2) n + 2 r) b bytes; backward reads those and dy and writes their gradients, ((2 P + 3) n + 2 r) b
// bytes. The kernels move just that, plus a mask's byte for each element and 16 bytes for each partial sum where a row
// is cut. About 50 operations a bin for each softmax and as many for a density; 20 to 40 a bin for the search; 150 an
// element, and 20 for each of the cubic inverse's Newton steps, three or four of them, of which a warp takes as many as
// its slowest element. In float32 with 8 bins some 700 (degree 1), 1,400 (2) and 1,300 (3), where an H100 has 340, 580
// and 680 instruction slots an element at its memory's speed: arithmetic is the limit.
//
// Exponentials take the place of what they are made of, and a density that of its parameter: sizes and neighbours of
// the bin that is found are then read, not carried. How work is cut: spline.cuh.
#include "cuda/spline.cuh"
#include "formula/polynomial_spline.h"
#include "polynomial_spline.h"

namespace pyflowgen::cuda {
namespace {

// By softmax, as nflows has it.
template <class C> using SoftmaxAxis = Axis<SplineConvention::nflows, false, C>;

template <class C> __device__ __forceinline__ C size(const SoftmaxAxis<C>& axis, int k) {
  return formula::fma(axis.exponential(k), axis.half + axis.half, axis.least);
}

// Bins of one size.
template <class C> struct EqualBins {
  C low, high, each;
  struct Ends {
    const EqualBins& axis;
    __device__ __forceinline__ C next(int k) const { return formula::fma(C(k + 1), axis.each, axis.low); }
  };
  __device__ __forceinline__ Ends ends() const { return {*this}; }
};

// A quadratic spline's densities and, in their units, its heights. The densities' parameters become their softplus.
template <class C> struct Densities {
  static constexpr C least = C(1e-3);  // of a knot, before all are normalised
  SoftmaxAxis<C> widths;
  C* own;
  int bins, first;  // knot of the first parameter: with tails the outer densities come of the others
  C low, high;
  C share, rho;             // 1 over the interval's width, its slope
  C outer, outer_share;     // 1 less what the outer densities share
  C area, q, least_height;  // area over the width; what normalises; least density afterwards
  C to_range;

  __device__ __forceinline__ Densities(const Options<C>& o, const Input<C>& in, C* u)
      : widths(o, u, u, o.min_width, in.left, in.right),
        own(u + o.bins),
        bins(o.bins),
        first(o.tails == SplineTails::none ? 0 : 1),
        low(in.bottom),
        high(in.top),
        share(C(1) / (in.right - in.left)),
        rho((in.top - in.bottom) / (in.right - in.left)),
        outer(0),
        least_height(o.min_height) {
    for (int k = 0; k < o.bins + o.derivatives; ++k) own[k] = formula::softplus(own[k] * o.scale);
    C inner = 0;  // area of the bins but the outer two
    for (int k = 1; k + 1 < bins; ++k) inner = formula::fma(mean(k), size(widths, k) * share, inner);
    const C w_first = size(widths, 0) * share, w_last = size(widths, bins - 1) * share;
    outer_share = C(1) - (w_first + w_last) * C(0.25);
    if (first) outer = (inner + (w_first * at(1) + w_last * at(bins - 1)) * C(0.25)) / outer_share;
    area = formula::fma(mean(0), w_first, formula::fma(mean(bins - 1), w_last, inner));
    q = (C(1) - least_height) / area;
    HeightSum total{};
    for (int k = 0; k < bins; ++k) total.add(height(k));
    to_range = (high - low) / total.sum;
  }
  // Of knot k, before all are normalised.
  __device__ __forceinline__ C at(int k) const {
    return first && (k == 0 || k == bins) ? outer : own[k - first] + least;
  }
  __device__ __forceinline__ C normalised(int k) const { return formula::fma(at(k), q, least_height); }
  __device__ __forceinline__ C mean(int k) const { return (at(k) + at(k + 1)) * C(0.5); }
  __device__ __forceinline__ C height(int k) const {
    return rho * size(widths, k) * formula::fma(mean(k), q, least_height);
  }

  // What each addition loses is kept, and the sum of all heights brought to the interval's: a knot errs no more than
  // its heights do.
  struct HeightSum {
    C sum = 0, lost = 0;
    __device__ __forceinline__ void add(C h) {
      const C step = h + lost, next = sum + step;
      lost = step - (next - sum), sum = next;
    }
  };
  struct Ends {
    const Densities& axis;
    HeightSum rise{};
    __device__ __forceinline__ C next(int k) {
      rise.add(axis.height(k));
      return formula::fma(rise.sum, axis.to_range, axis.low);
    }
  };
  __device__ __forceinline__ Ends ends() const { return {*this}; }
};

// The bin that an element is in, as its formula wants it, and what its gradients need besides.
template <class C> struct Located {
  int number;
  C w, h;
  formula::PolynomialBin<C> bin;

  template <class X, class Y>
  __device__ __forceinline__ Located(const Options<C>& o, const Input<C>& in, const X& x, const Y& y) {
    const Found<C> f = o.inverse ? search<C>(in.x, o.bins, y, x) : search<C>(in.x, o.bins, x, y);
    number = f.bin;
    bin.x0 = o.inverse ? f.b0 : f.a0, bin.x1 = o.inverse ? f.b1 : f.a1;
    bin.y0 = o.inverse ? f.a0 : f.b0, bin.y1 = o.inverse ? f.a1 : f.b1;
    bin.a = bin.b = 1;
  }
  __device__ __forceinline__ void sizes(C width, C height) { w = width, h = height, bin.slope = h / w; }
};

// The mean, by the softmax, of the gradients d(k) of an axis' sizes.
template <class C, class D>
__device__ __forceinline__ C softmax_mean(const SoftmaxAxis<C>& axis, int bins, const D& d) {
  C sum = 0;
  for (int k = 0; k < bins; ++k) sum = formula::fma(axis.exponential(k), d(k), sum);
  return sum / (axis.total.sum + axis.total.lost);
}
// From those to the gradients of the parameters, in their place.
template <class C, class D>
__device__ __forceinline__ void softmax_backward(const SoftmaxAxis<C>& axis, int bins, const D& d) {
  const C mean = softmax_mean(axis, bins, d), factor = axis.scale * (axis.half + axis.half);
  for (int k = 0; k < bins; ++k) axis.own[k] = axis.exponential(k) * factor * (d(k) - mean);
}

// A bin's gradient where that of all before it is `before`, and its own `at`.
template <class C> __device__ __forceinline__ C choose(int k, int number, C before, C at) {
  return k < number ? before : k == number ? at : C(0);
}

template <int degree> struct Polynomial;

template <> struct Polynomial<1> {
  template <class C> struct Knots {
    SoftmaxAxis<C> heights;
    EqualBins<C> widths;
    Located<C> at;
    __device__ __forceinline__ Knots(const Options<C>& o, const Input<C>& in, C* u)
        : heights(o, u, u, o.min_height, in.bottom, in.top),
          widths{in.left, in.right, (in.right - in.left) / C(o.bins)},
          at(o, in, widths, heights) {
      at.sizes(widths.each, size(heights, at.number));
    }
  };
  template <class C>
  static __device__ __forceinline__ formula::Splined<C> forward(const Options<C>& o, const Input<C>& in, C* u) {
    const Knots<C> k(o, in, u);
    return formula::polynomial<1>(in.x, k.at.bin, o.inverse);
  }
  template <class C>
  static __device__ __forceinline__ C backward(const Options<C>& o, const Input<C>& in, C dy, C dlogdet, C* u) {
    const Knots<C> k(o, in, u);
    const auto g = formula::polynomial_backward<1>(dy, dlogdet, in.x, k.at.bin, k.at.w, k.at.h, o.inverse);
    softmax_backward(k.heights, o.bins, [&](int j) { return choose(j, k.at.number, g.shift_y, g.height); });
    return g.input;
  }
};

template <> struct Polynomial<2> {
  template <class C> struct Knots {
    Densities<C> densities;
    Located<C> at;
    C d0, d1;
    __device__ __forceinline__ Knots(const Options<C>& o, const Input<C>& in, C* u)
        : densities(o, in, u),
          at(o, in, densities.widths, densities),
          d0(densities.normalised(at.number)),
          d1(densities.normalised(at.number + 1)) {
      at.sizes(size(densities.widths, at.number), densities.height(at.number));
      const C share = C(2) / (d0 + d1);
      at.bin.a = d0 * share, at.bin.b = d1 * share;
    }
  };
  template <class C>
  static __device__ __forceinline__ formula::Splined<C> forward(const Options<C>& o, const Input<C>& in, C* u) {
    const Knots<C> k(o, in, u);
    return formula::polynomial<2>(in.x, k.at.bin, o.inverse);
  }
  // A bin's height is rho size (mean q + least), where q is shared by all, and each mean of its knots' densities: the
  // gradient of bin j's area size mean is c(j), that of its size c(j) mean + what comes of least and of x's knots, that
  // of a density the half of what its two bins' c(j) size make. With tails the outer densities are made of the areas of
  // the others, those of the outer bins halved, and add to c what they are given.
  template <class C>
  static __device__ __forceinline__ C backward(const Options<C>& o, const Input<C>& in, C dy, C dlogdet, C* u) {
    const Knots<C> k(o, in, u);
    const auto& d = k.densities;
    const auto& bin = k.at.bin;
    const int number = k.at.number, last = o.bins - 1;
    const auto g = formula::polynomial_backward<2>(dy, dlogdet, in.x, bin, k.at.w, k.at.h, o.inverse);
    // a = 2 d0 / (d0 + d1), b = 2 - a; as densities before they are normalised
    const C sum = k.d0 + k.d1, ends = (g.d0 - g.d1) * C(2) / (sum * sum), end0 = ends * k.d1, end1 = -ends * k.d0;
    const C to_y = d.rho * g.shift_y, to_h = d.rho * g.height;
    const C d_q = ((bin.y0 - in.bottom - d.least_height * d.rho * (bin.x0 - in.left)) * g.shift_y +
                   (k.at.h - d.least_height * d.rho * k.at.w) * g.height + end0 * (k.d0 - d.least_height) +
                   end1 * (k.d1 - d.least_height)) /
                  d.q;
    const C d_area = -d_q * d.q / d.area * d.share;
    const auto area = [&](int j) { return formula::fma(choose(j, number, to_y, to_h), d.q, d_area); };
    const C to_first = number == 0 ? end0 * d.q : C(0), to_last = number == last ? end1 * d.q : C(0);
    const C first = area(0) * size(d.widths, 0) * C(0.5) + to_first;
    const C final = area(last) * size(d.widths, last) * C(0.5) + to_last;
    const C by_width = d.first ? (first + final) / d.outer_share * d.share : C(0);
    const auto c = [&](int j) { return formula::fma(by_width, j == 0 || j == last ? C(0.5) : C(1), area(j)); };
    const auto of_size = [&](int j, C mean) {
      return formula::fma(
          c(j), mean,
          formula::fma(choose(j, number, to_y, to_h), d.least_height, choose(j, number, g.shift_x, g.width)));
    };
    const C mean = softmax_mean(d.widths, o.bins, [&](int j) { return of_size(j, d.mean(j)); });
    const C factor = d.widths.scale * (d.widths.half + d.widths.half);
    // softplus(v) is all that is left of v: its derivative is 1 - exp(-softplus(v))
    const auto put = [&](int knot, C softplus, C gradient) {
      d.own[knot - d.first] = -gradient * o.scale * formula::expm1(-softplus);
    };
    C before = 0, density = d.at(0), softplus = d.first ? C(0) : d.own[0];
    for (int j = 0; j <= last; ++j) {
      const C e = d.widths.exponential(j), area_of = c(j) * size(d.widths, j) * C(0.5), next = d.at(j + 1);
      const C next_softplus = j < last || !d.first ? d.own[j + 1 - d.first] : C(0);
      u[j] = e * factor * (of_size(j, (density + next) * C(0.5)) - mean);
      const C knot = number == j ? end0 * d.q : number == j - 1 ? end1 * d.q : C(0);
      if (j > 0 || !d.first) put(j, softplus, before + area_of + knot);
      before = area_of, density = next, softplus = next_softplus;
    }
    if (!d.first) put(o.bins, softplus, before + to_last);
    return g.input;
  }
};

template <> struct Polynomial<3> {
  template <class C> struct Knots {
    SoftmaxAxis<C> widths, heights;
    Located<C> at;
    bool first, last;
    C w0, s0, w1, s1;  // of the neighbours: sizes and slopes
    C end0, end1;      // sigmoids of the outer derivatives
    __device__ __forceinline__ Knots(const Options<C>& o, const Input<C>& in, C* u)
        : widths(o, u, u, o.min_width, in.left, in.right),
          heights(o, u + o.bins, u + o.bins, o.min_height, in.bottom, in.top),
          at(o, in, widths, heights),
          first(at.number == 0),
          last(at.number == o.bins - 1) {
      const int n = at.number;
      at.sizes(size(widths, n), size(heights, n));
      const int before = first ? 0 : n - 1, after = last ? n : n + 1;
      w0 = size(widths, before), s0 = size(heights, before) / w0;
      w1 = size(widths, after), s1 = size(heights, after) / w1;
      end0 = formula::sigmoid(u[2 * o.bins]), end1 = formula::sigmoid(u[2 * o.bins + 1]);
      at.bin.a = first ? C(3) * end0 : formula::limited_derivative(w0, s0, at.w, at.bin.slope).value / at.bin.slope;
      at.bin.b = last ? C(3) * end1 : formula::limited_derivative(at.w, at.bin.slope, w1, s1).value / at.bin.slope;
    }
  };
  template <class C>
  static __device__ __forceinline__ formula::Splined<C> forward(const Options<C>& o, const Input<C>& in, C* u) {
    const Knots<C> k(o, in, u);
    return formula::polynomial<3>(in.x, k.at.bin, o.inverse);
  }
  template <class C>
  static __device__ __forceinline__ C backward(const Options<C>& o, const Input<C>& in, C dy, C dlogdet, C* u) {
    const Knots<C> k(o, in, u);
    const auto& bin = k.at.bin;
    auto g = formula::polynomial_backward<3>(dy, dlogdet, in.x, bin, k.at.w, k.at.h, o.inverse);
    // a = d0 / slope, and the slopes h / w
    C before_w = 0, before_h = 0, after_w = 0, after_h = 0, d_slope = 0, end0 = 0, end1 = 0;
    if (k.first) {
      end0 = g.d0 * C(3) * k.end0 * (C(1) - k.end0);
    } else {
      const auto at0 = formula::limited_derivative(k.w0, k.s0, k.at.w, bin.slope);
      const C d0 = g.d0 / bin.slope;
      before_h = d0 * at0.s0 / k.w0, before_w = d0 * at0.w0 - before_h * k.s0;
      d_slope = d0 * (at0.s1 - bin.a), g.width += d0 * at0.w1;
    }
    if (k.last) {
      end1 = g.d1 * C(3) * k.end1 * (C(1) - k.end1);
    } else {
      const auto at1 = formula::limited_derivative(k.at.w, bin.slope, k.w1, k.s1);
      const C d1 = g.d1 / bin.slope;
      after_h = d1 * at1.s1 / k.w1, after_w = d1 * at1.w1 - after_h * k.s1;
      d_slope += d1 * (at1.s0 - bin.b), g.width += d1 * at1.w0;
    }
    g.height += d_slope / k.at.w, g.width -= d_slope * bin.slope / k.at.w;
    const auto of = [&](int j, C shift, C size, C before, C after) {
      return choose(j, k.at.number, shift, size) + (j == k.at.number - 1   ? before
                                                    : j == k.at.number + 1 ? after
                                                                           : C(0));
    };
    softmax_backward(k.widths, o.bins, [&](int j) { return of(j, g.shift_x, g.width, before_w, after_w); });
    softmax_backward(k.heights, o.bins, [&](int j) { return of(j, g.shift_y, g.height, before_h, after_h); });
    u[2 * o.bins] = end0, u[2 * o.bins + 1] = end1;
    return g.input;
  }
};

template <class F> void with_degree(int64_t degree, F f) {
  switch (degree) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    default: return f.template operator()<3>();
  }
}

}  // namespace

int64_t polynomial_spline_segments(const RationalQuadraticSplineOptions& o) { return spline_segments(o); }

template <class T, class A>
void polynomial_spline(const RationalQuadraticSplineForward<T, A>& a, double* partial, void* stream) {
  with_degree(a.o.degree, [&]<int degree>() { launch_forward<Polynomial<degree>>(a, partial, stream); });
}

template <class T, class A>
void polynomial_spline_backward(const RationalQuadraticSplineBackward<T, A>& a, void* stream) {
  with_degree(a.o.degree, [&]<int degree>() { launch_backward<Polynomial<degree>>(a, stream); });
}

#define PYFLOWGEN_INSTANTIATE(T, A) \
  template void polynomial_spline<T, A>(const RationalQuadraticSplineForward<T, A>&, double*, void*); \
  template void polynomial_spline_backward<T, A>(const RationalQuadraticSplineBackward<T, A>&, void*);
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(float, float)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)

}  // namespace pyflowgen::cuda
