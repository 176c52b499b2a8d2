// mlp_coupling on the CPU: the products of gemm.h, block after block, and the transform's own kernel on each block.
//
// Floor: 2 n operations forward and 4 n backward for n = rows * sum of in * out multiply-adds, at the rate of the
// register tile; the rest (packing the weights once a thread, the transform, gradients' sums) is a few percent of that
// from 2^15 weights and some hundred rows on.
#include "mlp_coupling.h"

#include "cpu/activation.h"
#include "cpu/gemm.h"
#include "cpu/sums.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

template <class T> constexpr int64_t padded(int64_t columns) { return gemm_panels<T>(columns) * tile_columns<T>; }

// Rows of a block of the backward pass: its gradients and the weights' sums are to fit the second-level cache together.
constexpr int64_t group_rows = 256;
template <class T> int64_t widest(const MlpCoupling<T>& o) {
  int64_t size = 0;
  for (int64_t i = 0; i < o.layers; ++i) size = std::max({size, o.in[i], o.out[i]});
  return size;
}
// Columns of all that is saved.
template <class T> int64_t saved_columns(const MlpCoupling<T>& o) {
  int64_t columns = 0;
  for (int64_t i = 0; i < o.layers; ++i) columns += o.saved_columns(i);
  return columns;
}
template <class T> int64_t backward_rows(const MlpCoupling<T>& o) {
  int64_t rows = group_rows;
  if (!o.saved)
    while (rows > 64 && rows * saved_columns(o) * int64_t(sizeof(T)) > 192 << 10) rows /= 2;
  while (rows > 64 && rows * widest(o) * int64_t(sizeof(T)) > 192 << 10) rows /= 2;
  return rows;
}

template <class T> int64_t panels_size(const MlpCoupling<T>& o, bool transposed) {
  int64_t size = 0;
  for (int64_t i = 0; i < o.layers; ++i)
    size += transposed ? padded<T>(o.in[i]) * o.out[i] : padded<T>(o.out[i]) * o.in[i];
  return size;
}

// Every weight in panels, for the products with W^T (forward) or W.
template <class T> void pack_weights(const MlpCoupling<T>& o, bool transposed, T* panels, const T** packed) {
  constexpr int64_t width = tile_columns<T>;
  for (int64_t i = 0; i < o.layers; ++i) {
    const int64_t in = o.in[i], out = o.out[i], columns = transposed ? in : out, depth = transposed ? out : in;
    packed[i] = panels;
    for (int64_t n = 0; n < columns; n += width, panels += depth * width)
      gemm_pack<T>(int(std::min(width, columns - n)), depth, o.weight[i] + (transposed ? n : n * in),
                   transposed ? in : 1, transposed ? 1 : in, panels);
  }
}

// C[rows][columns] = A B through the epilogue, all tasks at once.
template <class T, class Epilogue> void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row,
                                                const T* packed, const Epilogue& epilogue) {
  const GemmPlan plan = gemm_plan<T>(rows, columns, depth, 1);
  gemm<T>(plan, a, a_row, 1, PackedPanels<T>{packed, depth}, 0, plan.tasks(), epilogue);
}

// activated[rows][stride] = phi(C + bias), and kept the argument of phi where that is what the backward pass wants.
template <Activation kind, class T> struct StoreHidden {
  const T* bias;
  T* activated;
  T* kept;  // or null
  int64_t stride;
  PYFLOWGEN_INLINE void operator()(int64_t m, int64_t n, Pack<T> v, int count) const {
    if (bias) v += load_first<T>(bias + n, count);
    if (kept) store_first<T>(kept + m * stride + n, v, count);
    store_first<T>(activated + m * stride + n, activate<kind>(v), count);
  }
  PYFLOWGEN_INLINE Target<T> target(int64_t m, int64_t n) const
    requires(kind == Activation::relu)
  {
    return {activated + m * stride + n, stride, bias ? bias + n : nullptr, 0, Finish::add_relu};
  }
};

template <class T> struct StoreRows {
  T* out;
  int64_t stride;
  const T* bias;
  PYFLOWGEN_INLINE void operator()(int64_t m, int64_t n, Pack<T> v, int count) const {
    if (bias) v += load_first<T>(bias + n, count);
    store_first<T>(out + m * stride + n, v, count);
  }
  PYFLOWGEN_INLINE Target<T> target(int64_t m, int64_t n) const {
    return {out + m * stride + n, stride, bias ? bias + n : nullptr};
  }
};

