// Activations on packs, and their derivatives from what is kept: the argument or the result, see keeps_argument.
// Included only from *.simd.cpp, as simd.h.
#pragma once

#include "cpu/simd.h"
#include "formula/elementary.h"
#include "linear.h"

namespace pyflowgen::PYFLOWGEN_ISA {

template <Activation kind, class V> PYFLOWGEN_INLINE V activate(V z) {
  if constexpr (kind == Activation::relu) return z < 0 ? V{} : z;  // NaN stays
  if constexpr (kind == Activation::leaky_relu) return z < 0 ? z * formula::Element<V>(leaky_slope) : z;
  if constexpr (kind == Activation::silu) return z * formula::sigmoid(z);
  if constexpr (kind == Activation::tanh) return formula::tanh(z);
  if constexpr (kind == Activation::sigmoid) return formula::sigmoid(z);
  if constexpr (kind == Activation::gelu) return z * formula::normal_cdf(z);
  if constexpr (kind == Activation::elu) return z > 0 ? z : formula::expm1(z);
  return z;
}

template <Activation kind, class V> PYFLOWGEN_INLINE V activate_backward(V dy, V saved) {
  if constexpr (kind == Activation::relu) return saved <= 0 ? V{} : dy;
  if constexpr (kind == Activation::leaky_relu) return saved > 0 ? dy : dy * formula::Element<V>(leaky_slope);
  if constexpr (kind == Activation::silu) {
    const V s = formula::sigmoid(saved);
    return dy * s * (1 + saved * (1 - s));
  }
  if constexpr (kind == Activation::tanh) return dy * (1 - saved * saved);
  if constexpr (kind == Activation::sigmoid) return dy * saved * (1 - saved);
  if constexpr (kind == Activation::gelu) {
    constexpr formula::Element<V> at_zero = 0.398942280401432677940;  // the density's, 1 / sqrt(2 pi)
    const formula::Normal<V> n = formula::normal(saved);
    return dy * formula::fma(saved, n.bell * at_zero, n.cdf);
  }
  if constexpr (kind == Activation::elu) return saved > 0 ? dy : dy * formula::exp(saved);
  return dy;
}

// f.operator()<kind>() for the activation's kind.
template <class F> PYFLOWGEN_INLINE void for_kind(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none: return f.template operator()<Activation::none>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::leaky_relu: return f.template operator()<Activation::leaky_relu>();
    case Activation::silu: return f.template operator()<Activation::silu>();
    case Activation::tanh: return f.template operator()<Activation::tanh>();
    case Activation::sigmoid: return f.template operator()<Activation::sigmoid>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::elu: return f.template operator()<Activation::elu>();
  }
}

}  // namespace pyflowgen::PYFLOWGEN_ISA
