// Products of a stream's step on weights as short as asked for, and an LSTM cell's gates with them: what a step of trn
// and of idu is made of. T is float or double.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "storage.h"

namespace pyflowgen {

// y = f(start + sum over parts of W_p a_p), W_p as recurrence.h stores weights, in blocks of four vectors of rows: a
// cell's block holds one vector of units with their four gates, any other the next 4 * lanes rows. A block is its parts
// [depth][4][unit], start [4][unit] (T) and, for int8, scales and offsets [part][4][unit].
inline constexpr int stream_parts = 3;
inline constexpr int stream_block_rows = 64;  // at most

template <class T> struct StreamWeights {
  bool cell;
  int64_t units;                  // rows of y; the matrices of a cell have four times as many, gate by gate
  int64_t depth[stream_parts];    // 0: there is no such part
  const T* weight[stream_parts];  // [rows][depth], rows weight_row apart
  int64_t weight_row[stream_parts];
  const T* bias;  // [rows]
};

template <class T> struct StreamProduct {
  bool cell, relu;
  int64_t rows, units;
  int64_t depth[stream_parts];
  const T* in[stream_parts];  // [rows][depth]; null: zeros, whose weights are not read
  const void* packed;         // by trn_pack
  T* y;                       // [rows][units]: the sums, after relu if asked for; of a cell: h
  const T* c;                 // [rows][units], a cell's before
  T* c_next;                  // [rows][units], a cell's after; may be c
};

// clang-format off
PYFLOWGEN_PER_ISA(
  // Blocks, bytes of a packed weight with storage W, and the task of packing one block; scratch of stream_block_rows times
  // the largest depth for each thread.
  template <class T> int64_t stream_blocks(bool cell, int64_t units);
  template <class T, class W> int64_t stream_packed_bytes(const StreamWeights<T>&);
  template <class T, class W> void stream_pack(const StreamWeights<T>&, void* packed, T* scratch, int64_t begin, int64_t end);
  // Blocks begin <= b < end for all rows, each row the same bits whatever the others are.
  // scratch: stream_scratch_bytes for each thread, to which stream_inputs has been.
  template <class T, class W> int64_t stream_scratch_bytes(int64_t rows, int64_t depth);
  template <class T, class W> void stream_inputs(const StreamProduct<T>&, void* scratch);
  template <class T, class W> void stream_product(const StreamProduct<T>&, int64_t begin, int64_t end, const void* scratch);
)
// clang-format on

}  // namespace pyflowgen
