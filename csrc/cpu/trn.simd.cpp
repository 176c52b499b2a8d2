// trn on the CPU: the cells, and what relu and mean ask for between linear's products.
#include "trn.h"

#include "cpu/gemm.h"
#include "cpu/memory.h"
#include "formula/lstm.h"

namespace pyflowgen::PYFLOWGEN_ISA {

template <class T> void trn_cell(const TrnCell<T>& o, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* gates = o.gates + row * 4 * o.hidden;
    const T* given = o.given ? o.given + row * 4 * o.hidden : nullptr;
    for (int64_t j = 0; j < o.hidden; j += lanes<T>) {
      const int count = int(std::min<int64_t>(lanes<T>, o.hidden - j));
      Pack<T> a[4];
      for (int gate = 0; gate < 4; ++gate) {
        a[gate] = load_first<T>(gates + gate * o.hidden + j, count);
        if (given) a[gate] += load_first<T>(given + gate * o.hidden + j, count);
      }
      const auto u = formula::lstm(a[0], a[1], a[2], a[3], load_first<T>(o.c + row * o.hidden + j, count));
      const Pack<T> values[4] = {u.i, u.f, u.g, u.o};
      for (int gate = 0; gate < 4; ++gate) store_first<T>(gates + gate * o.hidden + j, values[gate], count);
      store_first<T>(o.c_next + row * o.hidden + j, u.c, count);
      store_first<T>(o.h_next + row * o.hidden + j, u.h, count);
    }
  }
}

template <class T> void trn_cell_backward(const TrnCellBackward<T>& o, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t j = 0; j < o.hidden; j += lanes<T>) {
      const int count = int(std::min<int64_t>(lanes<T>, o.hidden - j));
      const int64_t at = row * o.hidden + j, gates = row * 4 * o.hidden + j;
      Pack<T> v[4];
      for (int gate = 0; gate < 4; ++gate) v[gate] = load_first<T>(o.gates + gates + gate * o.hidden, count);
      const auto d = formula::lstm_backward(v[0], v[1], v[2], v[3], load_first<T>(o.c_next + at, count),
                                            load_first<T>(o.c + at, count), load_first<T>(o.dh + at, count),
                                            load_first<T>(o.dc + at, count));
      const Pack<T> slopes[4] = {d.di, d.df, d.dg, d.d_o};
      for (int gate = 0; gate < 4; ++gate) store_first<T>(o.dgates + gates + gate * o.hidden, slopes[gate], count);
      store_first<T>(o.dc + at, d.before, count);
    }
}

template <class T> void trn_relu_backward(int64_t count, const T* y, const T* dy, T scale, T* dz) {
  for (int64_t i = 0; i < count; ++i) dz[i] = y[i] <= 0 ? T(0) : dy[i] * scale;
}

template <class T> void trn_add(int64_t count, T scale, const T* from, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += scale * from[i];
}

template <class T> void trn_mean(int64_t parts, int64_t count, const T* in, int64_t stride, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i];
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < count; ++i) out[i] += in[part * stride + i];
  for (int64_t i = 0; i < count; ++i) out[i] /= T(parts);
}

#define PYFLOWGEN_TRN(T) \
  template void trn_cell<T>(const TrnCell<T>&, int64_t, int64_t); \
  template void trn_cell_backward<T>(const TrnCellBackward<T>&, int64_t, int64_t); \
  template void trn_relu_backward<T>(int64_t, const T*, const T*, T, T*); \
  template void trn_add<T>(int64_t, T, const T*, T*); \
  template void trn_mean<T>(int64_t, int64_t, const T*, int64_t, T*);
PYFLOWGEN_TRN(float)
PYFLOWGEN_TRN(double)

}  // namespace pyflowgen::PYFLOWGEN_ISA
