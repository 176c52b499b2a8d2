// The loops of recurrence.h, for a cell whose Pointwise is given. Included only from lstm.simd.cpp, gru.simd.cpp, and
// trn.simd.cpp, which makes its own step of the innermost ones.
//
// A tile is a block of units times a few rows. Its four accumulators a row are the arguments of the gates; a GRU's
// fourth is h's part of the new gate. They meet the gates' functions in registers: between the product and the next
// hidden state nothing goes through memory but what is kept for the backward pass.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/gemm.h"
#include "cpu/memory.h"
#include "cpu/transpose.h"
#include "recurrence.h"

namespace pyflowgen::PYFLOWGEN_ISA {

// Pointwise<Cell>::forward(acc, carry): acc holds the arguments and gets the gates (a GRU's fourth stays), carry is
// the cell (for a GRU the hidden state) before the step and, if there is a cell, gets the one after; returns h.
// Pointwise<Cell>::extra(acc, carry): what is kept beside the gates.
// Pointwise<Cell>::backward(gates, extra, carry, dh, dc, dgates, dlast): the gradients of the arguments, dlast that of
// h's part of the last one; dc and, for a GRU, dh get what goes to the step before.
template <class Cell> struct Pointwise;

namespace {

// Rows of a tile: 4 accumulators each, 4 registers of weights, one or two of inputs.
inline constexpr int step_rows = vector_bytes == 64 ? 6 : 2;

// The accumulator of gate g, in the part that belongs to h or to x.
template <class Cell> constexpr int slot(int g, bool h) {
  return Cell::split_gate && h && g == Cell::gates - 1 ? 3 : g;
}

// Inputs that storage W takes together.
template <class W> inline constexpr int together = std::is_same_v<W, int8_t> ? 4 : std::is_same_v<W, bf16> ? 2 : 1;
template <class W> PYFLOWGEN_INLINE int64_t padded(int64_t depth) { return ceil_div(depth, together<W>) * together<W>; }

// Where the pieces of one block are, in bytes from its beginning.
template <class Cell, class T, class W> struct Block {
  int64_t h, start, scale, size;
  PYFLOWGEN_INLINE Block(int64_t in, int64_t hidden) {
    constexpr int64_t input = Cell::gates * lanes<T> * int64_t(sizeof(W));
    h = padded<W>(in) * input;
    start = h + padded<W>(hidden) * input;
    scale = start + 4 * vector_bytes;
    size = scale + (std::is_same_v<W, int8_t> ? 4 * Cell::gates * vector_bytes : 0);
  }
};

// sum += inputs a[row][depth] times a part of a block, 64 inputs summed by themselves: rounding errors of a long sum
// grow with the number of its terms.
template <class Cell, bool h_part, int rows, class T>
PYFLOWGEN_INLINE void accumulate(Pack<T> (&sum)[rows][4], int64_t depth, const T* a, int64_t a_row, const T* panel) {
  constexpr int gates = Cell::gates, side = lanes<T>;
  for (int64_t k = 0; k < depth;) {
    Pack<T> part[rows][gates] = {};
    for (const int64_t end = std::min<int64_t>(depth, k + 64); k < end; ++k, panel += gates * side) {
      Pack<T> w[gates];
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) w[g] = load<T>(panel + g * side);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const Pack<T> x = broadcast<T>(a[r * a_row + k]);
#pragma GCC unroll 4
        for (int g = 0; g < gates; ++g) part[r][g] = fma(x, w[g], part[r][g]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) sum[r][slot<Cell>(g, h_part)] += part[r][g];
  }
}

// bf16 weights in pairs: a shift widens the first of them and a mask the second.
template <class Cell, bool h_part, int rows> PYFLOWGEN_INLINE void accumulate(f32v (&sum)[rows][4], int64_t depth,
                                                                              const float* a, int64_t a_row,
                                                                              const bf16* panel) {
  constexpr int gates = Cell::gates, side = lanes<float>;
  const auto add = [&](int64_t k, bool pair) {
    u32v w[gates];
#pragma GCC unroll 4
    for (int g = 0; g < gates; ++g) __builtin_memcpy(&w[g], panel + g * 2 * side, sizeof w[g]);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const f32v first = broadcast<float>(a[r * a_row + k]);
      const f32v second = broadcast<float>(pair ? a[r * a_row + k + 1] : 0.0f);
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) {
        f32v& s = sum[r][slot<Cell>(g, h_part)];
        s = fma(first, (f32v)(w[g] << 16), s);
        s = fma(second, (f32v)(w[g] & 0xffff0000u), s);
      }
    }
    panel += gates * 2 * side;
  };
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2) add(k, true);
  if (k < depth) add(k, false);
}

