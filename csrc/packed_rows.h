// Rows times a matrix that linear_pack packed.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace pyflowgen {

// y = relu or none of (x matrix^T + bias), the matrix as linear_pack made it. linear's product, but one row has a loop
// of its own, which waits for memory alone, and what is known to be zero or not asked for is left out.
template <class T> struct PackedRows {
  int64_t rows, in, out, threads;
  int64_t skip;   // inputs before it are zero
  int64_t first;  // panels of y's columns before it are not written
  const T* x;     // [rows][in]
  int64_t x_stride;
  const T* panels;
  const T* bias;  // [out] or null
  bool relu;
  T* y;  // [rows][out]
};

// clang-format off
PYFLOWGEN_PER_ISA(
  template <class T> int64_t packed_panel_width();
  template <class T> int64_t packed_rows_tasks(const PackedRows<T>&);
  template <class T> void packed_rows(const PackedRows<T>&, int64_t begin, int64_t end);  // tasks
)
// clang-format on

}  // namespace pyflowgen
