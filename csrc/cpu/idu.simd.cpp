// idu on the CPU: a step's products with the gates as their epilogue.
#include "idu.h"

#include "cpu/row_of_panels.h"
#include "formula/idu.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

// Inputs summed by themselves: rounding errors of a long sum grow with the number of its terms.
inline constexpr int64_t block = 128;

// epilogue(row, unit, v, count): v[p] holds the first count of a[row][hidden] times the units from `unit` of matrix p.
// skip: the products are 0.
template <int parts, class T, class F>
PYFLOWGEN_INLINE void products(int64_t hidden, const T* a, const T* const (&panels)[parts], int64_t begin, int64_t end,
                               int64_t first, int64_t last, bool skip, const F& epilogue) {
  constexpr int width = tile_columns<T>, side = lanes<T>, group = row_panels / parts;
  const auto each = [&](int64_t row, int64_t panel, const auto& value) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t unit = panel * width + half * side;
      const int count = int(std::min<int64_t>(side, hidden - unit));
      if (count <= 0) return;
      Pack<T> v[parts];
#pragma GCC unroll 2
      for (int i = 0; i < parts; ++i) v[i] = value(i, half);
      epilogue(row, unit, v, count);
    }
  };
  if (skip) {
    for (int64_t row = first; row < last; ++row)
      for (int64_t p = begin; p < end; ++p) each(row, p, [](int, int) { return Pack<T>{}; });
    return;
  }
  if (last - first == 1) {
    const auto together = [&]<int count>(int64_t p) {  // `count` panels of every part
      Pack<T> total[count * parts][2];
      for (int64_t k = 0; k < hidden; k += block) {
        const T* lines[count * parts];
#pragma GCC unroll 4
        for (int i = 0; i < count * parts; ++i) lines[i] = panels[i % parts] + ((p + i / parts) * hidden + k) * width;
        Pack<T> sums[count * parts][2];
        row_of_panels<count * parts>(std::min(block, hidden - k), a + first * hidden + k, lines, sums);
#pragma GCC unroll 4
        for (int i = 0; i < count * parts; ++i)
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) total[i][half] = k ? total[i][half] + sums[i][half] : sums[i][half];
      }
#pragma GCC unroll 4
      for (int n = 0; n < count; ++n)
        each(first, p + n, [&](int part, int half) { return total[n * parts + part][half]; });
    };
    int64_t p = begin;
    for (; p + group <= end; p += group) together.template operator()<group>(p);
    for (; p < end; ++p) together.template operator()<1>(p);
    return;
  }
  alignas(64) T tile[parts][tile_rows<T>][width];
  const int64_t tiles = ceil_div(last - first, tile_rows<T>);
  for (int64_t p = begin; p < end; ++p) {
    const int columns = int(std::min<int64_t>(width, hidden - p * width));
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = first + part_start(last - first, tiles, i),
                    to = first + part_start(last - first, tiles, i + 1);
      for (int part = 0; part < parts; ++part)
        for (int64_t k = 0; k < hidden; k += block)
          gemm_tile<T>(int(to - row), columns, std::min(block, hidden - k), a + row * hidden + k, hidden, 1,
                       panels[part] + (p * hidden + k) * width, k ? tile[part][0] : nullptr, width, tile[part][0],
                       width);
      for (int64_t r = row; r < to; ++r)
        each(r, p, [&](int part, int half) { return load<T>(tile[part][r - row] + half * side); });
    }
  }
}

// The same on products that were made elsewhere: sums[part][all_rows][hidden].
template <int parts, class T, class F> PYFLOWGEN_INLINE void epilogues(int64_t hidden, const T* sums, int64_t all_rows,
                                                                       int64_t begin, int64_t end, int64_t first,
                                                                       int64_t last, const F& epilogue) {
  constexpr int64_t side = lanes<T>;
  const int64_t to = std::min(end * tile_columns<T>, hidden);
  for (int64_t row = first; row < last; ++row)
    for (int64_t unit = begin * tile_columns<T>; unit < to; unit += side) {
      const int count = int(std::min(side, to - unit));
      Pack<T> v[parts];
      for (int i = 0; i < parts; ++i) v[i] = load_first<T>(sums + (i * all_rows + row) * hidden + unit, count);
      epilogue(row, unit, v, count);
    }
}

}  // namespace

