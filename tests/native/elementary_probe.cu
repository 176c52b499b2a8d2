// Every function of formula/elementary.h on the device, for the compile test of tests/test_elementary.py.
#include "formula/elementary.h"

namespace pyflowgen::PYFLOWGEN_ISA {

template <class T> __global__ void elementary(const T* x, T* y, int n) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  T v = x[i], *row = y + 10 * i;
  row[0] = formula::exp(v);
  row[1] = formula::expm1(v);
  row[2] = formula::log(v);
  row[3] = formula::log1p(v);
  row[4] = formula::tanh(v);
  row[5] = formula::sigmoid(v);
  row[6] = formula::softplus(v);
  row[7] = formula::log_sigmoid(v);
  row[8] = formula::atan(v);
  row[9] = formula::normal_cdf(v);
}
template __global__ void elementary<float>(const float*, float*, int);
template __global__ void elementary<double>(const double*, double*, int);

}  // namespace pyflowgen::PYFLOWGEN_ISA
