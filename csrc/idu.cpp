// Schema of idu.
#include "idu.h"

#include <torch/csrc/stable/library.h>

namespace pyflowgen {

// Windows end in the chunks x (B, S, E). Without `cached` each sequence is one window of S chunks; else cached
// (B, K, 2H), products of weight_x with the K chunks before, and every chunk of x ends a window of K + 1.
// length (rows,) as in pyflowgen/ops/idu.py, for each of the R = B or B * S windows. keep: for the backward pass.
// packed: what idu_pack made of the weights, or null, or of other weights: then they are packed on the way.
// idu -> h (B, windows, H), given (B, K + S, 2H): products of weight_x; and when `keep`, else empty: gates (T, R, 3H),
//   states (T + 1, R, H), inner (T, R, H) of idu.h, T being the window.
// idu_step: the window that chunk x (B, E) ends, as idu does it with cached (B, K, 2H) and lengths, on float32 weights
// that idu_step_pack made bf16 (storage 1) or int8 (2) -> h (B, H), given (B, K + 1, 2H). It holds b_r and b_z; of bias
// the step takes the others.
// idu_backward -> dx, dcached, dweight_x, dweight_0, dweight_h, dbias; empty where they are not wanted.
STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "idu(Tensor x, Tensor weight_x, Tensor weight_0, Tensor weight_h, Tensor? bias, Tensor? length, Tensor? cached, "
      "bool reset_after, bool hard, bool keeps_state, bool keep, Tensor? packed=None) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "idu_backward(Tensor dh, Tensor? dgiven, Tensor x, Tensor weight_x, Tensor weight_0, Tensor weight_h, "
      "Tensor? length, bool reset_after, bool hard, bool keeps_state, Tensor gates, Tensor states, Tensor inner, "
      "bool need_dx, bool need_dweight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("idu_pack(Tensor weight_x, Tensor weight_0, Tensor weight_h) -> Tensor");
  m.def("idu_step_pack(Tensor weight_x, Tensor weight_0, Tensor weight_h, Tensor? bias, int storage) -> Tensor");
  m.def(
      "idu_step(Tensor x, Tensor cached, Tensor length, Tensor packed, Tensor? bias, bool reset_after, bool hard, "
      "bool keeps_state) -> (Tensor, Tensor)");
}

}  // namespace pyflowgen
