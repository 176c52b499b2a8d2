// idu on the CPU: the products outside the recurrence, its threads, registration.
//
// Floor, for windows of T chunks, E embedded features and H units. Operations: 2 H (2 T E + 2 E + 2 (T - 1) H) a window
// forward, three times that with the gradient, at the rate of the register tile: T = 16, E = H = 512 and 16 windows are
// 0.56 GFLOP, 2.4 ms on two cores of 117 GFLOP/s (measured 3.0; with the gradient 10.6 of 7.2). Bytes, which are the
// limit for one window or stream: W_hr and W_hh, 8 H^2, T - 1 times, and the others once. In float32 that is 30 MiB and
// 4 MiB at H = 512, 1 MiB a core and step, just too much for an L2 of 1 MiB beside the rest: 0.23 ms measured for a
// stream's frame, 134 GB/s from L3 on two cores, which is what lstm's step reads there as well.
#include "idu.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/packed.h"
#include "cpu/recurrence_call.h"
#include "stream_product.h"

namespace pyflowgen {
namespace {

using recurrence::Optional;
using recurrence::product_backward;

// The weights, and their panels where they are packed beforehand.
struct Matrices { Tensor weight_x, weight_0, weight_h; };
template <class T> struct Panels { const T *x, *current, *r, *h; };

template <class T> int64_t packed_size(const Matrices& m, int64_t part) {  // of weight_x, weight_0, half of weight_h
  const int64_t in = m.weight_x.size(1), hidden = m.weight_h.size(1);
  return part < 2 ? PYFLOWGEN_CALL(linear_packed_size<T>, in, 2 * hidden)
                  : PYFLOWGEN_CALL(linear_packed_size<T>, hidden, hidden);
}
template <class T> Panels<T> panels_at(const Matrices& m, const T* packed) {
  const int64_t large = packed_size<T>(m, 0), small = packed_size<T>(m, 2);
  return {packed, packed + large, packed + 2 * large, packed + 2 * large + small};
}

// As linear_pack does it, or the transpose.
template <class T> void pack(int64_t in, int64_t out_features, const T* weight, T* panels, bool transposed = false) {
  const int64_t all = PYFLOWGEN_CALL(linear_pack_tasks<T>, out_features), threads = threads_for(8 * in * out_features);
  in_threads(threads, [&](int64_t i) {
    const int64_t begin = all * i / threads, end = all * (i + 1) / threads;
    if (transposed) PYFLOWGEN_CALL(idu_pack_backward<T>, in, weight, panels, begin, end);
    else PYFLOWGEN_CALL(linear_pack<T>, in, out_features, weight, panels, begin, end);
  });
}

void check(const Matrices& m) {
  const Tensor &x = m.weight_x, &c = m.weight_0, &h = m.weight_h;
  STD_TORCH_CHECK(h.dim() == 2 && h.size(0) == 2 * h.size(1) && x.dim() == 2 && x.size(0) == h.size(0) &&
                      c.dim() == 2 && c.size(0) == h.size(0) && c.size(1) == x.size(1),
                  "idu: weights of shapes ", shape_of(x), ", ", shape_of(c), " and ", shape_of(h), " do not fit");
  STD_TORCH_CHECK((h.scalar_type() == ScalarType::Float || h.scalar_type() == ScalarType::Double) &&
                      x.scalar_type() == h.scalar_type() && c.scalar_type() == h.scalar_type(),
                  "idu: the kernel takes float32 and float64 alone, and one dtype");
}

IduShape shape_for(const Tensor& x, const Matrices& m, const Optional& length, int64_t cached, bool one, bool after,
                   bool hard, bool keeps) {
  const int64_t chunks = cached + x.size(1), window = one ? chunks : cached + 1;
  const IduShape s{x.size(0), chunks - window + 1, chunks, window, m.weight_h.size(1), nullptr, after, hard, keeps};
  STD_TORCH_CHECK(x.size(1) >= 1, "idu: x of shape ", shape_of(x), " has no chunk");
  STD_TORCH_CHECK(!length || (length->dim() == 1 && length->size(0) == s.rows() && length->is_contiguous() &&
                              length->scalar_type() == ScalarType::Long),
                  "idu: length must be dense int64 of shape (", s.rows(), ",)");
  return s;
}

// step(phase, t, begin, end, first, last) for steps start .. window - 1.
template <class T, class F> void run(const IduShape& s, int64_t start, bool forward, int64_t phases, const F& step) {
  std::vector<int64_t> offsets(size_t(s.window - start + 1));
  for (size_t t = 0; t < offsets.size(); ++t) offsets[t] = int64_t(t) * s.rows();
  const RecurrentShape shape{s.rows(), s.hidden, s.window - start, offsets.data(), false};
  recurrence::run<T>(shape, 2, PYFLOWGEN_CALL(packed_row_panels<T>, s.hidden), forward, phases,
                     [&](int64_t phase, int64_t t, int64_t begin, int64_t end, int64_t first, int64_t last) {
                       step(phase, start + t, begin, end, first, last);
                     });
}

struct Kept { Tensor h, given, gates, states, inner; };

template <class T> Kept forward(const Tensor& x, const Matrices& m, const Optional& bias, const Optional& cached,
                                IduShape s, const Optional& length, bool keep, const Optional& packed) {
  const int64_t batch = s.batch, hidden = s.hidden, in = x.size(2), rows = s.rows(), fresh = x.size(1);
  const int64_t before = s.chunks - fresh, state = rows * hidden;
  s.length = length ? data<int64_t>(*length) : nullptr;
  Kept k{empty({batch, s.windows, hidden}, x), empty({batch, s.chunks, 2 * hidden}, x),
         empty({keep ? s.window : 0, rows, 3 * hidden}, x), empty({keep ? s.window + 1 : 2, rows, hidden}, x),
         empty({keep ? s.window : 1, rows, hidden}, x)};
  if (rows == 0) return k;

  Panels<T> panels{};
  const T* w_h = data<T>(m.weight_h);
  if (packed && packed->scalar_type() == x.scalar_type() && packed->is_contiguous() &&
      packed->numel() == 2 * packed_size<T>(m, 0) + 2 * packed_size<T>(m, 2)) {
    panels = panels_at<T>(m, data<T>(*packed));
    const auto same = [](int64_t depth, int64_t out_features, const T* weight, const T* these) {
      return PYFLOWGEN_CALL(linear_pack_matches<T>, depth, out_features, weight, these);
    };
    if (!same(in, 2 * hidden, data<T>(m.weight_x), panels.x) ||
        !same(in, 2 * hidden, data<T>(m.weight_0), panels.current) || !same(hidden, hidden, w_h, panels.r) ||
        !same(hidden, hidden, w_h + hidden * hidden, panels.h))
      panels = {};
  }
  Optional own;
  if (!panels.r) {
    const int64_t size = packed_size<T>(m, 2);
    own = empty({2, size}, x);
    pack<T>(hidden, hidden, w_h, out<T>(*own));
    pack<T>(hidden, hidden, w_h + hidden * hidden, out<T>(*own) + size);
    panels.r = data<T>(*own), panels.h = panels.r + size;
  }

  // What does not hang on the recurrence: products of all chunks with weight_x, of the current ones with weight_0.
  T* given = out<T>(k.given);
  const Packed<T> of_x{2 * hidden, in, panels.x, nullptr, data<T>(m.weight_x)};
  if (before && batch > 1) {
    const Tensor buffer = empty({batch, fresh, 2 * hidden}, x);
    of_x(batch * fresh, data<T>(x), Activation::none, out<T>(buffer));
    for (int64_t b = 0; b < batch; ++b)
      std::copy_n(data<T>(buffer) + b * fresh * 2 * hidden, fresh * 2 * hidden,
                  given + (b * s.chunks + before) * 2 * hidden);
  } else {
    of_x(batch * fresh, data<T>(x), Activation::none, given + before * 2 * hidden);
  }
  for (int64_t b = 0; before && b < batch; ++b)
    std::copy_n(data<T>(*cached) + b * cached->stride(0), before * 2 * hidden, given + b * s.chunks * 2 * hidden);
  const T* biases = bias ? data<T>(*bias) : nullptr;  // b_r, b_z, b_x, b_h
  const Tensor current = empty({rows, 2 * hidden}, x);
  Packed<T>{2 * hidden, in, panels.current, biases, data<T>(m.weight_0)}(rows, data<T>(x) + (fresh - s.windows) * in,
                                                                         Activation::none, out<T>(current),
                                                                         s.windows == fresh ? in : fresh * in);

  int64_t start = keep ? 0 : s.window - 1;  // before it no window has a chunk; kept is every step
  for (int64_t row = 0; start && row < rows; ++row) start = std::min(start, s.first(row));
  T* states = out<T>(k.states);
  std::fill_n(states + (keep ? 0 : start % 2) * state, state, T(0));
  const IduForward<T> o{s,
                        given,
                        data<T>(current),
                        biases ? biases + 2 * hidden : nullptr,
                        biases ? biases + 3 * hidden : nullptr,
                        panels.r,
                        panels.h,
                        states,
                        out<T>(k.inner),
                        keep ? out<T>(k.gates) : nullptr};
  run<T>(s, start, true, s.after ? 1 : 2,
         [&](int64_t phase, int64_t t, int64_t begin, int64_t end, int64_t first, int64_t last) {
           PYFLOWGEN_CALL(idu_forward<T>, o, phase, t, start, begin, end, first, last);
         });
  std::copy_n(states + (keep ? s.window : s.window % 2) * state, state, out<T>(k.h));
  if (!keep) k.states = empty({0}, x), k.inner = empty({0}, x), k.gates = empty({0}, x);
  return k;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> idu(Tensor x, Tensor weight_x, Tensor weight_0, Tensor weight_h,
                                                       Optional bias, Optional length, Optional cached,
                                                       bool reset_after, bool hard, bool keeps_state, bool keep,
                                                       Optional packed) {
  const Matrices m{dense(weight_x), dense(weight_0), dense(weight_h)};
  check(m);
  const int64_t hidden = m.weight_h.size(1);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) == m.weight_x.size(1) && x.scalar_type() == m.weight_h.scalar_type(),
                  "idu: x of shape ", shape_of(x), " must be (batch, time, ", m.weight_x.size(1),
                  ") of the weights' dtype");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == 4 * hidden && bias->scalar_type() == x.scalar_type()),
                  "idu: bias must have shape (", 4 * hidden, ",) and x's dtype");
  STD_TORCH_CHECK(!cached || (cached->dim() == 3 && cached->size(0) == x.size(0) && cached->size(2) == 2 * hidden &&
                              cached->scalar_type() == x.scalar_type()),
                  "idu: cached must have shape (", x.size(0), ", chunks, ", 2 * hidden, ") and x's dtype");
  const IduShape s = shape_for(x, m, length, cached ? cached->size(1) : 0, !cached, reset_after, hard, keeps_state);
  // Of the cache only its sequences may lie apart.
  if (cached && !(cached->stride(2) == 1 && cached->stride(1) == 2 * hidden))
    cached = torch::stable::contiguous(*cached);
  const Kept k = recurrence::with_type(
      x, [&]<class T>() { return forward<T>(dense(x), m, recurrence::dense(bias), cached, s, length, keep, packed); });
  return {k.h, k.given, k.gates, k.states, k.inner};
}