// The same of inputs that `halves` has split, where the processor multiplies pairs of bf16 (AVX512_BF16): no widening.
// The sums of the upper and the lower halves hide each other's latency.
PYFLOWGEN_INLINE bool multiplies_pairs() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}
inline constexpr int pair_rows = 3;  // two accumulators for each gate
#if defined(__AVX512F__)
template <class Cell, bool h_part, int rows>
[[gnu::target("avx512bf16")]] void accumulate_pairs(f32v (&sum)[rows][4], int64_t pairs, const uint64_t* q,
                                                    int64_t q_row, const bf16* panel) {
  constexpr int gates = Cell::gates;
  __m512 upper[rows][gates], lower[rows][gates];
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < gates; ++g) upper[r][g] = (__m512)sum[r][slot<Cell>(g, h_part)], lower[r][g] = __m512{};
  for (int64_t k = 0; k < pairs; ++k, panel += gates * 32) {
    __m512bh w[gates];
#pragma GCC unroll 4
    for (int g = 0; g < gates; ++g) w[g] = (__m512bh)_mm512_loadu_si512(panel + g * 32);
#pragma GCC unroll 3
    for (int r = 0; r < rows; ++r) {
      float both[2];  // floats, for they are broadcast from memory
      __builtin_memcpy(both, q + r * q_row + k, sizeof both);
      const __m512bh first = (__m512bh)_mm512_set1_ps(both[0]), second = (__m512bh)_mm512_set1_ps(both[1]);
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) {
        upper[r][g] = _mm512_dpbf16_ps(upper[r][g], first, w[g]);
        lower[r][g] = _mm512_dpbf16_ps(lower[r][g], second, w[g]);
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < gates; ++g) sum[r][slot<Cell>(g, h_part)] = (f32v)(upper[r][g] + lower[r][g]);
}
#endif

// Row a[depth] for accumulate_pairs: of two inputs the nearest bf16, then that of what is left of them; together 17
// bits of the mantissa. Writes whole vectors.
PYFLOWGEN_INLINE void halves(int64_t depth, const float* a, uint64_t* q) {
  constexpr int side = lanes<float>;
  typedef uint64_t u64v __attribute__((vector_size(vector_bytes)));
  const auto pairs = [](u32v bits) { return ((u64v)bits >> 16 & 0xffff) | ((u64v)bits >> 32 & 0xffff0000); };
  for (int64_t k = 0; k < depth; k += side) {
    const f32v x = load_first<float>(a + k, int(std::min<int64_t>(side, depth - k)));
    const u32v whole = (u32v)x & 0xffff0000, nearest = ((u32v)x + 0x8000) & 0xffff0000;
    const u32v upper = (nearest & 0x7f800000) == 0x7f800000 ? whole : nearest;
    const f32v left = ((u32v)x & 0x7fffffff) == 0x7f800000 ? f32v{} : x - (f32v)upper;  // inf is whole
    const u32v bits = (u32v)left, rounded = bits + 0x7fff + (bits >> 16 & 1), lower = left == left ? rounded : bits;
    const u64v both = pairs(upper) | pairs(lower) << 32;
    __builtin_memcpy(q + k / 2, &both, sizeof both);
  }
}

// ---- int8 --------------------------------------------------------------------------------------------------------
typedef int16_t i16v __attribute__((vector_size(vector_bytes)));
typedef int8_t i8v __attribute__((vector_size(vector_bytes)));

