// rational_quadratic_spline on CUDA: a thread an element, parameters staged in shared memory, log-determinants summed
// on the way. Not yet run on a GPU.
//
// Floor, K bins, n transformed elements of b bytes and r copied ones: forward reads x and 3 K - 1 parameters and writes
// y, ((3 K + 1) n + 2 r) b bytes; backward reads those and dy and writes their gradients, ((6 K + 1) n + 2 r) b bytes.
// The kernels move just that, plus a mask's byte for each element and 16 bytes for each of at most 2048 + batch partial
// sums where a row is cut. About 100 operations a bin forward and 110 backward (two exponentials, two sums twice
// without error, two knots), 10 a parameter to stage it, and 300 an element: in float32 with 8 bins some 1,300 where an
// H100 has 850 instruction slots an element at its memory's speed, and 1,700 of 1,700 backward: arithmetic is the limit
// forward.
//
// A block takes whole rows, or a piece of a long one, as many elements at a time as fit: 256 of up to 15 bins in
// float32. Parameters that lie in runs, one an element, are copied by all threads of the block, neighbours reading
// neighbouring addresses; images' planes, where neighbouring elements have neighbouring parameters, by the element's
// own thread. Gradients take the place of the parameters and go back the same way. An odd pitch keeps neighbouring
// threads in different banks. Few long rows are cut into segments, a block each, whose sums a second kernel adds in
// order: no atomics, the same result on every run and device.
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
  C min_derivative, edge, inverse_clip, scale;

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
        scale(C(o.scale)) {}
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
// as those are known; the others are wanted again, and their exponentials computed anew.
//
// Knot k lies at middle + (k - bins / 2) least + from_middle(sum of k exponentials) (half + half_rest), where half_rest
// is what half lacks: the outermost knots must fit to the ends, from which the others' error would be seen in a narrow
// bin.
template <SplineConvention S, bool height, class C> struct Axis {
  static constexpr bool kept = S == SplineConvention::nflows;
  C* widths;
  C* own;
  C low, high, middle, least, half, half_rest, scale, offset, softclip;
  Sum<C> total;

  // Parameter k as the softmax takes it, but for the scale.
  __device__ __forceinline__ C logit(int k) const {
    if constexpr (S == SplineConvention::zuko) return formula::softclip(own[k] * scale, softclip).value;
    else if constexpr (height && S == SplineConvention::torchflows) return formula::fma(own[k], C(1e-3), widths[k]);
    else return own[k];
  }
  __device__ __forceinline__ C exponential_of(C logit) const {
    const C scaled = S == SplineConvention::zuko ? logit + offset : formula::fma(logit, scale, offset);
    return formula::exp_in_range(formula::at_least(scaled, formula::exp_lowest<C>));
  }
  __device__ __forceinline__ C exponential(int k) const { return kept ? own[k] : exponential_of(logit(k)); }

  __device__ __forceinline__ Axis(const Options<C>& o, C* widths, C low, C high)
      : widths(widths),
        own(widths + (height ? o.bins : 0)),
        low(low),
        high(high),
        scale(o.scale),
        // zuko's bounds are ±c/2 for widths and heights: 1 / clip is of the derivatives
        softclip(o.inverse_clip + o.inverse_clip) {
    C largest = logit(0);
    for (int k = 1; k < o.bins; ++k) largest = formula::greater(logit(k), largest);
    offset = S == SplineConvention::zuko ? -largest : -largest * scale;
    for (int k = 0; k < o.bins; ++k) {
      const C e = exponential_of(logit(k));
      if constexpr (kept) own[k] = e;
      total.add(e);
    }
    const C range = high - low, bins = C(o.bins);
    middle = (low + high) * C(0.5);
    least = (height ? o.min_height : o.min_width) * range;
    // range - bins least, and what of it is lost
    const C shared = formula::fma(-bins, least, range), lost = formula::fma(-bins, least, range - shared);
    const C sum = total.sum + total.lost, sum_rest = (total.sum - sum) + total.lost, share = C(0.5) / sum;
    half = shared * share;
    half_rest = formula::fma(formula::fma(C(-2) * half, sum, shared), share,
                             formula::fma(lost, share, half * sum_rest * C(-2) * share));
  }
  __device__ __forceinline__ C knot(C from_middle, const Sum<C>& sum) const {
    const C share = sum.from_middle(total);
    return formula::fma(share, half, formula::fma(share, half_rest, formula::fma(from_middle, least, middle)));
  }
};

