// lstm: long short-term memory over a sequence, and one step of it; kernels as in recurrence.h.
#pragma once

#include "recurrence.h"

namespace pyflowgen {
struct Lstm {
  static constexpr const char* name = "lstm";
  static constexpr int gates = 4;            // i, f, g, o
  static constexpr bool has_cell = true;     // c beside h
  static constexpr bool split_gate = false;  // x's and h's part of each argument are added at once
};
}  // namespace pyflowgen
