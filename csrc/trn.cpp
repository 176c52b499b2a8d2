// Schema of trn.
#include "trn.h"

#include <torch/csrc/stable/library.h>

namespace pyflowgen {

// Everything is time-major. given (T, B, 4H) is the frames' part of the encoder gates' arguments; a matrix is what
// linear_pack made of it: enc (4H, F + H) for [future; h], dec (4H, 2H) for [u; g], hx and cx (H, H), fusion (H, C),
// ahead (F, H), classifier (C, H). before: pool before W_u; previous: decode from the state before the frame.
// masks are dropout's: future (T, B, F) and u (T, L, B, H) before the gates, g (T, L, B, H) before the classifier.
// trn -> hs (T, B, H), scores (T, L, B, C), c (B, H), future (B, F).
// trn_keep -> hs (T + 1, B, H), cs (T + 1, B, H), scores, futures (T, B, F), and what the backward pass takes:
//   enc_in (T, B, F + H), enc_gates (T, B, 4H), dec_in (T, L, B, 2H), dec_gates (T, L, B, 4H), gs and ks
//   (T, L + 1, B, H), rows (T, L, B, F): of W_u after its relu, or (T, 1, B, H): its input, when before.
// trn_pack: weights are the input transform's matrix and bias, then those of TRNWeights in its order; storage 0 is
// their own dtype, 1 bfloat16, 2 int8 (the classifier and W_f keep their own). trn_step: one frame (B, F) of streams,
// before the input transform -> scores (B, C), ahead (B, L, C), h, c, future. trn_backward, matrices packed from their
// transposes -> dgiven, ddec_gates, dq (T, L, B, C), du (T, L, B, H), drows
//   (T, L or 1, B, F), dhx and dcx (T, B, H): gradients of arguments; dh0, dc0, dfuture0.
STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "trn(Tensor given, Tensor h, Tensor c, Tensor future, Tensor enc, Tensor dec, Tensor dec_bias, Tensor hx, "
      "Tensor hx_bias, Tensor cx, Tensor cx_bias, Tensor fusion, Tensor fusion_bias, Tensor ahead, Tensor ahead_bias, "
      "Tensor classifier, Tensor classifier_bias, int steps, bool before, bool previous) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "trn_keep(Tensor given, Tensor h, Tensor c, Tensor future, Tensor enc, Tensor dec, Tensor dec_bias, Tensor hx, "
      "Tensor hx_bias, Tensor cx, Tensor cx_bias, Tensor fusion, Tensor fusion_bias, Tensor ahead, Tensor ahead_bias, "
      "Tensor classifier, Tensor classifier_bias, int steps, bool before, bool previous, Tensor? mask_future=None, "
      "Tensor? mask_u=None, Tensor? mask_g=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, "
      "Tensor, Tensor)");
  m.def("trn_pack(Tensor[] weights, int storage) -> Tensor");
  m.def(
      "trn_step(Tensor frame, Tensor h, Tensor c, Tensor future, Tensor packed, int classes, int steps, bool before, "
      "bool previous) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "trn_backward(Tensor dhs, Tensor dc, Tensor dfuture, Tensor dscores, Tensor cs, Tensor futures, Tensor "
      "enc_gates, "
      "Tensor dec_in, Tensor dec_gates, Tensor gs, Tensor ks, Tensor rows, Tensor enc, Tensor dec, Tensor hx, "
      "Tensor cx, Tensor fusion, Tensor ahead, Tensor classifier, bool before, bool previous, Tensor? "
      "mask_future=None, "
      "Tensor? mask_u=None, Tensor? mask_g=None) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace pyflowgen
