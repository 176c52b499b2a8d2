// Calls a spline's launchers as the adapter does, on buffers of exactly the size needed, and compares with plain
// doubles: what the sanitizer builds run, where Python would be in the way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/memory.cuh"
#include "rational_quadratic_spline.h"

using namespace pyflowgen;

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

// exact: what is wanted in double.
template <class T> void close(const char* name, const char* what, double got, double want, double exact = 1e-11) {
  const double eps = std::is_same_v<T, double>  ? exact
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
  // Of bin `bin`, and all before it.
  std::vector<double> gradient(size_t bin, double shift, double size) const {
    std::vector<double> g(p.size());
    double mean = 0;
    for (size_t j = 0; j < p.size(); ++j) mean += p[j] * (g[j] = j < bin ? shift : j == bin ? size : 0);
    for (size_t j = 0; j < p.size(); ++j) g[j] = p[j] * range * rest * (g[j] - mean);
    return g;
  }
};

// What an element should give: its results, and the gradients for dy and dlogdet.
struct Wanted {
  double y, l, dx;
  std::vector<double> du;
};

// Op: its options, its launchers, `exact`, how far from exact its gradients in double may be, and wanted(case, options,
// circular, limit, parameters, x, dy, dlogdet) of an element in the interval from -limit to limit.
template <class Op, class T, class A> void check(const Case& c) {
  std::mt19937 random(7);
  RationalQuadraticSplineOptions o{};
  o.batch = c.batch, o.channels = c.channels, o.inner = c.inner;
  o.start = c.start, o.step = c.step, o.count = c.count, o.bins = c.bins, o.tails = c.tails;
  o.left = o.bottom = -1, o.right = o.top = 1;
  o.min_bin_width = o.min_bin_height = o.min_derivative = 1e-3;
  Op::complete(c, o);
  o.scale = 1, o.inverse = c.inverse, o.elementwise = c.elementwise;
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
  std::vector<double> partial(size_t(c.batch * Op::segments(o)), NAN);
  RationalQuadraticSplineForward<T, A> f{};
  f.o = o, f.x = x.data(), f.x_strides = whole;
  f.widths = parameters(u.data(), 0), f.heights = parameters(u.data(), 1), f.derivatives = parameters(u.data(), 2);
  f.bound = bound.data(), f.bound_strides = some;
  if (!circular.empty()) f.circular = circular.data(), f.circular_strides = some;
  if (c.masked) f.mask = mask.data(), f.mask_strides = some;
  f.y = y.data(), f.y_strides = whole, f.logdet = logdet.data();
  Op::forward(f, Op::segments(o) > 1 ? partial.data() : nullptr);
  RationalQuadraticSplineBackward<T, A> b{};
  b.o = o, b.x = x.data(), b.x_strides = whole;
  if (!c.absent) b.dy = dy.data(), b.dy_strides = whole, b.dlogdet = dlogdet.data(), b.dlogdet_stride = 1;
  b.widths = f.widths, b.heights = f.heights, b.derivatives = f.derivatives;
  b.bound = f.bound, b.bound_strides = some, b.circular = f.circular, b.circular_strides = f.circular_strides;
  b.mask = f.mask, b.mask_strides = f.mask_strides, b.dx = dx.data(), b.dx_strides = whole;
  b.dwidths = parameters(du.data(), 0), b.dheights = parameters(du.data(), 1);
  b.dderivatives = parameters(du.data(), 2);
  Op::backward(b);

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
        // Parameter j of the element, wherever it lies.
        const auto read = [&](const auto& w, const auto& h, const auto& d) {
          std::vector<double> v;
          for (int64_t j = 0; j < each; ++j) {
            const int which = j < c.bins ? 0 : j < 2 * c.bins ? 1 : 2;
            const auto& p = which == 0 ? w : which == 1 ? h : d;
            const int64_t element = row * p.strides.batch + k * p.strides.channel + i * p.strides.inner;
            v.push_back(wide(p.p[element + (j - which * c.bins) * p.parameter]));
          }
          return v;
        };
        std::vector<double> want(size_t(each), 0.0);
        if (on && std::abs(vx) <= limit) {
          const Wanted wanted =
              Op::wanted(c, o, round, limit, read(f.widths, f.heights, f.derivatives), vx, vdy, c.absent ? 0.0 : 0.5);
          want_y = wanted.y, total += wanted.l, want_dx = wanted.dx, want = wanted.du;
        } else if (on && c.tails == SplineTails::none) {
          want_y = NAN, want_dx = 0, total = NAN;
        }
        const auto got = read(b.dwidths, b.dheights, b.dderivatives);
        for (size_t j = 0; j < want.size(); ++j) close<T>(c.name, "dparams", got[j], want[j], Op::exact);
      }
      if (std::isnan(want_y)) failures += !std::isnan(wide(y[at]));
      else close<T>(c.name, "y", wide(y[at]), want_y);
      close<T>(c.name, "dx", wide(dx[at]), want_dx, Op::exact);
    }
    if (std::isnan(total)) failures += !std::isnan(logdet[size_t(row)]);
    else close<A>(c.name, "logdet", double(logdet[size_t(row)]), c.inverse ? -total : total);
  }
}

// All cases, or with an argument the first three, enough for a planted bug.
template <class Op, size_t n> int run(const Case (&cases)[n], bool all) {
  for (const Case& c : cases) {
    if (!all && &c == cases + 3) break;
    check<Op, float, float>(c);
#ifndef PYFLOWGEN_FLOAT_ONLY
    check<Op, double, double>(c);
    check<Op, bf16, float>(c);
    check<Op, f16, float>(c);
#endif
  }
  printf("%d wrong values\n", failures);
  return failures > 0;
}

}  // namespace
