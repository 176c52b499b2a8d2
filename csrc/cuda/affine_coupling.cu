// affine_coupling on CUDA: one pass over memory, log-determinants summed on the way. Not yet run on a GPU.
//
// Floor, n transformed elements of b bytes and r copied ones: forward reads x, shift, log_scale and writes y, (4 n + 2
// r) b bytes; backward reads dy, x, shift, log_scale and writes three gradients, (7 n + 2 r) b bytes. The kernels move
// just that, plus a mask's byte for each element and 16 bytes for each of at most 2048 + batch partial sums where an
// event is cut. About 20 operations an element (exp) to 60 (sigmoid backward), 30 more for the addresses of a unit: in
// float32 an H100 has 130 instruction slots a transformed element at its memory's speed, so memory is the limit.
//
// The event is walked in units of W elements along the dimension (channel or inner) where x is dense: 16 bytes' worth
// where every tensor is dense and aligned there, else 1 (interleaved parameters, odd sizes). Thus neighbouring threads
// touch neighbouring addresses; where the batch is the dense dimension the result is right but access not coalesced. A
// block's threads are shared out over rows, from 256 rows a block for tiny events to one; few long rows are cut into
// segments, a block each, whose sums a second kernel adds in order: no atomics, the same result on every run and
// device.
#include "affine_coupling.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "formula/affine_coupling.h"

