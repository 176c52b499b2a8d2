// The loops of packed_row.h.
#include "packed_row.h"

#include "cpu/row_of_panels.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

template <int count, class T> PYFLOWGEN_INLINE void put_panels(int64_t in, int64_t out, const T* x, const T* panels,
                                                               const T* bias, bool relu, T* y, int64_t panel) {
  constexpr int width = tile_columns<T>, side = lanes<T>;
  const T* lines[count];
#pragma GCC unroll 4
  for (int p = 0; p < count; ++p) lines[p] = panels + (panel + p) * in * width;
  Pack<T> sums[count][2];
  row_of_panels<count>(in, x, lines, sums);
  for (int p = 0; p < count; ++p)
    for (int half = 0; half < 2; ++half) {
      const int64_t n = (panel + p) * width + half * side;
      const int left = int(std::min<int64_t>(side, out - n));
      if (left <= 0) continue;
      Pack<T> z = sums[p][half];
      if (bias) z += load_first<T>(bias + n, left);
      store_first<T>(y + n, relu ? (z < 0 ? Pack<T>{} : z) : z, left);
    }
}

}  // namespace

template <class T> int64_t packed_row_panels(int64_t out) { return gemm_panels<T>(out); }

template <class T> void packed_row(int64_t in, int64_t out, const T* x, const T* panels, const T* bias, bool relu, T* y,
                                   int64_t begin, int64_t end) {
  int64_t p = begin;
  for (; p + row_panels <= end; p += row_panels) put_panels<row_panels>(in, out, x, panels, bias, relu, y, p);
  for (; p < end; ++p) put_panels<1>(in, out, x, panels, bias, relu, y, p);
}

#define PYFLOWGEN_PACKED_ROW(T) \
  template int64_t packed_row_panels<T>(int64_t); \
  template void packed_row<T>(int64_t, int64_t, const T*, const T*, const T*, bool, T*, int64_t, int64_t);
PYFLOWGEN_PACKED_ROW(float)
PYFLOWGEN_PACKED_ROW(double)

}  // namespace pyflowgen::PYFLOWGEN_ISA
