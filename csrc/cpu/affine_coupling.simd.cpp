// affine_coupling on the CPU: one pass over memory, log-determinant summed on the way.
//
// Floor, float32, n transformed elements: forward reads x, shift, log_scale and writes y, 16 n bytes; backward reads
// dy, x, shift, log_scale and writes three gradients, 28 n bytes. The kernel moves just that; what it computes
// (an exponential, two for sigmoid) hides behind L3 and DRAM, not behind L1.
//
// Two ways through the elements: along a row's event ("run", the log-determinant reduced across lanes), or, when the
// event is shorter than a register and for elementwise log-derivatives, along the batch (each lane its own row).
#include "affine_coupling.h"

#include <type_traits>

#include "cpu/memory.h"
#include "cpu/part.h"
#include "formula/affine_coupling.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

// Packs summed in the compute type before the sum goes on in double, and those before it leaves the lanes: the error
// of a long sum stays that of a short one.
constexpr int64_t short_sum = 8, long_sum = 256;

// How the transformed elements are walked: `run` elements in the innermost loop, `outer` such runs a row.
struct Nest {
  int64_t run, outer;
  enum { merged, by_inner, by_channel } kind;
};

template <class T> struct Walk {
  T* p;
  int64_t batch, outer, run;
  PYFLOWGEN_INLINE Cursor<T> along_run(int64_t row, int64_t k) const { return {p + row * batch + k * outer, run}; }
  PYFLOWGEN_INLINE Cursor<T> along_batch(int64_t row, int64_t k, int64_t i) const {
    return {p + row * batch + k * outer + i * run, batch};
  }
};

template <class T> Walk<T> walk(T* p, Strides s, const Nest& nest) {
  if (nest.kind == Nest::by_channel) return {p, s.batch, s.inner, s.channel};
  return {p, s.batch, nest.kind == Nest::merged ? 0 : s.channel, s.inner};
}

// Only the transformed channels of a tensor that has them all.
template <class T> Walk<T> walk_part(T* p, Strides s, const Nest& nest, const AffineCouplingOptions& o) {
  return walk(p + o.start * s.channel, Strides{s.batch, s.channel * o.step, s.inner}, nest);
}

Nest choose(const AffineCouplingOptions& o, const Strides* whole, int n_whole, const Strides* parameters,
            int n_parameters) {
  bool merge = true;
  for (int i = 0; i < n_whole; ++i) merge &= o.count == 1 || whole[i].channel * o.step == o.inner * whole[i].inner;
  for (int i = 0; i < n_parameters; ++i)
    merge &= o.count == 1 || parameters[i].channel == o.inner * parameters[i].inner;
  if (o.inner == 1) return {o.count, 1, Nest::by_channel};
  if (merge) return {o.count * o.inner, 1, Nest::merged};
  if (o.count > 1 && (whole[0].inner > whole[0].channel || o.inner < o.count / 4))
    return {o.count, o.inner, Nest::by_channel};
  return {o.inner, o.count, Nest::by_inner};
}

// Whether lanes are rows: the event is shorter than a register, or there is a log-derivative for every element.
template <class T> bool along_batch(const Nest& nest, const AffineCouplingOptions& o) {
  return o.elementwise || (nest.run < width<T> && o.batch >= width<T>);
}

// What is known of the strides. unit: all are 1. pairs: x and y have 1, shift and log_scale alternate in memory.
enum class Mode { unit, pairs, any };

// i elements on from a cursor whose stride is 1 by the mode's promise.
template <Mode mode, class T> PYFLOWGEN_INLINE Cursor<T> at(Cursor<T> c, int64_t i) {
  return mode == Mode::any ? c + i : Cursor<T>{c.p + i, 1};
}
template <Mode mode, class T> PYFLOWGEN_INLINE Cursor<T> parameter_at(Cursor<T> c, int64_t i) {
  return mode == Mode::any ? c + i : mode == Mode::pairs ? Cursor<T>{c.p + 2 * i, 2} : Cursor<T>{c.p + i, 1};
}

