// rational_quadratic_spline on the CPU: an element a lane, parameters transposed into packs, one pass over memory.
//
// Floor, float32, K bins, n transformed elements: forward reads x and 3 K - 1 parameters and writes y, (3 K + 1) 4 n
// bytes; backward reads those and dy and writes their gradients, (6 K + 1) 4 n bytes. The kernel moves just that, and
// is bound by what it computes: 2 K exponentials, 2 softplus and a logarithm an element, the search, and the
// transposes.
//
// Knots are never stored: two loops, the first for the sums of the softmax, the second adds bins up and keeps by blends
// the one that x lies in. Only the derivatives at its two knots are evaluated. With AVX-512, forward in eight bins of
// float keeps both axes in registers from the transpose to the bin, and searches in integers.
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

#if defined(__AVX512F__)
// 2^(unit - i / 32), and what taking i << 18 off its bits will lack.
template <int unit> struct Powers {
  uint32_t of[32];
  constexpr Powers() : of{} {
    double power = double(int64_t(1) << unit);
    for (uint32_t i = 0; i < 32; ++i, power *= 0.97857206208770013450916112581343)
      of[i] = __builtin_bit_cast(uint32_t, float(power)) + (i << 18);
  }
};
template <int unit> alignas(64) constexpr Powers<unit> powers;

// An axis of K bins as search_quickly() goes through it. Sums are those of Sum<float>, in registers while they fit.
template <int K, bool keep> struct QuickAxis {
  u32v sums[K];
  f32v largest, factor, rest, low, middle, high, least;
  f32v knots_apart;  // by `least`, in units of the sums
  f32v to_units;     // from places to units of the sums
  f32v e[keep ? K : 1];

  PYFLOWGEN_INLINE f32v exponential(int k) const { return e[k]; }

  // As softmax(): exponentials of logit(k), as it is in memory. Lanes of `worst` beyond quick_limit are those in which
  // the sums are wrong. With the largest exponent taken off, rounded to 1/32, and u = -(x - largest):
  // t = -(magic + u), rounded to 1/32 by the addition, holds 32 u in its low bits; 2^-u is a power from a table with
  // the unit + u's integer part taken off its exponent, times a parabola in what rounding has left.
  template <class Logit>
  PYFLOWGEN_INLINE void fill(const PackOptions<float>& o, Logit logit, f32v minimum, f32v from, f32v to, i32v& worst) {
    constexpr float magic = 0x1.8p18f;
    constexpr const uint32_t* table = powers<Sum<float>::unit(K)>.of;
    f32v most[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) most[k] = logit(k);
#pragma GCC unroll 32
    for (int k = 4; k < K; ++k) most[k % 4] = formula::greater(most[k % 4], logit(k));
    most[0] = formula::greater(most[0], most[2]), most[1] = formula::greater(most[1], most[3]);
    largest = formula::greater(most[0], most[1]) * o.to_exponent;
    const f32v rounded = (largest + magic) - magic, start = -magic - rounded;
    worst = formula::abs(largest) < 0x1p16f ? worst : i32v{};
    u32v sum{};
    // Eight at a time: a step's operations wait for each other.
    const auto eight = [&]<int first>(std::integral_constant<int, first>) {
      constexpr int n = K - first < 8 ? K - first : 8;
      f32v x[n], t[n], power[n];
      for (int i = 0; i < n; ++i) x[i] = logit(first + i);
      for (int i = 0; i < n; ++i) t[i] = fma(x[i], o.to_exponent, start);
      for (int i = 0; i < n; ++i) {
        const i32v bits = (i32v)t[i];
        worst = worst > bits ? worst : bits;
        x[i] = fma(x[i], o.to_exponent, start - t[i]);
        const __m512i found =
            _mm512_permutex2var_epi32(_mm512_load_si512(table), (__m512i)bits, _mm512_load_si512(table + 16));
        power[i] = (f32v)((u32v)found - ((u32v)bits << 18));
      }
      for (int i = 0; i < n; ++i) {
        const f32v less_one = fma(x[i], broadcast(0.2402265f), broadcast(0.693157344f)) * x[i];
        const f32v exponential = fma(power[i], less_one, power[i]);
        if constexpr (keep) e[first + i] = exponential;
        sum += (u32v)_mm512_maskz_cvtps_epi32(__mmask16(-1), (__m512)exponential);
        sums[first + i] = sum;
      }
    };
    eight(std::integral_constant<int, 0>());
    if constexpr (K > 8) eight(std::integral_constant<int, 8>());
    if constexpr (K > 16) eight(std::integral_constant<int, 16>()), eight(std::integral_constant<int, 24>());
    low = from, high = to, middle = (low + high) * 0.5f;
    const f32v range = high - low;
    least = minimum * range;
    const f32v shared = fma(broadcast(-float(K)), least, range),
               lost = fma(broadcast(-float(K)), least, range - shared);
    divide(shared, lost, Sum<float>{sum}, factor, rest);
    to_units = __builtin_convertvector((i32v)sum, f32v) / shared;
    knots_apart = least * to_units;
  }
  PYFLOWGEN_INLINE f32v knot(u32v at, f32v from_middle) const {
    const f32v share = __builtin_convertvector((i32v)(at - (sums[K - 1] >> 1)), f32v);
    return fma(share, factor, fma(share, rest, fma(from_middle, least, middle)));
  }
};
// -(0x1.8p18 + 110), whose bits grow with its size: e^-76 of the largest is the least.
constexpr int32_t quick_limit = int32_t(0xc8c00000u + 32 * 110);
PYFLOWGEN_INLINE bool too_far_apart(i32v worst) {
  return _mm512_cmpgt_epi32_mask((__m512i)worst, _mm512_set1_epi32(quick_limit));
}

