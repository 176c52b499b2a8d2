// Tensors as the rows of a matrix. LibTorch stable ABI only.
#pragma once

#include "cpu/dense.h"

namespace pyflowgen {

// The rows of x as [batch][in]: how many, and how far apart; x itself unless its layout forbids that.
struct Rows {
  Tensor x;
  int64_t count, stride;
};
inline Rows rows_of(const Tensor& x, int64_t in) {
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= in) return {x, x.size(0), x.stride(0)};
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) count *= x.size(i);
  return {x.is_contiguous() ? x : torch::stable::contiguous(x), count, in};
}

}  // namespace pyflowgen