// dz[rows][stride] = C * phi'(kept)
template <Activation kind, class T> struct StoreHiddenGradient {
  const T* kept;
  T* dz;
  int64_t stride;
  PYFLOWGEN_INLINE void operator()(int64_t m, int64_t n, Pack<T> v, int count) const {
    store_first<T>(dz + m * stride + n, activate_backward<kind>(v, load_first<T>(kept + m * stride + n, count)), count);
  }
  PYFLOWGEN_INLINE Target<T> target(int64_t m, int64_t n) const
    requires(kind == Activation::relu)
  {
    return {dz + m * stride + n, stride, kept + m * stride + n, stride, Finish::relu_backward};
  }
};

// after[rows][stride] = before + (C + bias) * factor; C + bias goes to kept. Null: no factor, not kept. after may be
// before.
template <class T> struct StoreResidual {
  const T *bias, *before, *factor;
  T *kept, *after;
  int64_t stride;
  PYFLOWGEN_INLINE void operator()(int64_t m, int64_t n, Pack<T> v, int count) const {
    const int64_t at = m * stride + n;
    if (bias) v += load_first<T>(bias + n, count);
    if (kept) store_first<T>(kept + at, v, count);
    if (factor) v *= load_first<T>(factor + at, count);
    store_first<T>(after + at, load_first<T>(before + at, count) + v, count);
  }
};

// A block of rows, as a step takes them.
template <class T> struct Block {
  int64_t first, rows;
  const T* x;
  int64_t stride;
};

template <class T> PYFLOWGEN_INLINE bool prepares(const MlpCoupling<T>& o) { return o.index || o.scale; }

// The rows after permutation, scale and shift: in `space`, or where they are when there is nothing to do.
template <class T> Block<T> prepare(const MlpCoupling<T>& o, int64_t first, int64_t rows, T* space) {
  const T* x = o.x + first * o.x_stride;
  if (!prepares(o)) return {first, rows, x, o.x_stride};
  T* to = space;
  for (int64_t r = 0; r < rows; ++r, x += o.x_stride, to += o.channels) {
    if (o.index)
      for (int64_t k = 0; k < o.channels; ++k) to[k] = x[o.index[k]];
    else std::copy_n(x, o.channels, to);
    if (!o.scale) continue;
    for (int64_t k = 0; k < o.channels; k += lanes<T>) {
      const int count = int(std::min<int64_t>(lanes<T>, o.channels - k));
      const Pack<T> u = load_first<T>(to + k, count), scale = load_first<T>(o.scale + k, count),
                    shift = o.shift ? load_first<T>(o.shift + k, count) : Pack<T>{};
      store_first<T>(to + k, o.shift_first ? (u + shift) * scale : fma(u, scale, shift), count);
    }
  }
  return {first, rows, space, o.channels};
}

// The conditioner's input, [rows][in[0]].
template <class T> void gather(const MlpCoupling<T>& o, const Block<T>& block, T* input) {
  for (int64_t r = 0; r < block.rows; ++r, input += o.in[0]) {
    const T* x = block.x + r * block.stride + o.same_start;
    if (o.mask)
      for (int64_t k = 0; k < o.same_count; ++k) input[k] = o.mask[k] ? T(0) : x[k];
    else if (o.same_step == 1) std::copy_n(x, o.same_count, input);
    else
      for (int64_t k = 0; k < o.same_count; ++k) input[k] = x[k * o.same_step];
    if (o.context_size)
      std::copy_n(o.context + (block.first + r) * o.context_stride, o.context_size, input + o.same_count);
  }
}

template <class T> Strides parameter_strides(const MlpCoupling<T>& o) {
  return {o.parameters(), o.parameter_stride, 0};
}

template <class Options> Options of_rows(Options options, int64_t rows) {
  options.batch = rows;
  return options;
}

// A channel's widths, heights or derivatives, behind as many of its parameters.
template <class T, class P> SplineParameters<P> behind(const MlpCoupling<T>& o, P* parameters, int64_t before) {
  return {parameters + before, parameter_strides(o), 1};
}

template <class T> void transform(const MlpCoupling<T>& o, const Block<T>& block, const T* parameters, T* logdet) {
  const Strides x{block.stride, 1, 0}, y{o.channels, 1, 0}, mask{0, 1, 0}, by_parameter = parameter_strides(o);
  T* const to = o.y + block.first * o.channels;
  if (o.spline)
    rational_quadratic_spline<T, T>({of_rows(o.s, block.rows),
                                     block.x,
                                     x,
                                     behind(o, parameters, 0),
                                     behind(o, parameters, o.s.bins),
                                     behind(o, parameters, 2 * o.s.bins),
                                     nullptr,
                                     {},
                                     nullptr,
                                     {},
                                     o.mask,
                                     mask,
                                     to,
                                     y,
                                     logdet},
                                    0, block.rows, nullptr);
  else
    affine_coupling<T, T>(
        {of_rows(o.o, block.rows), block.x, x, parameters, by_parameter,
         o.log_scale_offset ? parameters + o.log_scale_offset : nullptr, by_parameter, o.mask, mask, to, y, logdet},
        0, block.rows, nullptr);
}

