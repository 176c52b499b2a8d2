// The map from unconstrained scale to log-scale, in the order of the operator's `scale` argument.
#pragma once

namespace pyflowgen {
enum class AffineScale : int { additive, exp, tanh, sigmoid, sigmoid_eps, softclip, atan, softplus };
}  // namespace pyflowgen
