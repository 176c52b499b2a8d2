// Gated recurrence: the contract between the adapters that know tensors and the kernels that do not. Cell is one of the
// tags of lstm.h and gru.h; T is float or double; matrices are row-major and dense. Gates keep torch's order.
//
// Every sum runs over the inputs in one order that depends neither on how units and rows are split, nor on how many
// rows there are: a row of a batch gets the bits it would get alone.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "storage.h"

namespace pyflowgen {

// Weights as a step reads them, in one stream. Units go in blocks of as many as a vector of T has lanes; a block is
//   x part [in][gate][unit], h part [hidden][gate][unit], what the gates start from [4][unit] (T)
// with units past the last one zero. Weights may be T itself, bf16, or int8 with a scale for each row of each part.
// bf16 takes the inputs two by two and int8 four by four, padded with zeros: [inputs / 2][gate][unit][2]. After an
// int8 block's start values come [x part, h part][gate][unit] of float scales and of int32 128 * sum of the row.
template <class T> struct RecurrentWeights {
  int64_t in, hidden;
  const T* weight_ih;  // [gates * hidden][in]; null and in = 0: only the h part is wanted
  const T* weight_hh;  // [gates * hidden][hidden]
  const T* bias_ih;    // [gates * hidden] or null
  const T* bias_hh;    // [gates * hidden] or null
};

// One step of a stream, gates and all. int8 weights: inputs become 8-bit integers, one scale a row for x and one for h.
template <class T> struct RecurrentStep {
  int64_t batch, in, hidden;
  const T* x;          // [batch][in]
  const T* h;          // [batch][hidden]
  const T* c;          // [batch][hidden]; null without a cell
  const void* packed;  // by recurrent_pack
  T* h_next;           // [batch][hidden]
  T* c_next;           // [batch][hidden]; null without a cell
};

// Step t of a sequence has rows offsets[t] <= r < offsets[t + 1] of everything that is [rows]; they belong to the first
// so many of the batch. Backwards in time when `reverse`.
struct RecurrentShape {
  int64_t batch, hidden, steps;
  const int64_t* offsets;  // [steps + 1]
  bool reverse;
  int64_t rows(int64_t t) const { return t < 0 || t >= steps ? 0 : offsets[t + 1] - offsets[t]; }
  int64_t before(int64_t t) const { return reverse ? t + 1 : t - 1; }
};

template <class T> struct RecurrentForward {
  RecurrentShape shape;
  int64_t in;          // inputs of x that `packed` holds beside those of h
  const void* packed;  // by recurrent_pack, storage T
  const T* h0;         // [batch][hidden]
  T* gates;            // [rows][gates * hidden]: x's part of the arguments, replaced by the gates when `extra`
  T* extra;            // [rows][hidden]: the cells, or what b_n of formula/gru.h was; null: nothing is kept
  T* y;                // [rows][hidden]
  T* c;                // [batch][hidden]: the cell before the sequence, then after it; null without a cell
};

template <class T> struct RecurrentBackward {
  RecurrentShape shape;
  const T* dy;  // [rows][hidden] or null
  const T* gates;
  const T* extra;  // as kept by the forward pass
  const T* y;
  const T* h0;
  const T* c0;
  const T* panels;  // weight_hh as the panels of cpu/gemm.h
  T* dgates;        // [rows][gates * hidden], of the arguments' x part
  T* dgates_h;      // likewise of the h part; the same where the two are
  T* before;        // [rows][hidden]: the hidden state each step started from
  T* dh;            // [batch][hidden]: gradient of the last hidden states, then of h0
  T* dc;            // likewise; null without a cell
};

// clang-format off
PYFLOWGEN_PER_ISA(
  // Blocks of units, bytes of a packed weight with storage W, and the task of packing one block.
  template <class T> int64_t recurrent_blocks(int64_t hidden);
  template <class Cell, class T, class W> int64_t recurrent_packed_bytes(int64_t in, int64_t hidden);
  template <class Cell, class T, class W> void recurrent_pack(const RecurrentWeights<T>&, void* packed, int64_t begin, int64_t end);
  // Whether 16 elements spread over each weight are in `packed` (storage T) as they are in the weights.
  template <class Cell, class T> bool recurrent_pack_matches(const RecurrentWeights<T>&, const void* packed);

  // One block for all rows, after recurrent_inputs has been to scratch, recurrent_scratch_bytes for each thread.
  template <class W> int64_t recurrent_scratch_bytes(int64_t batch, int64_t in, int64_t hidden);
  template <class T, class W> void recurrent_inputs(const RecurrentStep<T>&, void* scratch);
  template <class Cell, class T, class W> void recurrent_step(const RecurrentStep<T>&, int64_t block, const void* scratch);

  // Step t for blocks begin <= b < end and batch elements first <= r < last. Needs all blocks of the step before.
  template <class Cell, class T> void recurrent_forward(const RecurrentForward<T>&, int64_t t, int64_t begin, int64_t end, int64_t first, int64_t last);

  // Backward of step t in two halves for a part of the columns: the second needs the first of all columns, the first
  // the second of the step after for its own. Columns go by the panels of W_hh.
  template <class T> int64_t recurrent_panels(int64_t hidden);
  template <class Cell, class T> void recurrent_pack_backward(int64_t hidden, const T* weight_hh, T* panels, int64_t begin, int64_t end);
  template <class T> int64_t recurrent_panel_width();
  template <class Cell, class T> void recurrent_backward_gates(const RecurrentBackward<T>&, int64_t t, int64_t begin, int64_t end, int64_t first, int64_t last);
  template <class Cell, class T> void recurrent_backward_hidden(const RecurrentBackward<T>&, int64_t t, int64_t begin, int64_t end, int64_t first, int64_t last);
)
// clang-format on

}  // namespace pyflowgen
