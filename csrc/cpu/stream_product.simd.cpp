// The products of a stream's step.
#include "stream_product.h"

#include "cpu/recurrence_loops.h"
#include "formula/lstm.h"
#include "lstm.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

inline constexpr int vectors = 4;  // of a block: recurrence_loops.h takes them for a cell's gates
static_assert(Lstm::gates == vectors && !Lstm::split_gate);

// Where the pieces of one block are, in bytes from its beginning.
template <class T, class W> struct Piece {
  int64_t part[stream_parts], start, scale[stream_parts], size;
  PYFLOWGEN_INLINE explicit Piece(const int64_t (&depth)[stream_parts]) {
    int64_t at = 0;
    for (int p = 0; p < stream_parts; ++p) {
      part[p] = at;
      at += padded<W>(depth[p]) * vectors * lanes<T> * int64_t(sizeof(W));
    }
    start = at;
    at += vectors * vector_bytes;
    for (int p = 0; p < stream_parts; ++p) {
      scale[p] = at;
      at += std::is_same_v<W, int8_t> && depth[p] ? 2 * vectors * vector_bytes : 0;
    }
    size = at;
  }
};

template <class T> PYFLOWGEN_INLINE int64_t block_units(bool cell) { return cell ? lanes<T> : vectors * lanes<T>; }

// Inputs as W takes them: row r of part p is at q[p] + r * input_bytes, its scale at scale[p][r].
struct Inputs {
  uint8_t* q[stream_parts];
  float* scale[stream_parts];
};
template <class T, class W> PYFLOWGEN_INLINE Inputs inputs(const StreamProduct<T>& o, void* scratch) {
  Inputs at{};
  if (!changes_inputs<W>()) return at;
  float* scale = static_cast<float*>(scratch);
  uint8_t* q = reinterpret_cast<uint8_t*>(scale + stream_parts * o.rows);
  for (int p = 0; p < stream_parts; ++p) {
    at.q[p] = q, at.scale[p] = scale;
    if (o.in[p]) q += o.rows * input_bytes<W>(o.depth[p]) + vector_bytes, scale += o.rows;
  }
  return at;
}

template <class T, class W, int rows> [[gnu::noinline]] void product_rows(const StreamProduct<T>& o,
                                                                          const Piece<T, W>& place, int64_t block,
                                                                          int64_t row, const Inputs& given) {
  const char* base = static_cast<const char*>(o.packed) + block * place.size;
  const T* start = reinterpret_cast<const T*>(base + place.start);
  Pack<T> sum[rows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = load<T>(start + v * lanes<T>);
  for (int p = 0; p < stream_parts; ++p) {
    if (!o.in[p]) continue;
    const W* panel = reinterpret_cast<const W*>(base + place.part[p]);
    const float* scales = reinterpret_cast<const float*>(base + place.scale[p]);
    const int64_t q_row = input_bytes<W>(o.depth[p]);
    accumulate_part<Lstm, false, rows, T, W>(sum, o.depth[p], o.in[p] + row * o.depth[p], given.q[p] + row * q_row,
                                             q_row, given.scale[p] + row, panel, scales,
                                             reinterpret_cast<const int32_t*>(scales) + vectors * lanes<T>);
  }
  const int64_t unit = block * block_units<T>(o.cell);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * o.units + unit;
    if (o.cell) {
      const int count = int(std::min<int64_t>(lanes<T>, o.units - unit));
      const auto u = formula::lstm(sum[r][0], sum[r][1], sum[r][2], sum[r][3], load_first<T>(o.c + at, count));
      store_first<T>(o.c_next + at, u.c, count);
      store_first<T>(o.y + at, u.h, count);
      continue;
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int count = int(std::min<int64_t>(lanes<T>, o.units - unit - v * lanes<T>));
      if (count <= 0) break;
      const Pack<T> z = sum[r][v];
      store_first<T>(o.y + at + v * lanes<T>, o.relu ? (z < 0 ? Pack<T>{} : z) : z, count);
    }
  }
}

}  // namespace

template <class T> int64_t stream_blocks(bool cell, int64_t units) { return ceil_div(units, block_units<T>(cell)); }

template <class T, class W> int64_t stream_packed_bytes(const StreamWeights<T>& o) {
  return Piece<T, W>(o.depth).size * stream_blocks<T>(o.cell, o.units);
}

