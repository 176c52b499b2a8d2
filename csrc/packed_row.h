// One row times a matrix that linear_pack packed: linear's kernel where it waits for memory alone.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace pyflowgen {
// clang-format off
PYFLOWGEN_PER_ISA(
  // y[out] = relu or none of (x[in] matrix^T + bias) for panels begin <= p < end of the matrix.
  template <class T> int64_t packed_row_panels(int64_t out);
  template <class T> void packed_row(int64_t in, int64_t out, const T* x, const T* panels, const T* bias, bool relu, T* y, int64_t begin, int64_t end);
)
// clang-format on
}  // namespace pyflowgen
