// invertible_linear on the CPU: a small matrix times every pixel, its gradient in the same pass, and triangular solves.
//
// Floor, float32, n pixels of c channels: forward and inverse read x and write y, 8 n c bytes; backward reads dy and x
// and writes dx, 12 n c bytes. The kernels move just that. They compute n c^2 multiply-adds, twice that backward: up to
// about 24 channels memory is the limit, beyond it arithmetic.
//
// A chunk of pixels is worked on as [channel][pixel] rows, a lane a pixel: read in place where memory is so, else
// brought into rows first, with zeros to the end of the last pack.
#include "invertible_linear.h"

#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/memory.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

// Rows of `pixels` elements, `stride` apart.
template <class C> struct Rows {
  C* p;
  int64_t stride;
  PYFLOWGEN_INLINE C* operator[](int64_t i) const { return p + i * stride; }
};

struct Chunk {
  int64_t image, inner, pixels;  // the first pixel, and how many
};

Chunk chunk(const InvertibleLinearSizes& n, int64_t i) {
  const int64_t size = invertible_linear_chunk(n);
  if (size <= n.inner) {  // none reaches over the end of an image
    const int64_t each = (n.inner + size - 1) / size, first = i % each * size;
    return {i / each, first, n.inner - first < size ? n.inner - first : size};
  }
  const int64_t first = i * size, left = n.batch * n.inner - first;
  return {first / n.inner, first % n.inner, left < size ? left : size};
}

template <class C> constexpr int64_t padded(int64_t pixels) { return (pixels + lanes<C> - 1) / lanes<C> * lanes<C>; }

// Whether a chunk's rows can be used where they are.
template <class T, class C> bool in_place(const InvertibleLinearSizes& n, const Chunk& c, const Strides& s) {
  return std::is_same_v<std::remove_const_t<T>, C> && s.inner == 1 && c.inner + c.pixels <= n.inner &&
         c.pixels % lanes<C> == 0;
}

// Call body(pixel, at, count) for each run of a chunk's pixels within one image; at: where the run is in memory.
template <class T, class Body>
PYFLOWGEN_INLINE void each_run(const InvertibleLinearSizes& n, const Chunk& c, const Image<T>& image, Body body) {
  int64_t b = c.image, i = c.inner;
  for (int64_t pixel = 0; pixel < c.pixels; ++b, i = 0) {
    const int64_t run = n.inner - i < c.pixels - pixel ? n.inner - i : c.pixels - pixel;
    body(pixel, image.p + b * image.s.batch + i * image.s.inner, run);
    pixel += run;
  }
}

template <class T, class C> void read_row(const T* from, int64_t stride, C* to, int64_t count) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + lanes<C> <= count; i += lanes<C>) store<C>(to + i, load_as(from + i));
  for (; i < count; ++i) {
    if constexpr (std::is_same_v<T, C>) to[i] = from[i * stride];
    else to[i] = gather(from + i * stride, 1, 1)[0];
  }
}
template <class T, class C> void write_row(const C* from, T* to, int64_t stride, int64_t count) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + lanes<C> <= count; i += lanes<C>) store_as(to + i, load<C>(from + i));
  for (; i < count; ++i) {
    if constexpr (std::is_same_v<T, C>) to[i * stride] = from[i];
    else scatter(to + i * stride, 1, broadcast<C>(from[i]), 1);
  }
}

// A run whose channels are side by side in memory, square by square of pixels and channels.
template <class C>
void read_channels(const C* from, int64_t stride, Rows<C> rows, int64_t pixel, int64_t count, int64_t channels) {
  for (int64_t k = 0; k < count; k += lanes<C>)
    for (int64_t i = 0; i < channels; i += lanes<C>) {
      const int tall = int(count - k < lanes<C> ? count - k : lanes<C>),
                wide = int(channels - i < lanes<C> ? channels - i : lanes<C>);
      Pack<C> square[lanes<C>] = {};
      for (int j = 0; j < tall; ++j) square[j] = load_first<C>(from + (k + j) * stride + i, wide);
      transpose<C>(square);
      for (int j = 0; j < wide; ++j) store_first<C>(rows[i + j] + pixel + k, square[j], tall);
    }
}
template <class C>
void write_channels(Rows<C> rows, int64_t pixel, C* to, int64_t stride, int64_t count, int64_t channels) {
  for (int64_t k = 0; k < count; k += lanes<C>)
    for (int64_t i = 0; i < channels; i += lanes<C>) {
      const int tall = int(count - k < lanes<C> ? count - k : lanes<C>),
                wide = int(channels - i < lanes<C> ? channels - i : lanes<C>);
      Pack<C> square[lanes<C>] = {};
      for (int j = 0; j < wide; ++j) square[j] = load_first<C>(rows[i + j] + pixel + k, tall);
      transpose<C>(square);
      for (int j = 0; j < tall; ++j) store_first<C>(to + (k + j) * stride + i, square[j], wide);
    }
}