// The bin of `value` on axis a: its number, its ends, and those on b.
template <class C> struct Found {
  int bin;
  C a0, a1, b0, b1;
};
template <class C, class A, class B>
__device__ __forceinline__ Found<C> search(C value, int bins, const A& a, const B& b) {
  Found<C> f{0, a.low, a.high, b.low, b.high};
  Sum<C> sum_a, sum_b;
  C end_a = a.low, end_b = b.low;
  for (int k = 0; k < bins; ++k) {
    C next_a = a.high, next_b = b.high;
    if (k + 1 < bins) {
      sum_a.add(a.exponential(k)), sum_b.add(b.exponential(k));
      const C from_middle = C(k + 1) - C(0.5) * C(bins);
      next_a = a.knot(from_middle, sum_a), next_b = b.knot(from_middle, sum_b);
    }
    if (k == 0 || value >= end_a) f = {k, end_a, next_a, end_b, next_b};
    end_a = next_a, end_b = next_b;
  }
  return f;
}

// Which parameter is the derivative of knot k, or -1 where the tail is.
template <class C> __device__ __forceinline__ int derivative_at(const Options<C>& o, int k, bool circular) {
  switch (o.tails) {
    case SplineTails::none: return k;
    case SplineTails::linear: return k == o.bins ? -1 : k - 1;
    case SplineTails::circular: return k == o.bins ? 0 : k;
    case SplineTails::mixed: return k > 0 && k < o.bins ? k : circular ? 0 : -1;
  }
  return -1;
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
  in.inside = in.x >= (o.inverse ? in.bottom : in.left) && in.x <= (o.inverse ? in.top : in.right);
  in.circular = t.circular.p && *t.circular.at(0, at.channel, at.inner);
  return in;
}

// Both axes, and the bin that x is in (y, for the inverse).
template <SplineConvention S, class C> struct Located {
  Axis<S, false, C> widths;
  Axis<S, true, C> heights;
  int number, index0, index1;  // of the bin; of its derivatives' parameters
  formula::SplineBin<C> bin;
  C slope0, slope1;  // derivatives of d0 and d1 with respect to their parameters

  // torchflows' heights are made of the widths too, which nflows' no longer are by then
  __device__ __forceinline__ Located(const Options<C>& o, const Input<C>& in, C* u)
      : widths(o, u, in.left, in.right), heights(o, u, in.bottom, in.top) {
    const Found<C> f = o.inverse ? search<C>(in.x, o.bins, heights, widths) : search<C>(in.x, o.bins, widths, heights);
    number = f.bin;
    index0 = derivative_at(o, number, in.circular), index1 = derivative_at(o, number + 1, in.circular);
    const C* const d = u + 2 * o.bins;
    const auto d0 =
        formula::knot_derivative<S>(index0 < 0 ? o.edge : d[index0], o.min_derivative, o.edge, o.inverse_clip);
    const auto d1 =
        formula::knot_derivative<S>(index1 < 0 ? o.edge : d[index1], o.min_derivative, o.edge, o.inverse_clip);
    slope0 = d0.derivative, slope1 = d1.derivative;
    if (o.inverse) bin = {f.b0, f.b1, f.a0, f.a1, d0.value, d1.value};
    else bin = {f.a0, f.a1, f.b0, f.b1, d0.value, d1.value};
  }
};

// The gradients of an axis' parameters in their place. `shift` is that of the bin's beginning, `size` that of its size:
// bin j of the axis has the gradient `shift` where j is before the bin, `size` where it is it, and 0 beyond; then
// through the softmax.
template <class C> struct AxisGradient {
  C before, at, beyond;  // times e[k]
  template <class Axis>
  __device__ __forceinline__ AxisGradient(const Axis& axis, C rest, int number, C offset, C length, C shift, C size) {
    // probabilities of what is before the bin, and of it
    const C share = C(1) / (rest * (axis.high - axis.low));
    const C p_before = (offset - C(number) * axis.least) * share, p_at = (length - axis.least) * share;
    const C mean = formula::fma(shift, p_before, size * p_at), factor = axis.scale * (axis.half + axis.half);
    before = (shift - mean) * factor, at = (size - mean) * factor, beyond = -mean * factor;
  }
  __device__ __forceinline__ C operator()(int k, int number) const {
    return k < number ? before : k == number ? at : beyond;
  }
};

