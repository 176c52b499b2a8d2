// trn: Temporal Recurrent Network over a clip; the contract between the adapter that knows tensors and the kernels that
// do not. T is float or double; matrices are row-major and dense. Products are linear's kernels; here is what lies
// between them. Gates in torch's order i, f, g, o.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

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

// clang-format off
PYFLOWGEN_PER_ISA(
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