struct Gradients { Tensor dx, dcached, dweight_x, dweight_0, dweight_h, dbias; };

template <class T> Gradients backward(const Tensor& dh_last, const Optional& dgiven_more, const Tensor& x,
                                      const Matrices& m, IduShape s, const Optional& length, const Tensor& gates,
                                      const Tensor& states, const Tensor& inner, bool need_dx, bool need_dweight) {
  const int64_t batch = s.batch, hidden = s.hidden, in = x.size(2), rows = s.rows(), fresh = x.size(1);
  const int64_t cached = s.chunks - fresh, all = s.window * rows;
  s.length = length ? data<int64_t>(*length) : nullptr;
  const Tensor none = empty({0}, x);
  Gradients g{need_dx ? empty({batch, fresh, in}, x) : none,        empty({batch, cached, 2 * hidden}, x),
              need_dweight ? empty({2 * hidden, in}, x) : none,     need_dweight ? empty({2 * hidden, in}, x) : none,
              need_dweight ? empty({2 * hidden, hidden}, x) : none, need_dweight ? empty({4 * hidden}, x) : none};
  const int64_t size = packed_size<T>(m, 2);
  const Tensor panels = empty({2, size}, x), steps = empty({s.after ? 4 : 3, s.window, rows, hidden}, x);
  const Tensor dh = recurrence::copy_of(dh_last), dcurrent = empty({rows, 2 * hidden}, x);
  const Tensor dgiven = empty({batch, fresh, 2 * hidden}, x);
  pack<T>(hidden, hidden, data<T>(m.weight_h), out<T>(panels), true);
  pack<T>(hidden, hidden, data<T>(m.weight_h) + hidden * hidden, out<T>(panels) + size, true);
  T *dr = out<T>(steps), *dz = dr + all * hidden, *dn = dz + all * hidden;
  const IduBackward<T> o{s,
                         data<T>(states),
                         data<T>(inner),
                         data<T>(gates),
                         data<T>(panels),
                         data<T>(panels) + size,
                         out<T>(dh),
                         dr,
                         dz,
                         dn,
                         s.after ? dn + all * hidden : dn};
  if (rows)
    run<T>(s, 0, false, 3, [&](int64_t phase, int64_t t, int64_t begin, int64_t end, int64_t first, int64_t last) {
      PYFLOWGEN_CALL(idu_backward<T>, o, phase, t, 0, begin, end, first, last);
    });
  const IduCollect<T> collect{s,
                              cached,
                              dr,
                              dz,
                              dn,
                              dgiven_more ? data<T>(*dgiven_more) : nullptr,
                              out<T>(g.dcached),
                              out<T>(dgiven),
                              out<T>(dcurrent)};
  const int64_t threads = std::min(batch, threads_for(4 * all * hidden));
  if (batch)
    in_threads(std::max<int64_t>(1, threads), [&](int64_t i) {
      PYFLOWGEN_CALL(idu_collect<T>, collect, batch * i / std::max<int64_t>(1, threads),
                     batch * (i + 1) / std::max<int64_t>(1, threads));
    });

  // One product over all steps for each weight.
  T* dx = need_dx ? out<T>(g.dx) : nullptr;
  const Tensor currents = s.windows == fresh ? x : empty({batch, 1, in}, x);
  if (s.windows != fresh)
    for (int64_t b = 0; b < batch; ++b)
      std::copy_n(data<T>(x) + ((b + 1) * fresh - 1) * in, in, out<T>(currents) + b * in);
  product_backward<T>(batch * fresh, in, 2 * hidden, data<T>(dgiven), data<T>(x), data<T>(m.weight_x), dx,
                      need_dweight ? out<T>(g.dweight_x) : nullptr, nullptr);
  const Tensor dx_current = need_dx ? empty({rows, in}, x) : none;
  T* dbias = need_dweight ? out<T>(g.dbias) : nullptr;
  product_backward<T>(rows, in, 2 * hidden, data<T>(dcurrent), data<T>(currents), data<T>(m.weight_0),
                      need_dx ? out<T>(dx_current) : nullptr, need_dweight ? out<T>(g.dweight_0) : nullptr, dbias);
  if (need_dx)
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = data<T>(dx_current) + row * in;
      T* to = dx + (row / s.windows * fresh + row % s.windows + fresh - s.windows) * in;
      for (int64_t i = 0; i < in; ++i) to[i] += from[i];
    }
  if (need_dweight) {
    const T* h = data<T>(states);
    T* dweight = out<T>(g.dweight_h);
    product_backward<T>(all, hidden, hidden, dr, h, nullptr, nullptr, dweight, nullptr);
    product_backward<T>(all, hidden, hidden, o.dinner, s.after ? h : data<T>(inner), nullptr, nullptr,
                        dweight + hidden * hidden, dbias + 3 * hidden);
    if (s.after) product_backward<T>(all, hidden, hidden, dn, h, nullptr, nullptr, nullptr, dbias + 2 * hidden);
    else std::copy_n(dbias + 3 * hidden, hidden, dbias + 2 * hidden);
  }
  return g;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> idu_backward(Tensor dh, Optional dgiven, Tensor x,
                                                                        Tensor weight_x, Tensor weight_0,
                                                                        Tensor weight_h, Optional length,
                                                                        bool reset_after, bool hard, bool keeps_state,
                                                                        Tensor gates, Tensor states, Tensor inner,
                                                                        bool need_dx, bool need_dweight) {
  const Matrices m{dense(weight_x), dense(weight_0), dense(weight_h)};
  check(m);
  const int64_t hidden = m.weight_h.size(1), window = gates.size(0);
  STD_TORCH_CHECK(x.dim() == 3 && dh.dim() == 3 && dh.size(0) == x.size(0) && dh.size(2) == hidden &&
                      (dh.size(1) == 1 || dh.size(1) == x.size(1)),
                  "idu_backward: dh ", shape_of(dh), " does not fit x ", shape_of(x));
  const int64_t cached = dh.size(1) + window - 1 - x.size(1), rows = dh.size(0) * dh.size(1);
  const bool one = cached == 0 && dh.size(1) == 1;
  IduShape s = shape_for(x, m, length, cached, one, reset_after, hard, keeps_state);
  STD_TORCH_CHECK(cached >= 0 && s.window == window && s.rows() == rows &&
                      gates.numel() == 3 * window * rows * hidden && states.numel() == (window + 1) * rows * hidden &&
                      inner.numel() == window * rows * hidden,
                  "idu_backward: what was kept is not that of ", rows, " windows");
  STD_TORCH_CHECK(!dgiven || dgiven->numel() == s.batch * s.chunks * 2 * hidden,
                  "idu_backward: dgiven must have given's shape");
  for (const Tensor* t : {&dh, &x, &gates, &states, &inner})
    STD_TORCH_CHECK(t->scalar_type() == m.weight_h.scalar_type(), "idu_backward: all tensors must have one dtype");
  const Gradients g = recurrence::with_type(x, [&]<class T>() {
    return backward<T>(dense(dh), recurrence::dense(dgiven), dense(x), m, s, length, dense(gates), dense(states),
                       dense(inner), need_dx, need_dweight);
  });
  return {g.dx, g.dcached, g.dweight_x, g.dweight_0, g.dweight_h, g.dbias};
}

