// lstm on CUDA: the recurrence of cuda/recurrence.cuh, which states its floor, with the functions of formula/lstm.h.
#include "cuda/recurrence.cuh"
#include "formula/lstm.h"
#include "lstm.h"

namespace pyflowgen::cuda {

namespace formula = pyflowgen::PYFLOWGEN_ISA::formula;

template <> struct Pointwise<Lstm> {
  template <class A> static __device__ __forceinline__ A forward(A (&a)[4], A& c) {
    const auto u = formula::lstm(a[0], a[1], a[2], a[3], c);
    a[0] = u.i, a[1] = u.f, a[2] = u.g, a[3] = u.o, c = u.c;
    return u.h;
  }
  template <class A> static __device__ __forceinline__ void backward(const A (&gate)[4], A c, A before, A& dh, A& dc,
                                                                     A (&d)[4], A& d_last) {
    const auto u = formula::lstm_backward(gate[0], gate[1], gate[2], gate[3], c, before, dh, dc);
    d[0] = u.di, d[1] = u.df, d[2] = u.dg, d[3] = d_last = u.d_o, dc = u.before;
  }
};

#define PYFLOWGEN_INSTANTIATE(T, A) PYFLOWGEN_RECURRENT(Lstm, T, A)
PYFLOWGEN_INSTANTIATE(float, float)
#ifndef PYFLOWGEN_FLOAT_ONLY  // the tests' short form
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)
#endif

}  // namespace pyflowgen::cuda