// The first `channels` channels of an image's pixels to rows, with zeros up to the end of the last pack; and back.
template <class T, class C> void read_rows(const InvertibleLinearSizes& n, const Chunk& c, const Image<const T>& image,
                                           int64_t channels, Rows<C> rows) {
  each_run(n, c, image, [&](int64_t pixel, const T* at, int64_t count) {
    if constexpr (std::is_same_v<T, C>) {
      if (image.s.channel == 1 && image.s.inner != 1)
        return read_channels<C>(at, image.s.inner, rows, pixel, count, channels);
    }
    for (int64_t i = 0; i < channels; ++i) read_row(at + i * image.s.channel, image.s.inner, rows[i] + pixel, count);
  });
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t k = c.pixels; k < padded<C>(c.pixels); ++k) rows[i][k] = 0;
}
template <class T, class C>
void write_rows(const InvertibleLinearSizes& n, const Chunk& c, Rows<C> rows, int64_t channels, const Image<T>& image) {
  each_run(n, c, image, [&](int64_t pixel, T* at, int64_t count) {
    if constexpr (std::is_same_v<T, C>) {
      if (image.s.channel == 1 && image.s.inner != 1)
        return write_channels<C>(rows, pixel, at, image.s.inner, count, channels);
    }
    for (int64_t i = 0; i < channels; ++i) write_row(rows[i] + pixel, at + i * image.s.channel, image.s.inner, count);
  });
}

// The chunk's rows in place, or brought into `buffer`.
template <class T, class C>
Rows<const C> rows_of(const InvertibleLinearSizes& n, const Chunk& c, const Image<const T>& image, Rows<C> buffer) {
  if constexpr (std::is_same_v<T, C>) {
    if (in_place<T, C>(n, c, image.s)) return {image.p + c.image * image.s.batch + c.inner, image.s.channel};
  }
  read_rows(n, c, image, n.channels, buffer);
  return {buffer.p, buffer.stride};
}