Tensor idu_pack(Tensor weight_x, Tensor weight_0, Tensor weight_h) {
  const Matrices m{dense(weight_x), dense(weight_0), dense(weight_h)};
  check(m);
  return recurrence::with_type(weight_h, [&]<class T>() {
    const int64_t in = m.weight_x.size(1), hidden = m.weight_h.size(1);
    const int64_t size = 2 * packed_size<T>(m, 0) + 2 * packed_size<T>(m, 2);
    const Tensor packed = empty({size}, m.weight_h);
    recurrence::use_large_pages(packed, size * int64_t(sizeof(T)));
    const Panels<T> to = panels_at<T>(m, data<T>(packed));
    pack<T>(in, 2 * hidden, data<T>(m.weight_x), const_cast<T*>(to.x));
    pack<T>(in, 2 * hidden, data<T>(m.weight_0), const_cast<T*>(to.current));
    pack<T>(hidden, hidden, data<T>(m.weight_h), const_cast<T*>(to.r));
    pack<T>(hidden, hidden, data<T>(m.weight_h) + hidden * hidden, const_cast<T*>(to.h));
    return packed;
  });
}

// ---- a stream's step on short weights: the products are those of stream_product.h, the gates idu_forward's.
// ----------
enum Product { of_chunk, of_current, of_reset, of_candidate, products };

