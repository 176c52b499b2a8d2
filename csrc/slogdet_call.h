// slogdet: from the operator's arguments to the contract of slogdet.h, the same for every device.
#pragma once

#include "slogdet.h"
#include "tensor_view.h"

namespace pyflowgen {

class SlogdetCall {
 public:
  // Checks every argument; throws before anything is allocated.
  explicit SlogdetCall(const Tensor& a);
  SlogdetCall(const Tensor& dlogabsdet, const Tensor& a);

  bool empty() const { return batch_ == 0; }
  int64_t batch() const { return batch_; }
  int64_t n() const { return n_; }
  // Of the batch's shape; float64 for float64, float32 for the rest.
  Tensor new_result() const;
  // Of a's shape, dense.
  Tensor new_gradient() const { return torch::stable::new_empty(a_, a_.sizes()); }

  template <class T, class A> SlogdetForward<T, A> forward(Tensor& sign, Tensor& logabsdet) const {
    return {batch_, n_, static_cast<const T*>(a_.const_data_ptr()), static_cast<A*>(sign.mutable_data_ptr()),
            static_cast<A*>(logabsdet.mutable_data_ptr())};
  }
  template <class T, class A> SlogdetBackward<T, A> backward(Tensor& da) const {
    return {batch_,
            n_,
            static_cast<const A*>(dlogabsdet_->const_data_ptr()),
            *joint_stride(*dlogabsdet_, 0, dlogabsdet_->dim()),
            static_cast<const T*>(a_.const_data_ptr()),
            static_cast<T*>(da.mutable_data_ptr())};
  }

 private:
  Tensor a_;
  std::optional<Tensor> dlogabsdet_;
  int64_t batch_, n_;
};

}  // namespace pyflowgen