template <class T> void idu_forward(const IduForward<T>& o, int64_t phase, int64_t t, int64_t start, int64_t begin,
                                    int64_t end, int64_t first, int64_t last) {
  using namespace formula;
  const IduShape& s = o.shape;
  const int64_t hidden = s.hidden, state = s.rows() * hidden;
  const T* h = o.states + (o.gates ? t : t % 2) * state;
  T* next = o.states + (o.gates ? t + 1 : (t + 1) % 2) * state;
  T* inner = o.inner + (o.gates ? t * state : 0);
  const auto gate = [&](int64_t row, int which, int64_t unit) {
    return o.gates + ((t * s.rows() + row) * 3 + which) * hidden + unit;
  };
  const auto reset = [&](int64_t row, int64_t unit, Pack<T> v, int count) {
    const Pack<T> r = idu_gate(s.hard, v + load_first<T>(o.current + row * 2 * hidden + unit, count));
    if (o.gates) store_first<T>(gate(row, 0, unit), r, count);
    return idu_gate_value(s.hard, r);
  };
  const auto update = [&](int64_t row, int64_t unit, Pack<T> v, int count) {
    if (t < s.first(row)) return store_first<T>(next + row * hidden + unit, Pack<T>{}, count);
    const T* given = o.given + s.chunk(row, t) * 2 * hidden + unit;
    const Pack<T> z = load_first<T>(given, count) + load_first<T>(o.current + (row * 2 + 1) * hidden + unit, count);
    Pack<T> n = load_first<T>(given + hidden, count);
    if (o.b_x) n += load_first<T>(o.b_x + unit, count);
    const auto u = idu(s.hard, s.keeps, z, n + v, load_first<T>(h + row * hidden + unit, count));
    if (o.gates) {
      store_first<T>(gate(row, 1, unit), u.z, count);
      store_first<T>(gate(row, 2, unit), u.n, count);
    }
    store_first<T>(next + row * hidden + unit, u.h, count);
  };
  const auto with_bias = [&](Pack<T> v, int64_t unit, int count) {
    return o.b_h ? v + load_first<T>(o.b_h + unit, count) : v;
  };
  const auto multiply = [&]<int parts>(const T* a, const T* const(&panels)[parts], const auto& epilogue) {
    if (o.sums && t != start) return epilogues<parts, T>(hidden, o.sums, s.rows(), begin, end, first, last, epilogue);
    products<parts, T>(hidden, a, panels, begin, end, first, last, t == start, epilogue);
  };
  if (s.after) {
    multiply.template operator()<2>(h, {o.w_r, o.w_h}, [&](int64_t row, int64_t unit, const Pack<T>(&v)[2], int count) {
      const Pack<T> r = reset(row, unit, v[0], count), p = with_bias(v[1], unit, count);
      if (o.gates) store_first<T>(inner + row * hidden + unit, p, count);
      update(row, unit, r * p, count);
    });
  } else if (phase == 0) {
    multiply.template operator()<1>(h, {o.w_r}, [&](int64_t row, int64_t unit, const Pack<T>(&v)[1], int count) {
      const Pack<T> r = reset(row, unit, v[0], count);
      store_first<T>(inner + row * hidden + unit, r * load_first<T>(h + row * hidden + unit, count), count);
    });
  } else {
    multiply.template operator()<1>(inner, {o.w_h}, [&](int64_t row, int64_t unit, const Pack<T>(&v)[1], int count) {
      update(row, unit, with_bias(v[0], unit, count), count);
    });
  }
}

