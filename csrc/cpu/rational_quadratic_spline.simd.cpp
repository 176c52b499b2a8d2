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

#include "cpu/elements.h"
#include "formula/rational_quadratic_spline.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

constexpr int max_bins = 64, max_parameters = 3 * max_bins + 1;

// A pack's parameters: pack j of widths is at widths + j stride. first and last are the outer knots' derivatives.
template <class C> struct PackParameters {
  const C *widths, *heights, *inner;  // inner: derivative of knot 1
  int64_t stride;
  const C *first, *last;
};

template <class C> struct PackInputs {
  Pack<C> x, left, right, bottom, top;
  PackParameters<C> u;
};

template <class C> struct PackOptions {
  int bins;
  bool inverse;
  Pack<C> min_width, min_height, rest_width, rest_height;  // rest: what the softmax shares out
  Pack<C> min_derivative, edge, inverse_clip, scale;
  Pack<C> to_exponent;  // from what the softmax takes to powers of two

  explicit PackOptions(const RationalQuadraticSplineOptions& o)
      : bins(int(o.bins)),
        inverse(o.inverse),
        min_width(broadcast(C(o.min_bin_width))),
        min_height(broadcast(C(o.min_bin_height))),
        rest_width(broadcast(C(1 - o.min_bin_width * double(o.bins)))),
        rest_height(broadcast(C(1 - o.min_bin_height * double(o.bins)))),
        min_derivative(broadcast(C(o.min_derivative))),
        edge(broadcast(C(o.edge))),
        inverse_clip(broadcast(C(o.clip > 0 ? 1 / o.clip : 0))),
        scale(broadcast(C(o.scale))),
        to_exponent(broadcast(C((o.convention == SplineConvention::zuko ? 1 : o.scale) * 1.44269504088896340736))) {}
};

// Sums of exponentials without error: a knot is then as exact as its distance from the middle of the interval. In float
// they are integers, in units that leave room for as many as there are bins; in double what each addition loses is
// kept.
template <class C> struct Sum;
template <> struct Sum<float> {
  u32v sum;
  static constexpr int unit(int bins) { return 30 - (32 - __builtin_clz(unsigned(bins - 1))); }
  PYFLOWGEN_INLINE void add(f32v e) { sum += (u32v) __builtin_convertvector(e, i32v); }
  // This less half the total, with one rounding.
  PYFLOWGEN_INLINE f32v from_middle(const Sum& total) const {
    return __builtin_convertvector((i32v)(sum - (total.sum >> 1)), f32v);
  }
  PYFLOWGEN_INLINE f32v value() const { return __builtin_convertvector((i32v)sum, f32v); }
  // What value() lacks.
  PYFLOWGEN_INLINE f32v rest(f32v value) const {
    return __builtin_convertvector((i32v)sum - __builtin_convertvector(value, i32v), f32v);
  }
};
template <> struct Sum<double> {
  f64v sum, lost;
  static constexpr int unit(int) { return 0; }
  PYFLOWGEN_INLINE void add(f64v e) {
    const f64v next = sum + e, added = next - sum;
    lost += (sum - (next - added)) + (e - added);
    sum = next;
  }
  PYFLOWGEN_INLINE f64v from_middle(const Sum& total) const {
    return (sum - 0.5 * total.sum) + (lost - 0.5 * total.lost);
  }
  PYFLOWGEN_INLINE f64v value() const { return sum + lost; }
  PYFLOWGEN_INLINE f64v rest(f64v value) const { return (sum - value) + lost; }
};

// Along one axis: exponentials of the parameters and their sums up to each. Knot k lies at
// middle + (k - bins / 2) least + from_middle(sum of k exponentials) (factor + rest), where rest is what factor lacks:
// the outermost knots must fit to the ends, or a narrow bin there would show the difference.
template <class C> struct Axis {
  C e[max_bins * lanes<C>];
  Sum<C> sums[max_bins];
  Pack<C> low, high, middle, least, factor, rest;

  PYFLOWGEN_INLINE Pack<C> exponential(int k) const { return load(e + k * lanes<C>); }
  // from_middle: k - bins / 2.
  PYFLOWGEN_INLINE Pack<C> knot(const Sum<C>& sum, Pack<C> from_middle, const Sum<C>& total) const {
    const Pack<C> share = sum.from_middle(total);
    return fma(share, factor, fma(share, rest, fma(from_middle, least, middle)));
  }
};