std::array<StreamWeights<float>, products> stream_shapes(int64_t in, int64_t hidden) {
  std::array<StreamWeights<float>, products> w{};
  for (int p = 0; p < products; ++p) {
    w[p].units = p < of_reset ? 2 * hidden : hidden;
    w[p].depth[0] = w[p].weight_row[0] = p < of_reset ? in : hidden;
  }
  return w;
}

// Where each product's weights begin, in bytes, and where the last one's end.
template <class W>
std::array<int64_t, products + 1> stream_layout(const std::array<StreamWeights<float>, products>& shapes) {
  std::array<int64_t, products + 1> at{};
  for (int p = 0; p < products; ++p) at[p + 1] = at[p] + PYFLOWGEN_CALL_OF((stream_packed_bytes<float, W>), shapes[p]);
  return at;
}

template <class W> Tensor step_pack_as(const Matrices& m, const Optional& bias, ScalarType dtype) {
  const int64_t in = m.weight_x.size(1), hidden = m.weight_h.size(1);
  auto all = stream_shapes(in, hidden);
  const std::vector<float> zero(size_t(2 * hidden), 0.0f);
  const float* const matrices[products] = {data<float>(m.weight_x), data<float>(m.weight_0), data<float>(m.weight_h),
                                           data<float>(m.weight_h) + hidden * hidden};
  for (int p = 0; p < products; ++p)
    all[p].weight[0] = matrices[p], all[p].bias = p == of_current && bias ? data<float>(*bias) : zero.data();
  const auto layout = stream_layout<W>(all);
  const Tensor packed = torch::stable::new_empty(m.weight_h, {layout[products] / int64_t(sizeof(W))}, dtype);
  recurrence::use_large_pages(packed, layout[products]);
  for (int p = 0; p < products; ++p) {
    const int64_t depth = all[p].depth[0], blocks = PYFLOWGEN_CALL(stream_blocks<float>, false, all[p].units);
    const int64_t threads = std::min(blocks, threads_for(8 * blocks * stream_block_rows * depth));
    in_threads(threads, [&](int64_t i) {
      std::vector<float> scratch(size_t(stream_block_rows * depth));
      PYFLOWGEN_CALL_OF((stream_pack<float, W>), all[p], static_cast<char*>(packed.data_ptr()) + layout[p],
                        scratch.data(), blocks * i / threads, blocks * (i + 1) / threads);
    });
  }
  return packed;
}