template <Mode mode, class T> PYFLOWGEN_INLINE Pack<Compute<T>> get(Cursor<const T> from, int n) {
  if constexpr (mode == Mode::any) return load_strided(from.p, from.stride, n);
  else return load_as(from.p);
}
template <Mode mode, class T> PYFLOWGEN_INLINE void put(Cursor<T> to, Pack<Compute<T>> v, int n) {
  if constexpr (mode == Mode::any) store_strided(to.p, to.stride, v, n);
  else store_as(to.p, v);
}

// Lines that are about to be written are asked for so many bytes ahead. An output mostly is memory that was used a
// while ago and waits in the last cache, in streams that end at every row or page: no pattern that a processor would
// follow. Beyond that cache it does harm: a line that is wholly overwritten need not be read from memory.
constexpr int64_t ahead = 2048, last_cache = int64_t(24) << 20;
template <class T> bool fits_cache(const AffineCouplingOptions& o) {
  return 7 * o.batch * o.count * o.inner * int64_t(sizeof(T)) <= last_cache;  // all that a backward reads and writes
}
template <Mode mode, class T, class... Rest> PYFLOWGEN_INLINE void prefetch_write(Cursor<T> to, Rest... rest) {
  if constexpr (mode != Mode::any) __builtin_prefetch((const char*)to.p + ahead, 1);
  if constexpr (sizeof...(rest) > 0) prefetch_write<mode>(rest...);
}

// What the loops take from the options, by value: a store through a pointer might change what is in memory.
template <class T> struct Constants {
  Pack<Compute<T>> clamp, gain;
  bool cached, scale_first, shift_first, inverse;
  Constants(const AffineCouplingOptions& o, bool scale_first)
      : clamp(broadcast(Compute<T>(o.clamp))),
        gain(broadcast(Compute<T>(o.gain))),
        cached(fits_cache<T>(o)),
        scale_first(scale_first),
        shift_first(o.shift_first),
        inverse(o.inverse) {}
};
// y = x a + t, as most couplings are: known at compile time, so that the loop has no branches.
template <class T> struct ScaleShift {
  Pack<Compute<T>> clamp, gain;
  bool cached, scale_first;
  static constexpr bool shift_first = false, inverse = false;
  ScaleShift(const AffineCouplingOptions& o, bool scale_first)
      : clamp(broadcast(Compute<T>(o.clamp))),
        gain(broadcast(Compute<T>(o.gain))),
        cached(fits_cache<T>(o)),
        scale_first(scale_first) {}
};

// The shift is left alone where nothing depends on it: its half of the parameters then never enters the cache.
template <AffineScale S, Mode mode, class T, class Known, class V>
PYFLOWGEN_INLINE void get_parameters(const Known& c, Cursor<const T> shift, Cursor<const T> log_scale, bool needs_shift,
                                     V& t, V& s, int n) {
  if constexpr (mode == Mode::pairs) {
    if (c.scale_first) load_pairs(log_scale.p, s, t);
    else load_pairs(shift.p, t, s);
  } else {
    if (needs_shift) t = get<mode>(shift, n);
    if constexpr (S != AffineScale::additive) s = get<mode>(log_scale, n);
  }
  s *= c.gain;
}

template <AffineScale S, Mode mode, class T, class Known>
PYFLOWGEN_INLINE Pack<Compute<T>> forward_pack(const Known& c, Cursor<const T> x, Cursor<const T> shift,
                                               Cursor<const T> log_scale, Cursor<const uint8_t> mask, Cursor<T> y,
                                               int n) {
  using C = Compute<T>;
  if (c.cached) prefetch_write<mode>(y);
  const Pack<C> vx = get<mode>(x, n);
  Pack<C> vt, vs{};
  get_parameters<S, mode>(c, shift, log_scale, true, vt, vs, n);
  auto [vy, l] = formula::affine_coupling<S>(vx, vt, vs, c.clamp, c.shift_first, c.inverse);
  if constexpr (mode == Mode::any) {
    if (mask.p) {
      const auto selected = load_mask<C>(mask, n);
      vy = selected ? vy : vx;
      l = selected ? l : Pack<C>{};
    }
    if (n < width<T>) l = first_lanes<C>(n) ? l : Pack<C>{};
  }
  put<mode>(y, vy, n);
  return l;
}

