// Every function of formula/elementary.h over arrays, scalar by scalar and pack by pack, for tests/test_elementary.py.
#include "formula/elementary.h"

namespace pyflowgen::PYFLOWGEN_ISA {

#define PROBE(function, T, suffix) \
  extern "C" __attribute__((visibility("default"))) void function##_##suffix##_scalar(const T* x, T* y, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) y[i] = formula::function(x[i]); \
  } \
  extern "C" __attribute__((visibility("default"))) void function##_##suffix##_pack(const T* x, T* y, int64_t n) { \
    for (int64_t i = 0; i < n; i += lanes<T>) store(y + i, formula::function(load(x + i))); \
  }
#define PROBES(function) PROBE(function, float, float32) PROBE(function, double, float64)

PROBES(exp)
PROBES(expm1)
PROBES(log)
PROBES(log1p)
PROBES(tanh)
PROBES(sigmoid)
PROBES(softplus)
PROBES(log_sigmoid)
PROBES(atan)
PROBES(normal_cdf)

extern "C" __attribute__((visibility("default"))) int64_t pack_bytes() { return vector_bytes; }

}  // namespace pyflowgen::PYFLOWGEN_ISA
