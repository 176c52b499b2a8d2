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

// A run of steps, in the order in which they are taken. For each step `options` has 17 numbers,
//   layers, activation, same_start, same_step, start, step, scale, shift_first, inverse, layout   of the coupling,
//   permuted (is there an index), scaled (0: no, 1: by e^s, -1: by its inverse), shifted          of what goes before,
//   bins (0: the coupling is affine or additive), convention, tails                               of splines,
//   residual blocks                                                                               of the conditioner,
// with activation, scale, layout, convention and tails places in Activation, AffineScale, Layout, SplineConvention and
// SplineTails; and `numbers` 11,
//   clamp; left, right, bottom, top, min_bin_width, min_bin_height, min_derivative, edge, clip, scale of splines.
// weights[i] is
// (out, in), biases[i] (out) or empty; masks has one (channels) for each step, empty where there is none; indices,
// log_scales and shifts, each (channels), only those there are. -> (y, logdet, saved), `saved` empty unless `keep`.
// The gradients come in the order of the arguments x, context, weights, biases, log_scales, shifts.
// mlp_coupling_rebuild has what mlp_coupling_backward has without `saved` and from y: it goes back by the inverses, to
// an x of its own, the first result, or only to the second step where x is given.
STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "mlp_coupling(Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, Tensor[] masks, Tensor[] indices, "
      "Tensor[] log_scales, Tensor[] shifts, int[] options, float[] numbers, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mlp_coupling_backward(Tensor? dy, Tensor? dlogdet, Tensor x, Tensor? context, Tensor[] weights, "
      "Tensor[] biases, Tensor[] masks, Tensor[] indices, Tensor[] log_scales, Tensor[] shifts, Tensor saved, "
      "int[] options, float[] numbers, bool need_input, bool need_parameters) -> (Tensor, Tensor, Tensor[])");
  m.def(
      "mlp_coupling_rebuild(Tensor? dy, Tensor? dlogdet, Tensor y, Tensor? x, Tensor? context, Tensor[] weights, "
      "Tensor[] biases, Tensor[] masks, Tensor[] indices, Tensor[] log_scales, Tensor[] shifts, int[] options, "
      "float[] numbers, bool need_input, bool need_parameters) -> (Tensor, Tensor, Tensor, Tensor[])");
}
