// trn on the CPU: the way through a clip, threads, registration.
//
// Floor at batch 1: every matrix read once a frame, the decoder's L times; nothing else is of that size. Each product
// shares its panels between the threads; what lies between products is small, and done by the caller.
#include "trn.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/packed.h"
#include "cpu/recurrence_call.h"
#include "cpu/shares.h"
#include "stream_product.h"

namespace pyflowgen {
namespace {

template <class T>
Packed<T> packed(const char* name, const Tensor& panels, const Tensor* bias, int64_t out_features, int64_t in) {
  STD_TORCH_CHECK(panels.numel() == PYFLOWGEN_CALL(linear_packed_size<T>, in, out_features) && panels.is_contiguous(),
                  "trn: ", name, " must be linear_pack of a matrix of shape (", out_features, ", ", in, ")");
  STD_TORCH_CHECK(!bias || (bias->numel() == out_features && bias->is_contiguous()), "trn: the bias of ", name,
                  " must have shape (", out_features, ",)");
  return {out_features, in, data<T>(panels), bias ? data<T>(*bias) : nullptr};
}

// x[i] *= mask[i], the rows of x being stride apart.
template <class T> void mask_columns(int64_t rows, int64_t columns, const T* mask, T* x, int64_t stride) {
  if (mask)
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t j = 0; j < columns; ++j) x[b * stride + j] *= mask[b * columns + j];
}
template <class T> void copy_columns(int64_t rows, int64_t columns, const T* from, T* to, int64_t stride) {
  for (int64_t b = 0; b < rows; ++b) std::copy_n(from + b * columns, columns, to + b * stride);
}
template <class T> void take_columns(int64_t rows, int64_t columns, const T* from, int64_t stride, T* to) {
  for (int64_t b = 0; b < rows; ++b) std::copy_n(from + b * stride, columns, to + b * columns);
}

struct Sizes { int64_t frames, batch, hidden, features, classes, steps; };

// Where frame t's part of a buffer begins: one for each frame when they are kept, else the same for all.
template <class T> struct Frames {
  T* data;
  int64_t stride;
  T* operator[](int64_t t) const { return data + t * stride; }
};

struct Kept { Tensor hs, cs, scores, futures, enc_in, enc_gates, dec_in, dec_gates, gs, ks, rows; };

// dropout's factors, or null.
template <class T> struct Masks { const T *future, *u, *g; };
using Optional = std::optional<Tensor>;
template <class T> Masks<T> masks_of(const Optional& future, const Optional& u, const Optional& g) {
  for (const Optional* t : {&future, &u, &g})
    STD_TORCH_CHECK(!*t || (*t)->is_contiguous(), "trn: masks must be contiguous");
  return {future ? data<T>(*future) : nullptr, u ? data<T>(*u) : nullptr, g ? data<T>(*g) : nullptr};
}

struct Matrices {
  const Tensor &enc, &dec, &dec_bias, &hx, &hx_bias, &cx, &cx_bias, &fusion, &fusion_bias, &ahead, &ahead_bias,
      &classifier, &classifier_bias;
};

template <class T> Kept forward(const Tensor& given, const Tensor& h, const Tensor& c, const Tensor& future,
                                const Matrices& m, const Sizes& s, const Masks<T>& masks, bool before, bool previous,
                                bool keep) {
  const int64_t T_ = s.frames, B = s.batch, H = s.hidden, F = s.features, C = s.classes, L = s.steps;
  const Packed<T> enc = packed<T>("enc", m.enc, nullptr, 4 * H, F + H);
  const Packed<T> dec = packed<T>("dec", m.dec, &m.dec_bias, 4 * H, 2 * H);
  const Packed<T> hx = packed<T>("hx", m.hx, &m.hx_bias, H, H), cx = packed<T>("cx", m.cx, &m.cx_bias, H, H);
  const Packed<T> fusion = packed<T>("fusion", m.fusion, &m.fusion_bias, H, C);
  const Packed<T> ahead = packed<T>("ahead", m.ahead, &m.ahead_bias, F, H);
  const Packed<T> classifier = packed<T>("classifier", m.classifier, &m.classifier_bias, C, H);
  const int64_t n = keep ? T_ : 1, wide = before ? 1 : L;
  Kept k{empty({keep ? T_ + 1 : T_, B, H}, h),
         empty({n + 1, B, H}, h),
         empty({T_, L, B, C}, h),
         empty({n, B, F}, h),
         empty({n, B, F + H}, h),
         empty({n, B, 4 * H}, h),
         empty({n, L, B, 2 * H}, h),
         empty({n, L, B, 4 * H}, h),
         empty({n, L + 1, B, H}, h),
         empty({n, L + 1, B, H}, h),
         empty({n, wide, B, before ? H : F}, h)};
  const auto frames = [&](const Tensor& t, int64_t size) { return Frames<T>{out<T>(t), keep ? size : 0}; };
  const Frames<T> futures = frames(k.futures, B * F), enc_in = frames(k.enc_in, B * (F + H));
  const Frames<T> enc_gates = frames(k.enc_gates, B * 4 * H), dec_in = frames(k.dec_in, L * B * 2 * H);
  const Frames<T> dec_gates = frames(k.dec_gates, L * B * 4 * H), gs = frames(k.gs, (L + 1) * B * H);
  const Frames<T> ks = frames(k.ks, (L + 1) * B * H), rows = frames(k.rows, wide * B * (before ? H : F));
  const Tensor u_buffer = empty({B, H}, h);
  T *us = out<T>(u_buffer), *hs = out<T>(k.hs), *scores = out<T>(k.scores);
  // Without keeping, the cell goes to and fro between two rows.
  const auto cell_at = [&](int64_t t) { return out<T>(k.cs) + (keep ? t : t % 2) * B * H; };
  // The state before frame t; not kept, the first is the argument itself.
  const auto state_at = [&](int64_t t) {
    return keep ? hs + t * B * H : t ? hs + (t - 1) * B * H : const_cast<T*>(data<T>(h));
  };
  if (keep) std::copy_n(data<T>(h), B * H, hs);
  std::copy_n(data<T>(c), B * H, cell_at(0));

  in_team(team_size(B * 8 * H * H), [&](const Member& m) {
    const int64_t first = m.begin(B), count = m.end(B) - first;  // the member's rows
    T* const u = us + first * H;
    const auto cell = [&](T* gates, const T* extra, const T* c_before, T* c_next, T* h_next) {
      PYFLOWGEN_CALL(trn_cell<T>, {B, H, gates, extra, c_before, c_next, h_next}, first, first + count);
    };
    const auto decode = [&](int64_t t, const T* from_h, const T* from_c) {
      T *g = gs[t], *cells = ks[t];
      hx.share(m, B, from_h, Activation::relu, g);
      cx.share(m, B, from_c, Activation::relu, cells);
      m.meet();
      for (int64_t i = 0; i < L; ++i, g += B * H, cells += B * H) {
        T* in = dec_in[t] + i * B * 2 * H;
        if (i) {
          copy_columns(count, H, u, in + first * 2 * H, 2 * H);
          mask_columns(count, H, masks.u ? masks.u + ((t * L + i) * B + first) * H : nullptr, in + first * 2 * H,
                       2 * H);
        } else {
          for (int64_t b = first; b < first + count; ++b) std::fill_n(in + b * 2 * H, H, T(0));
        }
        copy_columns(count, H, g + first * H, in + first * 2 * H + H, 2 * H);
        m.meet();
        T* gates = dec_gates[t] + i * B * 4 * H;
        dec.share(m, B, in, Activation::none, gates, 0, i ? 0 : H);
        m.meet();
        cell(gates, nullptr, cells, cells + B * H, g + B * H);
        T* q = scores + ((t * L + i) * B + first) * C;
        const T* read = g + (B + first) * H;
        if (masks.g) {
          std::copy_n(read, count * H, u);
          mask_columns(count, H, masks.g + ((t * L + i) * B + first) * H, u, H);
          read = u;
        }
        classifier.alone(count, read, Activation::none, q);
        if (i + 1 < L) fusion.alone(count, q, Activation::relu, u);
      }
      const T* states = gs[t] + B * H;
      const auto mean = [&](const T* of, int64_t width, T* to) {
        PYFLOWGEN_CALL(trn_mean<T>, L, count * width, of + first * width, B * width, to + first * width);
      };
      if (before) {
        mean(states, H, rows[t]);
        m.meet();
        ahead.share(m, B, rows[t], Activation::relu, futures[t]);
        m.meet();
      } else {
        m.meet();
        ahead.share(m, L * B, states, Activation::relu, rows[t]);
        m.meet();
        mean(rows[t], F, futures[t]);
      }
    };
    for (int64_t t = 0; t < T_; ++t) {
      const T *h_before = state_at(t), *c_before = cell_at(t);
      if (previous) decode(t, h_before, c_before);
      const T* fed = previous ? futures[t] : t ? futures[t - 1] : data<T>(future);
      T* in = enc_in[t] + first * (F + H);
      copy_columns(count, F, fed + first * F, in, F + H);
      mask_columns(count, F, masks.future ? masks.future + (t * B + first) * F : nullptr, in, F + H);
      copy_columns(count, H, h_before + first * H, in + F, F + H);
      m.meet();
      enc.share(m, B, enc_in[t], Activation::none, enc_gates[t]);
      m.meet();
      cell(enc_gates[t], data<T>(given) + t * B * 4 * H, c_before, cell_at(t + 1), state_at(t + 1));
      m.meet();
      if (!previous) decode(t, state_at(t + 1), cell_at(t + 1));
    }
  });
  return k;
}

Sizes sizes(const Tensor& given, const Tensor& h, const Tensor& c, const Tensor& future, const Tensor& classifier_bias,
            int64_t steps) {
  STD_TORCH_CHECK(given.dim() == 3 && h.dim() == 2 && future.dim() == 2,
                  "trn: given must be (frames, batch, 4 hidden)");
  const Sizes s{given.size(0), h.size(0), h.size(1), future.size(1), classifier_bias.numel(), steps};
  STD_TORCH_CHECK(given.size(1) == s.batch && given.size(2) == 4 * s.hidden && future.size(0) == s.batch &&
                      c.numel() == h.numel() && steps >= 1,
                  "trn: given ", shape_of(given), ", h ", shape_of(h), ", c ", shape_of(c), " and future ",
                  shape_of(future), " do not fit");
  return s;
}

Kept run(Tensor given, Tensor h, Tensor c, Tensor future, const Matrices& m, int64_t steps, bool before, bool previous,
         bool keep, const Optional& mask_future, const Optional& mask_u, const Optional& mask_g) {
  const Sizes s = sizes(given, h, c, future, m.classifier_bias, steps);
  const ScalarType dtype = h.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "trn: the kernel takes float32 and float64");
  for (const Tensor* t : std::initializer_list<const Tensor*>{
           &given, &c, &future, &m.enc, &m.dec, &m.dec_bias, &m.hx, &m.hx_bias, &m.cx, &m.cx_bias, &m.fusion,
           &m.fusion_bias, &m.ahead, &m.ahead_bias, &m.classifier, &m.classifier_bias})
    STD_TORCH_CHECK(t->scalar_type() == dtype, "trn: all tensors must have h's dtype");
  const auto go = [&]<class T>() {
    return forward<T>(dense(given), dense(h), dense(c), dense(future), m, s, masks_of<T>(mask_future, mask_u, mask_g),
                      before, previous, keep);
  };
  return dtype == ScalarType::Float ? go.operator()<float>() : go.operator()<double>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> trn(Tensor given, Tensor h, Tensor c, Tensor future, Tensor enc, Tensor dec,
                                               Tensor dec_bias, Tensor hx, Tensor hx_bias, Tensor cx, Tensor cx_bias,
                                               Tensor fusion, Tensor fusion_bias, Tensor ahead, Tensor ahead_bias,
                                               Tensor classifier, Tensor classifier_bias, int64_t steps, bool before,
                                               bool previous) {
  const Matrices m{enc,         dec,   dec_bias,   hx,         hx_bias,        cx, cx_bias, fusion,
                   fusion_bias, ahead, ahead_bias, classifier, classifier_bias};
  Kept k = run(given, h, c, future, m, steps, before, previous, false, {}, {}, {});
  const bool any = given.size(0) > 0;
  return {k.hs, k.scores, torch::stable::clone(torch::stable::select(k.cs, 0, given.size(0) % 2)),
          any ? torch::stable::select(k.futures, 0, 0) : torch::stable::clone(future)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> trn_keep(
    Tensor given, Tensor h, Tensor c, Tensor future, Tensor enc, Tensor dec, Tensor dec_bias, Tensor hx, Tensor hx_bias,
    Tensor cx, Tensor cx_bias, Tensor fusion, Tensor fusion_bias, Tensor ahead, Tensor ahead_bias, Tensor classifier,
    Tensor classifier_bias, int64_t steps, bool before, bool previous, Optional mask_future, Optional mask_u,
    Optional mask_g) {
  const Matrices m{enc,         dec,   dec_bias,   hx,         hx_bias,        cx, cx_bias, fusion,
                   fusion_bias, ahead, ahead_bias, classifier, classifier_bias};
  Kept k = run(given, h, c, future, m, steps, before, previous, true, mask_future, mask_u, mask_g);
  return {k.hs, k.cs, k.scores, k.futures, k.enc_in, k.enc_gates, k.dec_in, k.dec_gates, k.gs, k.ks, k.rows};
}

struct Gradients { Tensor dgiven, ddec_gates, dq, du, drows, dhx, dcx, dh, dc, dfuture; };

template <class T> Gradients backward(const Tensor& dhs, const Tensor& dc_last, const Tensor& dfuture_last,
                                      const Tensor& dscores, const Tensor& cs, const Tensor& futures,
                                      const Tensor& enc_gates, const Tensor& dec_in, const Tensor& dec_gates,
                                      const Tensor& gs, const Tensor& ks, const Tensor& rows, const Matrices& m,
                                      const Masks<T>& masks, bool before, bool previous) {
  const int64_t T_ = dscores.size(0), L = dscores.size(1), B = dscores.size(2), C = dscores.size(3);
  const int64_t H = cs.size(2), F = futures.size(2), wide = before ? 1 : L;
  const Packed<T> enc = packed<T>("enc", m.enc, nullptr, F + H, 4 * H),
                  dec = packed<T>("dec", m.dec, nullptr, 2 * H, 4 * H);
  const Packed<T> hx = packed<T>("hx", m.hx, nullptr, H, H), cx = packed<T>("cx", m.cx, nullptr, H, H);
  const Packed<T> fusion = packed<T>("fusion", m.fusion, nullptr, C, H);
  const Packed<T> ahead = packed<T>("ahead", m.ahead, nullptr, H, F);
  const Packed<T> classifier = packed<T>("classifier", m.classifier, nullptr, H, C);
  Gradients d{empty({T_, B, 4 * H}, cs),   empty({T_, L, B, 4 * H}, cs),
              empty({T_, L, B, C}, cs),    empty({T_, L, B, H}, cs),
              empty({T_, wide, B, F}, cs), empty({T_, B, H}, cs),
              empty({T_, B, H}, cs),       empty({B, H}, cs),
              empty({B, H}, cs),           empty({B, F}, cs)};
  const int64_t widest = std::max(H, C);
  const Tensor dstates_buffer = empty({L, B, H}, cs), both_buffer = empty({B, std::max(2 * H, F + H)}, cs);
  const Tensor small_buffer = empty({2, B, widest}, cs), dk_buffer = empty({B, H}, cs);
  T *dstates = out<T>(dstates_buffer), *both = out<T>(both_buffer), *dk = out<T>(dk_buffer);
  T *dh = out<T>(d.dh), *dc = out<T>(d.dc), *dfuture = out<T>(d.dfuture);
  std::fill_n(dh, B * H, T(0));
  std::copy_n(data<T>(dc_last), B * H, dc);
  std::copy_n(data<T>(dfuture_last), B * F, dfuture);
  const auto relu_backward = [&](int64_t count, const T* y, const T* dy, T scale, T* dz) {
    PYFLOWGEN_CALL(trn_relu_backward<T>, count, y, dy, scale, dz);
  };
  const auto add = [&](int64_t count, T scale, const T* from, T* to) {
    PYFLOWGEN_CALL(trn_add<T>, count, scale, from, to);
  };

  in_team(team_size(B * 8 * H * H), [&](const Member& m) {
    const int64_t first = m.begin(B), count = m.end(B) - first;  // the member's rows
    T *some = out<T>(small_buffer) + first * widest, *part = some + B * widest;
    const auto cell = [&](const T* gates, const T* c_before, const T* c_next, const T* dh_next, T* dcell, T* dgates) {
      PYFLOWGEN_CALL(trn_cell_backward<T>, {B, H, gates, c_before, c_next, dh_next, dcell, dgates}, first,
                     first + count);
    };
    // Adds to dh and dc what the decoder of frame t asks for, dfuture being the gradient of its future feature.
    const auto decode = [&](int64_t t) {
      const T *g = data<T>(gs) + t * (L + 1) * B * H, *cells = data<T>(ks) + t * (L + 1) * B * H;
      T* drow = out<T>(d.drows) + t * wide * B * F;
      if (before) {
        relu_backward(count * F, data<T>(futures) + (t * B + first) * F, dfuture + first * F, T(1), drow + first * F);
        m.meet();
        ahead.share(m, B, drow, Activation::none, both);
        m.meet();
        for (int64_t i = 0; i < L; ++i) {
          T* dstate = dstates + (i * B + first) * H;
          std::fill_n(dstate, count * H, T(0));
          add(count * H, T(1) / T(L), both + first * H, dstate);
        }
      } else {
        for (int64_t i = 0; i < L; ++i)
          relu_backward(count * F, data<T>(rows) + ((t * L + i) * B + first) * F, dfuture + first * F, T(1) / T(L),
                        drow + (i * B + first) * F);
        m.meet();
        ahead.share(m, L * B, drow, Activation::none, dstates);
        m.meet();
      }
      std::fill_n(dk + first * H, count * H, T(0));
      for (int64_t i = L - 1; i >= 0; --i) {
        const int64_t row = (t * L + i) * B + first, later = row + B;
        T *du = out<T>(d.du) + row * H, *dq = out<T>(d.dq) + row * C, *dstate = dstates + (i * B + first) * H;
        std::copy_n(data<T>(dscores) + row * C, count * C, dq);
        if (i + 1 < L) {  // both: gradient of [u; g] that the next step took
          const T* taken = both + first * 2 * H;
          take_columns(count, H, taken, 2 * H, part);
          mask_columns(count, H, masks.u ? masks.u + later * H : nullptr, part, H);
          take_columns(count, H, data<T>(dec_in) + later * 2 * H, 2 * H, some);
          relu_backward(count * H, some, part, T(1), du);
          fusion.alone(count, du, Activation::none, some);
          add(count * C, T(1), some, dq);
          take_columns(count, H, taken + H, 2 * H, part);
          add(count * H, T(1), part, dstate);
        } else {
          std::fill_n(du, count * H, T(0));
        }
        classifier.alone(count, dq, Activation::none, part);
        mask_columns(count, H, masks.g ? masks.g + row * H : nullptr, part, H);
        add(count * H, T(1), part, dstate);
        T* dgates = out<T>(d.ddec_gates) + (t * L + i) * B * 4 * H;
        cell(data<T>(dec_gates) + (t * L + i) * B * 4 * H, cells + i * B * H, cells + (i + 1) * B * H,
             dstates + i * B * H, dk, dgates);
        m.meet();
        dec.share(m, B, dgates, Activation::none, both, 0, 0, i ? 0 : H);  // u_0 asks for none
        m.meet();
      }
      T *dhx = out<T>(d.dhx) + t * B * H, *dcx = out<T>(d.dcx) + t * B * H;
      take_columns(count, H, both + first * 2 * H + H, 2 * H, part);
      relu_backward(count * H, g + first * H, part, T(1), dhx + first * H);
      relu_backward(count * H, cells + first * H, dk + first * H, T(1), dcx + first * H);
      m.meet();
      hx.share(m, B, dhx, Activation::none, both);
      cx.share(m, B, dcx, Activation::none, both + B * H);
      m.meet();
      add(count * H, T(1), both + first * H, dh + first * H);
      add(count * H, T(1), both + (B + first) * H, dc + first * H);
    };
    for (int64_t t = T_ - 1; t >= 0; --t) {
      add(count * H, T(1), data<T>(dhs) + (t * B + first) * H, dh + first * H);
      if (!previous) decode(t);
      T* dgates = out<T>(d.dgiven) + t * B * 4 * H;
      cell(data<T>(enc_gates) + t * B * 4 * H, data<T>(cs) + t * B * H, data<T>(cs) + (t + 1) * B * H, dh, dc, dgates);
      m.meet();
      enc.share(m, B, dgates, Activation::none, both);
      m.meet();
      T* taken = both + first * (F + H);
      mask_columns(count, F, masks.future ? masks.future + (t * B + first) * F : nullptr, taken, F + H);
      take_columns(count, H, taken + F, F + H, dh + first * H);
      if (previous && t == T_ - 1) {  // the last future feature is a result too
        for (int64_t b = 0; b < count; ++b) add(F, T(1), taken + b * (F + H), dfuture + (first + b) * F);
      } else {
        take_columns(count, F, taken, F + H, dfuture + first * F);
      }
      if (previous) decode(t);
    }
  });
  if (previous && T_) std::fill_n(dfuture, B * F, T(0));  // the first frame makes its own
  return d;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> trn_backward(
    Tensor dhs, Tensor dc, Tensor dfuture, Tensor dscores, Tensor cs, Tensor futures, Tensor enc_gates, Tensor dec_in,
    Tensor dec_gates, Tensor gs, Tensor ks, Tensor rows, Tensor enc, Tensor dec, Tensor hx, Tensor cx, Tensor fusion,
    Tensor ahead, Tensor classifier, bool before, bool previous, Optional mask_future, Optional mask_u,
    Optional mask_g) {
  const ScalarType dtype = cs.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "trn: the kernel takes float32 and float64");
  STD_TORCH_CHECK(dscores.dim() == 4 && cs.dim() == 3 && futures.dim() == 3 &&
                      dhs.numel() == dscores.size(0) * dscores.size(2) * cs.size(2),
                  "trn_backward: dscores ", shape_of(dscores), " and dhs ", shape_of(dhs), " do not fit");
  const Matrices m{enc, dec, dec, hx, hx, cx, cx, fusion, fusion, ahead, ahead, classifier, classifier};
  const auto go = [&]<class T>() {
    return backward<T>(dense(dhs), dense(dc), dense(dfuture), dense(dscores), cs, futures, enc_gates, dec_in, dec_gates,
                       gs, ks, rows, m, masks_of<T>(mask_future, mask_u, mask_g), before, previous);
  };
  const Gradients d = dtype == ScalarType::Float ? go.operator()<float>() : go.operator()<double>();
  return {d.dgiven, d.ddec_gates, d.dq, d.du, d.drows, d.dhx, d.dcx, d.dh, d.dc, d.dfuture};
}

// ---- a stream's step
// ------------------------------------------------------------------------------------------------- Its weights lie in
// one tensor, in the order of the products; see trn_pack in csrc/trn.cpp for what it is made of.
enum Product { input, encoder, hx_layer, cx_layer, decoder, future_layer, classifier_layer, fusion_layer, products };
inline constexpr bool is_cell(int product) { return product == encoder || product == decoder; }
// So small, and so near to the scores, that they keep the weights' own dtype.
inline constexpr bool is_exact(int product) { return product >= classifier_layer; }

// f<W>() with the storage of a product.
template <class T, class W, class F> auto with_storage(int product, const F& f) {
  return is_exact(product) ? f.template operator()<T>() : f.template operator()<W>();
}

template <class T> std::array<StreamWeights<T>, products> stream_shapes(int64_t F, int64_t H, int64_t C) {
  std::array<StreamWeights<T>, products> w{};
  const auto shape = [&](int product, int64_t units, int64_t a, int64_t b = 0, int64_t c = 0) {
    w[product].cell = is_cell(product), w[product].units = units;
    w[product].depth[0] = a, w[product].depth[1] = b, w[product].depth[2] = c;
  };
  shape(input, F, F), shape(encoder, H, F, F, H), shape(hx_layer, H, H), shape(cx_layer, H, H);
  shape(decoder, H, H, H), shape(future_layer, F, H), shape(classifier_layer, C, H), shape(fusion_layer, H, C);
  return w;
}

// Where each product's weights begin, in bytes, and where the last one's end.
template <class T, class W>
std::array<int64_t, products + 1> stream_layout(const std::array<StreamWeights<T>, products>& shapes) {
  std::array<int64_t, products + 1> at{};
  for (int p = 0; p < products; ++p)
    at[p + 1] = at[p] + with_storage<T, W>(
                            p, [&]<class V>() { return PYFLOWGEN_CALL_OF((stream_packed_bytes<T, V>), shapes[p]); });
  return at;
}

Tensor trn_pack(std::vector<Tensor> weights, int64_t storage) {
  STD_TORCH_CHECK(weights.size() == 18, "trn_pack: expected 18 weights, got ", weights.size());
  for (Tensor& t : weights) t = dense(t);
  const Tensor &enc = weights[2], &classifier = weights[16];
  STD_TORCH_CHECK(enc.dim() == 2 && classifier.dim() == 2, "trn_pack: matrices must have two dimensions");
  const int64_t F = enc.size(1) / 2, H = classifier.size(1), C = classifier.size(0);
  const int64_t shapes[18][2] = {{F, F},     {F, 1},     {4 * H, 2 * F}, {4 * H, H}, {4 * H, 1}, {4 * H, H},
                                 {4 * H, H}, {4 * H, 1}, {H, H},         {H, 1},     {H, H},     {H, 1},
                                 {H, C},     {H, 1},     {F, H},         {F, 1},     {C, H},     {C, 1}};
  const ScalarType dtype = enc.scalar_type();
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& t = weights[i];
    STD_TORCH_CHECK(t.dim() >= 1 && t.size(0) == shapes[i][0] && t.numel() == shapes[i][0] * shapes[i][1] &&
                        t.scalar_type() == dtype,
                    "trn_pack: weight ", i, " has shape ", shape_of(t), ", expected (", shapes[i][0], ", ",
                    shapes[i][1], ") and the dtype of the others");
  }
  STD_TORCH_CHECK(dtype == ScalarType::Float || (dtype == ScalarType::Double && storage == 0),
                  "trn_pack: the kernel takes float32 and float64, bf16 and int8 storage float32");
  return recurrence::with_type(enc, [&]<class T>() {
    const auto as = [&]<class W>(ScalarType packed_dtype) {
      auto all = stream_shapes<T>(F, H, C);
      const auto set = [&](int product, std::initializer_list<const T*> matrices, std::initializer_list<int64_t> rows,
                           int bias) {
        std::copy(matrices.begin(), matrices.end(), all[product].weight);
        std::copy(rows.begin(), rows.end(), all[product].weight_row);
        all[product].bias = data<T>(weights[bias]);
      };
      const auto at = [&](int i) { return data<T>(weights[i]); };
      set(input, {at(0)}, {F}, 1);
      set(encoder, {at(2), at(2) + F, at(3)}, {2 * F, 2 * F, H}, 4);
      set(decoder, {at(5), at(6)}, {H, H}, 7);
      set(hx_layer, {at(8)}, {H}, 9), set(cx_layer, {at(10)}, {H}, 11), set(fusion_layer, {at(12)}, {C}, 13);
      set(future_layer, {at(14)}, {H}, 15), set(classifier_layer, {at(16)}, {H}, 17);
      const auto layout = stream_layout<T, W>(all);
      const Tensor packed = torch::stable::new_empty(enc, {layout[products] / int64_t(sizeof(W))}, packed_dtype);
      recurrence::use_large_pages(packed, layout[products]);
      for (int p = 0; p < products; ++p) {
        const StreamWeights<T>& w = all[p];
        const int64_t deepest = *std::max_element(w.depth, w.depth + stream_parts);
        const int64_t blocks = PYFLOWGEN_CALL(stream_blocks<T>, w.cell, w.units);
        const int64_t threads = std::min(blocks, threads_for(8 * blocks * stream_block_rows * deepest));
        in_threads(threads, [&](int64_t i) {
          std::vector<T> scratch(size_t(stream_block_rows * deepest));
          with_storage<T, W>(p, [&]<class V>() {
            PYFLOWGEN_CALL_OF((stream_pack<T, V>), w, static_cast<char*>(packed.data_ptr()) + layout[p], scratch.data(),
                              blocks * i / threads, blocks * (i + 1) / threads);
          });
        });
      }
      return packed;
    };
    if constexpr (std::is_same_v<T, float>) {
      if (recurrence::Storage(storage) == recurrence::Storage::bf16)
        return as.template operator()<bf16>(ScalarType::BFloat16);
      if (recurrence::Storage(storage) == recurrence::Storage::int8)
        return as.template operator()<int8_t>(ScalarType::Char);
    }
    return as.template operator()<T>(dtype);
  });
}

// What a frame needs and gives; buffers are dense.
template <class T> struct Step {
  int64_t batch, features, hidden, classes, steps;
  bool before, previous;
  const T *frame, *h, *c, *future;
  T *scores, *ahead, *h_next, *c_next, *future_next;
};

// All of a frame in one region. What each product writes, its threads share block by block; they meet where the next
// one reads it. The decoder's scores are so small a product that each thread makes them for itself.
template <class T, class W> void step_as(const Step<T>& o, const Tensor& packed) {
  const int64_t B = o.batch, F = o.features, H = o.hidden, C = o.classes, L = o.steps;
  const auto shapes = stream_shapes<T>(F, H, C);
  const auto layout = stream_layout<T, W>(shapes);
  STD_TORCH_CHECK(packed.numel() * int64_t(sizeof(W)) == layout[products] && packed.is_contiguous(),
                  "trn_step: the frame and the state have ", F, " and ", H, " features, ", C,
                  " classes, the packed weights do not");
  if (B == 0) return;
  std::array<int64_t, products> blocks, scratch_of;
  int64_t scratch = 0;
  for (int p = 0; p < products; ++p) {
    blocks[p] = PYFLOWGEN_CALL(stream_blocks<T>, shapes[p].cell, shapes[p].units);
    const int64_t depth = shapes[p].depth[0] + shapes[p].depth[1] + shapes[p].depth[2];
    scratch_of[p] = with_storage<T, W>(p, [&]<class V>() {
      return PYFLOWGEN_CALL_OF((stream_scratch_bytes<T, V>), (p == future_layer && !o.before ? L : 1) * B, depth);
    });
    scratch = std::max(scratch, scratch_of[p]);
  }
  scratch = (scratch + 63) / 64 * 64;
  // Weights of the decoder that one core reads in less time than two need to meet.
  constexpr int64_t least = 256 << 10;
  const int64_t work = (layout[decoder + 1] - layout[decoder]) * std::max<int64_t>(1, B / 4);
  const int64_t threads = work < least ? 1 : torch::stable::get_num_threads();
  // Of all: x, the decoder's states and cells, rows of the future. Of each thread: u, a frame's scores, a mean.
  const int64_t shared = B * F + (L + 2) * B * H + (o.before ? 0 : L * B * F), own = 2 * B * H + B * C;
  const auto room = std::make_unique_for_overwrite<T[]>(size_t(shared + threads * own));
  const auto bytes = std::make_unique_for_overwrite<char[]>(size_t(threads * scratch));
  T *x = room.get(), *states = x + B * F, *cells = states + (L + 1) * B * H, *rows = cells + B * H;
  const char* weights = static_cast<const char*>(packed.data_ptr());

  // One for each product that the threads share, in the order of the frame.
  std::vector<Shares> shares;
  shares.reserve(size_t(L + 5));
  const auto next = [&](int p, bool backwards) { shares.emplace_back(threads, blocks[p], backwards); };
  const auto next_decoder = [&] {
    next(hx_layer, false), next(cx_layer, false);
    // To and fro: a core finds what it read last in its cache.
    for (int64_t i = 0; i < L; ++i) next(decoder, i % 2 == 1);
    next(future_layer, false);
  };
  next(input, false);
  if (o.previous) next_decoder();
  next(encoder, false);
  if (!o.previous) next_decoder();

  in_team(threads, [&](const Member& m) {
    T *u = room.get() + shared + m.place * own, *mean = u + B * H, *q = mean + B * H;
    Shares* turn = shares.data();
    const auto multiply = [&](int p, int64_t n, std::initializer_list<const T*> in, bool relu, T* y, const T* c,
                              T* c_next, Shares* between) {
      StreamProduct<T> product{is_cell(p), relu, n, shapes[p].units, {}, {}, weights + layout[p], y, c, c_next};
      std::copy_n(shapes[p].depth, stream_parts, product.depth);
      std::copy(in.begin(), in.end(), product.in);
      with_storage<T, W>(p, [&]<class V>() {
        char* const given = bytes.get() + m.place * scratch;
        const auto go = [&](int64_t begin, int64_t end) {
          PYFLOWGEN_CALL_OF((stream_product<T, V>), product, begin, end, given);
        };
        PYFLOWGEN_CALL_OF((stream_inputs<T, V>), product, given);
        if (between) between->each(m.place, [&](int64_t block) { go(block, block + 1); });
        else go(0, blocks[p]);
      });
    };
    const auto share = [&](int p, int64_t n, std::initializer_list<const T*> in, bool relu, T* y, const T* c = nullptr,
                           T* c_next = nullptr) { multiply(p, n, in, relu, y, c, c_next, turn++); };
    const auto alone = [&](int p, const T* in, bool relu, T* y) {
      multiply(p, B, {in}, relu, y, nullptr, nullptr, nullptr);
    };
    const auto decode = [&](const T* h, const T* c) {
      share(hx_layer, B, {h}, true, states), share(cx_layer, B, {c}, true, cells);
      m.meet();
      for (int64_t i = 0; i < L; ++i) {
        T* g = states + (i + 1) * B * H;
        share(decoder, B, {i ? u : nullptr, g - B * H}, false, g, cells, cells);
        m.meet();
        if (i + 1 == L && m.place) continue;  // nobody asks for its u
        alone(classifier_layer, g, false, q);
        if (i + 1 < L) alone(fusion_layer, q, true, u);
        if (!m.place)
          for (int64_t b = 0; b < B; ++b) std::copy_n(q + b * C, C, o.ahead + (b * L + i) * C);
      }
      if (o.before) {
        PYFLOWGEN_CALL(trn_mean<T>, L, B * H, states + B * H, B * H, mean);
        share(future_layer, B, {mean}, true, o.future_next);
      } else {
        share(future_layer, L * B, {states + B * H}, true, rows);
        m.meet();
        const int64_t from = m.begin(B * F), to = m.end(B * F);
        PYFLOWGEN_CALL(trn_mean<T>, L, to - from, rows + from, B * F, o.future_next + from);
      }
    };
    share(input, B, {o.frame}, true, x);
    if (o.previous) decode(o.h, o.c);
    m.meet();
    share(encoder, B, {x, o.previous ? o.future_next : o.future, o.h}, false, o.h_next, o.c, o.c_next);
    m.meet();
    if (m.place + 1 == m.size) alone(classifier_layer, o.h_next, false, o.scores);
    if (!o.previous) decode(o.h_next, o.c_next);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> trn_step(Tensor frame, Tensor h, Tensor c, Tensor future,
                                                            Tensor packed, int64_t classes, int64_t steps, bool before,
                                                            bool previous) {
  const ScalarType dtype = frame.scalar_type(), storage = packed.scalar_type();
  STD_TORCH_CHECK(frame.dim() == 2 && h.dim() == 2 && c.dim() == 2 && future.dim() == 2 && h.size(0) == frame.size(0) &&
                      c.size(0) == h.size(0) && c.size(1) == h.size(1) && future.size(0) == frame.size(0) &&
                      future.size(1) == frame.size(1) && steps >= 1 && classes >= 1,
                  "trn_step: frame ", shape_of(frame), ", h ", shape_of(h), ", c ", shape_of(c), " and future ",
                  shape_of(future), " do not fit, expected (batch, F), twice (batch, H) and (batch, F)");
  for (const Tensor* t : {&frame, &h, &c, &future})
    STD_TORCH_CHECK(t->scalar_type() == dtype, "trn_step: frame and state must have one dtype");
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) &&
                      (storage == dtype || (dtype == ScalarType::Float &&
                                            (storage == ScalarType::BFloat16 || storage == ScalarType::Char))),
                  "trn_step: frame and state must have the dtype that the weights were packed from");
  const Tensor v = dense(frame), dense_h = dense(h), dense_c = dense(c), dense_future = dense(future);
  const int64_t B = v.size(0), H = h.size(1), F = v.size(1);
  const Tensor scores = empty({B, classes}, v), ahead = empty({B, steps, classes}, v), h_next = empty({B, H}, v),
               c_next = empty({B, H}, v), future_next = empty({B, F}, v);
  recurrence::with_type(v, [&]<class T>() {
    const Step<T> o{B,
                    F,
                    H,
                    classes,
                    steps,
                    before,
                    previous,
                    data<T>(v),
                    data<T>(dense_h),
                    data<T>(dense_c),
                    data<T>(dense_future),
                    out<T>(scores),
                    out<T>(ahead),
                    out<T>(h_next),
                    out<T>(c_next),
                    out<T>(future_next)};
    if constexpr (std::is_same_v<T, float>) {
      if (storage == ScalarType::BFloat16) return step_as<T, bf16>(o, packed);
      if (storage == ScalarType::Char) return step_as<T, int8_t>(o, packed);
    }
    step_as<T, T>(o, packed);
  });
  return {scores, ahead, h_next, c_next, future_next};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("trn", TORCH_BOX(&trn));
  m.impl("trn_keep", TORCH_BOX(&trn_keep));
  m.impl("trn_backward", TORCH_BOX(&trn_backward));
  m.impl("trn_pack", TORCH_BOX(&trn_pack));
  m.impl("trn_step", TORCH_BOX(&trn_step));
}

}  // namespace pyflowgen
