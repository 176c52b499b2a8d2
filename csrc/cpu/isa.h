// Which copy of a kernel this machine gets.
//
// Every *.simd.cpp is compiled once per instruction set into a namespace of that name. A header declares its kernels
// with PYFLOWGEN_PER_ISA and the adapter calls one with PYFLOWGEN_CALL: the best copy both compiled and runnable,
// or a lesser one when ATEN_CPU_CAPABILITY (default, avx2, avx512; torch's own variable) asks for it.
#pragma once

namespace pyflowgen {

enum class Isa { baseline, avx2, avx512 };

Isa isa();                  // the copy in use; decided once
const char* isa_name(Isa);  // "baseline", "avx2", "avx512"

}  // namespace pyflowgen

// clang-format off
#if defined(__x86_64__)
#define PYFLOWGEN_PER_ISA(...) \
  namespace baseline { __VA_ARGS__ } \
  namespace avx2 { __VA_ARGS__ } \
  namespace avx512 { __VA_ARGS__ }
#define PYFLOWGEN_CALL(kernel, ...) \
  (::pyflowgen::isa() == ::pyflowgen::Isa::avx512 ? ::pyflowgen::avx512::kernel(__VA_ARGS__) \
   : ::pyflowgen::isa() == ::pyflowgen::Isa::avx2 ? ::pyflowgen::avx2::kernel(__VA_ARGS__) \
                                                  : ::pyflowgen::baseline::kernel(__VA_ARGS__))
#else
#define PYFLOWGEN_PER_ISA(...) namespace baseline { __VA_ARGS__ }
#define PYFLOWGEN_CALL(kernel, ...) ::pyflowgen::baseline::kernel(__VA_ARGS__)
#endif
// The same for a kernel whose name has commas, in parentheses: PYFLOWGEN_CALL_OF((kernel<A, B>), x, y).
#define PYFLOWGEN_CALL_OF(kernel, ...) PYFLOWGEN_CALL(PYFLOWGEN_UNWRAP kernel, __VA_ARGS__)
#define PYFLOWGEN_UNWRAP(...) __VA_ARGS__
// clang-format on
