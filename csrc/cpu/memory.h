// Packs from and to memory: any storage type (float, double, bfloat16, float16), any stride, and the partial pack at
// the end of a run. 16-bit types are computed in float. Included only from *.simd.cpp, as simd.h.
#pragma once

#include <type_traits>

#include "cpu/simd.h"
#include "storage.h"

namespace pyflowgen::PYFLOWGEN_ISA {

// The type a storage type is computed in.
template <class T> struct ComputeOf { using type = T; };
template <> struct ComputeOf<bf16> { using type = float; };
template <> struct ComputeOf<f16> { using type = float; };
template <class T> using Compute = typename ComputeOf<T>::type;
// Elements processed at a time for storage type T.
template <class T> inline constexpr int width = lanes<Compute<T>>;

typedef uint16_t u16h __attribute__((vector_size(vector_bytes / 2)));
typedef uint32_t u32v __attribute__((vector_size(vector_bytes)));

#if !defined(__F16C__)
PYFLOWGEN_INLINE float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  // Exponent and mantissa shifted into place, then scaled by 2^112: denormals come out right as well.
  const float value = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  const uint32_t bits =
      magnitude >= 0x7c00 ? 0x7f800000u | (magnitude & 0x3ff) << 13 : __builtin_bit_cast(uint32_t, value);
  return __builtin_bit_cast(float, bits | sign);
}
PYFLOWGEN_INLINE uint16_t float_to_f16(float f) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, f), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // denormal: adding 0.5 leaves the rounded value in the low bits
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    return uint16_t(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000));
  }
  return uint16_t(sign | (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13);
}
#endif

PYFLOWGEN_INLINE f32v load_as(const float* p) { return load(p); }
PYFLOWGEN_INLINE f64v load_as(const double* p) { return load(p); }
PYFLOWGEN_INLINE f32v load_as(const bf16* p) {
  u16h half;
  __builtin_memcpy(&half, p, sizeof half);
  return (f32v)(__builtin_convertvector(half, u32v) << 16);
}
PYFLOWGEN_INLINE f32v load_as(const f16* p) {
#if defined(__AVX512F__)
  // maskz: GCC 12 warns of its own header's undefined value in the plain form
  return (f32v)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (f32v)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  f32v v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = f16_to_float(p[i].bits);
  return v;
#endif
}

PYFLOWGEN_INLINE void store_as(float* p, f32v v) { store(p, v); }
PYFLOWGEN_INLINE void store_as(double* p, f64v v) { store(p, v); }
PYFLOWGEN_INLINE void store_as(bf16* p, f32v v) {
  const u32v bits = (u32v)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const u32v quiet = (bits >> 16) | 0x40;  // a NaN must not round to inf
  const u16h half = __builtin_convertvector(v == v ? rounded : quiet, u16h);
  __builtin_memcpy(p, &half, sizeof half);
}
PYFLOWGEN_INLINE void store_as(f16* p, f32v v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < lanes<float>; ++i) p[i].bits = float_to_f16(v[i]);
#endif
}

// Every second element, without reading past the last: the second half starts one element early.
PYFLOWGEN_INLINE f32v load_every_second(const float* p) {
  constexpr int n = lanes<float>;
  i32v index;
  for (int i = 0; i < n; ++i) index[i] = i < n / 2 ? 2 * i : 2 * i + 1;
  return __builtin_shuffle(load(p), load(p + n - 1), index);
}
// Write every second element and keep the ones between, of which n - 1 are read and written back unchanged.
PYFLOWGEN_INLINE void store_every_second(float* p, f32v v) {
  constexpr int n = lanes<float>;
  i32v low, high;
  for (int i = 0; i < n; ++i) {
    low[i] = i % 2 == 0 ? n + i / 2 : i;
    high[i] = i % 2 == 1 ? n + (n - 1 + i) / 2 : i;  // p[n-1+i]
  }
  store(p, __builtin_shuffle(load(p), v, low));
  store(p + n - 1, __builtin_shuffle(load(p + n - 1), v, high));
}

// Two packs from alternating elements p[0], p[1], p[0], …, and back.
PYFLOWGEN_INLINE void load_pairs(const float* p, f32v& even, f32v& odd) {
  constexpr int n = lanes<float>;
  i32v index;
  for (int i = 0; i < n; ++i) index[i] = 2 * i;
  const f32v low = load(p), high = load(p + n);
  even = __builtin_shuffle(low, high, index);
  odd = __builtin_shuffle(low, high, index + 1);
}
PYFLOWGEN_INLINE void store_pairs(float* p, f32v even, f32v odd) {
  constexpr int n = lanes<float>;
  i32v index;
  for (int i = 0; i < n; ++i) index[i] = i / 2 + (i % 2) * n;
  store(p, __builtin_shuffle(even, odd, index));
  store(p + n, __builtin_shuffle(even, odd, index + n / 2));
}

// The first n elements p[0], p[stride], …, one at a time; lanes beyond them are 0. Not inlined: the slow way is taken
// for the end of a run and for odd strides, and would be most of every kernel's code.
template <class T> __attribute__((noinline)) Pack<Compute<T>> gather(const T* p, int64_t stride, int n) {
  T buffer[width<T>] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i * stride];
  return load_as(buffer);
}
template <class T> __attribute__((noinline)) void scatter(T* p, int64_t stride, Pack<Compute<T>> v, int n) {
  T buffer[width<T>];
  store_as(buffer, v);
  for (int i = 0; i < n; ++i) p[i * stride] = buffer[i];
}

// One pack, or the first n elements of one.
template <class T> PYFLOWGEN_INLINE Pack<Compute<T>> load_strided(const T* p, int64_t stride, int n) {
  if (n == width<T>) {
    if (stride == 1) return load_as(p);
    if constexpr (std::is_same_v<T, float>) {
      if (stride == 2) return load_every_second(p);
    }
  }
  return gather(p, stride, n);
}
template <class T> PYFLOWGEN_INLINE void store_strided(T* p, int64_t stride, Pack<Compute<T>> v, int n) {
  if (n == width<T>) {
    if (stride == 1) return store_as(p, v);
    if constexpr (std::is_same_v<T, float>) {
      if (stride == 2) return store_every_second(p, v);
    }
  }
  scatter(p, stride, v, n);
}

// Lanes below n are all ones, the rest zero: the mask of a partial pack.
template <class C> PYFLOWGEN_INLINE auto first_lanes(int n) {
  using Int = decltype(Pack<C>{} < Pack<C>{});
  Int index;
  for (int i = 0; i < lanes<C>; ++i) index[i] = i;
  return index < Int{} + n;
}

}  // namespace pyflowgen::PYFLOWGEN_ISA
