// Schema of mlp_coupling.
#include "mlp_coupling.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace pyflowgen {

// Every group costs one more set of sums; an even number of them, so that two threads have the same to do.
int64_t mlp_coupling_groups(int64_t rows) {
  const int64_t groups = (rows + 255) / 256;
  return rows < 32 ? 1 : std::clamp<int64_t>(groups + groups % 2, 2, 64);
}

}  // namespace pyflowgen

// weights[i] is (out, in), biases[i] (out) or empty; activation, scale and layout are places in Activation, AffineScale
// and Layout. `saved` is empty unless `keep`. The gradients of weights and biases come in the order w0, b0, w1, b1, …,
// empty where there is none.
STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "mlp_coupling(Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, Tensor? mask, int activation, "
      "int same_start, int same_step, int start, int step, int scale, float clamp, bool shift_first, bool inverse, "
      "int layout, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mlp_coupling_backward(Tensor? dy, Tensor? dlogdet, Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, "
      "Tensor? mask, Tensor saved, int activation, int same_start, int same_step, int start, int step, int scale, "
      "float clamp, bool shift_first, bool inverse, int layout, bool need_input, bool need_parameters) -> "
      "(Tensor, Tensor, Tensor[])");
}
