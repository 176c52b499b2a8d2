// 16-bit storage types of the raw-pointer contracts: bits only, converted where they are loaded.
#pragma once

#include <cstdint>

namespace pyflowgen {
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
}  // namespace pyflowgen