namespace pyflowgen::cuda {
namespace {

namespace formula = pyflowgen::PYFLOWGEN_ISA::formula;

// ------------------------------------------------------------------------------------------------ how work is cut

struct Cut {
  int64_t batch, units, per_segment;  // units of W elements a row
  int64_t start, step, count;
  Divider run, by_step;  // run: units along the walked dimension
  int lanes;             // threads that share a row
  bool by_channel;       // a unit lies along the channels, not along inner
  bool inverse, shift_first, elementwise;
  AffineScale scale;
  double clamp, gain;
  dim3 grid;
};

// Which piece of work is this thread's: units begin, begin + lanes, … below end of `row`.
struct Place {
  int64_t row, begin, end;
  int lane;
};
__device__ __forceinline__ Place place(const Cut& cut) {
  const int lane = int(threadIdx.x) % cut.lanes;
  const int64_t row = int64_t(blockIdx.x) * (threads / cut.lanes) + int(threadIdx.x) / cut.lanes;
  const int64_t first = cut.per_segment * blockIdx.y, last = first + cut.per_segment;
  return {row, first + lane, row < cut.batch ? (last < cut.units ? last : cut.units) : 0, lane};
}

// Where a unit is; k: its channel among the parameters', or -1 where x is copied.
struct Unit { int64_t channel, inner, k; };
template <int W> __device__ __forceinline__ Unit find(const Cut& cut, int64_t unit) {
  const int64_t outer = cut.run(unit), along = (unit - outer * int64_t(cut.run.d)) * W;
  const int64_t channel = cut.by_channel ? along : outer, from_start = channel - cut.start;
  int64_t k = from_start;
  if (cut.step > 1 && k > 0) {
    k = cut.by_step(k);
    if (k * cut.step != from_start) k = -1;
  }
  return {channel, cut.by_channel ? outer : along, k >= 0 && k < cut.count ? k : -1};
}

// ------------------------------------------------------------------------------------------------------- kernels

// Call f<S>() for the scale given as a template argument, or else for the one chosen at run time. 128-bit kernels are
// compiled for every scale; their plain twins branch on it for each element, which costs them little and the build
// less.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <AffineScale... S, class F> __host__ __device__ __forceinline__ void with_scale(AffineScale scale, F f) {
  if constexpr (sizeof...(S) > 0) {
    (f.template operator()<S>(), ...);
  } else {
    switch (scale) {
      case AffineScale::additive: return f.template operator()<AffineScale::additive>();
      case AffineScale::exp: return f.template operator()<AffineScale::exp>();
      case AffineScale::tanh: return f.template operator()<AffineScale::tanh>();
      case AffineScale::sigmoid: return f.template operator()<AffineScale::sigmoid>();
      case AffineScale::sigmoid_eps: return f.template operator()<AffineScale::sigmoid_eps>();
      case AffineScale::softclip: return f.template operator()<AffineScale::softclip>();
      case AffineScale::atan: return f.template operator()<AffineScale::atan>();
      case AffineScale::softplus: return f.template operator()<AffineScale::softplus>();
    }
  }
}

template <class T, class A> struct ForwardTask {
  Cut cut;
  View<const T> x, shift, log_scale;
  View<const uint8_t> mask;
  View<T> y;
  A* logdet;
  double* partial;  // (batch, segments), or null: the sum is the log-determinant
};

template <int W, class T, class A, AffineScale... Scale> __global__ void __launch_bounds__(threads, 2)
    forward_kernel(const ForwardTask<T, A> t) {
  using C = Compute<T>;
  const Place here = place(t.cut);
  const int64_t mask_run = t.cut.by_channel ? t.mask.s.channel : t.mask.s.inner;
  double total = 0;
  for (int64_t unit = here.begin; unit < here.end; unit += t.cut.lanes) {
    const Unit u = find<W>(t.cut, unit);
    auto x = load<W>(t.x.at(here.row, u.channel, u.inner));
    if (u.k >= 0) {
      const auto shift = load<W>(t.shift.at(here.row, u.k, u.inner));
      const uint8_t* mask = t.mask.p ? t.mask.at(0, u.channel, u.inner) : nullptr;
      C sum = 0;
      with_scale<Scale...>(t.cut.scale, [&]<AffineScale S>() {
        Vector<T, W> log_scale{};
        if constexpr (S != AffineScale::additive) log_scale = load<W>(t.log_scale.at(here.row, u.k, u.inner));
#pragma unroll
        for (int j = 0; j < W; ++j) {
          auto [y, l] =
              formula::affine_coupling<S>(widen(x.at[j]), widen(shift.at[j]), widen(log_scale.at[j]) * C(t.cut.gain),
                                          C(t.cut.clamp), t.cut.shift_first, t.cut.inverse);
          if (mask && !mask[j * mask_run]) l = 0;
          else narrow(y, x.at[j]);
          sum += l;
          if (t.cut.elementwise) t.logdet[unit * W + j] = A(t.cut.inverse ? -l : l);
        }
      });
      total += double(sum);
    }
    store<W>(t.y.at(here.row, u.channel, u.inner), x);
  }
  if (t.cut.elementwise) return;
  total = sum_lanes(total, t.cut.lanes);
  if (here.lane == 0 && here.row < t.cut.batch) {
    if (t.partial) t.partial[here.row * gridDim.y + blockIdx.y] = total;
    else t.logdet[here.row] = A(t.cut.inverse ? -total : total);
  }
}

template <class T, class A> struct BackwardTask {
  Cut cut;
  View<const T> dy;  // null: zeros
  const A* dlogdet;  // null: zeros
  int64_t dlogdet_stride;
  View<const T> x, shift, log_scale;
  View<const uint8_t> mask;
  View<T> dx, dshift, dlog_scale;
};

template <int W, class T, class A, AffineScale... Scale> __global__ void __launch_bounds__(threads, 2)
    backward_kernel(const BackwardTask<T, A> t) {
  using C = Compute<T>;
  const Place here = place(t.cut);
  const int64_t mask_run = t.cut.by_channel ? t.mask.s.channel : t.mask.s.inner;
  C dlogdet =
      t.dlogdet && !t.cut.elementwise && here.begin < here.end ? C(t.dlogdet[here.row * t.dlogdet_stride]) : C(0);
  for (int64_t unit = here.begin; unit < here.end; unit += t.cut.lanes) {
    const Unit u = find<W>(t.cut, unit);
    Vector<T, W> dy{};
    if (t.dy.p) dy = load<W>(t.dy.at(here.row, u.channel, u.inner));
    if (u.k >= 0) {
      const auto x = load<W>(t.x.at(here.row, u.channel, u.inner));
      const auto shift = load<W>(t.shift.at(here.row, u.k, u.inner));
      const uint8_t* mask = t.mask.p ? t.mask.at(0, u.channel, u.inner) : nullptr;
      with_scale<Scale...>(t.cut.scale, [&]<AffineScale S>() {
        Vector<T, W> log_scale{}, dshift, dlog_scale;
        if constexpr (S != AffineScale::additive) log_scale = load<W>(t.log_scale.at(here.row, u.k, u.inner));
#pragma unroll
        for (int j = 0; j < W; ++j) {
          if (t.cut.elementwise && t.dlogdet) dlogdet = C(t.dlogdet[(unit * W + j) * t.dlogdet_stride]);
          auto [dx, dt, ds] = formula::affine_coupling_backward<S>(
              widen(dy.at[j]), dlogdet, widen(x.at[j]), widen(shift.at[j]), widen(log_scale.at[j]) * C(t.cut.gain),
              C(t.cut.clamp), t.cut.shift_first, t.cut.inverse);
          if (mask && !mask[j * mask_run]) dt = ds = 0;
          else narrow(dx, dy.at[j]);
          narrow(dt, dshift.at[j]);
          narrow(ds * C(t.cut.gain), dlog_scale.at[j]);
        }
        store<W>(t.dshift.at(here.row, u.k, u.inner), dshift);
        if constexpr (S != AffineScale::additive) store<W>(t.dlog_scale.at(here.row, u.k, u.inner), dlog_scale);
      });
    }
    store<W>(t.dx.at(here.row, u.channel, u.inner), dy);
  }
}

// ------------------------------------------------------------------------------------------------------ launchers

// The shape as the kernels walk it: an elementwise coupling is one row, dense channels and inner are one dimension.
struct Shape {
  AffineCouplingOptions o;
  bool merge;
  Strides operator()(Strides s) const {
    if (o.elementwise) return {0, 0, s.batch};
    return merge ? Strides{s.batch, 0, s.inner} : s;
  }
};

Shape shape(AffineCouplingOptions o, std::initializer_list<Strides> views) {
  if (o.elementwise) {
    o.inner = o.batch, o.batch = 1;
    return {o, false};
  }
  bool merge = o.count == o.channels && o.inner > 1;
  for (const Strides& s : views) merge &= s.channel == o.inner * s.inner;
  if (merge) o.inner *= o.channels, o.channels = o.count = 1;
  return {o, merge};
}

// Whether a unit of `width` elements is side by side everywhere, on a boundary of its size.
template <class T> bool aligned(const View<T>& v, bool by_channel, int width) {
  const Strides& s = v.s;
  const int64_t across = by_channel ? s.inner : s.channel;
  return (by_channel ? s.channel : s.inner) == 1 && s.batch % width == 0 && across % width == 0 &&
         uintptr_t(v.p) % (sizeof(T) * size_t(width)) == 0;
}

// Whether whole units of `width` elements fill the walked dimension, each either transformed or copied.
bool divisible(const AffineCouplingOptions& o, bool by_channel, int width) {
  if (!by_channel) return o.inner % width == 0;
  return o.step == 1 && o.channels % width == 0 && o.start % width == 0 && o.count % width == 0;
}

bool along_channels(const AffineCouplingOptions& o, const Strides& x) {
  return o.inner == 1 || (o.channels > 1 && x.channel < x.inner);
}

Cut make_cut(const AffineCouplingOptions& o, int64_t segments, bool by_channel, int width) {
  Cut cut{o.batch,
          o.channels * o.inner / width,
          0,
          o.start,
          o.step,
          o.count,
          Divider((by_channel ? o.channels : o.inner) / width),
          Divider(o.step),
          0,
          by_channel,
          o.inverse,
          o.shift_first,
          o.elementwise,
          o.scale,
          o.clamp,
          o.gain,
          {}};
  cut.per_segment = ceil_div(cut.units, segments);
  cut.lanes = lanes_for(cut.per_segment);
  cut.grid = dim3(unsigned(ceil_div(o.batch, threads / cut.lanes)), unsigned(segments));
  return cut;
}

}  // namespace

