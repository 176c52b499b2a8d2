// One unit of a gated recurrent unit: gates, hidden state and their gradients. V is float, double or a pack of them.
//
//   r, z = sigmoid(a_r, a_z)   n = tanh(a_n + r b_n)   h = (1 - z) n + z h'
//
// where a_n is the input's part of the new gate and b_n the hidden state's.
#pragma once

#include "formula/elementary.h"

namespace pyflowgen::PYFLOWGEN_ISA::formula {

template <class V> struct GruUnit { V r, z, n, h; };

template <class V> PYFLOWGEN_FORMULA GruUnit<V> gru(V a_r, V a_z, V a_n, V b_n, V before) {
  const V r = sigmoid(a_r), z = sigmoid(a_z), n = tanh(fma(r, b_n, a_n));
  return {r, z, n, fma(z, before - n, n)};
}

template <class V> struct GruGradient { V dr, dz, dn, db_n, before; };

// Gradients of the arguments and of the hidden state before as far as it goes through z alone.
template <class V> PYFLOWGEN_FORMULA GruGradient<V> gru_backward(V r, V z, V n, V b_n, V before, V dh) {
  const V dn = dh * (1 - z) * (1 - n * n);
  return {dn * b_n * (r * (1 - r)), dh * (before - n) * (z * (1 - z)), dn, dn * r, dh * z};
}

}  // namespace pyflowgen::PYFLOWGEN_ISA::formula