// Whole bins are counted by integers; a knot may then lie beyond the value by what rounding does to it, and is set on
// the value. d(k): parameter of knot k's derivative.
template <int K, class Derivative, class Axis>
PYFLOWGEN_INLINE Found<f32v> search_quickly(f32v value, Derivative d, const Axis& a, const Axis& b) {
  constexpr float half = 0.5f * K;
  i32v place = __builtin_convertvector((value - a.middle) * a.to_units + (half - 1) * a.knots_apart, i32v) +
               (i32v)(a.sums[K - 1] >> 1);
  const i32v apart = __builtin_convertvector(a.knots_apart, i32v);
  u32v a0{}, a1 = a.sums[0], b0{}, b1 = b.sums[0];
  f32v number{}, d0 = d(0), d1 = d(1);
#pragma GCC unroll 32
  for (int k = 1; k < K; ++k, place -= apart) {
    const auto beyond = place >= (i32v)a.sums[k - 1];
    a0 = beyond ? a.sums[k - 1] : a0, a1 = beyond ? a.sums[k] : a1;
    b0 = beyond ? b.sums[k - 1] : b0, b1 = beyond ? b.sums[k] : b1;
    d0 = beyond ? d(k) : d0, d1 = beyond ? d(k + 1) : d1;
    number = beyond ? f32v{} + float(k) : number;
  }
  const f32v from_middle = number - half, next = number - (half - 1);
  const auto first = number == 0, last = number == float(K - 1);
  return {formula::lesser(value, first ? a.low : a.knot(a0, from_middle)),
          formula::greater(value, last ? a.high : a.knot(a1, next)),
          first ? b.low : b.knot(b0, from_middle),
          last ? b.high : b.knot(b1, next),
          d0,
          d1,
          number};
}
#endif

// Knots and derivatives of the bin that x is in (y, for the inverse).
template <class V> struct Located {
  formula::SplineBin<V> bin;
  V number, slope0, slope1;  // derivatives of d0 and d1 with respect to their parameters
};

template <SplineConvention S, int K, bool keep, class C>
PYFLOWGEN_INLINE Found<Pack<C>> find(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> value, Axis<C>& widths,
                                     Axis<C>& heights) {
  softmax<K, keep>(o, [&](int k) { return logit<S, false>(o, in.u, k); }, o.min_width, in.left, in.right, widths);
  softmax<K, keep>(o, [&](int k) { return logit<S, true>(o, in.u, k); }, o.min_height, in.bottom, in.top, heights);
  return o.inverse ? search<K>(value, in.u, o.bins, heights, widths) : search<K>(value, in.u, o.bins, widths, heights);
}

