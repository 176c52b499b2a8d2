// The SIMD pack: GCC/Clang vector extensions, so one source serves every instruction set and every processor.
//
// Included only from *.simd.cpp, which CMake compiles once per instruction set with PYFLOWGEN_ISA naming the copy
// (baseline, avx2, avx512). Everything lives in that namespace: two copies of an inline function compiled with
// different flags must never share a symbol, or the linker may keep the one this processor cannot run.
// The operators + - * / & | ^ << >> < == ?: work on packs and scalars alike; what they lack is below.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef PYFLOWGEN_ISA
#define PYFLOWGEN_ISA baseline
#endif
#define PYFLOWGEN_INLINE inline __attribute__((always_inline))

namespace pyflowgen::PYFLOWGEN_ISA {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
inline constexpr int vector_bytes = 32;
#else
inline constexpr int vector_bytes = 16;
#endif

typedef float f32v __attribute__((vector_size(vector_bytes)));
typedef double f64v __attribute__((vector_size(vector_bytes)));
typedef int32_t i32v __attribute__((vector_size(vector_bytes)));
typedef int64_t i64v __attribute__((vector_size(vector_bytes)));

template <class T> struct PackOf;
template <> struct PackOf<float> { using type = f32v; };
template <> struct PackOf<double> { using type = f64v; };
template <> struct PackOf<int32_t> { using type = i32v; };
template <> struct PackOf<int64_t> { using type = i64v; };
// Pack<float>: as many floats as one register of this copy's instruction set holds.
template <class T> using Pack = typename PackOf<T>::type;
// Elements of T in one register.
template <class T> inline constexpr int lanes = vector_bytes / int(sizeof(T));

// V load(p): one pack from `lanes` contiguous elements at p, no alignment asked.
template <class T> PYFLOWGEN_INLINE Pack<T> load(const T* p) {
  Pack<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T> PYFLOWGEN_INLINE void store(T* p, Pack<T> v) { __builtin_memcpy(p, &v, sizeof v); }
template <class T> PYFLOWGEN_INLINE Pack<T> broadcast(T x) { return x - Pack<T>{}; }

// a*b+c with one rounding where the copy has FMA, with two elsewhere.
PYFLOWGEN_INLINE f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
PYFLOWGEN_INLINE f64v fma(f64v a, f64v b, f64v c) {
#if defined(__AVX512F__)
  return (f64v)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (f64v)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

typedef float f32h __attribute__((vector_size(vector_bytes / 2)));

// The lanes as doubles, those of the lower and of the upper half added.
PYFLOWGEN_INLINE f64v widen_add(f32v v) {
  f32h half[2];
  __builtin_memcpy(half, &v, sizeof v);
  return __builtin_convertvector(half[0], f64v) + __builtin_convertvector(half[1], f64v);
}
PYFLOWGEN_INLINE f64v widen_add(f64v v) { return v; }

// Sum of the lanes, always as the same tree.
template <int n = lanes<double> / 2> PYFLOWGEN_INLINE double reduce_add(f64v v) {
  if constexpr (n == 0) return v[0];
  i64v index{};
  for (int i = 0; i < n; ++i) index[i] = i + n;
  return reduce_add<n / 2>(v + __builtin_shuffle(v, index));
}

// Transpose of lanes x lanes elements by exchanging ever larger blocks across the diagonal.
template <class T, int step = 1> PYFLOWGEN_INLINE void transpose(Pack<T> (&v)[lanes<T>]) {
  if constexpr (step < lanes<T>) {
    using Index = Pack<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
    Index low, high;
    for (int i = 0; i < lanes<T>; ++i) {
      low[i] = i & step ? lanes<T> + i - step : i;
      high[i] = i & step ? lanes<T> + i : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i)
      if (!(i & step)) {
        const Pack<T> a = v[i], b = v[i | step];
        v[i] = __builtin_shuffle(a, b, low);
        v[i | step] = __builtin_shuffle(a, b, high);
      }
    transpose<T, 2 * step>(v);
  }
}

}  // namespace pyflowgen::PYFLOWGEN_ISA
