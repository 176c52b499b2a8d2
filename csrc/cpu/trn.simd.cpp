// trn on the CPU: the cells, what relu and mean ask for between linear's products, and the products of a stream's step.
#include "trn.h"

#include "cpu/recurrence_loops.h"
#include "formula/lstm.h"
#include "lstm.h"

namespace pyflowgen::PYFLOWGEN_ISA {

template <class T> void trn_cell(const TrnCell<T>& o, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* gates = o.gates + row * 4 * o.hidden;
    const T* given = o.given ? o.given + row * 4 * o.hidden : nullptr;
    for (int64_t j = 0; j < o.hidden; j += lanes<T>) {
      const int count = int(std::min<int64_t>(lanes<T>, o.hidden - j));
      Pack<T> a[4];
      for (int gate = 0; gate < 4; ++gate) {
        a[gate] = load_first<T>(gates + gate * o.hidden + j, count);
        if (given) a[gate] += load_first<T>(given + gate * o.hidden + j, count);
      }
      const auto u = formula::lstm(a[0], a[1], a[2], a[3], load_first<T>(o.c + row * o.hidden + j, count));
      const Pack<T> values[4] = {u.i, u.f, u.g, u.o};
      for (int gate = 0; gate < 4; ++gate) store_first<T>(gates + gate * o.hidden + j, values[gate], count);
      store_first<T>(o.c_next + row * o.hidden + j, u.c, count);
      store_first<T>(o.h_next + row * o.hidden + j, u.h, count);
    }
  }
}

template <class T> void trn_cell_backward(const TrnCellBackward<T>& o, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t j = 0; j < o.hidden; j += lanes<T>) {
      const int count = int(std::min<int64_t>(lanes<T>, o.hidden - j));
      const int64_t at = row * o.hidden + j, gates = row * 4 * o.hidden + j;
      Pack<T> v[4];
      for (int gate = 0; gate < 4; ++gate) v[gate] = load_first<T>(o.gates + gates + gate * o.hidden, count);
      const auto d = formula::lstm_backward(v[0], v[1], v[2], v[3], load_first<T>(o.c_next + at, count),
                                            load_first<T>(o.c + at, count), load_first<T>(o.dh + at, count),
                                            load_first<T>(o.dc + at, count));
      const Pack<T> slopes[4] = {d.di, d.df, d.dg, d.d_o};
      for (int gate = 0; gate < 4; ++gate) store_first<T>(o.dgates + gates + gate * o.hidden, slopes[gate], count);
      store_first<T>(o.dc + at, d.before, count);
    }
}

template <class T> void trn_relu_backward(int64_t count, const T* y, const T* dy, T scale, T* dz) {
  for (int64_t i = 0; i < count; ++i) dz[i] = y[i] <= 0 ? T(0) : dy[i] * scale;
}

template <class T> void trn_add(int64_t count, T scale, const T* from, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += scale * from[i];
}

template <class T> void trn_mean(int64_t parts, int64_t count, const T* in, int64_t stride, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i];
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < count; ++i) out[i] += in[part * stride + i];
  for (int64_t i = 0; i < count; ++i) out[i] /= T(parts);
}

