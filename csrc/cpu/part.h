// What couplings that transform a part of x share: cursors, masks and the copy of what is not transformed. `Options`
// has x's batch, channels and inner, and start, step and count of the transformed channels.
#pragma once

#include <type_traits>

#include "cpu/memory.h"
#include "strides.h"

namespace pyflowgen::PYFLOWGEN_ISA {

// Where a pack is read or written: its first element and the distance to the next.
template <class T> struct Cursor {
  T* p;
  int64_t stride;
  PYFLOWGEN_INLINE Cursor operator+(int64_t i) const { return {p + i * stride, stride}; }
};

// A byte for every lane of a pack of C.
typedef uint8_t bytes_for_float __attribute__((vector_size(lanes<float>)));
typedef uint8_t bytes_for_double __attribute__((vector_size(lanes<double>)));
template <class C> using BytesFor = std::conditional_t<sizeof(C) == sizeof(float), bytes_for_float, bytes_for_double>;

template <class C> PYFLOWGEN_INLINE auto load_mask(Cursor<const uint8_t> mask, int n) {
  using Int = decltype(Pack<C>{} < Pack<C>{});
  BytesFor<C> bytes{};
  if (mask.stride == 1 && n == lanes<C>) __builtin_memcpy(&bytes, mask.p, sizeof bytes);
  else
    for (int i = 0; i < n; ++i) bytes[i] = mask.p[i * mask.stride];
  return __builtin_convertvector(bytes, Int) != Int{};
}

template <class T>
PYFLOWGEN_INLINE void copy_strided(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n) {
  if (from == to) return;  // in place
  if (from_stride == 1 && to_stride == 1) {
    __builtin_memcpy(to, from, size_t(n) * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
  }
}

// Copy channels [first, last) of one row.
template <class T>
void copy_channels(const T* from, Strides f, T* to, Strides t, int64_t first, int64_t last, int64_t inner) {
  from += first * f.channel, to += first * t.channel;
  if (inner == 1) return copy_strided(from, f.channel, to, t.channel, last - first);
  if (f.channel == inner * f.inner && t.channel == inner * t.inner)
    return copy_strided(from, f.inner, to, t.inner, (last - first) * inner);
  for (int64_t c = first; c < last; ++c, from += f.channel, to += t.channel)
    copy_strided(from, f.inner, to, t.inner, inner);
}

// Copy what is not transformed. With a step the whole span is copied first and the transformed channels overwritten.
template <class T, class Options>
void copy_rest(const Options& o, const T* from, Strides f, T* to, Strides t, int64_t row) {
  if (o.count == o.channels) return;
  from += row * f.batch, to += row * t.batch;
  const int64_t end = o.start + (o.count - 1) * o.step + 1;
  if (o.step > 1) return copy_channels(from, f, to, t, 0, o.channels, o.inner);
  copy_channels(from, f, to, t, 0, o.start, o.inner);
  copy_channels(from, f, to, t, end, o.channels, o.inner);
}

// The same for rows [begin, end) of short events: along the batch, a copied element at a time.
template <class T, class Options>
void copy_rest_of_rows(const Options& o, const T* from, Strides f, T* to, Strides t, int64_t begin, int64_t end) {
  if (o.count == o.channels) return;
  for (int64_t c = 0; c < o.channels; ++c) {
    const int64_t k = c - o.start;
    if (k >= 0 && k % o.step == 0 && k / o.step < o.count) continue;
    for (int64_t i = 0; i < o.inner; ++i)
      copy_strided(from + begin * f.batch + c * f.channel + i * f.inner, f.batch,
                   to + begin * t.batch + c * t.channel + i * t.inner, t.batch, end - begin);
  }
}

}  // namespace pyflowgen::PYFLOWGEN_ISA
