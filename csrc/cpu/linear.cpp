// linear on the CPU: tensors to pointers, threads, registration.
#include "linear.h"

#include <algorithm>
#include <array>
#include <tuple>

#include "cpu/rows.h"

namespace pyflowgen {
namespace {

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(weight.dim() == 2, "linear: weight must be (out_features, in_features), got shape ",
                  shape_of(weight));
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), "linear: x of shape ", shape_of(x),
                  " must end in in_features = ", weight.size(1), " of weight ", shape_of(weight));
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "linear: bias must have shape (",
                  weight.size(0), ",), got ", bias ? shape_of(*bias) : "");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type() && (!bias || x.scalar_type() == bias->scalar_type()),
                  "linear: x, weight and bias must have one dtype");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "linear: the kernel takes float32 and float64");
}

template <class T> Tensor pack(const Tensor& weight) {
  const int64_t out_features = weight.size(0), in = weight.size(1);
  const Tensor packed = empty({PYFLOWGEN_CALL(linear_packed_size<T>, in, out_features)}, weight);
  const int64_t tasks = PYFLOWGEN_CALL(linear_pack_tasks<T>, out_features),
                threads = threads_for(8 * in * out_features);
  in_threads(threads, [&](int64_t i) {
    PYFLOWGEN_CALL(linear_pack<T>, in, out_features, data<T>(weight), out<T>(packed), tasks * i / threads,
                   tasks * (i + 1) / threads);
  });
  return packed;
}

template <class T> void forward(const Rows& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                Activation activation, const Tensor* packed, const Tensor& y, const Tensor* before) {
  const int64_t out_features = weight.size(0), in = weight.size(1);
  const T* panels = nullptr;
  if (packed && packed->numel() == PYFLOWGEN_CALL(linear_packed_size<T>, in, out_features) &&
      packed->scalar_type() == weight.scalar_type() &&
      PYFLOWGEN_CALL(linear_pack_matches<T>, in, out_features, data<T>(weight), data<T>(*packed)))
    panels = data<T>(*packed);
  LinearForward<T> o{x.count,
                     in,
                     out_features,
                     threads_for(x.count * in * out_features),
                     data<T>(x.x),
                     x.stride,
                     data<T>(weight),
                     panels,
                     bias ? data<T>(*bias) : nullptr,
                     activation,
                     out<T>(y),
                     before ? out<T>(*before) : nullptr};
  const int64_t tasks = PYFLOWGEN_CALL(linear_tasks<T>, o);
  in_threads(o.threads,
             [&](int64_t i) { PYFLOWGEN_CALL(linear<T>, o, tasks * i / o.threads, tasks * (i + 1) / o.threads); });
}

template <class T> void backward(const Tensor& dy, const Rows& x, const Tensor& weight, const Tensor* saved,
                                 const Tensor* dz, Activation activation, const Tensor* dx, const Tensor* dweight,
                                 const Tensor* dbias) {
  const int64_t out_features = weight.size(0), in = weight.size(1), count = x.count * out_features;
  if (dz) {
    const int64_t threads = threads_for(8 * count);
    in_threads(threads, [&](int64_t i) {
      const int64_t begin = count * i / threads, end = count * (i + 1) / threads;
      PYFLOWGEN_CALL(linear_activation_backward<T>, activation, end - begin, data<T>(dy) + begin,
                     data<T>(*saved) + begin, out<T>(*dz) + begin);
    });
  }
  LinearBackward<T> o{x.count,
                      in,
                      out_features,
                      threads_for((int(bool(dx)) + bool(dweight)) * count * in),
                      data<T>(dz ? *dz : dy),
                      data<T>(x.x),
                      x.stride,
                      data<T>(weight),
                      dx ? out<T>(*dx) : nullptr,
                      dweight ? out<T>(*dweight) : nullptr,
                      dbias ? out<T>(*dbias) : nullptr};
  const int64_t dx_tasks = dx ? PYFLOWGEN_CALL(linear_dx_tasks<T>, o) : 0;
  const int64_t dweight_tasks = dweight ? PYFLOWGEN_CALL(linear_dweight_tasks<T>, o) : 0;
  const int64_t dbias_tasks = dbias ? PYFLOWGEN_CALL(linear_dbias_tasks<T>, o) : 0;
  // Every thread takes its part of each product, so that one wake-up serves all three.
  in_threads(o.threads, [&](int64_t i) {
    const auto from = [&](int64_t tasks) { return tasks * i / o.threads; };
    const auto to = [&](int64_t tasks) { return tasks * (i + 1) / o.threads; };
    if (dx) PYFLOWGEN_CALL(linear_dx<T>, o, from(dx_tasks), to(dx_tasks));
    if (dweight) PYFLOWGEN_CALL(linear_dweight<T>, o, from(dweight_tasks), to(dweight_tasks));
    if (dbias) PYFLOWGEN_CALL(linear_dbias<T>, o, from(dbias_tasks), to(dbias_tasks));
  });
}

Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(0 <= code && code < activations, "linear: there is no activation ", code);
  return Activation(code);
}