int64_t affine_coupling_segments(const AffineCouplingOptions& o) {
  const int64_t rows = o.elementwise ? 1 : o.batch, elements = o.elementwise ? o.batch : o.channels * o.inner;
  const int64_t wanted = ceil_div(busy_blocks, rows), pieces = ceil_div(elements, 4096);
  return wanted < pieces ? wanted : pieces;
}

template <class T, class A> void affine_coupling(const AffineCouplingForward<T, A>& a, double* partial, void* stream) {
  const int64_t segments = cuda::affine_coupling_segments(a.o);
  const T* log_scale = a.log_scale ? a.log_scale : a.shift;
  const Strides log_scale_strides = a.log_scale ? a.log_scale_strides : a.shift_strides,
                mask_strides = a.mask ? a.mask_strides : a.x_strides;
  const Shape as = shape(a.o, {a.x_strides, a.shift_strides, log_scale_strides, mask_strides, a.y_strides});
  const bool by_channel = along_channels(as.o, as(a.x_strides));
  const auto view = [&]<class P>(P* p, Strides s) { return View<P>{p, as(s)}; };
  ForwardTask<T, A> t{make_cut(as.o, segments, by_channel, 1),
                      view(a.x, a.x_strides),
                      view(a.shift, a.shift_strides),
                      view(log_scale, log_scale_strides),
                      view(a.mask, mask_strides),
                      view(a.y, a.y_strides),
                      a.logdet,
                      segments > 1 ? partial : nullptr};
  const auto dense = [&](const auto&... views) { return (aligned(views, by_channel, full_width<T>) && ...); };
  const bool wide = divisible(as.o, by_channel, full_width<T>) && dense(t.x, t.shift, t.log_scale, t.y);
  if (wide) t.cut = make_cut(as.o, segments, by_channel, full_width<T>);
  if (!wide) {
    PYFLOWGEN_LAUNCH((&forward_kernel<1, T, A>), t.cut.grid, threads, 0, stream, t);
  } else {
    with_scale(a.o.scale, [&]<AffineScale S>() {
      PYFLOWGEN_LAUNCH((&forward_kernel<full_width<T>, T, A, S>), t.cut.grid, threads, 0, stream, t);
    });
  }
  if (segments > 1 && !as.o.elementwise)
    PYFLOWGEN_LAUNCH(&sum_segments<A>, unsigned(a.o.batch), threads, 0, stream, partial, segments, a.o.inverse,
                     a.logdet);
}

