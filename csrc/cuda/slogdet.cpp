// slogdet on CUDA: tensors to pointers, the current stream, registration.
#include "cuda/stream.h"
#include "slogdet_call.h"

// The tests build these launchers for the CPU, and register them there.
#ifndef PYFLOWGEN_CUDA_KEY
#define PYFLOWGEN_CUDA_KEY CUDA
#endif

namespace pyflowgen::cuda {
namespace {

std::tuple<Tensor, Tensor> forward(Tensor a) {
  const OnDevice device(a);
  const SlogdetCall call(a);
  Tensor sign = call.new_result(), logabsdet = call.new_result();
  if (!call.empty())
    with_dtype(a.scalar_type(), "slogdet",
               [&]<class T, class A>() { slogdet(call.forward<T, A>(sign, logabsdet), device.stream()); });
  return {sign, logabsdet};
}

Tensor backward(Tensor dlogabsdet, Tensor a) {
  const OnDevice device(a);
  const SlogdetCall call(dlogabsdet, a);
  Tensor da = call.new_gradient();
  if (!call.empty())
    with_dtype(a.scalar_type(), "slogdet_backward",
               [&]<class T, class A>() { slogdet_backward(call.backward<T, A>(da), device.stream()); });
  return da;
}

}  // namespace
}  // namespace pyflowgen::cuda

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, PYFLOWGEN_CUDA_KEY, m) {
  m.impl("slogdet", TORCH_BOX(&pyflowgen::cuda::forward));
  m.impl("slogdet_backward", TORCH_BOX(&pyflowgen::cuda::backward));
}