// (a + a_rest) / total in two parts.
template <class C>
PYFLOWGEN_INLINE void divide(Pack<C> a, Pack<C> a_rest, const Sum<C>& total, Pack<C>& quotient, Pack<C>& rest) {
#if !defined(__FMA__)
  if constexpr (sizeof(C) == sizeof(float)) {  // without it a remainder takes doubles
    for (int i = 0; i < lanes<C>; ++i) {
      const double exact = (double(a[i]) + double(a_rest[i])) / double(total.sum[i]);
      quotient[i] = C(exact), rest[i] = C(exact - double(quotient[i]));
    }
    return;
  }
#endif
  const Pack<C> value = total.value(), inverse = broadcast(C(1)) / value;
  quotient = a * inverse;
  rest = (fma(-quotient, value, a) + fma(-quotient, total.rest(value), a_rest)) * inverse;
}

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

template <SplineConvention S, bool height, int K, bool keep, class C>
PYFLOWGEN_INLINE void softmax(const PackOptions<C>& o, const PackParameters<C>& u, Pack<C> low, Pack<C> high,
                              Axis<C>& axis) {
  using V = Pack<C>;
  const int n = K ? K : o.bins;
  V largest = logit<S, height>(o, u, 0);
  for (int k = 1; k < n; ++k) largest = formula::greater(logit<S, height>(o, u, k), largest);
  Sum<C> sum{};
  formula::Bits<V> seen{};
  const auto add = [&]<int count>(int k, std::integral_constant<int, count>) {
    V e[count];  // exponentials
    for (int i = 0; i < count; ++i) e[i] = (logit<S, height>(o, u, k + i) - largest) * o.to_exponent;
    formula::exp2_of_logits(e, Sum<C>::unit(n), seen);
    for (int i = 0; i < count; ++i) {
      if constexpr (keep) store(axis.e + (k + i) * lanes<C>, e[i]);
      sum.add(e[i]);
      axis.sums[k + i] = sum;
    }
  };
  int k = 0;
  for (; k + 4 <= n; k += 4) add(k, std::integral_constant<int, 4>());
  for (; k < n; ++k) add(k, std::integral_constant<int, 1>());
  const V range = high - low;
  axis.low = low, axis.high = high, axis.middle = (low + high) * broadcast(C(0.5));
  axis.least = (height ? o.min_height : o.min_width) * range;
  // range - bins least, and what of it is lost
  const V bins = broadcast(C(n)), shared = fma(-bins, axis.least, range), lost = fma(-bins, axis.least, range - shared);
  divide(shared, lost, sum, axis.factor, axis.rest);
  if constexpr (sizeof(C) == sizeof(float))
    axis.factor = formula::saw_nan<V>(seen) ? broadcast(formula::not_a_number<C>) : axis.factor;
}

// The bin of `value` on axis a, and the same on b.
template <class V> struct Found {
  V a0, a1, b0, b1;  // its ends
  V d0, d1;          // parameters of its derivatives
  V bin;             // its number
};

template <class Mask> PYFLOWGEN_INLINE Sum<float> choose(Mask mask, const Sum<float>& a, const Sum<float>& b) {
  return {mask ? a.sum : b.sum};
}
template <class Mask> PYFLOWGEN_INLINE Sum<double> choose(Mask mask, const Sum<double>& a, const Sum<double>& b) {
  return {mask ? a.sum : b.sum, mask ? a.lost : b.lost};
}

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
  softmax<S, false, K, keep>(o, in.u, in.left, in.right, widths);
  softmax<S, true, K, keep>(o, in.u, in.bottom, in.top, heights);
  const auto f =
      o.inverse ? search<K>(value, in.u, o.bins, heights, widths) : search<K>(value, in.u, o.bins, widths, heights);
  const auto d0 = formula::knot_derivative<S>(f.d0, o.min_derivative, o.edge, o.inverse_clip),
             d1 = formula::knot_derivative<S>(f.d1, o.min_derivative, o.edge, o.inverse_clip);
  if (o.inverse) return {{f.b0, f.b1, f.a0, f.a1, d0.value, d1.value}, f.bin, d0.derivative, d1.derivative};
  return {{f.a0, f.a1, f.b0, f.b1, d0.value, d1.value}, f.bin, d0.derivative, d1.derivative};
}