template <class T, class A> void affine_coupling_backward(const AffineCouplingBackward<T, A>& a, void* stream) {
  const int64_t segments = cuda::affine_coupling_segments(a.o);
  const bool affine = a.log_scale;
  const Strides s = affine ? a.log_scale_strides : a.shift_strides,
                ds = affine ? a.dlog_scale_strides : a.dshift_strides;
  const Strides dy_strides = a.dy ? a.dy_strides : a.x_strides, mask_strides = a.mask ? a.mask_strides : a.x_strides;
  const Shape as =
      shape(a.o, {dy_strides, a.x_strides, a.shift_strides, s, mask_strides, a.dx_strides, a.dshift_strides, ds});
  const bool by_channel = along_channels(as.o, as(a.x_strides));
  const auto view = [&]<class P>(P* p, Strides s) { return View<P>{p, as(s)}; };
  BackwardTask<T, A> t{make_cut(as.o, segments, by_channel, 1),
                       view(a.dy, dy_strides),
                       a.dlogdet,
                       a.dlogdet_stride,
                       view(a.x, a.x_strides),
                       view(a.shift, a.shift_strides),
                       view(affine ? a.log_scale : a.shift, s),
                       view(a.mask, mask_strides),
                       view(a.dx, a.dx_strides),
                       view(a.dshift, a.dshift_strides),
                       view(affine ? a.dlog_scale : a.dshift, ds)};
  const auto dense = [&](const auto&... views) { return (aligned(views, by_channel, full_width<T>) && ...); };
  const bool wide = divisible(as.o, by_channel, full_width<T>) &&
                    dense(t.dy, t.x, t.shift, t.log_scale, t.dx, t.dshift, t.dlog_scale);
  if (wide) t.cut = make_cut(as.o, segments, by_channel, full_width<T>);
  if (!wide) {
    PYFLOWGEN_LAUNCH((&backward_kernel<1, T, A>), t.cut.grid, threads, 0, stream, t);
  } else {
    with_scale(a.o.scale, [&]<AffineScale S>() {
      PYFLOWGEN_LAUNCH((&backward_kernel<full_width<T>, T, A, S>), t.cut.grid, threads, 0, stream, t);
    });
  }
}

#define PYFLOWGEN_INSTANTIATE(T, A) \
  template void affine_coupling<T, A>(const AffineCouplingForward<T, A>&, double*, void*); \
  template void affine_coupling_backward<T, A>(const AffineCouplingBackward<T, A>&, void*);
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(float, float)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)

}  // namespace pyflowgen::cuda
