// rational_quadratic_spline: from the operator's arguments to the contract of rational_quadratic_spline.h, the same for
// every device.
#pragma once

#include "rational_quadratic_spline.h"
#include "tensor_view.h"

// The operator's arguments after dy and dlogdet, as parameters and as arguments.
#define PYFLOWGEN_SPLINE_PARAMETERS \
  Tensor x, Tensor widths, std::optional<Tensor> heights, std::optional<Tensor> derivatives, \
      std::optional<Tensor> bound, std::optional<Tensor> circular, std::optional<Tensor> mask, int64_t bins, \
      int64_t layout, int64_t start, int64_t step, int64_t convention, int64_t tails, double left, double right, \
      double bottom, double top, double min_bin_width, double min_bin_height, double min_derivative, double edge, \
      double clip, double scale, bool inverse, int64_t event_dim
#define PYFLOWGEN_SPLINE_ARGUMENTS \
  x, widths, heights, derivatives, bound, circular, mask, bins, layout, start, step, convention, tails, left, right, \
      bottom, top, min_bin_width, min_bin_height, min_derivative, edge, clip, scale, inverse, event_dim

namespace pyflowgen {

class RationalQuadraticSplineCall {
 public:
  // Checks every argument; throws before anything is allocated.
  // degree: of a polynomial spline, or 0.
  explicit RationalQuadraticSplineCall(PYFLOWGEN_SPLINE_PARAMETERS, int64_t degree = 0);

  bool empty() const { return empty_; }
  const RationalQuadraticSplineOptions& options() const { return o_; }
  // Dimensions of the batch, and of batch and event.
  int64_t batch_dims() const { return batch_dims_; }
  int64_t dims() const { return dims_; }
  // Gradients of the outputs: y's shape and x's dtype, the batch's shape and the log-determinant's dtype.
  void check_gradients(const std::optional<Tensor>& dy, const std::optional<Tensor>& dlogdet, const Tensor& x) const;
  // float64 for float64, float32 for the rest.
  Tensor new_logdet() const;

  template <class T, class A> RationalQuadraticSplineForward<T, A> forward(Output& y, Tensor& logdet) const {
    RationalQuadraticSplineForward<T, A> a{};
    inputs<T, A>(a);
    a.y = static_cast<T*>(y.written.mutable_data_ptr()), a.y_strides = y.strides;
    a.logdet = static_cast<A*>(logdet.mutable_data_ptr());
    return a;
  }

  // Gradients of what holds the parameters: one tensor when packed, else three.
  struct Gradients {
    Output widths;
    std::optional<Output> heights, derivatives;
  };
  Gradients new_gradients() const {
    Gradients g{Output(given_[0]->tensor, batch_dims_, dims_), {}, {}};
    if (given_[1]) {
      g.heights.emplace(given_[1]->tensor, batch_dims_, dims_);
      g.derivatives.emplace(given_[2]->tensor, batch_dims_, dims_);
    }
    return g;
  }

  // `zero` is read with strides 0 in the place of an absent dy or dlogdet (CPU), or null (CUDA).
  template <class T, class A>
  RationalQuadraticSplineBackward<T, A> backward(const std::optional<Input>& dy, const std::optional<Tensor>& dlogdet,
                                                 const void* zero, Output& dx, Gradients& g) const {
    RationalQuadraticSplineBackward<T, A> a{};
    inputs<T, A>(a);
    a.dy = dy ? pointer<T>(dy->tensor) : static_cast<const T*>(zero);
    a.dy_strides = dy ? dy->strides : Strides{0, 0, 0};
    a.dlogdet = dlogdet ? pointer<A>(*dlogdet) : static_cast<const A*>(zero);
    a.dlogdet_stride = dlogdet ? *joint_stride(*dlogdet, 0, batch_dims_) : 0;
    a.dx = static_cast<T*>(dx.written.mutable_data_ptr()), a.dx_strides = dx.strides;
    const auto write = [&](int i, Output& out) {
      return parameters(i, static_cast<T*>(out.written.mutable_data_ptr()), out.strides, out.written);
    };
    a.dwidths = write(0, g.widths);
    a.dheights = write(1, g.heights ? *g.heights : g.widths);
    a.dderivatives = write(2, g.derivatives ? *g.derivatives : g.widths);
    return a;
  }

 private:
  enum class Layout : int64_t { separate, last, channels };

  template <class T> static const T* pointer(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
  // Widths, heights or derivatives (i = 0, 1, 2) within the tensor that holds them.
  template <class T> SplineParameters<T> parameters(int i, T* p, Strides s, const Tensor& t) const {
    const int64_t step = layout_ == Layout::channels ? s.channel : t.stride(dims_);
    if (layout_ == Layout::channels) s.channel *= 2 * o_.bins + o_.derivatives;
    return {p + (layout_ == Layout::separate ? 0 : i * o_.bins * step), s, step};
  }
  template <class T, class A, class Arguments> void inputs(Arguments& a) const {
    a.o = o_;
    a.x = pointer<T>(x_->tensor), a.x_strides = x_->strides;
    SplineParameters<const T>* const to[] = {&a.widths, &a.heights, &a.derivatives};
    for (int i = 0; i < 3; ++i) {
      const Input& in = given_[i] ? *given_[i] : *given_[0];
      *to[i] = parameters(i, pointer<T>(in.tensor), in.strides, in.tensor);
    }
    if (bound_) a.bound = pointer<A>(bound_->tensor), a.bound_strides = bound_->strides;
    if (circular_) a.circular = pointer<uint8_t>(circular_->tensor), a.circular_strides = circular_->strides;
    if (mask_) a.mask = pointer<uint8_t>(mask_->tensor), a.mask_strides = mask_->strides;
  }

  RationalQuadraticSplineOptions o_{};
  int64_t dims_, batch_dims_;
  Layout layout_;
  std::optional<Input> x_, given_[3], bound_, circular_, mask_;
  bool empty_;
};

// What the adapters of every device and spline have in common. run(y, logdet) fills both.
template <class Run>
std::tuple<Tensor, Tensor> spline_outputs(const RationalQuadraticSplineCall& call, const Tensor& x, Run run) {
  Output y(x, call.batch_dims(), call.dims());
  Tensor logdet = call.new_logdet();
  if (call.empty()) {
    torch::stable::copy_(y.result, x);
    return {y.result, torch::stable::zero_(logdet)};
  }
  run(y, logdet);
  return {y.finish(), logdet};
}
// run(dy, dlogdet, dx, gradients) fills the last two.
template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> spline_gradients(const RationalQuadraticSplineCall& call,
                                                            const std::optional<Tensor>& dy,
                                                            std::optional<Tensor> dlogdet, const Tensor& x, Run run) {
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
    run(dy_view, dlogdet, dx, gradients);
  }
  const auto finish = [&](std::optional<Output>& o) { return o ? o->finish() : torch::stable::new_empty(x, {0}); };
  return {dx.finish(), gradients.widths.finish(), finish(gradients.heights), finish(gradients.derivatives)};
}

}  // namespace pyflowgen
