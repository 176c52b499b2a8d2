// trn on CUDA: a clip in one launch, forward and backward, on the building blocks of cuda/grid.cuh. Not yet run on a
// GPU.
//
// Floor of a frame of B rows, hidden H, F features, L steps: 2 (4H (F + H) + 2H^2 + L (8H^2 + HF)) operations a row,
// and the weights from memory, or from L2, the decoder's L times. The kernel keeps them in shared memory as far as they
// fit, the decoder's first: at F = 1024 and H = 512 all matrices are 36 MB in float32, of the 30 MB that 132
// multiprocessors have; the encoder's then stream, once a frame. The grid meets 2 L + 2 times a frame, of which each
// costs about a microsecond: the floor at small batches, 1,200 meetings for 64 frames of 8 steps. Were scores and what
// they feed two products shared by the blocks, there would be L more; instead every block forms all scores of a step,
// C H products beside the 8 H^2 of its share of the cell.
#include "cuda/grid.cuh"
#include "cuda/trn.h"
#include "formula/lstm.h"

namespace pyflowgen::cuda {
namespace {

namespace formula = pyflowgen::PYFLOWGEN_ISA::formula;

struct TrnShare {
  int units, features;  // of a block
  unsigned held;        // a bit for each matrix in shared memory, in the order of the kernels' keep()
};

// A block's rows of one matrix after the other; see hold().
template <class T> struct Keeper {
  T* next;
  unsigned held;
  __device__ __forceinline__ Rows<T> keep(const T* matrix, int units, int parts, int depth, const Own& own) {
    const bool here = held & 1;
    const Rows<T> rows = hold(matrix, units, parts, depth, own, here, next);
    if (here) next += int64_t(own.count) * parts * depth;
    held >>= 1;
    return rows;
  }
};

// q[row][class] = x(row) w + start(row, class) for up to `tile` rows from `first` on, in shared memory, by all threads.
template <class T, class X, class F> __device__ __forceinline__ void all_classes(const Rows<T>& w, int classes,
                                                                                 int64_t first, int64_t rows, int depth,
                                                                                 T* q, const X& x, const F& start) {
  const int64_t count = rows - first < tile ? rows - first : tile;
  __syncthreads();
  each_output(
      w, classes, count, depth, [&](int64_t row) { return x(first + row); },
      [&](int n, int64_t row, T sum) { q[row * classes + n] = sum + start(first + row, n); });
  __syncthreads();
}

template <class T> __global__ void __launch_bounds__(threads, 1)
    trn_forward_kernel(const TrnForward<T> o, const TrnShare share) {
  PYFLOWGEN_DYNAMIC_SHARED(T, shared);
  const TrnSizes& s = o.sizes;
  const int64_t B = s.batch;
  const int H = int(s.hidden), F = int(s.features), C = int(s.classes), L = int(s.steps);
  const Own units = own_outputs(share.units, H), features = own_outputs(share.features, F);
  T* const q = shared;
  Keeper<T> keeper{shared + tile * C, share.held};
  const Rows<T> dec = keeper.keep(o.matrix.dec, H, 4, 2 * H, units);
  const Rows<T> classifier = keeper.keep(o.matrix.classifier, C, 1, H, {0, C});
  const Rows<T> fusion = keeper.keep(o.matrix.fusion, H, 1, C, units);
  const Rows<T> ahead = keeper.keep(o.matrix.ahead, F, 1, H, features);
  const Rows<T> hx = keeper.keep(o.matrix.hx, H, 1, H, units), cx = keeper.keep(o.matrix.cx, H, 1, H, units);
  const Rows<T> enc = keeper.keep(o.matrix.enc, H, 4, F + H, units);
  GridBarrier barrier{o.arrived};
  const auto slot = [&](int64_t t) { return t % s.slots; };
  const auto state_at = [&](int64_t t) { return o.states + t * B * H; };
  const auto cell_at = [&](int64_t t) { return o.cells + t % (s.slots + 1) * B * H; };
  // The encoder's input at frame t: what makes it puts it there.
  const auto enc_in = [&](int64_t t, int64_t row) { return o.enc_in + (slot(t) * B + row) * (F + H); };
  const auto feed = [&](int64_t t, int64_t row, int f, T v) {
    enc_in(t, row)[f] = o.mask.future ? v * o.mask.future[(t * B + row) * F + f] : v;
  };

  const auto decode = [&](int64_t t, const T* from_h, const T* from_c) {
    const auto g_at = [&](int i) { return o.gs + (slot(t) * (L + 1) + i) * B * H; };
    const auto k_at = [&](int i) { return o.ks + (slot(t) * (L + 1) + i) * B * H; };
    const auto dec_in = [&](int i, int64_t row) { return o.dec_in + ((slot(t) * L + i) * B + row) * 2 * H; };
    each_output(
        hx, units.count, B, H, [&](int64_t row) { return from_h + row * H; },
        [&](int n, int64_t row, T sum) {
          const int unit = units.first + n;
          const T v = sum + o.hx_bias[unit], g = v < 0 ? T(0) : v;
          g_at(0)[row * H + unit] = g;
          dec_in(0, row)[unit] = 0;
          dec_in(0, row)[H + unit] = g;
        });
    each_output(
        cx, units.count, B, H, [&](int64_t row) { return from_c + row * H; },
        [&](int n, int64_t row, T sum) {
          const T v = sum + o.cx_bias[units.first + n];
          k_at(0)[row * H + units.first + n] = v < 0 ? T(0) : v;
        });
    barrier.meet();
    for (int i = 0; i < L; ++i) {
      // The first step's input is none: its half of the product is left out.
      const Rows<T> w{dec.at + (i ? 0 : H), dec.unit, dec.part};
      each_unit<4>(
          w, units.count, B, i ? 2 * H : H,
          [&](int64_t row) { return static_cast<const T*>(dec_in(i, row)) + (i ? 0 : H); },
          [&](int n, int64_t row, T(&a)[4]) {
            const int unit = units.first + n;
            const int64_t at = row * H + unit;
#pragma unroll
            for (int p = 0; p < 4; ++p) a[p] += o.dec_bias[p * H + unit];
            const auto u = formula::lstm(a[0], a[1], a[2], a[3], k_at(i)[at]);
            T* const gates = o.dec_gates + ((slot(t) * L + i) * B + row) * 4 * H + unit;
            gates[0] = u.i, gates[H] = u.f, gates[2 * H] = u.g, gates[3 * H] = u.o;
            g_at(i + 1)[at] = u.h;
            k_at(i + 1)[at] = u.c;
            if (i + 1 < L) dec_in(i + 1, row)[H + unit] = u.h;
            if (o.mask.g) o.masked[i * B * H + at] = u.h * o.mask.g[(t * L + i) * B * H + at];
          });
      if (s.before && i + 1 == L) {
        __syncthreads();
        each(units.count, B, [&](int n, int64_t row) {
          const int64_t at = row * H + units.first + n;
          T sum = 0;
          for (int j = 1; j <= L; ++j) sum += g_at(j)[at];
          o.rows[slot(t) * B * H + at] = sum / T(L);
        });
      }
      barrier.meet();
      if (i + 1 == L && blockIdx.x) break;  // the last scores feed nothing
      const T* const read = o.mask.g ? o.masked + i * B * H : g_at(i + 1);
      for (int64_t first = 0; first < B; first += tile) {
        all_classes(
            classifier, C, first, B, H, q, [&](int64_t row) { return read + row * H; },
            [&](int64_t, int n) { return o.classifier_bias[n]; });
        const int64_t count = B - first < tile ? B - first : tile;
        if (blockIdx.x == 0)
          each(C, count,
               [&](int n, int64_t row) { o.scores[((t * L + i) * B + first + row) * C + n] = q[row * C + n]; });
        if (i + 1 < L)
          each_output(
              fusion, units.count, count, C, [&](int64_t row) { return static_cast<const T*>(q) + row * C; },
              [&](int n, int64_t row, T sum) {
                const int unit = units.first + n;
                const T v = sum + o.fusion_bias[unit], u = v < 0 ? T(0) : v;
                const int64_t at = (((t * L + i + 1) * B) + first + row) * H + unit;
                dec_in(i + 1, first + row)[unit] = o.mask.u ? u * o.mask.u[at] : u;
              });
      }
      if (i + 1 < L) barrier.meet();
    }
    // The future feature, and the frame it is fed to.
    const int64_t next = s.previous ? t : t + 1;
    const auto relu = [&](int n, T sum) {
      const T v = sum + o.ahead_bias[features.first + n];
      return v < 0 ? T(0) : v;
    };
    T* const future = o.futures + slot(t) * B * F;
    if (s.before) {
      each_output(
          ahead, features.count, B, H,
          [&](int64_t row) { return static_cast<const T*>(o.rows) + (slot(t) * B + row) * H; },
          [&](int n, int64_t row, T sum) { future[row * F + features.first + n] = relu(n, sum); });
      __syncthreads();
    } else {
      T* const rows = o.rows + slot(t) * L * B * F;
      each_output(
          ahead, features.count, L * B, H, [&](int64_t row) { return static_cast<const T*>(g_at(1)) + row * H; },
          [&](int n, int64_t row, T sum) { rows[row * F + features.first + n] = relu(n, sum); });
      __syncthreads();
      each(features.count, B, [&](int n, int64_t row) {
        const int64_t at = row * F + features.first + n;
        T sum = 0;
        for (int i = 0; i < L; ++i) sum += rows[i * B * F + at];
        future[at] = sum / T(L);
      });
      __syncthreads();
    }
    if (next < s.frames)
      each(features.count, B, [&](int n, int64_t row) {
        const int f = features.first + n;
        feed(next, row, f, future[row * F + f]);
      });
    barrier.meet();
  };

  each(units.count, B, [&](int n, int64_t row) {
    const int64_t at = row * H + units.first + n;
    state_at(0)[at] = enc_in(0, row)[F + units.first + n] = o.h[at];
    cell_at(0)[at] = o.c[at];
  });
  if (!s.previous)
    each(features.count, B, [&](int n, int64_t row) {
      const int f = features.first + n;
      feed(0, row, f, o.future[row * F + f]);
    });
  barrier.meet();
  for (int64_t t = 0; t < s.frames; ++t) {
    if (s.previous) decode(t, state_at(t), cell_at(t));
    each_unit<4>(
        enc, units.count, B, F + H, [&](int64_t row) { return static_cast<const T*>(enc_in(t, row)); },
        [&](int n, int64_t row, T(&a)[4]) {
          const int unit = units.first + n;
          const int64_t at = row * H + unit;
#pragma unroll
          for (int p = 0; p < 4; ++p) a[p] += o.given[(t * B + row) * 4 * H + p * H + unit];
          const auto u = formula::lstm(a[0], a[1], a[2], a[3], cell_at(t)[at]);
          T* const gates = o.enc_gates + (slot(t) * B + row) * 4 * H + unit;
          gates[0] = u.i, gates[H] = u.f, gates[2 * H] = u.g, gates[3 * H] = u.o;
          state_at(t + 1)[at] = u.h;
          cell_at(t + 1)[at] = u.c;
          if (t + 1 < s.frames) enc_in(t + 1, row)[F + unit] = u.h;
        });
    barrier.meet();
    if (!s.previous) decode(t, state_at(t + 1), cell_at(t + 1));
  }
}

template <class T> __global__ void __launch_bounds__(threads, 1)
    trn_backward_kernel(const TrnBackward<T> o, const TrnShare share) {
  PYFLOWGEN_DYNAMIC_SHARED(T, shared);
  const TrnSizes& s = o.sizes;
  const int64_t B = s.batch;
  const int H = int(s.hidden), F = int(s.features), C = int(s.classes), L = int(s.steps);
  const Own units = own_outputs(share.units, H), features = own_outputs(share.features, F);
  T* const q = shared;
  Keeper<T> keeper{shared + tile * C, share.held};
  const Rows<T> dec = keeper.keep(o.matrix.dec, H, 2, 4 * H, units);  // its parts: of u and of g
  const Rows<T> fusion = keeper.keep(o.matrix.fusion, C, 1, H, {0, C});
  const Rows<T> classifier = keeper.keep(o.matrix.classifier, H, 1, C, units);
  const Rows<T> ahead = keeper.keep(o.matrix.ahead, H, 1, F, units);
  const Rows<T> hx = keeper.keep(o.matrix.hx, H, 1, H, units), cx = keeper.keep(o.matrix.cx, H, 1, H, units);
  const Rows<T> enc_f = keeper.keep(o.matrix.enc, F, 1, 4 * H, features);
  const Rows<T> enc_h = keeper.keep(o.matrix.enc + int64_t(F) * 4 * H, H, 1, 4 * H, units);
  const Rows<T> dec_u{dec.at, dec.unit, 0}, dec_g{dec.at + dec.part, dec.unit, 0};
  GridBarrier barrier{o.arrived};
  const int64_t state = B * H;
  const auto cell = [&](const T* gates, const T* before, const T* after, const T* dh, T* dc, T* dgates) {
    each(units.count, B, [&](int n, int64_t row) {
      const int64_t at = row * H + units.first + n, wide = row * 4 * H + units.first + n;
      const auto d = formula::lstm_backward(gates[wide], gates[wide + H], gates[wide + 2 * H], gates[wide + 3 * H],
                                            after[at], before[at], dh[at], dc[at]);
      dgates[wide] = d.di, dgates[wide + H] = d.df, dgates[wide + 2 * H] = d.dg, dgates[wide + 3 * H] = d.d_o;
      dc[at] = d.before;
    });
  };

  // Adds to dh and dc what the decoder of frame t asks for, dfuture being the gradient of its future feature.
  const auto decode = [&](int64_t t) {
    const T *const gs = o.gs + t * (L + 1) * state, *const ks = o.ks + t * (L + 1) * state;
    const int64_t wide = s.before ? 1 : L;
    T* const drows = o.drows + t * wide * B * F;
    const T* const results = s.before ? o.futures + t * B * F : o.rows + t * L * B * F;
    each(features.count, wide * B, [&](int n, int64_t row) {
      const int64_t f = features.first + n, at = row * F + f;
      drows[at] = results[at] > 0 ? o.dfuture[row % B * F + f] / T(wide) : T(0);
    });
    barrier.meet();
    each_output(
        ahead, units.count, wide * B, F, [&](int64_t row) { return static_cast<const T*>(drows) + row * F; },
        [&](int n, int64_t row, T sum) {
          const int64_t at = row * H + units.first + n;
          if (!s.before) o.dg[at] = sum;
          for (int i = 0; s.before && i < L; ++i) o.dg[i * state + at] = sum / T(L);
        });
    each(units.count, B, [&](int n, int64_t row) { o.dk[row * H + units.first + n] = 0; });
    const auto next_gates = [&](int i) {
      return [=](int64_t row) { return static_cast<const T*>(o.ddec_gates) + ((t * L + i) * B + row) * 4 * H; };
    };
    for (int i = L - 1; i >= 0; --i) {
      T *const du = o.du + (t * L + i) * state, *const dg = o.dg + i * state;
      __syncthreads();
      if (i + 1 < L) {
        each_output(dec_u, units.count, B, 4 * H, next_gates(i + 1), [&](int n, int64_t row, T sum) {
          const int64_t unit = units.first + n, at = row * H + unit, there = (t * L + i + 1) * B;
          const T d = o.mask.u ? sum * o.mask.u[there * H + at] : sum;
          du[at] = o.dec_in[(there + row) * 2 * H + unit] > 0 ? d : T(0);
        });
        each_output(dec_g, units.count, B, 4 * H, next_gates(i + 1),
                    [&](int n, int64_t row, T sum) { dg[row * H + units.first + n] += sum; });
        barrier.meet();
      } else {
        each(units.count, B, [&](int n, int64_t row) { du[row * H + units.first + n] = 0; });
      }
      const T* const dscores = o.dscores + (t * L + i) * B * C;
      for (int64_t first = 0; first < B; first += tile) {
        const int64_t count = B - first < tile ? B - first : tile;
        all_classes(
            fusion, C, first, B, i + 1 < L ? H : 0, q, [&](int64_t row) { return static_cast<const T*>(du) + row * H; },
            [&](int64_t row, int n) { return dscores[row * C + n]; });
        if (blockIdx.x == 0)
          each(C, count, [&](int n, int64_t row) { o.dq[((t * L + i) * B + first + row) * C + n] = q[row * C + n]; });
        each_output(
            classifier, units.count, count, C, [&](int64_t row) { return static_cast<const T*>(q) + row * C; },
            [&](int n, int64_t row, T sum) {
              const int64_t at = (first + row) * H + units.first + n;
              dg[at] += o.mask.g ? sum * o.mask.g[(t * L + i) * state + at] : sum;
            });
      }
      __syncthreads();
      cell(o.dec_gates + (t * L + i) * B * 4 * H, ks + i * state, ks + (i + 1) * state, dg, o.dk,
           o.ddec_gates + (t * L + i) * B * 4 * H);
      barrier.meet();
    }
    T *const dhx = o.dhx + t * state, *const dcx = o.dcx + t * state;
    each_output(dec_g, units.count, B, 4 * H, next_gates(0), [&](int n, int64_t row, T sum) {
      const int64_t at = row * H + units.first + n;
      dhx[at] = gs[at] > 0 ? sum : T(0);
      dcx[at] = ks[at] > 0 ? o.dk[at] : T(0);
    });
    barrier.meet();
    each_output(
        hx, units.count, B, H, [&](int64_t row) { return static_cast<const T*>(dhx) + row * H; },
        [&](int n, int64_t row, T sum) { o.dh[row * H + units.first + n] += sum; });
    each_output(
        cx, units.count, B, H, [&](int64_t row) { return static_cast<const T*>(dcx) + row * H; },
        [&](int n, int64_t row, T sum) { o.dc[row * H + units.first + n] += sum; });
    __syncthreads();
  };

  each(units.count, B, [&](int n, int64_t row) {
    const int64_t at = row * H + units.first + n;
    o.dh[at] = 0, o.dc[at] = o.dc_last[at];
  });
  each(features.count, B, [&](int n, int64_t row) {
    const int64_t at = row * F + features.first + n;
    o.dfuture[at] = o.dfuture_last[at];
  });
  for (int64_t t = s.frames - 1; t >= 0; --t) {
    __syncthreads();
    each(units.count, B, [&](int n, int64_t row) {
      const int64_t at = row * H + units.first + n;
      o.dh[at] += o.dstates[t * state + at];
    });
    __syncthreads();
    if (!s.previous) decode(t);
    T* const dgates = o.dgiven + t * B * 4 * H;
    cell(o.enc_gates + t * B * 4 * H, o.cells + t * state, o.cells + (t + 1) * state, o.dh, o.dc, dgates);
    barrier.meet();
    const auto from = [&](int64_t row) { return static_cast<const T*>(dgates) + row * 4 * H; };
    each_output(enc_f, features.count, B, 4 * H, from, [&](int n, int64_t row, T sum) {
      const int64_t at = row * F + features.first + n;
      const T d = o.mask.future ? sum * o.mask.future[t * B * F + at] : sum;
      // With `previous` the last future feature is a result too.
      o.dfuture[at] = s.previous && t + 1 == s.frames ? o.dfuture[at] + d : d;
    });
    each_output(enc_h, units.count, B, 4 * H, from,
                [&](int n, int64_t row, T sum) { o.dh[row * H + units.first + n] = sum; });
    __syncthreads();
    if (s.previous) decode(t);
  }
  if (s.previous && s.frames > 0)  // the first frame makes its own
    each(features.count, B, [&](int n, int64_t row) { o.dfuture[row * F + features.first + n] = 0; });
}

// As many blocks as multiprocessors, where there are units enough; matrices held in the order given, while they fit:
// elements of a block's rows of each.
template <class T, class K, class O, class E> void launch(K kernel, const O& o, const E& elements, void* stream) {
  const TrnSizes& s = o.sizes;
  const Device device;
  TrnShare share{int(ceil_div(s.hidden, device.multiprocessors)), int(ceil_div(s.features, device.multiprocessors)), 0};
  if (share.units < tile) share.units = tile;
  if (share.features < tile) share.features = tile;
  int64_t bytes = tile * s.classes * int64_t(sizeof(T));
  unsigned bit = 1;
  for (const int64_t size : elements(share)) {
    if (bytes + size * int64_t(sizeof(T)) <= device.shared_bytes) bytes += size * int64_t(sizeof(T)), share.held |= bit;
    bit *= 2;
  }
  const int64_t by_units = ceil_div(s.hidden, share.units), by_features = ceil_div(s.features, share.features);
  const int blocks = int(by_units > by_features ? by_units : by_features);
  // A warp four outputs and four rows, as far as there are so many.
  const int64_t widest = share.units > share.features ? share.units : share.features;
  const int64_t tasks = widest * ceil_div(s.batch, tile);
  const int block = int(tasks < threads / warp ? tasks : threads / warp) * warp;
  if (bytes > device.shared_bytes || blocks > blocks_at_once(kernel, device, block, size_t(bytes)))
    throw std::runtime_error("pyflowgen: trn does not fit on this device");
  PYFLOWGEN_LAUNCH_COOPERATIVE(kernel, dim3(unsigned(blocks)), dim3(unsigned(block)), size_t(bytes), stream, o, share);
}

struct Elements {
  int64_t of[8];
  const int64_t* begin() const { return of; }
  const int64_t* end() const { return of + 8; }
};

}  // namespace

template <class T> void trn_forward(const TrnForward<T>& o, void* stream) {
  const TrnSizes& s = o.sizes;
  launch<T>(
      &trn_forward_kernel<T>, o,
      [&](const TrnShare& share) {
        const int64_t u = share.units;
        return Elements{{u * 8 * s.hidden, s.classes * s.hidden, u * s.classes, share.features * s.hidden, u * s.hidden,
                         u * s.hidden, u * 4 * (s.features + s.hidden), 0}};
      },
      stream);
}
template <class T> void trn_backward(const TrnBackward<T>& o, void* stream) {
  const TrnSizes& s = o.sizes;
  launch<T>(
      &trn_backward_kernel<T>, o,
      [&](const TrnShare& share) {
        const int64_t u = share.units;
        return Elements{{u * 8 * s.hidden, s.classes * s.hidden, u * s.classes, u * s.features, u * s.hidden,
                         u * s.hidden, share.features * 4 * s.hidden, u * 4 * s.hidden}};
      },
      stream);
}

#define PYFLOWGEN_INSTANTIATE(T, A) \
  template void trn_forward<T>(const TrnForward<T>&, void*); \
  template void trn_backward<T>(const TrnBackward<T>&, void*);
PYFLOWGEN_INSTANTIATE(float, float)
#ifndef PYFLOWGEN_FLOAT_ONLY  // the tests' short form
PYFLOWGEN_INSTANTIATE(double, double)
#endif

}  // namespace pyflowgen::cuda
