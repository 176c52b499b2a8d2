// linear on the CPU: the products of gemm.h and their epilogues.
#include "linear.h"

#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

template <class T> struct Store {  // out[rows][stride] = C + bias
  T* out;
  int64_t stride;
  const T* bias = nullptr;
  PYFLOWGEN_INLINE void operator()(int64_t m, int64_t n, Pack<T> v, int count) const {
    if (bias) v += load_first<T>(bias + n, count);
    store_first<T>(out + m * stride + n, v, count);
  }
  PYFLOWGEN_INLINE Target<T> target(int64_t m, int64_t n) const {
    return {out + m * stride + n, stride, bias ? bias + n : nullptr};
  }
};

template <Activation kind, class T> struct StoreActivated {
  const LinearForward<T>& o;
  PYFLOWGEN_INLINE void operator()(int64_t m, int64_t n, Pack<T> v, int count) const {
    if (o.bias) v += load_first<T>(o.bias + n, count);
    if (o.before) store_first<T>(o.before + m * o.out + n, v, count);
    store_first<T>(o.y + m * o.out + n, activate<kind>(v), count);
  }
  PYFLOWGEN_INLINE Target<T> target(int64_t m, int64_t n) const
    requires(kind == Activation::relu)  // which keeps its result, not its argument
  {
    return {o.y + m * o.out + n, o.out, o.bias ? o.bias + n : nullptr, 0, Finish::add_relu};
  }
};

template <class T> struct StoreTransposed {
  T* out;
  int64_t stride;
  PYFLOWGEN_INLINE void operator()(int64_t m, int64_t n, Pack<T> v, int count) const {
    for (int i = 0; i < count; ++i) out[(n + i) * stride + m] = v[i];
  }
};

// Columns whose bias gradient one task sums.
inline constexpr int dbias_packs = 4;
template <class T> inline constexpr int64_t dbias_columns = dbias_packs * lanes<T>;

// total = sum of rows begin <= m < end, halves summed by themselves: the error grows with the logarithm of their
// number.
template <class T>
void sum_rows(const T* dy, int64_t stride, int64_t begin, int64_t end, const int* count, Pack<T>* total) {
  if (end - begin > 16) {
    Pack<T> half[dbias_packs];
    const int64_t middle = begin + (end - begin) / 2;
    sum_rows<T>(dy, stride, begin, middle, count, total);
    sum_rows<T>(dy, stride, middle, end, count, half);
    for (int v = 0; v < dbias_packs; ++v) total[v] += half[v];
    return;
  }
  Pack<T> sum[dbias_packs] = {};
  for (int64_t m = begin; m < end; ++m)
    for (int v = 0; v < dbias_packs; ++v)
      if (count[v]) sum[v] += load_first<T>(dy + m * stride + v * lanes<T>, count[v]);
  for (int v = 0; v < dbias_packs; ++v) total[v] = sum[v];
}

template <class T> PYFLOWGEN_INLINE GemmPlan dx_plan(const LinearBackward<T>& o) {
  return gemm_plan<T>(o.batch, o.in, o.out, o.threads);
}
// dweight, or its transpose when that pads fewer columns (in of 1, 2, 3: the first layer of a flow on vectors).
template <class T> PYFLOWGEN_INLINE bool dweight_transposed(const LinearBackward<T>& o) {
  return o.out * gemm_panels<T>(o.in) > o.in * gemm_panels<T>(o.out);
}
template <class T> PYFLOWGEN_INLINE GemmPlan dweight_plan(const LinearBackward<T>& o) {
  return dweight_transposed(o) ? gemm_plan<T>(o.in, o.out, o.batch, o.threads)
                               : gemm_plan<T>(o.out, o.in, o.batch, o.threads);
}
template <class T> PYFLOWGEN_INLINE GemmPlan forward_plan(const LinearForward<T>& o) {
  return gemm_plan<T>(o.batch, o.out, o.in, o.threads);
}

}  // namespace

template <class T> int64_t linear_packed_size(int64_t in, int64_t out) {
  return gemm_panels<T>(out) * in * tile_columns<T>;
}
template <class T> int64_t linear_pack_tasks(int64_t out) { return gemm_panels<T>(out); }
template <class T> void linear_pack(int64_t in, int64_t out, const T* weight, T* packed, int64_t begin, int64_t end) {
  constexpr int64_t width = tile_columns<T>;
  for (int64_t p = begin; p < end; ++p)
    gemm_pack<T>(int(std::min(width, out - p * width)), in, weight + p * width * in, 1, in, packed + p * width * in);
}

