// gru on the CPU: the recurrence of cpu/recurrence_loops.h with the functions of formula/gru.h.
#include "gru.h"

#include "cpu/recurrence_loops.h"
#include "formula/gru.h"

namespace pyflowgen::PYFLOWGEN_ISA {

template <> struct Pointwise<Gru> {
  template <class V> static PYFLOWGEN_INLINE V forward(V (&a)[4], V& before) {
    const auto u = formula::gru(a[0], a[1], a[2], a[3], before);
    a[0] = u.r, a[1] = u.z, a[2] = u.n;
    return u.h;
  }
  template <class V> static PYFLOWGEN_INLINE V extra(const V (&a)[4], V) { return a[3]; }
  template <class V>
  static PYFLOWGEN_INLINE void backward(const V (&gate)[3], V b_n, V before, V& dh, V&, V (&d)[3], V& dlast) {
    const auto u = formula::gru_backward(gate[0], gate[1], gate[2], b_n, before, dh);
    d[0] = u.dr, d[1] = u.dz, d[2] = u.dn, dlast = u.db_n, dh = u.before;
  }
};

PYFLOWGEN_RECURRENT(Gru, float)
PYFLOWGEN_RECURRENT(Gru, double)
PYFLOWGEN_RECURRENT_STEP(Gru, float, bf16)
PYFLOWGEN_RECURRENT_STEP(Gru, float, int8_t)

}  // namespace pyflowgen::PYFLOWGEN_ISA
