// A square of packs turned over its diagonal. Included only from *.simd.cpp, as simd.h.
#pragma once

#include "cpu/simd.h"

namespace pyflowgen::PYFLOWGEN_ISA {

// Transpose of lanes x lanes elements, of whole registers or of their halves, by exchanging ever larger blocks across
// the diagonal.
template <int step = 1, class V, int lanes> PYFLOWGEN_INLINE void transpose(V (&v)[lanes]) {
  static_assert(sizeof(V) == lanes * sizeof(v[0][0]));
  if constexpr (step < lanes) {
    decltype(v[0] < v[0]) low, high;
    for (int i = 0; i < lanes; ++i) {
      low[i] = i & step ? lanes + i - step : i;
      high[i] = i & step ? lanes + i : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (!(i & step)) {
        const V a = v[i], b = v[i | step];
        v[i] = __builtin_shuffle(a, b, low);
        v[i | step] = __builtin_shuffle(a, b, high);
      }
    transpose<2 * step>(v);
  }
}

}  // namespace pyflowgen::PYFLOWGEN_ISA
