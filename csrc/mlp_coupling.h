// mlp_coupling: a run of coupling layers with their conditioners (multi-layer perceptrons), each one step:
// permutation, scale and shift of every channel, split, conditioner, transform, merge, what is absent left out. The
// contract between the adapter that knows tensors and the kernels that do not. T is float or double.
//
// Rows go through a step in blocks: a block's activations and the packed weights stay in cache from the first product
// to the transform, and a thread takes its rows through all steps without waiting for another. The backward pass goes
// by groups of rows, each with sums of its own that are added in order at the end, so that results depend neither on
// the number of threads nor on who took what.
#pragma once

#include <cstdint>

#include "affine_coupling.h"
#include "cpu/isa.h"
#include "linear.h"
#include "rational_quadratic_spline.h"

namespace pyflowgen {

inline constexpr int mlp_max_layers = 16;

template <class T> struct MlpCoupling {
  int64_t rows, channels;
  // First of all u[k] = x[index[k]], then u * scale + shift, or (u + shift) * scale; null: as it is. scale is
  // e^(scale_sign s), and the step's log-determinant begins at scale_sign * sum of s, logdet_start.
  const int64_t* index;
  const T *scale, *shift;
  bool shift_first;
  double logdet_start;
  int scale_sign;
  // The conditioner: its products (0: no coupling), from the input (channels that stay, then the context) to the
  // parameters. A perceptron, phi between them; or residual blocks h + W2 phi(W1 phi(h)) between the first and the
  // last, each W1, W2 and, when gated, the W of sigmoid(W context) that multiplies what is added to h.
  int64_t layers, in[mlp_max_layers], out[mlp_max_layers];
  const T* weight[mlp_max_layers];  // [out][in]
  const T* bias[mlp_max_layers];    // [out] or null
  Activation activation;
  int64_t blocks;
  bool gated;
  // What it is given: channels same_start + k same_step; with a mask all of them, zero where they are transformed.
  int64_t same_start, same_step, same_count;
  const uint8_t* mask;  // [channels] or null
  int64_t context_size;
  // The transform, its options and how a row of parameters is read; their batch is not used.
  bool spline;
  RationalQuadraticSplineOptions s;  // a channel's widths, heights and derivatives one after another
  AffineCouplingOptions o;
  int64_t parameter_stride, log_scale_offset;  // log_scale_offset 0: additive
  const T* x;
  int64_t x_stride;  // [rows][channels]
  const T* context;
  int64_t context_stride;  // [rows][context_size]
  T* y;                    // [rows][channels]
  T* logdet;               // [rows]
  bool add_logdet;         // to what is there
  // For the backward pass or null, a product after the other [rows][out]: the hidden layers, phi's argument or result;
  // then the parameters. With residual blocks h, W1's as a hidden layer, and h again behind W2; when gated, what is
  // multiplied behind W2, then the factor and h.
  T* saved;  // null in a backward pass: evaluated there, once more

  int64_t parameters() const { return out[layers - 1]; }
  // Place of a block's first product.
  int64_t block(int64_t i) const { return 1 + (gated ? 3 : 2) * i; }
  bool is_gate(int64_t layer) const { return gated && layer && layer % 3 == 0; }
  // Columns that are saved of a product.
  int64_t saved_columns(int64_t layer) const { return is_gate(layer) ? 2 * out[layer] : out[layer]; }
};

template <class T> struct MlpCouplingBackward {
  MlpCoupling<T> forward;  // y, logdet null
  // Where x is not kept either: y[rows][channels], from which x is rebuilt by the inverse into `rebuilt`, which is
  // forward.x, dense, and may be y; the conditioner's channels are disjoint from those that are transformed. Or null.
  const T* y;
  int64_t y_stride;
  T* rebuilt;
  const T* dy;         // may be dx
  Strides dy_strides;  // (rows, channels, 0), strides 0 at a zero when there is none
  const T* dlogdet;
  int64_t dlogdet_stride;  // (rows); likewise
  bool need_input, need_parameters;
  T* dx;        // [rows][channels]
  T* dcontext;  // [rows][context_size] or null
  bool add_dcontext;
  T *dscale, *dshift;  // [channels], of s and of the given shift, or null
  T* dweight[mlp_max_layers];
  T* dbias[mlp_max_layers];  // or null
  T* sums;                   // [groups][mlp_coupling_sums]
};

// Rows of a block of the forward pass, and groups of the backward pass: fewer rows go in smaller ones, for the cores to
// have one each. Never by the number of threads, on which no result may depend.
inline constexpr int64_t mlp_most_block_rows = 64;
inline int64_t mlp_block_rows(int64_t rows) { return rows < 8 * mlp_most_block_rows ? 32 : mlp_most_block_rows; }
int64_t mlp_coupling_groups(int64_t rows);

// clang-format off
PYFLOWGEN_PER_ISA(
  // Elements of the workspace that a thread brings, 64-byte aligned, and of a group's sums.
  template <class T> int64_t mlp_coupling_workspace(const MlpCoupling<T>&);
  template <class T> int64_t mlp_coupling_backward_workspace(const MlpCoupling<T>&);
  template <class T> int64_t mlp_coupling_sums(const MlpCoupling<T>&);
  // Blocks begin <= b < end of mlp_block_rows(rows) rows.
  template <class T> void mlp_coupling(const MlpCoupling<T>&, int64_t begin, int64_t end, T* workspace);
  // Groups begin <= g < end; then, when all are done, the parameters' gradients: part `part` of `parts` equal ones.
  template <class T> void mlp_coupling_backward(const MlpCouplingBackward<T>&, int64_t begin, int64_t end, T* workspace);
  template <class T> void mlp_coupling_reduce(const MlpCouplingBackward<T>&, int64_t part, int64_t parts);
)
// clang-format on

}  // namespace pyflowgen
