// Splines on the CPU: threads. LibTorch stable ABI only.
#pragma once

#include <vector>

#include "rational_quadratic_spline_call.h"

namespace pyflowgen {

// Elements worth a thread of their own.
inline constexpr int64_t spline_grain = 1024;

// kernel(arguments, begin, end, partial): as the contract has it.
template <class Kernel> std::tuple<Tensor, Tensor> spline_forward(const char* name,
                                                                  const RationalQuadraticSplineCall& call,
                                                                  const Tensor& x, Kernel kernel) {
  Output y(x, call.batch_dims(), call.dims());
  Tensor logdet = call.new_logdet();
  if (call.empty()) {
    torch::stable::copy_(y.result, x);
    return {y.result, torch::stable::zero_(logdet)};
  }
  with_dtype(x.scalar_type(), name, [&]<class T, class A>() {
    const auto a = call.forward<T, A>(y, logdet);
    const int64_t segments = rational_quadratic_spline_segments(a.o), elements = a.o.count * a.o.inner;
    if (segments == 1) {
      torch::stable::parallel_for(0, a.o.batch, 1 + (spline_grain - 1) / elements,
                                  [&](int64_t begin, int64_t end) { kernel(a, begin, end, nullptr); });
      return;
    }
    if (a.o.count < a.o.channels) torch::stable::copy_(y.written, x);
    std::vector<double> partial(size_t(a.o.batch * segments));
    torch::stable::parallel_for(0, a.o.batch * segments, 1,
                                [&](int64_t begin, int64_t end) { kernel(a, begin, end, partial.data()); });
    for (int64_t row = 0; row < a.o.batch; ++row) {
      double sum = 0;
      for (int64_t i = 0; i < segments; ++i) sum += partial[size_t(row * segments + i)];
      a.logdet[row] = A(a.o.inverse ? -sum : sum);
    }
  });
  return {y.finish(), logdet};
}

// kernel(arguments, begin, end, by_segment)
template <class Kernel>
std::tuple<Tensor, Tensor, Tensor, Tensor> spline_backward(const char* name, const RationalQuadraticSplineCall& call,
                                                           std::optional<Tensor> dy, std::optional<Tensor> dlogdet,
                                                           const Tensor& x, Kernel kernel) {
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
    const double zero = 0;
    with_dtype(x.scalar_type(), name, [&]<class T, class A>() {
      const auto a = call.backward<T, A>(dy_view, dlogdet, &zero, dx, gradients);
      const int64_t segments = rational_quadratic_spline_segments(a.o), elements = a.o.count * a.o.inner;
      if (segments > 1 && a.o.count < a.o.channels)
        dy ? torch::stable::copy_(dx.written, *dy) : torch::stable::zero_(dx.written);
      torch::stable::parallel_for(0, a.o.batch * segments, segments > 1 ? 1 : 1 + (spline_grain - 1) / elements,
                                  [&](int64_t begin, int64_t end) { kernel(a, begin, end, segments > 1); });
    });
  }
  const auto finish = [&](std::optional<Output>& o) { return o ? o->finish() : torch::stable::new_empty(x, {0}); };
  return {dx.finish(), gradients.widths.finish(), finish(gradients.heights), finish(gradients.derivatives)};
}

}  // namespace pyflowgen
