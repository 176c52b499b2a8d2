// Rows times a matrix that linear_pack packed, where linear's kernel does too much: one row, which waits for memory
// alone, and rows whose first inputs are zero, or whose first results nobody asks for.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace pyflowgen {
template <class T> struct PackedRows {
  int64_t rows, in, out, threads;
  int64_t skip;   // inputs before it are zero
  int64_t first;  // panels of y's columns before it are not written
  const T* x;     // [rows][in]
  const T* panels;
  const T* bias;  // [out] or null
  bool relu;
  T* y;  // [rows][out] = relu or none of (x matrix^T + bias)
};

// clang-format off
PYFLOWGEN_PER_ISA(
  template <class T> int64_t packed_row_panels(int64_t out);
  template <class T> int64_t packed_panel_width();
  // The tasks of one row are its panels.
  template <class T> int64_t packed_rows_tasks(const PackedRows<T>&);
  template <class T> void packed_rows(const PackedRows<T>&, int64_t begin, int64_t end);
)
// clang-format on
}  // namespace pyflowgen
