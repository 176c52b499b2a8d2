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
  return spline_outputs(call, x, [&](Output& y, Tensor& logdet) {
    with_dtype(x.scalar_type(), name, [&]<class T, class A>() {
      const auto a = call.forward<T, A>(y, logdet);
      const int64_t pieces = segments(a.o);
      std::optional<Tensor> partial;
      if (pieces > 1) partial = torch::stable::new_empty(x, {a.o.batch * pieces}, ScalarType::Double);
      launch(a, partial ? static_cast<double*>(partial->mutable_data_ptr()) : nullptr, device.stream());
    });
  });
}

// launch(arguments, stream)
template <class Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> spline_backward(const char* name, const RationalQuadraticSplineCall& call,
                                                           const std::optional<Tensor>& dy,
                                                           const std::optional<Tensor>& dlogdet, const Tensor& x,
                                                           Launch launch) {
  const OnDevice device(x);
  return spline_gradients(call, dy, dlogdet, x, [&](const auto& dy_view, const auto& dl, Output& dx, auto& gradients) {
    with_dtype(x.scalar_type(), name, [&]<class T, class A>() {
      launch(call.backward<T, A>(dy_view, dl, nullptr, dx, gradients), device.stream());
    });
  });
}

}  // namespace pyflowgen::cuda
