// slogdet on the CPU: threads and registration.
#include "slogdet_call.h"

namespace pyflowgen {
namespace {

// Threads share groups of so many matrices, whole packs of every instruction set; `operations` are worth a thread.
constexpr int64_t group = 8, operations = 65536;

// f(begin, end) over the matrices of a batch, each of n^3 operations.
template <class F> void in_threads(int64_t batch, int64_t n, F f) {
  const int64_t cost = group * n * n * (n + 8);
  torch::stable::parallel_for(
      0, (batch + group - 1) / group, 1 + (operations - 1) / cost,
      [&](int64_t begin, int64_t end) { f(begin * group, end * group < batch ? end * group : batch); });
}

std::tuple<Tensor, Tensor> forward(Tensor a) {
  const SlogdetCall call(a);
  Tensor sign = call.new_result(), logabsdet = call.new_result();
  if (call.empty()) return {sign, logabsdet};
  with_dtype(a.scalar_type(), "slogdet", [&]<class T, class A>() {
    const auto task = call.forward<T, A>(sign, logabsdet);
    in_threads(call.batch(), call.n(), [&](int64_t begin, int64_t end) { PYFLOWGEN_CALL(slogdet, task, begin, end); });
  });
  return {sign, logabsdet};
}

Tensor backward(Tensor dlogabsdet, Tensor a) {
  const SlogdetCall call(dlogabsdet, a);
  Tensor da = call.new_gradient();
  if (call.empty()) return da;
  with_dtype(a.scalar_type(), "slogdet_backward", [&]<class T, class A>() {
    const auto task = call.backward<T, A>(da);
    in_threads(call.batch(), call.n(),
               [&](int64_t begin, int64_t end) { PYFLOWGEN_CALL(slogdet_backward, task, begin, end); });
  });
  return da;
}

}  // namespace
}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("slogdet", TORCH_BOX(&pyflowgen::forward));
  m.impl("slogdet_backward", TORCH_BOX(&pyflowgen::backward));
}