template <AffineScale S, Mode mode, class T, class Known>
PYFLOWGEN_INLINE void backward_pack(const Known& c, Pack<Compute<T>> dlogdet, Cursor<const T> dy, Cursor<const T> x,
                                    Cursor<const T> shift, Cursor<const T> log_scale, Cursor<const uint8_t> mask,
                                    Cursor<T> dx, Cursor<T> dshift, Cursor<T> dlog_scale, int n) {
  using C = Compute<T>;
  if (c.cached) prefetch_write<mode>(dx, dshift, dlog_scale);
  const Pack<C> vdy = get<mode>(dy, n), vx = get<mode>(x, n);
  Pack<C> vt{}, vs{};
  get_parameters<S, mode>(c, shift, log_scale, c.shift_first != c.inverse, vt, vs, n);
  auto [vdx, vdt, vds] =
      formula::affine_coupling_backward<S>(vdy, dlogdet, vx, vt, vs, c.clamp, c.shift_first, c.inverse);
  if constexpr (mode == Mode::any) {
    if (mask.p) {
      const auto selected = load_mask<C>(mask, n);
      vdx = selected ? vdx : vdy;
      vdt = selected ? vdt : Pack<C>{};
      vds = selected ? vds : Pack<C>{};
    }
  }
  put<mode>(dx, vdx, n);
  vds *= c.gain;
  if constexpr (mode == Mode::pairs) {
    if (c.scale_first) store_pairs(dlog_scale.p, vds, vdt);
    else store_pairs(dshift.p, vdt, vds);
  } else {
    put<mode>(dshift, vdt, n);
    if constexpr (S != AffineScale::additive) put<mode>(dlog_scale, vds, n);
  }
}

// Call body(outer, begin, end) for each stretch of one run within elements [first, last) of a row's event.
template <class Body> PYFLOWGEN_INLINE void each_run(const Nest& nest, int64_t first, int64_t last, Body body) {
  // No division for whole rows: it would cost as much as a pack.
  int64_t k = first ? first / nest.run : 0, begin = first ? first % nest.run : 0;
  for (int64_t left = last - first; left > 0; ++k, begin = 0) {
    const int64_t end = left < nest.run - begin ? begin + left : nest.run;
    body(k, begin, end);
    left -= end - begin;
  }
}

// Elements of a row's event that make up one of its segments.
struct Piece { int64_t first, last; };
PYFLOWGEN_INLINE Piece piece(int64_t elements, int64_t segment, int64_t segments) {
  if (segments == 1) return {0, elements};
  return {elements * segment / segments, elements * (segment + 1) / segments};
}

// Pieces [begin, end), a row in each or one of its segments: packs(i, row, row_end, k, first, last) for stretches of
// run k of some rows, then ends(i, row, k, first, last) for what `n` at a time leave over. Several rows in one call,
// and none between them: the formula's constants stay in registers.
constexpr int64_t rows_at_a_time = 32;
template <int n, class Before, class Packs, class Ends, class After>
PYFLOWGEN_INLINE void each_piece(const Nest nest, int64_t segments, int64_t begin, int64_t end, Before before,
                                 Packs packs, Ends ends, After after) {
  const int64_t elements = nest.run * nest.outer;
  for (int64_t from = begin; from < end; from += rows_at_a_time) {
    const int64_t to = end - from < rows_at_a_time ? end : from + rows_at_a_time;
    before(from, to);
    if (segments == 1 && nest.outer == 1) {
      packs(from, from, to, 0, 0, nest.run);
    } else {
      for (int64_t i = from; i < to; ++i) {
        const auto [first, last] = piece(elements, segments == 1 ? 0 : i % segments, segments);
        each_run(nest, first, last,
                 [&](int64_t k, int64_t b, int64_t e) { packs(i, i / segments, i / segments + 1, k, b, e); });
      }
    }
    if (segments > 1 || nest.run % n)
      for (int64_t i = from; i < to; ++i) {
        const auto [first, last] = piece(elements, segments == 1 ? 0 : i % segments, segments);
        each_run(nest, first, last, [&](int64_t k, int64_t b, int64_t e) {
          if ((e - b) % n) ends(i, i / segments, k, e - (e - b) % n, e);
        });
      }
    after(from, to);
  }
}

