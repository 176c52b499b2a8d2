// rational_quadratic_spline on the CPU: threads and registration.
#include <vector>

#include "rational_quadratic_spline_call.h"

namespace pyflowgen {
namespace {

// Elements worth a thread of their own.
constexpr int64_t grain = 1024;

std::tuple<Tensor, Tensor> forward(PYFLOWGEN_SPLINE_PARAMETERS) {
  const RationalQuadraticSplineCall call(PYFLOWGEN_SPLINE_ARGUMENTS);
  Output y(x, call.batch_dims(), call.dims());
  Tensor logdet = call.new_logdet();
  if (call.empty()) {
    torch::stable::copy_(y.result, x);
    return {y.result, torch::stable::zero_(logdet)};
  }
  with_dtype(x.scalar_type(), "rational_quadratic_spline", [&]<class T, class A>() {
    const auto a = call.forward<T, A>(y, logdet);
    const int64_t segments = rational_quadratic_spline_segments(a.o), elements = a.o.count * a.o.inner;
    if (segments == 1) {
      torch::stable::parallel_for(0, a.o.batch, 1 + (grain - 1) / elements, [&](int64_t begin, int64_t end) {
        PYFLOWGEN_CALL(rational_quadratic_spline, a, begin, end, nullptr);
      });
      return;
    }
    if (a.o.count < a.o.channels) torch::stable::copy_(y.written, x);
    std::vector<double> partial(size_t(a.o.batch * segments));
    torch::stable::parallel_for(0, a.o.batch * segments, 1, [&](int64_t begin, int64_t end) {
      PYFLOWGEN_CALL(rational_quadratic_spline, a, begin, end, partial.data());
    });
    for (int64_t row = 0; row < a.o.batch; ++row) {
      double sum = 0;
      for (int64_t i = 0; i < segments; ++i) sum += partial[size_t(row * segments + i)];
      a.logdet[row] = A(inverse ? -sum : sum);
    }
  });
  return {y.finish(), logdet};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet,
                                                    PYFLOWGEN_SPLINE_PARAMETERS) {
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
    const double zero = 0;
    with_dtype(x.scalar_type(), "rational_quadratic_spline_backward", [&]<class T, class A>() {
      const auto a = call.backward<T, A>(dy_view, dlogdet, &zero, dx, gradients);
      const int64_t segments = rational_quadratic_spline_segments(a.o), elements = a.o.count * a.o.inner;
      if (segments > 1 && a.o.count < a.o.channels)
        dy ? torch::stable::copy_(dx.written, *dy) : torch::stable::zero_(dx.written);
      torch::stable::parallel_for(0, a.o.batch * segments, segments > 1 ? 1 : 1 + (grain - 1) / elements,
                                  [&](int64_t begin, int64_t end) {
                                    PYFLOWGEN_CALL(rational_quadratic_spline_backward, a, begin, end, segments > 1);
                                  });
    });
  }
  const auto finish = [&](std::optional<Output>& o) { return o ? o->finish() : torch::stable::new_empty(x, {0}); };
  return {dx.finish(), gradients.widths.finish(), finish(gradients.heights), finish(gradients.derivatives)};
}

}  // namespace
}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("rational_quadratic_spline", TORCH_BOX(&pyflowgen::forward));
  m.impl("rational_quadratic_spline_backward", TORCH_BOX(&pyflowgen::backward));
}
