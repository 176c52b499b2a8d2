// conv_net: y = conv3(phi(conv2(phi(conv1(x))))), conv1 and conv3 of odd kernels and 'same' padding, conv2 1x1; the
// contract between the adapter that knows tensors and the kernels that do not. T is float or double.
//
// A row is a pixel. conv1 is a product of rows whose columns are (tap, channel), gathered from x; conv3 is a product
// whose result has such columns, which are then added up at the pixels they belong to. Taps are counted by row and
// column; conv3's from the last to the first, so that gathering and adding up are the same two loops both ways.
//
// Tensors of images are [images][height][width][channels] here. Buffers have rows of conv_net_stride(columns)
// elements, and conv_net_slack elements after the last one. Results depend on no number of threads.
#pragma once

#include "linear.h"

namespace pyflowgen {

// Whole vectors of every instruction set.
constexpr int64_t conv_net_slack = 16;
constexpr int64_t conv_net_stride(int64_t columns) { return (columns + 15) / 16 * 16; }

// Whether the backward pass can do with the activation's result.
constexpr bool conv_net_takes(Activation a) { return a != Activation::none && !keeps_argument(a); }

template <class T> struct ConvNet {
  int64_t images, height, width;
  int64_t channels[4];       // of x, of both hidden layers, of y
  int64_t kernel1, kernel3;  // sides of the square windows
  Activation activation;     // one that conv_net_takes
  const T* x;                // [images][height][width][channels[0]]
  const T* weight[3];        // [out][in][kernel][kernel]
  const T* bias[3];          // [out] or null
  T* panels;                 // conv_net_panels elements: what conv_net_pack makes of the weights and biases
  T* hidden[2];              // [rows][stride of channels[1]], [rows][stride of channels[2]]: kept; or null both
  T* taps3;                  // [rows][stride of columns3()]
  T* y;                      // [images][height][width][channels[3]]

  int64_t rows() const { return images * height * width; }
  int64_t columns1() const { return kernel1 * kernel1 * channels[0]; }
  int64_t columns3() const { return kernel3 * kernel3 * channels[3]; }
};

template <class T> struct ConvNetBackward {
  ConvNet<T> forward;  // without y and taps3; with what is kept
  const T* dy;         // [images][height][width][channels[3]]
  T* dtaps1;           // [rows][stride of columns1()]; null: dx is not wanted
  T* dx;               // [images][height][width][channels[0]]
  // What follows is of the parameters; null all where their gradients are not wanted.
  int64_t groups;  // of blocks, each with its sums, at most as many as blocks
  T* sums;         // [groups][conv_net_sums]
  bool add;        // to the sums there are already
  T* dweight[3];   // as the weights
  T* dbias[3];     // [out] or null
};

// Rows are taken in so many blocks.
template <class T> constexpr int64_t conv_net_block_rows(const ConvNet<T>& o) {
  const int64_t widest = o.channels[1] > o.channels[2] ? o.channels[1] : o.channels[2];
  int64_t rows = 256;  // a block of each hidden layer fits the second-level cache
  while (rows > 32 && (rows * widest * int64_t(sizeof(T)) > 256 << 10 || rows * 16 > o.rows())) rows /= 2;
  return rows;
}
template <class T> constexpr int64_t conv_net_blocks(const ConvNet<T>& o) {
  return (o.rows() + conv_net_block_rows(o) - 1) / conv_net_block_rows(o);
}
template <class T> constexpr int64_t conv_net_bias_columns(const ConvNet<T>& o) {
  return conv_net_stride(o.channels[1]) + conv_net_stride(o.channels[2]) + conv_net_stride(o.channels[3]);
}

// clang-format off
PYFLOWGEN_PER_ISA(
  // Tasks of packing the weights and biases for one direction.
  template <class T> int64_t conv_net_panels(const ConvNet<T>&, bool backward);
  template <class T> int64_t conv_net_pack_tasks(const ConvNet<T>&, bool backward);
  template <class T> void conv_net_pack(const ConvNet<T>&, bool backward, int64_t begin, int64_t end);

  // taps3 (and the hidden layers) of blocks begin <= b < end; workspace of conv_net_workspace elements.
  template <class T> int64_t conv_net_workspace(const ConvNet<T>&);
  template <class T> void conv_net_products(const ConvNet<T>&, int64_t begin, int64_t end, T* workspace);
  // y of rows begin <= r < end, from all of taps3.
  template <class T> void conv_net_add_taps(const ConvNet<T>&, int64_t begin, int64_t end);

  // dtaps1 of groups begin <= g < end and their part of the parameters' gradients; then dx of rows, from all of dtaps1.
  template <class T> int64_t conv_net_backward_workspace(const ConvNet<T>&);
  template <class T> void conv_net_backward_products(const ConvNetBackward<T>&, int64_t begin, int64_t end, T* workspace);
  template <class T> void conv_net_backward_add_taps(const ConvNetBackward<T>&, int64_t begin, int64_t end);
  // A part of the parameters' gradients, from the sums of all groups, which are used up.
  template <class T> int64_t conv_net_sums(const ConvNet<T>&);
  template <class T> void conv_net_reduce(const ConvNetBackward<T>&, int64_t part, int64_t parts);
)
// clang-format on

}  // namespace pyflowgen