Tensor idu_step_pack(Tensor weight_x, Tensor weight_0, Tensor weight_h, Optional bias, int64_t storage) {
  const Matrices m{dense(weight_x), dense(weight_0), dense(weight_h)};
  check(m);
  STD_TORCH_CHECK(weight_h.scalar_type() == ScalarType::Float && (storage == 1 || storage == 2),
                  "idu_step_pack: float32 weights become bf16 (storage 1) or int8 (2), got storage ", storage);
  STD_TORCH_CHECK(!bias || (bias->numel() == 4 * weight_h.size(1) && bias->scalar_type() == ScalarType::Float),
                  "idu_step_pack: bias must have shape (", 4 * weight_h.size(1), ",) and the weights' dtype");
  if (storage == int64_t(recurrence::Storage::bf16))
    return step_pack_as<bf16>(m, recurrence::dense(bias), ScalarType::BFloat16);
  return step_pack_as<int8_t>(m, recurrence::dense(bias), ScalarType::Char);
}

struct Step {
  IduShape shape;
  int64_t in, cached_row;  // cached's sequences may lie apart
  const float *x, *cached, *bias;
  float *given, *h;
};

// One region for the frame. A thread makes a block of a product and goes on with the same units of the gates, so that
// all meet once a phase.
template <class W> void step_as(const Step& o, const Tensor& packed) {
  const IduShape& s = o.shape;
  const int64_t batch = s.batch, hidden = s.hidden, in = o.in, last = s.window - 1, state = batch * hidden;
  const auto shapes = stream_shapes(in, hidden);
  const auto layout = stream_layout<W>(shapes);
  STD_TORCH_CHECK(packed.numel() * int64_t(sizeof(W)) == layout[products] && packed.is_contiguous(), "idu_step: x has ",
                  in, " and the cache ", 2 * hidden, " features, the packed weights do not");
  if (batch == 0) return;
  const int64_t scratch =
      (PYFLOWGEN_CALL_OF((stream_scratch_bytes<float, W>), batch, std::max(in, hidden)) + 63) / 64 * 64;
  // Weights of a step that one core reads in less time than two need to meet.
  constexpr int64_t least = 160 << 10;
  const int64_t work = (layout[products] - layout[of_reset]) * std::max<int64_t>(1, batch / 4);
  const int64_t threads = work < least ? 1 : torch::stable::get_num_threads();
  const auto room = std::make_unique_for_overwrite<float[]>(size_t(9 * state));
  const auto bytes = std::make_unique_for_overwrite<char[]>(size_t(threads * scratch));
  float *fresh = room.get(), *current = fresh + 2 * state, *states = current + 2 * state, *inner = states + 2 * state;
  float* sums = inner + state;
  const char* weights = static_cast<const char*>(packed.data_ptr());
  int64_t start = last;  // before it no window has a chunk
  for (int64_t row = 0; row < batch; ++row) start = std::min(start, s.first(row));
  std::fill_n(states + start % 2 * state, state, 0.0f);
  const IduForward<float> forward{s,
                                  o.given,
                                  current,
                                  o.bias ? o.bias + 2 * hidden : nullptr,
                                  o.bias ? o.bias + 3 * hidden : nullptr,
                                  nullptr,
                                  nullptr,
                                  states,
                                  inner,
                                  nullptr,
                                  sums};
  const int64_t blocks = PYFLOWGEN_CALL(stream_blocks<float>, false, hidden);
  const int64_t panels = PYFLOWGEN_CALL(linear_pack_tasks<float>, hidden);
  const int64_t panels_each = (panels + blocks - 1) / blocks;

  in_team(threads, [&](const Member& m) {
    const auto multiply = [&](int p, const float* a, float* y, int64_t begin, int64_t end) {
      StreamProduct<float> product{false, false,   batch,  shapes[p].units, {}, {}, weights + layout[p],
                                   y,     nullptr, nullptr};
      std::copy_n(shapes[p].depth, stream_parts, product.depth);
      product.in[0] = a;
      char* const own = bytes.get() + m.place * scratch;
      PYFLOWGEN_CALL_OF((stream_inputs<float, W>), product, own);
      PYFLOWGEN_CALL_OF((stream_product<float, W>), product, begin, end, own);
    };
    const int64_t all = PYFLOWGEN_CALL(stream_blocks<float>, false, 2 * hidden), width = 2 * hidden;
    multiply(of_chunk, o.x, fresh, m.begin(all), m.end(all));
    multiply(of_current, o.x, current, m.begin(all), m.end(all));
    for (int64_t row = m.begin(batch * last); row < m.end(batch * last); ++row)
      std::copy_n(o.cached + row / last * o.cached_row + row % last * width, width,
                  o.given + (row / last * s.window + row % last) * width);
    m.meet();
    if (m.place == 0)
      for (int64_t b = 0; b < batch; ++b)
        std::copy_n(fresh + b * width, width, o.given + (b * s.window + last) * width);
    if (start == last) m.meet();  // else the chunk is asked for after other meetings
    const int64_t begin = m.begin(blocks), end = m.end(blocks);
    for (int64_t t = start; t <= last; ++t)
      for (int64_t phase = 0; phase < (s.after ? 1 : 2); ++phase) {
        const float* h = states + t % 2 * state;
        if (t > start) {
          if (s.after || phase == 0) multiply(of_reset, h, sums, begin, end);
          if (s.after || phase == 1)
            multiply(of_candidate, s.after ? h : inner, sums + (s.after ? state : 0), begin, end);
        }
        PYFLOWGEN_CALL(idu_forward<float>, forward, phase, t, start, begin * panels_each,
                       std::min(panels, end * panels_each), 0, batch);
        m.meet();
      }
  });
  std::copy_n(states + s.window % 2 * state, state, o.h);
}

