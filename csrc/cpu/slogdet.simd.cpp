// slogdet on the CPU: Gaussian elimination with partial pivoting, the gradient by Gauss-Jordan elimination in place.
//
// Floor: forward reads n^2 elements a matrix, backward reads and writes as many; n^3 / 3 and n^3 multiply-adds. The
// kernels move just that, and compute in double whatever the storage: half the lanes of float, but a float32 result
// that errs by its own rounding alone.
//
// Small matrices: a matrix in every lane. A pack of them is transposed into packs of elements in L1; each lane has its
// own pivots, so rows are exchanged by blends, two for each element that one multiply-add updates. Larger ones: one
// matrix at a time, rows in packs. Pivots are sought along a row and columns exchanged, so search and update both run
// along memory; four pivots are eliminated within their own rows first, and the other rows updated once for all four.
#include "slogdet.h"

#include <type_traits>
#include <utility>

#include "cpu/memory.h"
#include "formula/slogdet.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

using V = Pack<double>;
inline constexpr int L = lanes<double>;
// Up to here a matrix has a lane of its own (forward, backward: as far as that measured faster); up to 8 all loops are
// unrolled and a column stays in registers.
inline constexpr int forward_in_lanes = 24, backward_in_lanes = 16, largest = int(slogdet_largest);

// ---------------------------------------------------------------------------------------- doubles from and to storage

typedef float f32half __attribute__((vector_size(vector_bytes / 2)));
typedef int32_t i32half __attribute__((vector_size(vector_bytes / 2)));

// L elements on their way between memory and doubles: doubles, or floats for all else.
template <class T> using Narrow = std::conditional_t<std::is_same_v<T, double>, V, f32half>;

template <class T> PYFLOWGEN_INLINE Narrow<T> load_narrow(const T* p) {
  Narrow<T> v;
  if constexpr (std::is_same_v<Compute<T>, T>) {
    __builtin_memcpy(&v, p, sizeof v);
  } else {
    T both[width<T>] = {};
    __builtin_memcpy(both, p, L * sizeof(T));
    const f32v wide = load_as(both);
    __builtin_memcpy(&v, &wide, sizeof v);
  }
  return v;
}
template <class T> PYFLOWGEN_INLINE Narrow<T> load_narrow(const T* p, int count) {
  if (count == L) return load_narrow(p);
  T buffer[L] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return load_narrow(buffer);
}
template <class T> PYFLOWGEN_INLINE void store_narrow(T* p, Narrow<T> v, int count) {
  T buffer[width<T>];
  if constexpr (std::is_same_v<Compute<T>, T>) {
    if (count == L) {
      __builtin_memcpy(p, &v, sizeof v);
      return;
    }
    __builtin_memcpy(buffer, &v, sizeof v);
  } else {
    f32v wide{};
    __builtin_memcpy(&wide, &v, sizeof v);
    store_as(buffer, wide);
  }
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}
PYFLOWGEN_INLINE V widen(f32half v) { return __builtin_convertvector(v, V); }
PYFLOWGEN_INLINE V widen(V v) { return v; }
template <class N> PYFLOWGEN_INLINE N narrow(V v) { return __builtin_convertvector(v, N); }

// r[i][j] and r[j][i] exchanged, L x L: halves, quarters, ... of the lanes change places.
template <int s = 1, class N> PYFLOWGEN_INLINE void transpose(N (&r)[L]) {
  if constexpr (s < L) {
    std::conditional_t<sizeof(N) == sizeof(V), i64v, i32half> low, high;
    for (int i = 0; i < L; ++i) {
      low[i] = i & s ? L + i - s : i;
      high[i] = i & s ? L + i : i + s;
    }
#pragma GCC unroll 8
    for (int i = 0; i < L; ++i) {
      if (i & s) continue;
      const N a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + s] = __builtin_shuffle(a, b, high);
    }
    transpose<2 * s>(r);
  }
}

// ------------------------------------------------------------------------------------------- a matrix in every lane

#if defined(__AVX512F__)
using Mask = __mmask8;
PYFLOWGEN_INLINE Mask above(V a, V b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
PYFLOWGEN_INLINE Mask equal(V a, V b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ); }
PYFLOWGEN_INLINE V select(Mask m, V a, V b) { return (V)_mm512_mask_blend_pd(m, (__m512d)b, (__m512d)a); }
PYFLOWGEN_INLINE i64v select(Mask m, i64v a, i64v b) {
  return (i64v)_mm512_mask_blend_epi64(m, (__m512i)b, (__m512i)a);
}
#else
using Mask = i64v;
PYFLOWGEN_INLINE Mask above(V a, V b) { return a > b; }
PYFLOWGEN_INLINE Mask equal(V a, V b) { return a == b; }
PYFLOWGEN_INLINE V select(Mask m, V a, V b) { return m ? a : b; }
PYFLOWGEN_INLINE i64v select(Mask m, i64v a, i64v b) { return m ? a : b; }
#endif

