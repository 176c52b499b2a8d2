// From tensors to the raw-pointer contracts: any strided tensor as (batch, channels, inner), copied only when it has no
// such view. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "storage.h"
#include "strides.h"

namespace pyflowgen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Stride of dimensions [first, last) seen as one, or nothing when they cannot be.
inline std::optional<int64_t> joint_stride(const Tensor& t, int64_t first, int64_t last) {
  int64_t stride = 0, next = 0;  // next: the stride that continues the dimensions seen so far, innermost first
  bool any = false;
  for (int64_t d = last - 1; d >= first; --d) {
    if (t.size(d) == 1) continue;
    if (!any) stride = t.stride(d), any = true;
    else if (t.stride(d) != next) return std::nullopt;
    next = t.stride(d) * t.size(d);
  }
  return stride;
}

// Dimensions [0, batch_dims) are the batch, the next the channel, those up to `dims` inner; further ones are left
// alone.
inline std::optional<Strides> view3(const Tensor& t, int64_t batch_dims, int64_t dims) {
  const auto batch = joint_stride(t, 0, batch_dims);
  if (dims == batch_dims) return batch ? std::optional(Strides{*batch, 0, 0}) : std::nullopt;
  const auto inner = joint_stride(t, batch_dims + 1, dims);
  if (!batch || !inner) return std::nullopt;
  return Strides{*batch, t.stride(batch_dims), *inner};
}

// A tensor the kernel reads: itself, or a contiguous copy when it has no (batch, channels, inner) view.
struct Input {
  Tensor tensor;
  Strides strides;
  Input(const Tensor& given, int64_t batch_dims, int64_t dims) : tensor(given) {
    auto view = view3(tensor, batch_dims, dims);
    if (!view) {
      tensor = torch::stable::contiguous(given);
      view = view3(tensor, batch_dims, dims);
    }
    strides = *view;
  }
};

// A tensor the kernel writes, allocated like `like`; finish() copies where its strides admit no such view.
struct Output {
  Tensor result, written;
  Strides strides;
  Output(const Tensor& like, int64_t batch_dims, int64_t dims)
      : result(torch::stable::empty_like(like)), written(result) {
    auto view = view3(result, batch_dims, dims);
    if (!view) {
      written = torch::stable::new_empty(result, result.sizes());
      view = view3(written, batch_dims, dims);
    }
    strides = *view;
  }
  Tensor finish() {
    if (written.get() != result.get()) torch::stable::copy_(result, written);
    return result;
  }
};

// Call f<T, A>() with the storage type of the dtype and the type its log-determinants are kept in.
template <class F> auto with_dtype(ScalarType dtype, const char* op, F f) {
  switch (dtype) {
    case ScalarType::Float: return f.template operator()<float, float>();
    case ScalarType::Double: return f.template operator()<double, double>();
    case ScalarType::BFloat16: return f.template operator()<bf16, float>();
    case ScalarType::Half: return f.template operator()<f16, float>();
    default: STD_TORCH_CHECK(false, op, ": x must be float64, float32, bfloat16 or float16");
  }
}

}  // namespace pyflowgen
