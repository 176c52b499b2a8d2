// One element of a rational-quadratic spline: knot derivatives, value, log-derivative and gradients in one bin. V is
// float, double or a pack of them.
//
// With theta = (x - x0) / w, phi = 1 - theta, a and b the derivatives d0 and d1 in units of the bin's slope h / w:
//
//   eta = (y - y0) / h = theta (theta + a phi) / m          m = theta^2 + phi^2 + (a + b) theta phi
//   zeta = 1 - eta     = phi (phi + b theta) / m
//   dy/dx = (h / w) g / m^2                                 g = b theta^2 + 2 theta phi + a phi^2
//
// and the inverse, with p = a zeta - b eta and r = sqrt(p^2 + 4 eta zeta) + |p|,
//
//   theta : phi = 2 eta : r  where p >= 0,  r : 2 zeta  where p < 0.
//
// All terms but p's are positive: nothing cancels, and no root of a negative number is taken.
#pragma once

#include "formula/elementary.h"
#include "formula/spline_convention.h"

namespace pyflowgen::PYFLOWGEN_ISA::formula {

#if defined(__CUDACC__)
PYFLOWGEN_FORMULA float square_root(float x) { return sqrtf(x); }
PYFLOWGEN_FORMULA double square_root(double x) { return ::sqrt(x); }
#else
PYFLOWGEN_FORMULA float square_root(float x) { return __builtin_sqrtf(x); }
PYFLOWGEN_FORMULA double square_root(double x) { return __builtin_sqrt(x); }
#if defined(__AVX512F__)
PYFLOWGEN_FORMULA f32v square_root(f32v x) { return (f32v)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)x); }
PYFLOWGEN_FORMULA f64v square_root(f64v x) { return (f64v)_mm512_maskz_sqrt_pd(__mmask8(-1), (__m512d)x); }
#elif defined(__AVX2__)
PYFLOWGEN_FORMULA f32v square_root(f32v x) { return (f32v)_mm256_sqrt_ps((__m256)x); }
PYFLOWGEN_FORMULA f64v square_root(f64v x) { return (f64v)_mm256_sqrt_pd((__m256d)x); }
#else
template <class V> PYFLOWGEN_FORMULA V square_root(V x) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(Element<V>); ++i) x[i] = square_root(Element<V>(x[i]));
  return x;
}
#endif
#endif

// 2^(x + unit) in place, for x at most 0, as a softmax needs it: half the work of exp, since the logits' scale takes in
// log2(e), and the power of two is an addition to the exponent. x below -150 is taken for that; `seen` gathers what
// tells a NaN. Step by step for n at a time: a processor looks only some 60 waiting operations ahead, less than two
// chains. Error in float: 1.1 ulp. unit: from 24 to 30, and 0 in double.
template <int n, class V> PYFLOWGEN_FORMULA void exp2_of_logits(V (&x)[n], int unit, Bits<V>& seen) {
  if constexpr (single<V>) {
    // 1.5 2^23: the sum's low bits hold the rounded x + unit
    const V magic = splat<V>(12582912.0f + float(unit)), one = splat<V>(1);
    V t[n], y[n];
    for (int i = 0; i < n; ++i) x[i] = at_least(x[i], -150);
    for (int i = 0; i < n; ++i) t[i] = x[i] + magic;
    for (int i = 0; i < n; ++i) x[i] = x[i] - (t[i] - magic);
    for (int i = 0; i < n; ++i) y[i] = horner(x[i], 0.0013398875016719103f, 0.00015353361959569156f);
    for (const float c : {0.00961843691766262f, 0.055503323674201965f, 0.24022647738456726f, 0.6931471824645996f})
      for (int i = 0; i < n; ++i) y[i] = fma(x[i], y[i], splat<V>(c));
    for (int i = 0; i < n; ++i) y[i] = fma(x[i], y[i], one);
    for (int i = 0; i < n; ++i) {
      seen |= bit_cast<Bits<V>>(t[i]);
      x[i] = bit_cast<V>(bit_cast<Bits<V>>(y[i]) + (bit_cast<Bits<V>>(t[i]) << mantissa_bits<V>));
    }
  } else {
    for (int i = 0; i < n; ++i) x[i] = exp_in_range(at_least(x[i] * ln2<V>, exp_lowest<V>));
  }
}
// Whether exp2_of_logits has seen a NaN: in float all that it rounds has the exponent of 2^23, without this bit.
template <class V> PYFLOWGEN_FORMULA auto saw_nan(Bits<V> seen) { return (seen & Lane<V>(1 << 28)) != Bits<V>{}; }