std::tuple<Tensor, Tensor> idu_step(Tensor x, Tensor cached, Tensor length, Tensor packed, Optional bias,
                                    bool reset_after, bool hard, bool keeps_state) {
  STD_TORCH_CHECK(x.dim() == 2 && cached.dim() == 3 && cached.size(0) == x.size(0) && length.dim() == 1 &&
                      length.size(0) == x.size(0) && cached.size(2) % 2 == 0,
                  "idu_step: x ", shape_of(x), ", cached ", shape_of(cached), " and length ", shape_of(length),
                  " do not fit, expected (batch, E), (batch, chunks, 2H) and (batch,)");
  const int64_t batch = x.size(0), window = cached.size(1) + 1, hidden = cached.size(2) / 2;
  const ScalarType storage = packed.scalar_type();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && cached.scalar_type() == ScalarType::Float &&
                      length.scalar_type() == ScalarType::Long &&
                      (storage == ScalarType::BFloat16 || storage == ScalarType::Char),
                  "idu_step: x and cached must be float32, length int64, and the weights made by idu_step_pack");
  STD_TORCH_CHECK(!bias || (bias->numel() == 4 * hidden && bias->scalar_type() == ScalarType::Float),
                  "idu_step: bias must have shape (", 4 * hidden, ",) and x's dtype");
  const Tensor dense_x = dense(x), lengths = dense(length);
  const Optional dense_bias = recurrence::dense(bias);
  if (!(cached.stride(2) == 1 && cached.stride(1) == 2 * hidden)) cached = torch::stable::contiguous(cached);
  const Tensor h = empty({batch, hidden}, x), given = empty({batch, window, 2 * hidden}, x);
  const Step o{{batch, 1, window, window, hidden, data<int64_t>(lengths), reset_after, hard, keeps_state},
               x.size(1),
               cached.stride(0),
               data<float>(dense_x),
               data<float>(cached),
               dense_bias ? data<float>(*dense_bias) : nullptr,
               out<float>(given),
               out<float>(h)};
  if (storage == ScalarType::BFloat16) step_as<bf16>(o, packed);
  else step_as<int8_t>(o, packed);
  return {h, given};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("idu", TORCH_BOX(&idu));
  m.impl("idu_backward", TORCH_BOX(&idu_backward));
  m.impl("idu_pack", TORCH_BOX(&idu_pack));
  m.impl("idu_step_pack", TORCH_BOX(&idu_step_pack));
  m.impl("idu_step", TORCH_BOX(&idu_step));
}

}  // namespace pyflowgen