// Row a[depth] as bytes 128 + round(127 a / max|a|), rest of the last group 128; returns the scale. inf and NaN make
// the scale so, and with it every gate.
PYFLOWGEN_INLINE float quantize(int64_t depth, const float* a, uint8_t* q) {
  constexpr int side = lanes<float>;
  i32v most{};
  for (int64_t k = 0; k < depth; k += side) {  // as integers |a| compare alike, and NaN is above all
    const i32v bits = (i32v)load_first<float>(a + k, int(std::min<int64_t>(side, depth - k))) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t top = 0;
  for (int i = 0; i < side; ++i) top = std::max(top, most[i]);
  const float largest = __builtin_bit_cast(float, top);
  const float by = largest > 1e-30f && top < 0x7f800000 ? 127 / largest : 0;
  for (int64_t k = 0; k < padded<int8_t>(depth); k += side) {
    const int count = int(std::clamp<int64_t>(depth - k, 0, side));
    // Adding 1.5 * 2^23 rounds to the nearest integer, which then is in the low bits of the sum.
    const f32v scaled = load_first<float>(a + k, count) * by;
    const i32v rounded = (i32v)((by == 0 ? f32v{} : scaled) + (12582912.0f + 128));
    typedef uint8_t u8q __attribute__((vector_size(vector_bytes / 4)));
    const u8q bytes = __builtin_convertvector(rounded & 255, u8q);
    __builtin_memcpy(q + k, &bytes, sizeof bytes);
  }
  return largest / 127;
}

// sum += bytes q[row][depth] times int8 weights, exact. depth is padded.
template <int gates, int rows> PYFLOWGEN_INLINE void accumulate_bytes(i32v (&sum)[rows][gates], int64_t depth,
                                                                      const uint8_t* q, int64_t q_row,
                                                                      const int8_t* panel) {
  for (int64_t k = 0; k < depth; k += 4, panel += gates * vector_bytes) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      __builtin_memcpy(&four, q + r * q_row + k, 4);
      const i32v x = i32v{} + four;
      const i32v even = x & 0x00ff00ff, odd = (i32v)((u32v)x >> 8) & 0x00ff00ff;  // bytes 0, 2 and 1, 3 as 16 bits
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) {
        i32v w;
        __builtin_memcpy(&w, panel + g * vector_bytes, sizeof w);
        const i32v w_odd = (i32v)((i16v)w >> 8), w_even = (i32v)((i16v)(w << 8) >> 8);
#if defined(__AVX512BW__)
        sum[r][g] += (i32v)_mm512_madd_epi16((__m512i)even, (__m512i)w_even) +
                     (i32v)_mm512_madd_epi16((__m512i)odd, (__m512i)w_odd);
#elif defined(__AVX2__)
        sum[r][g] += (i32v)_mm256_madd_epi16((__m256i)even, (__m256i)w_even) +
                     (i32v)_mm256_madd_epi16((__m256i)odd, (__m256i)w_odd);
#else
        sum[r][g] += (even & 0xffff) * ((w_even << 16) >> 16) + ((i32v)((u32v)even >> 16)) * (w_even >> 16) +
                     (odd & 0xffff) * ((w_odd << 16) >> 16) + ((i32v)((u32v)odd >> 16)) * (w_odd >> 16);
#endif
      }
    }
  }
}
#if defined(__AVX512F__)
// The same in one instruction where the processor has it (VNNI), which this copy cannot take for granted.
template <int gates, int rows>
[[gnu::target("avx512vnni")]] void accumulate_bytes_vnni(i32v (&sum)[rows][gates], int64_t depth, const uint8_t* q,
                                                         int64_t q_row, const int8_t* panel) {
  __m512i s[rows][gates];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < gates; ++g) s[r][g] = (__m512i)sum[r][g];
  for (int64_t k = 0; k < depth; k += 4, panel += gates * 64) {
    __m512i w[gates];
#pragma GCC unroll 4
    for (int g = 0; g < gates; ++g) w[g] = _mm512_loadu_si512(panel + g * 64);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      __builtin_memcpy(&four, q + r * q_row + k, 4);
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) s[r][g] = _mm512_dpbusd_epi32(s[r][g], x, w[g]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < gates; ++g) sum[r][g] = (i32v)s[r][g];
}
#endif

// sum += x's or h's part of the arguments from bytes q and their scales; w_scales and offsets are the block's.
template <class Cell, bool h_part, int rows>
PYFLOWGEN_INLINE void accumulate_int8(f32v (&sum)[rows][4], int64_t depth, const uint8_t* q, int64_t q_row,
                                      const float* scale, const int8_t* panel, const float* w_scales,
                                      const int32_t* offsets) {
  constexpr int gates = Cell::gates;
  i32v total[rows][gates] = {};
#if defined(__AVX512F__)
  if (__builtin_cpu_supports("avx512vnni"))
    accumulate_bytes_vnni<gates, rows>(total, padded<int8_t>(depth), q, q_row, panel);
  else
#endif
    accumulate_bytes<gates, rows>(total, padded<int8_t>(depth), q, q_row, panel);
#pragma GCC unroll 4
  for (int g = 0; g < gates; ++g) {
    const f32v w_scale = load(w_scales + g * lanes<float>);
    const i32v offset = load(offsets + g * lanes<float>);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      f32v& s = sum[r][slot<Cell>(g, h_part)];
      s = fma(__builtin_convertvector(total[r][g] - offset, f32v) * w_scale, broadcast<float>(scale[r]), s);
    }
  }
}