// ------------------------------------------------------------------------------------------------------- product
// y = A x + b for `height` rows of A and `packs` packs of pixels.
template <class C, int height, int packs> PYFLOWGEN_INLINE void product_tile(int64_t channels, const C* a,
                                                                             const C* bias, Rows<const C> x, Rows<C> y,
                                                                             int64_t pixel) {
  Pack<C> sum[height][packs];
#pragma GCC unroll 8
  for (int i = 0; i < height; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < packs; ++k) sum[i][k] = bias ? broadcast<C>(bias[i]) : Pack<C>{};
  for (int64_t j = 0; j < channels; ++j) {
    Pack<C> v[packs];
#pragma GCC unroll 8
    for (int k = 0; k < packs; ++k) v[k] = load<C>(x[j] + pixel + k * lanes<C>);
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      const Pack<C> w = broadcast<C>(a[i * channels + j]);
#pragma GCC unroll 8
      for (int k = 0; k < packs; ++k) sum[i][k] = fma(w, v[k], sum[i][k]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < height; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < packs; ++k) store<C>(y[i] + pixel + k * lanes<C>, sum[i][k]);
}

template <class C, int height> [[gnu::noinline]] void product_rows(int64_t channels, const C* a, const C* bias,
                                                                   Rows<const C> x, Rows<C> y, int64_t pixels) {
  constexpr int packs = vector_bytes == 64 ? 4 : 2;  // with a height of 4 they fill the registers
  int64_t pixel = 0;
  for (; pixel + packs * lanes<C> <= pixels; pixel += packs * lanes<C>)
    product_tile<C, height, packs>(channels, a, bias, x, y, pixel);
  for (; pixel < pixels; pixel += lanes<C>) product_tile<C, height, 1>(channels, a, bias, x, y, pixel);
}

// pixels: a multiple of lanes.
template <class C>
void product(int64_t channels, const C* a, const C* bias, Rows<const C> x, Rows<C> y, int64_t pixels) {
  for (int64_t i = 0; i < channels; i += 4) {
    const auto run = [&]<int height>() {
      product_rows<C, height>(channels, a + i * channels, bias ? bias + i : nullptr, x, {y[i], y.stride}, pixels);
    };
    switch (channels - i) {
      case 1: run.template operator()<1>(); break;
      case 2: run.template operator()<2>(); break;
      case 3: run.template operator()<3>(); break;
      default: run.template operator()<4>();
    }
  }
}

// -------------------------------------------------------------------------------------------------- outer product
// The sums of the lanes of `count` packs, a multiple of lanes.
template <class C, int count> PYFLOWGEN_INLINE void sum_each(const Pack<C> (&v)[count], C (&sums)[count]) {
  constexpr int side = lanes<C>;
  static_assert(count % side == 0);
#pragma GCC unroll 8
  for (int g = 0; g < count; g += side) {
    Pack<C> square[side];
#pragma GCC unroll 16
    for (int i = 0; i < side; ++i) square[i] = v[g + i];
    transpose<C>(square);
#pragma GCC unroll 4
    for (int half = side / 2; half; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) square[i] += square[i + half];
    store<C>(sums + g, square[0]);
  }
}

// dmatrix[i][j] += sum over pixels of dy_i x_j, for 4 x 4 pairs; rows beyond the last are the last again.
template <class C> void outer_product(int64_t channels, Rows<const C> dy, Rows<const C> x, int64_t pixels,
                                      double* dmatrix, double* dbias) {
  constexpr int side = 4;
  for (int64_t i = 0; i < channels; i += side)
    for (int64_t j = 0; j < channels; j += side) {
      const C *a[side], *b[side];
      for (int k = 0; k < side; ++k) {
        a[k] = dy[i + k < channels ? i + k : channels - 1];
        b[k] = x[j + k < channels ? j + k : channels - 1];
      }
      Pack<C> sum[side * side] = {};
      for (int64_t pixel = 0; pixel < pixels; pixel += lanes<C>) {
        Pack<C> v[side];
#pragma GCC unroll 4
        for (int k = 0; k < side; ++k) v[k] = load<C>(b[k] + pixel);
#pragma GCC unroll 4
        for (int m = 0; m < side; ++m) {
          const Pack<C> d = load<C>(a[m] + pixel);
#pragma GCC unroll 4
          for (int k = 0; k < side; ++k) sum[m * side + k] = fma(d, v[k], sum[m * side + k]);
        }
      }
      alignas(64) C total[side * side];
      sum_each<C>(sum, total);
      for (int64_t m = 0; m < side && i + m < channels; ++m)
        for (int64_t k = 0; k < side && j + k < channels; ++k)
          dmatrix[(i + m) * channels + j + k] += double(total[m * side + k]);
    }
  for (int64_t i = 0; i < channels; ++i) {
    f64v sum{};
    for (int64_t pixel = 0; pixel < pixels;) {  // a sum of short sums errs less
      const int64_t stop = pixel + 8 * lanes<C> < pixels ? pixel + 8 * lanes<C> : pixels;
      Pack<C> part{};
      for (; pixel < stop; pixel += lanes<C>) part += load<C>(dy[i] + pixel);
      sum += widen_add(part);
    }
    dbias[i] += reduce_add(sum);
  }
}

// --------------------------------------------------------------------------------------------------------- solve
// One row of a triangular system for `packs` packs: v[i] = (v[i] - sum over j of m[j] v[j]) reciprocal, j in [from,
// to).
template <class C, int packs> PYFLOWGEN_INLINE void solve_row(const C* m, int64_t from, int64_t to, C reciprocal,
                                                              Rows<C> v, int64_t i, int64_t pixel) {
  Pack<C> sum[packs];
#pragma GCC unroll 8
  for (int k = 0; k < packs; ++k) sum[k] = load<C>(v[i] + pixel + k * lanes<C>);
  for (int64_t j = from; j < to; ++j) {
    const Pack<C> w = broadcast<C>(-m[j]);
#pragma GCC unroll 8
    for (int k = 0; k < packs; ++k) sum[k] = fma(w, load<C>(v[j] + pixel + k * lanes<C>), sum[k]);
  }
#pragma GCC unroll 8
  for (int k = 0; k < packs; ++k) store<C>(v[i] + pixel + k * lanes<C>, sum[k] * reciprocal);
}

template <class T, class C, int packs>
PYFLOWGEN_INLINE void solve_pixels(const ChannelSolve<T, C>& a, Rows<C> v, int64_t pixel) {
  const int64_t n = a.n.channels;
  for (int64_t i = 0; i < n; ++i) solve_row<C, packs>(a.lower + i * n, 0, i, a.lower_reciprocal[i], v, i, pixel);
  for (int64_t i = n - 1; i >= 0; --i)
    solve_row<C, packs>(a.upper + i * n, i + 1, n, a.upper_reciprocal[i], v, i, pixel);
}

template <class C> void scale_row(const C* from, C* to, int64_t pixels, C scale, C shift) {
  const Pack<C> a = broadcast<C>(scale), b = broadcast<C>(shift);
  for (int64_t k = 0; k < pixels; k += lanes<C>) store<C>(to + k, fma(load<C>(from + k), a, b));
}
}  // namespace