Tensor empty_result(const Tensor& x, int64_t out_features) {
  std::array<int64_t, 64> sizes;  // torch's own limit on dimensions
  const auto from = x.sizes();
  std::copy(from.begin(), from.end(), sizes.begin());
  sizes[x.dim() - 1] = out_features;
  return empty(sizes.data(), x.dim(), x);
}

Tensor run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation,
           const std::optional<Tensor>& packed, const Tensor* before) {
  const Tensor y = empty_result(x, weight.size(0));
  const Rows rows = rows_of(x, weight.size(1));
  (x.scalar_type() == ScalarType::Float ? forward<float> : forward<double>)(rows, dense(weight),
                                                                            bias ? std::optional(dense(*bias)) : bias,
                                                                            activation_of(activation),
                                                                            packed ? &*packed : nullptr, y, before);
  return y;
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t activation, std::optional<Tensor> packed) {
  check(x, weight, bias);
  return run(x, weight, bias, activation, packed, nullptr);
}

std::tuple<Tensor, Tensor> linear_keep(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t activation,
                                       std::optional<Tensor> packed) {
  check(x, weight, bias);
  const Tensor before = empty_result(x, weight.size(0));
  const Tensor y = run(x, weight, bias, activation, packed, &before);
  return {y, before};
}

Tensor linear_pack(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "linear_pack: weight must be (out_features, in_features), got ", shape_of(weight));
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::Double,
                  "linear_pack: the kernel takes float32 and float64");
  return (weight.scalar_type() == ScalarType::Float ? pack<float> : pack<double>)(dense(weight));
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> saved,
                                                   int64_t code, bool need_dx, bool need_dweight, bool need_dbias) {
  const Activation activation = activation_of(code);
  check(x, weight, std::nullopt);
  const int64_t out_features = weight.size(0), in = weight.size(1);
  const Rows rows = rows_of(x, in);
  STD_TORCH_CHECK(dy.numel() == rows.count * out_features && dy.scalar_type() == x.scalar_type(),
                  "linear_backward: dy of shape ", shape_of(dy), " does not fit x ", shape_of(x), " and weight ",
                  shape_of(weight));
  const bool acts = activation != Activation::none;
  STD_TORCH_CHECK(!acts || (saved && saved->numel() == dy.numel() && saved->scalar_type() == x.scalar_type()),
                  "linear_backward: saved must have dy's shape ", shape_of(dy));
  dy = dense(dy);
  weight = dense(weight);
  if (acts) saved = dense(*saved);
  const Tensor dx = need_dx ? empty(x.sizes().data(), x.dim(), x) : empty({0}, x);
  const Tensor dweight = need_dweight ? empty({out_features, in}, x) : empty({0}, x);
  const Tensor dbias = need_dbias ? empty({out_features}, x) : empty({0}, x);
  std::optional<Tensor> dz;
  if (acts) dz = empty({rows.count, out_features}, x);
  (x.scalar_type() == ScalarType::Float
       ? backward<float>
       : backward<double>)(dy, rows, weight, acts ? &*saved : nullptr, dz ? &*dz : nullptr, activation,
                           need_dx ? &dx : nullptr, need_dweight ? &dweight : nullptr, need_dbias ? &dbias : nullptr);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_keep", TORCH_BOX(&linear_keep));
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace pyflowgen