template <class T> bool alternate(const Walk<T>& shift, const Walk<T>& log_scale, bool scale_first) {
  return log_scale.p == shift.p + (scale_first ? -1 : 1) && log_scale.run == shift.run &&
         log_scale.batch == shift.batch && log_scale.outer == shift.outer;
}

template <class T, class A> struct ForwardWalk {
  Nest nest;
  Mode mode;
  bool scale_first;  // in pairs
  Walk<const T> x, shift, log_scale;
  Walk<const uint8_t> mask;
  Walk<T> y;

  explicit ForwardWalk(const AffineCouplingForward<T, A>& a) {
    const Strides whole[] = {a.x_strides, a.y_strides, a.mask ? a.mask_strides : a.x_strides};
    const Strides parameters[] = {a.shift_strides, a.log_scale ? a.log_scale_strides : a.shift_strides};
    nest = choose(a.o, whole, 3, parameters, 2);
    x = walk_part(a.x, a.x_strides, nest, a.o), y = walk_part(a.y, a.y_strides, nest, a.o);
    shift = walk(a.shift, a.shift_strides, nest);
    log_scale = walk(a.log_scale ? a.log_scale : a.shift, parameters[1], nest);
    mask = walk(a.mask, a.mask_strides, nest);
    mode = Mode::any;
    scale_first = log_scale.p < shift.p;
    if (!a.mask && x.run == 1 && y.run == 1) {
      if (shift.run == 1 && log_scale.run == 1) mode = Mode::unit;
      else if (std::is_same_v<T, float> && shift.run == 2 && alternate(shift, log_scale, scale_first))
        mode = Mode::pairs;
    }
  }
};

// Sum of l over elements [i, end) of run k of a row; whole packs only, but in Mode::any.
template <AffineScale S, Mode mode, class T, class A, class Known>
PYFLOWGEN_INLINE double forward_run(const Known& c, const ForwardWalk<T, A>& w, int64_t row, int64_t k, int64_t i,
                                    int64_t end) {
  using V = Pack<Compute<T>>;
  constexpr int n = width<T>;
  const auto x = w.x.along_run(row, k), shift = w.shift.along_run(row, k), log_scale = w.log_scale.along_run(row, k);
  const Cursor<const uint8_t> mask = w.mask.p ? w.mask.along_run(0, k) : Cursor<const uint8_t>{nullptr, 0};
  const auto y = w.y.along_run(row, k);
  const auto pack = [&](int64_t j, int count) {
    return forward_pack<S, mode>(c, at<mode>(x, j), parameter_at<mode>(shift, j), parameter_at<mode>(log_scale, j),
                                 mask + j, at<mode>(y, j), count);
  };
  double total = 0;
  while (end - i >= n) {
    const int64_t leave = (end - i) / n < long_sum ? i + (end - i) / n * n : i + long_sum * n;
    f64v sum{};
    while (i < leave) {
      const int64_t stop = leave - i < short_sum * n ? leave : i + short_sum * n;
      V part{};
      for (; i < stop; i += n) part += pack(i, n);
      sum += widen_add(part);
    }
    total += reduce_add(sum);
  }
  if constexpr (mode == Mode::any) {
    if (i < end) total += reduce_add(widen_add(pack(i, int(end - i))));
  }
  return total;
}
template <AffineScale S, Mode mode, class Known, class T, class A>
__attribute__((noinline)) void forward_runs(const AffineCouplingOptions& o, const ForwardWalk<T, A>& given, int64_t row,
                                            int64_t row_end, int64_t k, int64_t first, int64_t last, double* sums) {
  const ForwardWalk<T, A> w = given;  // a copy, as Constants
  const Known c(o, w.scale_first);
  for (; row < row_end; ++row) *sums++ += forward_run<S, mode>(c, w, row, k, first, last);
}
// Each lane its own row.
template <AffineScale S, class T, class A>
void forward_rows(const AffineCouplingForward<T, A>& a, const ForwardWalk<T, A>& w, int64_t begin, int64_t end) {
  using V = Pack<Compute<T>>;
  const Constants<T> c(a.o, w.scale_first);
  for (int64_t row = begin; row < end; row += width<T>) {
    const int n = int(end - row < width<T> ? end - row : width<T>);
    V sum{};
    for (int64_t k = 0; k < w.nest.outer; ++k)
      for (int64_t i = 0; i < w.nest.run; ++i)
        sum += forward_pack<S, Mode::any>(
            c, w.x.along_batch(row, k, i), w.shift.along_batch(row, k, i), w.log_scale.along_batch(row, k, i),
            w.mask.p ? w.mask.along_batch(0, k, i) : Cursor<const uint8_t>{nullptr, 0}, w.y.along_batch(row, k, i), n);
    store_strided(a.logdet + row, 1, c.inverse ? -sum : sum, n);
  }
}