// ---- one step of a stream ----------------------------------------------------------------------------------------
// Inputs as storage W takes them, where it does not take floats: `quantize` for int8, `halves` for bf16.
template <class W> PYFLOWGEN_INLINE bool changes_inputs() {
  return std::is_same_v<W, int8_t> || (std::is_same_v<W, bf16> && multiplies_pairs());
}
template <class W> PYFLOWGEN_INLINE int64_t input_bytes(int64_t depth) {
  return changes_inputs<W>() ? padded<W>(depth) * (std::is_same_v<W, bf16> ? 4 : 1) : 0;
}
// Of one row, followed by room for a vector; returns int8's scale.
template <class W> PYFLOWGEN_INLINE float change_input(int64_t depth, const float* a, uint8_t* to) {
  if constexpr (std::is_same_v<W, int8_t>) return quantize(depth, a, to);
  halves(depth, a, reinterpret_cast<uint64_t*>(to));
  return 0;
}
// Rows that share a pass over the weights.
template <class W> PYFLOWGEN_INLINE int rows_at_once() {
  return std::is_same_v<W, bf16> && multiplies_pairs() ? pair_rows : step_rows;
}

// sum += x's or h's part of the arguments of so many rows: floats a, or what change_input made of them. int8 weights
// have scales and offsets, the inputs a scale for each row.
template <class Cell, bool h_part, int rows, class T, class W>
PYFLOWGEN_INLINE void accumulate_part(Pack<T> (&sum)[rows][4], int64_t depth, const T* a, const uint8_t* q,
                                      int64_t q_row, const float* scale, const W* panel, const float* w_scales,
                                      const int32_t* offsets) {
  if constexpr (std::is_same_v<W, int8_t>) {
    accumulate_int8<Cell, h_part, rows>(sum, depth, q, q_row, scale, panel, w_scales, offsets);
  } else {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<W, bf16> && rows <= pair_rows)
      if (multiplies_pairs())
        return accumulate_pairs<Cell, h_part, rows>(sum, padded<W>(depth) / 2, reinterpret_cast<const uint64_t*>(q),
                                                    q_row / 8, panel);
#endif
    accumulate<Cell, h_part, rows>(sum, depth, a, depth, panel);
  }
}

// The inputs of a step in scratch: of each row those made of x and of h, then all rows' scales of x, then those of h.
template <class W> struct StepInputs {
  int64_t x, row, scales;
  PYFLOWGEN_INLINE StepInputs(int64_t batch, int64_t in, int64_t hidden)
      : x(input_bytes<W>(in)), row(x + input_bytes<W>(hidden)), scales(batch * row + vector_bytes) {}
};

template <class Cell, class T, class W, int rows>
[[gnu::noinline]] void step_tile(const RecurrentStep<T>& o, int64_t block, int64_t row, const void* scratch) {
  const Block<Cell, T, W> place(o.in, o.hidden);
  const char* base = static_cast<const char*>(o.packed) + block * place.size;
  const T* start = reinterpret_cast<const T*>(base + place.start);
  Pack<T> sum[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) sum[r][g] = load<T>(start + g * lanes<T>);
  const W *x_panel = reinterpret_cast<const W*>(base), *h_panel = reinterpret_cast<const W*>(base + place.h);
  constexpr int each = Cell::gates * lanes<T>;
  const StepInputs<W> at(o.batch, o.in, o.hidden);
  const uint8_t* q = static_cast<const uint8_t*>(scratch) + row * at.row;
  const float* scale = reinterpret_cast<const float*>(static_cast<const uint8_t*>(scratch) + at.scales) + row;
  const float* w_scales = reinterpret_cast<const float*>(base + place.scale);
  const int32_t* offsets = reinterpret_cast<const int32_t*>(w_scales) + 2 * each;
  accumulate_part<Cell, false, rows, T, W>(sum, o.in, o.x + row * o.in, q, at.row, scale, x_panel, w_scales, offsets);
  accumulate_part<Cell, true, rows, T, W>(sum, o.hidden, o.h + row * o.hidden, q + at.x, at.row, scale + o.batch,
                                          h_panel, w_scales + each, offsets + each);
  const int64_t unit = block * lanes<T>;
  const int count = int(std::min<int64_t>(lanes<T>, o.hidden - unit));
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * o.hidden + unit;
    Pack<T> carry = load_first<T>((Cell::has_cell ? o.c : o.h) + at, count);
    store_first<T>(o.h_next + at, Pointwise<Cell>::forward(sum[r], carry), count);
    if (Cell::has_cell) store_first<T>(o.c_next + at, carry, count);
  }
}

