// invertible_linear: schema, argument check, and how pixels are cut into chunks.
#include <algorithm>
#include <array>

#include "invertible_linear_call.h"

namespace pyflowgen {

int64_t invertible_linear_chunk(const InvertibleLinearSizes& n) {
  // Three buffers of a chunk stay in the second-level cache; a gradient's lanes are added up once a chunk.
  const int64_t most = std::clamp<int64_t>(16384 / n.channels / 64 * 64, 64, 1024);
  if (n.inner < 128) return most;
  const int64_t pieces = (n.inner + most - 1) / most;
  return std::min(n.inner, ((n.inner + pieces - 1) / pieces + 63) / 64 * 64);
}
int64_t invertible_linear_chunks(const InvertibleLinearSizes& n) {
  const int64_t size = invertible_linear_chunk(n);
  if (size <= n.inner) return n.batch * ((n.inner + size - 1) / size);
  return (n.batch * n.inner + size - 1) / size;
}
int64_t invertible_linear_scratch(const InvertibleLinearSizes& n) {
  return 3 * n.channels * ((invertible_linear_chunk(n) + 15) / 16 * 16);
}

InvertibleLinearCall::InvertibleLinearCall(const Tensor& x, const Tensor& weight,
                                           const std::optional<Tensor>& log_scale, const std::optional<Tensor>& shift,
                                           const std::optional<Tensor>& permutation, const std::optional<Tensor>& sign,
                                           int64_t head, int64_t event_dim)
    : x_(x), head_(head), batch_dims_(x.dim() - event_dim) {
  STD_TORCH_CHECK(event_dim >= 1 && event_dim <= x.dim(),
                  "invertible_linear: event_dim is not between 1 and x's dimensions");
  for (int64_t d = 0; d < batch_dims_; ++d) batch_ *= x.size(d);
  for (int64_t d = batch_dims_ + 1; d < x.dim(); ++d) positions_ *= x.size(d);
  n_ = {positions_ == 1 ? 1 : batch_, x.size(batch_dims_), positions_ == 1 ? batch_ : positions_};
  STD_TORCH_CHECK(n_.channels >= 1 && n_.channels <= invertible_linear_channels,
                  "invertible_linear: the kernel takes 1 to 64 channels");
  STD_TORCH_CHECK(head >= 0 && head <= n_.channels,
                  "invertible_linear: head is not between 0 and x's channels, or not 0 for the inverse");
  STD_TORCH_CHECK(permutation.has_value() == sign.has_value(), "invertible_linear: permutation and sign come together");
  const auto check = [&](const Tensor& t, int64_t dim, ScalarType dtype, const char* name) {
    bool fits = t.dim() == dim && t.scalar_type() == dtype && t.device() == x.device();
    for (int64_t d = 0; fits && d < dim; ++d) fits = t.size(d) == n_.channels;
    STD_TORCH_CHECK(fits, "invertible_linear: ", name, " must have x's dtype, device and channels");
  };
  check(weight, 2, x.scalar_type(), "weight");
  if (log_scale) check(*log_scale, 1, x.scalar_type(), "log_scale");
  if (shift) check(*shift, 1, x.scalar_type(), "shift");
  if (sign) check(*sign, 1, x.scalar_type(), "sign");
  if (permutation) check(*permutation, 1, ScalarType::Long, "permutation");
}

void InvertibleLinearCall::check_gradients(const std::optional<Tensor>& dy, const std::optional<Tensor>& dlogdet,
                                           const std::optional<Tensor>& dpart) const {
  const auto fits = [&](const Tensor& t, int64_t dims, int64_t channels, ScalarType dtype) {
    bool good = t.dim() == dims && t.scalar_type() == dtype && t.device() == x_.device();
    for (int64_t d = 0; good && d < dims; ++d) good = t.size(d) == (d == batch_dims_ ? channels : x_.size(d));
    return good;
  };
  STD_TORCH_CHECK(!dy || fits(*dy, x_.dim(), n_.channels, x_.scalar_type()),
                  "invertible_linear_backward: dy must have y's shape and dtype");
  STD_TORCH_CHECK(!dpart || (dpart->dim() == x_.dim() && dpart->size(batch_dims_) <= n_.channels &&
                             fits(*dpart, x_.dim(), dpart->size(batch_dims_), x_.scalar_type())),
                  "invertible_linear_backward: dpart must have y's dtype and shape but for the channels");
  const auto dtype = x_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(!dlogdet || fits(*dlogdet, batch_dims_, 0, dtype),
                  "invertible_linear_backward: dlogdet must have the batch's shape and the log-determinant's dtype");
}

Tensor InvertibleLinearCall::empty(const int64_t* sizes, const int64_t* strides, int64_t dims,
                                   ScalarType dtype) const {  // a fifth of the time of a call by the dispatcher
  int32_t type, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x_.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x_.get(), &device));
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, code, type, device, &handle));
  return Tensor(handle);
}
Tensor InvertibleLinearCall::empty(std::initializer_list<int64_t> sizes) const {
  const int64_t strides[] = {sizes.size() == 2 ? sizes.begin()[1] : 1, 1};
  return empty(sizes.begin(), strides, int64_t(sizes.size()), x_.scalar_type());
}

Tensor InvertibleLinearCall::new_logdet() const {
  std::array<int64_t, 64> strides;  // torch's own limit on dimensions
  int64_t stride = 1;
  for (int64_t d = batch_dims_ - 1; d >= 0; --d) strides[d] = stride, stride *= std::max<int64_t>(1, x_.size(d));
  const auto dtype = x_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return empty(x_.sizes().data(), strides.data(), batch_dims_, dtype);
}

Tensor InvertibleLinearCall::new_part() const {
  if (!head_) return empty({0});
  std::array<int64_t, 64> sizes, strides;
  int64_t stride = head_;
  for (int64_t d = x_.dim() - 1; d >= 0; --d) {
    sizes[d] = d == batch_dims_ ? head_ : x_.size(d);
    strides[d] = d == batch_dims_ ? 1 : stride;
    if (d != batch_dims_) stride *= std::max<int64_t>(1, sizes[d]);
  }
  return empty(sizes.data(), strides.data(), x_.dim(), x_.scalar_type());
}

}  // namespace pyflowgen

// permutation and sign: weight is packed L U. part: y's first `head` channels, in a tensor of their own.
// linear_backward takes as x the data's side of the map, which for the inverse is what it returned.
STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "invertible_linear(Tensor x, Tensor weight, Tensor? log_scale, Tensor? shift, Tensor? permutation, Tensor? sign, "
      "int head, bool inverse, int event_dim) -> (Tensor, Tensor, Tensor)");
  m.def(
      "invertible_linear_backward(Tensor? dy, Tensor? dlogdet, Tensor? dpart, Tensor x, Tensor weight, Tensor? "
      "log_scale, Tensor? shift, Tensor? permutation, Tensor? sign, bool inverse, int event_dim) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
}