// Rows [begin, end), or rows × segments when the sums go to `partial`.
template <AffineScale S, Mode mode, class T, class A> void forward_pieces(const AffineCouplingForward<T, A>& a,
                                                                          const ForwardWalk<T, A>& w, int64_t begin,
                                                                          int64_t end, double* partial) {
  double sums[rows_at_a_time];
  int64_t block = begin;
  each_piece<mode == Mode::any ? 1 : width<T>>(
      w.nest, partial ? affine_coupling_segments(a.o) : 1, begin, end,
      [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to && !partial; ++i) copy_rest(a.o, a.x, a.x_strides, a.y, a.y_strides, i);
        block = from;
        for (double& sum : sums) sum = 0;
      },
      [&](int64_t i, int64_t row, int64_t row_end, int64_t k, int64_t first, int64_t last) {
        double* const to = sums + (i - block);
        if constexpr (mode != Mode::any)
          if (!a.o.shift_first && !a.o.inverse)
            return forward_runs<S, mode, ScaleShift<T>>(a.o, w, row, row_end, k, first, last, to);
        forward_runs<S, mode, Constants<T>>(a.o, w, row, row_end, k, first, last, to);
      },
      [&](int64_t i, int64_t row, int64_t k, int64_t first, int64_t last) {
        forward_runs<S, Mode::any, Constants<T>>(a.o, w, row, row + 1, k, first, last, sums + (i - block));
      },
      [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          if (partial) partial[i] = sums[i - from];
          else a.logdet[i] = A(a.o.inverse ? -sums[i - from] : sums[i - from]);
        }
      });
}

template <AffineScale S, class T, class A>
void forward(const AffineCouplingForward<T, A>& a, int64_t begin, int64_t end, double* partial) {
  const ForwardWalk<T, A> w(a);
  if (!partial && along_batch<T>(w.nest, a.o)) {
    copy_rest_of_rows(a.o, a.x, a.x_strides, a.y, a.y_strides, begin, end);
    return forward_rows<S>(a, w, begin, end);
  }
  if constexpr (std::is_same_v<T, float> && S != AffineScale::additive) {
    if (w.mode == Mode::pairs) return forward_pieces<S, Mode::pairs>(a, w, begin, end, partial);
  }
  if (w.mode == Mode::unit) return forward_pieces<S, Mode::unit>(a, w, begin, end, partial);
  forward_pieces<S, Mode::any>(a, w, begin, end, partial);
}