template <class F, int... n> PYFLOWGEN_INLINE void with_rows(int rows, std::integer_sequence<int, n...>, const F& f) {
  ((rows == n + 1 ? f(std::integral_constant<int, n + 1>()) : void()), ...);
}
template <class F> PYFLOWGEN_INLINE void with_rows(int rows, const F& f) {
  with_rows(rows, std::make_integer_sequence<int, step_rows>(), f);
}

// Rows [row, row + rows) of step t of a sequence, whose hidden states before it are `before`.
template <class Cell, class T, int rows> [[gnu::noinline]] void forward_rows(const RecurrentForward<T>& o, int64_t t,
                                                                             int64_t begin, int64_t end, int64_t row,
                                                                             const T* before) {
  constexpr int gates = Cell::gates;
  const int64_t hidden = o.shape.hidden, first = o.shape.offsets[t] + row;
  const Block<Cell, T, T> place(o.in, hidden);
  for (int64_t b = begin; b < end; ++b) {
    const char* base = static_cast<const char*>(o.packed) + b * place.size;
    const int64_t unit = b * lanes<T>;
    const int count = int(std::min<int64_t>(lanes<T>, hidden - unit));
    T* at = o.gates + first * gates * hidden + unit;
    Pack<T> sum[rows][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) sum[r][g] = load_first<T>(at + (r * gates + g) * hidden, count);
      if (Cell::split_gate) sum[r][3] = load<T>(reinterpret_cast<const T*>(base + place.start) + 3 * lanes<T>);
    }
    accumulate<Cell, true, rows>(sum, hidden, before, hidden, reinterpret_cast<const T*>(base + place.h));
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      T* cell = Cell::has_cell ? o.c + (row + r) * hidden + unit : nullptr;
      Pack<T> carry = load_first<T>(Cell::has_cell ? cell : before + r * hidden + unit, count);
      store_first<T>(o.y + (first + r) * hidden + unit, Pointwise<Cell>::forward(sum[r], carry), count);
      if (Cell::has_cell) store_first<T>(cell, carry, count);
      if (!o.extra) continue;
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) store_first<T>(at + (r * gates + g) * hidden, sum[r][g], count);
      store_first<T>(o.extra + (first + r) * hidden + unit, Pointwise<Cell>::extra(sum[r], carry), count);
    }
  }
}

}  // namespace

// ---- packing -----------------------------------------------------------------------------------------------------
template <class T> int64_t recurrent_blocks(int64_t hidden) { return ceil_div(hidden, lanes<T>); }

template <class Cell, class T, class W> int64_t recurrent_packed_bytes(int64_t in, int64_t hidden) {
  return Block<Cell, T, W>(in, hidden).size * recurrent_blocks<T>(hidden);
}

