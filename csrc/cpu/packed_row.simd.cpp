// The loops of packed_row.h.
#include "packed_row.h"

#include "cpu/row_of_panels.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

template <int count, class T> PYFLOWGEN_INLINE void put_panels(const PackedRows<T>& o, int64_t panel) {
  constexpr int width = tile_columns<T>, side = lanes<T>;
  const T* lines[count];
#pragma GCC unroll 4
  for (int p = 0; p < count; ++p) lines[p] = o.panels + ((panel + p) * o.in + o.skip) * width;
  Pack<T> sums[count][2];
  row_of_panels<count>(o.in - o.skip, o.x + o.skip, lines, sums);
  for (int p = 0; p < count; ++p)
    for (int half = 0; half < 2; ++half) {
      const int64_t n = (panel + p) * width + half * side;
      const int left = int(std::min<int64_t>(side, o.out - n));
      if (left <= 0) continue;
      Pack<T> z = sums[p][half];
      if (o.bias) z += load_first<T>(o.bias + n, left);
      store_first<T>(o.y + n, o.relu ? (z < 0 ? Pack<T>{} : z) : z, left);
    }
}

// Columns from `from` on of y = C + bias, after relu if asked for.
template <class T> struct Put {
  const PackedRows<T>& o;
  int64_t from;
  PYFLOWGEN_INLINE void operator()(int64_t m, int64_t n, Pack<T> v, int count) const {
    n += from;
    if (o.bias) v += load_first<T>(o.bias + n, count);
    store_first<T>(o.y + m * o.out + n, o.relu ? (v < 0 ? Pack<T>{} : v) : v, count);
  }
  PYFLOWGEN_INLINE Target<T> target(int64_t m, int64_t n) const {
    n += from;
    return {o.y + m * o.out + n, o.out, o.bias ? o.bias + n : nullptr, 0, o.relu ? Finish::add_relu : Finish::add};
  }
};

template <class T> PYFLOWGEN_INLINE GemmPlan rows_plan(const PackedRows<T>& o) {
  return gemm_plan<T>(o.rows, o.out - o.first * tile_columns<T>, o.in - o.skip, o.threads);
}

}  // namespace

template <class T> int64_t packed_row_panels(int64_t out) { return gemm_panels<T>(out); }
template <class T> int64_t packed_panel_width() { return tile_columns<T>; }

template <class T> int64_t packed_rows_tasks(const PackedRows<T>& o) {
  return o.rows == 1 ? gemm_panels<T>(o.out) - o.first : rows_plan(o).tasks();
}

template <class T> void packed_rows(const PackedRows<T>& o, int64_t begin, int64_t end) {
  if (o.rows == 1) {
    int64_t p = o.first + begin;
    for (; p + row_panels <= o.first + end; p += row_panels) put_panels<row_panels>(o, p);
    for (; p < o.first + end; ++p) put_panels<1>(o, p);
    return;
  }
  constexpr int64_t width = tile_columns<T>;
  gemm<T>(rows_plan(o), o.x + o.skip, o.in, 1, PackedPanels<T>{o.panels + (o.first * o.in + o.skip) * width, o.in},
          begin, end, Put<T>{o, o.first * width});
}

#define PYFLOWGEN_PACKED_ROW(T) \
  template int64_t packed_row_panels<T>(int64_t); \
  template int64_t packed_panel_width<T>(); \
  template int64_t packed_rows_tasks<T>(const PackedRows<T>&); \
  template void packed_rows<T>(const PackedRows<T>&, int64_t, int64_t);
PYFLOWGEN_PACKED_ROW(float)
PYFLOWGEN_PACKED_ROW(double)

}  // namespace pyflowgen::PYFLOWGEN_ISA
