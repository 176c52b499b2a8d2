// Gated recurrence on CUDA: the contract between the adapters that know tensors and the kernels that do not. Cell is
// one of the tags of lstm.h and gru.h, T the storage type, A the type of sums; matrices are row-major and dense, gates
// in torch's order.
#pragma once

#include <cstdint>

#include "storage.h"

namespace pyflowgen::cuda {

// Step t has rows offsets[t] <= r < offsets[t + 1] of everything that is [rows], those of the first so many of the
// batch; offsets, on the device, is null where each step has the whole batch.
struct RecurrentSteps {
  int64_t batch, hidden, steps;
  const int64_t* offsets;
  bool reverse;
};

template <class T, class A> struct RecurrentForward {
  RecurrentSteps steps;
  const T* weight_hh;  // [gates * hidden][hidden]
  const T* bias_ih;    // [gates * hidden] or null
  const T* bias_hh;    // [gates * hidden] or null
  const T* h0;         // [batch][hidden]
  const T* c0;         // [batch][hidden]; null without a cell
  T* gates;            // [rows][gates * hidden]: x's product; replaced by the gates when `extra`
  T* extra;            // [rows][hidden]: the cells, or what b_n of formula/gru.h was; null: nothing is kept
  T* y;                // [rows][hidden]
  T* h_n;              // [batch][hidden]
  T* c_n;              // likewise
  A* cell;             // [batch][hidden], to work with
  unsigned* arrived;   // 0
};

template <class T, class A> struct RecurrentBackward {
  RecurrentSteps steps;
  const T* dy;     // [rows][hidden] or null
  const T* dh_n;   // [batch][hidden] or null
  const T* dc_n;   // likewise
  const T* gates;  // as kept by the forward pass
  const T* extra;  // likewise
  const T* y;
  const T* h0;
  const T* c0;
  const T* turned;    // [hidden][gates * hidden]: weight_hh transposed
  T* dgates;          // [rows][gates * hidden], of the arguments' x part
  T* dgates_h;        // likewise of the h part; the same where the two are
  T* before;          // [rows][hidden]: the hidden state each step started from
  T* dh0;             // [batch][hidden]
  T* dc0;             // likewise; null without a cell
  A* dh;              // [batch][hidden], to work with
  A* dc;              // likewise
  unsigned* arrived;  // 0
};

template <class Cell, class T, class A> void recurrent_forward(const RecurrentForward<T, A>&, void* stream);
template <class Cell, class T, class A> void recurrent_backward(const RecurrentBackward<T, A>&, void* stream);

}  // namespace pyflowgen::cuda
