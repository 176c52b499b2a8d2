// polynomial_spline on CUDA: registration.
#include "cuda/spline_call.h"
#include "polynomial_spline_call.h"

namespace pyflowgen::cuda {
namespace {

std::tuple<Tensor, Tensor> forward(PYFLOWGEN_POLYNOMIAL_PARAMETERS) {
  check_polynomial(degree, layout, tails);
  return spline_forward("polynomial_spline", PYFLOWGEN_POLYNOMIAL_CALL, x, polynomial_spline_segments,
                        [](const auto& a, double* partial, void* stream) { polynomial_spline(a, partial, stream); });
}

std::tuple<Tensor, Tensor> backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet,
                                    PYFLOWGEN_POLYNOMIAL_PARAMETERS) {
  check_polynomial(degree, layout, tails);
  const auto [dx, dparams, none, neither] =
      spline_backward("polynomial_spline_backward", PYFLOWGEN_POLYNOMIAL_CALL, dy, dlogdet, x,
                      [](const auto& a, void* stream) { polynomial_spline_backward(a, stream); });
  return {dx, dparams};
}

}  // namespace
}  // namespace pyflowgen::cuda

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, PYFLOWGEN_CUDA_KEY, m) {
  m.impl("polynomial_spline", TORCH_BOX(&pyflowgen::cuda::forward));
  m.impl("polynomial_spline_backward", TORCH_BOX(&pyflowgen::cuda::backward));
}