template <class T, class A> struct BackwardWalk {
  Nest nest;
  Mode mode;
  bool scale_first;  // in pairs
  Walk<const T> dy, x, shift, log_scale;
  Walk<const uint8_t> mask;
  Walk<T> dx, dshift, dlog_scale;

  explicit BackwardWalk(const AffineCouplingBackward<T, A>& a) {
    const bool affine = a.log_scale;
    const Strides whole[] = {a.x_strides, a.dy_strides, a.dx_strides, a.mask ? a.mask_strides : a.x_strides};
    const Strides parameters[] = {a.shift_strides, a.dshift_strides, affine ? a.log_scale_strides : a.shift_strides,
                                  affine ? a.dlog_scale_strides : a.dshift_strides};
    nest = choose(a.o, whole, 4, parameters, 4);
    dy = walk_part(a.dy, a.dy_strides, nest, a.o), x = walk_part(a.x, a.x_strides, nest, a.o);
    dx = walk_part(a.dx, a.dx_strides, nest, a.o);
    shift = walk(a.shift, a.shift_strides, nest), dshift = walk(a.dshift, a.dshift_strides, nest);
    log_scale = walk(affine ? a.log_scale : a.shift, parameters[2], nest);
    dlog_scale = walk(affine ? a.dlog_scale : a.dshift, parameters[3], nest);
    mask = walk(a.mask, a.mask_strides, nest);
    mode = Mode::any;
    scale_first = log_scale.p < shift.p;
    if (!a.mask && dy.run == 1 && x.run == 1 && dx.run == 1) {
      if (shift.run == 1 && dshift.run == 1 && log_scale.run == 1 && dlog_scale.run == 1) mode = Mode::unit;
      else if (std::is_same_v<T, float> && shift.run == 2 && dshift.run == 2 &&
               alternate(shift, log_scale, scale_first) && alternate(dshift, dlog_scale, scale_first))
        mode = Mode::pairs;
    }
  }
};

// As forward_run.
template <AffineScale S, Mode mode, class T, class A, class Known>
PYFLOWGEN_INLINE void backward_run(const Known& c, Pack<Compute<T>> dlogdet, const BackwardWalk<T, A>& w, int64_t row,
                                   int64_t k, int64_t i, int64_t end) {
  constexpr int n = width<T>;
  const auto dy = w.dy.along_run(row, k), x = w.x.along_run(row, k), shift = w.shift.along_run(row, k),
             log_scale = w.log_scale.along_run(row, k);
  const Cursor<const uint8_t> mask = w.mask.p ? w.mask.along_run(0, k) : Cursor<const uint8_t>{nullptr, 0};
  const auto dx = w.dx.along_run(row, k), dshift = w.dshift.along_run(row, k),
             dlog_scale = w.dlog_scale.along_run(row, k);
  for (; mode == Mode::any ? i < end : i + n <= end; i += n)
    backward_pack<S, mode>(c, dlogdet, at<mode>(dy, i), at<mode>(x, i), parameter_at<mode>(shift, i),
                           parameter_at<mode>(log_scale, i), mask + i, at<mode>(dx, i), parameter_at<mode>(dshift, i),
                           parameter_at<mode>(dlog_scale, i), mode == Mode::any && end - i < n ? int(end - i) : n);
}
template <AffineScale S, Mode mode, class Known, class T, class A>
__attribute__((noinline)) void backward_runs(const AffineCouplingBackward<T, A>& a, const BackwardWalk<T, A>& given,
                                             int64_t row, int64_t row_end, int64_t k, int64_t first, int64_t last) {
  const BackwardWalk<T, A> w = given;
  const Known c(a.o, w.scale_first);
  const A* dlogdet = a.dlogdet + row * a.dlogdet_stride;
  for (const int64_t stride = a.dlogdet_stride; row < row_end; ++row, dlogdet += stride)
    backward_run<S, mode>(c, broadcast(Compute<T>(*dlogdet)), w, row, k, first, last);
}

