// gru: gated recurrent units over a sequence, and one step of them; kernels as in recurrence.h.
#pragma once

#include "recurrence.h"

namespace pyflowgen {
struct Gru {
  static constexpr const char* name = "gru";
  static constexpr int gates = 3;  // r, z, n
  static constexpr bool has_cell = false;
  static constexpr bool split_gate = true;  // h's part of the last one is scaled by r before x's is added
};
}  // namespace pyflowgen