template <class C> PYFLOWGEN_INLINE auto is_inside(const PackOptions<C>& o, const PackInputs<C>& in) {
  return (in.x >= (o.inverse ? in.bottom : in.left)) & (in.x <= (o.inverse ? in.top : in.right));
}

template <class C> struct PackResult { Pack<C> y, l; };

// y and l inside, rubbish elsewhere. Not inlined: once for every convention and element type, whatever the storage.
template <SplineConvention S, int K, class C>
__attribute__((noinline)) void forward_pack(const PackOptions<C>& o, const PackInputs<C>& in, PackResult<C>& out) {
  Axis<C> widths, heights;
  const Pack<C> value = is_inside(o, in) ? in.x : o.inverse ? in.bottom : in.left;
  const auto at = locate<S, K, false>(o, in, value, widths, heights);
  const auto [y, l] = formula::rational_quadratic(value, at.bin, o.inverse);
  out = {y, l};
}

// Where the gradients of the parameters go, as packs; `ends` are those of the outer knots.
template <class C> struct PackGradients {
  C *widths, *heights, *inner;
  int64_t stride;
  Pack<C> ends[2];
};

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

// ---- from memory to packs ----------------------------------------------------------------------------------------

// How a group's parameters are reached: whole rows of a packed tensor, or widths, heights and derivatives by
// themselves.
template <class T>
bool packed(const SplineParameters<T>& w, const SplineParameters<T>& h, const SplineParameters<T>& d, int64_t bins) {
  const auto same = [&](const Strides& s) {
    return s.batch == w.strides.batch && s.channel == w.strides.channel && s.inner == w.strides.inner;
  };
  return h.p == w.p + bins * w.parameter && d.p == h.p + bins * w.parameter && h.parameter == w.parameter &&
         d.parameter == w.parameter && same(h.strides) && same(d.strides);
}

