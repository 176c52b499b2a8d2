// The determinant as a product of pivots: its sign and the logarithm of its absolute value. V is double or a pack of
// doubles: pivots of float32 matrices are doubles too.
#pragma once

#include "formula/elementary.h"

namespace pyflowgen::PYFLOWGEN_ISA::formula {

// 1 / pivot as the product of two factors, of which a denormal pivot's reciprocal alone would overflow.
template <class V> struct Reciprocal { V scale, rest; };
template <class V> PYFLOWGEN_FORMULA Reciprocal<V> reciprocal(V pivot) {
  const V scale = abs(pivot) < 0x1p-1000 ? splat<V>(0x1p200) : splat<V>(1);
  // Below a zero pivot are zeros: they stay as they are.
  return {scale, pivot == 0 ? splat<V>(0) : 1 / (pivot * scale)};
}

// mantissa 2^exponent. Each pivot gives a mantissa in [1, 2), so 64 of them neither overflow nor underflow, and one
// logarithm serves all. What has no mantissa (0, inf, NaN) is multiplied as it is.
template <class V> struct PivotProduct {
  V mantissa = splat<V>(1), exponent = splat<V>(0);

  PYFLOWGEN_FORMULA void multiply(V pivot) {
    constexpr Lane<V> field_bits = Lane<V>(0x7ff) << mantissa_bits<V>, one = Lane<V>(exponent_bias<V>)
                                                                             << mantissa_bits<V>;
    const auto denormal = abs(pivot) < 0x1p-1022;
    const V scaled = denormal ? pivot * 0x1p54 : pivot, size = abs(scaled);
    const auto regular = (size > 0) & (size < infinity<V>);
    const Bits<V> bits = bit_cast<Bits<V>>(scaled);
    const V n = formula::exponent<V>(bit_cast<Bits<V>>(size) >> mantissa_bits<V>);
    mantissa = mantissa * (regular ? bit_cast<V>((bits & ~field_bits) | one) : pivot);
    exponent = exponent + (regular ? (denormal ? n - 54 : n) : splat<V>(0));
  }

  // 1, -1, or 0 for a singular matrix and for NaN, as torch has it.
  PYFLOWGEN_FORMULA V sign() const { return mantissa > 0 ? splat<V>(1) : mantissa < 0 ? splat<V>(-1) : splat<V>(0); }
  PYFLOWGEN_FORMULA V logabs() const {
    const V size = abs(mantissa);
    const auto [f, n] = split_any(size);
    return log_edges(size, add_ln2(exponent + n, f, log_tail(f)));
  }
};

}  // namespace pyflowgen::PYFLOWGEN_ISA::formula