template <AffineScale S, class T, class A>
void backward_rows(const AffineCouplingBackward<T, A>& a, const BackwardWalk<T, A>& w, int64_t begin, int64_t end) {
  const Constants<T> c(a.o, w.scale_first);
  for (int64_t row = begin; row < end; row += width<T>) {
    const int n = int(end - row < width<T> ? end - row : width<T>);
    const Pack<Compute<T>> dlogdet = load_strided(a.dlogdet + row * a.dlogdet_stride, a.dlogdet_stride, n);
    for (int64_t k = 0; k < w.nest.outer; ++k)
      for (int64_t i = 0; i < w.nest.run; ++i)
        backward_pack<S, Mode::any>(c, dlogdet, w.dy.along_batch(row, k, i), w.x.along_batch(row, k, i),
                                    w.shift.along_batch(row, k, i), w.log_scale.along_batch(row, k, i),
                                    w.mask.p ? w.mask.along_batch(0, k, i) : Cursor<const uint8_t>{nullptr, 0},
                                    w.dx.along_batch(row, k, i), w.dshift.along_batch(row, k, i),
                                    w.dlog_scale.along_batch(row, k, i), n);
  }
}

template <AffineScale S, Mode mode, class T, class A> void backward_pieces(const AffineCouplingBackward<T, A>& a,
                                                                           const BackwardWalk<T, A>& w, int64_t begin,
                                                                           int64_t end, bool by_segment) {
  each_piece<mode == Mode::any ? 1 : width<T>>(
      w.nest, by_segment ? affine_coupling_segments(a.o) : 1, begin, end,
      [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to && !by_segment; ++i) copy_rest(a.o, a.dy, a.dy_strides, a.dx, a.dx_strides, i);
      },
      [&](int64_t, int64_t row, int64_t row_end, int64_t k, int64_t first, int64_t last) {
        if constexpr (mode != Mode::any)
          if (!a.o.shift_first && !a.o.inverse)
            return backward_runs<S, mode, ScaleShift<T>>(a, w, row, row_end, k, first, last);
        backward_runs<S, mode, Constants<T>>(a, w, row, row_end, k, first, last);
      },
      [&](int64_t, int64_t row, int64_t k, int64_t first, int64_t last) {
        backward_runs<S, Mode::any, Constants<T>>(a, w, row, row + 1, k, first, last);
      },
      [](int64_t, int64_t) {});
}

template <AffineScale S, class T, class A>
void backward(const AffineCouplingBackward<T, A>& a, int64_t begin, int64_t end, bool by_segment) {
  const BackwardWalk<T, A> w(a);
  if (!by_segment && along_batch<T>(w.nest, a.o)) {
    copy_rest_of_rows(a.o, a.dy, a.dy_strides, a.dx, a.dx_strides, begin, end);
    return backward_rows<S>(a, w, begin, end);
  }
  if constexpr (std::is_same_v<T, float> && S != AffineScale::additive) {
    if (w.mode == Mode::pairs) return backward_pieces<S, Mode::pairs>(a, w, begin, end, by_segment);
  }
  if (w.mode == Mode::unit) return backward_pieces<S, Mode::unit>(a, w, begin, end, by_segment);
  backward_pieces<S, Mode::any>(a, w, begin, end, by_segment);
}

// Call f<S>() for the scale chosen at run time.
template <class F> void with_scale(AffineScale scale, F f) {
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
}  // namespace

template <class T, class A>
void affine_coupling(const AffineCouplingForward<T, A>& a, int64_t begin, int64_t end, double* partial) {
  with_scale(a.o.scale, [&]<AffineScale S>() { forward<S>(a, begin, end, partial); });
}
template <class T, class A>
void affine_coupling_backward(const AffineCouplingBackward<T, A>& a, int64_t begin, int64_t end, bool by_segment) {
  with_scale(a.o.scale, [&]<AffineScale S>() { backward<S>(a, begin, end, by_segment); });
}

#define PYFLOWGEN_INSTANTIATE(T, A) \
  template void affine_coupling<T, A>(const AffineCouplingForward<T, A>&, int64_t, int64_t, double*); \
  template void affine_coupling_backward<T, A>(const AffineCouplingBackward<T, A>&, int64_t, int64_t, bool);
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(float, float)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)

}  // namespace pyflowgen::PYFLOWGEN_ISA