// ---- a stream's step ---------------------------------------------------------------------------------------------
namespace {

inline constexpr int vectors = 4;  // of a block: recurrence_loops.h takes them for a cell's gates
static_assert(Lstm::gates == vectors && !Lstm::split_gate);

// Where the pieces of one block are, in bytes from its beginning.
template <class T, class W> struct Piece {
  int64_t part[trn_parts], start, scale[trn_parts], size;
  PYFLOWGEN_INLINE explicit Piece(const int64_t (&depth)[trn_parts]) {
    int64_t at = 0;
    for (int p = 0; p < trn_parts; ++p) {
      part[p] = at;
      at += padded<W>(depth[p]) * vectors * lanes<T> * int64_t(sizeof(W));
    }
    start = at;
    at += vectors * vector_bytes;
    for (int p = 0; p < trn_parts; ++p) {
      scale[p] = at;
      at += std::is_same_v<W, int8_t> && depth[p] ? 2 * vectors * vector_bytes : 0;
    }
    size = at;
  }
};

template <class T> PYFLOWGEN_INLINE int64_t block_units(bool cell) { return cell ? lanes<T> : vectors * lanes<T>; }

// Inputs as bytes: row r of part p is at q[p] + r * depth, its scale at scale[p][r].
struct Bytes {
  uint8_t* q[trn_parts];
  float* scale[trn_parts];
};

template <class T, class W, int rows> [[gnu::noinline]] void product_rows(const TrnProduct<T>& o,
                                                                          const Piece<T, W>& place, int64_t block,
                                                                          int64_t row, const Bytes& bytes) {
  const char* base = static_cast<const char*>(o.packed) + block * place.size;
  const T* start = reinterpret_cast<const T*>(base + place.start);
  Pack<T> sum[rows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = load<T>(start + v * lanes<T>);
  for (int p = 0; p < trn_parts; ++p) {
    if (!o.in[p]) continue;
    const W* panel = reinterpret_cast<const W*>(base + place.part[p]);
    if constexpr (std::is_same_v<W, int8_t>) {
      const float* scales = reinterpret_cast<const float*>(base + place.scale[p]);
      const int64_t q_row = padded<W>(o.depth[p]);
      accumulate_int8<Lstm, false, rows>(sum, o.depth[p], bytes.q[p] + row * q_row, q_row, bytes.scale[p] + row, panel,
                                         scales, reinterpret_cast<const int32_t*>(scales) + vectors * lanes<T>);
    } else {
      accumulate<Lstm, false, rows>(sum, o.depth[p], o.in[p] + row * o.depth[p], o.depth[p], panel);
    }
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

template <class T> int64_t trn_blocks(bool cell, int64_t units) { return ceil_div(units, block_units<T>(cell)); }

template <class T, class W> int64_t trn_packed_bytes(const TrnWeights<T>& o) {
  return Piece<T, W>(o.depth).size * trn_blocks<T>(o.cell, o.units);
}

template <class T, class W>
void trn_pack(const TrnWeights<T>& o, void* packed, T* scratch, int64_t begin, int64_t end) {
  constexpr int side = lanes<T>;
  static_assert(vectors * side <= trn_block_rows);
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
    for (int p = 0; p < trn_parts; ++p) {
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

template <class T, class W> int64_t trn_scratch_bytes(int64_t rows, int64_t depth) {
  // quantize writes whole vectors: room for one after each part.
  return std::is_same_v<W, int8_t>
             ? rows * (padded<W>(depth) + trn_parts * (4 + int64_t(sizeof(float)))) + trn_parts * vector_bytes
             : 0;
}

template <class T, class W> void trn_product(const TrnProduct<T>& o, int64_t begin, int64_t end, void* scratch) {
  const Piece<T, W> place(o.depth);
  Bytes bytes{};
  if constexpr (std::is_same_v<W, int8_t>) {
    float* scale = static_cast<float*>(scratch);
    uint8_t* q = reinterpret_cast<uint8_t*>(scale + trn_parts * o.rows);
    for (int p = 0; p < trn_parts; ++p) {
      bytes.q[p] = q, bytes.scale[p] = scale;
      if (!o.in[p]) continue;
      const int64_t q_row = padded<W>(o.depth[p]);
      for (int64_t r = 0; r < o.rows; ++r) scale[r] = quantize(o.depth[p], o.in[p] + r * o.depth[p], q + r * q_row);
      q += o.rows * q_row + vector_bytes, scale += o.rows;
    }
  }
  const int64_t tiles = ceil_div(o.rows, step_rows);
  for (int64_t block = begin; block < end; ++block)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = part_start(o.rows, tiles, t);
      with_rows(int(part_start(o.rows, tiles, t + 1) - row),
                [&](auto rows) { product_rows<T, W, decltype(rows)::value>(o, place, block, row, bytes); });
    }
}

#define PYFLOWGEN_TRN_STEP(T, W) \
  template int64_t trn_packed_bytes<T, W>(const TrnWeights<T>&); \
  template void trn_pack<T, W>(const TrnWeights<T>&, void*, T*, int64_t, int64_t); \
  template int64_t trn_scratch_bytes<T, W>(int64_t, int64_t); \
  template void trn_product<T, W>(const TrnProduct<T>&, int64_t, int64_t, void*);
PYFLOWGEN_TRN_STEP(float, float)
PYFLOWGEN_TRN_STEP(float, bf16)
PYFLOWGEN_TRN_STEP(float, int8_t)
PYFLOWGEN_TRN_STEP(double, double)

#define PYFLOWGEN_TRN(T) \
  template int64_t trn_blocks<T>(bool, int64_t); \
  template void trn_cell<T>(const TrnCell<T>&, int64_t, int64_t); \
  template void trn_cell_backward<T>(const TrnCellBackward<T>&, int64_t, int64_t); \
  template void trn_relu_backward<T>(int64_t, const T*, const T*, T, T*); \
  template void trn_add<T>(int64_t, T, const T*, T*); \
  template void trn_mean<T>(int64_t, int64_t, const T*, int64_t, T*);
PYFLOWGEN_TRN(float)
PYFLOWGEN_TRN(double)

}  // namespace pyflowgen::PYFLOWGEN_ISA
