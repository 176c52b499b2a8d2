// Schema of linear, and the names of its activations.
#include "linear.h"

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

namespace pyflowgen {

Activation parse_activation(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "leaky_relu") return Activation::leaky_relu;
  if (name == "silu") return Activation::silu;
  if (name == "tanh") return Activation::tanh;
  if (name == "sigmoid") return Activation::sigmoid;
  throw std::invalid_argument("linear: activation '" + std::string(name) +
                              "' is not one of none, relu, leaky_relu, silu, tanh, sigmoid");
}

// linear -> (y, saved): what the backward of this activation needs besides the inputs, empty when that is nothing, or y
// itself, or when `save` is false. linear_backward -> (dx, dweight, dbias), empty where not asked for.
STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, str activation, bool save, Tensor? packed=None) -> (Tensor, Tensor)");
  m.def("linear_pack(Tensor weight) -> Tensor");
  m.def("linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? saved, str activation, bool need_dx, bool need_dweight, "
        "bool need_dbias) -> (Tensor, Tensor, Tensor)");
}

}  // namespace pyflowgen
