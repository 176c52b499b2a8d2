// Where an adapter's kernels run: the tensor's device made current, and torch's current stream on it.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace pyflowgen::cuda {

// The stream comes from torch's C shim, looked up when the first kernel runs: the library then needs neither a CUDA
// build of torch nor a driver to load. A CPU tensor, in the tests' build of these kernels for the CPU, has none.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& x) {
    if (!x.is_cuda()) return;
    guard_.emplace(x.get_device_index());
    static const auto current = lookup();
    STD_TORCH_CHECK(current != nullptr, "pyflowgen: this torch has no aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(current(x.get_device_index(), &stream_) == 0, "pyflowgen: torch gave no CUDA stream");
  }
  void* stream() const { return stream_; }

 private:
  using Current = int32_t (*)(int32_t device, void** stream);
  static Current lookup() {
    // torch loads libtorch_cuda for itself alone: ask that library by name, then everything that is visible.
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (!symbol) symbol = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Current>(symbol);
  }
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace pyflowgen::cuda
