// Splines on CUDA: tensors to pointers, the current stream.
#pragma once

#include "cuda/stream.h"
#include "rational_quadratic_spline_call.h"

// The tests build these launchers for the CPU, and register them there.
#ifndef PYFLOWGEN_CUDA_KEY
#define PYFLOWGEN_CUDA_KEY CUDA
#endif

namespace pyflowgen::cuda {

// segments(options): of a row; launch(arguments, partial, stream): as the contract has them.
template <class Segments, class Launch>
std::tuple<Tensor, Tensor> spline_forward(const char* name, const RationalQuadraticSplineCall& call, const Tensor& x,
                                          Segments segments, Launch launch) {
  const OnDevice device(x);
  Output y(x, call.batch_dims(), call.dims());
  Tensor logdet = call.new_logdet();
  if (call.empty()) {
    torch::stable::copy_(y.result, x);
    return {y.result, torch::stable::zero_(logdet)};
  }
  with_dtype(x.scalar_type(), name, [&]<class T, class A>() {
    const auto a = call.forward<T, A>(y, logdet);
    const int64_t pieces = segments(a.o);
    std::optional<Tensor> partial;
    if (pieces > 1) partial = torch::stable::new_empty(x, {a.o.batch * pieces}, ScalarType::Double);
    launch(a, partial ? static_cast<double*>(partial->mutable_data_ptr()) : nullptr, device.stream());
  });
  return {y.finish(), logdet};
}

// launch(arguments, stream)
template <class Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> spline_backward(const char* name, const RationalQuadraticSplineCall& call,
                                                           const std::optional<Tensor>& dy,
                                                           std::optional<Tensor> dlogdet, const Tensor& x,
                                                           Launch launch) {
  const OnDevice device(x);
  call.check_gradients(dy, dlogdet, x);
  Output dx(x, call.batch_dims(), call.dims());
  auto gradients = call.new_gradients();
  if (call.empty()) {
    if (dy) torch::stable::copy_(dx.result, *dy);
    else torch::stable::zero_(dx.result);
    torch::stable::zero_(gradients.widths.result);
    if (gradients.heights)
      torch::stable::zero_(gradients.heights->result), torch::stable::zero_(gradients.derivatives->result);
  } else {
    std::optional<Input> dy_view;
    if (dy) dy_view.emplace(*dy, call.batch_dims(), call.dims());
    if (dlogdet && !joint_stride(*dlogdet, 0, call.batch_dims())) dlogdet = torch::stable::contiguous(*dlogdet);
    with_dtype(x.scalar_type(), name, [&]<class T, class A>() {
      launch(call.backward<T, A>(dy_view, dlogdet, nullptr, dx, gradients), device.stream());
    });
  }
  const auto finish = [&](std::optional<Output>& o) { return o ? o->finish() : torch::stable::new_empty(x, {0}); };
  return {dx.finish(), gradients.widths.finish(), finish(gradients.heights), finish(gradients.derivatives)};
}

}  // namespace pyflowgen::cuda