template <class T, class C>
void channel_product(const ChannelProduct<T, C>& a, int64_t begin, int64_t end, C* scratch) {
  const int64_t size = padded<C>(invertible_linear_chunk(a.n));
  const Rows<C> in{scratch, size}, out{scratch + a.n.channels * size, size};
  for (int64_t t = begin; t < end; ++t) {
    const Chunk c = chunk(a.n, t);
    const Rows<const C> x = rows_of<T, C>(a.n, c, a.x, in);
    Rows<C> y = out;
    bool direct = false;
    if constexpr (std::is_same_v<T, C>) {
      direct = in_place<T, C>(a.n, c, a.y.s);
      if (direct) y = {a.y.p + c.image * a.y.s.batch + c.inner, a.y.s.channel};
    }
    product(a.n.channels, a.matrix, a.bias, x, y, padded<C>(c.pixels));
    if (!direct) write_rows(a.n, c, y, a.n.channels, a.y);
    if (a.head) write_rows(a.n, c, y, a.head, a.part);
  }
}

template <class T, class C> void channel_backward(const ChannelBackward<T, C>& a, int64_t begin, int64_t end,
                                                  C* scratch, double* dmatrix, double* dbias) {
  const int64_t channels = a.n.channels, size = padded<C>(invertible_linear_chunk(a.n));
  const Rows<C> dy_buffer{scratch, size}, x_buffer{scratch + channels * size, size},
      dx_buffer{scratch + 2 * channels * size, size};
  for (int64_t t = begin; t < end; ++t) {
    const Chunk c = chunk(a.n, t);
    const int64_t pixels = padded<C>(c.pixels);
    Rows<const C> dy{dy_buffer.p, size};
    if (a.head) {
      read_rows(a.n, c, a.dpart, a.head, dx_buffer);
      read_rows(a.n, c, a.dy, channels, dy_buffer);
      for (int64_t i = 0; i < a.head; ++i)
        for (int64_t k = 0; k < pixels; k += lanes<C>)
          store<C>(dy_buffer[i] + k, load<C>(dy_buffer[i] + k) + load<C>(dx_buffer[i] + k));
    } else {
      dy = rows_of<T, C>(a.n, c, a.dy, dy_buffer);
    }
    outer_product(channels, dy, rows_of<T, C>(a.n, c, a.x, x_buffer), pixels, dmatrix, dbias);
    if (!a.dx.p) continue;
    bool direct = false;
    Rows<C> dx = dx_buffer;
    if constexpr (std::is_same_v<T, C>) {
      direct = in_place<T, C>(a.n, c, a.dx.s);
      if (direct) dx = {a.dx.p + c.image * a.dx.s.batch + c.inner, a.dx.s.channel};
    }
    product<C>(channels, a.transposed, nullptr, dy, dx, pixels);
    if (!direct) write_rows(a.n, c, dx, channels, a.dx);
  }
}

template <class T, class C> void channel_solve(const ChannelSolve<T, C>& a, int64_t begin, int64_t end, C* scratch) {
  constexpr int packs = 8;  // independent sums hide the latency of one
  const int64_t channels = a.n.channels, size = padded<C>(invertible_linear_chunk(a.n));
  const Rows<C> v{scratch, size}, buffer{scratch + channels * size, size};
  for (int64_t t = begin; t < end; ++t) {
    const Chunk c = chunk(a.n, t);
    const int64_t pixels = padded<C>(c.pixels);
    const Rows<const C> x = rows_of<T, C>(a.n, c, a.x, buffer);
    for (int64_t i = 0; i < channels; ++i) scale_row<C>(x[a.from[i]], v[i], pixels, a.in_scale ? a.in_scale[i] : 1, 0);
    int64_t pixel = 0;
    for (; pixel + packs * lanes<C> <= pixels; pixel += packs * lanes<C>) solve_pixels<T, C, packs>(a, v, pixel);
    for (; pixel < pixels; pixel += lanes<C>) solve_pixels<T, C, 1>(a, v, pixel);
    for (int64_t i = 0; i < channels; ++i)
      scale_row<C>(v[i], buffer[a.to[i]], pixels, a.out_scale ? a.out_scale[i] : 1, a.out_shift ? a.out_shift[i] : 0);
    write_rows(a.n, c, buffer, channels, a.y);
  }
}

#define PYFLOWGEN_INSTANTIATE(T, C) \
  template void channel_product<T, C>(const ChannelProduct<T, C>&, int64_t, int64_t, C*); \
  template void channel_solve<T, C>(const ChannelSolve<T, C>&, int64_t, int64_t, C*); \
  template void channel_backward<T, C>(const ChannelBackward<T, C>&, int64_t, int64_t, C*, double*, double*);
PYFLOWGEN_INSTANTIATE(double, double)
PYFLOWGEN_INSTANTIATE(float, float)
PYFLOWGEN_INSTANTIATE(bf16, float)
PYFLOWGEN_INSTANTIATE(f16, float)

}  // namespace pyflowgen::PYFLOWGEN_ISA
