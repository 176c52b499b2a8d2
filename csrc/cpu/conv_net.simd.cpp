// conv_net on the CPU: the register tile of gemm.h, block of rows after block of rows, and the loops that gather a
// window and add up taps.
//
// Floor: 2 n operations forward and 4 n backward for n = rows * (columns1 c1 + c1 c2 + c2 columns3) multiply-adds, at
// the rate of the register tile. The windows and taps are some 1 % of the data that the products read.
#include "conv_net.h"

#include <cstddef>
#include <type_traits>

#include "cpu/activation.h"
#include "cpu/gemm.h"
#include "cpu/sums.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

template <class T> constexpr int64_t stride1(const ConvNet<T>& o) { return conv_net_stride(o.channels[1]); }
template <class T> constexpr int64_t stride2(const ConvNet<T>& o) { return conv_net_stride(o.channels[2]); }
template <class T> constexpr int64_t block_end(const ConvNet<T>& o, int64_t b) {
  return std::min(o.rows(), (b + 1) * conv_net_block_rows(o));
}

// A product's packed operand: B[depth][columns].
struct Shape { int64_t depth, columns; };
template <class T> Shape product_of(const ConvNet<T>& o, bool backward, int i) {
  const Shape forward[3] = {
      {o.columns1(), o.channels[1]}, {o.channels[1], o.channels[2]}, {o.channels[2], o.columns3()}};
  const Shape s = forward[i];
  return backward ? Shape{s.columns, s.depth} : s;
}
template <class T> int64_t panels_size(const Shape& s) { return gemm_panels<T>(s.columns) * s.depth * tile_columns<T>; }
template <class T> T* panels_of(const ConvNet<T>& o, bool backward, int i) {
  T* p = o.panels;
  for (int j = 0; j < i; ++j) p += panels_size<T>(product_of(o, backward, j));
  return p;
}
// The biases, padded, behind the panels of the forward pass.
template <class T> T* bias_of(const ConvNet<T>& o, int i) {
  T* p = panels_of(o, false, 3);
  for (int j = 0; j < i; ++j) p += conv_net_stride(o.channels[j + 1]);
  return p;
}

// A window on images, pixels row after row.
struct Window {
  int64_t height, width, kernel;
  // Of the window around pixel r at (y, x): f(ky, from, to, first) for each of its rows that is inside the image, with
  // the columns from <= kx < to that are, and the pixel of column 0; that of kx is first + sign kx.
  template <class F> PYFLOWGEN_INLINE void rows_inside(int64_t r, int64_t y, int64_t x, int sign, const F& f) const {
    const int64_t half = kernel / 2;
    const int64_t left = std::min(half, x), right = std::min(half, width - 1 - x);
    const int64_t from = half - (sign > 0 ? left : right), to = half + (sign > 0 ? right : left) + 1;
    for (int64_t ky = 0; ky < kernel; ++ky) {
      const int64_t at = y + sign * (ky - half);
      if (at >= 0 && at < height) f(ky, from, to, r + sign * ((ky - half) * width - half));
    }
  }
  // f(r, y, x) for rows begin <= r < end.
  template <class F> PYFLOWGEN_INLINE void rows(int64_t begin, int64_t end, const F& f) const {
    int64_t x = begin % width, y = begin / width % height;
    for (int64_t r = begin; r < end; ++r) {
      f(r, y, x);
      if (++x == width) {
        x = 0;
        if (++y == height) y = 0;
      }
    }
  }
};

template <class T> PYFLOWGEN_INLINE void copy(const T* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += lanes<T>) {
    const int n = int(std::min<int64_t>(lanes<T>, count - i));
    store_first<T>(to + i, load_first<T>(from + i, n), n);
  }
}

// windows[row][stride] of rows begin <= row < end: image[row + offset of the tap][channels] for every tap, 0 outside.
template <class T>
void gather_windows(const Window& window, int64_t begin, int64_t end, int64_t channels, const T* image, T* windows) {
  const int64_t k = window.kernel, stride = conv_net_stride(k * k * channels);
  window.rows(begin, end, [&](int64_t r, int64_t y, int64_t x) {
    T* const to = windows + r * stride;
    const int64_t half = k / 2;
    if (x < half || x + half >= window.width || y < half || y + half >= window.height)
      std::fill_n(to, k * k * channels, T(0));
    window.rows_inside(r, y, x, 1, [&](int64_t ky, int64_t kx, int64_t kx_end, int64_t first) {
      copy(image + (first + kx) * channels, (kx_end - kx) * channels, to + (ky * k + kx) * channels);
    });
  });
}

