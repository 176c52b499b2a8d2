// The launchers of csrc/cuda/polynomial_spline.cu under the sanitizers. Gradients are compared with differences.
#include "formula/polynomial_spline.h"
#include "polynomial_spline.h"
#include "spline_driver.h"

namespace {

namespace formula = pyflowgen::PYFLOWGEN_ISA::formula;

template <int degree> struct Op {
  static constexpr double exact = 1e-7;
  static void complete(const Case& c, RationalQuadraticSplineOptions& o) {
    o.degree = degree;
    o.derivatives = degree == 1 ? -c.bins : degree == 3 ? 2 : c.tails == SplineTails::none ? 1 : -1;
    if (degree == 1) o.min_bin_width = o.min_bin_height = 0;
  }
  static int64_t segments(const RationalQuadraticSplineOptions& o) { return cuda::polynomial_spline_segments(o); }
  static void forward(const auto& a, double* partial) { cuda::polynomial_spline(a, partial, nullptr); }
  static void backward(const auto& a) { cuda::polynomial_spline_backward(a, nullptr); }

  // The spline as nflows writes it: knots, then the bin, which is looked for if it is beyond the last.
  static formula::Splined<double> value(const Case& c, double limit, const std::vector<double>& u, double x,
                                        size_t& bin) {
    const size_t n = size_t(c.bins);
    const double range = 2 * limit, least = degree == 1 ? 0 : 1e-3;
    std::vector<double> w = Axis({u.begin(), u.begin() + c.bins}, -limit, limit, least).knots, h(n + 1, 1), d(n + 1);
    if (degree == 1) {
      h = w;
      for (size_t k = 0; k <= n; ++k) w[k] = range * double(k) / double(n) - limit;
    }
    if (degree == 2) {
      const bool tails = c.tails != SplineTails::none;
      const auto area = [&](size_t k) { return (d[k] + d[k + 1]) / 2 * (w[k + 1] - w[k]) / range; };
      for (size_t k = n; k < u.size(); ++k) d[k - n + tails] = 1e-3 + std::log1p(std::exp(u[k]));
      if (tails) {
        const double first = (w[1] - w[0]) / range / 2, last = (w[n] - w[n - 1]) / range / 2;
        double inner = 0;
        for (size_t k = 1; k + 1 < n; ++k) inner += area(k);
        d[0] = d[n] = (first * d[1] / 2 + last * d[n - 1] / 2 + inner) / (1 - first / 2 - last / 2);
      }
      double all = 0;
      for (size_t k = 0; k < n; ++k) all += area(k);
      for (double& v : d) v = 1e-3 + (1 - 1e-3) * v / all;
      h[0] = -limit;
      for (size_t k = 0; k < n; ++k) h[k + 1] = h[k] + area(k) * range;
    }
    if (degree == 3) h = Axis({u.begin() + c.bins, u.begin() + 2 * c.bins}, -limit, limit, least).knots;
    if (bin >= n)
      for (bin = 0; bin + 1 < n && x >= (c.inverse ? h : w)[bin + 1];) ++bin;
    const auto size = [](const std::vector<double>& v, size_t k) { return v[k + 1] - v[k]; };
    const auto slope = [&](size_t k) { return size(h, k) / size(w, k); };
    formula::PolynomialBin<double> b{w[bin], w[bin + 1], h[bin], h[bin + 1], slope(bin), 1, 1};
    if (degree == 2) b.a = 2 * d[bin] / (d[bin] + d[bin + 1]), b.b = 2 - b.a;
    if (degree == 3) {
      const auto inner = [&](size_t k) {  // at the end of bin k
        const double w0 = size(w, k), w1 = size(w, k + 1), s0 = slope(k), s1 = slope(k + 1);
        return 2 * std::min({s0, s1, (w1 * s0 + w0 * s1) / (2 * (w0 + w1))}) / b.slope;
      };
      const auto outer = [&](size_t k) { return 3 / (1 + std::exp(-u[2 * n + k])); };
      b.a = bin ? inner(bin - 1) : outer(0), b.b = bin + 1 < n ? inner(bin) : outer(1);
    }
    return formula::polynomial<degree>(x, b, c.inverse);
  }

  static Wanted wanted(const Case& c, const RationalQuadraticSplineOptions&, bool, double limit, std::vector<double> u,
                       double x, double dy, double dlogdet) {
    size_t bin = size_t(-1);
    const auto [y, l] = value(c, limit, u, x, bin);
    const auto loss = [&](double at) {  // in that bin, also where the element is on its edge
      const auto v = value(c, limit, u, at, bin);
      return dy * v.y + dlogdet * (c.inverse ? -v.l : v.l);
    };
    const auto derivative = [&](double& p, auto f) {
      const double before = p, step = 1e-5;
      const auto at = [&](double e) { return p = before + e * step, f(); };
      const double d = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step);
      p = before;
      return d;
    };
    Wanted wanted{y, l, 0, {}};
    double place = x;
    wanted.dx = derivative(place, [&] { return loss(place); });
    for (double& p : u) wanted.du.push_back(derivative(p, [&] { return loss(x); }));
    return wanted;
  }
};

using enum SplineTails;
using enum Layout;
// The first three take all barriers, several rows a block, several passes and the partial sums.
const Case cases[] = {
    // name             batch channels inner start step count bins tails layout inverse masked elementwise absent
    {"many rows", 70, 8, 1, 4, 1, 4, 8, linear, last, false, false, false, false},
    {"more than fit", 1, 260, 1, 0, 1, 260, 22, linear, last, false, false, false, false},
    {"segments", 2, 6, 50, 0, 1, 6, 4, linear, planes, true, false, false, false},
    {"one row a block", 3, 80, 1, 0, 1, 80, 5, linear, last, true, false, false, false},
    {"every other channel", 5, 9, 4, 1, 2, 4, 3, linear, planes, false, false, false, false},
    {"mask", 3, 4, 16, 0, 1, 4, 8, linear, last, false, true, false, false},
    {"no tails", 4, 6, 3, 2, 1, 3, 4, none, last, false, false, false, false},
    {"no tails, inverse", 4, 6, 3, 2, 1, 3, 2, none, planes, true, false, false, false},
    {"elementwise", 300, 1, 1, 0, 1, 1, 2, linear, last, true, false, true, false},
    {"no gradient of y", 4, 8, 1, 0, 1, 4, 16, linear, last, false, false, false, true},
};

}  // namespace

// Degrees differ in an element's arithmetic alone, and the second has most of it.
int main(int argc, char**) {
  return run<Op<2>>(cases, argc == 1) + run<Op<1>>(cases, false) + run<Op<3>>(cases, false) > 0;
}
