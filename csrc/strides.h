// A tensor seen as (batch, channels, inner), in elements.
#pragma once

#include <cstdint>

namespace pyflowgen {
struct Strides { int64_t batch, channel, inner; };
}  // namespace pyflowgen