template <SplineConvention S, int K, bool keep, class C>
PYFLOWGEN_INLINE Located<Pack<C>> locate(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> value,
                                         Axis<C>& widths, Axis<C>& heights) {
  const auto f = find<S, K, keep>(o, in, value, widths, heights);
  const auto d0 = formula::knot_derivative<S>(f.d0, o.min_derivative, o.edge, o.inverse_clip),
             d1 = formula::knot_derivative<S>(f.d1, o.min_derivative, o.edge, o.inverse_clip);
  if (o.inverse) return {{f.b0, f.b1, f.a0, f.a1, d0.value, d1.value}, f.bin, d0.derivative, d1.derivative};
  return {{f.a0, f.a1, f.b0, f.b1, d0.value, d1.value}, f.bin, d0.derivative, d1.derivative};
}

// freia's interval: along both axes, and the outer knots' derivative, which is the tails' slope.
template <class C> struct OwnInterval {
  formula::OwnSide<Pack<C>> x, y;
  Pack<C> slope, slope0, slope1;  // slope0, slope1: as in Located
};

// The axis of bins of sizes softplus(parameter + shift) + least; their derivatives in the place of exponentials.
template <bool keep, class C>
PYFLOWGEN_INLINE formula::OwnSide<Pack<C>> own_axis(const PackOptions<C>& o, const C* u, int64_t stride, Pack<C> shift,
                                                    Pack<C> least, Pack<C> begin, Axis<C>& axis) {
  using V = Pack<C>;
  alignas(64) C sizes[max_bins * lanes<C>];
  V largest{}, all{};
  for (int k = 0; k < o.bins; ++k) {
    const auto size = formula::softplus_at_least(load(u + k * stride) + shift, least);
    store(sizes + k * lanes<C>, size.value);
    if constexpr (keep) store(axis.e + k * lanes<C>, size.derivative);
    largest = formula::greater(size.value, largest), all += size.value;
  }
  const C unit = C(int64_t(1) << Sum<C>::unit(o.bins));
  const V inverse = broadcast(C(1)) / largest;
  Sum<C> sum{};
  for (int k = 0; k < o.bins; ++k) sum.add(load(sizes + k * lanes<C>) * inverse * unit), axis.sums[k] = sum;
  const auto side = formula::own_side(sum.value() * (C(1) / unit) * largest, begin, o.inverse_clip, o.clamps);
  axis.low = side.begin, axis.high = side.begin + side.size, axis.middle = (axis.low + axis.high) * broadcast(C(0.5));
  axis.least = V{};
  divide(axis.high - axis.low, V{}, sum, axis.factor, axis.rest);
  axis.factor = fma(all, V{}, axis.factor);  // a NaN is no integer
  return side;
}

// The bin of in.x, or, with -1 and the number of bins for its number, the interval for one where x is outside; `value`
// is then its end. d0 and d1 are derivatives.
template <bool keep, class C> PYFLOWGEN_INLINE Found<Pack<C>> find_own(const PackOptions<C>& o, const PackInputs<C>& in,
                                                                       Axis<C>& widths, Axis<C>& heights,
                                                                       OwnInterval<C>& own, Pack<C>& value) {
  using V = Pack<C>;
  const auto& u = in.u;
  const V one = broadcast(C(1)), last = broadcast(C(o.bins - 1));
  if (o.affine) {
    own.x =
        own_axis<keep>(o, u.widths, u.stride, o.shift_width, o.min_width, o.left + load(u.first + u.stride), widths);
    own.y = own_axis<keep>(o, u.heights, u.stride, o.shift_height, o.min_height, o.bottom + load(u.first), heights);
    own.slope = own.y.size / own.x.size;
  } else {
    const V shift = broadcast(C(0.54132485461291806));  // log(e - 1)
    const auto [share, derivative] = formula::softplus_at_least(load(u.first) + shift, V{});
    const auto clamped = formula::clamp_size(o.width * share, o.inverse_clip, o.clamps);
    own.x = {-0.5 * clamped.value, clamped.value, one, clamped.derivative * o.width * derivative};
    own.slope = one;
    softmax<0, keep>(o, [&](int k) { return load(u.widths + k * u.stride); }, V{}, own.x.begin, -own.x.begin, widths);
    softmax<0, keep>(o, [&](int k) { return load(u.heights + k * u.stride); }, V{}, own.x.begin, -own.x.begin, heights);
  }
  const Axis<C>&a = o.inverse ? heights : widths, &b = o.inverse ? widths : heights;
  const auto inside = in.x >= a.low, above = in.x > a.high;
  value = inside ? above ? a.high : in.x : a.low;
  Found<V> f = search<0>(value, u, o.bins, a, b);
  const auto d0 = formula::knot_derivative<SplineConvention::freia>(f.d0, o.min_derivative, o.edge, V{}),
             d1 = formula::knot_derivative<SplineConvention::freia>(f.d1, o.min_derivative, o.edge, V{});
  const auto within = inside & (in.x <= a.high);
  f.d0 = within & (f.bin > V{}) ? d0.value : own.slope, f.d1 = within & (f.bin < last) ? d1.value : own.slope;
  own.slope0 = d0.derivative, own.slope1 = d1.derivative;
  f.a0 = within ? f.a0 : a.low, f.a1 = within ? f.a1 : a.high, f.b0 = within ? f.b0 : b.low;
  f.b1 = within ? f.b1 : b.high;
  f.bin = within ? f.bin : above ? last + one : -one;
  return f;
}

