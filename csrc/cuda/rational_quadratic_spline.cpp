// rational_quadratic_spline on CUDA: tensors to pointers, the current stream, registration.
#include "cuda/stream.h"
#include "rational_quadratic_spline_call.h"

// The tests build these launchers for the CPU, and register them there.
#ifndef PYFLOWGEN_CUDA_KEY
#define PYFLOWGEN_CUDA_KEY CUDA
#endif

namespace pyflowgen::cuda {
namespace {

std::tuple<Tensor, Tensor> forward(PYFLOWGEN_SPLINE_PARAMETERS) {
  const OnDevice device(x);
  const RationalQuadraticSplineCall call(PYFLOWGEN_SPLINE_ARGUMENTS);
  Output y(x, call.batch_dims(), call.dims());
  Tensor logdet = call.new_logdet();
  if (call.empty()) {
    torch::stable::copy_(y.result, x);
    return {y.result, torch::stable::zero_(logdet)};
  }
  with_dtype(x.scalar_type(), "rational_quadratic_spline", [&]<class T, class A>() {
    const auto a = call.forward<T, A>(y, logdet);
    const int64_t segments = cuda::rational_quadratic_spline_segments(a.o);
    std::optional<Tensor> partial;
    if (segments > 1) partial = torch::stable::new_empty(x, {a.o.batch * segments}, ScalarType::Double);
    rational_quadratic_spline(a, partial ? static_cast<double*>(partial->mutable_data_ptr()) : nullptr,
                              device.stream());
  });
  return {y.finish(), logdet};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet,
                                                    PYFLOWGEN_SPLINE_PARAMETERS) {
  const OnDevice device(x);
  const RationalQuadraticSplineCall call(PYFLOWGEN_SPLINE_ARGUMENTS);
  call.check_gradients(dy, dlogdet, x);
  Output dx(x, call.batch_dims(), call.dims());
  auto gradients = call.new_gradients();
  if (call.empty()) {
    if (dy) torch::stable::copy_(dx.result, *dy);
    else torch::stable::zero_(dx.result);
    torch::stable::zero_(gradients.widths.result);
    if (heights) torch::stable::zero_(gradients.heights->result), torch::stable::zero_(gradients.derivatives->result);
  } else {
    std::optional<Input> dy_view;
    if (dy) dy_view.emplace(*dy, call.batch_dims(), call.dims());
    if (dlogdet && !joint_stride(*dlogdet, 0, call.batch_dims())) dlogdet = torch::stable::contiguous(*dlogdet);
    with_dtype(x.scalar_type(), "rational_quadratic_spline_backward", [&]<class T, class A>() {
      rational_quadratic_spline_backward(call.backward<T, A>(dy_view, dlogdet, nullptr, dx, gradients),
                                         device.stream());
    });
  }
  const auto finish = [&](std::optional<Output>& o) { return o ? o->finish() : torch::stable::new_empty(x, {0}); };
  return {dx.finish(), gradients.widths.finish(), finish(gradients.heights), finish(gradients.derivatives)};
}

}  // namespace
}  // namespace pyflowgen::cuda

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, PYFLOWGEN_CUDA_KEY, m) {
  m.impl("rational_quadratic_spline", TORCH_BOX(&pyflowgen::cuda::forward));
  m.impl("rational_quadratic_spline_backward", TORCH_BOX(&pyflowgen::cuda::backward));
}
