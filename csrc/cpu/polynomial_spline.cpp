// polynomial_spline on the CPU: registration.
#include "polynomial_spline.h"

#include "cpu/spline_threads.h"

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
namespace {

void check(int64_t degree, int64_t layout, int64_t tails) {
  STD_TORCH_CHECK(degree >= 1 && degree <= 3, "polynomial_spline: degree must be 1, 2 or 3");
  STD_TORCH_CHECK(layout == 0 || layout == 1, "polynomial_spline: unknown layout");
  STD_TORCH_CHECK(tails == 0 || tails == 1, "polynomial_spline: unknown tails");
}

std::tuple<Tensor, Tensor> forward(PYFLOWGEN_POLYNOMIAL_PARAMETERS) {
  check(degree, layout, tails);
  return spline_forward("polynomial_spline", PYFLOWGEN_POLYNOMIAL_CALL, x,
                        [](const auto& a, int64_t begin, int64_t end, double* partial) {
                          PYFLOWGEN_CALL(polynomial_spline, a, begin, end, partial);
                        });
}

std::tuple<Tensor, Tensor> backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet,
                                    PYFLOWGEN_POLYNOMIAL_PARAMETERS) {
  check(degree, layout, tails);
  const auto [dx, dparams, none, neither] =
      spline_backward("polynomial_spline_backward", PYFLOWGEN_POLYNOMIAL_CALL, dy, dlogdet, x,
                      [](const auto& a, int64_t begin, int64_t end, bool by_segment) {
                        PYFLOWGEN_CALL(polynomial_spline_backward, a, begin, end, by_segment);
                      });
  return {dx, dparams};
}

}  // namespace
}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("polynomial_spline", TORCH_BOX(&pyflowgen::forward));
  m.impl("polynomial_spline_backward", TORCH_BOX(&pyflowgen::backward));
}
