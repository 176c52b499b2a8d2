// Loads and stores of one element or of 16 bytes, and the 16-bit storage types to and from float.
#pragma once

#include "cuda/launch.cuh"
#include "storage.h"
#include "strides.h"

namespace pyflowgen::cuda {

// The type a storage type is computed in.
template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
template <class T> using Compute = typename ComputeOf<T>::type;

// Elements of a 128-bit access.
template <class T> inline constexpr int full_width = 16 / int(sizeof(T));

__device__ __forceinline__ uint32_t bits_of(float v) {
  uint32_t b;
  memcpy(&b, &v, 4);
  return b;
}
__device__ __forceinline__ float float_of(uint32_t b) {
  float v;
  memcpy(&v, &b, 4);
  return v;
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return float_of(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float widen(f16 v) {
  // The product also makes denormals normal; inf and NaN get the exponent it cannot give them.
  const float magnitude = float_of(uint32_t(v.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (v.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return float_of(bits_of(magnitude) | special | uint32_t(v.bits & 0x8000) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(double v, double& to) { to = v; }
__device__ __forceinline__ void narrow(float v, bf16& to) {
  const uint32_t b = bits_of(v);
  to.bits = uint16_t(v != v ? 0x7fc0u : (b + 0x7fffu + (b >> 16 & 1)) >> 16);
}
__device__ __forceinline__ void narrow(float v, f16& to) {
  const uint32_t sign = bits_of(v) & 0x80000000u, b = bits_of(v) ^ sign;
  uint32_t h;
  if (b >= 0x47800000u) h = b > 0x7f800000u ? 0x7e00u : 0x7c00u;            // 2^16 and above, inf, NaN
  else if (b < 0x38800000u) h = bits_of(float_of(b) + 0.5f) - 0x3f000000u;  // below 2^-14: the addition rounds
  else h = (b - 0x38000000u + 0xfffu + (b >> 13 & 1)) >> 13;                // a carry into the exponent is right
  to.bits = uint16_t(h | sign >> 16);
}

template <class T, int W> struct alignas(sizeof(T) * W) Vector { T at[W]; };

// W elements side by side; p on a boundary of the whole vector.
template <int W, class T> __device__ __forceinline__ Vector<T, W> load(const T* p) {
  return *reinterpret_cast<const Vector<T, W>*>(p);
}
template <int W, class T> __device__ __forceinline__ void store(T* p, const Vector<T, W>& v) {
  *reinterpret_cast<Vector<T, W>*>(p) = v;
}

// A tensor seen as (batch, channels, inner).
template <class T> struct View {
  T* p;
  Strides s;
  __device__ __forceinline__ T* at(int64_t row, int64_t channel, int64_t inner) const {
    return p + row * s.batch + channel * s.channel + inner * s.inner;
  }
};

}  // namespace pyflowgen::cuda