// dx[rows][channels] and dparameters[rows][parameters]
template <class T> void transform_backward(const MlpCouplingBackward<T>& b, const Block<T>& block, const T* parameters,
                                           T* dx, T* dparameters) {
  const MlpCoupling<T>& o = b.forward;
  const Strides x{block.stride, 1, 0}, out{o.channels, 1, 0}, mask{0, 1, 0}, by_parameter = parameter_strides(o);
  const T* const dy = b.dy + block.first * b.dy_strides.batch;
  const T* const dlogdet = b.dlogdet + block.first * b.dlogdet_stride;
  const int64_t bins = o.s.bins, offset = o.log_scale_offset;
  if (o.spline)
    rational_quadratic_spline_backward<T, T>({of_rows(o.s, block.rows),
                                              dy,
                                              b.dy_strides,
                                              dlogdet,
                                              b.dlogdet_stride,
                                              block.x,
                                              x,
                                              behind(o, parameters, 0),
                                              behind(o, parameters, bins),
                                              behind(o, parameters, 2 * bins),
                                              nullptr,
                                              {},
                                              nullptr,
                                              {},
                                              o.mask,
                                              mask,
                                              dx,
                                              out,
                                              behind(o, dparameters, 0),
                                              behind(o, dparameters, bins),
                                              behind(o, dparameters, 2 * bins)},
                                             0, block.rows, false);
  else
    affine_coupling_backward<T, T>(
        {of_rows(o.o, block.rows), dy, b.dy_strides, dlogdet, b.dlogdet_stride, block.x, x, parameters, by_parameter,
         offset ? parameters + offset : nullptr, by_parameter, o.mask, mask, dx, out, dparameters, by_parameter,
         offset ? dparameters + offset : nullptr, by_parameter},
        0, block.rows, false);
}

// The gradient of a weight, or its transpose when that pads fewer columns.
template <class T> PYFLOWGEN_INLINE bool sums_transposed(int64_t in, int64_t out) {
  return out * gemm_panels<T>(in) > in * gemm_panels<T>(out);
}
template <class T> int64_t weight_sums(int64_t in, int64_t out) {
  return sums_transposed<T>(in, out) ? in * padded<T>(out) : out * padded<T>(in);
}

// sums[height][padded(columns)] (+)= a[rows][a_stride]^T b[rows][b_stride]
template <class T> void add_outer(bool add, int64_t rows, int64_t height, int64_t columns, const T* a, int64_t a_stride,
                                  const T* b, int64_t b_stride, T* sums, T* buffer) {
  constexpr int64_t width = tile_columns<T>;
  const int64_t stride = padded<T>(columns), steps = ceil_div(height, tile_rows<T>);
  for (int64_t n = 0; n < columns; n += width) {
    const int used = int(std::min(width, columns - n));
    gemm_pack<T>(used, rows, b + n, b_stride, 1, buffer);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t m = part_start(height, steps, t), count = part_start(height, steps, t + 1) - m;
      T* tile = sums + m * stride + n;
      gemm_tile<T>(int(count), used, rows, a + m, 1, a_stride, buffer, add ? tile : nullptr, stride, tile, stride);
    }
  }
}

// dx[rows][channels] += and dcontext (+)= the gradient of the conditioner's input; of_gates, [rows][context_size] or
// null, is dcontext's too.
template <class T>
void scatter(const MlpCouplingBackward<T>& b, const Block<T>& block, const T* dinput, const T* of_gates, T* dx_rows) {
  const MlpCoupling<T>& o = b.forward;
  for (int64_t r = 0; r < block.rows; ++r, dinput += o.in[0]) {
    T* dx = dx_rows + r * o.channels + o.same_start;
    if (o.mask)
      for (int64_t k = 0; k < o.same_count; ++k) dx[k] += o.mask[k] ? T(0) : dinput[k];
    else if (o.same_step == 1)
      for (int64_t k = 0; k < o.same_count; ++k) dx[k] += dinput[k];
    else
      for (int64_t k = 0; k < o.same_count; ++k) dx[k * o.same_step] += dinput[k];
    if (!b.dcontext) continue;
    T* dcontext = b.dcontext + (block.first + r) * o.context_size;
    if (b.add_dcontext)
      for (int64_t k = 0; k < o.context_size; ++k) dcontext[k] += dinput[o.same_count + k];
    else std::copy_n(dinput + o.same_count, o.context_size, dcontext);
    if (of_gates)
      for (int64_t k = 0; k < o.context_size; ++k) dcontext[k] += of_gates[r * o.context_size + k];
  }
}

