// What splines share on the CPU: an axis of knots by softmax, parameters from memory to packs and back, the loops over
// elements and rows. A `Kind` is one of the splines: forward and backward of a pack.
#pragma once

#include "cpu/elements.h"
#include "formula/rational_quadratic_spline.h"
#include "rational_quadratic_spline.h"

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
  const C* rows;  // not null: lane l's parameters are at rows + l row_step instead
  int64_t row_step;
  const C* ahead;  // rows_ahead()
};

template <class C> struct PackOptions {
  int bins, degree;
  bool inverse, tails, affine, clamps;
  bool quick;  // bins of a size that leaves most of the interval to the softmax: sums of its integers find the bin
  Pack<C> min_width, min_height, rest_width, rest_height;  // rest: what the softmax shares out
  Pack<C> min_derivative, edge, inverse_clip, scale;
  Pack<C> left, bottom, width, shift_width, shift_height;  // freia's interval of parameters 0
  Pack<C> to_exponent;                                     // from what the softmax takes to powers of two

  explicit PackOptions(const RationalQuadraticSplineOptions& o)
      : bins(int(o.bins)),
        degree(int(o.degree)),
        inverse(o.inverse),
        tails(o.tails != SplineTails::none),
        affine(o.tails == SplineTails::affine),
        clamps(o.clip > 0),
        quick(sizeof(C) == sizeof(float) && lanes<C> == 16 && o.min_bin_width * double(o.bins) <= 0.5 &&
              o.min_bin_height * double(o.bins) <= 0.5),
        min_width(broadcast(C(o.min_bin_width))),
        min_height(broadcast(C(o.min_bin_height))),
        rest_width(broadcast(C(1 - o.min_bin_width * double(o.bins)))),
        rest_height(broadcast(C(1 - o.min_bin_height * double(o.bins)))),
        min_derivative(broadcast(C(o.min_derivative))),
        edge(broadcast(C(o.edge))),
        inverse_clip(broadcast(C(o.clip > 0 ? 1 / o.clip : 0))),
        scale(broadcast(C(o.scale))),
        left(broadcast(C(o.left))),
        bottom(broadcast(C(o.bottom))),
        width(broadcast(C(o.right - o.left))),
        shift_width(broadcast(C(o.shift_width))),
        shift_height(broadcast(C(o.shift_height))),
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

// The axis from low to high with bins of at least `minimum` of that, of logits logit(k) in units that to_exponent
// brings to powers of two. K: the bins where they are known when compiling, else 0.
template <int K, bool keep, class C, class Logit> PYFLOWGEN_INLINE void softmax(const PackOptions<C>& o, Logit logit,
                                                                                Pack<C> minimum, Pack<C> low,
                                                                                Pack<C> high, Axis<C>& axis) {
  using V = Pack<C>;
  const int n = K ? K : o.bins;
  V largest = logit(0);
  for (int k = 1; k < n; ++k) largest = formula::greater(logit(k), largest);
  Sum<C> sum{};
  formula::Bits<V> seen{};
  const auto add = [&]<int count>(int k, std::integral_constant<int, count>) {
    V e[count];  // exponentials
    for (int i = 0; i < count; ++i) e[i] = (logit(k + i) - largest) * o.to_exponent;
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
  axis.least = minimum * range;
  // range - bins least, and what of it is lost
  const V bins = broadcast(C(n)), shared = fma(-bins, axis.least, range), lost = fma(-bins, axis.least, range - shared);
  divide(shared, lost, sum, axis.factor, axis.rest);
  if constexpr (sizeof(C) == sizeof(float))
    axis.factor = formula::saw_nan<V>(seen) ? broadcast(formula::not_a_number<C>) : axis.factor;
}

template <class Mask> PYFLOWGEN_INLINE Sum<float> choose(Mask mask, const Sum<float>& a, const Sum<float>& b) {
  return {mask ? a.sum : b.sum};
}
template <class Mask> PYFLOWGEN_INLINE Sum<double> choose(Mask mask, const Sum<double>& a, const Sum<double>& b) {
  return {mask ? a.sum : b.sum, mask ? a.lost : b.lost};
}

template <class C> PYFLOWGEN_INLINE auto is_inside(const PackOptions<C>& o, const PackInputs<C>& in) {
  return (in.x >= (o.inverse ? in.bottom : in.left)) & (in.x <= (o.inverse ? in.top : in.right));
}

template <class C> struct PackResult { Pack<C> y, l; };

// Where a spline is computed in steps, each is taken for so many groups before the next: a step's operations wait for
// each other, and those of several groups do so together.
constexpr int groups_together = 2;

// Where the gradients of the parameters go, as packs; `ends` are those of the outer knots.
template <class C> struct PackGradients {
  C *widths, *heights, *inner;
  int64_t stride;
  Pack<C> ends[2];
};

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
      const int64_t columns = 2 * bins + a.o.derivatives;
      rows_of(a.widths.p, a.widths.strides, g, rows);
      rows_to_packs<T>(rows, a.widths.parameter, one ? columns : bins, buffer,
                       one ? rows_ahead(a.widths.p, a.widths.strides, g, columns) : nullptr);
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
    if (a.o.tails >= SplineTails::affine) {  // first: where the interval is
      u.inner = d + (a.o.tails == SplineTails::affine ? 2 : 1) * stride, u.first = u.last = d;
    } else if (a.o.tails != SplineTails::linear) {
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

  // What the groups have in common.
  PYFLOWGEN_INLINE PackInputs<C> start(C* edges) const {
    store(edges, broadcast(C(a.o.edge)));
    PackInputs<C> in{};
    in.left = broadcast(C(a.o.left)), in.right = broadcast(C(a.o.right));
    in.bottom = broadcast(C(a.o.bottom)), in.top = broadcast(C(a.o.top));
    if (a.o.tails >= SplineTails::affine) {  // known to the spline alone: all may be inside
      in.right = in.top = broadcast(C(__builtin_inf()));
      in.left = in.bottom = -in.right;
    }
    return in;
  }
  // And the rest. by_rows: the spline takes rows as they are.
  PYFLOWGEN_INLINE void take(const Group<n>& g, const Strides& x_strides, bool by_rows, C* buffer, C* edges,
                             PackInputs<C>& in) const {
    in.x = load_group(a.x + a.o.start * a.x_strides.channel, x_strides, g);
    in.rows = nullptr;
    if constexpr (std::is_same_v<T, C>) {
      if (by_rows && g.regular && g.n == n && g.step(a.widths.strides) != 1) {
        in.ahead = rows_ahead(a.widths.p, a.widths.strides, g, 2 * a.o.bins + a.o.derivatives);
        in.rows = a.widths.p + g.first(a.widths.strides), in.row_step = g.step(a.widths.strides);
      }
    }
    if (!in.rows) in.u = load_parameters(g, buffer, edges);
    if (a.bound) {
      const Pack<C> bound = load_group(a.bound, a.bound_strides, g);
      in.left = bound * C(a.o.left), in.right = bound * C(a.o.right);
      in.bottom = bound * C(a.o.bottom), in.top = bound * C(a.o.top);
    }
  }
  // Whether rows may be taken as they are: all of an element's parameters side by side.
  bool by_rows() const { return one && a.widths.parameter == 1 && !a.mask && a.o.tails == SplineTails::linear; }
};

// Strides of the transformed channels in a tensor that has them all.
Strides part(const Strides& s, int64_t step) { return {s.batch, s.channel * step, s.inner}; }

// y and l of elements [first, last); l goes to logdet, in their order.
template <class Kind, class T, class A> void forward_elements(const RationalQuadraticSplineForward<T, A>& a,
                                                              const PackOptions<Compute<T>>& options, int64_t first,
                                                              int64_t last, A* logdet) {
  using C = Compute<T>;
  constexpr int n = width<T>;
  const RationalQuadraticSplineOptions& o = a.o;
  const Loader<T, RationalQuadraticSplineForward<T, A>> loader(a);
  const Strides x_strides = part(a.x_strides, o.step), y_strides = part(a.y_strides, o.step);
  const C outside = o.tails == SplineTails::none ? formula::not_a_number<C> : C(0);
  alignas(64) C buffer[max_parameters * n], edges[n];
  const auto give = [&](const Group<n>& g, int64_t e, Pack<C> x, auto inside, Pack<C> y, Pack<C> l) {
    y = inside ? y : o.tails == SplineTails::none ? broadcast(outside) : x;
    l = inside ? l : broadcast(outside);
    if (a.mask) {
      const auto selected = load_mask<C>(a.mask, a.mask_strides, g);
      y = selected ? y : x, l = selected ? l : Pack<C>{};
    }
    store_group(a.y + o.start * a.y_strides.channel, y_strides, g, y);
    if (g.n == n) store(logdet + (e - first), l);
    else
      for (int i = 0; i < g.n; ++i) logdet[e - first + i] = l[i];
  };
  PackInputs<C> in = loader.start(edges);
  if constexpr (Kind::in_steps) {
    const bool by_rows = loader.by_rows() && Kind::takes_rows(options);
    alignas(64) typename Kind::template Place<C> places[groups_together] = {};
    Groups<n> groups(o.count, o.inner, first, last);
    while (groups.more()) {
      Groups<n> again = groups;
      int used = 0;
      for (; used < groups_together && groups.more(); ++used, groups.advance())
        loader.take(groups.group, x_strides, by_rows, buffer, edges, in), Kind::locate(options, in, places[used]);
      Kind::finish(options, places, used);
      for (int i = 0; i < used; ++i, again.advance()) {
        const auto& p = places[i];
        give(again.group, again.element, p.x, Kind::inside(options, p), p.result.y, p.result.l);
      }
    }
  } else {
    each_group<n>(o.count, o.inner, first, last, [&](const Group<n>& g, int64_t e) {
      loader.take(g, x_strides, false, buffer, edges, in);
      PackResult<C> r;
      Kind::forward(options, in, r);
      give(g, e, in.x, is_inside(options, in), r.y, r.l);
    });
  }
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

template <class Kind, class T, class A>
void forward(const RationalQuadraticSplineForward<T, A>& a, int64_t begin, int64_t end, double* partial) {
  const RationalQuadraticSplineOptions& o = a.o;
  const PackOptions<Compute<T>> options(o);
  const int64_t elements = o.count * o.inner;
  A l[chunk];
  const auto sum_elements = [&](int64_t first, int64_t last) {
    double sum = 0;
    for (int64_t e = first; e < last; e += chunk) {
      const int64_t stop = last - e < chunk ? last : e + chunk;
      forward_elements<Kind>(a, options, e, stop, l);
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
    forward_elements<Kind>(a, options, row * elements, stop * elements, l);
    for (int64_t r = row; r < stop; ++r) {
      const double sum = sum_of(l + (r - row) * elements, elements);
      a.logdet[r] = A(o.inverse ? -sum : sum);
    }
  }
}

template <class Kind, class T, class A> void backward_elements(const RationalQuadraticSplineBackward<T, A>& a,
                                                               const PackOptions<Compute<T>>& options, int64_t first,
                                                               int64_t last) {
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
  // Gradients that go past the cache: put together in rows, and sent with the next group's, when they need no waiting
  // for.
  alignas(64) T together[2][max_parameters * n];
  T* sent_to = nullptr;
  int filled = 0;
  PackInputs<C> in = loader.start(edges);
  each_group<n>(o.count, o.inner, first, last, [&](const Group<n>& g, int64_t) {
    loader.take(g, x_strides, false, buffer, edges, in);
    const Pack<C> dy = load_group(a.dy + o.start * a.dy_strides.channel, dy_strides, g);
    Pack<C> used_dy = dy, dlogdet = load_group(a.dlogdet, dlogdet_strides, g);
    auto inside = is_inside(options, in);
    if (a.mask) {
      const auto selected = load_mask<C>(a.mask, a.mask_strides, g);
      used_dy = selected ? dy : Pack<C>{}, dlogdet = selected ? dlogdet : Pack<C>{};
      in.x = selected ? in.x : Pack<C>{};
      inside &= selected;
    }
    const bool direct = std::is_same_v<T, C> && one_out && g.regular && g.n == n && g.step(a.dwidths.strides) == 1;
    C* to = buffer;
    int64_t stride = n;
    if constexpr (std::is_same_v<T, C>) {
      if (direct) to = a.dwidths.p + g.first(a.dwidths.strides), stride = a.dwidths.parameter;
    }
    C* const d = to + 2 * bins * stride;
    const int64_t ends = o.tails == SplineTails::linear ? 0 : o.tails == SplineTails::affine ? 2 : 1;
    PackGradients<C> out{to, to + bins * stride, d + ends * stride, stride, {}};
    Pack<C> dx;
    Kind::backward(options, in, used_dy, dlogdet, out, dx);
    const bool none = o.tails == SplineTails::none;
    dx = inside ? dx : none ? Pack<C>{} : dy;
    if (a.mask && none) dx = load_mask<C>(a.mask, a.mask_strides, g) ? dx : dy;
    store_group(a.dx + o.start * a.dx_strides.channel, dx_strides, g, dx);

    if constexpr (Kind::every_knot) {  // has a derivative of its own
      const Pack<C> both = out.ends[0] + out.ends[1];
      if (o.tails == SplineTails::none) {
        store(d, out.ends[0]), store(d + bins * stride, out.ends[1]);
      } else if (o.tails == SplineTails::affine) {
        store(d, out.ends[0]), store(d + stride, out.ends[1]);
      } else if (o.tails == SplineTails::circular || o.tails == SplineTails::resized) {
        store(d, both);
      } else if (o.tails == SplineTails::mixed) {
        store(d, load_mask<C>(a.circular, a.circular_strides, g) ? both : Pack<C>{}),
            store(d + bins * stride, Pack<C>{});
      }
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
        for (int l = 0; l < n; ++l) rows[l] = together[filled] + l * columns;
        packs_to_rows<T>(buffer, rows, 1, columns, n);
        filled ^= 1;
        if (sent_to) stream(sent_to, together[filled], n * columns);
        sent_to = to;
        return;
      }
    }
    if (one_out) return write(a.dwidths, buffer, columns);
    write(a.dwidths, buffer, bins);
    write(a.dheights, buffer + bins * n, bins);
    write(a.dderivatives, buffer + 2 * bins * n, o.derivatives);
  });
  if constexpr (std::is_same_v<T, float>)
    if (sent_to) stream(sent_to, together[filled ^ 1], n * columns);
  if (large) stream_done();
}

template <class Kind, class T, class A>
void backward(const RationalQuadraticSplineBackward<T, A>& a, int64_t begin, int64_t end, bool by_segment) {
  const RationalQuadraticSplineOptions& o = a.o;
  const PackOptions<Compute<T>> options(o);
  const int64_t elements = o.count * o.inner;
  if (!by_segment) {
    for (int64_t row = begin; row < end; ++row) copy_rest(o, a.dy, a.dy_strides, a.dx, a.dx_strides, row);
    return backward_elements<Kind>(a, options, begin * elements, end * elements);
  }
  const int64_t segments = rational_quadratic_spline_segments(o);
  for (int64_t i = begin; i < end; ++i) {
    const auto [first, last] = piece(elements, i % segments, segments);
    const int64_t row = i / segments * elements;
    backward_elements<Kind>(a, options, row + first, row + last);
  }
}

}  // namespace
}  // namespace pyflowgen::PYFLOWGEN_ISA
