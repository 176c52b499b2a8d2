// affine_coupling: from the operator's arguments to the contract of affine_coupling.h, the same for every device.
#pragma once

#include <utility>

#include "affine_coupling.h"
#include "tensor_view.h"

namespace pyflowgen {

// In the order of the operator's `layout` argument: where shift and log_scale are.
enum class Layout : int64_t {
  separate,
  halves,
  interleaved,
  pairs,
  halves_scale_first,
  interleaved_scale_first,
  pairs_scale_first
};

class AffineCouplingCall {
 public:
  // Checks every argument; throws before anything is allocated.
  AffineCouplingCall(const Tensor& x, const Tensor& params, const std::optional<Tensor>& log_scale,
                     const std::optional<Tensor>& mask, int64_t layout, int64_t start, int64_t step, int64_t scale,
                     double clamp, double gain, bool shift_first, bool inverse, int64_t event_dim);

  bool empty() const { return empty_; }
  const AffineCouplingOptions& options() const { return o_; }
  // Dimensions of the batch, and of batch and event.
  int64_t batch_dims() const { return batch_dims_; }
  int64_t dims() const { return dims_; }
  // Gradients of the outputs: y's shape and x's dtype, the batch's shape and the log-determinant's dtype.
  void check_gradients(const std::optional<Tensor>& dy, const std::optional<Tensor>& dlogdet, const Tensor& x) const;
  // float64 for float64, float32 for the rest.
  Tensor new_logdet() const;

  template <class T, class A> AffineCouplingForward<T, A> forward(Output& y, Tensor& logdet) const {
    return {o_,
            pointer<T>(x_.tensor),
            x_.strides,
            shift_pointer<T>(),
            shift_strides(params_.strides),
            log_scale_pointer<T>(),
            log_scale_strides(),
            mask_pointer(),
            mask_strides(),
            static_cast<T*>(y.written.mutable_data_ptr()),
            y.strides,
            static_cast<A*>(logdet.mutable_data_ptr())};
  }

  // `zero` is read with strides 0 in the place of an absent dy or dlogdet (CPU), or null (CUDA).
  template <class T, class A> AffineCouplingBackward<T, A> backward(const std::optional<Input>& dy,
                                                                    const std::optional<Tensor>& dlogdet,
                                                                    const void* zero, Output& dx, Output& dparams,
                                                                    std::optional<Output>& dlog_scale) const {
    AffineCouplingBackward<T, A> a{};
    a.o = o_;
    a.dy = dy ? pointer<T>(dy->tensor) : static_cast<const T*>(zero);
    a.dy_strides = dy ? dy->strides : Strides{0, 0, 0};
    a.dlogdet = dlogdet ? pointer<A>(*dlogdet) : static_cast<const A*>(zero);
    a.dlogdet_stride = dlogdet ? *joint_stride(*dlogdet, 0, batch_dims_) : 0;
    a.x = pointer<T>(x_.tensor), a.x_strides = x_.strides;
    a.shift = shift_pointer<T>(), a.shift_strides = shift_strides(params_.strides);
    a.log_scale = log_scale_pointer<T>(), a.log_scale_strides = log_scale_strides();
    a.mask = mask_pointer(), a.mask_strides = mask_strides();
    a.dx = static_cast<T*>(dx.written.mutable_data_ptr()), a.dx_strides = dx.strides;
    a.dshift = static_cast<T*>(dparams.written.mutable_data_ptr()), a.dshift_strides = shift_strides(dparams.strides);
    if (layout_ != Layout::separate) {
      a.dlog_scale = a.dshift + second(dparams.written, dparams.strides), a.dlog_scale_strides = a.dshift_strides;
      if (scale_first_) std::swap(a.dshift, a.dlog_scale);
    } else if (dlog_scale) {
      a.dlog_scale = static_cast<T*>(dlog_scale->written.mutable_data_ptr()),
      a.dlog_scale_strides = dlog_scale->strides;
    }
    return a;
  }

 private:
  template <class T> static const T* pointer(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
  Strides shift_strides(Strides s) const {
    return {s.batch, layout_ == Layout::interleaved ? 2 * s.channel : s.channel, s.inner};
  }
  // Where the second of the two begins within packed parameters.
  int64_t second(const Tensor& params, Strides s) const {
    return layout_ == Layout::halves        ? o_.count * s.channel
           : layout_ == Layout::interleaved ? s.channel
                                            : params.stride(dims_);
  }
  template <class T> const T* packed_pointer(bool at_second) const {
    return pointer<T>(params_.tensor) + (at_second ? second(params_.tensor, params_.strides) : 0);
  }
  template <class T> const T* shift_pointer() const { return packed_pointer<T>(scale_first_); }
  template <class T> const T* log_scale_pointer() const {
    if (layout_ != Layout::separate) return packed_pointer<T>(!scale_first_);
    return log_scale_ ? pointer<T>(log_scale_->tensor) : nullptr;
  }
  Strides log_scale_strides() const {
    return layout_ != Layout::separate ? shift_strides(params_.strides) : log_scale_ ? log_scale_->strides : Strides{};
  }
  const uint8_t* mask_pointer() const { return mask_ ? pointer<uint8_t>(mask_->tensor) : nullptr; }
  Strides mask_strides() const { return mask_ ? mask_->strides : Strides{}; }

  AffineCouplingOptions o_{};  // first: filled while the tensors are checked
  int64_t dims_, batch_dims_;
  bool scale_first_;
  Layout layout_;  // the same with the shift first
  Input x_, params_;
  std::optional<Input> log_scale_, mask_;
  bool empty_;
};

}  // namespace pyflowgen
