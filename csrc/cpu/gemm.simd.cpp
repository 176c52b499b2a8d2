// The two inner loops of gemm.h: the register tile and the packing of a panel.
#include "cpu/gemm.h"

#include <utility>

#include "cpu/transpose.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

// From this depth on the tile's sums take longer than a line from memory.
constexpr int64_t prefetch_depth = 16;

// One instance per height, so that the accumulators are registers and not an array in memory.
template <class T, int rows, int vectors, bool row_major>
[[gnu::noinline]] void tile_of(int64_t depth, const T* a, int64_t stride, const T* b, const T* addend,
                               int64_t addend_row, T* out, int64_t out_row, Finish finish) {
  // What the end of the tile meets is asked for now: out and addend are often in memory, and the sums take long enough.
  if (depth >= prefetch_depth)
#pragma GCC unroll 14
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        __builtin_prefetch(out + m * out_row + v * lanes<T>, 1);
        if (addend_row) __builtin_prefetch(addend + m * addend_row + v * lanes<T>);
      }
  Pack<T> sum[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += tile_columns<T>) {
    Pack<T> bk[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) bk[v] = load<T>(b + v * lanes<T>);
#pragma GCC unroll 14
    for (int m = 0; m < rows; ++m) {
      const Pack<T> am = broadcast<T>(row_major ? a[m * stride + k] : a[k * stride + m]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[m][v] = fma(am, bk[v], sum[m][v]);
    }
  }
  const auto put = [&](auto finished) __attribute__((always_inline)) {
#pragma GCC unroll 14
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = v * lanes<T>;
        const Pack<T> given = addend ? load<T>(addend + m * addend_row + at) : Pack<T>{};
        store<T>(out + m * out_row + at, finished(sum[m][v], given));
      }
  };
  if (finish == Finish::add_relu)
    put([](Pack<T> c, Pack<T> given) {
      const Pack<T> z = given + c;
      return z < 0 ? Pack<T>{} : z;  // NaN stays
    });
  else if (finish == Finish::relu_backward) put([](Pack<T> c, Pack<T> y) { return y <= 0 ? Pack<T>{} : c; });
  else put([&](Pack<T> c, Pack<T> given) { return addend ? given + c : c; });  // -0 stays
}

template <class T, int vectors, bool row_major, int... rows, class... Args>
PYFLOWGEN_INLINE void dispatch(std::integer_sequence<int, rows...>, int n, Args... args) {
  using Tile = void (*)(Args...);
  static constexpr Tile tiles[] = {tile_of<T, rows + 1, vectors, row_major>...};
  tiles[n - 1](args...);
}

}  // namespace

template <class T> void gemm_tile(int rows, int columns, int64_t depth, const T* a, int64_t a_row, int64_t a_depth,
                                  const T* b, const T* addend, int64_t addend_row, T* out, int64_t out_row,
                                  Finish finish) {
  constexpr auto heights = std::make_integer_sequence<int, tile_rows<T>>();
  if (columns > lanes<T>) {
    if (a_depth == 1) dispatch<T, 2, true>(heights, rows, depth, a, a_row, b, addend, addend_row, out, out_row, finish);
    else dispatch<T, 2, false>(heights, rows, depth, a, a_depth, b, addend, addend_row, out, out_row, finish);
  } else {
    if (a_depth == 1) dispatch<T, 1, true>(heights, rows, depth, a, a_row, b, addend, addend_row, out, out_row, finish);
    else dispatch<T, 1, false>(heights, rows, depth, a, a_depth, b, addend, addend_row, out, out_row, finish);
  }
}

template <class T> void gemm_narrow_tile(int rows, int columns, int64_t depth, const T* a, int64_t a_row,
                                         const T (*b)[depth_block], bool accumulate, T* tile) {
  // So many rows that their sums, one for each row and column, make up whole vectors once added up.
  constexpr int side = lanes<T>, together = std::max(1, side / narrow_columns), sums = together * narrow_columns;
  static_assert(sums % side == 0);
  const int64_t whole = depth / side * side;
  for (int m = 0; m < rows; m += together) {
    const T* row[together];
#pragma GCC unroll 4
    for (int r = 0; r < together; ++r) row[r] = a + std::min(m + r, rows - 1) * a_row;  // past the end: the last again
    Pack<T> sum[sums] = {};
    const auto add = [&](int64_t k, auto load_row) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < together; ++r) {
        const Pack<T> am = load_row(row[r] + k);
#pragma GCC unroll 4
        for (int n = 0; n < narrow_columns; ++n)
          sum[r * narrow_columns + n] = fma(am, load<T>(b[n] + k), sum[r * narrow_columns + n]);
      }
    };
    for (int64_t k = 0; k < whole; k += side) add(k, [](const T* p) { return load<T>(p); });
    if (whole < depth) add(whole, [&](const T* p) { return load_first<T>(p, int(depth - whole)); });
    alignas(64) T total[sums];
#pragma GCC unroll 4
    for (int i = 0; i < sums; i += side) {
      Pack<T> v[side];
#pragma GCC unroll 16
      for (int j = 0; j < side; ++j) v[j] = sum[i + j];
      transpose(v);
#pragma GCC unroll 4
      for (int half = side / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int j = 0; j < half; ++j) v[j] += v[j + half];
      store<T>(total + i, v[0]);
    }
    for (int r = 0; r < together && m + r < rows; ++r)
      for (int n = 0; n < columns; ++n) {
        T& out = tile[(m + r) * tile_columns<T> + n];
        out = accumulate ? out + total[r * narrow_columns + n] : total[r * narrow_columns + n];
      }
  }
}

template <class T> void gemm_pack(int columns, int64_t depth, const T* b, int64_t b_depth, int64_t b_column, T* panel) {
  constexpr int width = tile_columns<T>, side = lanes<T>;
  if (b_column == 1) {
    for (int64_t k = 0; k < depth; ++k, b += b_depth, panel += width)
      if (columns == width) {
        store<T>(panel, load<T>(b));
        store<T>(panel + side, load<T>(b + side));
      } else {
        for (int n = 0; n < width; ++n) panel[n] = n < columns ? b[n] : T(0);
      }
    return;
  }
  for (int left = 0; left < width; left += side, panel += side) {
    const T* from = b + left * b_column;
    int64_t k = 0;
    if (columns >= left + side)
      for (; k + side <= depth; k += side) {
        Pack<T> v[side];
#pragma GCC unroll 16
        for (int n = 0; n < side; ++n) v[n] = load<T>(from + n * b_column + k);
        transpose(v);
#pragma GCC unroll 16
        for (int n = 0; n < side; ++n) store<T>(panel + (k + n) * width, v[n]);
      }
    for (; k < depth; ++k)
      for (int n = 0; n < side; ++n)
        panel[k * width + n] = left + n < columns ? from[n * b_column + k * b_depth] : T(0);
  }
}

#define INSTANTIATE(T) \
  template void gemm_tile<T>(int, int, int64_t, const T*, int64_t, int64_t, const T*, const T*, int64_t, T*, int64_t, \
                             Finish); \
  template void gemm_narrow_tile<T>(int, int, int64_t, const T*, int64_t, const T(*)[depth_block], bool, T*); \
  template void gemm_pack<T>(int, int64_t, const T*, int64_t, int64_t, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace pyflowgen::PYFLOWGEN_ISA
