// slogdet: schema and argument check.
#include "slogdet_call.h"

namespace pyflowgen {

SlogdetCall::SlogdetCall(const Tensor& a) : a_(a), batch_(1) {
  const int64_t dims = a.dim();
  STD_TORCH_CHECK(dims >= 2 && a.size(dims - 1) == a.size(dims - 2), "slogdet: a must be (*batch, n, n)");
  n_ = a.size(dims - 1);
  STD_TORCH_CHECK(n_ >= 1 && n_ <= slogdet_largest, "slogdet: the kernel takes n from 1 to ", slogdet_largest, ", got ",
                  n_);
  for (int64_t d = 0; d < dims - 2; ++d) batch_ *= a.size(d);
  if (!a.is_contiguous()) a_ = torch::stable::contiguous(a);
}

SlogdetCall::SlogdetCall(const Tensor& dlogabsdet, const Tensor& a) : SlogdetCall(a) {
  const int64_t dims = a.dim() - 2;
  bool fits =
      dlogabsdet.dim() == dims && dlogabsdet.device() == a.device() &&
      dlogabsdet.scalar_type() == (a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  for (int64_t d = 0; fits && d < dims; ++d) fits = dlogabsdet.size(d) == a.size(d);
  STD_TORCH_CHECK(fits, "slogdet_backward: dlogabsdet must have the batch's shape and the result's dtype");
  dlogabsdet_ = joint_stride(dlogabsdet, 0, dims) ? dlogabsdet : torch::stable::contiguous(dlogabsdet);
}

Tensor SlogdetCall::new_result() const {
  const auto dtype = a_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(a_, {a_.sizes().data(), size_t(a_.dim() - 2)}, dtype);
}

}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def("slogdet(Tensor a) -> (Tensor, Tensor)");
  m.def("slogdet_backward(Tensor dlogabsdet, Tensor a) -> Tensor");
}
