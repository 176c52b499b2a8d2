// Small-batch matrix product C(m,n) = sum_k A(m,k) B(k,n) with an epilogue: the tile goes through a functor while it is
// still in L1, so bias, activation, coupling or gates cost no pass over memory of their own.
//
// Included only from *.simd.cpp. No threads, no allocation, no static data: the caller splits the plan's tasks
// between threads as it likes. Every element of C is summed over k in one fixed order, so results depend neither on
// that split nor on the number of rows.
//
// Layout. B is cut into panels of tile_columns<T> columns; a packed B is
//   panels[ceil(columns / tile_columns)][depth][tile_columns], columns past the last one zero.
// A task is one chunk of at most chunk_rows<T> rows times one group of at most group_panels panels. Within it, k goes
// in blocks of depth_block, so that this part of A and of a panel stays in cache while the register tile walks down
// them.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace pyflowgen::PYFLOWGEN_ISA {

// The first count elements at p, zeros after them; and the way back. Nothing past them is touched.
template <class T> PYFLOWGEN_INLINE Pack<T> load_first(const T* p, int count) {
  if (count == lanes<T>) return load<T>(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Pack<T>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  else return (Pack<T>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
#else
  T v[lanes<T>] = {};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return load<T>(v);
#endif
}
template <class T> PYFLOWGEN_INLINE void store_first(T* p, Pack<T> v, int count) {
  if (count == lanes<T>) return store<T>(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
  else _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
#else
  for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// Accumulators: 14 x 2 of 32 registers, or 6 x 2 of 16; the rest holds one row of B and one element of A.
template <class T> inline constexpr int tile_rows = vector_bytes == 64 ? 14 : 6;
template <class T> inline constexpr int tile_columns = 2 * lanes<T>;
template <class T> inline constexpr int chunk_rows = 8 * tile_rows<T>;
inline constexpr int depth_block = 256;
inline constexpr int group_panels = 4;

// What happens to a sum while it is in a register: something is added, and ReLU applied, or it is kept where ReLU let
// the value through that is given in the addend's place.
enum class Finish { add, add_relu, relu_backward };

// out[rows][out_row..] = finish(A[rows][depth] B[depth][tile_columns], addend[rows][addend_row..] or 0 when null);
// rows <= tile_rows.
//   A(m,k) = a[m * a_row + k * a_depth], where one of the strides is 1; b contiguous.
//   columns: how many of the tile are asked for; whole vectors of them are written. addend_row 0: one row for all.
template <class T> void gemm_tile(int rows, int columns, int64_t depth, const T* a, int64_t a_row, int64_t a_depth,
                                  const T* b, const T* addend, int64_t addend_row, T* out, int64_t out_row,
                                  Finish finish = Finish::add);

// The same for at most narrow_columns columns and row-major A: vectors run along k, not along the nearly empty panel.
// gemm_narrow_columns takes the columns out of a block of B, zeros after them.
inline constexpr int narrow_columns = 4;
template <class T> void gemm_narrow_tile(int rows, int columns, int64_t depth, const T* a, int64_t a_row,
                                         const T (*b)[depth_block], bool accumulate, T* tile);
template <class T> PYFLOWGEN_INLINE void gemm_narrow_columns(int columns, int64_t depth, const T* from, int64_t b_depth,
                                                             int64_t b_column, T (*b)[depth_block]) {
  const int64_t padded = (depth + lanes<T> - 1) / lanes<T> * lanes<T>;
  for (int n = 0; n < narrow_columns; ++n) {
    const int64_t count = n < columns ? depth : 0;
    for (int64_t k = 0; k < count; ++k) b[n][k] = from[k * b_depth + n * b_column];
    std::fill(b[n] + count, b[n] + padded, T(0));
  }
}

// panel[depth][tile_columns] = B(k,n) for n < columns, 0 for the others; B(k,n) = b[k * b_depth + n * b_column],
// where one of the strides is 1.
template <class T> void gemm_pack(int columns, int64_t depth, const T* b, int64_t b_depth, int64_t b_column, T* panel);

// B packed beforehand, in the layout above.
template <class T> struct PackedPanels {
  const T* panels;  // [ceil(columns / tile_columns)][depth][tile_columns]
  int64_t depth;
  PYFLOWGEN_INLINE const T* block(int64_t panel, int64_t k, int, int64_t, T*) const {
    return panels + (panel * depth + k) * tile_columns<T>;
  }
  PYFLOWGEN_INLINE void narrow(int64_t panel, int64_t k, int columns, int64_t part, T (*b)[depth_block]) const {
    gemm_narrow_columns<T>(columns, part, panels + (panel * depth + k) * tile_columns<T>, tile_columns<T>, 1, b);
  }
};

// B as it lies in memory, packed block by block on the way: a few percent dearer at full chunks.
template <class T> struct StridedMatrix {
  const T* b;
  int64_t b_depth, b_column;
  PYFLOWGEN_INLINE const T* block(int64_t panel, int64_t k, int columns, int64_t depth, T* buffer) const {
    gemm_pack<T>(columns, depth, b + k * b_depth + panel * tile_columns<T> * b_column, b_depth, b_column, buffer);
    return buffer;
  }
  PYFLOWGEN_INLINE void narrow(int64_t panel, int64_t k, int columns, int64_t part, T (*out)[depth_block]) const {
    const T* from = b + k * b_depth + panel * tile_columns<T> * b_column;
    gemm_narrow_columns<T>(columns, part, from, b_depth, b_column, out);
  }
};

PYFLOWGEN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T> PYFLOWGEN_INLINE int64_t gemm_panels(int64_t columns) { return ceil_div(columns, tile_columns<T>); }

// Start of part i when n things are cut into that many parts of nearly equal size.
PYFLOWGEN_INLINE int64_t part_start(int64_t n, int64_t parts, int64_t i) { return n * i / parts; }

// How C[rows][columns] is cut into tasks: chunks x groups, so small that every thread has some to do.
struct GemmPlan {
  int64_t rows, columns, depth;
  int64_t chunks, groups;
  int64_t tasks() const { return chunks * groups; }
};

template <class T> inline GemmPlan gemm_plan(int64_t rows, int64_t columns, int64_t depth, int64_t threads) {
  const int64_t panels = gemm_panels<T>(columns), tiles = ceil_div(rows, tile_rows<T>);
  GemmPlan plan{rows, columns, depth, ceil_div(rows, chunk_rows<T>), ceil_div(panels, group_panels)};
  if (plan.tasks() == 0) return plan;
  const int64_t wanted = threads > 1 ? 4 * threads : 1;
  if (plan.tasks() < wanted) plan.groups = std::min(panels, ceil_div(wanted, plan.chunks));
  if (plan.tasks() < wanted) plan.chunks = std::min(tiles, ceil_div(wanted, plan.groups));
  return plan;
}

// Whether the lines of A that one tile reads fall into so few sets of an 8-way L1, or so many pages, that they push
// each other out. Then a block of A is copied first, to lines of copy_stride (or chunk_rows) elements.
inline constexpr int copy_stride = depth_block + 16;
template <class T> PYFLOWGEN_INLINE bool gemm_copies(int64_t height, int64_t a_row, int64_t a_depth) {
  return a_depth == 1 ? height > 8 && a_row % (4096 / int64_t(sizeof(T))) == 0
                      : height > tile_rows<T> && a_depth >= 1024 / int64_t(sizeof(T));
}

template <class T> struct Target {
  T* out;
  int64_t out_row;
  const T* addend;         // or null
  int64_t addend_row = 0;  // 0: one row for all
  Finish finish = Finish::add;
};

// The epilogue on a finished tile, its first element being C(m, n).
template <class T, class Epilogue>
PYFLOWGEN_INLINE void finish(int64_t rows, int columns, const T* tile, int64_t m, int64_t n, const Epilogue& epilogue) {
  constexpr int width = tile_columns<T>, side = lanes<T>;
  if (columns == width)  // the constant count turns the partial stores of the epilogue into whole ones
    for (int64_t i = 0; i < rows; ++i, tile += width) {
      epilogue(m + i, n, load<T>(tile), side);
      epilogue(m + i, n + side, load<T>(tile + side), side);
    }
  else
    for (int64_t i = 0; i < rows; ++i, tile += width)
      for (int j = 0; j < columns; j += side) epilogue(m + i, n + j, load<T>(tile + j), std::min(columns - j, side));
}

// Tasks begin <= t < end of C[rows][columns] = A[rows][depth] B[depth][columns].
//   epilogue(m, n, v, count): v holds C(m, n .. n + count - 1) in its first count lanes; 1 <= count <= lanes<T>.
//   An epilogue that is no more than a Finish may also have target(m, n) -> Target of C(m, n): whole tiles are then
//   stored from the registers.
template <class T, class Matrix, class Epilogue> void gemm(const GemmPlan& plan, const T* a, int64_t a_row,
                                                           int64_t a_depth, const Matrix& b, int64_t begin, int64_t end,
                                                           const Epilogue& epilogue) {
  constexpr int width = tile_columns<T>;
  alignas(64) T tiles[group_panels][chunk_rows<T>][width];
  alignas(64) T buffer[depth_block * width];
  alignas(64) T copy[chunk_rows<T> * copy_stride];
  alignas(64) T columns[narrow_columns][depth_block];
  const int64_t panels = gemm_panels<T>(plan.columns);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / plan.groups, group = task % plan.groups;
    const int64_t first = part_start(plan.rows, plan.chunks, chunk);
    const int64_t height = part_start(plan.rows, plan.chunks, chunk + 1) - first;
    const int64_t from = part_start(panels, plan.groups, group), to = part_start(panels, plan.groups, group + 1);
    const int64_t steps = ceil_div(height, tile_rows<T>);
    const bool copies = gemm_copies<T>(height, a_row, a_depth);
    int64_t k = 0;
    do {  // once even when depth is 0: C becomes 0
      const int64_t part = std::min<int64_t>(depth_block, plan.depth - k);
      const bool last = k + depth_block >= plan.depth, only = plan.depth <= depth_block;
      const T* block_a = a + first * a_row + k * a_depth;
      int64_t row = a_row, step = a_depth;
      if (copies && a_depth == 1) {
        for (int64_t m = 0; m < height; ++m) std::copy_n(block_a + m * a_row, part, copy + m * copy_stride);
        row = copy_stride;
      } else if (copies) {
        for (int64_t i = 0; i < part; ++i) std::copy_n(block_a + i * a_depth, height, copy + i * chunk_rows<T>);
        step = chunk_rows<T>;
      }
      if (copies) block_a = copy;
      for (int64_t panel = from; panel < to; ++panel) {
        const int used = int(std::min<int64_t>(width, plan.columns - panel * width));
        const bool narrow = used <= narrow_columns && used < width && a_depth == 1 && plan.depth >= lanes<T>;
        const T* block_b = narrow ? nullptr : b.block(panel, k, used, part, buffer);
        if (narrow) b.narrow(panel, k, used, part, columns);
        for (int64_t t = 0; t < steps; ++t) {
          const int64_t m = part_start(height, steps, t), n = part_start(height, steps, t + 1) - m;
          if constexpr (requires { epilogue.target(0, 0); })
            if (only && used == width) {
              const auto [out, out_row, addend, addend_row, finish] = epilogue.target(first + m, panel * width);
              gemm_tile<T>(int(n), used, part, block_a + m * row, row, step, block_b, addend, addend_row, out, out_row,
                           finish);
              continue;
            }
          T* tile = only ? tiles[0][0] : tiles[panel - from][m];
          if (narrow) gemm_narrow_tile<T>(int(n), used, part, block_a + m * row, row, columns, k > 0, tile);
          else
            gemm_tile<T>(int(n), used, part, block_a + m * row, row, step, block_b, k ? tile : nullptr, width, tile,
                         width);
          if (last) finish<T>(n, used, tile, first + m, panel * width, epilogue);
        }
      }
      k += depth_block;
    } while (k < plan.depth);
  }
}

}  // namespace pyflowgen::PYFLOWGEN_ISA