// image[row][channels] = bias + sum over taps of taps[row - offset of the tap][tap][channels]
template <class T> void add_taps(const Window& window, int64_t begin, int64_t end, int64_t channels, const T* taps,
                                 const T* bias, T* image) {
  const int64_t k = window.kernel, stride = conv_net_stride(k * k * channels);
  window.rows(begin, end, [&](int64_t r, int64_t y, int64_t x) {
    for (int64_t c = 0; c < channels; c += lanes<T>) {
      Pack<T> sum = bias ? load<T>(bias + c) : Pack<T>{};
      window.rows_inside(r, y, x, -1, [&](int64_t ky, int64_t kx, int64_t kx_end, int64_t first) {
        const T* p = taps + (first - kx) * stride + (ky * k + kx) * channels + c;
        for (; kx < kx_end; ++kx, p += channels - stride) sum += load<T>(p);
      });
      store_first<T>(image + r * channels + c, sum, int(std::min<int64_t>(lanes<T>, channels - c)));
    }
  });
}

// out[rows][stride] = finish(A B, given); then after(pack, place) on what is not yet activated.
template <class T, class After> void product(int64_t rows, const Shape& s, const T* a, int64_t a_row, const T* panels,
                                             T* out, int64_t out_row, const T* given, int64_t given_row, Finish finish,
                                             const After& after) {
  constexpr int64_t width = tile_columns<T>;
  const int64_t steps = ceil_div(rows, tile_rows<T>);
  for (int64_t n = 0; n < s.columns; n += width, panels += s.depth * width) {
    const int used = int(std::min(width, s.columns - n));
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t m = part_start(rows, steps, t), count = part_start(rows, steps, t + 1) - m;
      T* const tile = out + m * out_row + n;
      gemm_tile<T>(int(count), used, s.depth, a + m * a_row, a_row, 1, panels,
                   given ? given + m * given_row + n : given, given_row, tile, out_row, finish);
      if constexpr (!std::is_same_v<After, std::nullptr_t>)
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < used; j += lanes<T>) {
            T* const at = tile + i * out_row + j;
            store<T>(at, after(load<T>(at), (m + i) * out_row + n + j));
          }
    }
  }
}

// activated[rows][stride] = phi(A B + bias)
template <class T> void hidden_layer(Activation activation, int64_t rows, const Shape& s, const T* a, int64_t a_row,
                                     const T* panels, const T* bias, T* activated) {
  const int64_t stride = conv_net_stride(s.columns);
  if (activation == Activation::relu)
    return product<T>(rows, s, a, a_row, panels, activated, stride, bias, 0, Finish::add_relu, nullptr);
  for_kind(activation, [&]<Activation kind>() {
    product<T>(rows, s, a, a_row, panels, activated, stride, bias, 0, Finish::add,
               [](Pack<T> z, int64_t) { return activate<kind>(z); });
  });
}

// dz[rows][stride] = A B phi'(kept)
template <class T> void hidden_gradient(Activation activation, int64_t rows, const Shape& s, const T* a, int64_t a_row,
                                        const T* panels, const T* kept, T* dz) {
  const int64_t stride = conv_net_stride(s.columns);
  if (activation == Activation::relu)
    return product<T>(rows, s, a, a_row, panels, dz, stride, kept, stride, Finish::relu_backward, nullptr);
  for_kind(activation, [&]<Activation kind>() {
    product<T>(rows, s, a, a_row, panels, dz, stride, nullptr, 0, Finish::add,
               [=](Pack<T> dh, int64_t at) { return activate_backward<kind>(dh, load<T>(kept + at)); });
  });
}

// sums[height][stride of columns] (+)= a[rows][stride of height]^T b[rows][stride of columns]; `panel` is scratch.
template <class T>
void add_outer(bool add, int64_t rows, int64_t height, int64_t columns, const T* a, const T* b, T* sums, T* panel) {
  constexpr int64_t width = tile_columns<T>;
  const int64_t a_stride = conv_net_stride(height), stride = conv_net_stride(columns);
  const int64_t steps = ceil_div(height, tile_rows<T>);
  for (int64_t n = 0; n < columns; n += width) {
    const int used = int(std::min(width, columns - n));
    gemm_pack<T>(used, rows, b + n, stride, 1, panel);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t m = part_start(height, steps, t), count = part_start(height, steps, t + 1) - m;
      T* const tile = sums + m * stride + n;
      gemm_tile<T>(int(count), used, rows, a + m, 1, a_stride, panel, add ? tile : nullptr, stride, tile, stride);
    }
  }
}