// Parameters of a group as packs, in memory where they lie so already and else in `buffer`.
template <class T, class Arguments> struct Loader {
  using C = Compute<T>;
  static constexpr int n = width<T>;
  const Arguments& a;
  bool one, along;  // one tensor; parameters of neighbouring elements lie side by side

  explicit Loader(const Arguments& arguments)
      : a(arguments), one(packed(a.widths, a.heights, a.derivatives, a.o.bins)) {}

  // What lies in memory as it is needed: packs of neighbouring elements.
  PYFLOWGEN_INLINE bool in_place(const Group<n>& g) const {
    return std::is_same_v<T, C> && one && g.regular && g.n == n && !a.mask && g.step(a.widths.strides) == 1;
  }

  PYFLOWGEN_INLINE PackParameters<C> load_parameters(const Group<n>& g, C* buffer, C* edges) const {
    const int64_t bins = a.o.bins;
    const C* from = buffer;
    int64_t stride = n;
    if (in_place(g)) {
      if constexpr (std::is_same_v<T, C>) from = a.widths.p + g.first(a.widths.strides), stride = a.widths.parameter;
    } else {
      const T* rows[n];
      if (one) prefetch_rows(a.widths.p, a.widths.strides, g, 2 * bins + a.o.derivatives);
      rows_of(a.widths.p, a.widths.strides, g, rows);
      rows_to_packs<T>(rows, a.widths.parameter, one ? 2 * bins + a.o.derivatives : bins, buffer);
      if (!one) {
        rows_of(a.heights.p, a.heights.strides, g, rows);
        rows_to_packs<T>(rows, a.heights.parameter, bins, buffer + bins * n);
        rows_of(a.derivatives.p, a.derivatives.strides, g, rows);
        rows_to_packs<T>(rows, a.derivatives.parameter, a.o.derivatives, buffer + 2 * bins * n);
      }
      if (a.mask) {  // what is not transformed may have any parameters
        const auto selected = load_mask<C>(a.mask, a.mask_strides, g);
        for (int64_t i = 0; i < 2 * bins + a.o.derivatives; ++i)
          store(buffer + i * n, selected ? load(buffer + i * n) : Pack<C>{});
      }
    }
    const C* const d = from + 2 * bins * stride;
    PackParameters<C> u{from, from + bins * stride, d, stride, edges, edges};
    if (a.o.tails == SplineTails::linear) {
      store(edges, broadcast(C(a.o.edge)));
    } else {
      u.inner = d + stride;
      u.first = d, u.last = a.o.tails == SplineTails::circular ? d : d + bins * stride;
      if (a.o.tails == SplineTails::mixed) {
        const auto circular = load_mask<C>(a.circular, a.circular_strides, g);
        store(edges, circular ? load(d) : broadcast(C(a.o.edge)));
        u.first = u.last = edges;
      }
    }
    return u;
  }

  PYFLOWGEN_INLINE PackInputs<C> inputs(const Group<n>& g, const Strides& x_strides, C* buffer, C* edges) const {
    PackInputs<C> in{load_group(a.x + a.o.start * a.x_strides.channel, x_strides, g),
                     broadcast(C(a.o.left)),
                     broadcast(C(a.o.right)),
                     broadcast(C(a.o.bottom)),
                     broadcast(C(a.o.top)),
                     load_parameters(g, buffer, edges)};
    if (a.bound) {
      const Pack<C> bound = load_group(a.bound, a.bound_strides, g);
      in.left *= bound, in.right *= bound, in.bottom *= bound, in.top *= bound;
    }
    return in;
  }
};

// Strides of the transformed channels in a tensor that has them all.
Strides part(const Strides& s, int64_t step) { return {s.batch, s.channel * step, s.inner}; }

// y and l of elements [first, last); l goes to logdet, in their order.
template <SplineConvention S, class T, class A> void forward_elements(const RationalQuadraticSplineForward<T, A>& a,
                                                                      const PackOptions<Compute<T>>& options,
                                                                      int64_t first, int64_t last, A* logdet) {
  using C = Compute<T>;
  constexpr int n = width<T>;
  const RationalQuadraticSplineOptions& o = a.o;
  const Loader<T, RationalQuadraticSplineForward<T, A>> loader(a);
  const Strides x_strides = part(a.x_strides, o.step), y_strides = part(a.y_strides, o.step);
  const C outside = o.tails == SplineTails::none ? formula::not_a_number<C> : C(0);
  alignas(64) C buffer[max_parameters * n], edges[n];
  each_group<n>(o.count, o.inner, first, last, [&](const Group<n>& g, int64_t e) {
    const PackInputs<C> in = loader.inputs(g, x_strides, buffer, edges);
    PackResult<C> r;
    if (S == SplineConvention::nflows && o.bins == 8) forward_pack<S, 8>(options, in, r);
    else forward_pack<S, 0>(options, in, r);
    const auto inside = is_inside(options, in);
    Pack<C> y = inside ? r.y : o.tails == SplineTails::none ? broadcast(outside) : in.x;
    Pack<C> l = inside ? r.l : broadcast(outside);
    if (a.mask) {
      const auto selected = load_mask<C>(a.mask, a.mask_strides, g);
      y = selected ? y : in.x, l = selected ? l : Pack<C>{};
    }
    store_group(a.y + o.start * a.y_strides.channel, y_strides, g, y);
    if (g.n == n) store(logdet + (e - first), l);
    else
      for (int i = 0; i < g.n; ++i) logdet[e - first + i] = l[i];
  });
}

// Sum in an order that depends on nothing but the number of elements.
template <class A> double sum_of(const A* l, int64_t n) {
  f64v sum{};
  int64_t i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) sum += widen_add(load(l + i));
  double total = reduce_add(sum);
  for (; i < n; ++i) total += double(l[i]);
  return total;
}

