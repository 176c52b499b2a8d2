#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace pyflowgen {

static Isa choose() {
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (wanted && std::strcmp(wanted, "default") == 0) return Isa::baseline;
  if (has_avx512 && !(wanted && std::strcmp(wanted, "avx2") == 0)) return Isa::avx512;
  if (has_avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa which) { return which == Isa::avx512 ? "avx512" : which == Isa::avx2 ? "avx2" : "baseline"; }

}  // namespace pyflowgen
