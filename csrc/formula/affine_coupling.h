// One element of an affine coupling: value, log-derivative and gradients. V is float, double or a pack of them.
//
//   forward   y = x a + t          or  (x + t) a      (shift_first)       a = e^l(s)
//   inverse   x = (y - t) / a      or  y / a - t
#pragma once

#include "formula/affine_scale.h"
#include "formula/elementary.h"

namespace pyflowgen::PYFLOWGEN_ISA::formula {

// s -> the factor that is applied (a, or 1/a for the inverse), l = log a and l'(s); what a caller does not use, the
// compiler drops. One division each where one will do, and the same for both directions: the choice is a blend.
template <class V> struct ScaleValue { V factor, l, derivative; };

template <AffineScale S, class V> PYFLOWGEN_FORMULA ScaleValue<V> scale_value(V s, V clamp, bool inverse) {
  const V zero = splat<V>(0), one = splat<V>(1);
  if constexpr (S == AffineScale::sigmoid || S == AffineScale::sigmoid_eps || S == AffineScale::softplus) {
    const V u = S == AffineScale::softplus ? s : s + splat<V>(2);
    const V e = exp(-abs(u)), sum = one + e;  // e in (0, 1]: nothing overflows for any u
    const V numerator = u < zero ? e : one;   // sigmoid(u) = numerator / sum, sigmoid(-u) = e / (numerator sum)
    if constexpr (S == AffineScale::sigmoid) {
      return {(inverse ? sum : numerator) / (inverse ? numerator : sum), (u < zero ? u : zero) - log1p_unit(e),
              (u < zero ? one : e) / sum};
    } else if constexpr (S == AffineScale::sigmoid_eps) {
      const V shifted = fma(splat<V>(1e-3), sum, numerator);  // a = shifted / sum
      const V factor = (inverse ? sum : shifted) / (inverse ? shifted : sum), l = log(factor);
      return {factor, inverse ? -l : l, e / (sum * shifted)};
    } else {
      const V a = (u < zero ? zero : u) + log1p_unit(e) + splat<V>(1e-3);
      return {inverse ? one / a : a, log(a), numerator / (sum * a)};
    }
  } else {
    V l = s, derivative = one;
    if constexpr (S == AffineScale::tanh) {
      const V th = tanh(s * (one / clamp));
      l = clamp * th;
      derivative = one - th * th;
    } else if constexpr (S == AffineScale::softclip) {
      const V d = one / (one + abs(s * (one / clamp)));
      l = s * d;
      derivative = d * d;
    } else if constexpr (S == AffineScale::atan) {
      const V c = clamp * splat<V>(0.636);
      l = c * atan(s);
      derivative = c / (one + s * s);
    }
    return {exp(inverse ? -l : l), l, derivative};
  }
}

template <class V> struct Coupled { V y, l; };

// y (or x, for the inverse) and l; the log-determinant of the inverse is -l, left to the caller.
template <AffineScale S, class V>
PYFLOWGEN_FORMULA Coupled<V> affine_coupling(V x, V t, V s, V clamp, bool shift_first, bool inverse) {
  if constexpr (S == AffineScale::additive) {
    return {inverse ? x - t : x + t, splat<V>(0)};
  } else {
    const auto [factor, l, derivative] = scale_value<S>(s, clamp, inverse);
    if (inverse) return {shift_first ? x * factor - t : (x - t) * factor, l};
    return {shift_first ? (x + t) * factor : fma(x, factor, t), l};
  }
}

template <class V> struct CoupledGradient { V dx, dt, ds; };

// Gradients from dy and the gradient of this row's log-determinant.
template <AffineScale S, class V>
PYFLOWGEN_FORMULA CoupledGradient<V> affine_coupling_backward(V dy, V dlogdet, V x, V t, V s, V clamp, bool shift_first,
                                                              bool inverse) {
  if constexpr (S == AffineScale::additive) {
    return {dy, inverse ? -dy : dy, splat<V>(0)};
  } else {
    const auto [factor, l, derivative] = scale_value<S>(s, clamp, inverse);
    const V dx = dy * factor;
    if (inverse) {
      const V scaled = shift_first ? x : x - t;  // what the scale divides
      return {dx, shift_first ? -dy : -dx, -(fma(dx, scaled, dlogdet) * derivative)};
    }
    const V scaled = shift_first ? x + t : x;
    return {dx, shift_first ? dx : dy, fma(dx, scaled, dlogdet) * derivative};
  }
}

}  // namespace pyflowgen::PYFLOWGEN_ISA::formula