// Elements whose log-derivatives are kept in cache until they are summed.
constexpr int64_t chunk = 1024;

// Elements of a row's event that make up one of its segments.
struct Piece { int64_t first, last; };
Piece piece(int64_t elements, int64_t segment, int64_t segments) {
  return {elements * segment / segments, elements * (segment + 1) / segments};
}

template <SplineConvention S, class T, class A>
void forward(const RationalQuadraticSplineForward<T, A>& a, int64_t begin, int64_t end, double* partial) {
  const RationalQuadraticSplineOptions& o = a.o;
  const PackOptions<Compute<T>> options(o);
  const int64_t elements = o.count * o.inner;
  A l[chunk];
  const auto sum_elements = [&](int64_t first, int64_t last) {
    double sum = 0;
    for (int64_t e = first; e < last; e += chunk) {
      const int64_t stop = last - e < chunk ? last : e + chunk;
      forward_elements<S>(a, options, e, stop, l);
      sum += sum_of(l, stop - e);
    }
    return sum;
  };
  if (partial) {
    const int64_t segments = rational_quadratic_spline_segments(o);
    for (int64_t i = begin; i < end; ++i) {
      const auto [first, last] = piece(elements, i % segments, segments);
      const int64_t row = i / segments * elements;
      partial[i] = sum_elements(row + first, row + last);
    }
    return;
  }
  const int64_t rows = elements < chunk ? chunk / elements : 1;  // in one chunk
  for (int64_t row = begin; row < end; row += rows) {
    const int64_t stop = end - row < rows ? end : row + rows;
    for (int64_t r = row; r < stop; ++r) copy_rest(o, a.x, a.x_strides, a.y, a.y_strides, r);
    if (elements > chunk) {
      const double sum = sum_elements(row * elements, stop * elements);
      a.logdet[row] = A(o.inverse ? -sum : sum);
      continue;
    }
    forward_elements<S>(a, options, row * elements, stop * elements, l);
    for (int64_t r = row; r < stop; ++r) {
      const double sum = sum_of(l + (r - row) * elements, elements);
      a.logdet[r] = A(o.inverse ? -sum : sum);
    }
  }
}