// u / (1 + |u / bound|) and its derivative.
template <class V> struct Clipped { V value, derivative; };
template <class V> PYFLOWGEN_FORMULA Clipped<V> softclip(V u, V inverse_bound) {
  const V q = splat<V>(1) / fma(abs(u), inverse_bound, splat<V>(1));
  return {u * q, q * q};
}

// A knot's derivative d from its parameter, and d' with respect to that.
template <class V> struct KnotDerivative { V value, derivative; };

template <SplineConvention S, class V>
PYFLOWGEN_FORMULA KnotDerivative<V> knot_derivative(V u, V least, V edge, V inverse_clip) {
  if constexpr (S == SplineConvention::zuko) {
    const auto [v, derivative] = softclip(u, inverse_clip);
    const V d = exp(v);
    return {d, d * derivative};
  } else {
    constexpr bool scaled = S == SplineConvention::torchflows;
    if constexpr (scaled) u = fma(u, splat<V>(1e-3), edge);
    if constexpr (S == SplineConvention::freia) u += edge;
    const V zero = splat<V>(0), one = splat<V>(1);
    const V e = exp_in_range(at_least(-abs(u), exp_lowest<V>));
    const V slope = (u < zero ? e : one) / (one + e);
    return {at_least(u, 0) + log1p_unit(e) + least, scaled ? slope * splat<V>(1e-3) : slope};
  }
}

// freia's: a softplus and its derivative, and an interval along one axis of bins that make it up. `total`: their sizes
// as they are, which the clamp, where there is one, brings to `size`, and the beginning with them: both times `resize`,
// whose derivative with respect to the total is `growth`.
template <class V> PYFLOWGEN_FORMULA KnotDerivative<V> softplus_at_least(V u, V least) {
  return knot_derivative<SplineConvention::nflows>(u, least, u, u);
}
template <class V> struct Clamped { V value, derivative; };
template <class V> PYFLOWGEN_FORMULA Clamped<V> clamp_size(V size, V inverse_clamp, bool clamps) {
  const V one = splat<V>(1);
  if (!clamps) return {size, one};
  const V t = tanh(size * inverse_clamp);
  return {t / inverse_clamp, fma(-t, t, one)};
}
template <class V> struct OwnSide { V begin, size, resize, growth; };
template <class V> PYFLOWGEN_FORMULA OwnSide<V> own_side(V total, V begin, V inverse_clamp, bool clamps) {
  const auto [size, derivative] = clamp_size(total, inverse_clamp, clamps);
  const V one = splat<V>(1), resize = clamps ? size / total : one;
  return {begin * resize, size, resize, clamps ? (derivative - resize) / total : splat<V>(0)};
}
// Where `outside` beyond the interval's end by `distance`, in units of what goes in, y goes on at `slope`: gradients of
// what goes in, of shifts of that end along x and y, and of the slope. Of the clamp's and the sizes' effect on the
// bins: own_gradient, from those of the bins before the one that x is in, of that, and `whole` of every bin.
template <class V> struct TailGradient { V input, shift_x, shift_y, slope; };
template <class V> PYFLOWGEN_FORMULA TailGradient<V> tail_backward(V dy, V dlogdet, V distance, V slope, bool inverse) {
  if (!inverse) return {dy * slope, -dy * slope, dy, fma(dy, distance, dlogdet / slope)};
  const V along_x = dy / slope;
  return {along_x, dy, -along_x, -fma(along_x, distance / slope, dlogdet / slope)};
}
template <class V> struct OwnGradient { V before, at, beyond, begin; };
template <class V>
PYFLOWGEN_FORMULA OwnGradient<V> own_gradient(const OwnSide<V>& side, V offset, V length, V shift, V size, V whole) {
  const V of_resize = fma(shift, offset + side.begin, fma(size, length, whole * side.size)) / side.resize;
  const V all = fma(of_resize, side.growth, whole * side.resize);
  return {fma(shift, side.resize, all), fma(size, side.resize, all), all, shift * side.resize};
}

// The bin that x (or y, for the inverse) lies in.
template <class V> struct SplineBin { V x0, x1, y0, y1, d0, d1; };
template <class V> struct Splined { V y, l; };

// Where the element lies in its bin.
template <class V> struct SplinePlace { V theta, phi; };
template <class V> PYFLOWGEN_FORMULA SplinePlace<V> spline_place(V x, const SplineBin<V>& bin, V inverse_w, V inverse_h,
                                                                 V a, V b, bool inverse) {
  if (!inverse) return {(x - bin.x0) * inverse_w, (bin.x1 - x) * inverse_w};
  const V zero = splat<V>(0), two = splat<V>(2);
  const V eta = (x - bin.y0) * inverse_h, zeta = (bin.y1 - x) * inverse_h;
  const V p = a * zeta - b * eta;
  const V r = square_root(fma(p, p, two * two * eta * zeta)) + abs(p);
  const V other = two * (p < zero ? zeta : eta), scale = splat<V>(1) / (other + r);
  const V of_r = r * scale, of_other = other * scale;
  return {p < zero ? of_r : of_other, p < zero ? of_other : of_r};
}

