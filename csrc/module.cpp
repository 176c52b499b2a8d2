// Facts about this build that are no tensors. Tensor functions go through torch's dispatcher, never through here.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu/isa.h"
#include "sources.h"  // made by the build

namespace py = pybind11;

#define PYFLOWGEN_STRING_(x) #x
#define PYFLOWGEN_STRING(x) PYFLOWGEN_STRING_(x)
#define PYFLOWGEN_TORCH_VERSION \
  PYFLOWGEN_STRING(TORCH_VERSION_MAJOR) \
  "." PYFLOWGEN_STRING(TORCH_VERSION_MINOR) "." PYFLOWGEN_STRING(TORCH_VERSION_PATCH)

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the compiled part of pyflowgen.";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = "g++ " __VERSION__;
    info["torch_built_against"] = PYFLOWGEN_TORCH_VERSION;
    py::list compiled;
    compiled.append("baseline");
#if defined(__x86_64__)
    compiled.append("avx2");
    compiled.append("avx512");
#endif
    info["instruction_sets"] = compiled;
    info["instruction_set"] = pyflowgen::isa_name(pyflowgen::isa());
    info["sources"] = PYFLOWGEN_SOURCES;
    info["cuda_architectures"] = PYFLOWGEN_CUDA_ARCHITECTURES;
    return info;
  });
}
