// Calls the launchers of csrc/cuda/affine_coupling.cu as the adapter does, on buffers of exactly the size needed, and
// compares with plain loops over the same formula: what the sanitizer builds run, where Python would be in the way.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <type_traits>
#include <vector>

#include "affine_coupling.h"
#include "cuda/memory.cuh"
#include "formula/affine_coupling.h"

using namespace pyflowgen;
namespace formula = pyflowgen::PYFLOWGEN_ISA::formula;

namespace {

int failures = 0;

struct Case {
  const char* name;
  int64_t batch, channels, inner, start, step, count;
  AffineScale scale;
  bool inverse, shift_first, elementwise, masked, channels_last, interleaved;
  int64_t offset;  // elements before the first: 1 takes the alignment away
  bool absent;     // no dy, and then no dlogdet
};

template <class T> struct Tensor3 {
  std::vector<T> data;
  T* p;
  Strides s;
  int64_t channels, inner;
  Tensor3(const Case& c, int64_t channels, bool channels_last, int64_t gap, std::mt19937* random)
      : channels(channels), inner(c.inner) {
    const int64_t row = channels * c.inner * gap;
    s = channels_last ? Strides{row, gap, channels * gap} : Strides{row, c.inner * gap, gap};
    data.resize(size_t(c.offset + c.batch * row));
    data.shrink_to_fit();
    p = data.data() + c.offset;
    std::normal_distribution<float> normal;
    for (T& v : data) cuda::narrow(random ? cuda::Compute<T>(normal(*random)) : cuda::Compute<T>(NAN), v);
  }
  T& at(int64_t b, int64_t c, int64_t i) { return p[b * s.batch + c * s.channel + i * s.inner]; }
};

template <class T> bool close(const char* name, const char* what, double got, double want) {
  const double eps = std::is_same_v<T, double>  ? 1e-12
                     : std::is_same_v<T, float> ? 2e-5
                     : std::is_same_v<T, bf16>  ? 2e-2
                                                : 3e-3;
  if (std::abs(got - want) <= eps * (1 + std::abs(want))) return true;
  if (++failures < 20) printf("%s: %s is %g, expected %g\n", name, what, got, want);
  return false;
}

template <AffineScale S, class T, class A> void check(const Case& c) {
  std::mt19937 random(7);
  const int64_t gap = c.interleaved ? 2 : 1;
  Tensor3<T> x(c, c.channels, c.channels_last, 1, &random), dy(c, c.channels, c.channels_last, 1, &random);
  Tensor3<T> y(c, c.channels, c.channels_last, 1, nullptr), dx(c, c.channels, c.channels_last, 1, nullptr);
  // Interleaved: shift and log-scale alternate in one buffer.
  Tensor3<T> shift(c, c.count, c.channels_last, gap, &random), dshift(c, c.count, c.channels_last, gap, nullptr);
  Tensor3<T> separate(c, c.count, c.channels_last, 1, &random), dseparate(c, c.count, c.channels_last, 1, nullptr);
  const T* log_scale = c.interleaved ? shift.p + 1 : separate.p;
  T* dlog_scale = c.interleaved ? dshift.p + 1 : dseparate.p;
  const Strides ls = c.interleaved ? shift.s : separate.s;
  std::vector<uint8_t> mask(size_t(c.masked ? c.channels * c.inner : 0));
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = uint8_t((i / 3 + i) % 2);
  const Strides ms{0, c.inner, 1};
  std::vector<A> logdet(size_t(c.batch), A(NAN)), dlogdet(size_t(c.batch), A(0.5));

  AffineCouplingOptions o{c.batch, c.channels, c.inner,       c.start,   c.step,       c.count,
                          c.scale, 2.0,        c.shift_first, c.inverse, c.elementwise};
  const bool affine = S != AffineScale::additive;
  std::vector<double> partial(size_t(c.batch * cuda::affine_coupling_segments(o)), NAN);
  cuda::affine_coupling(
      AffineCouplingForward<T, A>{o, x.p, x.s, shift.p, shift.s, affine ? log_scale : nullptr, affine ? ls : Strides{},
                                  c.masked ? mask.data() : nullptr, ms, y.p, y.s, logdet.data()},
      partial.data(), nullptr);
  cuda::affine_coupling_backward(
      AffineCouplingBackward<T, A>{
          o, c.absent ? nullptr : dy.p, c.absent ? Strides{} : dy.s, c.absent ? nullptr : dlogdet.data(), 1, x.p, x.s,
          shift.p, shift.s, affine ? log_scale : nullptr, affine ? ls : Strides{}, c.masked ? mask.data() : nullptr, ms,
          dx.p, dx.s, dshift.p, dshift.s, affine ? dlog_scale : nullptr, affine ? ls : Strides{}},
      nullptr);

  const auto wide = [](T v) { return double(cuda::widen(v)); };
  for (int64_t b = 0; b < c.batch; ++b) {
    double total = 0;
    for (int64_t ch = 0; ch < c.channels; ++ch)
      for (int64_t i = 0; i < c.inner; ++i) {
        const int64_t k = (ch - c.start) / c.step;
        const bool part = ch >= c.start && (ch - c.start) % c.step == 0 && k < c.count,
                   on = part && (!c.masked || mask[size_t(ch * c.inner + i)]);
        const double vx = wide(x.at(b, ch, i)), vdy = c.absent ? 0 : wide(dy.at(b, ch, i));
        formula::Coupled<double> f{vx, 0};
        formula::CoupledGradient<double> g{vdy, 0, 0};
        const int64_t at = b * ls.batch + k * ls.channel + i * ls.inner;
        if (on) {
          const double t = wide(shift.at(b, k, i)), s = wide(log_scale[at]);
          f = formula::affine_coupling<S>(vx, t, s, 2.0, c.shift_first, c.inverse);
          g = formula::affine_coupling_backward<S>(vdy, c.absent ? 0.0 : 0.5, vx, t, s, 2.0, c.shift_first, c.inverse);
        }
        close<T>(c.name, "y", wide(y.at(b, ch, i)), f.y);
        close<T>(c.name, "dx", wide(dx.at(b, ch, i)), g.dx);
        if (part) close<T>(c.name, "dshift", wide(dshift.at(b, k, i)), g.dt);
        if (part && affine) close<T>(c.name, "dlog_scale", wide(dlog_scale[at]), g.ds);
        total += f.l;
      }
    close<A>(c.name, "logdet", double(logdet[size_t(b)]), c.inverse ? -total : total);
  }
}

template <class T, class A> void check(const Case& c) {
  switch (c.scale) {
    case AffineScale::additive: return check<AffineScale::additive, T, A>(c);
    case AffineScale::exp: return check<AffineScale::exp, T, A>(c);
    default: return check<AffineScale::sigmoid, T, A>(c);
  }
}

using enum AffineScale;
// The first three take the barrier, the 128-bit path and the partial sums: enough for a planted bug.
const Case cases[] = {
    // name            batch channels inner start step count scale inverse shift_first elementwise masked last
    // interleaved offset absent
    {"one row a block", 3, 640, 2, 0, 1, 640, exp, false, false, false, false, false, false, 0, false},
    {"segments", 2, 12, 1024, 0, 1, 12, exp, true, false, false, false, false, false, 0, false},
    {"many rows", 70, 8, 1, 4, 1, 4, exp, false, false, false, false, false, false, 0, false},
    {"tiny rows", 300, 3, 1, 1, 1, 2, exp, false, true, false, false, false, false, 0, false},
    {"every other channel", 5, 9, 4, 1, 2, 4, sigmoid, false, false, false, false, false, false, 0, false},
    {"mask", 3, 4, 16, 0, 1, 4, exp, false, false, false, true, false, false, 0, false},
    {"mask, odd", 3, 5, 7, 0, 1, 5, sigmoid, true, true, false, true, false, false, 0, false},
    {"channels last", 3, 8, 9, 0, 1, 4, exp, false, false, false, false, true, false, 0, false},
    {"channels last, mask", 3, 6, 9, 0, 1, 6, exp, false, false, false, true, true, false, 0, false},
    {"interleaved", 9, 16, 1, 8, 1, 8, exp, false, false, false, false, false, true, 0, false},
    {"unaligned", 4, 16, 4, 0, 1, 16, exp, false, false, false, false, false, false, 1, false},
    {"elementwise", 5000, 1, 1, 0, 1, 1, sigmoid, true, false, true, false, false, false, 0, false},
    {"additive", 4, 16, 1, 0, 1, 16, additive, true, false, false, false, false, false, 0, false},
    {"no gradient of y", 4, 16, 1, 0, 1, 8, exp, false, false, false, false, false, false, 0, true},
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
