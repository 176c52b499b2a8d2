// Groups of elements, one in each lane, and their parameters as packs: for ops with a dozen or more parameters an
// element.
//
// Parameters of an element mostly lie side by side, so a group's are a matrix that is transposed on the way in and out,
// in registers: a gather would take a load for every number of them.
#pragma once

#include <utility>

#include "cpu/memory.h"
#include "cpu/part.h"
#include "strides.h"

namespace pyflowgen::PYFLOWGEN_ISA {

// Up to `lanes` consecutive elements of the transformed part, in the order (row, channel, inner).
template <int lanes> struct Group {
  int n;
  bool regular;                 // lane l is l steps from the first; else `place` has them all
  int64_t row, channel, inner;  // of the first
  int64_t row_step, channel_step, inner_step;
  int64_t place[3][lanes];

  PYFLOWGEN_INLINE int64_t first(const Strides& s) const {
    return row * s.batch + channel * s.channel + inner * s.inner;
  }
  PYFLOWGEN_INLINE int64_t step(const Strides& s) const {
    return row_step * s.batch + channel_step * s.channel + inner_step * s.inner;
  }
  PYFLOWGEN_INLINE int64_t offset(const Strides& s, int l) const {
    return place[0][l] * s.batch + place[1][l] * s.channel + place[2][l] * s.inner;
  }
};

// The groups of elements [first, last) of rows that have count × inner each, one after the other.
template <int lanes> struct Groups {
  Group<lanes> group;
  int64_t element;  // the group's first

  PYFLOWGEN_INLINE Groups(int64_t count, int64_t inner, int64_t first, int64_t last)
      : element(first), count_(count), inner_(inner), last_(last) {
    // Lanes go along the innermost dimension that is long enough to fill most of them; else from one to the next.
    const auto fills = [](int64_t length) {
      return length % lanes == 0 || length * 4 >= (length + lanes - 1) / lanes * lanes * 3;
    };
    Group<lanes>& g = group;
    g.inner_step = inner > 1 && fills(inner), g.channel_step = inner == 1 && count > 1 && fills(count);
    g.row_step = count * inner == 1;
    g.regular = g.inner_step || g.channel_step || g.row_step;
    row_ = first / (count * inner), channel_ = first / inner % count, i_ = first % inner;
    if (more()) fill();
  }
  // Without the places where there are none: they are the most of it.
  PYFLOWGEN_INLINE Groups(const Groups& o)
      : element(o.element),
        count_(o.count_),
        inner_(o.inner_),
        last_(o.last_),
        row_(o.row_),
        channel_(o.channel_),
        i_(o.i_) {
    if (!o.group.regular) {
      group = o.group;
      return;
    }
    const Group<lanes>& g = o.group;
    group.n = g.n, group.regular = true, group.row = g.row, group.channel = g.channel, group.inner = g.inner;
    group.row_step = g.row_step, group.channel_step = g.channel_step, group.inner_step = g.inner_step;
  }
  PYFLOWGEN_INLINE bool more() const { return element < last_; }
  PYFLOWGEN_INLINE void advance() {
    element += group.n;
    if (more()) fill();
  }

 private:
  int64_t count_, inner_, last_, row_, channel_, i_;  // row, channel and inner of the next

  PYFLOWGEN_INLINE void fill() {  // no division on the way: several would cost as much as a transpose
    Group<lanes>& g = group;
    const int64_t rest = last_ - element,
                  run = g.inner_step     ? inner_ - i_
                        : g.channel_step ? count_ - channel_
                                         : rest,
                  n = run < rest ? run : rest;
    g.n = n < lanes ? int(n) : lanes;
    g.row = row_, g.channel = channel_, g.inner = i_;
    if (g.regular) {
      row_ += g.row_step * g.n, channel_ += g.channel_step * g.n, i_ += g.inner_step * g.n;
      if (i_ == inner_ && g.inner_step) i_ = 0, ++channel_;
      if (channel_ == count_) channel_ = 0, ++row_;
      return;
    }
    for (int l = 0; l < g.n; ++l) {
      g.place[0][l] = row_, g.place[1][l] = channel_, g.place[2][l] = i_;
      if (++i_ == inner_) {
        i_ = 0;
        if (++channel_ == count_) channel_ = 0, ++row_;
      }
    }
    for (int l = g.n; l < lanes; ++l)  // lanes beyond the end repeat the first
      g.place[0][l] = g.row, g.place[1][l] = g.channel, g.place[2][l] = g.inner;
  }
};

// Call body(group, index of its first element) for each of them.
template <int lanes, class Body>
PYFLOWGEN_INLINE void each_group(int64_t count, int64_t inner, int64_t first, int64_t last, Body body) {
  for (Groups<lanes> groups(count, inner, first, last); groups.more(); groups.advance())
    body(groups.group, groups.element);
}

// Lanes beyond n are 0.
template <int lanes, class T>
__attribute__((noinline)) Pack<Compute<T>> gather_group(const T* p, const Strides& s, const Group<lanes>& g) {
  T buffer[lanes] = {};
  for (int l = 0; l < g.n; ++l) buffer[l] = p[g.offset(s, l)];
  return load_as(buffer);
}
template <int lanes, class T>
__attribute__((noinline)) void scatter_group(T* p, const Strides& s, const Group<lanes>& g, Pack<Compute<T>> v) {
  T buffer[lanes];
  store_as(buffer, v);
  for (int l = 0; l < g.n; ++l) p[g.offset(s, l)] = buffer[l];
}
template <int lanes, class T>
PYFLOWGEN_INLINE Pack<Compute<T>> load_group(const T* p, const Strides& s, const Group<lanes>& g) {
  if (!g.regular) return gather_group(p, s, g);
  if (g.step(s) == 0) {
    T buffer[lanes];
    for (int l = 0; l < lanes; ++l) buffer[l] = p[g.first(s)];
    return load_as(buffer);
  }
  return load_strided(p + g.first(s), g.step(s), g.n);
}
template <int lanes, class T>
PYFLOWGEN_INLINE void store_group(T* p, const Strides& s, const Group<lanes>& g, Pack<Compute<T>> v) {
  if (!g.regular) return scatter_group(p, s, g, v);
  store_strided(p + g.first(s), g.step(s), v, g.n);
}
template <class C, int lanes>
PYFLOWGEN_INLINE auto load_mask(const uint8_t* p, const Strides& s, const Group<lanes>& g) {
  if (g.regular) return load_mask<C>(Cursor<const uint8_t>{p + g.first(s), g.step(s)}, g.n);
  uint8_t bytes[lanes] = {};
  for (int l = 0; l < g.n; ++l) bytes[l] = p[g.offset(s, l)];
  return load_mask<C>(Cursor<const uint8_t>{bytes, 1}, lanes);
}

// ---- parameters -------------------------------------------------------------------------------------------------
// `columns` numbers from each of `lanes` rows, to as many packs and back.

template <int... i> PYFLOWGEN_INLINE f32v shuffle(f32v a, f32v b) { return __builtin_shuffle(a, b, i32v{i...}); }

// In every block of four lanes those numbered i, j, k, l, counted from n on in b. (The index must be a constant
// expression, or GCC moves lane by lane.)
template <int i, int j, int k, int l, int... m>
PYFLOWGEN_INLINE f32v in_blocks(f32v a, f32v b, std::integer_sequence<int, m...>) {
  return shuffle<(m / 4 * 4 + (m % 4 == 0 ? i : m % 4 == 1 ? j : m % 4 == 2 ? k : l))...>(a, b);
}
template <int i, int j, int k, int l> PYFLOWGEN_INLINE f32v in_blocks(f32v a, f32v b) {
  return in_blocks<i, j, k, l>(a, b, std::make_integer_sequence<int, lanes<float>>{});
}

// Four packs, seen as 4 × 4 blocks side by side, each block transposed.
PYFLOWGEN_INLINE void transpose_blocks(f32v* v) {
  constexpr int n = lanes<float>;
  const f32v a = in_blocks<0, n, 1, n + 1>(v[0], v[1]), b = in_blocks<2, n + 2, 3, n + 3>(v[0], v[1]),
             c = in_blocks<0, n, 1, n + 1>(v[2], v[3]), d = in_blocks<2, n + 2, 3, n + 3>(v[2], v[3]);
  v[0] = in_blocks<0, 1, n, n + 1>(a, c), v[1] = in_blocks<2, 3, n + 2, n + 3>(a, c);
  v[2] = in_blocks<0, 1, n, n + 1>(b, d), v[3] = in_blocks<2, 3, n + 2, n + 3>(b, d);
}

// Four numbers of every fourth row.
PYFLOWGEN_INLINE f32v four_rows(const float* const* rows, int64_t column) {
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + column));
  v = _mm512_maskz_insertf32x4(__mmask16(-1), v, _mm_loadu_ps(rows[4] + column), 1);
  v = _mm512_maskz_insertf32x4(__mmask16(-1), v, _mm_loadu_ps(rows[8] + column), 2);
  return (f32v)_mm512_maskz_insertf32x4(__mmask16(-1), v, _mm_loadu_ps(rows[12] + column), 3);
