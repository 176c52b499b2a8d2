// polynomial_spline: schema. Its arguments are checked as those of rational_quadratic_spline.
#include "polynomial_spline.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "polynomial_spline(Tensor x, Tensor params, Tensor? bound, Tensor? mask, int degree, int bins, int layout, int "
      "start, int step, int tails, float left, float right, float bottom, float top, float min_bin_width, float "
      "min_bin_height, float scale, bool inverse, int event_dim) -> (Tensor, Tensor)");
  m.def(
      "polynomial_spline_backward(Tensor? dy, Tensor? dlogdet, Tensor x, Tensor params, Tensor? bound, Tensor? mask, "
      "int degree, int bins, int layout, int start, int step, int tails, float left, float right, float bottom, float "
      "top, float min_bin_width, float min_bin_height, float scale, bool inverse, int event_dim) -> (Tensor, Tensor)");
}
