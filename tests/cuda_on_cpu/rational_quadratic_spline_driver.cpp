// The launchers of csrc/cuda/rational_quadratic_spline.cu under the sanitizers.
#include "formula/rational_quadratic_spline.h"
#include "spline_driver.h"

namespace {

namespace formula = pyflowgen::PYFLOWGEN_ISA::formula;

struct Op {
  static constexpr double exact = 1e-11;
  static void complete(const Case& c, RationalQuadraticSplineOptions& o) {
    o.derivatives = c.bins + (c.tails == SplineTails::linear ? -1 : c.tails == SplineTails::circular ? 0 : 1);
    o.edge = std::log(std::expm1(1 - 1e-3));
  }
  static int64_t segments(const RationalQuadraticSplineOptions& o) {
    return cuda::rational_quadratic_spline_segments(o);
  }
  static void forward(const auto& a, double* partial) { cuda::rational_quadratic_spline(a, partial, nullptr); }
  static void backward(const auto& a) { cuda::rational_quadratic_spline_backward(a, nullptr); }

  static Wanted wanted(const Case& c, const RationalQuadraticSplineOptions& o, bool round, double limit,
                       const std::vector<double>& u, double x, double dy, double dlogdet) {
    const auto heights = u.begin() + c.bins, derivatives = heights + c.bins;
    const Axis w({u.begin(), heights}, -limit, limit, 1e-3), h({heights, derivatives}, -limit, limit, 1e-3);
    const std::vector<double> given(derivatives, u.end());
    size_t bin = 0;
    while (bin + 1 < w.p.size() && x >= (c.inverse ? h : w).knots[bin + 1]) ++bin;
    const auto index = [&](size_t knot) -> size_t {  // of its derivative, or beyond where there is none
      const bool outer = knot == 0 || knot == w.p.size();
      if (c.tails == SplineTails::linear) return outer ? given.size() : knot - 1;
      if (c.tails == SplineTails::mixed && outer) return round ? 0 : given.size();
      return c.tails == SplineTails::circular && outer ? 0 : knot;
    };
    const auto slope = [&](size_t knot) { return index(knot) < given.size() ? given[index(knot)] : o.edge; };
    const auto derivative = [&](size_t knot) { return 1e-3 + std::log1p(std::exp(slope(knot))); };
    const formula::SplineBin<double> ends{w.knots[bin],     w.knots[bin + 1], h.knots[bin],
                                          h.knots[bin + 1], derivative(bin),  derivative(bin + 1)};
    const auto value = formula::rational_quadratic(x, ends, c.inverse);
    const auto g = formula::rational_quadratic_backward(dy, dlogdet, x, ends, c.inverse);
    std::vector<double> du = w.gradient(bin, g.shift_x, g.width), dh = h.gradient(bin, g.shift_y, g.height);
    std::vector<double> dd(given.size(), 0.0);
    for (size_t side = 0; side < 2; ++side)
      if (index(bin + side) < given.size())
        dd[index(bin + side)] += (side ? g.d1 : g.d0) / (1 + std::exp(-slope(bin + side)));
    du.insert(du.end(), dh.begin(), dh.end()), du.insert(du.end(), dd.begin(), dd.end());
    return {value.y, value.l, g.input, du};
  }
};

using enum SplineTails;
using enum Layout;
// The first three take all barriers, several rows a block, several passes and the partial sums.
const Case cases[] = {
    // name             batch channels inner start step count bins tails layout inverse masked elementwise absent
    {"many rows", 70, 8, 1, 4, 1, 4, 8, linear, last, false, false, false, false},
    {"more than fit", 2, 70, 1, 0, 1, 70, 64, linear, last, false, false, false, false},
    {"segments", 2, 6, 50, 0, 1, 6, 4, linear, planes, true, false, false, false},
    {"one row a block", 3, 80, 1, 0, 1, 80, 5, circular, last, true, false, false, false},
    {"every other channel", 5, 9, 4, 1, 2, 4, 3, circular, planes, false, false, false, false},
    {"mask, separate", 3, 4, 16, 0, 1, 4, 8, linear, separate, false, true, false, false},
    {"mixed", 3, 5, 7, 0, 1, 5, 4, mixed, separate, true, true, false, false},
    {"no tails", 4, 6, 3, 2, 1, 3, 4, none, last, false, false, false, false},
    {"elementwise", 300, 1, 1, 0, 1, 1, 2, linear, last, true, false, true, false},
    {"no gradient of y", 4, 8, 1, 0, 1, 4, 16, linear, last, false, false, false, true},
};

}  // namespace

int main(int argc, char**) { return run<Op>(cases, argc == 1); }
