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
        scale(broadcast(C(o.scale))) {}
};

// Sums of exponentials, each at most 1, without error: a knot is then as exact as its distance from the middle of the
// interval. In float they are integers, of one unit at least 2^-24; in double what each addition loses is kept.
template <class C> struct Sum;
template <> struct Sum<float> {
  u32v sum;
  PYFLOWGEN_INLINE void add(f32v e, int bins) {
    sum += (u32v) __builtin_convertvector(e * broadcast(0x1p30f / float(bins)), i32v);
  }
  // Twice this less the total, with one rounding.
  PYFLOWGEN_INLINE f32v from_middle(const Sum& total) const {
    return __builtin_convertvector((i32v)(sum + sum - total.sum), f32v);
  }
  PYFLOWGEN_INLINE f32v value() const { return __builtin_convertvector((i32v)sum, f32v); }
  // What value() lacks.
  PYFLOWGEN_INLINE f32v rest(f32v value) const {
    return __builtin_convertvector((i32v)sum - __builtin_convertvector(value, i32v), f32v);
  }
  // An exponential in units of the sum.
  static PYFLOWGEN_INLINE f32v unit(int bins) { return broadcast(0x1p30f / float(bins)); }
};
template <> struct Sum<double> {
  f64v sum, lost;
  PYFLOWGEN_INLINE void add(f64v e, int) {
    const f64v next = sum + e, added = next - sum;
    lost += (sum - (next - added)) + (e - added);
    sum = next;
  }
  PYFLOWGEN_INLINE f64v from_middle(const Sum& total) const {
    return (sum + sum - total.sum) + (lost + lost - total.lost);
  }
  PYFLOWGEN_INLINE f64v value() const { return sum + lost; }
  PYFLOWGEN_INLINE f64v rest(f64v value) const { return (sum - value) + lost; }
  static PYFLOWGEN_INLINE f64v unit(int) { return broadcast(1.0); }
};

// Along one axis: exponentials of the parameters and their sums up to each. Knot k lies at
// middle + (k - bins / 2) least + from_middle(sum of k exponentials) (half + half_rest), where half_rest is what half
// lacks: the outermost knots must fit to the ends, from which the others' error would be seen in a narrow bin.
template <class C> struct Axis {
  C e[max_bins * lanes<C>];
  Sum<C> sums[max_bins];
  Pack<C> low, high, middle, least, half, half_rest;

  PYFLOWGEN_INLINE Pack<C> exponential(int k) const { return load(e + k * lanes<C>); }
  PYFLOWGEN_INLINE Pack<C> knot(int k, Pack<C> from_middle, const Sum<C>& total) const {
    const Pack<C> share = sums[k - 1].from_middle(total);
    return fma(share, half, fma(share, half_rest, fma(from_middle, least, middle)));
  }
};

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

template <SplineConvention S, bool height, bool keep, class C>
PYFLOWGEN_INLINE void softmax(const PackOptions<C>& o, const PackParameters<C>& u, Pack<C> low, Pack<C> high,
                              Axis<C>& axis) {
  using V = Pack<C>;
  constexpr bool scaled = S == SplineConvention::zuko;
  V largest = logit<S, height>(o, u, 0);
  for (int k = 1; k < o.bins; ++k) largest = formula::greater(logit<S, height>(o, u, k), largest);
  const V scale = scaled ? broadcast(C(1)) : o.scale, offset = -largest * scale;
  Sum<C> sum{};
  for (int k = 0; k < o.bins; ++k) {
    const V e =
        formula::exp_in_range(formula::at_least(fma(logit<S, height>(o, u, k), scale, offset), formula::exp_lowest<V>));
    if constexpr (keep) store(axis.e + k * lanes<C>, e);
    sum.add(e, o.bins);
    axis.sums[k] = sum;
  }
  const V range = high - low;
  axis.low = low, axis.high = high, axis.middle = (low + high) * broadcast(C(0.5));
  axis.least = (height ? o.min_height : o.min_width) * range;
  // range - bins least, and what of it is lost
  const V bins = broadcast(C(o.bins)), shared = fma(-bins, axis.least, range),
          lost = fma(-bins, axis.least, range - shared);
  const V total = sum.value(), share = broadcast(C(0.5)) / total;
  axis.half = shared * share;
  axis.half_rest =
      fma(fma(C(-2) * axis.half, total, shared), share, fma(lost, share, axis.half * sum.rest(total) * C(-2) * share));
}

// The bin of `value` on axis a, and the same on b.
template <class V> struct Found {
  V a0, a1, b0, b1;  // its ends
  V d0, d1;          // parameters of its derivatives
  V bin;             // its number
};

template <class C> PYFLOWGEN_INLINE Found<Pack<C>> search(Pack<C> value, const PackParameters<C>& u, int bins,
                                                          const Axis<C>& a, const Axis<C>& b) {
  using V = Pack<C>;
  const Sum<C>&total_a = a.sums[bins - 1], &total_b = b.sums[bins - 1];
  V middle = broadcast(C(1) - C(0.5) * C(bins)), number{};
  V end_a = a.knot(1, middle, total_a), end_b = b.knot(1, middle, total_b), d = load(u.inner);
  Found<V> f{a.low, end_a, b.low, end_b, load(u.first), d, V{}};
  const auto step = [&](V next_a, V next_b, V next_d) {
    number += 1;
    const auto beyond = value >= end_a;
    f.a0 = beyond ? end_a : f.a0, f.a1 = beyond ? next_a : f.a1;
    f.b0 = beyond ? end_b : f.b0, f.b1 = beyond ? next_b : f.b1;
    f.d0 = beyond ? d : f.d0, f.d1 = beyond ? next_d : f.d1;
    f.bin = beyond ? number : f.bin;
    end_a = next_a, end_b = next_b, d = next_d;
  };
  for (int k = 2; k < bins; ++k) {
    middle += 1;
    step(a.knot(k, middle, total_a), b.knot(k, middle, total_b), load(u.inner + (k - 1) * u.stride));
  }
  step(a.high, b.high, load(u.last));
  return f;
}

