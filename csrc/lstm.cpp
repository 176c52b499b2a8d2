// Schema of lstm.
#include "lstm.h"

#include <torch/csrc/stable/library.h>

namespace pyflowgen {

// One layer, one direction. x is (time, batch, in), or (rows, in) with batch_sizes as in torch's PackedSequence; packed
// is what lstm_pack made of these weights, or None. lstm_keep -> (y, h_n, c_n, gates, cells), which lstm_backward
// takes;
// -> (dx, dh, dc, dweight_ih, dweight_hh, dbias_ih, dbias_hh), empty where not asked for. lstm_pack: storage 0 is the
// weights' own dtype, 1 bfloat16, 2 int8. lstm_step: one step for x (batch, in).
STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "lstm(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? batch_sizes, bool reverse, Tensor? packed=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "lstm_keep(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? batch_sizes, bool reverse, Tensor? packed=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lstm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor h, Tensor c, Tensor weight_ih, "
      "Tensor weight_hh, Tensor? batch_sizes, bool reverse, Tensor y, Tensor gates, Tensor cells, bool need_dx, "
      "bool need_dweight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("lstm_pack(Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, int storage) -> Tensor");
  m.def("lstm_step(Tensor x, Tensor h, Tensor c, Tensor packed) -> (Tensor, Tensor)");
}

}  // namespace pyflowgen