template <class C> PYFLOWGEN_INLINE Pack<C> inside_or_edge(const PackOptions<C>& o, const PackInputs<C>& in) {
  return is_inside(o, in) ? in.x : o.inverse ? in.bottom : in.left;
}

// A group on its way from the first step, which finds the bin, to the next.
template <class C> struct RationalQuadraticPlace {
  Pack<C> x, value;  // equal inside
  Found<Pack<C>> found;
  PackResult<C> result;  // inside, rubbish elsewhere
};

// Not inlined: once for every convention and element type, whatever the storage.
template <SplineConvention S, int K, class C>
__attribute__((noinline)) void locate_pack(const PackOptions<C>& o, const PackInputs<C>& in,
                                           RationalQuadraticPlace<C>& place) {
  Axis<C> widths, heights;
  place.x = in.x, place.value = inside_or_edge(o, in);
  if constexpr (S == SplineConvention::freia) {
    OwnInterval<C> own;
    place.found = find_own<false>(o, in, widths, heights, own, place.value);
  } else {
    place.found = find<S, K, false>(o, in, place.value, widths, heights);
  }
}

#if defined(__AVX512F__)
// By the long way, where one lane's logits are too far apart.
__attribute__((noinline, cold)) void locate_slowly(const PackOptions<float>& o, PackInputs<float> in,
                                                   RationalQuadraticPlace<float>& place) {
  alignas(64) float buffer[23 * lanes<float>], edge[lanes<float>];
  if (in.rows) {
    const float* rows[lanes<float>];
    for (int l = 0; l < lanes<float>; ++l) rows[l] = in.rows + l * in.row_step;
    rows_to_packs<float>(rows, 1, 23, buffer);
    store(edge, o.edge);
    in.u = {buffer, buffer + 8 * lanes<float>, buffer + 16 * lanes<float>, lanes<float>, edge, edge};
  }
  locate_pack<SplineConvention::nflows, 0>(o, in, place);
}

// Both axes from packs in memory, and the bin; false where that is too far.
template <int K, bool keep> PYFLOWGEN_INLINE bool find_quickly(const PackOptions<float>& o, const PackInputs<float>& in,
                                                               f32v value, QuickAxis<K, keep>& w, QuickAxis<K, keep>& h,
                                                               Found<f32v>& found) {
  const auto& u = in.u;
  i32v worst = i32v{} + int32_t(0x80000000);
  w.fill(o, [&](int k) { return load(u.widths + k * u.stride); }, o.min_width, in.left, in.right, worst);
  h.fill(o, [&](int k) { return load(u.heights + k * u.stride); }, o.min_height, in.bottom, in.top, worst);
  const auto d = [&](int k) { return load(k == 0 ? u.first : k == K ? u.last : u.inner + (k - 1) * u.stride); };
  found = o.inverse ? search_quickly<K>(value, d, h, w) : search_quickly<K>(value, d, w, h);
  return !too_far_apart(worst);
}