template <class T> constexpr int64_t in_packs(int64_t n) { return (n + lanes<T> - 1) / lanes<T> * lanes<T>; }

// Sums of a step's scale and shift: for each channel of both, and of dlogdet.
template <class T> int64_t prepare_sums(const MlpCoupling<T>& o) {
  return o.scale ? 2 * in_packs<T>(o.channels) + lanes<T> : 0;
}

// Through permutation, scale and shift: dx of the step's input from dv[rows][channels], the gradient of what they gave;
// dv and `space`, of the same size, are used up.
template <class T> void prepare_backward(const MlpCouplingBackward<T>& b, int64_t first, int64_t rows, T* dv, T* space,
                                         bool add, T* sums) {
  const MlpCoupling<T>& o = b.forward;
  const int64_t channels = o.channels, stride = in_packs<T>(channels);
  const bool learns = o.scale && b.need_parameters;
  if (learns && o.shift && !o.shift_first) add_rows<T>(add, rows, channels, dv, sums + stride);
  for (int64_t r = 0; o.scale && r < rows; ++r) {
    const T* x = o.x + (first + r) * o.x_stride;
    T *du = dv + r * channels, *u = space + r * channels;
    if (o.index)
      for (int64_t k = 0; k < channels; ++k) u[k] = x[o.index[k]];
    else std::copy_n(x, channels, u);
    for (int64_t k = 0; k < channels; k += lanes<T>) {
      const int count = int(std::min<int64_t>(lanes<T>, channels - k));
      Pack<T> v = load_first<T>(u + k, count);
      if (o.shift_first && o.shift) v += load_first<T>(o.shift + k, count);
      const Pack<T> d = load_first<T>(du + k, count) * load_first<T>(o.scale + k, count);
      store_first<T>(du + k, d, count);
      store_first<T>(u + k, v * d, count);
    }
  }
  if (learns) {
    add_rows<T>(add, rows, channels, space, sums);
    if (o.shift && o.shift_first) add_rows<T>(add, rows, channels, dv, sums + stride);
    double total = add ? double(sums[2 * stride]) : 0;
    for (int64_t r = first; r < first + rows; ++r) total += double(b.dlogdet[r * b.dlogdet_stride]);
    sums[2 * stride] = T(total);
  }
  for (int64_t r = 0; r < rows; ++r, dv += channels) {
    T* dx = b.dx + (first + r) * channels;
    if (o.index)
      for (int64_t k = 0; k < channels; ++k) dx[o.index[k]] = dv[k];
    else std::copy_n(dv, channels, dx);
  }
}

// What goes into permutation, scale and shift, from what comes out, v[rows][channels], in its place; `row` is scratch
// of one.
template <class T> void prepare_inverse(const MlpCoupling<T>& o, int64_t rows, T* v, T* row) {
  for (int64_t r = 0; r < rows; ++r, v += o.channels) {
    for (int64_t k = 0; o.scale && k < o.channels; k += lanes<T>) {
      const int count = int(std::min<int64_t>(lanes<T>, o.channels - k));
      const Pack<T> u = load_first<T>(v + k, count), shift = o.shift ? load_first<T>(o.shift + k, count) : Pack<T>{};
      Pack<T> scale = Pack<T>{} + T(1);
      std::memcpy(&scale, o.scale + k, size_t(count) * sizeof(T));
      store_first<T>(v + k, o.shift_first ? u / scale - shift : (u - shift) / scale, count);
    }
    if (!o.index) continue;
    std::copy_n(v, o.channels, row);
    for (int64_t k = 0; k < o.channels; ++k) v[o.index[k]] = row[k];
  }
}

// Where a product's saved columns begin for the rows from `first` on.
template <class T> T* saved_of(const MlpCoupling<T>& o, int64_t layer, int64_t first) {
  if (!o.saved) return nullptr;
  int64_t columns = 0;
  for (int64_t i = 0; i < layer; ++i) columns += o.saved_columns(i);
  return o.saved + o.rows * columns + first * o.out[layer];
}
// What the network's state h is before block i, or after the last.
template <class T> T* saved_state(const MlpCoupling<T>& o, int64_t i, int64_t first) {
  if (!o.saved || i == 0) return saved_of(o, 0, first);
  return o.gated ? saved_of(o, o.block(i) - 1, first) + o.rows * o.out[0] : saved_of(o, o.block(i) - 1, first);
}

// Spaces of [rows][widest] elements that the conditioner is given; the first has its input.
constexpr int64_t perceptron_spaces = 3, residual_spaces = 5;
template <class T> int64_t spaces(const MlpCoupling<T>& o) { return o.blocks ? residual_spaces : perceptron_spaces; }

