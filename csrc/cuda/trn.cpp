// trn on CUDA: tensors to pointers, the current stream, registration.
#include "cuda/trn.h"

#include "cuda/recurrence_call.h"

namespace pyflowgen::cuda {
namespace {

// In the order of the operators' arguments; transposed in the backward pass.
struct Matrices {
  Tensor enc, dec, hx, cx, fusion, ahead, classifier;
  template <class T> TrnMatrices<T> pointers() const {
    return {data<T>(enc), data<T>(dec), data<T>(hx), data<T>(cx), data<T>(fusion), data<T>(ahead), data<T>(classifier)};
  }
};

void check_tensors(const Tensor& like, std::initializer_list<std::pair<const Tensor*, int64_t>> tensors) {
  for (const auto& [t, elements] : tensors) {
    STD_TORCH_CHECK(t->numel() == elements && t->is_contiguous(), "trn: a dense tensor of ", elements,
                    " elements expected, got shape ", shape_of(*t));
    STD_TORCH_CHECK(t->scalar_type() == like.scalar_type(), "trn: all tensors must have one dtype");
    check_device("trn", like, {t});
  }
}
void check_matrices(const Matrices& m, const TrnSizes& s, const Tensor& like) {
  const int64_t H = s.hidden, F = s.features, C = s.classes;
  check_tensors(like, {{&m.enc, 4 * H * (F + H)},
                       {&m.dec, 8 * H * H},
                       {&m.hx, H * H},
                       {&m.cx, H * H},
                       {&m.fusion, H * C},
                       {&m.ahead, F * H},
                       {&m.classifier, C * H}});
}
void check_masks(const Tensor& like, const TrnSizes& s, const Optional& future, const Optional& u, const Optional& g) {
  const int64_t frames = s.frames * s.batch;
  if (future) check_tensors(like, {{&*future, frames * s.features}});
  if (u) check_tensors(like, {{&*u, frames * s.steps * s.hidden}});
  if (g) check_tensors(like, {{&*g, frames * s.steps * s.hidden}});
}
template <class F> auto with_type(const Tensor& like, const F& f) {
  const ScalarType dtype = like.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "trn: the kernel takes float32 and float64");
  return dtype == ScalarType::Float ? f.template operator()<float>() : f.template operator()<double>();
}
template <class T> TrnMasks<T> masks(const Optional& future, const Optional& u, const Optional& g) {
  return {data_or_null<T>(future), data_or_null<T>(u), data_or_null<T>(g)};
}

struct Kept { Tensor hs, cs, scores, futures, enc_in, enc_gates, dec_in, dec_gates, gs, ks, rows; };

Kept forward(Tensor given, Tensor h, Tensor c, Tensor future, const Matrices& m, Tensor dec_bias, Tensor hx_bias,
             Tensor cx_bias, Tensor fusion_bias, Tensor ahead_bias, Tensor classifier_bias, int64_t steps, bool before,
             bool previous, bool keep, const Optional& mask_future, const Optional& mask_u, const Optional& mask_g) {
  const OnDevice device(given);
  STD_TORCH_CHECK(given.dim() == 3 && h.dim() == 2 && future.dim() == 2 && steps >= 1,
                  "trn: given must be (frames, batch, 4 hidden)");
  given = dense(given), h = dense(h), c = dense(c), future = dense(future);
  const TrnSizes s{given.size(0),
                   h.size(0),
                   h.size(1),
                   future.size(1),
                   classifier_bias.numel(),
                   steps,
                   before,
                   previous,
                   keep ? std::max<int64_t>(1, given.size(0)) : 2};
  const int64_t T_ = s.frames, B = s.batch, H = s.hidden, F = s.features, C = s.classes, L = s.steps;
  const int64_t n = keep ? T_ : 2, wide = before ? 1 : L;
  check_matrices(m, s, h);
  check_masks(h, s, mask_future, mask_u, mask_g);
  check_tensors(h, {{&given, T_ * B * 4 * H},
                    {&c, B * H},
                    {&future, B * F},
                    {&dec_bias, 4 * H},
                    {&hx_bias, H},
                    {&cx_bias, H},
                    {&fusion_bias, H},
                    {&ahead_bias, F},
                    {&classifier_bias, C}});
  Kept k{new_tensor(h, {T_ + 1, B, H}),
         new_tensor(h, {n + 1, B, H}),
         new_tensor(h, {T_, L, B, C}),
         new_tensor(h, {n, B, F}),
         new_tensor(h, {n, B, F + H}),
         new_tensor(h, {n, B, 4 * H}),
         new_tensor(h, {n, L, B, 2 * H}),
         new_tensor(h, {n, L, B, 4 * H}),
         new_tensor(h, {n, L + 1, B, H}),
         new_tensor(h, {n, L + 1, B, H}),
         new_tensor(h, {n, wide, B, before ? H : F})};
  if (T_ == 0 || B == 0) {
    Tensor first = torch::stable::select(k.hs, 0, 0), cell = torch::stable::select(k.cs, 0, 0);
    torch::stable::copy_(first, h), torch::stable::copy_(cell, c);
    return k;
  }
  const Tensor masked = new_tensor(h, {mask_g ? L : 0, B, H}), arrived = new_meeting(h);
  with_type(h, [&]<class T>() {
    const TrnForward<T> o{s,
                          m.pointers<T>(),
                          data<T>(dec_bias),
                          data<T>(hx_bias),
                          data<T>(cx_bias),
                          data<T>(fusion_bias),
                          data<T>(ahead_bias),
                          data<T>(classifier_bias),
                          masks<T>(mask_future, mask_u, mask_g),
                          data<T>(given),
                          data<T>(h),
                          data<T>(c),
                          data<T>(future),
                          out<T>(k.hs),
                          out<T>(k.scores),
                          out<T>(k.cs),
                          out<T>(k.futures),
                          out<T>(k.enc_in),
                          out<T>(k.enc_gates),
                          out<T>(k.dec_in),
                          out<T>(k.dec_gates),
                          out<T>(k.gs),
                          out<T>(k.ks),
                          out<T>(k.rows),
                          out<T>(masked),
                          out<unsigned>(arrived)};
    trn_forward(o, device.stream());
  });
  return k;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run(Tensor given, Tensor h, Tensor c, Tensor future, Tensor enc, Tensor dec,
                                               Tensor dec_bias, Tensor hx, Tensor hx_bias, Tensor cx, Tensor cx_bias,
                                               Tensor fusion, Tensor fusion_bias, Tensor ahead, Tensor ahead_bias,
                                               Tensor classifier, Tensor classifier_bias, int64_t steps, bool before,
                                               bool previous) {
  const Kept k = forward(given, h, c, future, {enc, dec, hx, cx, fusion, ahead, classifier}, dec_bias, hx_bias, cx_bias,
                         fusion_bias, ahead_bias, classifier_bias, steps, before, previous, false, {}, {}, {});
  const int64_t frames = given.size(0);
  Tensor hs = k.hs;
  using torch::stable::select, torch::stable::clone;
  return {torch::stable::narrow(hs, 0, 1, frames), k.scores, clone(select(k.cs, 0, frames % 3)),
          clone(frames ? select(k.futures, 0, (frames - 1) % 2) : future)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_keep(
    Tensor given, Tensor h, Tensor c, Tensor future, Tensor enc, Tensor dec, Tensor dec_bias, Tensor hx, Tensor hx_bias,
    Tensor cx, Tensor cx_bias, Tensor fusion, Tensor fusion_bias, Tensor ahead, Tensor ahead_bias, Tensor classifier,
    Tensor classifier_bias, int64_t steps, bool before, bool previous, Optional mask_future, Optional mask_u,
    Optional mask_g) {
  const Kept k =
      forward(given, h, c, future, {enc, dec, hx, cx, fusion, ahead, classifier}, dec_bias, hx_bias, cx_bias,
              fusion_bias, ahead_bias, classifier_bias, steps, before, previous, true, mask_future, mask_u, mask_g);
  return {k.hs, k.cs, k.scores, k.futures, k.enc_in, k.enc_gates, k.dec_in, k.dec_gates, k.gs, k.ks, k.rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(
    Tensor dhs, Tensor dc, Tensor dfuture, Tensor dscores, Tensor cs, Tensor futures, Tensor enc_gates, Tensor dec_in,
    Tensor dec_gates, Tensor gs, Tensor ks, Tensor rows, Tensor enc, Tensor dec, Tensor hx, Tensor cx, Tensor fusion,
    Tensor ahead, Tensor classifier, bool before, bool previous, Optional mask_future, Optional mask_u,
    Optional mask_g) {
  const OnDevice device(cs);
  STD_TORCH_CHECK(dscores.dim() == 4 && cs.dim() == 3 && futures.dim() == 3, "trn_backward: dscores ",
                  shape_of(dscores), " must be (frames, steps, batch, classes)");
  dhs = dense(dhs), dc = dense(dc), dfuture = dense(dfuture), dscores = dense(dscores);
  const int64_t T_ = dscores.size(0), L = dscores.size(1), B = dscores.size(2), C = dscores.size(3);
  const int64_t H = cs.size(2), F = futures.size(2), wide = before ? 1 : L;
  const TrnSizes s{T_, B, H, F, C, L, before, previous, T_};
  const Matrices m{enc, dec, hx, cx, fusion, ahead, classifier};
  check_matrices(m, s, cs);
  check_masks(cs, s, mask_future, mask_u, mask_g);
  check_tensors(cs, {{&dhs, T_ * B * H},
                     {&dc, B * H},
                     {&dfuture, B * F},
                     {&dscores, T_ * L * B * C},
                     {&cs, (T_ + 1) * B * H},
                     {&futures, T_ * B * F},
                     {&enc_gates, T_ * B * 4 * H},
                     {&dec_in, T_ * L * B * 2 * H},
                     {&dec_gates, T_ * L * B * 4 * H},
                     {&gs, T_ * (L + 1) * B * H},
                     {&ks, T_ * (L + 1) * B * H},
                     {&rows, T_ * wide * B * (before ? H : F)}});
  const Tensor dgiven = new_tensor(cs, {T_, B, 4 * H}), ddec = new_tensor(cs, {T_, L, B, 4 * H});
  const Tensor dq = new_tensor(cs, {T_, L, B, C}), du = new_tensor(cs, {T_, L, B, H});
  const Tensor drows = new_tensor(cs, {T_, wide, B, F}), dhx = new_tensor(cs, {T_, B, H});
  const Tensor dcx = new_tensor(cs, {T_, B, H}), dh = new_tensor(cs, {B, H}), dc_first = new_tensor(cs, {B, H});
  const Tensor dfuture_first = new_tensor(cs, {B, F}), dg = new_tensor(cs, {L, B, H}), dk = new_tensor(cs, {B, H});
  const Tensor arrived = new_meeting(cs);
  if (B > 0)
    with_type(cs, [&]<class T>() {
      const TrnBackward<T> o{s,
                             m.pointers<T>(),
                             masks<T>(mask_future, mask_u, mask_g),
                             data<T>(dhs),
                             data<T>(dc),
                             data<T>(dfuture),
                             data<T>(dscores),
                             data<T>(cs),
                             data<T>(futures),
                             data<T>(enc_gates),
                             data<T>(dec_in),
                             data<T>(dec_gates),
                             data<T>(gs),
                             data<T>(ks),
                             data<T>(rows),
                             out<T>(dgiven),
                             out<T>(ddec),
                             out<T>(dq),
                             out<T>(du),
                             out<T>(drows),
                             out<T>(dhx),
                             out<T>(dcx),
                             out<T>(dh),
                             out<T>(dc_first),
                             out<T>(dfuture_first),
                             out<T>(dg),
                             out<T>(dk),
                             out<unsigned>(arrived)};
      trn_backward(o, device.stream());
    });
  return {dgiven, ddec, dq, du, drows, dhx, dcx, dh, dc_first, dfuture_first};
}

}  // namespace
}  // namespace pyflowgen::cuda

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, PYFLOWGEN_CUDA_KEY, m) {
  m.impl("trn", TORCH_BOX(&pyflowgen::cuda::run));
  m.impl("trn_keep", TORCH_BOX(&pyflowgen::cuda::run_keep));
  m.impl("trn_backward", TORCH_BOX(&pyflowgen::cuda::run_backward));
}