// Knots and derivatives of the bin that x is in (y, for the inverse).
template <class V> struct Located {
  formula::SplineBin<V> bin;
  V number, slope0, slope1;  // derivatives of d0 and d1 with respect to their parameters
};

template <SplineConvention S, bool keep, class C>
PYFLOWGEN_INLINE Located<Pack<C>> locate(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> value,
                                         Axis<C>& widths, Axis<C>& heights) {
  softmax<S, false, keep>(o, in.u, in.left, in.right, widths);
  softmax<S, true, keep>(o, in.u, in.bottom, in.top, heights);
  const auto f =
      o.inverse ? search(value, in.u, o.bins, heights, widths) : search(value, in.u, o.bins, widths, heights);
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
template <SplineConvention S, class C>
__attribute__((noinline)) void forward_pack(const PackOptions<C>& o, const PackInputs<C>& in, PackResult<C>& out) {
  Axis<C> widths, heights;
  const Pack<C> value = is_inside(o, in) ? in.x : o.inverse ? in.bottom : in.left;
  const auto at = locate<S, false>(o, in, value, widths, heights);
  const auto [y, l] = formula::rational_quadratic(value, at.bin, o.inverse);
  out = {y, l};
}

// Where the gradients of the parameters go, as packs: derivatives of all K + 1 knots.
template <class C> struct PackGradients {
  C *widths, *heights;
  int64_t stride;
  C* derivatives;
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
    const Pack<C> factor = o.scale * (axis.half + axis.half) * Sum<C>::unit(o.bins);
    before = (shift - mean) * factor, at = (size - mean) * factor, beyond = -mean * factor;
  }
};

template <SplineConvention S, class C>
__attribute__((noinline)) void backward_pack(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> dy,
                                             Pack<C> dlogdet, const PackGradients<C>& out, Pack<C>& dx) {
  using V = Pack<C>;
  Axis<C> widths, heights;
  const auto inside = is_inside(o, in);
  const V zero{}, value = inside ? in.x : o.inverse ? in.bottom : in.left;
  const auto at = locate<S, true>(o, in, value, widths, heights);
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
  for (int k = 0; k < o.bins; ++k) {
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
    store(out.derivatives + k * lanes<C>, here ? d0 : previous);
    previous = here ? d1 : zero;
    reached = next;
    number += 1;
  }
  store(out.derivatives + o.bins * lanes<C>, previous);
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
      if (one) prefetch_rows<false>(a.widths.p, a.widths.strides, g, 2 * bins + a.o.derivatives);
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
  C buffer[max_parameters * n], edges[n];
  each_group<n>(o.count, o.inner, first, last, [&](const Group<n>& g, int64_t e) {
    const PackInputs<C> in = loader.inputs(g, x_strides, buffer, edges);
    PackResult<C> r;
    forward_pack<S>(options, in, r);
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
  C buffer[max_parameters * n], edges[n], knots[(max_bins + 1) * n];
  T rest[max_parameters];  // gradients of the lanes beyond a group's end
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
    PackGradients<C> out{buffer, buffer + bins * n, n, knots};
    if constexpr (std::is_same_v<T, C>) {
      if (direct) {
        out.widths = a.dwidths.p + g.first(a.dwidths.strides), out.stride = a.dwidths.parameter;
        out.heights = out.widths + bins * out.stride;
      }
    }
    Pack<C> dx;
    backward_pack<S>(options, in, used_dy, dlogdet, out, dx);
    const bool none = o.tails == SplineTails::none;
    dx = inside ? dx : none ? Pack<C>{} : dy;
    if (a.mask && none) dx = load_mask<C>(a.mask, a.mask_strides, g) ? dx : dy;
    store_group(a.dx + o.start * a.dx_strides.channel, dx_strides, g, dx);

    // From derivatives of all knots to those that are parameters.
    C* const d = direct ? out.widths + 2 * bins * out.stride : buffer + 2 * bins * n;
    const Pack<C> ends = load(knots) + load(knots + bins * n);
    const int64_t skip = o.tails == SplineTails::linear;
    for (int64_t i = 0; i < o.derivatives; ++i) store(d + i * out.stride, load(knots + (i + skip) * n));
    if (o.tails == SplineTails::circular) {
      store(d, ends);
    } else if (o.tails == SplineTails::mixed) {
      store(d, load_mask<C>(a.circular, a.circular_strides, g) ? ends : Pack<C>{});
      store(d + bins * out.stride, Pack<C>{});
    }
    if (direct) return;
    T* rows[n];
    if (one_out) prefetch_rows<true>(a.dwidths.p, a.dwidths.strides, g, columns);
    const auto write = [&](const SplineParameters<T>& to, const C* packs, int64_t number) {
      rows_of(to.p, to.strides, g, rows);
      for (int i = g.n; i < n; ++i) rows[i] = rest;
      packs_to_rows<T>(packs, rows, to.parameter, number, g.n);
    };
    if (one_out) return write(a.dwidths, buffer, columns);
    write(a.dwidths, buffer, bins);
    write(a.dheights, buffer + bins * n, bins);
    write(a.dderivatives, buffer + 2 * bins * n, o.derivatives);
  });
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
