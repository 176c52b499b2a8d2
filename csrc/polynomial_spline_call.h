// polynomial_spline: from the operator's arguments to the contract of polynomial_spline.h, the same for every device.
#pragma once

#include "polynomial_spline.h"
#include "rational_quadratic_spline_call.h"

#define PYFLOWGEN_POLYNOMIAL_PARAMETERS \
  Tensor x, Tensor params, std::optional<Tensor> bound, std::optional<Tensor> mask, int64_t degree, int64_t bins, \
      int64_t layout, int64_t start, int64_t step, int64_t tails, double left, double right, double bottom, \
      double top, double min_bin_width, double min_bin_height, double scale, bool inverse, int64_t event_dim
// Of the shared arguments: layout counts from the separate one, which there is none of here.
#define PYFLOWGEN_POLYNOMIAL_CALL \
  RationalQuadraticSplineCall(x, params, {}, {}, bound, {}, mask, bins, layout + 1, start, step, 0, tails, left, \
                              right, bottom, top, min_bin_width, min_bin_height, 0, 0, 0, scale, inverse, event_dim, \
                              degree)

namespace pyflowgen {

inline void check_polynomial(int64_t degree, int64_t layout, int64_t tails) {
  STD_TORCH_CHECK(degree >= 1 && degree <= 3, "polynomial_spline: degree must be 1, 2 or 3");
  STD_TORCH_CHECK(layout == 0 || layout == 1, "polynomial_spline: unknown layout");
  STD_TORCH_CHECK(tails == 0 || tails == 1, "polynomial_spline: unknown tails");
}

}  // namespace pyflowgen