#elif defined(__AVX2__)
  return (f32v)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[0] + column)),
                                    _mm_loadu_ps(rows[4] + column), 1);
#else
  return load(rows[0] + column);
#endif
}

// Four columns.
PYFLOWGEN_INLINE void tile4_in(const float* const* rows, int64_t column, float* packs) {
  f32v v[4];
  for (int i = 0; i < 4; ++i) {
    v[i] = four_rows(rows + i, column);
  }
  transpose_blocks(v);
  for (int i = 0; i < 4; ++i) store(packs + i * lanes<float>, v[i]);
}
PYFLOWGEN_INLINE void tile4_out(float* const* rows, int64_t column, const float* packs) {
  f32v v[4];
  for (int i = 0; i < 4; ++i) v[i] = load(packs + i * lanes<float>);
  transpose_blocks(v);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < lanes<float> / 4; ++j) __builtin_memcpy(rows[4 * j + i] + column, (float*)&v[i] + 4 * j, 16);
}

#if defined(__AVX512F__)
// Eight columns; row(i): where row i's are.
template <class Row> PYFLOWGEN_INLINE void eight_columns(Row row, f32v (&packs)[8]) {
  f32v v[8];
  for (int i = 0; i < 8; ++i) {
    const int first = i < 4 ? i : i + 4;
    v[i] = (f32v)_mm512_maskz_insertf32x8(__mmask16(-1), _mm512_castps256_ps512(_mm256_loadu_ps(row(first))),
                                          _mm256_loadu_ps(row(first + 4)), 1);
  }
  transpose_blocks(v), transpose_blocks(v + 4);
  for (int i = 0; i < 4; ++i) {
    packs[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(v[i], v[i + 4]);
    packs[i + 4] = shuffle<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(v[i], v[i + 4]);
  }
}
PYFLOWGEN_INLINE void tile8_in(const float* const* rows, int64_t column, float* packs) {
  f32v v[8];
  eight_columns([&](int i) { return rows[i] + column; }, v);
  for (int i = 0; i < 8; ++i) store(packs + 16 * i, v[i]);
}
PYFLOWGEN_INLINE void store_halves(float* low, float* high, f32v v) {
  _mm256_storeu_ps(low, (__m256)__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
  _mm256_storeu_ps(high, _mm512_maskz_extractf32x8_ps(__mmask8(-1), (__m512)v, 1));
}
PYFLOWGEN_INLINE void tile8_out(float* const* rows, int64_t column, const float* packs) {
  f32v v[8];
  for (int i = 0; i < 8; ++i) v[i] = load(packs + 16 * i);
  transpose_blocks(v), transpose_blocks(v + 4);
  for (int i = 0; i < 4; ++i) {
    store_halves(rows[i] + column, rows[i + 4] + column,
                 shuffle<0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23>(v[i], v[i + 4]));
    store_halves(rows[i + 8] + column, rows[i + 12] + column,
                 shuffle<8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31>(v[i], v[i + 4]));
  }
}
#elif defined(__AVX2__)
PYFLOWGEN_INLINE void tile8_in(const float* const* rows, int64_t column, float* packs) {
  f32v v[8];
  for (int i = 0; i < 8; ++i) v[i] = load(rows[i] + column);
  transpose_blocks(v), transpose_blocks(v + 4);
  for (int i = 0; i < 4; ++i) {
    store(packs + 8 * i, shuffle<0, 1, 2, 3, 8, 9, 10, 11>(v[i], v[i + 4]));
    store(packs + 8 * (i + 4), shuffle<4, 5, 6, 7, 12, 13, 14, 15>(v[i], v[i + 4]));
  }
}
PYFLOWGEN_INLINE void tile8_out(float* const* rows, int64_t column, const float* packs) {
  f32v v[8];
  for (int i = 0; i < 8; ++i) v[i] = load(packs + 8 * i);
  transpose_blocks(v), transpose_blocks(v + 4);
  for (int i = 0; i < 4; ++i) {
    store(rows[i] + column, shuffle<0, 1, 2, 3, 8, 9, 10, 11>(v[i], v[i + 4]));
    store(rows[i + 4] + column, shuffle<4, 5, 6, 7, 12, 13, 14, 15>(v[i], v[i + 4]));
  }
}
#endif

// Tiles over all columns; the last overlaps the one before, so nothing beyond the columns is read or written.
template <class Tile8, class Tile4>
PYFLOWGEN_INLINE void each_tile(int64_t columns, [[maybe_unused]] Tile8 tile8, Tile4 tile4) {
#if defined(__AVX2__)
  if (columns >= 8) {
    for (int64_t c = 0; c + 8 <= columns; c += 8) tile8(c);
    if (columns % 8) tile8(columns - 8);
    return;
  }
#endif
  for (int64_t c = 0; c + 4 <= columns; c += 4) tile4(c);
  if (columns % 4) tile4(columns - 4);
}

// The parameters of a group to come, where they lie side by side and so do this one's: neighbours a few columns apart
// are no pattern that a processor would follow by itself. Null elsewhere.
template <int lanes, class T>
PYFLOWGEN_INLINE const T* rows_ahead(const T* p, const Strides& s, const Group<lanes>& g, int64_t columns) {
  return g.regular && g.step(s) == columns ? p + g.first(s) + 3 * lanes * columns : nullptr;
}
// What takes the place of columns [column, column + 8). All at once would be more than a core waits for at a time.
template <class T> PYFLOWGEN_INLINE void prefetch_ahead(const T* ahead, int64_t column) {
  constexpr int64_t bytes = width<T> * int64_t(sizeof(T));
  if (!ahead) return;
#pragma GCC unroll 8
  for (int64_t i = 0; i < 8 * bytes; i += 64) __builtin_prefetch((const char*)ahead + column * bytes + i);
}

// packs[column][lane] = rows[lane][column stride]. ahead: rows_ahead(), or null.
template <class T>
void rows_to_packs(const T* const* rows, int64_t stride, int64_t columns, Compute<T>* packs, const T* ahead = nullptr) {
  constexpr int n = width<T>;
  if constexpr (std::is_same_v<T, float>) {
    if (stride == 1 && columns >= 4) {
      const auto tile8 = [&]([[maybe_unused]] int64_t c) {
#if defined(__AVX2__)
        prefetch_ahead(ahead, c);
        tile8_in(rows, c, packs + c * n);
#endif
      };
      return each_tile(columns, tile8, [&](int64_t c) { tile4_in(rows, c, packs + c * n); });
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    T buffer[n];
    for (int l = 0; l < n; ++l) buffer[l] = rows[l][c * stride];
    store(packs + c * n, load_as(buffer));
  }
}
// The first `used` lanes; the rows of the others are written to as well when the stride is 1.
template <class T>
void packs_to_rows(const Compute<T>* packs, T* const* rows, int64_t stride, int64_t columns, int used) {
  constexpr int n = width<T>;
  if constexpr (std::is_same_v<T, float>) {
    if (stride == 1 && columns >= 4) {
      const auto tile8 = [&]([[maybe_unused]] int64_t c) {
#if defined(__AVX2__)
        tile8_out(rows, c, packs + c * n);
#endif
      };
      return each_tile(columns, tile8, [&](int64_t c) { tile4_out(rows, c, packs + c * n); });
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    T buffer[n];
    store_as(buffer, load(packs + c * n));
    for (int l = 0; l < used; ++l) rows[l][c * stride] = buffer[l];
  }
}

// Where the parameters of a group's elements begin.
template <int lanes, class T> PYFLOWGEN_INLINE void rows_of(T* p, const Strides& s, const Group<lanes>& g, T** rows) {
  if (g.regular) {
    T* const first = p + g.first(s);
    const int64_t step = g.step(s);
    for (int l = 0; l < lanes; ++l) rows[l] = first + (l < g.n ? l : 0) * step;
  } else {
    for (int l = 0; l < lanes; ++l) rows[l] = p + g.offset(s, l);
  }
}

// What is larger than a share of the last cache goes past it: written in place, every line would be read first, and
// would push out what the next op reads. `n` numbers, a multiple of a pack, to an address aligned to one.
constexpr int64_t past_cache = int64_t(1) << 24;
PYFLOWGEN_INLINE void stream(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes<float>) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to + i, (__m512)load(from + i));
#elif defined(__AVX2__)
    _mm256_stream_ps(to + i, (__m256)load(from + i));
#elif defined(__SSE2__)
    _mm_stream_ps(to + i, (__m128)load(from + i));
#else
    store(to + i, load(from + i));
#endif
  }
}
// After the last stream(), before another thread reads.
PYFLOWGEN_INLINE void stream_done() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace pyflowgen::PYFLOWGEN_ISA
