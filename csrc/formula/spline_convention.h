// How unconstrained parameters become bins, in the order of the operator's `convention` and `tails` arguments.
#pragma once

namespace pyflowgen {
// nflows: softmax(w), softmax(h), softplus(d). zuko: softmax, softmax and exp of them soft-clipped. torchflows:
// softmax(w), softmax(w + h / 1000), softplus(edge + d / 1000). freia: an interval of the element's own.
enum class SplineConvention : int { nflows, zuko, torchflows, freia };
// The last two are freia's. affine: bins of sizes softplus(shift + w) + least and a line of slope height / width
// outside; what is added to the interval's bottom and left comes before the derivatives. resized: softmax(w) and the
// identity outside; there comes what gives the interval's size.
enum class SplineTails : int { none, linear, circular, mixed, affine, resized };
}  // namespace pyflowgen
