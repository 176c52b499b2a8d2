// Sums of rows. Included only from *.simd.cpp.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"

namespace pyflowgen::PYFLOWGEN_ISA {

// A pack's lanes as doubles.
template <class T> struct Wide {
  static constexpr int parts = lanes<T> / lanes<double>;
  f64v part[parts] = {};
  PYFLOWGEN_INLINE void add(const Wide& other) {
    for (int i = 0; i < parts; ++i) part[i] += other.part[i];
  }
};
PYFLOWGEN_INLINE Wide<double> widen(f64v v) { return {{v}}; }
PYFLOWGEN_INLINE Wide<float> widen(f32v v) {
  f32h half[2];
  std::memcpy(half, &v, sizeof v);
  return {{__builtin_convertvector(half[0], f64v), __builtin_convertvector(half[1], f64v)}};
}
PYFLOWGEN_INLINE f64v narrow(const Wide<double>& v) { return v.part[0]; }
PYFLOWGEN_INLINE f32v narrow(const Wide<float>& v) {
  const f32h half[2] = {__builtin_convertvector(v.part[0], f32h), __builtin_convertvector(v.part[1], f32h)};
  f32v all;
  std::memcpy(&all, half, sizeof all);
  return all;
}

// sums[columns] (+)= the sum of rows, in double and by fours, fours of fours and so on: a gradient's components are
// often small against what they are the sum of.
template <class T> void add_rows(bool add, int64_t rows, int64_t columns, const T* dz, T* sums) {
  for (int64_t n = 0; n < columns; n += lanes<T>) {
    const int count = int(std::min<int64_t>(lanes<T>, columns - n));
    const auto row = [&](int64_t r) { return load_first<T>(dz + r * columns + n, count); };
    Wide<T> waiting[32];  // sums of 4, 8, 16, … rows, one for every bit of the number of fours so far
    int64_t fours = 0;
    for (; 4 * fours + 4 <= rows; ++fours) {
      Wide<T> sum = widen(row(4 * fours) + row(4 * fours + 1));
      sum.add(widen(row(4 * fours + 2) + row(4 * fours + 3)));
      int level = 0;
      for (int64_t bits = fours; bits & 1; bits >>= 1) sum.add(waiting[level++]);
      waiting[level] = sum;
    }
    Wide<T> total = widen(add ? load_first<T>(sums + n, count) : Pack<T>{});
    for (int64_t r = 4 * fours; r < rows; ++r) total.add(widen(row(r)));
    for (int level = 0; fours >> level; ++level)
      if (fours >> level & 1) total.add(waiting[level]);
    store_first<T>(sums + n, narrow(total), count);
  }
}

}  // namespace pyflowgen::PYFLOWGEN_ISA