// The sums of one group: [columns1][stride1], [c2][stride1], [columns3][stride2], then the biases'.
template <class T> struct Sums {
  int64_t size[3];
  explicit Sums(const ConvNet<T>& o)
      : size{o.columns1() * stride1(o), o.channels[2] * stride1(o), o.columns3() * stride2(o)} {}
  int64_t before_biases() const { return size[0] + size[1] + size[2]; }
};

// sums[count] of all groups, in order, added to the first group's.
template <class T> void add_groups(int64_t groups, int64_t group_size, int64_t count, T* sums) {
  for (int64_t i = 0; i < count; i += lanes<T>) {
    const int n = int(std::min<int64_t>(lanes<T>, count - i));
    Pack<T> total = load_first<T>(sums + i, n);
    for (int64_t g = 1; g < groups; ++g) total += load_first<T>(sums + g * group_size + i, n);
    store_first<T>(sums + i, total, n);
  }
}

}  // namespace

template <class T> int64_t conv_net_panels(const ConvNet<T>& o, bool backward) {
  int64_t size = 0;
  for (int i = 0; i < 3; ++i) size += panels_size<T>(product_of(o, backward, i));
  return backward ? size : size + conv_net_bias_columns(o);
}
template <class T> int64_t conv_net_pack_tasks(const ConvNet<T>& o, bool backward) {
  int64_t tasks = backward ? 0 : 1;
  for (int i = 0; i < 3; ++i) tasks += gemm_panels<T>(product_of(o, backward, i).columns);
  return tasks;
}

template <class T> void conv_net_pack(const ConvNet<T>& o, bool backward, int64_t begin, int64_t end) {
  constexpr int64_t width = tile_columns<T>;
  for (int64_t task = begin; task < end; ++task) {
    int i = 0;
    int64_t panel = task;
    for (; i < 3; ++i) {
      const int64_t own = gemm_panels<T>(product_of(o, backward, i).columns);
      if (panel < own) break;
      panel -= own;
    }
    if (i == 3) {
      for (int j = 0; j < 3; ++j) {
        T* const to = bias_of(o, j);
        const int64_t own = o.channels[j + 1];
        std::fill_n(to, conv_net_stride(own), T(0));
        if (o.bias[j]) std::copy_n(o.bias[j], own, to);
      }
      continue;
    }
    const Shape s = product_of(o, backward, i);
    const int64_t n = panel * width, used = std::min(width, s.columns - n);
    T* const to = panels_of(o, backward, i) + panel * s.depth * width;
    if (i == 1) {
      gemm_pack<T>(int(used), s.depth, o.weight[1] + (backward ? n : n * o.channels[1]), backward ? o.channels[1] : 1,
                   backward ? 1 : o.channels[1], to);
      continue;
    }
    // Where a weight [out][in][taps] has (tap, channel) and the hidden channel.
    const int64_t taps = i ? o.kernel3 * o.kernel3 : o.kernel1 * o.kernel1, outer = i ? o.channels[3] : o.channels[0];
    const int64_t by_hidden = i ? taps : taps * outer, by_outer = i ? taps * o.channels[2] : taps;
    const T* const weight = i ? o.weight[2] + taps - 1 : o.weight[0];
    const int64_t by_tap = i ? -1 : 1;
    const bool deep = (i == 0) != backward;  // (tap, channel) is the depth
    if (deep) {
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t c = 0; c < outer; ++c) {
          T* const row = to + (t * outer + c) * width;
          const T* const from = weight + t * by_tap + c * by_outer + n * by_hidden;
          for (int64_t j = 0; j < width; ++j) row[j] = j < used ? from[j * by_hidden] : T(0);
        }
    } else {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t t = (n + j) / outer, c = (n + j) % outer;
        const T* const from = weight + t * by_tap + c * by_outer;
        for (int64_t h = 0; h < s.depth; ++h) to[h * width + j] = j < used ? from[h * by_hidden] : T(0);
      }
    }
  }
}