template <int K> __attribute__((noinline)) void locate_quickly(const PackOptions<float>& o, const PackInputs<float>& in,
                                                               RationalQuadraticPlace<float>& place) {
  place.x = in.x, place.value = inside_or_edge(o, in);
  QuickAxis<K, false> w, h;
  if (K != 8 || !in.rows) {
    if (!find_quickly(o, in, place.value, w, h, place.found)) locate_slowly(o, in, place);
    return;
  }
  // Rows of eight bins stay in registers from the transpose on.
  const auto eight = [&](int64_t column, f32v(&v)[8]) {
    prefetch_ahead(in.ahead, column);
    eight_columns([&](int i) { return in.rows + i * in.row_step + column; }, v);
  };
  f32v v[8], d[9];
  i32v worst = i32v{} + int32_t(0x80000000);
  const auto logit = [&](int k) { return v[k]; };
  eight(0, v), w.fill(o, logit, o.min_width, in.left, in.right, worst);
  eight(8, v), h.fill(o, logit, o.min_height, in.bottom, in.top, worst);
  eight(15, v);  // the last height first
  d[0] = d[8] = o.edge;
  for (int k = 1; k < 8; ++k) d[k] = v[k];
  const auto parameter = [&](int k) { return d[k]; };
  place.found =
      o.inverse ? search_quickly<K>(place.value, parameter, h, w) : search_quickly<K>(place.value, parameter, w, h);
  if (too_far_apart(worst)) locate_slowly(o, in, place);
}

// Calls f<K>() where so many bins, of such sizes, have code of their own.
template <class F> PYFLOWGEN_INLINE bool with_quick_bins(const PackOptions<float>& o, F f) {
  if (!o.quick) return false;
  switch (o.bins) {
    case 4: f.template operator()<4>(); return true;
    case 5: f.template operator()<5>(); return true;
    case 8: f.template operator()<8>(); return true;
    case 10: f.template operator()<10>(); return true;
    case 16: f.template operator()<16>(); return true;
    case 32: f.template operator()<32>(); return true;
    default: return false;
  }
}
#endif

template <SplineConvention S, class C, int n>
PYFLOWGEN_INLINE void finish_packs(const PackOptions<C>& o, RationalQuadraticPlace<C>* places, bool inverse) {
  formula::Splined<Pack<C>> r[n];
  for (int i = 0; i < n; ++i) {
    const auto& f = places[i].found;
    Pack<C> d0 = f.d0, d1 = f.d1;
    if constexpr (S != SplineConvention::freia) {
      d0 = formula::knot_derivative<S>(d0, o.min_derivative, o.edge, o.inverse_clip).value;
      d1 = formula::knot_derivative<S>(d1, o.min_derivative, o.edge, o.inverse_clip).value;
    }
    const formula::SplineBin<Pack<C>> bin = inverse ? formula::SplineBin<Pack<C>>{f.b0, f.b1, f.a0, f.a1, d0, d1}
                                                    : formula::SplineBin<Pack<C>>{f.a0, f.a1, f.b0, f.b1, d0, d1};
    r[i] = formula::rational_quadratic(places[i].value, bin, inverse);
    if constexpr (S == SplineConvention::freia) {  // the tail begins where the interval ends
      const Pack<C> beyond = places[i].x - places[i].value;
      r[i].y += inverse ? beyond / d0 : beyond * d0;
    }
  }
  for (int i = 0; i < n; ++i) places[i].result = {r[i].y, r[i].l};
}
template <SplineConvention S, class C>
__attribute__((noinline)) void finish_all(const PackOptions<C>& o, RationalQuadraticPlace<C>* places, int used) {
  for (int i = 0; i < used; i += 2) {
    if (o.inverse) finish_packs<S, C, 2>(o, places + i, true);
    else finish_packs<S, C, 2>(o, places + i, false);
  }
}

// Gradients of an axis' parameters: `shift` is that of the bin's beginning, `size` that of its size. Bin j of the axis
// has the gradient `shift` where j is before the bin, `size` where it is it, and 0 beyond; then through the softmax.
template <class C> struct AxisGradient {
  Pack<C> before, at, beyond;  // times e[k]
  Pack<C> mean;                // of the bins' gradients, weighed by their sizes less the least
  template <class Axis> PYFLOWGEN_INLINE AxisGradient(const Axis& axis, const PackOptions<C>& o, Pack<C> rest,
                                                      Pack<C> number, Pack<C> offset, Pack<C> length, Pack<C> shift,
                                                      Pack<C> size) {
    // probabilities of what is before the bin, and of it
    const Pack<C> share = broadcast(C(1)) / (rest * (axis.high - axis.low));
    const Pack<C> p_before = (offset - number * axis.least) * share, p_at = (length - axis.least) * share;
    mean = fma(shift, p_before, size * p_at);
    const Pack<C> factor = o.scale * axis.factor;
    before = (shift - mean) * factor, at = (size - mean) * factor, beyond = -mean * factor;
  }
};

