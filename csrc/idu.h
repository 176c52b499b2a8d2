// idu: Information Discrimination Unit over windows of chunks; the contract between the adapter that knows tensors and
// the kernels that do not. T is float or double; matrices are row-major and dense. A window's chunks are oldest first.
//
// Every sum over the hidden units is formed in one order, whatever the rows and however the columns are split: a window
// gets the bits it would get alone.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace pyflowgen {

// Window w of sequence b is row b * windows + w, its steps are the chunks w .. w + window - 1 of that sequence.
struct IduShape {
  int64_t batch, windows, chunks, window, hidden;
  const int64_t* length;    // [rows]: how many chunks of a window there are, its last ones; null: all
  bool after, hard, keeps;  // reset after the product; hard sigmoid; z keeps the old state
  int64_t rows() const { return batch * windows; }
  int64_t first(int64_t row) const {
    const int64_t n = length ? length[row] : window;
    return n < 0 ? window : n > window ? 0 : window - n;
  }
  int64_t chunk(int64_t row, int64_t t) const { return row / windows * chunks + row % windows + t; }
};

template <class T> struct IduForward {
  IduShape shape;
  const T* given;      // [batch][chunks][2][hidden]: W_xz x, W_xh x
  const T* current;    // [rows][2][hidden]: W_0r x_0 + b_r, W_0z x_0 + b_z
  const T *b_x, *b_h;  // [hidden] or null
  const T *w_r, *w_h;  // W_hr and W_hh as linear_pack makes them
  T* states;  // kept: [window + 1][rows][hidden], the state before each step; else [2][rows][hidden], even and odd
              // steps
  T* inner;   // r h, the input of W_hh; or W_hh h + b_h when `after`. kept: [window][rows][hidden]; else [rows][hidden]
  T* gates;   // [window][rows][3][hidden]: r, z as formula/idu.h keeps them, n; null: nothing is kept
  // [1, when `after` 2][rows][hidden]: what this phase's products gave, if they were made elsewhere; w_r and w_h are
  // not read then.
  const T* sums = nullptr;
};

template <class T> struct IduBackward {
  IduShape shape;
  const T* states;  // as kept by the forward pass
  const T* inner;
  const T* gates;
  const T *w_r, *w_h;  // W_hr and W_hh packed by idu_pack_backward
  T* dh;               // [rows][hidden]: gradient of the last states; of those before each step, on the way
  T* dr;               // [window][rows][hidden], gradients of the gates' arguments and of the candidate's
  T* dz;
  T* dn;
  T* dinner;  // of W_hh's product: dn itself, or r dn when `after`
};

// Gradients of given and current: dz and dn of all windows that have a chunk, dr and dz of all steps of a window.
template <class T> struct IduCollect {
  IduShape shape;
  int64_t cached;  // chunks of `given` that come first and are dcached's
  const T *dr, *dz, *dn;
  const T* dgiven_more;  // [batch][chunks][2][hidden] or null: what given's gradient has from elsewhere
  T* dcached;            // [batch][cached][2][hidden]
  T* dgiven;             // [batch][chunks - cached][2][hidden]
  T* dcurrent;           // [rows][2][hidden]
};

// clang-format off
PYFLOWGEN_PER_ISA(
  // Phase `phase` of step t for panels begin <= p < end of the hidden units and rows first <= r < last. Phases: one
  // when `after`, else two; each needs all panels of the one before. No product at step `start`: all states are 0.
  template <class T> void idu_forward(const IduForward<T>&, int64_t phase, int64_t t, int64_t start, int64_t begin, int64_t end, int64_t first, int64_t last);
  // Backward, in three phases.
  template <class T> void idu_backward(const IduBackward<T>&, int64_t phase, int64_t t, int64_t start, int64_t begin, int64_t end, int64_t first, int64_t last);
  template <class T> void idu_pack_backward(int64_t hidden, const T* weight, T* panels, int64_t begin, int64_t end);
  // Sequences begin <= b < end.
  template <class T> void idu_collect(const IduCollect<T>&, int64_t begin, int64_t end);
)
// clang-format on

}  // namespace pyflowgen
