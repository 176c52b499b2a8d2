// How unconstrained parameters become bins, in the order of the operator's `convention` and `tails` arguments.
#pragma once

namespace pyflowgen {
// nflows: softmax(w), softmax(h), softplus(d). zuko: softmax, softmax and exp of them soft-clipped. torchflows:
// softmax(w), softmax(w + h / 1000), softplus(edge + d / 1000).
enum class SplineConvention : int { nflows, zuko, torchflows };
enum class SplineTails : int { none, linear, circular, mixed };
}  // namespace pyflowgen