// The largest of |v[0]|, ..., |v[count - 1]|, by halves; a NaN may be lost.
template <int count> PYFLOWGEN_INLINE V largest_of(const V* v) {
  if constexpr (count == 1) return formula::abs(v[0]);
  else return formula::greater(largest_of<count / 2>(v), largest_of<count - count / 2>(v + count / 2));
}

// Pivot k of every lane: the largest of column k from row k on, the first of equals. exchanged[i]: the lanes whose rows
// k and i change places; in column[] they have done so. Returns the lanes that exchange nothing. A NaN is chosen only
// when there is nothing else, but a row that holds one makes NaN of all that follows.
template <int N, int K> PYFLOWGEN_INLINE Mask choose_pivot(int n, int k, V* column, Mask* exchanged) {
  const int size = N ? N : n, at = N ? K : k;
  V best;
  if constexpr (N > 0) {
    best = largest_of<N - K>(column + K);
  } else {
    best = formula::abs(column[at]);
    for (int i = at + 1; i < size; ++i) best = formula::greater(best, formula::abs(column[i]));
  }
  const Mask stays = equal(formula::abs(column[at]), best);
  const V first = column[at];
  Mask found = stays;
#pragma GCC unroll 8
  for (int i = at + 1; i < size; ++i) {
    const Mask same = equal(formula::abs(column[i]), best);
    exchanged[i] = same & ~found;
    found |= same;
    column[at] = select(exchanged[i], column[i], column[at]);
    column[i] = select(exchanged[i], first, column[i]);
  }
  return stays;
}

