// A square of packs turned over its diagonal. Included only from *.simd.cpp, as simd.h.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace pyflowgen::PYFLOWGEN_ISA {

// Transpose of lanes x lanes elements by exchanging ever larger blocks across the diagonal.
template <class T, int step = 1> PYFLOWGEN_INLINE void transpose(Pack<T> (&v)[lanes<T>]) {
  if constexpr (step < lanes<T>) {
    using Index = Pack<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
    Index low, high;
    for (int i = 0; i < lanes<T>; ++i) {
      low[i] = i & step ? lanes<T> + i - step : i;
      high[i] = i & step ? lanes<T> + i : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i)
      if (!(i & step)) {
        const Pack<T> a = v[i], b = v[i | step];
        v[i] = __builtin_shuffle(a, b, low);
        v[i | step] = __builtin_shuffle(a, b, high);
      }
    transpose<T, 2 * step>(v);
  }
}

}  // namespace pyflowgen::PYFLOWGEN_ISA
