// invertible_linear: from the operator's arguments to the contract of invertible_linear.h, the same for every device.
#pragma once

#include "invertible_linear.h"
#include "tensor_view.h"

namespace pyflowgen {

class InvertibleLinearCall {
 public:
  // Checks every argument; throws before anything is allocated.
  InvertibleLinearCall(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& log_scale,
                       const std::optional<Tensor>& shift, const std::optional<Tensor>& permutation,
                       const std::optional<Tensor>& sign, int64_t head, int64_t event_dim);
  void check_gradients(const std::optional<Tensor>& dy, const std::optional<Tensor>& dlogdet,
                       const std::optional<Tensor>& dpart) const;

  // As the kernels see it: where an event has one position, the batch takes the place of the positions.
  const InvertibleLinearSizes& sizes() const { return n_; }
  int64_t positions() const { return positions_; }
  int64_t batch() const { return batch_; }
  int64_t batch_dims() const { return batch_dims_; }
  int64_t dims() const { return x_.dim(); }
  // Uninitialised, on x's device, of its dtype where none is given.
  Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype) const;
  Tensor empty(std::initializer_list<int64_t> sizes) const;
  Tensor new_logdet() const;
  // The first `head` channels of an output: channels last where the event is an image.
  Tensor new_part() const;

  template <class T> Image<const T> image(const Input& t) const {
    return {static_cast<const T*>(t.tensor.const_data_ptr()), seen(t.strides)};
  }
  template <class T> Image<T> image(Output& t) const {
    return {static_cast<T*>(t.written.mutable_data_ptr()), seen(t.strides)};
  }
  template <class T> Image<T> image(Tensor& part) const {
    return {static_cast<T*>(part.mutable_data_ptr()), seen(*view3(part, batch_dims_, part.dim()))};
  }

 private:
  Strides seen(Strides s) const { return positions_ == 1 ? Strides{0, s.channel, s.batch} : s; }

  Tensor x_;
  int64_t head_, batch_dims_, batch_ = 1, positions_ = 1;
  InvertibleLinearSizes n_{1, 0, 1};
};

}  // namespace pyflowgen