namespace {
// panel[depth][gates][unit] of count units, rows of weight[..][depth] `hidden` apart from gate to gate.
template <class T> void pack_part(int gates, int64_t hidden, int64_t depth, int count, const T* weight, T* panel) {
  constexpr int side = lanes<T>;
  for (int g = 0; g < gates; ++g, weight += hidden * depth, panel += side) {
    int64_t k = 0;
    if (count == side)
      for (; k + side <= depth; k += side) {
        Pack<T> v[side];
#pragma GCC unroll 16
        for (int n = 0; n < side; ++n) v[n] = load<T>(weight + n * depth + k);
        transpose(v);
#pragma GCC unroll 16
        for (int n = 0; n < side; ++n) store<T>(panel + (k + n) * gates * side, v[n]);
      }
    for (; k < depth; ++k)
      for (int n = 0; n < side; ++n) panel[k * gates * side + n] = n < count ? weight[n * depth + k] : T(0);
  }
}
inline void pack_part(int gates, int64_t hidden, int64_t depth, int count, const float* weight, bf16* panel) {
  constexpr int side = lanes<float>;
  for (int64_t k = 0; k < padded<bf16>(depth); ++k)
    for (int g = 0; g < gates; ++g)
      for (int n = 0; n < side; ++n) {
        const float w = n < count && k < depth ? weight[(g * hidden + n) * depth + k] : 0;
        const uint32_t bits = __builtin_bit_cast(uint32_t, w);
        panel[((k / 2 * gates + g) * side + n) * 2 + k % 2].bits =
            uint16_t(w == w ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40);
      }
}
inline void pack_part(int gates, int64_t hidden, int64_t depth, int count, const float* weight, int8_t* panel,
                      float* scales, int32_t* offsets) {
  constexpr int side = lanes<float>;
  std::fill(panel, panel + padded<int8_t>(depth) * gates * side, int8_t(0));
  for (int g = 0; g < gates; ++g)
    for (int n = 0; n < side; ++n) {
      const float* row = weight + (g * hidden + n) * depth;
      float largest = 0;
      for (int64_t k = 0; n < count && k < depth; ++k) largest = std::max(largest, row[k] < 0 ? -row[k] : row[k]);
      scales[g * side + n] = largest / 127;
      int32_t sum = 0;
      for (int64_t k = 0; largest > 1e-30f && n < count && k < depth; ++k) {
        const float rounded = row[k] * (127 / largest) + 12582912.0f;  // as in quantize
        const int8_t q = int8_t(rounded - 12582912.0f);
        panel[((k / 4 * gates + g) * side + n) * 4 + k % 4] = q;
        sum += q;
      }
      offsets[g * side + n] = 128 * sum;
    }
}
}  // namespace

template <class Cell, class T, class W>
void recurrent_pack(const RecurrentWeights<T>& o, void* packed, int64_t begin, int64_t end) {
  constexpr int gates = Cell::gates, side = lanes<T>;
  const Block<Cell, T, W> place(o.in, o.hidden);
  for (int64_t b = begin; b < end; ++b) {
    char* base = static_cast<char*>(packed) + b * place.size;
    const int64_t unit = b * side;
    const int count = int(std::min<int64_t>(side, o.hidden - unit));
    T* start = reinterpret_cast<T*>(base + place.start);
    std::fill(start, start + 4 * side, T(0));
    for (int g = 0; g < gates; ++g)
      for (int n = 0; n < count; ++n) {
        if (o.bias_ih) start[g * side + n] += o.bias_ih[g * o.hidden + unit + n];
        if (o.bias_hh) start[slot<Cell>(g, true) * side + n] += o.bias_hh[g * o.hidden + unit + n];
      }
    W *x_panel = reinterpret_cast<W*>(base), *h_panel = reinterpret_cast<W*>(base + place.h);
    const T *x_rows = o.weight_ih ? o.weight_ih + unit * o.in : nullptr, *h_rows = o.weight_hh + unit * o.hidden;
    if constexpr (std::is_same_v<W, int8_t>) {
      float* scales = reinterpret_cast<float*>(base + place.scale);
      int32_t* offsets = reinterpret_cast<int32_t*>(scales) + 2 * gates * side;
      pack_part(gates, o.hidden, o.in, count, x_rows, x_panel, scales, offsets);
      pack_part(gates, o.hidden, o.hidden, count, h_rows, h_panel, scales + gates * side, offsets + gates * side);
    } else {
      pack_part(gates, o.hidden, o.in, count, x_rows, x_panel);
      pack_part(gates, o.hidden, o.hidden, count, h_rows, h_panel);
    }
  }
}

template <class Cell, class T> bool recurrent_pack_matches(const RecurrentWeights<T>& o, const void* packed) {
  constexpr int64_t side = lanes<T>, samples = 16;
  const Block<Cell, T, T> place(o.in, o.hidden);
  const auto same = [&](const T* weight, int64_t depth, int64_t part) {
    for (int64_t i = 0, size = Cell::gates * o.hidden * depth; size && i < samples; ++i) {
      const int64_t at = (size - 1) * i / (samples - 1), k = at % depth, g = at / depth / o.hidden;
      const int64_t unit = at / depth % o.hidden;
      const char* base = static_cast<const char*>(packed) + unit / side * place.size + part;
      const T* w = reinterpret_cast<const T*>(base) + (k * Cell::gates + g) * side + unit % side;
      if (std::memcmp(weight + at, w, sizeof(T))) return false;
    }
    return true;
  };
  return same(o.weight_ih, o.in, 0) && same(o.weight_hh, o.hidden, place.h);
}

