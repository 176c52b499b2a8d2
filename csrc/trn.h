// trn: Temporal Recurrent Network over a clip; the contract between the adapter that knows tensors and the kernels that
// do not. T is float or double; matrices are row-major and dense. Products are linear's kernels; here is what lies
// between them. Gates in torch's order i, f, g, o.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "storage.h"

namespace pyflowgen {

template <class T> struct TrnCell {
  int64_t rows, hidden;
  T* gates;        // [rows][4 * hidden]: arguments, or a part of them; the gates' values after
  const T* given;  // [rows][4 * hidden], the other part, or null
  const T* c;      // [rows][hidden]
  T* c_next;       // [rows][hidden]
  T* h_next;       // [rows][hidden]
};

template <class T> struct TrnCellBackward {
  int64_t rows, hidden;
  const T* gates;   // [rows][4 * hidden], values
  const T* c;       // [rows][hidden], before the step
  const T* c_next;  // [rows][hidden], after it
  const T* dh;      // [rows][hidden] of the state after
  T* dc;            // [rows][hidden] of the cell after; of the cell before, when done
  T* dgates;        // [rows][4 * hidden], of the arguments
};

// A stream's step: y = f(start + sum over parts of W_p a_p), W_p as recurrence.h stores weights, in blocks of four
// vectors of rows: a cell's block holds one vector of units with their four gates, any other the next 4 * lanes rows.
// A block is its parts [depth][4][unit], start [4][unit] (T) and, for int8, scales and offsets [part][4][unit].
inline constexpr int trn_parts = 3;
inline constexpr int trn_block_rows = 64;  // at most

template <class T> struct TrnWeights {
  bool cell;
  int64_t units;               // rows of y; the matrices of a cell have four times as many, gate by gate
  int64_t depth[trn_parts];    // 0: there is no such part
  const T* weight[trn_parts];  // [rows][depth], rows weight_row apart
  int64_t weight_row[trn_parts];
  const T* bias;  // [rows]
};

template <class T> struct TrnProduct {
  bool cell, relu;
  int64_t rows, units;
  int64_t depth[trn_parts];
  const T* in[trn_parts];  // [rows][depth]; null: zeros, whose weights are not read
  const void* packed;      // by trn_pack
  T* y;                    // [rows][units]: the sums, after relu if asked for; of a cell: h
  const T* c;              // [rows][units], a cell's before
  T* c_next;               // [rows][units], a cell's after; may be c
};

// clang-format off
PYFLOWGEN_PER_ISA(
  // Blocks, bytes of a packed weight with storage W, and the task of packing one block; scratch of trn_block_rows times
  // the largest depth for each thread.
  template <class T> int64_t trn_blocks(bool cell, int64_t units);
  template <class T, class W> int64_t trn_packed_bytes(const TrnWeights<T>&);
  template <class T, class W> void trn_pack(const TrnWeights<T>&, void* packed, T* scratch, int64_t begin, int64_t end);
  // Blocks begin <= b < end for all rows, each row the same bits whatever the others are.
  // scratch: trn_scratch_bytes for each thread.
  template <class T, class W> int64_t trn_scratch_bytes(int64_t rows, int64_t depth);
  template <class T, class W> void trn_product(const TrnProduct<T>&, int64_t begin, int64_t end, void* scratch);

  template <class T> void trn_cell(const TrnCell<T>&, int64_t begin, int64_t end);  // rows
  template <class T> void trn_cell_backward(const TrnCellBackward<T>&, int64_t begin, int64_t end);
  // dz[count] = y > 0 ? dy * scale : 0: through a relu whose result was y.
  template <class T> void trn_relu_backward(int64_t count, const T* y, const T* dy, T scale, T* dz);
  // to[count] += scale * from[count].
  template <class T> void trn_add(int64_t count, T scale, const T* from, T* to);
  // out[count] = mean of parts of in[parts][count], parts stride apart.
  template <class T> void trn_mean(int64_t parts, int64_t count, const T* in, int64_t stride, T* out);
)
// clang-format on

}  // namespace pyflowgen
