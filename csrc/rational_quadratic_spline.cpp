// rational_quadratic_spline: schema and argument check.
#include <cmath>

#include "rational_quadratic_spline_call.h"

namespace pyflowgen {

int64_t rational_quadratic_spline_segments(const RationalQuadraticSplineOptions& o) {
  // Enough rows keep every core busy; few long ones are cut into pieces of some 1,024 elements.
  const int64_t elements = o.count * o.inner;
  return o.batch >= 8 || elements < 4096 ? 1 : (elements + 1023) / 1024;
}

RationalQuadraticSplineCall::RationalQuadraticSplineCall(PYFLOWGEN_SPLINE_PARAMETERS, int64_t degree)
    : dims_(x.dim()), batch_dims_(x.dim() - event_dim), layout_(Layout(layout)) {
  const auto check = [](bool fits, const char* what) { STD_TORCH_CHECK(fits, "rational_quadratic_spline: ", what); };
  check(event_dim >= 0 && event_dim <= dims_, "event_dim is not between 0 and x's dimensions");
  check(layout >= 0 && layout <= int64_t(Layout::channels), "unknown layout");
  check(convention >= 0 && convention <= int64_t(SplineConvention::freia), "unknown convention");
  check(tails >= 0 && tails <= int64_t(SplineTails::resized), "unknown tails");
  check((SplineConvention(convention) == SplineConvention::freia) == (tails > int64_t(SplineTails::mixed)),
        "convention freia has tails of its own");
  check(bins >= 2 && bins <= 64, "bins must be from 2 to 64");
  check(start >= 0 && step >= 1, "start or step is negative");
  check(heights.has_value() == (layout_ == Layout::separate) && heights.has_value() == derivatives.has_value(),
        "heights and derivatives come with separate parameters, and only then");
  check(degree == 0 || layout_ != Layout::separate, "polynomial splines take packed parameters");
  check(layout_ != Layout::channels || event_dim > 0, "this layout needs a channel dimension");
  o_.bins = bins;
  o_.tails = SplineTails(tails);
  const bool as_many = o_.tails == SplineTails::circular || o_.tails == SplineTails::resized;
  const int64_t more = o_.tails == SplineTails::linear ? -1 : as_many ? 0 : 1;
  o_.derivatives = degree == 1 ? -bins : degree == 2 ? more : degree == 3 ? 2 : bins + more;
  const int64_t each = 2 * bins + o_.derivatives, last = layout_ != Layout::channels;

  // Sizes of x in the batch and inner dimensions, `channels` in the channel dimension, then `more` dimensions.
  const auto has_shape = [&](const Tensor& t, int64_t channels, int64_t more) {
    bool fits = t.dim() == dims_ + more;
    for (int64_t d = 0; fits && d < dims_; ++d)
      fits = t.size(d) == (event_dim && d == batch_dims_ ? channels : x.size(d));
    return fits;
  };
  check(widths.dim() == dims_ + last, "widths has the wrong number of dimensions");
  const int64_t channels = event_dim ? widths.size(batch_dims_) : 1;
  check(last || channels % each == 0, "packed parameters do not divide into channels");
  o_.count = last ? channels : channels / each;
  o_.channels = event_dim ? x.size(batch_dims_) : 1;
  check(!event_dim || o_.count == 0 || start + (o_.count - 1) * step < o_.channels,
        "start, step and the parameters' channels reach beyond x's channels");
  const Tensor* const given[] = {&widths, heights ? &*heights : nullptr, derivatives ? &*derivatives : nullptr};
  const int64_t sizes[] = {layout_ == Layout::separate ? bins : each, bins, o_.derivatives};
  for (int i = 0; i < 3; ++i) {
    if (!given[i]) continue;
    check(given[i]->scalar_type() == x.scalar_type() && given[i]->device() == x.device(),
          "parameters must have x's dtype and device");
    check(has_shape(*given[i], channels, last) && (!last || given[i]->size(dims_) == sizes[i]),
          "parameters do not have the shape that x, bins, tails, layout, start and step ask for");
    given_[i].emplace(*given[i], batch_dims_, dims_);
  }
  x_.emplace(x, batch_dims_, dims_);

  o_.batch = o_.inner = 1;
  for (int64_t d = 0; d < batch_dims_; ++d) o_.batch *= x.size(d);
  for (int64_t d = batch_dims_ + 1; d < dims_; ++d) o_.inner *= x.size(d);
  const auto for_event = [&](const std::optional<Tensor>& t, int64_t first, ScalarType dtype, std::optional<Input>& to,
                             const char* what) {
    if (!t) return;
    bool fits = t->dim() == event_dim && t->scalar_type() == dtype && t->device() == x.device();
    for (int64_t d = 0; fits && d < event_dim; ++d) fits = t->size(d) == (d == 0 ? first : x.size(batch_dims_ + d));
    check(fits, what);
    to.emplace(*t, 0, event_dim);
    to->strides.batch = 0;
  };
  const auto wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for_event(bound, o_.count, wide, bound_,
            "bound must have the parameters' event shape, in the log-determinant's dtype");
  for_event(circular, o_.count, ScalarType::Bool, circular_, "circular must be bool, of the parameters' event shape");
  for_event(mask, o_.channels, ScalarType::Bool, mask_, "mask must be bool, of x's event shape, on x's device");
  check(!mask || o_.count == o_.channels, "a mask needs parameters for every channel");
  check(circular.has_value() == (o_.tails == SplineTails::mixed), "circular comes with mixed tails, and only then");
  o_.start = start, o_.step = step;
  o_.convention = SplineConvention(convention);
  o_.left = left, o_.right = right, o_.bottom = bottom, o_.top = top;
  o_.min_bin_width = min_bin_width, o_.min_bin_height = min_bin_height, o_.min_derivative = min_derivative;
  o_.edge = edge, o_.clip = clip, o_.scale = scale;
  if (o_.tails == SplineTails::affine) {
    check(!bound, "freia's interval has no bound");
    const auto shift = [&](double size, double least) {  // log(e^v - 1)
      const double v = size / double(bins) - least;
      return v + std::log(-std::expm1(-v));
    };
    o_.shift_width = shift(right - left, min_bin_width), o_.shift_height = shift(top - bottom, min_bin_height);
  }
  o_.inverse = inverse, o_.elementwise = event_dim == 0, o_.degree = degree;
  empty_ = x.numel() == 0 || widths.numel() == 0;
}

void RationalQuadraticSplineCall::check_gradients(const std::optional<Tensor>& dy, const std::optional<Tensor>& dlogdet,
                                                  const Tensor& x) const {
  if (dy) {
    bool fits = dy->dim() == dims_ && dy->scalar_type() == x.scalar_type() && dy->device() == x.device();
    for (int64_t d = 0; fits && d < dims_; ++d) fits = dy->size(d) == x.size(d);
    STD_TORCH_CHECK(fits, "rational_quadratic_spline_backward: dy must have x's shape, dtype and device");
  }
  if (dlogdet) {
    bool fits =
        dlogdet->dim() == batch_dims_ && dlogdet->device() == x.device() &&
        dlogdet->scalar_type() == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    for (int64_t d = 0; fits && d < batch_dims_; ++d) fits = dlogdet->size(d) == x.size(d);
    STD_TORCH_CHECK(
        fits,
        "rational_quadratic_spline_backward: dlogdet must have the batch's shape and the log-determinant's dtype");
  }
}

Tensor RationalQuadraticSplineCall::new_logdet() const {
  const auto dtype = x_->tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(x_->tensor, {x_->tensor.sizes().data(), size_t(batch_dims_)}, dtype);
}

}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_FRAGMENT(pyflowgen, m) {
  m.def(
      "rational_quadratic_spline(Tensor x, Tensor widths, Tensor? heights, Tensor? derivatives, Tensor? bound, Tensor? "
      "circular, Tensor? mask, int bins, int layout, int start, int step, int convention, int tails, float left, float "
      "right, float bottom, float top, float min_bin_width, float min_bin_height, float min_derivative, float edge, "
      "float clip, float scale, bool inverse, int event_dim) -> (Tensor, Tensor)");
  m.def(
      "rational_quadratic_spline_backward(Tensor? dy, Tensor? dlogdet, Tensor x, Tensor widths, Tensor? heights, "
      "Tensor? derivatives, Tensor? bound, Tensor? circular, Tensor? mask, int bins, int layout, int start, int step, "
      "int convention, int tails, float left, float right, float bottom, float top, float min_bin_width, float "
      "min_bin_height, float min_derivative, float edge, float clip, float scale, bool inverse, int event_dim) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
