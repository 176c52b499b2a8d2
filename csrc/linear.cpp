// Schema of linear.
#include "linear.h"

#include <torch/csrc/stable/library.h>

namespace pyflowgen {

// activation is the place in `enum class Activation`; packed is what linear_pack made of this weight, or None.
// linear_keep -> (y, z), z the argument of the activation. linear_backward takes as `saved` z or y
// (see keeps_argument), nothing for none; -> (dx, dweight, dbias), empty where not asked for.
STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor? packed=None) -> Tensor");
  m.def("linear_keep(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor? packed=None) -> (Tensor, Tensor)");
  m.def("linear_pack(Tensor weight) -> Tensor");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? saved, int activation, bool need_dx, "
      "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)");
}

}  // namespace pyflowgen
