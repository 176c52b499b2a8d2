// One row times several panels of a packed matrix at once: their sums hide each other's latency, and their streams that
// of memory. No prefetching by hand: it costs a sixth of the rate that the processor's own reaches. Included only from
// *.simd.cpp.
#pragma once

#include "cpu/gemm.h"

namespace pyflowgen::PYFLOWGEN_ISA {

inline constexpr int row_panels = 4;  // so many at once

// sums[p] = x[depth] times the panel whose line for x[0] is at panels[p].
template <int count, class T> PYFLOWGEN_INLINE void row_of_panels(int64_t depth, const T* x,
                                                                  const T* const (&panels)[count],
                                                                  Pack<T> (&sums)[count][2]) {
  constexpr int width = tile_columns<T>, side = lanes<T>;
  Pack<T> sum[count][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Pack<T> v = broadcast<T>(x[k]);
#pragma GCC unroll 4
    for (int p = 0; p < count; ++p) {
      const T* line = panels[p] + k * width;
      sum[p][0] = fma(v, load<T>(line), sum[p][0]);
      sum[p][1] = fma(v, load<T>(line + side), sum[p][1]);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < count; ++p) sums[p][0] = sum[p][0], sums[p][1] = sum[p][1];
}

}  // namespace pyflowgen::PYFLOWGEN_ISA
