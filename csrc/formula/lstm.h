// One unit of a long short-term memory: gates, cell, hidden state and their gradients. V is float, double or a pack.
//
//   i, f, o = sigmoid(a_i, a_f, a_o)   g = tanh(a_g)   c = f c' + i g   h = o tanh(c)
#pragma once

#include "formula/elementary.h"

namespace pyflowgen::PYFLOWGEN_ISA::formula {

template <class V> struct LstmUnit { V i, f, g, o, c, h; };

// From the gates' arguments and the cell before.
template <class V> PYFLOWGEN_FORMULA LstmUnit<V> lstm(V a_i, V a_f, V a_g, V a_o, V before) {
  const V i = sigmoid(a_i), f = sigmoid(a_f), g = tanh(a_g), o = sigmoid(a_o);
  const V c = fma(f, before, i * g);
  return {i, f, g, o, c, o * tanh(c)};
}

template <class V> struct LstmGradient { V di, df, dg, d_o, before; };

// Gradients of the gates' arguments and of the cell before, from those of h and c; i, f, g, o as lstm() gave them.
template <class V> PYFLOWGEN_FORMULA LstmGradient<V> lstm_backward(V i, V f, V g, V o, V c, V before, V dh, V dc) {
  const V t = tanh(c);
  const V d = fma(dh * o, 1 - t * t, dc);
  return {d * g * (i * (1 - i)), d * before * (f * (1 - f)), d * i * (1 - g * g), dh * t * (o * (1 - o)), d * f};
}

}  // namespace pyflowgen::PYFLOWGEN_ISA::formula