// ---- forward -----------------------------------------------------------------------------------------------------
template <class W> int64_t recurrent_scratch_bytes(int64_t batch, int64_t in, int64_t hidden) {
  return changes_inputs<W>() ? StepInputs<W>(batch, in, hidden).scales + 2 * batch * int64_t(sizeof(float)) : 0;
}

template <class T, class W> void recurrent_inputs(const RecurrentStep<T>& o, void* scratch) {
  if constexpr (!std::is_same_v<W, T>) {
    if (!changes_inputs<W>()) return;
    const StepInputs<W> at(o.batch, o.in, o.hidden);
    uint8_t* q = static_cast<uint8_t*>(scratch);
    float* scale = reinterpret_cast<float*>(q + at.scales);
    for (int64_t r = 0; r < o.batch; ++r) {
      scale[r] = change_input<W>(o.in, o.x + r * o.in, q + r * at.row);
      scale[o.batch + r] = change_input<W>(o.hidden, o.h + r * o.hidden, q + r * at.row + at.x);
    }
  }
}

template <class Cell, class T, class W>
void recurrent_step(const RecurrentStep<T>& o, int64_t block, const void* scratch) {
  const int64_t tiles = ceil_div(o.batch, rows_at_once<W>());
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = part_start(o.batch, tiles, t);
    with_rows(int(part_start(o.batch, tiles, t + 1) - row),
              [&](auto rows) { step_tile<Cell, T, W, decltype(rows)::value>(o, block, row, scratch); });
  }
}

template <class Cell, class T> void recurrent_forward(const RecurrentForward<T>& o, int64_t t, int64_t begin,
                                                      int64_t end, int64_t first, int64_t last) {
  const int64_t t_before = o.shape.before(t), known = o.shape.rows(t_before), hidden = o.shape.hidden;
  last = std::min(last, o.shape.rows(t));
  // Several tiles: blocks outside, so that a block's weights stay in cache from tile to tile.
  const int64_t at_once = last - first > step_rows ? 1 : end - begin;
  for (int64_t b = begin; b < end; b += at_once)
    for (int64_t row = first; row < last;) {
      const bool begun = row < known;  // else the row's first step: it starts from h0
      const T* before = (begun ? o.y + o.shape.offsets[t_before] * hidden : o.h0) + row * hidden;
      const int rows = int(std::min<int64_t>(step_rows, (begun ? std::min(last, known) : last) - row));
      with_rows(rows, [&](auto n) { forward_rows<Cell, T, decltype(n)::value>(o, t, b, b + at_once, row, before); });
      row += rows;
    }
}

// ---- backward ----------------------------------------------------------------------------------------------------
template <class T> int64_t recurrent_panels(int64_t hidden) { return gemm_panels<T>(hidden); }
template <class T> int64_t recurrent_panel_width() { return tile_columns<T>; }

template <class Cell, class T>
void recurrent_pack_backward(int64_t hidden, const T* weight_hh, T* panels, int64_t begin, int64_t end) {
  constexpr int64_t width = tile_columns<T>;
  for (int64_t p = begin; p < end; ++p)
    gemm_pack<T>(int(std::min(width, hidden - p * width)), Cell::gates * hidden, weight_hh + p * width, hidden, 1,
                 panels + p * width * Cell::gates * hidden);
}