// The gradients of all parameters from those of the bins, w and h, and of the derivatives at the bin's knots.
template <SplineConvention S, int K, class C, class Sizes, class Axis>
PYFLOWGEN_INLINE void give_gradients(const PackOptions<C>& o, const PackInputs<C>& in, const Axis& widths,
                                     const Axis& heights, Pack<C> bin, const Sizes& w, const Sizes& h, Pack<C> d0,
                                     Pack<C> d1, PackGradients<C>& out) {
  using V = Pack<C>;
  const V zero{};
  V number{};
  auto reached = number == number && bin >= zero;  // whether bin k is not beyond
  V previous = zero;                               // of knot k, from the bin before
  const int n = K ? K : o.bins;
  for (int k = 0; k < n; ++k) {
    const auto next = bin > number;
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
    const auto here = bin == number;
    const V d = here ? d0 : previous;
    if (k == 0) out.ends[0] = d;
    else store(out.inner + (k - 1) * out.stride, d);
    previous = here ? d1 : zero;
    reached = next;
    number += 1;
  }
  out.ends[1] = previous;
}

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
  give_gradients<S, K>(o, in, widths, heights, at.number, w, h, g.d0 * at.slope0, g.d1 * at.slope1, out);
}

#if defined(__AVX512F__)
template <int K> __attribute__((noinline)) void backward_quickly(const PackOptions<float>& o,
                                                                 const PackInputs<float>& in, f32v dy, f32v dlogdet,
                                                                 PackGradients<float>& out, f32v& dx) {
  QuickAxis<K, true> widths, heights;
  Found<f32v> f;
  const f32v zero{}, value = inside_or_edge(o, in);
  const auto inside = value == in.x;
  if (!find_quickly(o, in, value, widths, heights, f))
    return backward_pack<SplineConvention::nflows, 0>(o, in, dy, dlogdet, out, dx);
  const auto d0 = formula::knot_derivative<SplineConvention::nflows>(f.d0, o.min_derivative, o.edge, zero),
             d1 = formula::knot_derivative<SplineConvention::nflows>(f.d1, o.min_derivative, o.edge, zero);
  const formula::SplineBin<f32v> bin = o.inverse ? formula::SplineBin<f32v>{f.b0, f.b1, f.a0, f.a1, d0.value, d1.value}
                                                 : formula::SplineBin<f32v>{f.a0, f.a1, f.b0, f.b1, d0.value, d1.value};
  const auto g =
      formula::rational_quadratic_backward(inside ? dy : zero, inside ? dlogdet : zero, value, bin, o.inverse);
  dx = g.input;
  const AxisGradient<float> w(widths, o, o.rest_width, f.bin, bin.x0 - in.left, bin.x1 - bin.x0, g.shift_x, g.width);
  const AxisGradient<float> h(heights, o, o.rest_height, f.bin, bin.y0 - in.bottom, bin.y1 - bin.y0, g.shift_y,
                              g.height);
  give_gradients<SplineConvention::nflows, K>(o, in, widths, heights, f.bin, w, h, g.d0 * d0.derivative,
                                              g.d1 * d1.derivative, out);
}
#endif

