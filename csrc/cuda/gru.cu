// gru on CUDA: the recurrence of cuda/recurrence.cuh, which states its floor, with the functions of formula/gru.h.
#include "cuda/recurrence.cuh"
#include "formula/gru.h"
#include "gru.h"

namespace pyflowgen::cuda {

namespace formula = pyflowgen::PYFLOWGEN_ISA::formula;

template <> struct Pointwise<Gru> {
  template <class A> static __device__ __forceinline__ A forward(A (&a)[4], A& before) {
    const auto u = formula::gru(a[0], a[1], a[2], a[3], before);
    a[0] = u.r, a[1] = u.z, a[2] = u.n;
    return u.h;
  }
  template <class A> static __device__ __forceinline__ void backward(const A (&gate)[3], A b_n, A before, A& dh, A&,
                                                                     A (&d)[3], A& d_last) {
    const auto u = formula::gru_backward(gate[0], gate[1], gate[2], b_n, before, dh);
    d[0] = u.dr, d[1] = u.dz, d[2] = u.dn, d_last = u.db_n, dh = u.before;
  }
};

#define PYFLOWGEN_INSTANTIATE(T, A) PYFLOWGEN_RECURRENT(Gru, T, A)
PYFLOWGEN_INSTANTIATE(float, float)
#ifndef PYFLOWGEN_FLOAT_ONLY  // the tests' short form
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)
#endif

}  // namespace pyflowgen::cuda