// The parameters, from the input in space[0]. `packed`: the weights.
template <class T>
const T* perceptron(const MlpCoupling<T>& o, const Block<T>& block, const T* const* packed, T* const* space) {
  const T* a = space[0];
  for (int64_t i = 0; i < o.layers; ++i) {
    const int64_t in = o.in[i], out = o.out[i];
    T* const kept = saved_of(o, i, block.first);
    const bool argument = keeps_argument(o.activation) && i + 1 < o.layers;
    T* const result = kept && !argument ? kept : space[1 + i % 2];
    if (i + 1 == o.layers) product<T>(block.rows, out, in, a, in, packed[i], StoreRows<T>{result, out, o.bias[i]});
    else
      for_kind(o.activation, [&]<Activation kind>() {
        product<T>(block.rows, out, in, a, in, packed[i],
                   StoreHidden<kind, T>{o.bias[i], result, argument ? kept : nullptr, out});
      });
    a = result;
  }
  return a;
}

// to[count] = phi(z)
template <class T> void activate_all(Activation activation, int64_t count, const T* z, T* to) {
  for_kind(activation, [&]<Activation kind>() {
    for (int64_t e = 0; e < count; e += lanes<T>) {
      const int n = int(std::min<int64_t>(lanes<T>, count - e));
      store_first<T>(to + e, activate<kind>(load_first<T>(z + e, n)), n);
    }
  });
}

// Likewise with residual blocks.
template <class T>
const T* residual_network(const MlpCoupling<T>& o, const Block<T>& block, const T* const* packed, T* const* space) {
  const int64_t rows = block.rows, hidden = o.out[0], first = block.first;
  const bool keep = o.saved, argument = keeps_argument(o.activation);
  T* const activated = space[1];
  T* h = keep ? saved_state(o, 0, first) : space[3];
  product<T>(rows, hidden, o.in[0], space[0], o.in[0], packed[0], StoreRows<T>{h, hidden, o.bias[0]});
  for (int64_t i = 0; i < o.blocks; ++i) {
    const int64_t at = o.block(i);
    activate_all(o.activation, rows * hidden, h, activated);
    T* const kept = saved_of(o, at, first);
    T* const inner = keep && !argument ? kept : space[2];
    for_kind(o.activation, [&]<Activation kind>() {
      product<T>(rows, hidden, hidden, activated, hidden, packed[at],
                 StoreHidden<kind, T>{o.bias[at], inner, argument ? kept : nullptr, hidden});
    });
    T* factor = nullptr;
    if (o.gated) {
      factor = keep ? saved_of(o, at + 2, first) : space[4];
      product<T>(rows, hidden, o.context_size, o.context + first * o.context_stride, o.context_stride, packed[at + 2],
                 StoreHidden<Activation::sigmoid, T>{o.bias[at + 2], factor, nullptr, hidden});
    }
    T* const next = keep ? saved_state(o, i + 1, first) : h;
    product<T>(
        rows, hidden, hidden, inner, hidden, packed[at + 1],
        StoreResidual<T>{o.bias[at + 1], h, factor, o.gated ? saved_of(o, at + 1, first) : nullptr, next, hidden});
    h = next;
  }
  const int64_t last = o.layers - 1;
  T* const result = keep ? saved_of(o, last, first) : space[2];
  product<T>(rows, o.out[last], hidden, h, hidden, packed[last], StoreRows<T>{result, o.out[last], o.bias[last]});
  return result;
}

// The sums of the parameters' gradients, filled from the last product's to the first's.
template <class T> struct Sums {
  const MlpCoupling<T>& o;
  bool wanted, add;
  T *at, *buffer;
  // The product of a[rows][a_stride] whose result has the gradient dz[rows][out].
  void take(int64_t layer, int64_t rows, const T* a, int64_t a_stride, const T* dz) {
    if (!wanted) return;
    const int64_t in = o.in[layer], out = o.out[layer];
    if (sums_transposed<T>(in, out)) add_outer<T>(add, rows, in, out, a, a_stride, dz, out, at, buffer);
    else add_outer<T>(add, rows, out, in, dz, out, a, a_stride, at, buffer);
    at += weight_sums<T>(in, out);
    add_rows<T>(add, rows, out, dz, at);
    at += in_packs<T>(out);
  }
};

