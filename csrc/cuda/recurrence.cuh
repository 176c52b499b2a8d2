// Gated recurrence on CUDA: a whole sequence in one launch, for the cells of lstm.cu and gru.cu. Not yet run on a GPU.
//
// x's part of all steps is one product of torch's before, the gradients of the weights are some after. A step is left
// with 2 gates hidden^2 operations a row and the weights of the recurrence.
//
// Floor of a step of `batch` rows on G multiprocessors: without holding the weights gates hidden^2 b bytes from L2 or
// memory; held, none but the gates' own (gates + 2) hidden batch b bytes, and the state to everyone. The kernel: each
// block reads the hidden states of the step before, G hidden batch b bytes from L2, and its weights once from shared
// memory for every 4 rows; the grid meets once a step, about a microsecond, which is the floor at small batches.
// Weights fit while gates hidden^2 b <= G times the shared memory of a block (227 KB on sm_90: hidden 1360 in float32,
// 1930 in 16 bits, on 132 multiprocessors); larger ones stream from L2 by the same code.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/recurrence.h"

namespace pyflowgen::cuda {

// Pointwise<Cell>: forward replaces the arguments by gates (and, split, the last gate's h part a[3] stays) and returns
// h; `c` is the cell, or h, before, and the cell after. backward: dh becomes what reaches h before beside the product.
template <class Cell> struct Pointwise;

namespace {

struct Share {
  int units;  // of a block
  bool held;  // their weights, in shared memory
};

struct Range { int64_t first, count; };
__device__ __forceinline__ Range rows_of(const RecurrentSteps& s, int64_t t) {
  if (t < 0 || t >= s.steps) return {0, 0};
  if (!s.offsets) return {t * s.batch, s.batch};
  return {s.offsets[t], s.offsets[t + 1] - s.offsets[t]};
}

template <class Cell, class T> __global__ void __launch_bounds__(threads, 1)
    recurrent_forward_kernel(const RecurrentForward<T, Compute<T>> o, const Share share) {
  using A = Compute<T>;
  constexpr int gates = Cell::gates, last = gates - 1;
  PYFLOWGEN_DYNAMIC_SHARED(T, shared);
  const int hidden = int(o.steps.hidden);
  const Own own = own_outputs(share.units, hidden);
  const Rows<T> weights = hold(o.weight_hh, hidden, gates, hidden, own, share.held, shared);
  each(own.count, o.steps.batch, [&](int n, int64_t row) {
    const int64_t at = row * hidden + own.first + n;
    o.h_n[at] = o.h0[at];  // of sequences without a step
    if (Cell::has_cell) o.cell[at] = widen(o.c0[at]), o.c_n[at] = o.c0[at];
  });
  __syncthreads();
  GridBarrier barrier{o.arrived};
  for (int64_t i = 0; i < o.steps.steps; ++i) {
    const int64_t t = o.steps.reverse ? o.steps.steps - 1 - i : i;
    const Range now = rows_of(o.steps, t), before = rows_of(o.steps, o.steps.reverse ? t + 1 : t - 1);
    // Rows whose last step this is end here.
    const int64_t ends_from = o.steps.reverse ? (t ? now.count : 0) : rows_of(o.steps, t + 1).count;
    const auto state_before = [&](int64_t row) {
      return (row < before.count ? o.y + before.first * hidden : o.h0) + row * hidden;
    };
    each_unit<gates>(weights, own.count, now.count, hidden, state_before, [&](int n, int64_t row, A(&a)[4]) {
      const int unit = own.first + n;
      const int64_t at = (now.first + row) * hidden + unit, state = row * hidden + unit;
      T* const kept = o.gates + (now.first + row) * gates * hidden + unit;
      if (Cell::split_gate) a[3] = a[last], a[last] = 0;
#pragma unroll
      for (int g = 0; g < gates; ++g) {
        const int wide = g * hidden + unit;
        if (o.bias_hh) a[Cell::split_gate && g == last ? 3 : g] += widen(o.bias_hh[wide]);
        a[g] += widen(kept[g * hidden]);
        if (o.bias_ih) a[g] += widen(o.bias_ih[wide]);
      }
      A c = Cell::has_cell ? o.cell[state] : A(widen(state_before(row)[unit]));
      const A h = Pointwise<Cell>::forward(a, c);
      narrow(h, o.y[at]);
      if (row >= ends_from) narrow(h, o.h_n[state]);
      if (Cell::has_cell) {
        o.cell[state] = c;
        if (row >= ends_from) narrow(c, o.c_n[state]);
      }
      if (o.extra) {
#pragma unroll
        for (int g = 0; g < gates; ++g) narrow(a[g], kept[g * hidden]);
        narrow(Cell::has_cell ? c : a[3], o.extra[at]);
      }
    });
    if (i + 1 < o.steps.steps) barrier.meet();
  }
}

template <class Cell, class T> __global__ void __launch_bounds__(threads, 1)
    recurrent_backward_kernel(const RecurrentBackward<T, Compute<T>> o, const Share share) {
  using A = Compute<T>;
  constexpr int gates = Cell::gates;
  PYFLOWGEN_DYNAMIC_SHARED(T, shared);
  const int hidden = int(o.steps.hidden), depth = gates * hidden;
  const Own own = own_outputs(share.units, hidden);
  const Rows<T> weights = hold(o.turned, hidden, 1, depth, own, share.held, shared);
  each(own.count, o.steps.batch, [&](int n, int64_t row) {
    const int64_t at = row * hidden + own.first + n;
    o.dh[at] = o.dh_n ? widen(o.dh_n[at]) : A(0);
    if (Cell::has_cell) o.dc[at] = o.dc_n ? widen(o.dc_n[at]) : A(0);
  });
  __syncthreads();
  GridBarrier barrier{o.arrived};
  for (int64_t i = 0; i < o.steps.steps; ++i) {
    const int64_t t = o.steps.reverse ? i : o.steps.steps - 1 - i;
    const Range now = rows_of(o.steps, t), before = rows_of(o.steps, o.steps.reverse ? t + 1 : t - 1);
    each(own.count, now.count, [&](int n, int64_t row) {
      const int64_t unit = own.first + n;
      const int64_t at = (now.first + row) * hidden + unit, state = row * hidden + unit;
      const int64_t there = row < before.count ? before.first * hidden + state : -1;
      const int64_t wide = (now.first + row) * depth + unit;
      const T h_before = there < 0 ? o.h0[state] : o.y[there];
      const A c_before = widen(!Cell::has_cell ? h_before : there < 0 ? o.c0[state] : o.extra[there]);
      A gate[gates], d[gates], d_last, dh = o.dh[state], dc = Cell::has_cell ? o.dc[state] : A(0);
#pragma unroll
      for (int g = 0; g < gates; ++g) gate[g] = widen(o.gates[wide + g * hidden]);
      if (o.dy) dh += widen(o.dy[at]);
      Pointwise<Cell>::backward(gate, A(widen(o.extra[at])), c_before, dh, dc, d, d_last);
      if (Cell::has_cell) o.dc[state] = dc;
      else o.dh[state] = dh;
      o.before[at] = h_before;
#pragma unroll
      for (int g = 0; g < gates; ++g) {
        narrow(d[g], o.dgates[wide + g * hidden]);
        if (Cell::split_gate) narrow(g == gates - 1 ? d_last : d[g], o.dgates_h[wide + g * hidden]);
      }
    });
    barrier.meet();
    each_output(
        weights, own.count, now.count, depth, [&](int64_t row) { return o.dgates_h + (now.first + row) * depth; },
        [&](int n, int64_t row, A sum) {
          A* const dh = o.dh + row * hidden + own.first + n;
          *dh = Cell::has_cell ? sum : *dh + sum;
        });
    __syncthreads();
  }
  each(own.count, o.steps.batch, [&](int n, int64_t row) {
    const int64_t at = row * hidden + own.first + n;
    narrow(o.dh[at], o.dh0[at]);
    if (Cell::has_cell) narrow(o.dc[at], o.dc0[at]);
  });
}

// Few units a block, so that every multiprocessor works; no fewer than backward's tile. Held where all of them fit.
template <class K, class O> void launch(K kernel, const O& o, int64_t unit_bytes, void* stream) {
  if (o.steps.hidden == 0) return;
  const Device device;
  Share share{int(ceil_div(o.steps.hidden, device.multiprocessors)), true};
  if (share.units < tile) share.units = tile;
  if (share.units * unit_bytes > device.shared_bytes) share.held = false;
  const size_t bytes = share.held ? size_t(share.units * unit_bytes) : 0;
  const int blocks = int(ceil_div(o.steps.hidden, share.units));
  // A warp a unit and 4 rows, as far as there are so many.
  const int64_t tasks = share.units * ceil_div(o.steps.batch, tile);
  const int block = int(tasks < threads / warp ? tasks : threads / warp) * warp;
  if (blocks > blocks_at_once(kernel, device, block, bytes))
    throw std::runtime_error("pyflowgen: the recurrence does not fit on this device");
  PYFLOWGEN_LAUNCH_COOPERATIVE(kernel, dim3(unsigned(blocks)), dim3(unsigned(block)), bytes, stream, o, share);
}

}  // namespace

template <class Cell, class T, class A> void recurrent_forward(const RecurrentForward<T, A>& o, void* stream) {
  launch(&recurrent_forward_kernel<Cell, T>, o, Cell::gates * o.steps.hidden * int64_t(sizeof(T)), stream);
}
template <class Cell, class T, class A> void recurrent_backward(const RecurrentBackward<T, A>& o, void* stream) {
  launch(&recurrent_backward_kernel<Cell, T>, o, Cell::gates * o.steps.hidden * int64_t(sizeof(T)), stream);
}

#define PYFLOWGEN_RECURRENT(Cell, T, A) \
  template void recurrent_forward<Cell, T, A>(const RecurrentForward<T, A>&, void*); \
  template void recurrent_backward<Cell, T, A>(const RecurrentBackward<T, A>&, void*);

}  // namespace pyflowgen::cuda
