// affine_coupling on the CPU: threads and registration.
#include <vector>

#include "affine_coupling_call.h"

namespace pyflowgen {
namespace {

// Elements worth a thread of their own.
constexpr int64_t grain = 16384;

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor params, std::optional<Tensor> log_scale, std::optional<Tensor> mask,
                                   int64_t layout, int64_t start, int64_t step, int64_t scale, double clamp,
                                   double gain, bool shift_first, bool inverse, int64_t event_dim) {
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
    const int64_t segments = affine_coupling_segments(a.o), elements = a.o.channels * a.o.inner;
    if (segments == 1) {
      torch::stable::parallel_for(0, a.o.batch, 1 + (grain - 1) / elements, [&](int64_t begin, int64_t end) {
        PYFLOWGEN_CALL(affine_coupling, a, begin, end, nullptr);
      });
      return;
    }
    if (a.o.count < a.o.channels) torch::stable::copy_(y.written, x);
    std::vector<double> partial(size_t(a.o.batch * segments));
    torch::stable::parallel_for(0, a.o.batch * segments, 1, [&](int64_t begin, int64_t end) {
      PYFLOWGEN_CALL(affine_coupling, a, begin, end, partial.data());
    });
    for (int64_t row = 0; row < a.o.batch; ++row) {
      double sum = 0;
      for (int64_t i = 0; i < segments; ++i) sum += partial[size_t(row * segments + i)];
      a.logdet[row] = A(inverse ? -sum : sum);
    }
  });
  return {y.finish(), logdet};
}

std::tuple<Tensor, Tensor, Tensor> backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet, Tensor x,
                                            Tensor params, std::optional<Tensor> log_scale, std::optional<Tensor> mask,
                                            int64_t layout, int64_t start, int64_t step, int64_t scale, double clamp,
                                            double gain, bool shift_first, bool inverse, int64_t event_dim) {
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
    const double zero = 0;
    with_dtype(x.scalar_type(), "affine_coupling_backward", [&]<class T, class A>() {
      const auto a = call.backward<T, A>(dy_view, dlogdet, &zero, dx, dparams, dlog_scale);
      const int64_t segments = affine_coupling_segments(a.o), elements = a.o.channels * a.o.inner;
      if (segments > 1 && a.o.count < a.o.channels)
        dy ? torch::stable::copy_(dx.written, *dy) : torch::stable::zero_(dx.written);
      torch::stable::parallel_for(
          0, a.o.batch * segments, segments > 1 ? 1 : 1 + (grain - 1) / elements,
          [&](int64_t begin, int64_t end) { PYFLOWGEN_CALL(affine_coupling_backward, a, begin, end, segments > 1); });
    });
  }
  return {dx.finish(), dparams.finish(), dlog_scale ? dlog_scale->finish() : torch::stable::new_empty(x, {0})};
}

}  // namespace
}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&pyflowgen::forward));
  m.impl("affine_coupling_backward", TORCH_BOX(&pyflowgen::backward));
}
