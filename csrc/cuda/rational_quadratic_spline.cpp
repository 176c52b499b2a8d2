// rational_quadratic_spline on CUDA: registration.
#include "cuda/spline_call.h"

namespace pyflowgen::cuda {
namespace {

std::tuple<Tensor, Tensor> forward(PYFLOWGEN_SPLINE_PARAMETERS) {
  return spline_forward("rational_quadratic_spline", RationalQuadraticSplineCall(PYFLOWGEN_SPLINE_ARGUMENTS), x,
                        rational_quadratic_spline_segments, [](const auto& a, double* partial, void* stream) {
                          rational_quadratic_spline(a, partial, stream);
                        });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet,
                                                    PYFLOWGEN_SPLINE_PARAMETERS) {
  return spline_backward("rational_quadratic_spline_backward", RationalQuadraticSplineCall(PYFLOWGEN_SPLINE_ARGUMENTS),
                         dy, dlogdet, x,
                         [](const auto& a, void* stream) { rational_quadratic_spline_backward(a, stream); });
}

}  // namespace
}  // namespace pyflowgen::cuda

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, PYFLOWGEN_CUDA_KEY, m) {
  m.impl("rational_quadratic_spline", TORCH_BOX(&pyflowgen::cuda::forward));
  m.impl("rational_quadratic_spline_backward", TORCH_BOX(&pyflowgen::cuda::backward));
}
