// Dense CPU tensors and torch's threads, as the adapters of matrix products use them. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

namespace pyflowgen {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

inline std::string shape_of(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

// A dense CPU tensor; the direct call costs a fifth of one through the dispatcher.
inline Tensor empty(const int64_t* sizes, int64_t dim, const Tensor& like) {
  std::vector<int64_t> strides(dim, 1);
  for (int64_t i = dim - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(1, sizes[i + 1]);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like) {
  return empty(sizes.begin(), int64_t(sizes.size()), like);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <class T> const T* data(const Tensor& t) { return static_cast<const T*>(t.data_ptr()); }
template <class T> T* out(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

// Below so many multiply-adds a thread, waking it costs more than it saves.
inline constexpr int64_t work_per_thread = 1 << 19;

inline int64_t threads_for(int64_t work) {
  if (work < 2 * work_per_thread) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), work / work_per_thread);
}

// f(part) for part = 0 .. threads - 1.
template <class F> void in_threads(int64_t threads, const F& f) {
  if (threads == 1) return f(0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace pyflowgen