template <class T> void idu_backward(const IduBackward<T>& o, int64_t phase, int64_t t, int64_t start, int64_t begin,
                                     int64_t end, int64_t first, int64_t last) {
  using namespace formula;
  const IduShape& s = o.shape;
  const int64_t hidden = s.hidden, state = s.rows() * hidden;
  const auto get = [&](const T* of, int64_t row, int64_t unit, int count) {
    return load_first<T>(of + t * state + row * hidden + unit, count);
  };
  const auto put = [&](T* of, int64_t row, int64_t unit, Pack<T> v, int count) {
    store_first<T>(of + t * state + row * hidden + unit, v, count);
  };
  const auto gate = [&](int64_t row, int which, int64_t unit, int count) {
    return load_first<T>(o.gates + ((t * s.rows() + row) * 3 + which) * hidden + unit, count);
  };
  if (phase == 0)
    return products<1, T>(hidden, nullptr, {nullptr}, begin, end, first, last, true,
                          [&](int64_t row, int64_t unit, const Pack<T>(&)[1], int count) {
                            const bool there = t >= s.first(row);
                            IduGradient<Pack<T>> d{};
                            if (there) {
                              T* dh = o.dh + row * hidden + unit;
                              d = formula::idu_backward(s.hard, s.keeps, gate(row, 1, unit, count),
                                                        gate(row, 2, unit, count), get(o.states, row, unit, count),
                                                        load_first<T>(dh, count));
                              store_first<T>(dh, d.before, count);
                            }
                            put(o.dz, row, unit, d.dz, count);
                            put(o.dn, row, unit, d.dn, count);
                            if (!s.after) return;
                            Pack<T> dr{}, dinner{};
                            if (there) {
                              const Pack<T> r = gate(row, 0, unit, count);
                              dr = d.dn * get(o.inner, row, unit, count) * idu_gate_slope(s.hard, r);
                              dinner = d.dn * idu_gate_value(s.hard, r);
                            }
                            put(o.dr, row, unit, dr, count);
                            put(o.dinner, row, unit, dinner, count);
                          });
  const auto add = [&](int64_t row, int64_t unit, Pack<T> v, int count) {
    T* dh = o.dh + row * hidden + unit;
    store_first<T>(dh, load_first<T>(dh, count) + v, count);
  };
  if (phase == 1)
    return products<1, T>(hidden, o.dinner + t * state, {o.w_h}, begin, end, first, last, t == start,
                          [&](int64_t row, int64_t unit, const Pack<T>(&v)[1], int count) {
                            if (s.after) return add(row, unit, v[0], count);
                            if (t < s.first(row)) return put(o.dr, row, unit, Pack<T>{}, count);
                            const Pack<T> r = gate(row, 0, unit, count);
                            put(o.dr, row, unit, v[0] * get(o.states, row, unit, count) * idu_gate_slope(s.hard, r),
                                count);
                            add(row, unit, v[0] * idu_gate_value(s.hard, r), count);
                          });
  if (t > start)
    products<1, T>(hidden, o.dr + t * state, {o.w_r}, begin, end, first, last, false,
                   [&](int64_t row, int64_t unit, const Pack<T>(&v)[1], int count) { add(row, unit, v[0], count); });
}

template <class T> void idu_pack_backward(int64_t hidden, const T* weight, T* panels, int64_t begin, int64_t end) {
  constexpr int64_t width = tile_columns<T>;
  for (int64_t p = begin; p < end; ++p)
    gemm_pack<T>(int(std::min(width, hidden - p * width)), hidden, weight + p * width, hidden, 1,
                 panels + p * width * hidden);
}

template <class T> void idu_collect(const IduCollect<T>& o, int64_t begin, int64_t end) {
  const IduShape& s = o.shape;
  const int64_t hidden = s.hidden, chunks = s.chunks, state = s.rows() * hidden;
  const auto add = [&](T* to, const T* from) {
    for (int64_t i = 0; i < hidden; ++i) to[i] += from[i];
  };
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t c = 0; c < chunks; ++c) {
      T* to = c < o.cached ? o.dcached + (b * o.cached + c) * 2 * hidden
                           : o.dgiven + (b * (chunks - o.cached) + c - o.cached) * 2 * hidden;
      if (o.dgiven_more) std::copy_n(o.dgiven_more + (b * chunks + c) * 2 * hidden, 2 * hidden, to);
      else std::fill_n(to, 2 * hidden, T(0));
      for (int64_t w = std::max<int64_t>(0, c - s.window + 1); w < std::min(s.windows, c + 1); ++w) {
        const int64_t at = (c - w) * state + (b * s.windows + w) * hidden;
        add(to, o.dz + at);
        add(to + hidden, o.dn + at);
      }
    }
    for (int64_t row = b * s.windows; row < (b + 1) * s.windows; ++row) {
      T* to = o.dcurrent + row * 2 * hidden;
      std::fill_n(to, 2 * hidden, T(0));
      for (int64_t t = 0; t < s.window; ++t) {
        add(to, o.dr + t * state + row * hidden);
        add(to + hidden, o.dz + t * state + row * hidden);
      }
    }
  }
}

#define PYFLOWGEN_IDU(T) \
  template void idu_forward<T>(const IduForward<T>&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t); \
  template void idu_backward<T>(const IduBackward<T>&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t); \
  template void idu_pack_backward<T>(int64_t, const T*, T*, int64_t, int64_t); \
  template void idu_collect<T>(const IduCollect<T>&, int64_t, int64_t);
PYFLOWGEN_IDU(float)
PYFLOWGEN_IDU(double)

}  // namespace pyflowgen::PYFLOWGEN_ISA
