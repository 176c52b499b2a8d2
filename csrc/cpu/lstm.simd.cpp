// lstm on the CPU: the recurrence of cpu/recurrence_loops.h with the functions of formula/lstm.h.
#include "lstm.h"

#include "cpu/recurrence_loops.h"
#include "formula/lstm.h"

namespace pyflowgen::PYFLOWGEN_ISA {

template <> struct Pointwise<Lstm> {
  template <class V> static PYFLOWGEN_INLINE V forward(V (&a)[4], V& c) {
    const auto u = formula::lstm(a[0], a[1], a[2], a[3], c);
    a[0] = u.i, a[1] = u.f, a[2] = u.g, a[3] = u.o, c = u.c;
    return u.h;
  }
  template <class V> static PYFLOWGEN_INLINE V extra(const V (&)[4], V c) { return c; }
  template <class V>
  static PYFLOWGEN_INLINE void backward(const V (&gate)[4], V c, V before, V& dh, V& dc, V (&d)[4], V& dlast) {
    const auto u = formula::lstm_backward(gate[0], gate[1], gate[2], gate[3], c, before, dh, dc);
    d[0] = u.di, d[1] = u.df, d[2] = u.dg, d[3] = dlast = u.d_o, dc = u.before;
  }
};

PYFLOWGEN_RECURRENT(Lstm, float)
PYFLOWGEN_RECURRENT(Lstm, double)
PYFLOWGEN_RECURRENT_STEP(Lstm, float, bf16)
PYFLOWGEN_RECURRENT_STEP(Lstm, float, int8_t)
template int64_t recurrent_blocks<float>(int64_t);
template int64_t recurrent_blocks<double>(int64_t);
template int64_t recurrent_panels<float>(int64_t);
template int64_t recurrent_panels<double>(int64_t);
template int64_t recurrent_panel_width<float>();
template int64_t recurrent_panel_width<double>();
template int64_t recurrent_scratch_bytes<float>(int64_t, int64_t, int64_t);
template int64_t recurrent_scratch_bytes<double>(int64_t, int64_t, int64_t);
template int64_t recurrent_scratch_bytes<bf16>(int64_t, int64_t, int64_t);
template int64_t recurrent_scratch_bytes<int8_t>(int64_t, int64_t, int64_t);
template void recurrent_inputs<float, float>(const RecurrentStep<float>&, void*);
template void recurrent_inputs<float, bf16>(const RecurrentStep<float>&, void*);
template void recurrent_inputs<float, int8_t>(const RecurrentStep<float>&, void*);
template void recurrent_inputs<double, double>(const RecurrentStep<double>&, void*);

}  // namespace pyflowgen::PYFLOWGEN_ISA
