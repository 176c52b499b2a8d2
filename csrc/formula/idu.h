// One unit of an information discrimination unit: gates, hidden state and their gradients. V is float, double or a
// pack.
//
//   r, z = gate(a_r), gate(a_z)   n = tanh(a_n)   h = h' + share (n - h'),  share = z, or 1 - z when `keeps`
//
// What the products of r and h' give goes into a_n. A gate is a sigmoid, or when `hard` clamp(0.2 a + 0.5, 0, 1), of
// which 0.2 a + 0.5 is kept: at a clamped value nobody can tell whether its slope is 0.
#pragma once

#include "formula/elementary.h"

namespace pyflowgen::PYFLOWGEN_ISA::formula {

// What is kept of a gate, and from it the gate and its derivative.
template <class V> PYFLOWGEN_FORMULA V idu_gate(bool hard, V a) {
  if (hard) return a * Element<V>(0.2) + Element<V>(0.5);  // rounded twice: then +-2.5 are the bounds themselves
  return sigmoid(a);
}
template <class V> PYFLOWGEN_FORMULA V idu_gate_value(bool hard, V gate) {
  if (hard) return at_most(at_least(gate, 0), 1);
  return gate;
}
template <class V> PYFLOWGEN_FORMULA V idu_gate_slope(bool hard, V gate) {
  if (!hard) return gate * (1 - gate);
  const V slope = splat<V>(Element<V>(0.2)), none = splat<V>(0);
  return gate >= 0 ? (gate <= 1 ? slope : none) : none;
}

template <class V> struct IduUnit { V z, n, h; };

template <class V> PYFLOWGEN_FORMULA IduUnit<V> idu(bool hard, bool keeps, V a_z, V a_n, V before) {
  const V z = idu_gate(hard, a_z), n = tanh(a_n);
  V share = idu_gate_value(hard, z);
  if (keeps) share = 1 - share;
  return {z, n, fma(share, n - before, before)};
}

template <class V> struct IduGradient { V dz, dn, before; };

// Gradients of a_z, a_n, and of the hidden state before as far as it goes through neither product; z as kept.
template <class V> PYFLOWGEN_FORMULA IduGradient<V> idu_backward(bool hard, bool keeps, V z, V n, V before, V dh) {
  const V value = idu_gate_value(hard, z), dz = dh * (n - before) * idu_gate_slope(hard, z);
  if (keeps) return {-dz, dh * (1 - value) * (1 - n * n), dh * value};
  return {dz, dh * value * (1 - n * n), dh * (1 - value)};
}

}  // namespace pyflowgen::PYFLOWGEN_ISA::formula
