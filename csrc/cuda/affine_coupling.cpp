// affine_coupling on CUDA: tensors to pointers, the current stream, registration.
#include "affine_coupling_call.h"
#include "cuda/stream.h"

// The tests build these launchers for the CPU, and register them there.
#ifndef PYFLOWGEN_CUDA_KEY
#define PYFLOWGEN_CUDA_KEY CUDA
#endif

namespace pyflowgen::cuda {
namespace {

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor params, std::optional<Tensor> log_scale, std::optional<Tensor> mask,
                                   int64_t layout, int64_t start, int64_t step, int64_t scale, double clamp,
                                   double gain, bool shift_first, bool inverse, int64_t event_dim) {
  const OnDevice device(x);
  const AffineCouplingCall call(x, params, log_scale, mask, layout, start, step, scale, clamp, gain, shift_first,
                                inverse, event_dim);
  Output y(x, call.batch_dims(), call.dims());
  Tensor logdet = call.new_logdet();
  if (call.empty()) {
    torch::stable::copy_(y.result, x);
    return {y.result, torch::stable::zero_(logdet)};
  }
  with_dtype(x.scalar_type(), "affine_coupling", [&]<class T, class A>() {
    const auto a = call.forward<T, A>(y, logdet);
    const int64_t segments = cuda::affine_coupling_segments(a.o);
    std::optional<Tensor> partial;
    if (segments > 1) partial = torch::stable::new_empty(x, {a.o.batch * segments}, ScalarType::Double);
    affine_coupling(a, partial ? static_cast<double*>(partial->mutable_data_ptr()) : nullptr, device.stream());
  });
  return {y.finish(), logdet};
}

std::tuple<Tensor, Tensor, Tensor> backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet, Tensor x,
                                            Tensor params, std::optional<Tensor> log_scale, std::optional<Tensor> mask,
                                            int64_t layout, int64_t start, int64_t step, int64_t scale, double clamp,
                                            double gain, bool shift_first, bool inverse, int64_t event_dim) {
  const OnDevice device(x);
  const AffineCouplingCall call(x, params, log_scale, mask, layout, start, step, scale, clamp, gain, shift_first,
                                inverse, event_dim);
  call.check_gradients(dy, dlogdet, x);
  Output dx(x, call.batch_dims(), call.dims()), dparams(params, call.batch_dims(), call.dims());
  std::optional<Output> dlog_scale;
  if (log_scale) dlog_scale.emplace(*log_scale, call.batch_dims(), call.dims());
  if (call.empty()) {
    if (dy) torch::stable::copy_(dx.result, *dy);
    else torch::stable::zero_(dx.result);
    torch::stable::zero_(dparams.result);
  } else {
    std::optional<Input> dy_view;
    if (dy) dy_view.emplace(*dy, call.batch_dims(), call.dims());
    if (dlogdet && !joint_stride(*dlogdet, 0, call.batch_dims())) dlogdet = torch::stable::contiguous(*dlogdet);
    with_dtype(x.scalar_type(), "affine_coupling_backward", [&]<class T, class A>() {
      affine_coupling_backward(call.backward<T, A>(dy_view, dlogdet, nullptr, dx, dparams, dlog_scale),
                               device.stream());
    });
  }
  return {dx.finish(), dparams.finish(), dlog_scale ? dlog_scale->finish() : torch::stable::new_empty(x, {0})};
}

}  // namespace
}  // namespace pyflowgen::cuda

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, PYFLOWGEN_CUDA_KEY, m) {
  m.impl("affine_coupling", TORCH_BOX(&pyflowgen::cuda::forward));
  m.impl("affine_coupling_backward", TORCH_BOX(&pyflowgen::cuda::backward));
}
