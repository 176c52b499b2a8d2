// exp, expm1, log, log1p, tanh, sigmoid, softplus, log_sigmoid, atan, normal_cdf: one source for float, double, the
// SIMD packs f32v/f64v, and CUDA device code.
//
// Namespace pyflowgen::PYFLOWGEN_ISA::formula, where PYFLOWGEN_ISA is `device` under nvcc (see simd.h for why every
// copy has a namespace of its own). Written with the operators packs and scalars share, `mask ? a : b`, and the
// overloads of the first section: branch-free, no tables, no libm, no standard header's functions.
//
// All rounding is as written: compile with -ffp-contract=off. Each error bound holds with fma() rounding once and with
// fma() rounding twice (baseline), because every product that must be exact has the trailing zeros for it; nvcc's own
// contraction does no harm either. Denormal arguments and results are honoured; flush-to-zero modes are not supported.
// A pack gives bit for bit the scalar's result of the same copy, and all copies with FMA give the same (NaN payloads
// aside). NaN gives NaN.
// Polynomials are minimax in relative error (Remez), their coefficients rounded one by one with the rest refitted.
#pragma once

#if !defined(__CUDACC__)
#include "cpu/simd.h"
#define PYFLOWGEN_FORMULA inline __attribute__((always_inline))
#else
#include <cstdint>
#include <cstring>
#ifndef PYFLOWGEN_ISA
#define PYFLOWGEN_ISA device
#endif
#define PYFLOWGEN_FORMULA __host__ __device__ __forceinline__
#endif