// From the gradient of the parameters in space[1] to those of all weights and of the input, which dx is added.
template <class T> void perceptron_backward(const MlpCouplingBackward<T>& b, const Block<T>& block,
                                            const T* const* packed, T* const* space, T* dx, Sums<T>& sums) {
  const MlpCoupling<T>& o = b.forward;
  T* const input = space[0];
  T *dz = space[1], *next = space[2];
  for (int64_t i = o.layers - 1; i >= 0; --i) {
    const int64_t in = o.in[i], out = o.out[i];
    const T* const kept = i ? saved_of(o, i - 1, block.first) : nullptr;
    if (b.need_parameters) {
      const T* a = kept && !keeps_argument(o.activation) ? kept : input;
      if (!kept) gather(o, block, input);
      else if (a == input) activate_all(o.activation, block.rows * in, kept, input);
      sums.take(i, block.rows, a, in, dz);
    }
    if (i) {
      for_kind(o.activation, [&]<Activation kind>() {
        product<T>(block.rows, in, out, dz, out, packed[i], StoreHiddenGradient<kind, T>{kept, next, in});
      });
      std::swap(dz, next);
    } else if (b.need_input) {
      product<T>(block.rows, in, out, dz, out, packed[i], StoreRows<T>{next, in, nullptr});
      scatter<T>(b, block, next, nullptr, dx);
    }
  }
}

// to[count] += from
template <class T> void add_all(int64_t count, const T* from, T* to) {
  for (int64_t e = 0; e < count; e += lanes<T>) {
    const int n = int(std::min<int64_t>(lanes<T>, count - e));
    store_first<T>(to + e, load_first<T>(to + e, n) + load_first<T>(from + e, n), n);
  }
}

// Likewise with residual blocks; of_gates[2][rows][context_size] is scratch.
template <class T> void residual_network_backward(const MlpCouplingBackward<T>& b, const Block<T>& block,
                                                  const T* const* packed, T* const* space, T* of_gates, T* dx,
                                                  Sums<T>& sums) {
  const MlpCoupling<T>& o = b.forward;
  const int64_t rows = block.rows, hidden = o.out[0], first = block.first, last = o.layers - 1;
  const bool argument = keeps_argument(o.activation), gates = o.gated && b.dcontext;
  T *const a = space[0], *const dz = space[1], *const dh = space[2];
  sums.take(last, rows, saved_state(o, o.blocks, first), hidden, dz);
  product<T>(rows, hidden, o.out[last], dz, o.out[last], packed[last], StoreRows<T>{dh, hidden, nullptr});
  for (int64_t i = o.blocks - 1; i >= 0; --i) {
    const int64_t at = o.block(i);
    const T* dadded = dh;  // of what is added to h
    if (o.gated) {
      const T *const m = saved_of(o, at + 1, first), *const factor = saved_of(o, at + 2, first);
      for (int64_t e = 0; e < rows * hidden; e += lanes<T>) {
        const int n = int(std::min<int64_t>(lanes<T>, rows * hidden - e));
        const Pack<T> d = load_first<T>(dh + e, n), g = load_first<T>(factor + e, n);
        store_first<T>(space[3] + e, d * g, n);
        store_first<T>(space[4] + e, activate_backward<Activation::sigmoid>(d * load_first<T>(m + e, n), g), n);
      }
      dadded = space[3];
      sums.take(at + 2, rows, o.context + first * o.context_stride, o.context_stride, space[4]);
      if (gates) {
        T* const more = i + 1 < o.blocks ? of_gates + rows * o.context_size : of_gates;
        product<T>(rows, o.context_size, hidden, space[4], hidden, packed[at + 2],
                   StoreRows<T>{more, o.context_size, nullptr});
        if (more != of_gates) add_all(rows * o.context_size, more, of_gates);
      }
    }
    const T* const inner = saved_of(o, at, first);
    if (argument && b.need_parameters) activate_all(o.activation, rows * hidden, inner, a);
    sums.take(at + 1, rows, argument ? a : inner, hidden, dadded);
    for_kind(o.activation, [&]<Activation kind>() {
      product<T>(rows, hidden, hidden, dadded, hidden, packed[at + 1], StoreHiddenGradient<kind, T>{inner, dz, hidden});
    });
    const T* const h = saved_state(o, i, first);
    activate_all(o.activation, rows * hidden, h, a);
    sums.take(at, rows, a, hidden, dz);
    for_kind(o.activation, [&]<Activation kind>() {
      product<T>(rows, hidden, hidden, dz, hidden, packed[at],
                 StoreHiddenGradient<kind, T>{argument ? h : a, a, hidden});
    });
    add_all(rows * hidden, a, dh);
  }
  if (b.need_parameters) {
    gather(o, block, a);
    sums.take(0, rows, a, o.in[0], dh);
  }
  if (b.need_input) {
    product<T>(rows, o.in[0], hidden, dh, hidden, packed[0], StoreRows<T>{dz, o.in[0], nullptr});
    scatter<T>(b, block, dz, gates ? of_gates : nullptr, dx);
  }
}

}  // namespace

template <class T> int64_t mlp_coupling_workspace(const MlpCoupling<T>& o) {
  return panels_size(o, false) + mlp_most_block_rows * (spaces(o) * widest(o) + o.channels + 1);
}