template <SplineConvention S, class T, class A> void backward_elements(const RationalQuadraticSplineBackward<T, A>& a,
                                                                       const PackOptions<Compute<T>>& options,
                                                                       int64_t first, int64_t last) {
  using C = Compute<T>;
  constexpr int n = width<T>;
  const RationalQuadraticSplineOptions& o = a.o;
  const int64_t bins = o.bins, columns = 2 * bins + o.derivatives;
  const Loader<T, RationalQuadraticSplineBackward<T, A>> loader(a);
  const bool one_out = packed(a.dwidths, a.dheights, a.dderivatives, bins);
  const Strides x_strides = part(a.x_strides, o.step), dy_strides = part(a.dy_strides, o.step),
                dx_strides = part(a.dx_strides, o.step), dlogdet_strides{a.dlogdet_stride, 0, 0};
  alignas(64) C buffer[max_parameters * n], edges[n];
  T rest[max_parameters];  // gradients of the lanes beyond a group's end
  const bool large =
      one_out && a.dwidths.parameter == 1 && o.batch * o.count * o.inner * columns * int64_t(sizeof(T)) >= past_cache;
  alignas(64) T together[max_parameters * n];  // gradients as they go past the cache
  each_group<n>(o.count, o.inner, first, last, [&](const Group<n>& g, int64_t) {
    const PackInputs<C> in = loader.inputs(g, x_strides, buffer, edges);
    const Pack<C> dy = load_group(a.dy + o.start * a.dy_strides.channel, dy_strides, g);
    Pack<C> used_dy = dy, dlogdet = load_group(a.dlogdet, dlogdet_strides, g);
    auto inside = is_inside(options, in);
    if (a.mask) {
      const auto selected = load_mask<C>(a.mask, a.mask_strides, g);
      used_dy = selected ? dy : Pack<C>{}, dlogdet = selected ? dlogdet : Pack<C>{};
      inside &= selected;
    }
    const bool direct = std::is_same_v<T, C> && one_out && g.regular && g.n == n && g.step(a.dwidths.strides) == 1;
    C* to = buffer;
    int64_t stride = n;
    if constexpr (std::is_same_v<T, C>) {
      if (direct) to = a.dwidths.p + g.first(a.dwidths.strides), stride = a.dwidths.parameter;
    }
    C* const d = to + 2 * bins * stride;
    PackGradients<C> out{to, to + bins * stride, o.tails == SplineTails::linear ? d : d + stride, stride, {}};
    Pack<C> dx;
    if (S == SplineConvention::nflows && o.bins == 8) backward_pack<S, 8>(options, in, used_dy, dlogdet, out, dx);
    else backward_pack<S, 0>(options, in, used_dy, dlogdet, out, dx);
    const bool none = o.tails == SplineTails::none;
    dx = inside ? dx : none ? Pack<C>{} : dy;
    if (a.mask && none) dx = load_mask<C>(a.mask, a.mask_strides, g) ? dx : dy;
    store_group(a.dx + o.start * a.dx_strides.channel, dx_strides, g, dx);

    const Pack<C> both = out.ends[0] + out.ends[1];
    if (o.tails == SplineTails::none) {
      store(d, out.ends[0]), store(d + bins * stride, out.ends[1]);
    } else if (o.tails == SplineTails::circular) {
      store(d, both);
    } else if (o.tails == SplineTails::mixed) {
      store(d, load_mask<C>(a.circular, a.circular_strides, g) ? both : Pack<C>{}), store(d + bins * stride, Pack<C>{});
    }
    if (direct) return;
    T* rows[n];
    const auto write = [&](const SplineParameters<T>& to, const C* packs, int64_t number) {
      rows_of(to.p, to.strides, g, rows);
      for (int i = g.n; i < n; ++i) rows[i] = rest;
      packs_to_rows<T>(packs, rows, to.parameter, number, g.n);
    };
    if constexpr (std::is_same_v<T, float>) {
      T* const to = a.dwidths.p + g.first(a.dwidths.strides);
      if (large && g.regular && g.n == n && g.step(a.dwidths.strides) == columns && uintptr_t(to) % vector_bytes == 0) {
        for (int l = 0; l < n; ++l) rows[l] = together + l * columns;
        packs_to_rows<T>(buffer, rows, 1, columns, n);
        return stream(to, together, n * columns);
      }
    }
    if (one_out) return write(a.dwidths, buffer, columns);
    write(a.dwidths, buffer, bins);
    write(a.dheights, buffer + bins * n, bins);
    write(a.dderivatives, buffer + 2 * bins * n, o.derivatives);
  });
  if (large) stream_done();
}

template <SplineConvention S, class T, class A>
void backward(const RationalQuadraticSplineBackward<T, A>& a, int64_t begin, int64_t end, bool by_segment) {
  const RationalQuadraticSplineOptions& o = a.o;
  const PackOptions<Compute<T>> options(o);
  const int64_t elements = o.count * o.inner;
  if (!by_segment) {
    for (int64_t row = begin; row < end; ++row) copy_rest(o, a.dy, a.dy_strides, a.dx, a.dx_strides, row);
    return backward_elements<S>(a, options, begin * elements, end * elements);
  }
  const int64_t segments = rational_quadratic_spline_segments(o);
  for (int64_t i = begin; i < end; ++i) {
    const auto [first, last] = piece(elements, i % segments, segments);
    const int64_t row = i / segments * elements;
    backward_elements<S>(a, options, row + first, row + last);
  }
}

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
  with_convention(a.o.convention, [&]<SplineConvention S>() { forward<S>(a, begin, end, partial); });
}
template <class T, class A> void rational_quadratic_spline_backward(const RationalQuadraticSplineBackward<T, A>& a,
                                                                    int64_t begin, int64_t end, bool by_segment) {
  with_convention(a.o.convention, [&]<SplineConvention S>() { backward<S>(a, begin, end, by_segment); });
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
