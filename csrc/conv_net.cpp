// Schema of conv_net.
#include "conv_net.h"

#include <torch/csrc/stable/library.h>

namespace pyflowgen {

// activation is the place in `enum class Activation`; kept is empty, or with `keep` what the backward pass takes.
// Gradients that are not asked for are empty.
STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "conv_net(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor weight3, Tensor? bias3, "
      "int activation, bool keep) -> (Tensor y, Tensor kept)");
  m.def(
      "conv_net_backward(Tensor dy, Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, "
      "Tensor weight3, Tensor? bias3, Tensor kept, int activation, bool need_dx, bool need_parameters) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace pyflowgen