template <class T> void mlp_coupling(const MlpCoupling<T>& o, int64_t begin, int64_t end, T* workspace) {
  const T* packed[mlp_max_layers];
  pack_weights(o, false, workspace, packed);
  T* const spaces_of = workspace + panels_size(o, false);
  T* space[residual_spaces];
  for (int64_t i = 0; i < spaces(o); ++i) space[i] = spaces_of + i * mlp_most_block_rows * widest(o);
  T* const prepared = spaces_of + spaces(o) * mlp_most_block_rows * widest(o);
  T* const logdets = prepared + mlp_most_block_rows * o.channels;
  const int64_t in_block = mlp_block_rows(o.rows);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * in_block, rows = std::min(in_block, o.rows - first);
    const Block<T> block = prepare(o, first, rows, prepared);
    if (o.layers) {
      gather(o, block, space[0]);
      transform(o, block, o.blocks ? residual_network(o, block, packed, space) : perceptron(o, block, packed, space),
                logdets);
    } else {
      std::fill_n(logdets, rows, T(0));
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(block.x + r * block.stride, o.channels, o.y + (first + r) * o.channels);
    }
    for (int64_t r = 0; r < rows; ++r)
      o.logdet[first + r] = (o.add_logdet ? o.logdet[first + r] : T(0)) + (logdets[r] + T(o.logdet_start));
  }
}

template <class T> int64_t mlp_coupling_sums(const MlpCoupling<T>& o) {
  int64_t size = prepare_sums(o);
  for (int64_t i = 0; i < o.layers; ++i) size += weight_sums<T>(o.in[i], o.out[i]) + in_packs<T>(o.out[i]);
  return size;
}

template <class T> int64_t mlp_coupling_backward_workspace(const MlpCoupling<T>& o) {
  return panels_size(o, true) + group_rows * tile_columns<T> +
         backward_rows(o) * (spaces(o) * widest(o) + (o.gated ? 2 * o.context_size : 0) + 2 * o.channels) +
         (o.saved ? 0 : panels_size(o, false) + backward_rows(o) * (saved_columns(o) + 1));
}

namespace {

// `rows` rows from `first` on as if there were no others, with nothing saved but in `saved`.
template <class T>
MlpCouplingBackward<T> rows_alone(const MlpCouplingBackward<T>& b, int64_t first, int64_t rows, T* saved) {
  MlpCouplingBackward<T> own = b;
  MlpCoupling<T>& o = own.forward;
  o.rows = rows, o.saved = saved;
  o.x += first * o.x_stride;
  if (o.context) o.context += first * o.context_stride;
  own.dy += first * b.dy_strides.batch, own.dlogdet += first * b.dlogdet_stride, own.dx += first * o.channels;
  if (b.dcontext) own.dcontext += first * o.context_size;
  if (b.y) own.y += first * b.y_stride, own.rebuilt += first * o.channels;
  return own;
}

// What the forward pass saves of these rows, and x where it has to be rebuilt: the inverse leaves the conditioner's
// input as it is, so that evaluating it once gives both the parameters to go back with and what backward needs of it.
template <class T>
void rebuild(const MlpCouplingBackward<T>& b, const T* const* packed, T* const* space, T* prepared, T* logdets) {
  MlpCoupling<T> o = b.forward;
  const Block<T> block = b.y ? Block<T>{0, o.rows, b.y, b.y_stride} : prepare(o, 0, o.rows, prepared);
  const T* parameters = nullptr;
  if (o.layers) {
    gather(o, block, space[0]);
    parameters = o.blocks ? residual_network(o, block, packed, space) : perceptron(o, block, packed, space);
  }
  if (!b.y) return;
  if (o.layers) {
    o.y = b.rebuilt, o.o.inverse = !o.o.inverse, o.s.inverse = !o.s.inverse;
    transform(o, block, parameters, logdets);
  } else if (b.y != b.rebuilt) {
    for (int64_t r = 0; r < o.rows; ++r) std::copy_n(b.y + r * b.y_stride, o.channels, b.rebuilt + r * o.channels);
  }
  if (prepares(o)) prepare_inverse(o, o.rows, b.rebuilt, prepared);
}

}  // namespace

