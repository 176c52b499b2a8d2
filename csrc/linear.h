// linear: y[batch][out] = activation(x[batch][in] weight[out][in]^T + bias[out]); the contract between the adapter that
// knows tensors and the kernels that do not. T is float or double; all matrices row-major and dense, save x's rows.
//
// Each kernel does tasks begin <= t < end of those that its *_tasks counts; tasks are independent of one another.
// Results depend neither on how tasks are split nor on `threads`, which only makes tasks small enough to share.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace pyflowgen {

// What the kernels fuse: gelu is the exact one, elu that of alpha 1.
enum class Activation { none, relu, leaky_relu, silu, tanh, sigmoid, gelu, elu };
inline constexpr int64_t activations = 8;

// Whether the backward pass takes the activation's argument, not its result.
constexpr bool keeps_argument(Activation a) {
  return a == Activation::silu || a == Activation::gelu || a == Activation::elu;
}

// The slope torch.nn.functional.leaky_relu has by default.
inline constexpr double leaky_slope = 0.01;

template <class T> struct LinearForward {
  int64_t batch, in, out, threads;
  const T* x;
  int64_t x_stride;  // [batch][in], rows x_stride apart
  const T* weight;   // [out][in]
  const T* packed;   // what linear_pack wrote for this weight, or null: packed on the way
  const T* bias;     // [out] or null
  Activation activation;
  T* y;       // [batch][out]
  T* before;  // [batch][out], the argument of the activation; null: not wanted
};

template <class T> struct LinearBackward {
  int64_t batch, in, out, threads;
  const T* dy;  // [batch][out], after linear_activation_backward
  const T* x;
  int64_t x_stride;  // [batch][in]
  const T* weight;   // [out][in]
  T* dx;             // [batch][in] = dy weight
  T* dweight;        // [out][in] = dy^T x
  T* dbias;          // [out] = sum of dy over the batch
};

// clang-format off
PYFLOWGEN_PER_ISA(
  // Elements of the packed weight [panels][in][panel width] and the task of packing one panel.
  template <class T> int64_t linear_packed_size(int64_t in, int64_t out);
  template <class T> int64_t linear_pack_tasks(int64_t out);
  // Whether 16 elements spread over the weight are in `packed` as they are in `weight`: a pack of old values is not.
  template <class T> bool linear_pack_matches(int64_t in, int64_t out, const T* weight, const T* packed);
  template <class T> void linear_pack(int64_t in, int64_t out, const T* weight, T* packed, int64_t begin, int64_t end);

  template <class T> int64_t linear_tasks(const LinearForward<T>&);
  template <class T> void linear(const LinearForward<T>&, int64_t begin, int64_t end);

  // dz[count] = dy[count] * activation'(saved); saved is the argument or the result: see keeps_argument.
  template <class T> void linear_activation_backward(Activation, int64_t count, const T* dy, const T* saved, T* dz);

  template <class T> int64_t linear_dx_tasks(const LinearBackward<T>&);
  template <class T> void linear_dx(const LinearBackward<T>&, int64_t begin, int64_t end);
  template <class T> int64_t linear_dweight_tasks(const LinearBackward<T>&);
  template <class T> void linear_dweight(const LinearBackward<T>&, int64_t begin, int64_t end);
  template <class T> int64_t linear_dbias_tasks(const LinearBackward<T>&);
  template <class T> void linear_dbias(const LinearBackward<T>&, int64_t begin, int64_t end);
)
// clang-format on

}  // namespace pyflowgen
