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
  return spline_outputs(call, x, [&](Output& y, Tensor& logdet) {
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
  });
}

// kernel(arguments, begin, end, by_segment)
template <class Kernel>
std::tuple<Tensor, Tensor, Tensor, Tensor> spline_backward(const char* name, const RationalQuadraticSplineCall& call,
                                                           const std::optional<Tensor>& dy,
                                                           const std::optional<Tensor>& dlogdet, const Tensor& x,
                                                           Kernel kernel) {
  return spline_gradients(call, dy, dlogdet, x, [&](const auto& dy_view, const auto& dl, Output& dx, auto& gradients) {
    const double zero = 0;
    with_dtype(x.scalar_type(), name, [&]<class T, class A>() {
      const auto a = call.backward<T, A>(dy_view, dl, &zero, dx, gradients);
      const int64_t segments = rational_quadratic_spline_segments(a.o), elements = a.o.count * a.o.inner;
      if (segments > 1 && a.o.count < a.o.channels)
        dy ? torch::stable::copy_(dx.written, *dy) : torch::stable::zero_(dx.written);
      torch::stable::parallel_for(0, a.o.batch * segments, segments > 1 ? 1 : 1 + (spline_grain - 1) / elements,
                                  [&](int64_t begin, int64_t end) { kernel(a, begin, end, segments > 1); });
    });
  });
}

}  // namespace pyflowgen