template <class T>
void mlp_coupling_backward(const MlpCouplingBackward<T>& all, int64_t begin, int64_t end, T* workspace) {
  const MlpCoupling<T>& o = all.forward;
  const T *packed[mlp_max_layers], *packed_forward[mlp_max_layers];
  pack_weights(o, true, workspace, packed);
  T* const buffer = workspace + panels_size(o, true);
  T* const spaces_of = buffer + group_rows * tile_columns<T>;
  const int64_t most = backward_rows(o), groups = mlp_coupling_groups(o.rows);
  T* space[residual_spaces];
  for (int64_t i = 0; i < spaces(o); ++i) space[i] = spaces_of + i * most * widest(o);
  T* const prepared = spaces_of + spaces(o) * most * widest(o);
  T* const of_gates = prepared + 2 * most * o.channels;
  T* const panels = of_gates + (o.gated ? 2 * most * o.context_size : 0);
  T* const activations = panels + panels_size(o, false);
  if (!o.saved) pack_weights(o, false, panels, packed_forward);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t from = part_start(o.rows, groups, group), to = part_start(o.rows, groups, group + 1);
    const int64_t blocks = ceil_div(to - from, most);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t start = from + part_start(to - from, blocks, k);
      const int64_t rows = from + part_start(to - from, blocks, k + 1) - start;
      MlpCouplingBackward<T> own;
      if (!o.saved) {
        own = rows_alone(all, start, rows, activations);
        rebuild(own, packed_forward, space, prepared, activations + most * saved_columns(o));
      }
      const MlpCouplingBackward<T>& b = o.saved ? all : own;
      const int64_t first = o.saved ? start : 0;
      const Block<T> block = prepare(b.forward, first, rows, prepared);
      T* const dx = prepares(o) ? prepared + most * o.channels : b.dx + first * o.channels;
      Sums<T> sums{b.forward, b.need_parameters, k > 0, b.sums + group * mlp_coupling_sums(o), buffer};
      if (o.layers) {
        transform_backward<T>(b, block, saved_of(b.forward, o.layers - 1, first), dx, space[1]);
        if (o.blocks) residual_network_backward(b, block, packed, space, of_gates, dx, sums);
        else perceptron_backward(b, block, packed, space, dx, sums);
      } else {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < o.channels; ++c)
            dx[r * o.channels + c] = b.dy[(first + r) * b.dy_strides.batch + c * b.dy_strides.channel];
      }
      if (prepares(o)) prepare_backward(b, first, rows, dx, prepared, sums.add, sums.at);
    }
  }
}

template <class T> void mlp_coupling_reduce(const MlpCouplingBackward<T>& b, int64_t part, int64_t parts) {
  const MlpCoupling<T>& o = b.forward;
  const int64_t groups = mlp_coupling_groups(o.rows), per_group = mlp_coupling_sums(o);
  const T* sums = b.sums;
  const auto total = [&](const T* from) {
    T sum{};
    for (int64_t g = 0; g < groups; ++g) sum += from[g * per_group];
    return sum;
  };
  for (int64_t i = o.layers - 1; i >= 0; --i) {
    const int64_t in = o.in[i], out = o.out[i];
    const T* const bias_sums = sums + weight_sums<T>(in, out);
    for (int64_t row = part_start(out, parts, part); row < part_start(out, parts, part + 1); ++row) {
      T* dweight = b.dweight[i] + row * in;
      if (sums_transposed<T>(in, out)) {
        for (int64_t k = 0; k < in; ++k) dweight[k] = total(sums + k * padded<T>(out) + row);
      } else {
        const T* from_row = sums + row * padded<T>(in);
        for (int64_t k = 0; k < in; k += lanes<T>) {
          Pack<T> sum = load<T>(from_row + k);
          for (int64_t g = 1; g < groups; ++g) sum += load<T>(from_row + g * per_group + k);
          store_first<T>(dweight + k, sum, int(std::min<int64_t>(lanes<T>, in - k)));
        }
      }
      if (b.dbias[i]) b.dbias[i][row] = total(bias_sums + row);
    }
    sums = bias_sums + in_packs<T>(out);
  }
  if (part || !o.scale) return;
  const int64_t stride = in_packs<T>(o.channels);
  for (int64_t k = 0; k < o.channels; ++k) {
    b.dscale[k] = T(o.scale_sign) * (total(sums + k) + total(sums + 2 * stride));
    if (b.dshift) b.dshift[k] = T(o.shift_first ? -1 : 1) * total(sums + stride + k);
  }
}

#define PYFLOWGEN_INSTANTIATE(T) \
  template int64_t mlp_coupling_workspace<T>(const MlpCoupling<T>&); \
  template int64_t mlp_coupling_backward_workspace<T>(const MlpCoupling<T>&); \
  template int64_t mlp_coupling_sums<T>(const MlpCoupling<T>&); \
  template void mlp_coupling<T>(const MlpCoupling<T>&, int64_t, int64_t, T*); \
  template void mlp_coupling_backward<T>(const MlpCouplingBackward<T>&, int64_t, int64_t, T*); \
  template void mlp_coupling_reduce<T>(const MlpCouplingBackward<T>&, int64_t, int64_t);
PYFLOWGEN_INSTANTIATE(double)
PYFLOWGEN_INSTANTIATE(float)

}  // namespace pyflowgen::PYFLOWGEN_ISA
