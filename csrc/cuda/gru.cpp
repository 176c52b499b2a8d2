// gru on CUDA: registration.
#include "gru.h"

#include "cuda/recurrence_call.h"

namespace pyflowgen::cuda {
namespace {

std::tuple<Tensor, Tensor> gru(Tensor x, Tensor h, Tensor weight_ih, Tensor weight_hh, Optional bias_ih,
                               Optional bias_hh, Optional batch_sizes, bool reverse, Optional) {
  auto r = forward<Gru>(x, h, {}, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, false);
  return {r.y, r.h_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_keep(Tensor x, Tensor h, Tensor weight_ih, Tensor weight_hh,
                                                    Optional bias_ih, Optional bias_hh, Optional batch_sizes,
                                                    bool reverse, Optional) {
  auto r = forward<Gru>(x, h, {}, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, true);
  return {r.y, r.h_n, r.gates, r.extra};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(Optional dy, Optional dh_n, Tensor x, Tensor h,
                                                                        Tensor weight_ih, Tensor weight_hh,
                                                                        Optional batch_sizes, bool reverse, Tensor y,
                                                                        Tensor gates, Tensor hidden_new, bool need_dx,
                                                                        bool need_dweight) {
  auto g = backward<Gru>(dy, dh_n, {}, x, h, {}, weight_ih, weight_hh, batch_sizes, reverse, y, gates, hidden_new,
                         need_dx, need_dweight);
  return {g.dx, g.dh, g.dweight_ih, g.dweight_hh, g.dbias_ih, g.dbias_hh};
}

}  // namespace
}  // namespace pyflowgen::cuda

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, PYFLOWGEN_CUDA_KEY, m) {
  m.impl("gru", TORCH_BOX(&pyflowgen::cuda::gru));
  m.impl("gru_keep", TORCH_BOX(&pyflowgen::cuda::gru_keep));
  m.impl("gru_backward", TORCH_BOX(&pyflowgen::cuda::gru_backward));
}
