// lstm on CUDA: registration.
#include "lstm.h"

#include "cuda/recurrence_call.h"

namespace pyflowgen::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> lstm(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh,
                                        Optional bias_ih, Optional bias_hh, Optional batch_sizes, bool reverse,
                                        Optional) {
  auto r = forward<Lstm>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, false);
  return {r.y, r.h_n, *r.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_keep(Tensor x, Tensor h, Tensor c, Tensor weight_ih,
                                                             Tensor weight_hh, Optional bias_ih, Optional bias_hh,
                                                             Optional batch_sizes, bool reverse, Optional) {
  auto r = forward<Lstm>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, true);
  return {r.y, r.h_n, *r.c_n, r.gates, r.extra};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    Optional dy, Optional dh_n, Optional dc_n, Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh,
    Optional batch_sizes, bool reverse, Tensor y, Tensor gates, Tensor cells, bool need_dx, bool need_dweight) {
  auto g = backward<Lstm>(dy, dh_n, dc_n, x, h, c, weight_ih, weight_hh, batch_sizes, reverse, y, gates, cells, need_dx,
                          need_dweight);
  return {g.dx, g.dh, *g.dc, g.dweight_ih, g.dweight_hh, g.dbias_ih, g.dbias_hh};
}

}  // namespace
}  // namespace pyflowgen::cuda

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, PYFLOWGEN_CUDA_KEY, m) {
  m.impl("lstm", TORCH_BOX(&pyflowgen::cuda::lstm));
  m.impl("lstm_keep", TORCH_BOX(&pyflowgen::cuda::lstm_keep));
  m.impl("lstm_backward", TORCH_BOX(&pyflowgen::cuda::lstm_backward));
}
