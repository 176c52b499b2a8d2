// What splines share on CUDA: how rows are cut among blocks, parameters staged in shared memory, an axis of knots by
// softmax, the search, the kernels around one element. A `Kind` is one of the splines: forward and backward of an
// element whose parameters begin at u in shared memory. forward() returns y and the forward map's log-derivative;
// backward() leaves the parameters' gradients in their place and returns that of x.
//
// A block takes whole rows, or a piece of a long one, as many elements at a time as fit: 256 of up to 15 bins of a
// rational quadratic in float32. Parameters that lie in runs, one an element, are copied by all threads of the block,
// neighbours reading neighbouring addresses; images' planes, where neighbouring elements have neighbouring parameters,
// by the element's own thread. Gradients take the place of the parameters and go back the same way. An odd pitch keeps
// neighbouring threads in different banks. Few long rows are cut into segments, a block each, whose sums a second
// kernel adds in order: no atomics, the same result on every run and device.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "formula/rational_quadratic_spline.h"
#include "rational_quadratic_spline.h"

namespace pyflowgen::cuda {
namespace {

namespace formula = pyflowgen::PYFLOWGEN_ISA::formula;

// ------------------------------------------------------------------------------------------------ how work is cut

// Elements counted row by row, and where the e-th is.
struct Position { int64_t row, channel, inner; };
struct Order {
  Divider row, run;  // elements of a row; those along its faster dimension
  bool by_channel;   // which is the channels, not inner
  Order(int64_t channels, int64_t inner, bool by_channel)
      : row(channels * inner), run(by_channel ? channels : inner), by_channel(by_channel) {}
  __device__ __forceinline__ Position operator()(int64_t e) const {
    const int64_t r = row(e), rest = e - r * int64_t(row.d), outer = run(rest), along = rest - outer * int64_t(run.d);
    return {r, by_channel ? along : outer, by_channel ? outer : along};
  }
};

struct Cut {
  int64_t batch, rows;             // a block's rows: several whole ones, or one
  int64_t segments, start, count;  // of a row; transformed channels
  Divider by_step;
  Order part, whole;       // the transformed elements; all
  bool copies;             // not all are transformed
  int each, pitch, lanes;  // elements staged at a time, their distance in shared memory, threads that add up a row
};

// The block's elements in an order: [begin, end).
struct Range { int64_t begin, end; };
__device__ __forceinline__ Range range(const Cut& cut, const Order& order) {
  const int64_t elements = int64_t(order.row.d), row = int64_t(blockIdx.x) * cut.rows;
  if (cut.segments == 1) return {row * elements, (row + cut.rows < cut.batch ? row + cut.rows : cut.batch) * elements};
  const int64_t each = (elements + cut.segments - 1) / cut.segments, first = each * blockIdx.y;
  return {row * elements + (first < elements ? first : elements),
          row * elements + (first + each < elements ? first + each : elements)};
}

// The block's elements that are not transformed; from may be null for zeros.
template <class T>
__device__ __forceinline__ void copy_rest(const Cut& cut, const View<const T>& from, const View<T>& to) {
  if (!cut.copies) return;
  const auto [begin, end] = range(cut, cut.whole);
  for (int64_t e = begin + threadIdx.x; e < end; e += threads) {
    const Position at = cut.whole(e);
    const int64_t k = at.channel - cut.start, index = k > 0 ? cut.by_step(k) : 0;
    if (k >= 0 && index * int64_t(cut.by_step.d) == k && index < cut.count) continue;
    *to.at(at.row, at.channel, at.inner) = from.p ? *from.at(at.row, at.channel, at.inner) : T{};
  }
}

// ------------------------------------------------------------------------------------------------- the parameters

// In shared memory: an offset or a sum for each thread, then the elements' parameters.
constexpr int64_t exchange_bytes = 8 * threads;
// What every device gives a block without being asked for more, less what sum_lanes takes.
constexpr int64_t shared_bytes = (48 << 10) - 8 * threads / warp;

// `columns` parameters of the pass's `count` elements between memory and `staged`, the first one's place in shared
// memory. All threads of the block call it; before and after it a thread may touch its own element's alone.
template <bool write, class T, class C>
__device__ __forceinline__ void exchange(const Cut& cut, const SplineParameters<T>& p, int columns, int count,
                                         const Position& at, int64_t* offsets, C* staged) {
  const auto move = [](C& inside, T& outside) {
    if constexpr (write) narrow(inside, outside);
    else inside = widen(outside);
  };
  const int own = int(threadIdx.x);
  const int64_t offset = at.row * p.strides.batch + at.channel * p.strides.channel + at.inner * p.strides.inner;
  if (p.parameter != 1) {
    if (own < count)
      for (int j = 0; j < columns; ++j) move(staged[own * cut.pitch + j], p.p[offset + j * p.parameter]);
    return;
  }
  offsets[own] = offset;
  __syncthreads();
  const int rows = threads / columns, rest = threads % columns;
  for (int element = own / columns, j = own % columns; element < count;) {
    move(staged[element * cut.pitch + j], p.p[offsets[element] + j]);
    element += rows, j += rest;
    if (j >= columns) j -= columns, ++element;
  }
  __syncthreads();
}

template <class T> struct Parameters {
  SplineParameters<T> widths, heights, derivatives;
  bool packed;  // one tensor holds them
};

template <bool write, class T, class C>
__device__ __forceinline__ void exchange_all(const Cut& cut, const Parameters<T>& p, int bins, int derivatives,
                                             int count, const Position& at, int64_t* offsets, C* staged) {
  exchange<write>(cut, p.widths, p.packed ? 2 * bins + derivatives : bins, count, at, offsets, staged);
  if (p.packed) return;
  exchange<write>(cut, p.heights, bins, count, at, offsets, staged + bins);
  exchange<write>(cut, p.derivatives, derivatives, count, at, offsets, staged + 2 * bins);
}

// ------------------------------------------------------------------------------------------------- one element

template <class C> struct Options {
  int bins, derivatives;
  SplineTails tails;
  bool inverse;
  C left, right, bottom, top;
  C min_width, min_height, rest_width, rest_height;  // rest: what the softmax shares out
  C min_derivative, edge, inverse_clip, scale, shift_width, shift_height;

  explicit Options(const RationalQuadraticSplineOptions& o)
      : bins(int(o.bins)),
        derivatives(int(o.derivatives)),
        tails(o.tails),
        inverse(o.inverse),
        left(C(o.left)),
        right(C(o.right)),
        bottom(C(o.bottom)),
        top(C(o.top)),
        min_width(C(o.min_bin_width)),
        min_height(C(o.min_bin_height)),
        rest_width(C(1 - o.min_bin_width * double(o.bins))),
        rest_height(C(1 - o.min_bin_height * double(o.bins))),
        min_derivative(C(o.min_derivative)),
        edge(C(o.edge)),
        inverse_clip(C(o.clip > 0 ? 1 / o.clip : 0)),
        scale(C(o.scale)),
        shift_width(C(o.shift_width)),
        shift_height(C(o.shift_height)) {}
};

// A sum that keeps what each addition loses: a knot is then as exact as its distance from the middle of the interval.
template <class C> struct Sum {
  C sum = 0, lost = 0;
  __device__ __forceinline__ void add(C e) {
    const C next = sum + e, added = next - sum;
    lost += (sum - (next - added)) + (e - added);
    sum = next;
  }
  // Twice this less the total, with one rounding but for that of what was lost.
  __device__ __forceinline__ C from_middle(const Sum& total) const {
    const C twice = sum + sum, difference = twice - total.sum, subtracted = twice - difference;
    const C error = (twice - (difference + subtracted)) + (subtracted - total.sum);
    return difference + (error + (lost + lost - total.lost));
  }
};

// One element's parameters of one axis, widths or heights, in shared memory. nflows' become their exponentials as soon
// as those are known; the others are wanted again, and their exponentials computed anew. freia's, of affine tails, have
// a softplus in an exponential's place.
//
// Knot k lies at middle + (k - bins / 2) least + from_middle(sum of k exponentials) (half + half_rest), where half_rest
// is what half lacks: the outermost knots must fit to the ends, from which the others' error would be seen in a narrow
// bin.
template <SplineConvention S, bool height, class C> struct Axis {
  static constexpr bool kept = S == SplineConvention::nflows;
  const C* widths;  // torchflows' heights are made of them too
  C* own;
  int bins;
  C low, high, middle, least, half, half_rest, scale, offset, softclip;
  Sum<C> total;
  formula::OwnSide<C> side;  // freia's

  // Parameter k as the softmax takes it, but for the scale.
  __device__ __forceinline__ C logit(int k) const {
    if constexpr (S == SplineConvention::zuko) return formula::softclip(own[k] * scale, softclip).value;
    else if constexpr (height && S == SplineConvention::torchflows) return formula::fma(own[k], C(1e-3), widths[k]);
    else return own[k];
  }
  __device__ __forceinline__ formula::KnotDerivative<C> size(int k) const {
    return formula::softplus_at_least(own[k] + offset, scale);
  }
  __device__ __forceinline__ C exponential_of(C logit) const {
    if constexpr (S == SplineConvention::freia) return formula::softplus_at_least(logit + offset, scale).value;
    const C scaled = S == SplineConvention::zuko ? logit + offset : formula::fma(logit, scale, offset);
    return formula::exp_in_range(formula::at_least(scaled, formula::exp_lowest<C>));
  }
  __device__ __forceinline__ C exponential(int k) const { return kept ? own[k] : exponential_of(logit(k)); }

  __device__ __forceinline__ Axis(const Options<C>& o, const C* widths, C* own, C minimum, C low, C high)
      : widths(widths),
        own(own),
        bins(o.bins),
        low(low),
        high(high),
        scale(o.scale),
        // zuko's bounds are ±c/2 for widths and heights: 1 / clip is of the derivatives
        softclip(o.inverse_clip + o.inverse_clip) {
    C largest = logit(0);
    for (int k = 1; k < bins; ++k) largest = formula::greater(logit(k), largest);
    offset = S == SplineConvention::zuko ? -largest : -largest * scale;
    for (int k = 0; k < bins; ++k) {
      const C e = exponential_of(logit(k));
      if constexpr (kept) own[k] = e;
      total.add(e);
    }
    fit(minimum);
  }
  // freia's, of sizes of at least `minimum`, from `begin` on.
  __device__ __forceinline__ Axis(const Options<C>& o, C* own, C shift, C minimum, C begin)
      : widths(own), own(own), bins(o.bins), scale(minimum), offset(shift), softclip(0) {
    for (int k = 0; k < bins; ++k) total.add(size(k).value);
    side = formula::own_side(total.sum + total.lost, begin, o.inverse_clip, o.inverse_clip > 0);
    low = side.begin, high = side.begin + side.size;
    fit(C(0));
  }
  __device__ __forceinline__ void fit(C minimum) {
    const C range = high - low, count = C(bins);
    middle = (low + high) * C(0.5);
    least = minimum * range;
    // range - bins least, and what of it is lost
    const C shared = formula::fma(-count, least, range), lost = formula::fma(-count, least, range - shared);
    const C sum = total.sum + total.lost, sum_rest = (total.sum - sum) + total.lost, share = C(0.5) / sum;
    half = shared * share;
    half_rest = formula::fma(formula::fma(C(-2) * half, sum, shared), share,
                             formula::fma(lost, share, half * sum_rest * C(-2) * share));
  }

  // The ends of the bins but the last, asked for one after another.
  struct Ends {
    const Axis& axis;
    Sum<C> sum{};
    __device__ __forceinline__ C next(int k) {
      sum.add(axis.exponential(k));
      const C share = sum.from_middle(axis.total), from_middle = C(k + 1) - C(0.5) * C(axis.bins);
      return formula::fma(share, axis.half,
                          formula::fma(share, axis.half_rest, formula::fma(from_middle, axis.least, axis.middle)));
    }
  };
  __device__ __forceinline__ Ends ends() const { return {*this}; }
};

// The bin of `value` on axis a: its number, its ends, and those on b.
template <class C> struct Found {
  int bin;
  C a0, a1, b0, b1;
};
template <class C, class A, class B>
__device__ __forceinline__ Found<C> search(C value, int bins, const A& a, const B& b) {
  Found<C> f{0, a.low, a.high, b.low, b.high};
  auto ends_a = a.ends();
  auto ends_b = b.ends();
  C end_a = a.low, end_b = b.low;
  for (int k = 0; k < bins; ++k) {
    C next_a = a.high, next_b = b.high;
    if (k + 1 < bins) next_a = ends_a.next(k), next_b = ends_b.next(k);
    if (k == 0 || value >= end_a) f = {k, end_a, next_a, end_b, next_b};
    end_a = next_a, end_b = next_b;
  }
  return f;
}

// An element's input and interval, and whether the spline has it.
template <class C> struct Input {
  C x, left, right, bottom, top;
  bool inside, circular;
};
template <class T, class A, class Task>
__device__ __forceinline__ Input<Compute<T>> load_input(const Task& t, T x, const Position& at) {
  using C = Compute<T>;
  const Options<C>& o = t.o;
  const C bound = t.bound.p ? C(*t.bound.at(0, at.channel, at.inner)) : C(1);
  Input<C> in{widen(x), o.left * bound, o.right * bound, o.bottom * bound, o.top * bound, false, false};
  in.inside = o.tails >= SplineTails::affine ||
              (in.x >= (o.inverse ? in.bottom : in.left) && in.x <= (o.inverse ? in.top : in.right));
  in.circular = t.circular.p && *t.circular.at(0, at.channel, at.inner);
  return in;
}

// ------------------------------------------------------------------------------------------------------- kernels

template <class T, class A> struct ForwardTask {
  Cut cut;
  Options<Compute<T>> o;
  View<const T> x;  // part: channel k is the k-th transformed one; whole: as it is
  View<const T> whole_x;
  Parameters<const T> u;
  View<const A> bound;
  View<const uint8_t> circular, mask;
  View<T> y, whole_y;
  A* logdet;
  double* partial;  // (batch, segments), or null: the sum is the log-determinant
};

template <class Kind, class T, class A> __global__ void __launch_bounds__(threads, 2)
    forward_kernel(const ForwardTask<T, A> t) {
  using C = Compute<T>;
  PYFLOWGEN_DYNAMIC_SHARED(int64_t, offsets);
  C* const staged = reinterpret_cast<C*>(offsets + threads);
  const int own = int(threadIdx.x);
  copy_rest(t.cut, t.whole_x, t.whole_y);
  const auto [begin, end] = range(t.cut, t.cut.part);
  double total = 0;
  for (int64_t first = begin; first < end; first += t.cut.each) {
    const int count = int(end - first < t.cut.each ? end - first : t.cut.each);
    const Position at = t.cut.part(first + (own < count ? own : 0));
    exchange_all<false>(t.cut, t.u, t.o.bins, t.o.derivatives, count, at, offsets, staged);
    if (own >= count) continue;
    T value = *t.x.at(at.row, at.channel, at.inner);
    if (!t.mask.p || *t.mask.at(0, at.channel, at.inner)) {
      const Input<C> in = load_input<T, A>(t, value, at);
      C l = 0;
      if (in.inside) {
        const auto r = Kind::forward(t.o, in, staged + own * t.cut.pitch);
        narrow(r.y, value);
        l = r.l;
      } else if (t.o.tails == SplineTails::none) {
        l = formula::not_a_number<C>;
        narrow(l, value);
      }
      total += double(l);
    }
    *t.y.at(at.row, at.channel, at.inner) = value;
  }
  // The sums of the block's rows, from one thread's elements each.
  double* const sums = reinterpret_cast<double*>(offsets);
  sums[own] = total;
  __syncthreads();
  const int64_t row = int64_t(blockIdx.x) * t.cut.rows + own / t.cut.lanes;
  const bool some = own / t.cut.lanes < t.cut.rows && row < t.cut.batch;
  const int width = t.cut.rows > 1 ? int(t.cut.part.row.d) : threads, lane = own % t.cut.lanes;
  total = 0;
  for (int i = lane; some && i < width; i += t.cut.lanes) total += sums[own / t.cut.lanes * width + i];
  total = sum_lanes(total, t.cut.lanes);
  if (lane > 0 || !some) return;
  if (t.partial) t.partial[row * t.cut.segments + blockIdx.y] = total;
  else t.logdet[row] = A(t.o.inverse ? -total : total);
}

template <class T, class A> struct BackwardTask {
  Cut cut;
  Options<Compute<T>> o;
  View<const T> dy, whole_dy;  // null: zeros
  const A* dlogdet;            // null: zeros
  int64_t dlogdet_stride;
  View<const T> x;
  Parameters<const T> u;
  View<const A> bound;
  View<const uint8_t> circular, mask;
  View<T> dx, whole_dx;
  Parameters<T> du;
};

template <class Kind, class T, class A> __global__ void __launch_bounds__(threads, 2)
    backward_kernel(const BackwardTask<T, A> t) {
  using C = Compute<T>;
  PYFLOWGEN_DYNAMIC_SHARED(int64_t, offsets);
  C* const staged = reinterpret_cast<C*>(offsets + threads);
  const int own = int(threadIdx.x);
  copy_rest(t.cut, t.whole_dy, t.whole_dx);
  const auto [begin, end] = range(t.cut, t.cut.part);
  for (int64_t first = begin; first < end; first += t.cut.each) {
    const int count = int(end - first < t.cut.each ? end - first : t.cut.each);
    const Position at = t.cut.part(first + (own < count ? own : 0));
    exchange_all<false>(t.cut, t.u, t.o.bins, t.o.derivatives, count, at, offsets, staged);
    if (own < count) {
      C* const u = staged + own * t.cut.pitch;
      T dx{};
      if (t.dy.p) dx = *t.dy.at(at.row, at.channel, at.inner);
      const bool on = !t.mask.p || *t.mask.at(0, at.channel, at.inner);
      const Input<C> in = load_input<T, A>(t, *t.x.at(at.row, at.channel, at.inner), at);
      if (on && in.inside) {
        const C dlogdet = t.dlogdet ? C(t.dlogdet[at.row * t.dlogdet_stride]) : C(0);
        narrow(Kind::backward(t.o, in, widen(dx), dlogdet, u), dx);
      } else {
        for (int k = 0; k < 2 * t.o.bins + t.o.derivatives; ++k) u[k] = 0;
        if (on && t.o.tails == SplineTails::none) dx = T{};
      }
      *t.dx.at(at.row, at.channel, at.inner) = dx;
    }
    exchange_all<true>(t.cut, t.du, t.o.bins, t.o.derivatives, count, at, offsets, staged);
  }
}

// ------------------------------------------------------------------------------------------------------ launchers

// Whether one tensor holds all parameters, an element's in a row.
template <class T> Parameters<T> parameters(const SplineParameters<T>& w, const SplineParameters<T>& h,
                                            const SplineParameters<T>& d, int64_t bins) {
  const auto same = [&](const Strides& s) {
    return s.batch == w.strides.batch && s.channel == w.strides.channel && s.inner == w.strides.inner;
  };
  return {w, h, d,
          h.p == w.p + bins * w.parameter && d.p == h.p + bins * w.parameter && h.parameter == w.parameter &&
              d.parameter == w.parameter && same(h.strides) && same(d.strides)};
}

// The transformed channels of a tensor that has them all.
template <class T> View<T> part(const RationalQuadraticSplineOptions& o, View<T> v) {
  if (v.p) v.p += o.start * v.s.channel;
  v.s.channel *= o.step;
  return v;
}

int64_t spline_segments(const RationalQuadraticSplineOptions& o) {
  const int64_t wanted = ceil_div(busy_blocks, o.batch), pieces = ceil_div(o.count * o.inner, threads);
  return wanted < pieces ? wanted : pieces;
}

template <class T> Cut make_cut(const RationalQuadraticSplineOptions& o, const SplineParameters<const T>& widths) {
  const int64_t elements = o.count * o.inner, segments = spline_segments(o);
  const int pitch = int(2 * o.bins + o.derivatives) | 1;
  const int64_t fit = (shared_bytes - exchange_bytes) / (pitch * int64_t(sizeof(Compute<T>)));
  const int64_t each = fit < threads ? fit : threads;
  // As many whole rows as fit, but fewer where that would leave most of a GPU idle.
  const int64_t spread = ceil_div(o.batch, busy_blocks), least = ceil_div(64, elements);
  int64_t rows = spread > least ? spread : least;
  if (rows * elements > each) rows = each / elements;
  if (rows < 1) rows = 1;
  int lanes = threads;
  while (lanes * rows > threads) lanes /= 2;
  const bool by_channel = o.inner > 1 && o.count > 1 && widths.strides.channel < widths.strides.inner;
  return {o.batch,
          rows,
          segments,
          o.start,
          o.count,
          Divider(o.step),
          Order(o.count, o.inner, by_channel),
          Order(o.channels, o.inner, by_channel),
          o.count < o.channels,
          int(each),
          pitch,
          lanes};
}

dim3 grid(const Cut& cut) { return dim3(unsigned(ceil_div(cut.batch, cut.rows)), unsigned(cut.segments)); }
template <class T> size_t bytes(const Cut& cut) {
  return size_t(exchange_bytes) + size_t(cut.each) * size_t(cut.pitch) * sizeof(Compute<T>);
}

// The launches of one op's kernels.
template <class Kind, class T, class A>
void launch_forward(const RationalQuadraticSplineForward<T, A>& a, double* partial, void* stream) {
  const View<const T> x{a.x, a.x_strides};
  const View<T> y{a.y, a.y_strides};
  const ForwardTask<T, A> t{make_cut<T>(a.o, a.widths),
                            Options<Compute<T>>(a.o),
                            part(a.o, x),
                            x,
                            parameters(a.widths, a.heights, a.derivatives, a.o.bins),
                            {a.bound, a.bound_strides},
                            {a.circular, a.circular_strides},
                            part(a.o, View<const uint8_t>{a.mask, a.mask_strides}),
                            part(a.o, y),
                            y,
                            a.logdet,
                            partial};
  PYFLOWGEN_LAUNCH((&forward_kernel<Kind, T, A>), grid(t.cut), threads, bytes<T>(t.cut), stream, t);
  if (partial)
    PYFLOWGEN_LAUNCH(&sum_segments<A>, unsigned(a.o.batch), threads, 0, stream, partial, t.cut.segments, a.o.inverse,
                     a.logdet);
}

template <class Kind, class T, class A>
void launch_backward(const RationalQuadraticSplineBackward<T, A>& a, void* stream) {
  const View<const T> dy{a.dy, a.dy_strides};
  const View<T> dx{a.dx, a.dx_strides};
  const BackwardTask<T, A> t{make_cut<T>(a.o, a.widths),
                             Options<Compute<T>>(a.o),
                             part(a.o, dy),
                             dy,
                             a.dlogdet,
                             a.dlogdet_stride,
                             part(a.o, View<const T>{a.x, a.x_strides}),
                             parameters(a.widths, a.heights, a.derivatives, a.o.bins),
                             {a.bound, a.bound_strides},
                             {a.circular, a.circular_strides},
                             part(a.o, View<const uint8_t>{a.mask, a.mask_strides}),
                             part(a.o, dx),
                             dx,
                             parameters(a.dwidths, a.dheights, a.dderivatives, a.o.bins)};
  PYFLOWGEN_LAUNCH((&backward_kernel<Kind, T, A>), grid(t.cut), threads, bytes<T>(t.cut), stream, t);
}

}  // namespace
}  // namespace pyflowgen::cuda
