// Schema of gru.
#include "gru.h"

#include <torch/csrc/stable/library.h>

namespace pyflowgen {

// One layer, one direction; arguments as in lstm.cpp. gru_keep -> (y, h_n, gates, hidden_new), hidden_new being h's
// part of the new gate's argument; gru_backward -> (dx, dh, dweight_ih, dweight_hh, dbias_ih, dbias_hh).
STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "gru(Tensor x, Tensor h, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? batch_sizes, bool reverse, Tensor? packed=None) -> (Tensor, Tensor)");
  m.def(
      "gru_keep(Tensor x, Tensor h, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? batch_sizes, bool reverse, Tensor? packed=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gru_backward(Tensor? dy, Tensor? dh_n, Tensor x, Tensor h, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? batch_sizes, bool reverse, Tensor y, Tensor gates, Tensor hidden_new, bool need_dx, bool need_dweight) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gru_pack(Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, int storage) -> Tensor");
  m.def("gru_step(Tensor x, Tensor h, Tensor packed) -> Tensor");
}

}  // namespace pyflowgen