template <class T> int64_t conv_net_workspace(const ConvNet<T>& o) {
  const int64_t columns = conv_net_stride(o.columns1()) + (o.hidden[0] ? 0 : stride1(o) + stride2(o));
  return conv_net_block_rows(o) * columns + conv_net_slack;
}

template <class T> void conv_net_products(const ConvNet<T>& o, int64_t begin, int64_t end, T* workspace) {
  const Window window{o.height, o.width, o.kernel1};
  const int64_t size = conv_net_block_rows(o), stride = conv_net_stride(o.columns1());
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * size, rows = block_end(o, b) - first;
    T* const windows = workspace;
    T* const h1 = o.hidden[0] ? o.hidden[0] + first * stride1(o) : workspace + size * stride;
    T* const h2 = o.hidden[1] ? o.hidden[1] + first * stride2(o) : h1 + size * stride1(o);
    gather_windows(window, first, first + rows, o.channels[0], o.x, windows - first * stride);
    hidden_layer<T>(o.activation, rows, product_of(o, false, 0), windows, stride, panels_of(o, false, 0), bias_of(o, 0),
                    h1);
    hidden_layer<T>(o.activation, rows, product_of(o, false, 1), h1, stride1(o), panels_of(o, false, 1), bias_of(o, 1),
                    h2);
    const int64_t to = conv_net_stride(o.columns3());
    product<T>(rows, product_of(o, false, 2), h2, stride2(o), panels_of(o, false, 2), o.taps3 + first * to, to, nullptr,
               0, Finish::add, nullptr);
  }
}

template <class T> void conv_net_add_taps(const ConvNet<T>& o, int64_t begin, int64_t end) {
  add_taps({o.height, o.width, o.kernel3}, begin, end, o.channels[3], o.taps3, bias_of(o, 2), o.y);
}

template <class T> int64_t conv_net_backward_workspace(const ConvNet<T>& o) {
  const int64_t columns =
      conv_net_stride(o.columns1()) + conv_net_stride(o.columns3()) + stride1(o) + stride2(o) + tile_columns<T>;
  return conv_net_block_rows(o) * columns;
}

template <class T>
void conv_net_backward_products(const ConvNetBackward<T>& b, int64_t begin, int64_t end, T* workspace) {
  const ConvNet<T>& o = b.forward;
  const int64_t size = conv_net_block_rows(o), blocks = conv_net_blocks(o);
  const int64_t s1 = conv_net_stride(o.columns1()), s3 = conv_net_stride(o.columns3());
  const Sums<T> parts(o);
  T *const windows1 = workspace, *const windows3 = windows1 + size * s1, *const dz1 = windows3 + size * s3,
           *const dz2 = dz1 + size * stride1(o), *const panel = dz2 + size * stride2(o);
  for (int64_t group = begin; group < end; ++group)
    for (int64_t block = part_start(blocks, b.groups, group); block < part_start(blocks, b.groups, group + 1);
         ++block) {
      const int64_t first = block * size, last = block_end(o, block), rows = last - first;
      const T *const h1 = o.hidden[0] + first * stride1(o), *const h2 = o.hidden[1] + first * stride2(o);
      gather_windows({o.height, o.width, o.kernel3}, first, last, o.channels[3], b.dy, windows3 - first * s3);
      hidden_gradient<T>(o.activation, rows, product_of(o, true, 2), windows3, s3, panels_of(o, true, 2), h2, dz2);
      hidden_gradient<T>(o.activation, rows, product_of(o, true, 1), dz2, stride2(o), panels_of(o, true, 1), h1, dz1);
      if (b.dtaps1)
        product<T>(rows, product_of(o, true, 0), dz1, stride1(o), panels_of(o, true, 0), b.dtaps1 + first * s1, s1,
                   nullptr, 0, Finish::add, nullptr);
      if (!b.sums) continue;
      const bool add = b.add || block > part_start(blocks, b.groups, group);
      T* sums = b.sums + group * conv_net_sums(o);
      gather_windows({o.height, o.width, o.kernel1}, first, last, o.channels[0], o.x, windows1 - first * s1);
      add_outer<T>(add, rows, o.columns1(), o.channels[1], windows1, dz1, sums, panel), sums += parts.size[0];
      add_outer<T>(add, rows, o.channels[2], o.channels[1], dz2, h1, sums, panel), sums += parts.size[1];
      add_outer<T>(add, rows, o.columns3(), o.channels[2], windows3, h2, sums, panel), sums += parts.size[2];
      add_rows<T>(add, rows, stride1(o), dz1, sums), sums += stride1(o);
      add_rows<T>(add, rows, stride2(o), dz2, sums), sums += stride2(o);
      add_rows<T>(add, rows, o.channels[3], b.dy + first * o.channels[3], sums);
    }
}

