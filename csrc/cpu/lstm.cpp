// lstm on the CPU: registration.
#include "lstm.h"

#include "cpu/recurrence_call.h"

namespace pyflowgen {
namespace {

using recurrence::Optional;

std::tuple<Tensor, Tensor, Tensor> lstm(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh,
                                        Optional bias_ih, Optional bias_hh, Optional batch_sizes, bool reverse,
                                        Optional packed) {
  auto r =
      recurrence::forward<Lstm>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, packed, false);
  return {r.y, r.h_n, *r.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_keep(Tensor x, Tensor h, Tensor c, Tensor weight_ih,
                                                             Tensor weight_hh, Optional bias_ih, Optional bias_hh,
                                                             Optional batch_sizes, bool reverse, Optional packed) {
  auto r =
      recurrence::forward<Lstm>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, packed, true);
  return {r.y, r.h_n, *r.c_n, r.gates, r.extra};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    Optional dy, Optional dh_n, Optional dc_n, Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh,
    Optional batch_sizes, bool reverse, Tensor y, Tensor gates, Tensor cells, bool need_dx, bool need_dweight) {
  auto g = recurrence::backward<Lstm>(dy, dh_n, dc_n, x, h, c, weight_ih, weight_hh, batch_sizes, reverse, y, gates,
                                      cells, need_dx, need_dweight);
  return {g.dx, g.dh, *g.dc, g.dweight_ih, g.dweight_hh, g.dbias_ih, g.dbias_hh};
}

Tensor lstm_pack(Tensor weight_ih, Tensor weight_hh, Optional bias_ih, Optional bias_hh, int64_t storage) {
  return recurrence::pack<Lstm>(weight_ih, weight_hh, bias_ih, bias_hh, storage);
}

std::tuple<Tensor, Tensor> lstm_step(Tensor x, Tensor h, Tensor c, Tensor packed) {
  auto [h_next, c_next] = recurrence::step<Lstm>(x, h, c, packed);
  return {h_next, *c_next};
}

}  // namespace
}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("lstm", TORCH_BOX(&pyflowgen::lstm));
  m.impl("lstm_keep", TORCH_BOX(&pyflowgen::lstm_keep));
  m.impl("lstm_backward", TORCH_BOX(&pyflowgen::lstm_backward));
  m.impl("lstm_pack", TORCH_BOX(&pyflowgen::lstm_pack));
  m.impl("lstm_step", TORCH_BOX(&pyflowgen::lstm_step));
}
