// gru on the CPU: registration.
#include "gru.h"

#include "cpu/recurrence_call.h"

namespace pyflowgen {
namespace {

using recurrence::Optional;

std::tuple<Tensor, Tensor> gru(Tensor x, Tensor h, Tensor weight_ih, Tensor weight_hh, Optional bias_ih,
                               Optional bias_hh, Optional batch_sizes, bool reverse, Optional packed) {
  auto r =
      recurrence::forward<Gru>(x, h, {}, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, packed, false);
  return {r.y, r.h_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_keep(Tensor x, Tensor h, Tensor weight_ih, Tensor weight_hh,
                                                    Optional bias_ih, Optional bias_hh, Optional batch_sizes,
                                                    bool reverse, Optional packed) {
  auto r =
      recurrence::forward<Gru>(x, h, {}, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, packed, true);
  return {r.y, r.h_n, r.gates, r.extra};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(Optional dy, Optional dh_n, Tensor x, Tensor h,
                                                                        Tensor weight_ih, Tensor weight_hh,
                                                                        Optional batch_sizes, bool reverse, Tensor y,
                                                                        Tensor gates, Tensor hidden_new, bool need_dx,
                                                                        bool need_dweight) {
  auto g = recurrence::backward<Gru>(dy, dh_n, {}, x, h, {}, weight_ih, weight_hh, batch_sizes, reverse, y, gates,
                                     hidden_new, need_dx, need_dweight);
  return {g.dx, g.dh, g.dweight_ih, g.dweight_hh, g.dbias_ih, g.dbias_hh};
}

Tensor gru_pack(Tensor weight_ih, Tensor weight_hh, Optional bias_ih, Optional bias_hh, int64_t storage) {
  return recurrence::pack<Gru>(weight_ih, weight_hh, bias_ih, bias_hh, storage);
}

Tensor gru_step(Tensor x, Tensor h, Tensor packed) {
  return std::get<0>(recurrence::step<Gru>(x, h, std::nullopt, packed));
}

}  // namespace
}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("gru", TORCH_BOX(&pyflowgen::gru));
  m.impl("gru_keep", TORCH_BOX(&pyflowgen::gru_keep));
  m.impl("gru_backward", TORCH_BOX(&pyflowgen::gru_backward));
  m.impl("gru_pack", TORCH_BOX(&pyflowgen::gru_pack));
  m.impl("gru_step", TORCH_BOX(&pyflowgen::gru_step));
}