template <class C> __attribute__((noinline)) void backward_own(const PackOptions<C>& o, const PackInputs<C>& in,
                                                               Pack<C> dy, Pack<C> dlogdet, PackGradients<C>& out,
                                                               Pack<C>& dx) {
  using V = Pack<C>;
  Axis<C> widths, heights;
  OwnInterval<C> own;
  V value;
  const auto f = find_own<true>(o, in, widths, heights, own, value);
  const V zero{}, last = broadcast(C(o.bins - 1));
  const auto within = (f.bin >= zero) & (f.bin <= last), above = f.bin > last;
  const formula::SplineBin<V> bin = o.inverse ? formula::SplineBin<V>{f.b0, f.b1, f.a0, f.a1, f.d0, f.d1}
                                              : formula::SplineBin<V>{f.a0, f.a1, f.b0, f.b1, f.d0, f.d1};
  auto g = formula::rational_quadratic_backward(within ? dy : zero, within ? dlogdet : zero, value, bin, o.inverse);
  const V d0 = g.d0 * own.slope0, d1 = g.d1 * own.slope1;
  if (!o.affine) {
    dx = within ? g.input : dy;
    const AxisGradient<C> w(widths, o, o.rest_width, f.bin, bin.x0 - own.x.begin, bin.x1 - bin.x0, g.shift_x, g.width);
    const AxisGradient<C> h(heights, o, o.rest_height, f.bin, bin.y0 - own.x.begin, bin.y1 - bin.y0, g.shift_y,
                            g.height);
    give_gradients<SplineConvention::nflows, 0>(o, in, widths, heights, f.bin, w, h, d0, d1, out);
    out.ends[0] = (w.mean + h.mean - C(0.5) * (g.shift_x + g.shift_y)) * own.x.growth, out.ends[1] = zero;
    return;
  }
  const auto tail = formula::tail_backward(dy, dlogdet, in.x - value, own.slope, o.inverse);
  const V of_knots = (f.bin == zero ? g.d0 : zero) + (f.bin == last ? g.d1 : zero);
  const V slope = (within ? of_knots : tail.slope) / own.x.size;
  const V shift_x = within ? g.shift_x : tail.shift_x, shift_y = within ? g.shift_y : tail.shift_y;
  dx = within ? g.input : tail.input;
  const auto w = formula::own_gradient(own.x, above ? own.x.size : bin.x0 - own.x.begin, bin.x1 - bin.x0, shift_x,
                                       g.width, -slope * own.slope);
  const auto h = formula::own_gradient(own.y, above ? own.y.size : bin.y0 - own.y.begin, bin.y1 - bin.y0, shift_y,
                                       g.height, slope);
  give_gradients<SplineConvention::nflows, 0>(o, in, widths, heights, f.bin, w, h, d0, d1, out);
  out.ends[0] = h.begin, out.ends[1] = w.begin;
}

template <SplineConvention S> struct RationalQuadratic {
  static constexpr bool every_knot = true;
  static constexpr bool in_steps = true;
  template <class C> using Place = RationalQuadraticPlace<C>;
  template <class C> static PYFLOWGEN_INLINE auto inside(const PackOptions<C>& o, const Place<C>& place) {
    auto inside = place.value == place.x;
    if (o.affine) inside |= ~inside;
    return inside;
  }
  // Whether rows may be taken as they are.
  template <class C> static bool takes_rows(const PackOptions<C>& o) {
    return S == SplineConvention::nflows && o.quick && o.bins == 8;
  }
  template <class C>
  static PYFLOWGEN_INLINE void locate(const PackOptions<C>& o, const PackInputs<C>& in, Place<C>& place) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == sizeof(float) && S == SplineConvention::nflows)
      if (with_quick_bins(o, [&]<int K>() { locate_quickly<K>(o, in, place); })) return;
#endif
    if (S == SplineConvention::nflows && o.bins == 8) locate_pack<S, 8>(o, in, place);
    else locate_pack<S, 0>(o, in, place);
  }
  template <class C> static PYFLOWGEN_INLINE void finish(const PackOptions<C>& o, Place<C>* places, int used) {
    finish_all<S>(o, places, used);
  }
  template <class C> static PYFLOWGEN_INLINE void backward(const PackOptions<C>& o, const PackInputs<C>& in, Pack<C> dy,
                                                           Pack<C> dlogdet, PackGradients<C>& out, Pack<C>& dx) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == sizeof(float) && S == SplineConvention::nflows)
      if (with_quick_bins(o, [&]<int K>() { backward_quickly<K>(o, in, dy, dlogdet, out, dx); })) return;
#endif
    if constexpr (S == SplineConvention::freia) return backward_own(o, in, dy, dlogdet, out, dx);
    else if (S == SplineConvention::nflows && o.bins == 8) backward_pack<S, 8>(o, in, dy, dlogdet, out, dx);
    else backward_pack<S, 0>(o, in, dy, dlogdet, out, dx);
  }
};

// Call f<S>() for the convention chosen at run time.
template <class F> void with_convention(SplineConvention convention, F f) {
  switch (convention) {
    case SplineConvention::nflows: return f.template operator()<SplineConvention::nflows>();
    case SplineConvention::zuko: return f.template operator()<SplineConvention::zuko>();
    case SplineConvention::torchflows: return f.template operator()<SplineConvention::torchflows>();
    case SplineConvention::freia: return f.template operator()<SplineConvention::freia>();
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