// Puts the gradients of an element's parameters in their place; returns that of x.
template <SplineConvention S, class C>
__device__ __forceinline__ C backward(const Options<C>& o, const Input<C>& in, C dy, C dlogdet, C* u) {
  const Located<S, C> at(o, in, u);
  const auto& bin = at.bin;
  const auto g = formula::rational_quadratic_backward(dy, dlogdet, in.x, bin, o.inverse);
  const AxisGradient<C> w(at.widths, o.rest_width, at.number, bin.x0 - in.left, bin.x1 - bin.x0, g.shift_x, g.width);
  const AxisGradient<C> h(at.heights, o.rest_height, at.number, bin.y0 - in.bottom, bin.y1 - bin.y0, g.shift_y,
                          g.height);
  for (int k = 0; k < o.bins; ++k) {
    C dw = at.widths.exponential(k) * w(k, at.number), dh = at.heights.exponential(k) * h(k, at.number);
    if constexpr (S == SplineConvention::zuko) {
      dw *= formula::softclip(u[k] * o.scale, at.widths.softclip).derivative;
      dh *= formula::softclip(u[o.bins + k] * o.scale, at.heights.softclip).derivative;
    } else if constexpr (S == SplineConvention::torchflows) {
      dw += dh;
      dh *= C(1e-3);
    }
    u[k] = dw, u[o.bins + k] = dh;
  }
  C* const d = u + 2 * o.bins;
  for (int k = 0; k < o.derivatives; ++k) d[k] = 0;
  if (at.index0 >= 0) d[at.index0] += g.d0 * at.slope0;
  if (at.index1 >= 0) d[at.index1] += g.d1 * at.slope1;
  return g.input;
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

template <SplineConvention S, class T, class A> __global__ void __launch_bounds__(threads, 2)
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
        const Located<S, C> located(t.o, in, staged + own * t.cut.pitch);
        const auto r = formula::rational_quadratic(in.x, located.bin, t.o.inverse);
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

template <SplineConvention S, class T, class A> __global__ void __launch_bounds__(threads, 2)
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
        narrow(backward<S, C>(t.o, in, widen(dx), dlogdet, u), dx);
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

template <class T> Cut make_cut(const RationalQuadraticSplineOptions& o, const SplineParameters<const T>& widths) {
  const int64_t elements = o.count * o.inner, segments = cuda::rational_quadratic_spline_segments(o);
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

template <class F> void with_convention(SplineConvention convention, F f) {
  switch (convention) {
    case SplineConvention::nflows: return f.template operator()<SplineConvention::nflows>();
    case SplineConvention::zuko: return f.template operator()<SplineConvention::zuko>();
    case SplineConvention::torchflows: return f.template operator()<SplineConvention::torchflows>();
  }
}

}  // namespace

int64_t rational_quadratic_spline_segments(const RationalQuadraticSplineOptions& o) {
  const int64_t wanted = ceil_div(busy_blocks, o.batch), pieces = ceil_div(o.count * o.inner, threads);
  return wanted < pieces ? wanted : pieces;
}

template <class T, class A>
void rational_quadratic_spline(const RationalQuadraticSplineForward<T, A>& a, double* partial, void* stream) {
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
  with_convention(a.o.convention, [&]<SplineConvention S>() {
    PYFLOWGEN_LAUNCH((&forward_kernel<S, T, A>), grid(t.cut), threads, bytes<T>(t.cut), stream, t);
  });
  if (partial)
    PYFLOWGEN_LAUNCH(&sum_segments<A>, unsigned(a.o.batch), threads, 0, stream, partial, t.cut.segments, a.o.inverse,
                     a.logdet);
}

template <class T, class A>
void rational_quadratic_spline_backward(const RationalQuadraticSplineBackward<T, A>& a, void* stream) {
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
  with_convention(a.o.convention, [&]<SplineConvention S>() {
    PYFLOWGEN_LAUNCH((&backward_kernel<S, T, A>), grid(t.cut), threads, bytes<T>(t.cut), stream, t);
  });
}

#define PYFLOWGEN_INSTANTIATE(T, A) \
  template void rational_quadratic_spline<T, A>(const RationalQuadraticSplineForward<T, A>&, double*, void*); \
  template void rational_quadratic_spline_backward<T, A>(const RationalQuadraticSplineBackward<T, A>&, void*);
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(float, float)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)

}  // namespace pyflowgen::cuda
