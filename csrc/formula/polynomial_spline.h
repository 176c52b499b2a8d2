// One element of a spline of degree 1, 2 or 3: value, log-derivative and gradients in one bin. V is float, double or a
// pack of them.
//
// With theta = (x - x0) / w, phi = 1 - theta, a and b the derivatives at the bin's ends in units of its slope h / w:
//
//   eta = (y - y0) / h = theta (a phi^2 + (3 - b) theta phi + theta^2)
//   d eta / d theta    = a phi^2 + 2 (3 - a - b) theta phi + b theta^2
//
// which is the parabola where a + b = 2 and the line where both are 1. Taken from the nearer end of the bin, a and b at
// most 3, it is a sum of positive terms, and so is the inverse of the parabola; the cubic's is found by Newton's method
// in a bracket.
#pragma once

#include "formula/rational_quadratic_spline.h"

namespace pyflowgen::PYFLOWGEN_ISA::formula {

// The bin that x (or y, for the inverse) lies in: its knots and its slope, which the knots of a narrow bin do not tell.
template <class V> struct PolynomialBin { V x0, x1, y0, y1, slope, a, b; };

template <class V> PYFLOWGEN_FORMULA V polynomial_value(V t, V a, V b) {
  const V phi = splat<V>(1) - t;
  return t * fma(a * phi, phi, t * fma(splat<V>(3) - b, phi, t));
}
template <class V> PYFLOWGEN_FORMULA V polynomial_derivative(V t, V a, V b) {
  const V phi = splat<V>(1) - t, middle = (splat<V>(3) - a) - b;
  return fma(a * phi, phi, t * fma(middle + middle, phi, b * t));
}

template <class V, class Mask> PYFLOWGEN_FORMULA bool all_lanes(Mask mask) {
  if constexpr (sizeof(V) == sizeof(Element<V>)) return bool(mask);
  else {
    bool all = true;
    for (unsigned i = 0; i < sizeof(V) / sizeof(Element<V>); ++i) all &= mask[i] != 0;
    return all;
  }
}

// t of polynomial_value(t, a, b) = value, for value at most about 1/2.
template <int degree, class V> PYFLOWGEN_FORMULA V polynomial_root(V value, V a, V b) {
  const V zero = splat<V>(0), one = splat<V>(1), two = splat<V>(2), half = splat<V>(Element<V>(0.5));
  if constexpr (degree == 1) return value;
  if constexpr (degree == 2) return two * value / (a + square_root(fma(b * b, value, a * a * (one - value))));
  // The parabola with the cubic's first terms, where it bends upwards.
  const V bend = at_least(((splat<V>(3) - a) - a) - b, 0);
  V t = two * value / (a + square_root(fma(bend * value, splat<V>(4), a * a)));
  t = at_most(t > zero ? t : value, 1);  // 0 / 0
  V low = zero, high = one;
  constexpr Element<V> rounding = single<V> ? Element<V>(1.2e-7) : Element<V>(2.3e-16);
  for (int i = 0; i < 64; ++i) {
    const V over = polynomial_value(t, a, b) - value;
    const auto above = over > zero;
    high = above ? t : high, low = above ? low : t;
    V next = t - over / polynomial_derivative(t, a, b);
    next = (next >= low) & (next <= high) ? next : (low + high) * half;
    next = over == zero ? t : next;
    // NaN is done as well
    const auto wrong = (abs(over) > rounding * value) & (abs(next - t) > rounding * t);
    t = value == value ? next : value;
    if (all_lanes<V>(!wrong)) break;
  }
  return t;
}

// Where the element lies in its bin: t from the end that is nearer, `near` whether that is the first, and the ends'
// derivatives seen from there.
template <class V> struct PolynomialPlace {
  decltype(V{} < V{}) near;
  V t, a, b;
};
template <int degree, class V>
PYFLOWGEN_FORMULA PolynomialPlace<V> polynomial_place(V x, const PolynomialBin<V>& bin, bool inverse) {
  const V low = inverse ? bin.y0 : bin.x0, high = inverse ? bin.y1 : bin.x1;
  const auto near = x - low <= high - x;
  // two knots of a linear spline may be one
  const V size = at_least(high - low, single<V> ? Element<V>(1.17549435e-38) : Element<V>(2.2250738585072014e-308));
  const V t = (near ? x - low : high - x) / size, a = near ? bin.a : bin.b, b = near ? bin.b : bin.a;
  return {near, inverse ? polynomial_root<degree>(t, a, b) : t, a, b};
}

// y and l = log dy/dx; for the inverse x from y, and l of the forward map at x: the sign is left to the caller.
template <int degree, class V> PYFLOWGEN_FORMULA Splined<V> polynomial(V x, const PolynomialBin<V>& bin, bool inverse) {
  const auto [near, t, a, b] = polynomial_place<degree>(x, bin, inverse);
  const V l = log(bin.slope * (degree == 1 ? splat<V>(1) : polynomial_derivative(t, a, b)));
  if (inverse) {
    const V w = bin.x1 - bin.x0;
    return {near ? fma(w, t, bin.x0) : fma(-w, t, bin.x1), l};
  }
  const V eta = degree == 1 ? t : polynomial_value(t, a, b), h = bin.y1 - bin.y0;
  return {near ? fma(h, eta, bin.y0) : fma(-h, eta, bin.y1), l};
}

// Gradients as SplineGradient has them, of a bin of sizes w and h; d0 and d1 are those of a and b.
template <int degree, class V> PYFLOWGEN_FORMULA SplineGradient<V> polynomial_backward(V dy, V dlogdet, V x,
                                                                                       const PolynomialBin<V>& bin, V w,
                                                                                       V h, bool inverse) {
  const V one = splat<V>(1), zero = splat<V>(0), inverse_w = one / w, inverse_h = one / h;
  const auto [near, t, a, b] = polynomial_place<degree>(x, bin, inverse);
  const V theta = near ? t : one - t, phi = near ? one - t : t, difference = phi - theta;
  const V value = polynomial_value(t, a, b), eta = near ? value : one - value;
  const V derivative = polynomial_derivative(t, a, b), inverse_d = one / derivative;
  const V middle = (splat<V>(3) - bin.a) - bin.b;
  const V bend = fma(middle, difference, fma(bin.b, theta, -bin.a * phi)) * inverse_d;  // l's, halved
  const V dl_theta = (bend + bend) * dlogdet;
  // The inverse is x(y) of f(x(y)) = y: its gradients are those of f for another dy, and -dlogdet.
  const V dl = inverse ? -dlogdet : dlogdet;
  V d_eta, d_theta;
  if (inverse) {
    d_theta = -dy * w;
    d_eta = (dl_theta + d_theta) * inverse_d;
  } else {
    d_eta = dy * h;
    d_theta = fma(d_eta, derivative, dl_theta);
  }
  const V relative = dl * inverse_d, product = theta * phi;
  const V da = degree == 1 ? zero : phi * fma(d_eta, product, relative * (difference - theta));
  const V db = degree == 1 ? zero : theta * (relative * (-phi - difference) - d_eta * product);
  const V shift_y = inverse ? d_eta * inverse_h : dy, along_x = d_theta * inverse_w;
  return {inverse ? -shift_y : along_x,
          -along_x,
          (-theta * d_theta - dl) * inverse_w,
          shift_y,
          fma(d_eta, eta, dl) * inverse_h,
          da,
          db};
}

// Steffen's derivative at the knot between bins of sizes w0 and w1, slopes s0 and s1, and its derivatives.
template <class V> struct Limited { V value, w0, s0, w1, s1; };
template <class V> PYFLOWGEN_FORMULA Limited<V> limited_derivative(V w0, V s0, V w1, V s1) {
  const V zero = splat<V>(0), one = splat<V>(1), two = splat<V>(2), share = one / (w0 + w1);
  const V mean = (w1 * s0 + w0 * s1) * share;  // twice the parabola's
  const auto first = s0 < s1, between = mean < two * (first ? s0 : s1), tie = s0 == s1;
  const V half = tie ? one : two;
  return {between ? mean : two * (first ? s0 : s1), between ? (s1 - mean) * share : zero,
          between ? w1 * share : (first | tie ? half : zero), between ? (s0 - mean) * share : zero,
          between ? w0 * share : (first & !tie ? zero : half)};
}

}  // namespace pyflowgen::PYFLOWGEN_ISA::formula
