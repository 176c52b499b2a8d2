// polynomial_spline on the CPU: registration.
#include "cpu/spline_threads.h"
#include "polynomial_spline_call.h"

namespace pyflowgen {
namespace {

std::tuple<Tensor, Tensor> forward(PYFLOWGEN_POLYNOMIAL_PARAMETERS) {
  check_polynomial(degree, layout, tails);
  return spline_forward("polynomial_spline", PYFLOWGEN_POLYNOMIAL_CALL, x,
                        [](const auto& a, int64_t begin, int64_t end, double* partial) {
                          PYFLOWGEN_CALL(polynomial_spline, a, begin, end, partial);
                        });
}

std::tuple<Tensor, Tensor> backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet,
                                    PYFLOWGEN_POLYNOMIAL_PARAMETERS) {
  check_polynomial(degree, layout, tails);
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