// Step k: exchange rows, then subtract multiples of row k from those below it (LU), or from all others (inverse). The
// pivot, negative where rows were exchanged: the determinant is the product of what all steps return.
template <bool inverse, int N, int K> PYFLOWGEN_INLINE V eliminate(int n, int k, V* m, i64v* order) {
  constexpr int most = N ? N : inverse ? backward_in_lanes : forward_in_lanes;
  const int size = N ? N : n, at = N ? K : k;
  V factor[most];
  Mask exchanged[most];
#pragma GCC unroll 8
  for (int i = inverse ? 0 : at; i < size; ++i) factor[i] = m[i * size + at];
  const Mask stays = choose_pivot<N, K>(n, k, factor, exchanged);
  const V pivot = factor[at];
  if constexpr (inverse) {
    const V d = 1 / pivot;
    // The next pivot's column first: its search need not wait for the others.
    for (int next = 1; next < size; ++next) {
      V* const column = m + (at + next < size ? at + next : at + next - size);
      const V first = column[at * size];
      V p = first;
#pragma GCC unroll 8
      for (int i = at + 1; i < size; ++i) p = select(exchanged[i], column[i * size], p);
      p *= d;
#pragma GCC unroll 8
      for (int i = 0; i < size; ++i) {
        if (i == at) continue;
        const V v = column[i * size];
        column[i * size] = formula::fma(-factor[i], p, i > at ? select(exchanged[i], first, v) : v);
      }
      column[at * size] = p;
    }
    const i64v first = order[at];
#pragma GCC unroll 8
    for (int i = at + 1; i < size; ++i) {
      order[at] = select(exchanged[i], order[i], order[at]);
      order[i] = select(exchanged[i], first, order[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i) m[i * size + at] = i == at ? d : -factor[i] * d;
  } else {
    const auto [scale, rest] = formula::reciprocal(pivot);
#pragma GCC unroll 8
    for (int i = at + 1; i < size; ++i) factor[i] = factor[i] * scale * -rest;
    for (int j = at + 1; j < size; ++j) {
      V* const column = m + j;
      const V first = column[at * size];
      V p = first;
#pragma GCC unroll 8
      for (int i = at + 1; i < size; ++i) p = select(exchanged[i], column[i * size], p);
#pragma GCC unroll 8
      for (int i = at + 1; i < size; ++i)
        column[i * size] = formula::fma(factor[i], p, select(exchanged[i], first, column[i * size]));
    }
  }
  return select(stays, pivot, -pivot);
}

struct LanesResult { V sign, logabs; };

template <bool inverse, int N, int... K>
PYFLOWGEN_INLINE LanesResult in_lanes(int n, V* m, i64v* order, std::integer_sequence<int, K...>) {
  formula::PivotProduct<V> product;
  const auto step = [&](V pivot) {
    if constexpr (!inverse) product.multiply(pivot);
  };
  if constexpr (N > 0) (step(eliminate<inverse, N, K>(N, K, m, order)), ...);
  else
    for (int k = 0; k < n; ++k) step(eliminate<inverse, 0, 0>(n, k, m, order));
  if constexpr (inverse) return {V{}, V{}};
  else return {product.sign(), product.logabs()};
}
// One function each, so that a step's code is there once and not for every storage type.
template <bool inverse, int N> __attribute__((noinline)) LanesResult in_lanes(int n, V* m, i64v* order) {
  return in_lanes<inverse, N>(n, m, order, std::make_integer_sequence<int, N>());
}
template <bool inverse> LanesResult in_lanes(int n, V* m, i64v* order) {
  switch (n) {
    case 1: return in_lanes<inverse, 1>(n, m, order);
    case 2: return in_lanes<inverse, 2>(n, m, order);
    case 3: return in_lanes<inverse, 3>(n, m, order);
    case 4: return in_lanes<inverse, 4>(n, m, order);
    case 5: return in_lanes<inverse, 5>(n, m, order);
    case 6: return in_lanes<inverse, 6>(n, m, order);
    case 7: return in_lanes<inverse, 7>(n, m, order);
    case 8: return in_lanes<inverse, 8>(n, m, order);
    default: return in_lanes<inverse, 0>(n, m, order);
  }
}

// Elements of L matrices into packs; lanes from `count` on get the first matrix once more.
template <class T> void load_lanes(const T* a, int64_t size, int count, V* m) {
  const T* from[L];
  for (int l = 0; l < L; ++l) from[l] = a + (l < count ? l : 0) * size;
  if (size < L) {
    for (int64_t e = 0; e < size; ++e) {
      T lane[L];
      for (int l = 0; l < L; ++l) lane[l] = from[l][e];
      m[e] = widen(load_narrow(lane));
    }
    return;
  }
  for (int64_t e = 0; e < size; e += L) {
    const int64_t at = e + L <= size ? e : size - L;  // the last block starts early rather than reach too far
    Narrow<T> block[L];
    for (int l = 0; l < L; ++l) block[l] = load_narrow(from[l] + at);
    transpose(block);
    for (int i = 0; i < L; ++i) m[at + i] = widen(block[i]);
  }
}

// The inverse of the matrix with rows exchanged, in m, has the columns of the inverse in another order: column j of m,
// times scale, is row order[j] of each lane's transposed inverse.
template <class T> void store_lanes(const V* m, int n, const i64v* order, V scale, int count, T* out) {
  for (int j = 0; j < n; ++j) {
    int64_t row[L];
    __builtin_memcpy(row, &order[j], sizeof row);
    for (int begin = 0; begin < n; begin += L) {
      const int many = n - begin < L ? n - begin : L;
      Narrow<T> block[L];
      for (int i = 0; i < L; ++i) block[i] = i < many ? narrow<Narrow<T>>(m[(begin + i) * n + j] * scale) : Narrow<T>{};
      transpose(block);
      for (int l = 0; l < count; ++l) store_narrow(out + (l * n + row[l]) * n + begin, block[l], many);
    }
  }
}

// ---------------------------------------------------------------------------------------------- one matrix at a time

typedef double aliasing_double __attribute__((may_alias));

// Rows of `packs` packs, zeros after the n-th column.
struct Matrix {
  int n, packs;
  V data[largest * ((largest + L - 1) / L)];
  int order[largest];  // column j was column order[j]

  V* row(int i) { return data + i * packs; }
  aliasing_double* at(int i) { return reinterpret_cast<aliasing_double*>(row(i)); }
};

// Lanes' numbers, as doubles: columns are compared as such.
PYFLOWGEN_INLINE V lane_numbers() {
  V v;
  for (int i = 0; i < L; ++i) v[i] = i;
  return v;
}
// Every lane gets the one value that `pick` leaves of all of them.
template <int s = L / 2, class F> PYFLOWGEN_INLINE V across(V v, const F& pick) {
  if constexpr (s == 0) return v;
  else {
    i64v index;
    for (int i = 0; i < L; ++i) index[i] = i ^ s;
    return across<s / 2>(pick(v, __builtin_shuffle(v, index)), pick);
  }
}

// Column of the largest entry of `row` from column k on, the first of equals; k itself where there are but NaN, which
// would leave the choice to columns done with or the zeros after the last.
PYFLOWGEN_INLINE int largest_entry(const V* row, int k, int n, int packs) {
  const int first = k / L;
  const V numbers = lane_numbers(), none = broadcast(double(largest));
  const V head = numbers < double(k - first * L) ? V{} - 1 : formula::abs(row[first]);
  V best = head;
  for (int c = first + 1; c < packs; ++c) best = formula::greater(formula::abs(row[c]), best);
  best = across(best, [](V a, V b) { return formula::greater(a, b); });
  V where = select(equal(head, best), numbers + double(first * L), none);
  for (int c = first + 1; c < packs; ++c)
    where = formula::lesser(where, select(equal(formula::abs(row[c]), best), numbers + double(c * L), none));
  const int column = int(across(where, [](V a, V b) { return formula::lesser(a, b); })[0]);
  return column >= k && column < n ? column : k;
}

// One element of a row by way of its whole pack: a pack loaded right after a part of it was stored would wait.
PYFLOWGEN_INLINE void set_entry(V* row, int column, double value) {
  V& pack = row[column / L];
  pack = lane_numbers() == double(column % L) ? broadcast(value) : pack;
}

// rows[j] -= sum_s factors[j][s] u[s], for R rows and packs from `first` on.
template <int R, int B>
PYFLOWGEN_INLINE void update_rows(V* const* rows, const double (*factors)[B], const V* const* u, int first, int packs) {
  V f[R][B];
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < B; ++s) f[r][s] = broadcast(-factors[r][s]);
  for (int c = first; c < packs; ++c) {
    V sum[R];
    for (int r = 0; r < R; ++r) sum[r] = rows[r][c];
    for (int s = 0; s < B; ++s) {
      const V v = u[s][c];
      for (int r = 0; r < R; ++r) sum[r] = formula::fma(f[r][s], v, sum[r]);
    }
    for (int r = 0; r < R; ++r) rows[r][c] = sum[r];
  }
}

// Pivots k, ..., k + B - 1: Gauss-Jordan elimination of their rows among themselves, then of their columns in the
// others: all others (inverse) or those below (LU).
template <bool inverse, int B> void eliminate_rows(Matrix& m, int k, formula::PivotProduct<double>& product) {
  const int first = inverse ? 0 : k / L;
  int exchanged[B];
  V* u[B];
  for (int s = 0; s < B; ++s) u[s] = m.row(k + s);
  for (int s = 0; s < B; ++s) {
    const int at = k + s, p = exchanged[s] = largest_entry(u[s], at, m.n, m.packs);
    const double pivot = m.at(at)[p];
    const auto [scale, rest] = inverse ? formula::Reciprocal<double>{1, 1 / pivot} : formula::reciprocal(pivot);
    if constexpr (!inverse) product.multiply(p == at ? pivot : -pivot);
    std::swap(m.order[at], m.order[p]);
    double factor[B];
    for (int q = 0; q < B; ++q) {
      aliasing_double* const row = m.at(k + q);
      const double was = row[at];
      factor[q] = row[p];
      set_entry(u[q], p, was);
      set_entry(u[q], at, q == s ? 1 : 0);
    }
    for (int c = first; c < m.packs; ++c) {
      const V v = u[s][c] = u[s][c] * scale * rest;
      for (int q = 0; q < B; ++q)
        if (q != s) u[q][c] = formula::fma(broadcast(-factor[q]), v, u[q][c]);
    }
  }
  // First the scalars of all rows, then the packs: a pack is not loaded right after a part of it was stored.
  double factors[largest][B];
  V* rows[largest];
  int count = 0;
  for (int j = inverse ? 0 : k + B; j < m.n; ++j) {
    if (j == k) j += B;
    if (j >= m.n) break;
    aliasing_double* const row = m.at(j);
    for (int s = 0; s < B; ++s) {
      const double was = row[k + s];
      row[k + s] = row[exchanged[s]], row[exchanged[s]] = was;
    }
    for (int s = 0; s < B; ++s) {
      factors[count][s] = row[k + s];
      row[k + s] = 0;
    }
    rows[count++] = m.row(j);
  }
  constexpr int R = vector_bytes == 64 ? 4 : 2;
  int j = 0;
  for (; j + R <= count; j += R) update_rows<R, B>(rows + j, factors + j, u, first, m.packs);
  for (; j < count; ++j) update_rows<1, B>(rows + j, factors + j, u, first, m.packs);
}

template <bool inverse> __attribute__((noinline)) formula::PivotProduct<double> in_rows(Matrix& m) {
  formula::PivotProduct<double> product;
  for (int i = 0; i < m.n; ++i) m.order[i] = i;
  int k = 0;
  for (; k + 4 <= m.n; k += 4) eliminate_rows<inverse, 4>(m, k, product);
  for (; k < m.n; ++k) eliminate_rows<inverse, 1>(m, k, product);
  return product;
}

template <class T> void load_rows(const T* a, Matrix& m) {
  for (int i = 0; i < m.n; ++i)
    for (int c = 0; c < m.packs; ++c)
      m.row(i)[c] = widen(load_narrow(a + i * m.n + c * L, m.n - c * L < L ? m.n - c * L : L));
}
// a transposed: the inverse of that is the transposed inverse, row by row.
template <class T> void load_columns(const T* a, Matrix& m) {
  for (int c = 0; c < m.packs; ++c)
    for (int begin = 0; begin < m.n; begin += L) {
      const int many = m.n - begin < L ? m.n - begin : L;
      Narrow<T> block[L];
      for (int l = 0; l < L; ++l)
        block[l] = c * L + l < m.n ? load_narrow(a + (c * L + l) * m.n + begin, many) : Narrow<T>{};
      transpose(block);
      for (int i = 0; i < many; ++i) m.row(begin + i)[c] = widen(block[i]);
    }
}
// The inverse of the matrix with columns exchanged has the rows of the inverse in another order.
template <class T> void store_rows(Matrix& m, double scale, T* out) {
  for (int i = 0; i < m.n; ++i)
    for (int c = 0; c < m.packs; ++c)
      store_narrow(out + m.order[i] * m.n + c * L, narrow<Narrow<T>>(m.row(i)[c] * scale),
                   m.n - c * L < L ? m.n - c * L : L);
}

}  // namespace