template <class T> bool linear_pack_matches(int64_t in, int64_t out, const T* weight, const T* packed) {
  constexpr int64_t width = tile_columns<T>, samples = 16;
  for (int64_t i = 0, size = in * out; size && i < samples; ++i) {
    const int64_t at = (size - 1) * i / (samples - 1), n = at / in, k = at % in;
    if (std::memcmp(weight + at, packed + (n / width * in + k) * width + n % width, sizeof(T))) return false;
  }
  return true;
}

template <class T> int64_t linear_tasks(const LinearForward<T>& o) { return forward_plan(o).tasks(); }

template <class T> void linear(const LinearForward<T>& o, int64_t begin, int64_t end) {
  const auto product = [&](const auto& epilogue) {
    const GemmPlan plan = forward_plan(o);
    if (o.packed) gemm<T>(plan, o.x, o.x_stride, 1, PackedPanels<T>{o.packed, o.in}, begin, end, epilogue);
    else gemm<T>(plan, o.x, o.x_stride, 1, StridedMatrix<T>{o.weight, 1, o.in}, begin, end, epilogue);
  };
  if (o.activation == Activation::none && !o.before) return product(Store<T>{o.y, o.out, o.bias});
  for_kind(o.activation, [&]<Activation kind>() { product(StoreActivated<kind, T>{o}); });
}

template <class T>
void linear_activation_backward(Activation activation, int64_t count, const T* dy, const T* saved, T* dz) {
  for_kind(activation, [&]<Activation kind>() {
    for (int64_t i = 0; i < count; i += lanes<T>) {
      const int n = int(std::min<int64_t>(lanes<T>, count - i));
      store_first<T>(dz + i, activate_backward<kind>(load_first<T>(dy + i, n), load_first<T>(saved + i, n)), n);
    }
  });
}

template <class T> int64_t linear_dx_tasks(const LinearBackward<T>& o) { return dx_plan(o).tasks(); }
template <class T> void linear_dx(const LinearBackward<T>& o, int64_t begin, int64_t end) {
  gemm<T>(dx_plan(o), o.dy, o.out, 1, StridedMatrix<T>{o.weight, o.in, 1}, begin, end, Store<T>{o.dx, o.in});
}

template <class T> int64_t linear_dweight_tasks(const LinearBackward<T>& o) { return dweight_plan(o).tasks(); }
template <class T> void linear_dweight(const LinearBackward<T>& o, int64_t begin, int64_t end) {
  if (dweight_transposed(o))
    gemm<T>(dweight_plan(o), o.x, 1, o.x_stride, StridedMatrix<T>{o.dy, o.out, 1}, begin, end,
            StoreTransposed<T>{o.dweight, o.in});
  else
    gemm<T>(dweight_plan(o), o.dy, 1, o.out, StridedMatrix<T>{o.x, o.x_stride, 1}, begin, end,
            Store<T>{o.dweight, o.in});
}

template <class T> int64_t linear_dbias_tasks(const LinearBackward<T>& o) { return ceil_div(o.out, dbias_columns<T>); }
template <class T> void linear_dbias(const LinearBackward<T>& o, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t left = task * dbias_columns<T>;
    int count[dbias_packs];
    for (int v = 0; v < dbias_packs; ++v) count[v] = int(std::clamp<int64_t>(o.out - left - v * lanes<T>, 0, lanes<T>));
    Pack<T> total[dbias_packs];
    sum_rows<T>(o.dy + left, o.out, 0, o.batch, count, total);
    for (int v = 0; v < dbias_packs; ++v) store_first<T>(o.dbias + left + v * lanes<T>, total[v], count[v]);
  }
}

#define INSTANTIATE(T) \
  template int64_t linear_packed_size<T>(int64_t, int64_t); \
  template int64_t linear_pack_tasks<T>(int64_t); \
  template void linear_pack<T>(int64_t, int64_t, const T*, T*, int64_t, int64_t); \
  template bool linear_pack_matches<T>(int64_t, int64_t, const T*, const T*); \
  template int64_t linear_tasks<T>(const LinearForward<T>&); \
  template void linear<T>(const LinearForward<T>&, int64_t, int64_t); \
  template void linear_activation_backward<T>(Activation, int64_t, const T*, const T*, T*); \
  template int64_t linear_dx_tasks<T>(const LinearBackward<T>&); \
  template void linear_dx<T>(const LinearBackward<T>&, int64_t, int64_t); \
  template int64_t linear_dweight_tasks<T>(const LinearBackward<T>&); \
  template void linear_dweight<T>(const LinearBackward<T>&, int64_t, int64_t); \
  template int64_t linear_dbias_tasks<T>(const LinearBackward<T>&); \
  template void linear_dbias<T>(const LinearBackward<T>&, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace pyflowgen::PYFLOWGEN_ISA