template <class T> void conv_net_backward_add_taps(const ConvNetBackward<T>& b, int64_t begin, int64_t end) {
  const ConvNet<T>& o = b.forward;
  add_taps<T>({o.height, o.width, o.kernel1}, begin, end, o.channels[0], b.dtaps1, nullptr, b.dx);
}

template <class T> int64_t conv_net_sums(const ConvNet<T>& o) {
  return Sums<T>(o).before_biases() + conv_net_bias_columns(o);
}

template <class T> void conv_net_reduce(const ConvNetBackward<T>& b, int64_t part, int64_t parts) {
  const ConvNet<T>& o = b.forward;
  const int64_t c0 = o.channels[0], c1 = o.channels[1], c2 = o.channels[2], c3 = o.channels[3];
  const int64_t taps1 = o.kernel1 * o.kernel1, taps3 = o.kernel3 * o.kernel3;
  const Sums<T> sizes(o);
  const int64_t all = conv_net_sums(o);
  T* sums = b.sums;
  int64_t from = part_start(c1, parts, part), to = part_start(c1, parts, part + 1);
  for (int64_t t = 0; t < taps1; ++t)
    for (int64_t c = 0; c < c0; ++c) {
      T* const row = sums + (t * c0 + c) * stride1(o);
      add_groups(b.groups, all, to - from, row + from);
      for (int64_t n = from; n < to; ++n) b.dweight[0][(n * c0 + c) * taps1 + t] = row[n];
    }
  sums += sizes.size[0];
  for (int64_t n = part_start(c2, parts, part); n < part_start(c2, parts, part + 1); ++n) {
    T* const row = sums + n * stride1(o);
    add_groups(b.groups, all, c1, row);
    std::copy_n(row, c1, b.dweight[1] + n * c1);
  }
  sums += sizes.size[1];
  for (int64_t n = part_start(c3, parts, part); n < part_start(c3, parts, part + 1); ++n)
    for (int64_t t = 0; t < taps3; ++t) {
      T* const row = sums + ((taps3 - 1 - t) * c3 + n) * stride2(o);
      add_groups(b.groups, all, c2, row);
      for (int64_t c = 0; c < c2; ++c) b.dweight[2][(n * c2 + c) * taps3 + t] = row[c];
    }
  sums += sizes.size[2];
  for (int i = 0; i < 3; ++i) {
    const int64_t own = o.channels[i + 1];
    for (int64_t n = part_start(own, parts, part); b.dbias[i] && n < part_start(own, parts, part + 1); ++n) {
      double total = 0;
      for (int64_t g = 0; g < b.groups; ++g) total += double(sums[g * all + n]);
      b.dbias[i][n] = T(total);
    }
    sums += conv_net_stride(own);
  }
}

#define INSTANTIATE(T) \
  template int64_t conv_net_panels<T>(const ConvNet<T>&, bool); \
  template int64_t conv_net_pack_tasks<T>(const ConvNet<T>&, bool); \
  template void conv_net_pack<T>(const ConvNet<T>&, bool, int64_t, int64_t); \
  template int64_t conv_net_workspace<T>(const ConvNet<T>&); \
  template void conv_net_products<T>(const ConvNet<T>&, int64_t, int64_t, T*); \
  template void conv_net_add_taps<T>(const ConvNet<T>&, int64_t, int64_t); \
  template int64_t conv_net_backward_workspace<T>(const ConvNet<T>&); \
  template void conv_net_backward_products<T>(const ConvNetBackward<T>&, int64_t, int64_t, T*); \
  template void conv_net_backward_add_taps<T>(const ConvNetBackward<T>&, int64_t, int64_t); \
  template int64_t conv_net_sums<T>(const ConvNet<T>&); \
  template void conv_net_reduce<T>(const ConvNetBackward<T>&, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace pyflowgen::PYFLOWGEN_ISA