template <class Cell, class T> void recurrent_backward_gates(const RecurrentBackward<T>& o, int64_t t, int64_t begin,
                                                             int64_t end, int64_t first, int64_t last) {
  constexpr int gates = Cell::gates, side = lanes<T>;
  const int64_t t_before = o.shape.before(t), known = o.shape.rows(t_before), hidden = o.shape.hidden;
  const int64_t from = begin * tile_columns<T>, to = std::min(end * tile_columns<T>, hidden);
  last = std::min(last, o.shape.rows(t));
  for (int64_t row = first; row < last; ++row) {
    const int64_t here = o.shape.offsets[t] + row, there = row < known ? o.shape.offsets[t_before] + row : -1;
    const T* h_before = there < 0 ? o.h0 + row * hidden : o.y + there * hidden;
    const T* c_before = !Cell::has_cell ? h_before : there < 0 ? o.c0 + row * hidden : o.extra + there * hidden;
    for (int64_t unit = from; unit < to; unit += side) {
      const int count = int(std::min<int64_t>(side, to - unit));
      Pack<T> gate[gates], d[gates], dlast;
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) gate[g] = load_first<T>(o.gates + (here * gates + g) * hidden + unit, count);
      T *dh_at = o.dh + row * hidden + unit, *dc_at = Cell::has_cell ? o.dc + row * hidden + unit : nullptr;
      Pack<T> dh = load_first<T>(dh_at, count), dc = Cell::has_cell ? load_first<T>(dc_at, count) : Pack<T>{};
      if (o.dy) dh += load_first<T>(o.dy + here * hidden + unit, count);
      Pointwise<Cell>::backward(gate, load_first<T>(o.extra + here * hidden + unit, count),
                                load_first<T>(c_before + unit, count), dh, dc, d, dlast);
      if (Cell::has_cell) store_first<T>(dc_at, dc, count);
      else store_first<T>(dh_at, dh, count);
      store_first<T>(o.before + here * hidden + unit, load_first<T>(h_before + unit, count), count);
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) {
        T* at = o.dgates + (here * gates + g) * hidden + unit;
        store_first<T>(at, d[g], count);
        if (Cell::split_gate) store_first<T>(at - o.dgates + o.dgates_h, g == gates - 1 ? dlast : d[g], count);
      }
    }
  }
}

template <class Cell, class T> void recurrent_backward_hidden(const RecurrentBackward<T>& o, int64_t t, int64_t begin,
                                                              int64_t end, int64_t first, int64_t last) {
  constexpr int64_t width = tile_columns<T>, gates = Cell::gates, block = 128;  // summed by itself, as in accumulate
  const int64_t hidden = o.shape.hidden, depth = gates * hidden;
  last = std::min(last, o.shape.rows(t));
  alignas(64) T tile[tile_rows<T>][tile_columns<T>];
  for (int64_t p = begin; p < end; ++p) {
    const int columns = int(std::min(width, hidden - p * width));
    for (int64_t row = first; row < last; row += tile_rows<T>) {
      const int rows = int(std::min<int64_t>(tile_rows<T>, last - row));
      const T* a = o.dgates_h + (o.shape.offsets[t] + row) * depth;
      for (int64_t k = 0; k < depth; k += block)
        gemm_tile<T>(rows, columns, std::min(block, depth - k), a + k, depth, 1, o.panels + (p * depth + k) * width,
                     k ? tile[0] : nullptr, width, tile[0], width);
      for (int r = 0; r < rows; ++r)
        for (int n = 0; n < columns; n += lanes<T>) {
          const int count = std::min<int>(lanes<T>, columns - n);
          T* at = o.dh + (row + r) * hidden + p * width + n;
          const Pack<T> sum = load<T>(tile[r] + n);
          store_first<T>(at, Cell::has_cell ? sum : load_first<T>(at, count) + sum, count);
        }
    }
  }
}

// What lstm.simd.cpp and gru.simd.cpp instantiate. Functions of T and W alone belong to the first of them.
#define PYFLOWGEN_RECURRENT_STEP(Cell, T, W) \
  template int64_t recurrent_packed_bytes<Cell, T, W>(int64_t, int64_t); \
  template void recurrent_pack<Cell, T, W>(const RecurrentWeights<T>&, void*, int64_t, int64_t); \
  template void recurrent_step<Cell, T, W>(const RecurrentStep<T>&, int64_t, const void*);
#define PYFLOWGEN_RECURRENT(Cell, T) \
  PYFLOWGEN_RECURRENT_STEP(Cell, T, T) \
  template bool recurrent_pack_matches<Cell, T>(const RecurrentWeights<T>&, const void*); \
  template void recurrent_forward<Cell, T>(const RecurrentForward<T>&, int64_t, int64_t, int64_t, int64_t, int64_t); \
  template void recurrent_pack_backward<Cell, T>(int64_t, const T*, T*, int64_t, int64_t); \
  template void recurrent_backward_gates<Cell, T>(const RecurrentBackward<T>&, int64_t, int64_t, int64_t, int64_t, \
                                                  int64_t); \
  template void recurrent_backward_hidden<Cell, T>(const RecurrentBackward<T>&, int64_t, int64_t, int64_t, int64_t, \
                                                   int64_t);

}  // namespace pyflowgen::PYFLOWGEN_ISA