template <class T, class W>
void stream_pack(const StreamWeights<T>& o, void* packed, T* scratch, int64_t begin, int64_t end) {
  constexpr int side = lanes<T>;
  static_assert(vectors * side <= stream_block_rows);
  const Piece<T, W> place(o.depth);
  for (int64_t block = begin; block < end; ++block) {
    char* base = static_cast<char*>(packed) + block * place.size;
    // f(i, row): vector i / side of the block has this row of the matrices in lane i % side.
    const auto each_row = [&](const auto& f) {
      for (int i = 0; i < vectors * side; ++i) {
        const int64_t unit = block * block_units<T>(o.cell) + (o.cell ? i % side : i);
        if (unit < o.units) f(i, o.cell ? i / side * o.units + unit : unit);
      }
    };
    T* start = reinterpret_cast<T*>(base + place.start);
    std::fill_n(start, vectors * side, T(0));
    each_row([&](int i, int64_t row) { start[i] = o.bias[row]; });
    for (int p = 0; p < stream_parts; ++p) {
      const int64_t depth = o.depth[p];
      if (!depth) continue;
      std::fill_n(scratch, vectors * side * depth, T(0));
      each_row(
          [&](int i, int64_t row) { std::copy_n(o.weight[p] + row * o.weight_row[p], depth, scratch + i * depth); });
      W* panel = reinterpret_cast<W*>(base + place.part[p]);
      if constexpr (std::is_same_v<W, int8_t>) {
        float* scales = reinterpret_cast<float*>(base + place.scale[p]);
        pack_part(vectors, side, depth, side, scratch, panel, scales,
                  reinterpret_cast<int32_t*>(scales) + vectors * side);
      } else {
        pack_part(vectors, side, depth, side, scratch, panel);
      }
    }
  }
}

template <class T, class W> int64_t stream_scratch_bytes(int64_t rows, int64_t depth) {
  // Room for a vector after each part, and what padding adds to its rows.
  return changes_inputs<W>() ? rows * (input_bytes<W>(depth) + stream_parts * (16 + int64_t(sizeof(float)))) +
                                   stream_parts * vector_bytes
                             : 0;
}

template <class T, class W> void stream_inputs(const StreamProduct<T>& o, void* scratch) {
  if constexpr (!std::is_same_v<W, T>) {
    if (!changes_inputs<W>()) return;
    const Inputs at = inputs<T, W>(o, scratch);
    for (int p = 0; p < stream_parts; ++p) {
      if (!o.in[p]) continue;
      const int64_t q_row = input_bytes<W>(o.depth[p]);
      for (int64_t r = 0; r < o.rows; ++r)
        at.scale[p][r] = change_input<W>(o.depth[p], o.in[p] + r * o.depth[p], at.q[p] + r * q_row);
    }
  }
}

template <class T, class W>
void stream_product(const StreamProduct<T>& o, int64_t begin, int64_t end, const void* scratch) {
  const Piece<T, W> place(o.depth);
  const Inputs at = inputs<T, W>(o, const_cast<void*>(scratch));
  const int64_t tiles = ceil_div(o.rows, rows_at_once<W>());
  for (int64_t block = begin; block < end; ++block)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = part_start(o.rows, tiles, t);
      with_rows(int(part_start(o.rows, tiles, t + 1) - row),
                [&](auto rows) { product_rows<T, W, decltype(rows)::value>(o, place, block, row, at); });
    }
}

#define PYFLOWGEN_STREAM(T, W) \
  template int64_t stream_packed_bytes<T, W>(const StreamWeights<T>&); \
  template void stream_pack<T, W>(const StreamWeights<T>&, void*, T*, int64_t, int64_t); \
  template int64_t stream_scratch_bytes<T, W>(int64_t, int64_t); \
  template void stream_inputs<T, W>(const StreamProduct<T>&, void*); \
  template void stream_product<T, W>(const StreamProduct<T>&, int64_t, int64_t, const void*);
PYFLOWGEN_STREAM(float, float)
PYFLOWGEN_STREAM(float, bf16)
PYFLOWGEN_STREAM(float, int8_t)
PYFLOWGEN_STREAM(double, double)
template int64_t stream_blocks<float>(bool, int64_t);
template int64_t stream_blocks<double>(bool, int64_t);

}  // namespace pyflowgen::PYFLOWGEN_ISA
