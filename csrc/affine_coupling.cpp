// affine_coupling: schema and argument check.
#include "affine_coupling_call.h"

namespace pyflowgen {

int64_t affine_coupling_segments(const AffineCouplingOptions& o) {
  // Enough rows keep every core busy; few long ones are cut into pieces of 16,384 elements.
  const int64_t elements = o.count * o.inner;
  return o.batch >= 8 || elements < 65536 ? 1 : (elements + 16383) / 16384;
}

namespace {
void check_same(const Tensor& x, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.device() == x.device(), "affine_coupling: ", name,
                  " must have x's dtype and device");
}

// Sizes of x in the batch and inner dimensions, `channels` in the channel dimension.
void check_shape(const Tensor& x, const Tensor& t, int64_t batch_dims, int64_t channels, bool pairs, const char* name) {
  bool fits = t.dim() == x.dim() + pairs;
  for (int64_t d = 0; fits && d < x.dim(); ++d) fits = t.size(d) == (d == batch_dims ? channels : x.size(d));
  STD_TORCH_CHECK(fits && (!pairs || t.size(x.dim()) == 2), "affine_coupling: ", name,
                  " does not have the shape that x, layout, start and step ask for");
}
}  // namespace

AffineCouplingCall::AffineCouplingCall(const Tensor& x, const Tensor& params, const std::optional<Tensor>& log_scale,
                                       const std::optional<Tensor>& mask, int64_t layout, int64_t start, int64_t step,
                                       int64_t scale, double clamp, double gain, bool shift_first, bool inverse,
                                       int64_t event_dim)
    : dims_(x.dim()),
      batch_dims_(x.dim() - event_dim),
      scale_first_(layout > int64_t(Layout::pairs)),
      layout_(Layout(scale_first_ ? layout - int64_t(Layout::pairs) : layout)),
      x_([&] {
        STD_TORCH_CHECK(event_dim >= 0 && event_dim <= x.dim(),
                        "affine_coupling: event_dim is not between 0 and x's dimensions");
        STD_TORCH_CHECK(layout >= 0 && layout <= int64_t(Layout::pairs_scale_first), "affine_coupling: unknown layout");
        STD_TORCH_CHECK(scale >= 0 && scale <= int64_t(AffineScale::softplus), "affine_coupling: unknown scale");
        STD_TORCH_CHECK(start >= 0 && step >= 1, "affine_coupling: start or step is negative");
        check_same(x, params, "shift");
        return Input(x, batch_dims_, dims_);
      }()),
      params_([&] {
        const bool pairs = layout_ == Layout::pairs,
                   on_channels = layout_ == Layout::halves || layout_ == Layout::interleaved;
        STD_TORCH_CHECK(params.dim() == x.dim() + pairs, "affine_coupling: shift has the wrong number of dimensions");
        STD_TORCH_CHECK(!on_channels || event_dim > 0, "affine_coupling: this layout needs a channel dimension");
        const int64_t channels = event_dim ? params.size(batch_dims_) : 1;
        STD_TORCH_CHECK(!on_channels || channels % 2 == 0,
                        "affine_coupling: packed parameters need an even number of channels");
        o_.count = on_channels ? channels / 2 : channels;
        STD_TORCH_CHECK(event_dim == 0 || o_.count == 0 || start + (o_.count - 1) * step < x.size(batch_dims_),
                        "affine_coupling: start, step and the parameters' channels reach beyond x's channels");
        check_shape(x, params, event_dim ? batch_dims_ : -1, channels, pairs, "shift");
        return Input(params, batch_dims_, dims_);
      }()),
      empty_(x.numel() == 0 || params.numel() == 0) {
  STD_TORCH_CHECK((layout_ == Layout::separate) == (log_scale.has_value() || scale == 0),
                  "affine_coupling: log_scale comes with separate parameters and a scale, and only then");
  if (log_scale) {
    check_same(x, *log_scale, "log_scale");
    check_shape(x, *log_scale, event_dim ? batch_dims_ : -1, o_.count, false, "log_scale");
    log_scale_.emplace(*log_scale, batch_dims_, dims_);
  }
  o_.batch = o_.inner = 1;
  for (int64_t d = 0; d < batch_dims_; ++d) o_.batch *= x.size(d);
  o_.channels = event_dim ? x.size(batch_dims_) : 1;
  for (int64_t d = batch_dims_ + 1; d < dims_; ++d) o_.inner *= x.size(d);
  if (mask) {
    bool fits = mask->dim() == event_dim && mask->scalar_type() == ScalarType::Bool && mask->device() == x.device() &&
                o_.count == o_.channels;
    for (int64_t d = 0; fits && d < event_dim; ++d) fits = mask->size(d) == x.size(batch_dims_ + d);
    STD_TORCH_CHECK(
        fits,
        "affine_coupling: mask must be bool, of x's event shape, on x's device, with parameters for every channel");
    mask_.emplace(*mask, 0, event_dim);
    mask_->strides.batch = 0;
  }
  o_.start = start, o_.step = step;
  o_.scale = AffineScale(scale), o_.clamp = clamp, o_.gain = gain;
  o_.shift_first = shift_first, o_.inverse = inverse;
  o_.elementwise = event_dim == 0;
}

void AffineCouplingCall::check_gradients(const std::optional<Tensor>& dy, const std::optional<Tensor>& dlogdet,
                                         const Tensor& x) const {
  if (dy) {
    check_same(x, *dy, "dy");
    check_shape(x, *dy, -1, 0, false, "dy");
  }
  if (dlogdet) {
    bool fits =
        dlogdet->dim() == batch_dims_ && dlogdet->device() == x.device() &&
        dlogdet->scalar_type() == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    for (int64_t d = 0; fits && d < batch_dims_; ++d) fits = dlogdet->size(d) == x.size(d);
    STD_TORCH_CHECK(fits,
                    "affine_coupling_backward: dlogdet must have the batch's shape and the log-determinant's dtype");
  }
}

Tensor AffineCouplingCall::new_logdet() const {
  const auto dtype = x_.tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(x_.tensor, {x_.tensor.sizes().data(), size_t(batch_dims_)}, dtype);
}

}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "affine_coupling(Tensor x, Tensor params, Tensor? log_scale, Tensor? mask, int layout, int start, int step, int "
      "scale, float clamp, float gain, "
      "bool shift_first, bool inverse, int event_dim) -> (Tensor, Tensor)");
  m.def(
      "affine_coupling_backward(Tensor? dy, Tensor? dlogdet, Tensor x, Tensor params, Tensor? log_scale, Tensor? mask, "
      "int layout, int start, "
      "int step, int scale, float clamp, float gain, bool shift_first, bool inverse, int event_dim) -> (Tensor, "
      "Tensor, Tensor)");
}
