// Calls the launchers of csrc/cuda/rational_quadratic_spline.cu as the adapter does, on buffers of exactly the size
// needed, and compares with plain loops in double: what the sanitizer builds run, where Python would be in the way.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/memory.cuh"
#include "formula/rational_quadratic_spline.h"
#include "rational_quadratic_spline.h"

using namespace pyflowgen;
namespace formula = pyflowgen::PYFLOWGEN_ISA::formula;

namespace {

int failures = 0;

enum class Layout { last, planes, separate };
struct Case {
  const char* name;
  int64_t batch, channels, inner, start, step, count, bins;
  SplineTails tails;
  Layout layout;
  bool inverse, masked, elementwise;
  bool absent;  // no dy, and then no dlogdet
};

template <class T> std::vector<T> values(int64_t n, std::mt19937* random, float spread = 1) {
  std::vector<T> v(static_cast<size_t>(n));
  std::normal_distribution<float> normal(0, spread);
  for (T& e : v) cuda::narrow(cuda::Compute<T>(random ? normal(*random) : NAN), e);
  return v;
}

template <class T> void close(const char* name, const char* what, double got, double want) {
  const double eps = std::is_same_v<T, double>  ? 1e-11
                     : std::is_same_v<T, float> ? 2e-4
                     : std::is_same_v<T, bf16>  ? 3e-2
                                                : 5e-3;
  if (std::abs(got - want) <= eps * (1 + std::abs(want))) return;
  if (++failures < 20) printf("%s: %s is %g, expected %g\n", name, what, got, want);
}

// One axis of one element: knots, and the gradients of its parameters from those of the bins' sizes.
struct Axis {
  std::vector<double> p, knots;
  double range, rest;
  Axis(const std::vector<double>& u, double low, double high, double least) : knots{low}, range(high - low) {
    double sum = 0;
    for (double v : u) sum += std::exp(v);
    rest = 1 - least * double(u.size());
    for (double v : u) {
      p.push_back(std::exp(v) / sum);
      knots.push_back(knots.back() + range * (least + rest * p.back()));
    }
    knots.back() = high;
  }
  std::vector<double> gradient(size_t bin, double shift, double size) const {
    std::vector<double> g(p.size());
    double mean = 0;
    for (size_t j = 0; j < p.size(); ++j) mean += p[j] * (g[j] = j < bin ? shift : j == bin ? size : 0);
    for (size_t j = 0; j < p.size(); ++j) g[j] = p[j] * range * rest * (g[j] - mean);
    return g;
  }
};

template <class T, class A> void check(const Case& c) {
  std::mt19937 random(7);
  RationalQuadraticSplineOptions o{};
  o.batch = c.batch, o.channels = c.channels, o.inner = c.inner;
  o.start = c.start, o.step = c.step, o.count = c.count, o.bins = c.bins, o.tails = c.tails;
  o.derivatives = c.bins + (c.tails == SplineTails::linear ? -1 : c.tails == SplineTails::circular ? 0 : 1);
  o.left = o.bottom = -1, o.right = o.top = 1;
  o.min_bin_width = o.min_bin_height = o.min_derivative = 1e-3;
  o.edge = std::log(std::expm1(1 - 1e-3)), o.scale = 1, o.inverse = c.inverse, o.elementwise = c.elementwise;
  const int64_t each = 2 * c.bins + o.derivatives, event = c.channels * c.inner, part = c.count * c.inner;

  const auto x = values<T>(c.batch * event, &random, 1.5f), dy = values<T>(c.batch * event, &random);
  auto y = values<T>(c.batch * event, nullptr), dx = y;
  const auto u = values<T>(c.batch * part * each, &random);
  auto du = values<T>(c.batch * part * each, nullptr);
  auto bound = values<A>(part, nullptr);
  for (size_t i = 0; i < bound.size(); ++i) bound[i] = A(1.5 + double(i % 3));
  std::vector<uint8_t> mask(size_t(c.masked ? event : 0)), circular(size_t(c.tails == SplineTails::mixed ? part : 0));
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = uint8_t((i / 3 + i) % 2);
  for (size_t i = 0; i < circular.size(); ++i) circular[i] = uint8_t(i % 2);
  std::vector<A> logdet(size_t(c.batch), A(NAN)), dlogdet(size_t(c.batch), A(0.5));
  const Strides whole{event, c.inner, 1}, some{0, c.inner, 1};

  // Widths, heights and derivatives in their buffer.
  const auto parameters = [&]<class P>(P* p, int which) {
    const int64_t first = which == 0 ? 0 : which == 1 ? c.bins : 2 * c.bins;
    const int64_t columns = which < 2 ? c.bins : o.derivatives;
    switch (c.layout) {
      case Layout::last: return SplineParameters<P>{p + first, {part * each, c.inner * each, each}, 1};
      case Layout::planes: return SplineParameters<P>{p + first * c.inner, {part * each, c.inner * each, 1}, c.inner};
      default: return SplineParameters<P>{p + first * c.batch * part, {part * columns, c.inner * columns, columns}, 1};
    }
  };
  std::vector<double> partial(size_t(c.batch * cuda::rational_quadratic_spline_segments(o)), NAN);
  RationalQuadraticSplineForward<T, A> f{};
  f.o = o, f.x = x.data(), f.x_strides = whole;
  f.widths = parameters(u.data(), 0), f.heights = parameters(u.data(), 1), f.derivatives = parameters(u.data(), 2);
  f.bound = bound.data(), f.bound_strides = some;
  if (!circular.empty()) f.circular = circular.data(), f.circular_strides = some;
  if (c.masked) f.mask = mask.data(), f.mask_strides = some;
  f.y = y.data(), f.y_strides = whole, f.logdet = logdet.data();
  cuda::rational_quadratic_spline(f, cuda::rational_quadratic_spline_segments(o) > 1 ? partial.data() : nullptr,
                                  nullptr);
  RationalQuadraticSplineBackward<T, A> b{};
  b.o = o, b.x = x.data(), b.x_strides = whole;
  if (!c.absent) b.dy = dy.data(), b.dy_strides = whole, b.dlogdet = dlogdet.data(), b.dlogdet_stride = 1;
  b.widths = f.widths, b.heights = f.heights, b.derivatives = f.derivatives;
  b.bound = f.bound, b.bound_strides = some, b.circular = f.circular, b.circular_strides = f.circular_strides;
  b.mask = f.mask, b.mask_strides = f.mask_strides, b.dx = dx.data(), b.dx_strides = whole;
  b.dwidths = parameters(du.data(), 0), b.dheights = parameters(du.data(), 1);
  b.dderivatives = parameters(du.data(), 2);
  cuda::rational_quadratic_spline_backward(b, nullptr);

  const auto wide = [](T v) { return double(cuda::widen(v)); };
  for (int64_t row = 0; row < c.batch; ++row) {
    double total = 0;
    for (int64_t e = 0; e < event; ++e) {
      const int64_t channel = e / c.inner, i = e % c.inner, k = (channel - c.start) / c.step;
      const bool in_part = channel >= c.start && (channel - c.start) % c.step == 0 && k < c.count;
      const size_t at = size_t(row * event + e);
      const double vx = wide(x[at]), vdy = c.absent ? 0 : wide(dy[at]);
      double want_y = vx, want_dx = vdy;
      if (in_part) {
        const bool on = !c.masked || mask[size_t(e)], round = !circular.empty() && circular[size_t(k * c.inner + i)];
        const double limit = double(bound[size_t(k * c.inner + i)]);
        const auto read = [&](const auto& p, int64_t n) {
          std::vector<double> v;
          for (int64_t j = 0; j < n; ++j)
            v.push_back(
                wide(p.p[row * p.strides.batch + k * p.strides.channel + i * p.strides.inner + j * p.parameter]));
          return v;
        };
        const Axis w(read(f.widths, c.bins), -limit, limit, 1e-3), h(read(f.heights, c.bins), -limit, limit, 1e-3);
        const auto given = read(f.derivatives, o.derivatives);
        std::vector<double> want_w(size_t(c.bins), 0.0), want_h = want_w, want_d(given.size(), 0.0);
        if (on && std::abs(vx) <= limit) {
          size_t bin = 0;
          while (bin + 1 < w.p.size() && vx >= (c.inverse ? h : w).knots[bin + 1]) ++bin;
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
          const auto value = formula::rational_quadratic(vx, ends, c.inverse);
          want_y = value.y, total += value.l;
          const auto g = formula::rational_quadratic_backward(vdy, c.absent ? 0.0 : 0.5, vx, ends, c.inverse);
          want_dx = g.input;
          want_w = w.gradient(bin, g.shift_x, g.width), want_h = h.gradient(bin, g.shift_y, g.height);
          for (size_t side = 0; side < 2; ++side)
            if (index(bin + side) < given.size())
              want_d[index(bin + side)] += (side ? g.d1 : g.d0) / (1 + std::exp(-slope(bin + side)));
        } else if (on && c.tails == SplineTails::none) {
          want_y = NAN, want_dx = 0, total = NAN;
        }
        const auto same = [&](const char* what, const auto& p, const std::vector<double>& want) {
          const auto got = read(p, int64_t(want.size()));
          for (size_t j = 0; j < want.size(); ++j) close<T>(c.name, what, got[j], want[j]);
        };
        same("dwidths", b.dwidths, want_w), same("dheights", b.dheights, want_h);
        same("dderivatives", b.dderivatives, want_d);
      }
      if (std::isnan(want_y)) failures += !std::isnan(wide(y[at]));
      else close<T>(c.name, "y", wide(y[at]), want_y);
      close<T>(c.name, "dx", wide(dx[at]), want_dx);
    }
    if (std::isnan(total)) failures += !std::isnan(logdet[size_t(row)]);
    else close<A>(c.name, "logdet", double(logdet[size_t(row)]), c.inverse ? -total : total);
  }
}

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

int main(int argc, char**) {
  for (const Case& c : cases) {
    if (argc > 1 && &c == cases + 3) break;  // the short form
    check<float, float>(c);
#ifndef PYFLOWGEN_FLOAT_ONLY
    check<double, double>(c);
    check<bf16, float>(c);
    check<f16, float>(c);
#endif
  }
  printf("%d wrong values\n", failures);
  return failures > 0;
}