namespace pyflowgen::PYFLOWGEN_ISA::formula {

// ---- what the operators lack -------------------------------------------------------------------------------------

// Element<V>: float or double. Bits<V>: V's bits as unsigned integers, Lane<V>: one of them.
template <class V> struct Kind;
template <> struct Kind<float> {
  using Element = float;
  using Bits = uint32_t;
};
template <> struct Kind<double> {
  using Element = double;
  using Bits = uint64_t;
};
#if !defined(__CUDACC__)
typedef uint32_t u32v __attribute__((vector_size(vector_bytes)));
typedef uint64_t u64v __attribute__((vector_size(vector_bytes)));
template <> struct Kind<f32v> {
  using Element = float;
  using Bits = u32v;
};
template <> struct Kind<f64v> {
  using Element = double;
  using Bits = u64v;
};
#endif
template <class V> using Element = typename Kind<V>::Element;
template <class V> using Bits = typename Kind<V>::Bits;
template <class V> using Lane = Bits<Element<V>>;
template <class V> inline constexpr bool single = sizeof(Element<V>) == 4;

template <class To, class From> PYFLOWGEN_FORMULA To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// a*b+c with one rounding where this copy has FMA, with two elsewhere; the packs' own are in simd.h.
PYFLOWGEN_FORMULA float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
PYFLOWGEN_FORMULA double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#elif defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
#if !defined(__CUDACC__)
PYFLOWGEN_FORMULA f32v fma(f32v a, f32v b, f32v c) { return PYFLOWGEN_ISA::fma(a, b, c); }
PYFLOWGEN_FORMULA f64v fma(f64v a, f64v b, f64v c) { return PYFLOWGEN_ISA::fma(a, b, c); }
#endif

// The constant c in every lane.
template <class V> PYFLOWGEN_FORMULA V splat(Element<V> c) {
  if constexpr (sizeof(V) == sizeof(c)) return c;
  else return c - V{};
}

// a < b ? a : b and a > b ? a : b, so b where one is NaN: one instruction on x86, which GCC finds for scalars alone.
template <class V> PYFLOWGEN_FORMULA V lesser(V a, V b) { return a < b ? a : b; }
template <class V> PYFLOWGEN_FORMULA V greater(V a, V b) { return a > b ? a : b; }
#if defined(__CUDACC__)
#elif defined(__AVX512F__)  // maskz: GCC 12 warns of its own header's undefined value in the plain forms
PYFLOWGEN_FORMULA f32v lesser(f32v a, f32v b) { return (f32v)_mm512_maskz_min_ps(__mmask16(-1), (__m512)a, (__m512)b); }
PYFLOWGEN_FORMULA f64v lesser(f64v a, f64v b) {
  return (f64v)_mm512_maskz_min_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
}
PYFLOWGEN_FORMULA f32v greater(f32v a, f32v b) {
  return (f32v)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
}
PYFLOWGEN_FORMULA f64v greater(f64v a, f64v b) {
  return (f64v)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
}
#elif defined(__AVX2__)
PYFLOWGEN_FORMULA f32v lesser(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }
PYFLOWGEN_FORMULA f64v lesser(f64v a, f64v b) { return (f64v)_mm256_min_pd((__m256d)a, (__m256d)b); }
PYFLOWGEN_FORMULA f32v greater(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
PYFLOWGEN_FORMULA f64v greater(f64v a, f64v b) { return (f64v)_mm256_max_pd((__m256d)a, (__m256d)b); }
#elif defined(__SSE2__)
PYFLOWGEN_FORMULA f32v lesser(f32v a, f32v b) { return (f32v)_mm_min_ps((__m128)a, (__m128)b); }
PYFLOWGEN_FORMULA f64v lesser(f64v a, f64v b) { return (f64v)_mm_min_pd((__m128d)a, (__m128d)b); }
PYFLOWGEN_FORMULA f32v greater(f32v a, f32v b) { return (f32v)_mm_max_ps((__m128)a, (__m128)b); }
PYFLOWGEN_FORMULA f64v greater(f64v a, f64v b) { return (f64v)_mm_max_pd((__m128d)a, (__m128d)b); }
#endif
// x limited to a bound; NaN stays.
template <class V> PYFLOWGEN_FORMULA V at_most(V x, Element<V> bound) { return lesser(splat<V>(bound), x); }
template <class V> PYFLOWGEN_FORMULA V at_least(V x, Element<V> bound) { return greater(splat<V>(bound), x); }

template <class V> inline constexpr int mantissa_bits = single<V> ? 23 : 52;
template <class V> inline constexpr int exponent_bias = single<V> ? 127 : 1023;
template <class V> inline constexpr Element<V> infinity = Element<V>(__builtin_huge_val());
template <class V> inline constexpr Element<V> not_a_number = -Element<V>(__builtin_nan(""));
template <class V> inline constexpr Element<V> ln2 = Element<V>(0.693147180559945309417);
// ln2 = ln2_high + ln2_low, ln2_high with so many trailing zeros that its product with any exponent is exact.
template <class V> inline constexpr Element<V> ln2_high =
    single<V> ? Element<V>(0.693359375) : Element<V>(6.93147180369123816490e-01);
template <class V> inline constexpr Element<V> ln2_low =
    single<V> ? Element<V>(-2.12194440054690583e-4) : Element<V>(1.90821492927058770002e-10);

template <class V> PYFLOWGEN_FORMULA Bits<V> sign_bit() {
  return Bits<V>{} + (Lane<V>(1) << (8 * sizeof(Lane<V>) - 1));
}
template <class V> PYFLOWGEN_FORMULA V abs(V x) { return bit_cast<V>(bit_cast<Bits<V>>(x) & ~sign_bit<V>()); }
// magnitude (whose sign bit is clear) with x's sign.
template <class V> PYFLOWGEN_FORMULA V with_sign_of(V x, V magnitude) {
  return bit_cast<V>(bit_cast<Bits<V>>(magnitude) | (bit_cast<Bits<V>>(x) & sign_bit<V>()));
}

// c0 + c1 x + c2 x^2 + ...
template <class V> PYFLOWGEN_FORMULA V horner(V, Element<V> c) { return splat<V>(c); }
template <class V, class... C> PYFLOWGEN_FORMULA V horner(V x, Element<V> c, C... rest) {
  return fma(x, horner(x, Element<V>(rest)...), splat<V>(c));
}

// ---- shared kernels ----------------------------------------------------------------------------------------------

// x = n ln2 + r with |r| <= ln2/2; `biased` holds n + bias in its low bits (more than an exponent field's worth).
template <class V> struct Reduced {
  V r, n;
  Bits<V> biased;
};
template <int bias, class V> PYFLOWGEN_FORMULA Reduced<V> reduce_exp(V x) {
  // Adding 1.5 * 2^mantissa_bits rounds to an integer, which then is the low bits of the sum.
  constexpr Element<V> magic = (single<V> ? Element<V>(12582912) : Element<V>(6755399441055744)) + bias;
  V t = fma(x, splat<V>(Element<V>(1.44269504088896340736)), splat<V>(magic));
  V n = t - magic;
  V r = fma(n, splat<V>(-ln2_high<V>), x);
  return {fma(n, splat<V>(-ln2_low<V>), r), n, bit_cast<Bits<V>>(t)};
}

// (e^r - 1 - r) / r^2 for |r| <= ln2/2; error 2^-26.1 (float), 2^-59.8 (double) of e^r - 1.
template <class V> PYFLOWGEN_FORMULA V exp_tail(V r) {
  if constexpr (single<V>)
    return horner(r, 0.4999999701976776f, 0.16666539013385773f, 0.041667744517326355f, 0.008367069996893406f,
                  0.0013839034363427634f);
  else
    return horner(r, 0.5, 0.16666666666666677, 0.041666666666666685, 0.008333333333322012, 0.0013888888888898918,
                  0.00019841269883615157, 2.4801587217117757e-05, 2.7557247696584196e-06, 2.755742937841793e-07,
                  2.510764536869655e-08, 2.0850552810955047e-09);
}

// e^x for x in [lowest, highest], the range in which e^x is neither certain to be 0 nor to overflow, or NaN.
template <class V> PYFLOWGEN_FORMULA V exp_in_range(V x) {
  auto [r, n, biased] = reduce_exp<2 * exponent_bias<V>>(x);
  V y = fma(r, fma(r, exp_tail(r), splat<V>(1)), splat<V>(1));
#if defined(__AVX512F__) && !defined(__CUDACC__)
  if constexpr (sizeof(V) == 64 && single<V>) return (V)_mm512_maskz_scalef_ps(__mmask16(-1), (__m512)y, (__m512)n);
  if constexpr (sizeof(V) == 64 && !single<V>) return (V)_mm512_maskz_scalef_pd(__mmask8(-1), (__m512d)y, (__m512d)n);
#endif
  // 2^n in two factors, each a normal number: the first product is exact, the second rounds once, also to a denormal.
  Bits<V> half = biased >> 1;
  return y * bit_cast<V>(half << mantissa_bits<V>) * bit_cast<V>((biased - half) << mantissa_bits<V>);
}
template <class V> inline constexpr Element<V> exp_lowest = single<V> ? -104 : -746;
template <class V> inline constexpr Element<V> exp_highest = single<V> ? 89 : 710;

// x = 2^n (1 + f), 1 + f in [3/4, 3/2); n + bias in `field`. x normal and positive, else finite rubbish.
template <class V> struct Split {
  V f;
  Bits<V> field;
};
template <class V> PYFLOWGEN_FORMULA Split<V> split(V x) {
  constexpr Lane<V> unit = Lane<V>(1) << mantissa_bits<V>, one = exponent_bias<V> * unit, mantissa = unit - 1;
  constexpr Lane<V> three_quarters = one - unit / 2;
  // The exponent field of x / (3/4) in fixed point: subtracting borrows across the mantissa.
  Bits<V> ratio = bit_cast<Bits<V>>(x) + (one - three_quarters);
  return {bit_cast<V>((ratio & mantissa) + three_quarters) - 1, ratio >> mantissa_bits<V>};
}
// n of Split as a number.
template <class V> PYFLOWGEN_FORMULA V exponent(Bits<V> field) {
  constexpr Element<V> magic = single<V> ? 0x1p23 : 0x1p52;
  return bit_cast<V>(field + bit_cast<Lane<V>>(magic)) - (magic + exponent_bias<V>);
}
// x = 2^n (1 + f) likewise, for denormal x too.
template <class V> struct SplitAny { V f, n; };
template <class V> PYFLOWGEN_FORMULA SplitAny<V> split_any(V x) {
#if defined(__AVX512F__) && !defined(__CUDACC__)
  if constexpr (sizeof(V) == 64 && single<V>) {
    V m = (V)_mm512_maskz_getmant_ps(__mmask16(-1), (__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    V n = (V)_mm512_maskz_getexp_ps(__mmask16(-1), (__m512)x);
    return {m - 1, m < 1 ? n + 1 : n};
  }
  if constexpr (sizeof(V) == 64 && !single<V>) {
    V m = (V)_mm512_maskz_getmant_pd(__mmask8(-1), (__m512d)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    V n = (V)_mm512_maskz_getexp_pd(__mmask8(-1), (__m512d)x);
    return {m - 1, m < 1 ? n + 1 : n};
  }
#endif
  constexpr Element<V> smallest_normal = single<V> ? 1.17549435e-38f : 2.2250738585072014e-308;
  constexpr Element<V> shift = single<V> ? 24 : 54, up = single<V> ? 0x1p24 : 0x1p54;
  auto denormal = x < smallest_normal;
  auto [f, field] = split(denormal ? x * up : x);
  V n = exponent<V>(field);
  return {f, denormal ? n - shift : n};
}
// n ln2 + f + tail, smallest first.
template <class V> PYFLOWGEN_FORMULA V add_ln2(V n, V f, V tail) {
  return fma(n, splat<V>(ln2_high<V>), f + fma(n, splat<V>(ln2_low<V>), tail));
}
// y = log x, put right where x is 0, negative, inf or NaN.
template <class V> PYFLOWGEN_FORMULA V log_edges(V x, V y) {
#if defined(__AVX512F__) && !defined(__CUDACC__)
  // From the lowest digit, what becomes of y where x is: a NaN, a signalling NaN (itself, quiet), 0 (-inf), 1 (y),
  // -inf (NaN), inf (inf), negative (NaN), positive (y).
  constexpr int table = 0x03530422;
  if constexpr (sizeof(V) == 64 && single<V>)
    return (V)_mm512_fixupimm_ps((__m512)y, (__m512)x, _mm512_set1_epi32(table), 0);
  if constexpr (sizeof(V) == 64 && !single<V>)
    return (V)_mm512_fixupimm_pd((__m512d)y, (__m512d)x, _mm512_set1_epi64(table), 0);
#endif
  V outside = x == 0 ? splat<V>(-infinity<V>) : x < 0 ? splat<V>(not_a_number<V>) : x;
  return (x > 0) & (x < infinity<V>) ? y : outside;
}

// log(1 + f) - f for 1 + f in [3/4, 3/2]; error 2^-27.6 (float), 2^-55.9 (double) of log(1 + f).
template <class V> PYFLOWGEN_FORMULA V log_tail(V f) {
  if constexpr (single<V>) {
    return f * f *
           horner(f, -0.5f, 0.33333447575569153f, -0.2500009536743164f, 0.19990922510623932f, -0.16647391021251678f,
                  0.14477752149105072f, -0.13159875571727753f, 0.10463769733905792f, -0.045096393674612045f);
  } else {
    // log(1 + f) = 2 atanh(s), s = f / (2 + f); f - f^2/2 is split off since f itself is exact.
    V s = f / (f + 2), z = s * s, half_square = Element<V>(0.5) * f * f;
    V rest = z * horner(z, 0.6666666666667271, 0.399999999961601, 0.28571429395578946, 0.22222138477437978,
                        0.18186357075335013, 0.15250168144349407, 0.15368351990329443);
    return fma(s, half_square + rest, -half_square);
  }
}

// log(1 + e) for e in [0, 1] or NaN.
template <class V> PYFLOWGEN_FORMULA V log1p_unit(V e) {
  if constexpr (single<V>) {  // one polynomial serves the whole interval; error 2^-26.7
    return fma(e * e,
               horner(e, -0.4999993145465851f, 0.33330464363098145f, -0.24958018958568573f, 0.19692102074623108f,
                      -0.15344879031181335f, 0.10661124438047409f, -0.05745718255639076f, 0.02008621022105217f,
                      -0.003290459979325533f),
               e);
  } else {
    auto above = e > 0.5;
    V f = above ? 0.5 * e - 0.5 : e;
    V y = f + log_tail(f);
    return above ? y + ln2<V> : y;
  }
}

// ---- the functions -----------------------------------------------------------------------------------------------
// "Error: a / b ulp": the largest found, a for float at every 16th bit pattern (baseline, AVX-512), b for double at
// some 4e4 points. An ulp is the spacing of the numbers at the exact result, denormals included.

// e^x = 2^n e^r. Error: 1.2 / 1.1 ulp.
template <class V> PYFLOWGEN_FORMULA V exp(V x) {
  return exp_in_range(at_most(at_least(x, exp_lowest<V>), exp_highest<V>));
}

// e^x - 1 = 2^n (e^r - 1) + (2^n - 1), halved so that 2^n stays finite. expm1(-0) = -0. Error: 1.7 / 1.7 ulp.
template <class V> PYFLOWGEN_FORMULA V expm1(V x) {
  constexpr Element<V> half = 0.5;
  V c = at_most(at_least(x, single<V> ? -20 : -40), exp_highest<V>);
  auto [r, n, biased] = reduce_exp<exponent_bias<V> - 1>(c);
  V q = fma(r * r, exp_tail(r), r), scale = bit_cast<V>(biased << mantissa_bits<V>);
  V y = fma(q, scale, scale - half);
  y = y + y;
  return abs(x) < Element<V>(1e-20) ? x : y;
}

// log x = n ln2 + log(1 + f). log(+-0) = -inf, log of a negative number is NaN. Error: 1.0 / 0.9 ulp.
template <class V> PYFLOWGEN_FORMULA V log(V x) {
  auto [f, n] = split_any(x);
  return log_edges(x, add_ln2(n, f, log_tail(f)));
}

// log(1 + x). log1p(-0) = -0, log1p(-1) = -inf, NaN below -1. Error: 1.0 / 0.8 ulp.
template <class V> PYFLOWGEN_FORMULA V log1p(V x) {
  constexpr Element<V> quarter = 0.25;
  V u = x + 1;
  auto [unused, field] = split(u);
  // The exponent n of u serves x itself: f = x 2^-n + (2^-n - 1) rounds once. 2^(2-n) is normal for every n.
  constexpr Lane<V> top = 2 * exponent_bias<V> + 2;
  V scale = bit_cast<V>((top - field) << mantissa_bits<V>);
  V f = fma(quarter * x, scale, quarter * scale - 1);
  V y = log_edges(u, add_ln2(exponent<V>(field), f, log_tail(f)));
  return abs(x) < Element<V>(1e-20) ? x : y;
}

// tanh x = (e^2|x| - 1) / (e^2|x| + 1) with x's sign; the numerator as in expm1. tanh(-0) = -0. Error: 2.6 / 2.4 ulp.
template <class V> PYFLOWGEN_FORMULA V tanh(V x) {
  auto [r, n, biased] = reduce_exp<exponent_bias<V>>(2 * at_most(abs(x), single<V> ? 10 : 20));
  V q = fma(r * r, exp_tail(r), r), scale = bit_cast<V>(biased << mantissa_bits<V>);
  V e = fma(q, scale, scale - 1);
  return with_sign_of(x, e / (e + 2));
}

// sigmoid x = 1 / (1 + e^-x), as e^x / (1 + e^x) for x < 0. Error: 2.4 / 2.1 ulp.
template <class V> PYFLOWGEN_FORMULA V sigmoid(V x) {
  V e = exp_in_range(at_least(-abs(x), exp_lowest<V>));
  return (x < 0 ? e : splat<V>(1)) / (e + 1);
}

// softplus x = log(1 + e^x) = max(x, 0) + log(1 + e^-|x|). Error: 2.3 / 1.9 ulp.
template <class V> PYFLOWGEN_FORMULA V softplus(V x) {
  V tail = log1p_unit(exp_in_range(at_least(-abs(x), exp_lowest<V>)));
  return at_least(x, 0) + tail;
}

// log(sigmoid(x)) = -softplus(-x); log_sigmoid(inf) = -0. Error: 2.2 / 1.9 ulp.
template <class V> PYFLOWGEN_FORMULA V log_sigmoid(V x) { return -softplus(-x); }

// atan x, beyond 1 as pi/2 - atan(1/|x|) with x's sign; one odd polynomial for [0, 1], error 2^-28.5 (float), 2^-59.5
// (double). atan(-0) = -0. Error: 2.0 / 1.7 ulp.
template <class V> PYFLOWGEN_FORMULA V atan(V x) {
  V a = abs(x);
  V t = at_most(a, 1) / at_least(a, 1), z = t * t, tail;
  if constexpr (single<V>)
    tail = horner(z, -0.33333298563957214f, 0.1999852955341339f, -0.14264015853405f, 0.10950878262519836f,
                  -0.0839928537607193f, 0.05788065120577812f, -0.03109574317932129f, 0.010867682285606861f,
                  -0.00178250833414495f);
  else
    tail = horner(z, -0.33333333333333287, 0.19999999999990617, -0.14285714285041567, 0.11111111086445612,
                  -0.09090908544605013, 0.07692299649203944, -0.06666582934882985, 0.05881709647017643,
                  -0.05259395607298644, 0.047447600245212045, -0.04285841542922808, 0.03819603544541225,
                  -0.03275755126279729, 0.02610846960539452, -0.01856221008730898, 0.011269570222760575,
                  -0.00557888682875254, 0.002134582632919223, -0.0005869600471975236, 0.00010260010023232579,
                  -8.527974161421435e-06);
  V y = fma(t * z, tail, t);
  return with_sign_of(x, a > 1 ? Element<V>(1.57079632679489661923) - y : y);
}

// The standard normal distribution's Phi(x), and e^(-x^2/2).
template <class V> struct Normal { V cdf, bell; };

// Phi(-a) = e^(-a^2/2) p(q) / (1 + a) for a >= 0, q = (a - k) / (a + k); error of p 2^-26.1 (float), 2^-55.2 (double).
// a^2/2 is split into t and what rounding t leaves out: a's upper half squared is exact. Error of the
// cdf: 3.8 / 3.6 ulp.
template <class V> PYFLOWGEN_FORMULA Normal<V> normal(V x) {
  constexpr Element<V> half = 0.5, k = single<V> ? 4 : 6;
  constexpr Lane<V> lower_half = (Lane<V>(1) << (single<V> ? 12 : 27)) - 1;
  V a = at_most(abs(x), single<V> ? 15 : 39), p;
  V upper = bit_cast<V>(bit_cast<Bits<V>>(a) & ~(Bits<V>{} + lower_half));
  V square = half * upper * upper, rest = half * (a - upper) * (a + upper);
  V t = square + rest, left = (square - t) + rest;
  V e = exp_in_range(at_least(-t, exp_lowest<V>));
  e = fma(-e, left, e);
  V q = (a - k) / (a + k);
  if constexpr (single<V>)
    p = horner(q, 0.472053200006485f, -0.09670347720384598f, 0.014000090770423412f, 0.028600487858057022f,
               -0.03220316395163536f, 0.017932957038283348f, -0.00498223165050149f, -0.0002684409555513412f,
               0.0006741099059581757f, -0.00011438697401899844f, -9.486803173786029e-05f);
  else
    p = horner(q, 0.45345520027112796, -0.0850253623057707, 0.03981142456242683, -0.00437338677959595,
               -0.016141517332057008, 0.022592467062881844, -0.019766479222629245, 0.013246864152152999,
               -0.007059819394863694, 0.002935655538050905, -0.0008689948160953325, 0.00011948952374797402,
               3.7795429634074946e-05, -2.6352856104028564e-05, 4.411274547408162e-06, 1.782446479784095e-06,
               -9.98212226980031e-07, 1.671511423192584e-09, 1.31642567384161e-07, -2.181881865158489e-08,
               -1.5780026161361482e-08, 3.59170781101061e-09, 1.803838188253382e-09);
  V tail = e * (p / (a + 1));
  return {x < 0 ? tail : 1 - tail, e};
}
template <class V> PYFLOWGEN_FORMULA V normal_cdf(V x) { return normal(x).cdf; }

}  // namespace pyflowgen::PYFLOWGEN_ISA::formula
