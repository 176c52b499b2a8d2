// trn on CUDA: the contract between the adapter that knows tensors and the kernels that do not. A clip is one launch;
// time-major, dense, as csrc/trn.cpp has it. T is float or double.
#pragma once

#include <cstdint>

namespace pyflowgen::cuda {

struct TrnSizes {
  int64_t frames, batch, hidden, features, classes, steps;
  bool before, previous;
  int64_t slots;  // frames that buffers of one frame have room for, in turn: all of them when they are kept, else 2
};

// Matrices as nn.Linear has them, (out, in); in the backward pass transposed.
template <class T> struct TrnMatrices { const T *enc, *dec, *hx, *cx, *fusion, *ahead, *classifier; };
template <class T> struct TrnMasks { const T *future, *u, *g; };  // null without dropout

template <class T> struct TrnForward {
  TrnSizes sizes;
  TrnMatrices<T> matrix;
  const T *dec_bias, *hx_bias, *cx_bias, *fusion_bias, *ahead_bias, *classifier_bias;
  TrnMasks<T> mask;
  const T* given;     // [frames][batch][4 hidden]
  const T *h, *c;     // [batch][hidden]
  const T* future;    // [batch][features]
  T* states;          // [frames + 1][batch][hidden], the first h
  T* scores;          // [frames][steps][batch][classes]
  T* cells;           // [slots + 1][batch][hidden], the first c
  T* futures;         // [slots][batch][features]
  T* enc_in;          // [slots][batch][features + hidden]
  T* enc_gates;       // [slots][batch][4 hidden]
  T* dec_in;          // [slots][steps][batch][2 hidden]
  T* dec_gates;       // [slots][steps][batch][4 hidden]
  T *gs, *ks;         // [slots][steps + 1][batch][hidden]
  T* rows;            // [slots][steps][batch][features], or [slots][1][batch][hidden] when before
  T* masked;          // [steps][batch][hidden], to work with; null without mask.g
  unsigned* arrived;  // 0
};

template <class T> struct TrnBackward {
  TrnSizes sizes;
  TrnMatrices<T> matrix;
  TrnMasks<T> mask;
  const T *dstates, *dc_last, *dfuture_last, *dscores;  // of states without the first
  const T *cells, *futures, *enc_gates, *dec_in, *dec_gates, *gs, *ks, *rows;
  T *dgiven, *ddec_gates, *dq, *du, *drows, *dhx, *dcx;  // as csrc/trn.cpp says
  T *dh, *dc;                                            // [batch][hidden]
  T* dfuture;                                            // [batch][features]
  T* dg;                                                 // [steps][batch][hidden], to work with
  T* dk;                                                 // [batch][hidden], likewise
  unsigned* arrived;                                     // 0
};

template <class T> void trn_forward(const TrnForward<T>&, void* stream);
template <class T> void trn_backward(const TrnBackward<T>&, void* stream);

}  // namespace pyflowgen::cuda
