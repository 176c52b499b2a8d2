// One element of an affine coupling: value, log-derivative and gradients. V is float, double or a pack of them.
//
//   forward   y = x a + t          or  (x + t) a      (shift_first)       a = e^l(s)
//   inverse   x = (y - t) / a      or  y / a - t
#pragma once

#include "formula/affine_scale.h"
#include "formula/elementary.h"

namespace pyflowgen::PYFLOWGEN_ISA::formula {

// s -> scale a, its reciprocal (by one exponential where there is one), l = log a and l'(s). What a caller does not
// use, the compiler drops.
template <class V> struct ScaleValue { V a, reciprocal, l, derivative; };

template <AffineScale S, class V> PYFLOWGEN_FORMULA ScaleValue<V> scale_value(V s, V clamp, bool inverse) {
  const V zero = splat<V>(0), one = splat<V>(1);
  if constexpr (S == AffineScale::sigmoid || S == AffineScale::sigmoid_eps) {
    const V u = s + splat<V>(2);
    const V e = exp(-abs(u));  // in (0, 1]: neither overflows for any u
    const V small = u < zero ? e : one, large = u < zero ? one : e;
    const V sigma = small / (one + e);
    if constexpr (S == AffineScale::sigmoid) {
      return {sigma, (one + e) / small, (u < zero ? u : zero) - log1p_unit(e), large / (one + e)};
    } else {
      const V a = sigma + splat<V>(1e-3);
      return {a, one / a, log(a), sigma * (large / (one + e)) / a};
    }
  } else if constexpr (S == AffineScale::softplus) {
    const V a = softplus(s) + splat<V>(1e-3);
    return {a, one / a, log(a), sigmoid(s) / a};
  } else {
    V l = s, derivative = one;
    if constexpr (S == AffineScale::tanh) {
      const V th = tanh(s / clamp);
      l = clamp * th;
      derivative = one - th * th;
    } else if constexpr (S == AffineScale::softclip) {
      const V d = one / (one + abs(s / clamp));
      l = s * d;
      derivative = d * d;
    } else if constexpr (S == AffineScale::atan) {
      const V c = clamp * splat<V>(0.636);
      l = c * atan(s);
      derivative = c / (one + s * s);
    }
    const V a = exp(inverse ? -l : l);
    return {a, a, l, derivative};
  }
}

template <class V> struct Coupled { V y, l; };

// y (or x, for the inverse) and l; the log-determinant of the inverse is -l, left to the caller.
template <AffineScale S, class V> PYFLOWGEN_FORMULA Coupled<V> affine_coupling(V x, V t, V s, V clamp, bool shift_first, bool inverse) {
  if constexpr (S == AffineScale::additive) {
    return {inverse ? x - t : x + t, splat<V>(0)};
  } else {
    const auto scale = scale_value<S>(s, clamp, inverse);
    if (inverse) {
      const V r = scale.reciprocal;
      return {shift_first ? x * r - t : (x - t) * r, scale.l};
    }
    return {shift_first ? (x + t) * scale.a : fma(x, scale.a, t), scale.l};
  }
}

template <class V> struct CoupledGradient { V dx, dt, ds; };

// Gradients from dy and the gradient of this row's log-determinant.
template <AffineScale S, class V>
PYFLOWGEN_FORMULA CoupledGradient<V> affine_coupling_backward(V dy, V dlogdet, V x, V t, V s, V clamp, bool shift_first, bool inverse) {
  if constexpr (S == AffineScale::additive) {
    return {dy, inverse ? -dy : dy, splat<V>(0)};
  } else {
    const auto scale = scale_value<S>(s, clamp, inverse);
    const V dx = dy * (inverse ? scale.reciprocal : scale.a);
    if (inverse) {
      const V scaled = shift_first ? x : x - t;  // what the scale divides
      return {dx, shift_first ? -dy : -dx, -(fma(dx, scaled, dlogdet) * scale.derivative)};
    }
    const V scaled = shift_first ? x + t : x;
    return {dx, shift_first ? dx : dy, fma(dx, scaled, dlogdet) * scale.derivative};
  }
}

} // namespace pyflowgen::PYFLOWGEN_ISA::formula
