// rational_quadratic_spline on the CPU: registration.
#include "cpu/spline_threads.h"

namespace pyflowgen {
namespace {

std::tuple<Tensor, Tensor> forward(PYFLOWGEN_SPLINE_PARAMETERS) {
  return spline_forward("rational_quadratic_spline", RationalQuadraticSplineCall(PYFLOWGEN_SPLINE_ARGUMENTS), x,
                        [](const auto& a, int64_t begin, int64_t end, double* partial) {
                          PYFLOWGEN_CALL(rational_quadratic_spline, a, begin, end, partial);
                        });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet,
                                                    PYFLOWGEN_SPLINE_PARAMETERS) {
  return spline_backward("rational_quadratic_spline_backward", RationalQuadraticSplineCall(PYFLOWGEN_SPLINE_ARGUMENTS),
                         dy, dlogdet, x, [](const auto& a, int64_t begin, int64_t end, bool by_segment) {
                           PYFLOWGEN_CALL(rational_quadratic_spline_backward, a, begin, end, by_segment);
                         });
}

}  // namespace
}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("rational_quadratic_spline", TORCH_BOX(&pyflowgen::forward));
  m.impl("rational_quadratic_spline_backward", TORCH_BOX(&pyflowgen::backward));
}