// y and l = log dy/dx; for the inverse x from y, and l of the forward map at x: the sign is left to the caller.
template <class V> PYFLOWGEN_FORMULA Splined<V> rational_quadratic(V x, const SplineBin<V>& bin, bool inverse) {
  const V one = splat<V>(1);
  const V w = bin.x1 - bin.x0, h = bin.y1 - bin.y0, inverse_w = one / w, inverse_h = one / h;
  const V ratio = w * inverse_h, a = bin.d0 * ratio, b = bin.d1 * ratio;
  const auto [theta, phi] = spline_place(x, bin, inverse_w, inverse_h, a, b, inverse);
  const V product = theta * phi, low = fma(a, phi, theta), high = fma(b, theta, phi);
  const V inverse_m = one / fma(theta, low, phi * high);  // m = theta (theta + a phi) + phi (phi + b theta)
  const V g = fma(b * theta, theta, fma(a * phi, phi, product + product));
  const V l = log(g * inverse_m * (inverse_m * (h * inverse_w)));
  if (inverse) return {theta < phi ? fma(w, theta, bin.x0) : fma(-w, phi, bin.x1), l};
  const V eta = theta * low * inverse_m, zeta = phi * high * inverse_m;
  return {eta < zeta ? fma(h, eta, bin.y0) : fma(-h, zeta, bin.y1), l};
}

// Gradients with respect to what goes in (x, or y for the inverse), to a shift of the bin along x and along y, to its
// sizes and to its derivatives.
template <class V> struct SplineGradient { V input, shift_x, width, shift_y, height, d0, d1; };

// From dy and the gradient of the log-determinant, which for the inverse is -l.
template <class V> PYFLOWGEN_FORMULA SplineGradient<V> rational_quadratic_backward(V dy, V dlogdet, V x,
                                                                                   const SplineBin<V>& bin,
                                                                                   bool inverse) {
  const V one = splat<V>(1), two = splat<V>(2);
  const V w = bin.x1 - bin.x0, h = bin.y1 - bin.y0, inverse_w = one / w, inverse_h = one / h;
  const V ratio = w * inverse_h, a = bin.d0 * ratio, b = bin.d1 * ratio;
  const auto [theta, phi] = spline_place(x, bin, inverse_w, inverse_h, a, b, inverse);
  const V product = theta * phi, low = fma(a, phi, theta), high = fma(b, theta, phi), difference = phi - theta;
  const V m = fma(theta, low, phi * high), inverse_m = one / m;
  const V g = fma(b * theta, theta, fma(a * phi, phi, product + product)), inverse_g = one / g;
  const V eta = theta * low * inverse_m, zeta = phi * high * inverse_m, product_m = product * inverse_m;
  // l's derivative with respect to theta, halved
  const V dl = (fma(b, theta, difference) - a * phi) * inverse_g - difference * (a + b - two) * inverse_m;
  const V dl_theta = (dl + dl) * dlogdet;
  // The inverse is x(y) of f(x(y)) = y: its gradients are those of f for another dy, and -dlogdet.
  const V dl_ = inverse ? -dlogdet : dlogdet;
  V d_eta, d_theta;
  if (inverse) {
    d_theta = -dy * w;
    d_eta = (dl_theta + d_theta) * (m * inverse_g) * m;
  } else {
    d_eta = dy * h;
    d_theta = fma(d_eta, g * inverse_m * inverse_m, dl_theta);
  }
  const V common = product_m + product_m;
  const V da = fma(d_eta * product_m, zeta, dl_ * (phi * phi * inverse_g - common));
  const V db = dl_ * (theta * theta * inverse_g - common) - d_eta * product_m * eta;
  const V sizes = fma(da, a, fma(db, b, -dl_));
  const V shift_y = inverse ? d_eta * inverse_h : dy, along_x = d_theta * inverse_w;
  return {inverse ? -shift_y : along_x,
          -along_x,
          fma(-theta, d_theta, sizes) * inverse_w,
          shift_y,
          fma(d_eta, eta, -sizes) * inverse_h,
          da * ratio,
          db * ratio};
}

}  // namespace pyflowgen::PYFLOWGEN_ISA::formula
