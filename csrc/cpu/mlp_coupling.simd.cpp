// mlp_coupling on the CPU: the products of gemm.h, block after block, and the transform's own kernel on each block.
//
// Floor: 2 n operations forward and 4 n backward for n = rows * sum of in * out multiply-adds, at the rate of the
// register tile; the rest (packing the weights once a thread, the transform, gradients' sums) is a few percent of that
// from 2^15 weights and some hundred rows on.
#include "mlp_coupling.h"

#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace pyflowgen::PYFLOWGEN_ISA {
namespace {

template <class T> constexpr int64_t padded(int64_t columns) { return gemm_panels<T>(columns) * tile_columns<T>; }

// Rows of a block of the backward pass: its gradients and the weights' sums are to fit the second-level cache together.
constexpr int64_t group_rows = 256;
template <class T> int64_t backward_rows(const MlpCoupling<T>& o) {
  int64_t widest = 0;
  for (int64_t i = 0; i <= o.layers; ++i) widest = std::max(widest, o.size[i]);
  int64_t rows = group_rows;
  while (rows > 64 && rows * widest * int64_t(sizeof(T)) > 192 << 10) rows /= 2;
  return rows;
}

template <class T> int64_t panels_size(const MlpCoupling<T>& o, bool transposed) {
  int64_t size = 0;
  for (int64_t i = 0; i < o.layers; ++i)
    size += transposed ? padded<T>(o.size[i]) * o.size[i + 1] : padded<T>(o.size[i + 1]) * o.size[i];
  return size;
}

// Every weight in panels, for the products with W^T (forward) or W.
template <class T> void pack_weights(const MlpCoupling<T>& o, bool transposed, T* panels, const T** packed) {
  constexpr int64_t width = tile_columns<T>;
  for (int64_t i = 0; i < o.layers; ++i) {
    const int64_t in = o.size[i], out = o.size[i + 1], columns = transposed ? in : out, depth = transposed ? out : in;
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

// The conditioner's input, [rows][size[0]].
template <class T> void gather(const MlpCoupling<T>& o, const Block<T>& block, T* input) {
  for (int64_t r = 0; r < block.rows; ++r, input += o.size[0]) {
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
  return {o.size[o.layers], o.parameter_stride, 0};
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

// dx[rows][channels] and dparameters[rows][size[layers]]
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

// Whether phi' is taken at phi's argument.
PYFLOWGEN_INLINE bool keeps_argument(Activation activation) { return activation == Activation::silu; }

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

// dx[rows][channels] += and dcontext (+)= the gradient of the conditioner's input.
template <class T> void scatter(const MlpCouplingBackward<T>& b, const Block<T>& block, const T* dinput, T* dx_rows) {
  const MlpCoupling<T>& o = b.forward;
  for (int64_t r = 0; r < block.rows; ++r, dinput += o.size[0]) {
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

template <class T> int64_t widest(const MlpCoupling<T>& o) {
  return o.layers ? *std::max_element(o.size, o.size + o.layers + 1) : 0;
}

}  // namespace

template <class T> int64_t mlp_coupling_workspace(const MlpCoupling<T>& o) {
  return panels_size(o, false) + mlp_block_rows * (3 * widest(o) + o.channels + 1);
}

template <class T> void mlp_coupling(const MlpCoupling<T>& o, int64_t begin, int64_t end, T* workspace) {
  const T* packed[mlp_max_layers];
  pack_weights(o, false, workspace, packed);
  T* const input = workspace + panels_size(o, false);
  T* const scratch[] = {input + mlp_block_rows * widest(o), input + 2 * mlp_block_rows * widest(o)};
  T* const prepared = input + 3 * mlp_block_rows * widest(o);
  T* const logdets = prepared + mlp_block_rows * o.channels;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * mlp_block_rows, rows = std::min(mlp_block_rows, o.rows - first);
    const Block<T> block = prepare(o, first, rows, prepared);
    if (o.layers) {
      gather(o, block, input);
      const T* a = input;
      T* saved = o.saved;
      for (int64_t i = 0; i < o.layers; ++i) {
        const int64_t in = o.size[i], out = o.size[i + 1];
        T* const kept = saved ? saved + first * out : nullptr;
        if (saved) saved += o.rows * out;
        const bool argument = keeps_argument(o.activation) && i + 1 < o.layers;
        T* const result = kept && !argument ? kept : scratch[i % 2];
        if (i + 1 == o.layers) product<T>(rows, out, in, a, in, packed[i], StoreRows<T>{result, out, o.bias[i]});
        else
          for_kind(o.activation, [&]<Activation kind>() {
            product<T>(rows, out, in, a, in, packed[i],
                       StoreHidden<kind, T>{o.bias[i], result, argument ? kept : nullptr, out});
          });
        a = result;
      }
      transform(o, block, a, logdets);
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
  for (int64_t i = 0; i < o.layers; ++i) size += weight_sums<T>(o.size[i], o.size[i + 1]) + in_packs<T>(o.size[i + 1]);
  return size;
}

template <class T> int64_t mlp_coupling_backward_workspace(const MlpCoupling<T>& o) {
  return panels_size(o, true) + group_rows * tile_columns<T> + backward_rows(o) * (3 * widest(o) + 2 * o.channels);
}

template <class T>
void mlp_coupling_backward(const MlpCouplingBackward<T>& b, int64_t begin, int64_t end, T* workspace) {
  const MlpCoupling<T>& o = b.forward;
  const T* packed[mlp_max_layers];
  pack_weights(o, true, workspace, packed);
  T* const buffer = workspace + panels_size(o, true);
  T* const input = buffer + group_rows * tile_columns<T>;
  const int64_t most = backward_rows(o), groups = mlp_coupling_groups(o.rows);
  T* const scratch[] = {input + most * widest(o), input + 2 * most * widest(o)};
  T* const prepared = input + 3 * most * widest(o);
  const T* saved_of[mlp_max_layers];
  for (int64_t i = 0, at = 0; i < o.layers; at += o.rows * o.size[++i]) saved_of[i] = o.saved + at;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t from = part_start(o.rows, groups, group), to = part_start(o.rows, groups, group + 1);
    const int64_t blocks = ceil_div(to - from, most);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t first = from + part_start(to - from, blocks, k);
      const int64_t rows = from + part_start(to - from, blocks, k + 1) - first;
      const bool add = k > 0;
      const Block<T> block = prepare(o, first, rows, prepared);
      T* const dx = prepares(o) ? prepared + most * o.channels : b.dx + first * o.channels;
      T *dz = scratch[0], *next = scratch[1];
      T* sums = b.sums + group * mlp_coupling_sums(o);
      if (o.layers) {
        transform_backward(b, block, saved_of[o.layers - 1] + first * o.size[o.layers], dx, dz);
      } else {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < o.channels; ++c)
            dx[r * o.channels + c] = b.dy[(first + r) * b.dy_strides.batch + c * b.dy_strides.channel];
      }
      for (int64_t i = o.layers - 1; i >= 0; --i) {
        const int64_t in = o.size[i], out = o.size[i + 1];
        const T* const kept = i ? saved_of[i - 1] + first * in : nullptr;
        if (b.need_parameters) {
          const T* a = kept ? kept : input;
          if (!kept) gather(o, block, input);
          else if (keeps_argument(o.activation)) {
            for_kind(o.activation, [&]<Activation kind>() {
              for (int64_t e = 0; e < rows * in; e += lanes<T>) {
                const int count = int(std::min<int64_t>(lanes<T>, rows * in - e));
                store_first<T>(input + e, activate<kind>(load_first<T>(kept + e, count)), count);
              }
            });
            a = input;
          }
          if (sums_transposed<T>(in, out)) add_outer<T>(add, rows, in, out, a, in, dz, out, sums, buffer);
          else add_outer<T>(add, rows, out, in, dz, out, a, in, sums, buffer);
          sums += weight_sums<T>(in, out);
          add_rows<T>(add, rows, out, dz, sums);
          sums += in_packs<T>(out);
        }
        if (i) {
          for_kind(o.activation, [&]<Activation kind>() {
            product<T>(rows, in, out, dz, out, packed[i], StoreHiddenGradient<kind, T>{kept, next, in});
          });
          std::swap(dz, next);
        } else if (b.need_input) {
          product<T>(rows, in, out, dz, out, packed[i], StoreRows<T>{next, in, nullptr});
          scatter(b, block, next, dx);
        }
      }
      if (prepares(o)) prepare_backward(b, first, rows, dx, prepared, add, sums);
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
    const int64_t in = o.size[i], out = o.size[i + 1];
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
