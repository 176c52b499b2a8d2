// A matrix as the adapters of recurrences multiply by it, packed beforehand or not. LibTorch stable ABI only.
#pragma once

#include "cpu/dense.h"
#include "linear.h"
#include "packed_row.h"

namespace pyflowgen {

// y = activation(x matrix^T + bias); the rows of x may be x_stride apart.
template <class T> struct Packed {
  int64_t out_features, in;
  const T* panels;  // by linear_pack, or null: then `weight`, packed on the way
  const T* bias = nullptr;
  const T* weight = nullptr;
  void operator()(int64_t rows, const T* x, Activation activation, T* y, int64_t x_stride = 0) const {
    if (rows == 1 && panels) {
      const int64_t all = PYFLOWGEN_CALL(packed_row_panels<T>, out_features), threads = threads_for(in * out_features);
      return in_threads(threads, [&](int64_t i) {
        PYFLOWGEN_CALL(packed_row<T>, in, out_features, x, panels, bias, activation == Activation::relu, y,
                       all * i / threads, all * (i + 1) / threads);
      });
    }
    const LinearForward<T> o{rows,
                             in,
                             out_features,
                             threads_for(rows * in * out_features),
                             x,
                             x_stride ? x_stride : in,
                             weight,
                             panels,
                             bias,
                             activation,
                             y,
                             nullptr};
    const int64_t tasks = PYFLOWGEN_CALL(linear_tasks<T>, o);
    in_threads(o.threads,
               [&](int64_t i) { PYFLOWGEN_CALL(linear<T>, o, tasks * i / o.threads, tasks * (i + 1) / o.threads); });
  }
};

}  // namespace pyflowgen