template <class T, class A> void slogdet(const SlogdetForward<T, A>& t, int64_t begin, int64_t end) {
  const int n = int(t.n);
  const int64_t size = t.n * t.n;
  if (n > forward_in_lanes) {
    Matrix m;
    m.n = n, m.packs = (n + L - 1) / L;
    for (int64_t b = begin; b < end; ++b) {
      load_rows(t.a + b * size, m);
      const auto product = in_rows<false>(m);
      t.sign[b] = A(product.sign()), t.logabsdet[b] = A(product.logabs());
    }
    return;
  }
  V m[forward_in_lanes * forward_in_lanes];
  for (int64_t b = begin; b < end; b += L) {
    const int count = int(end - b < L ? end - b : L);
    load_lanes(t.a + b * size, size, count, m);
    const LanesResult result = in_lanes<false>(n, m, nullptr);
    store_narrow(t.sign + b, narrow<Narrow<A>>(result.sign), count);
    store_narrow(t.logabsdet + b, narrow<Narrow<A>>(result.logabs), count);
  }
}

template <class T, class A> void slogdet_backward(const SlogdetBackward<T, A>& t, int64_t begin, int64_t end) {
  const int n = int(t.n);
  const int64_t size = t.n * t.n;
  const auto scale = [&](int64_t b) { return double(t.dlogabsdet[b * t.dlogabsdet_stride]); };
  if (n > backward_in_lanes) {
    Matrix m;
    m.n = n, m.packs = (n + L - 1) / L;
    for (int64_t b = begin; b < end; ++b) {
      load_columns(t.a + b * size, m);
      in_rows<true>(m);
      store_rows(m, scale(b), t.da + b * size);
    }
    return;
  }
  V m[backward_in_lanes * backward_in_lanes];
  i64v order[backward_in_lanes];
  for (int64_t b = begin; b < end; b += L) {
    const int count = int(end - b < L ? end - b : L);
    load_lanes(t.a + b * size, size, count, m);
    for (int i = 0; i < n; ++i) order[i] = i64v{} + i;
    in_lanes<true>(n, m, order);
    V scales{};
    for (int l = 0; l < count; ++l) scales[l] = scale(b + l);
    store_lanes(m, n, order, scales, count, t.da + b * size);
  }
}

#define INSTANTIATE(T, A) \
  template void slogdet<T, A>(const SlogdetForward<T, A>&, int64_t, int64_t); \
  template void slogdet_backward<T, A>(const SlogdetBackward<T, A>&, int64_t, int64_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(bf16, float)
INSTANTIATE(f16, float)

}  // namespace pyflowgen::PYFLOWGEN_ISA
