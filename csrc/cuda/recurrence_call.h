// Gated recurrence on CUDA: from the operators' arguments to the contract of recurrence.h, torch's products for what
// does not recur. Written for a Cell of lstm.h or gru.h.
#pragma once

#include "cpu/recurrence_call.h"
#include "cuda/recurrence.h"
#include "cuda/stream.h"
#include "tensor_view.h"

// The tests build these launchers for the CPU, and register them there.
#ifndef PYFLOWGEN_CUDA_KEY
#define PYFLOWGEN_CUDA_KEY CUDA
#endif

namespace pyflowgen::cuda {

using recurrence::Arguments;
using recurrence::Gradients;
using recurrence::Optional;
using recurrence::Result;
using Shape = std::initializer_list<int64_t>;

inline Tensor new_tensor(const Tensor& like, Shape shape) { return torch::stable::new_empty(like, shape); }

inline Tensor turned(const Tensor& matrix) { return torch::stable::contiguous(torch::stable::transpose(matrix, 0, 1)); }

// Sums that kernels work with, and the word at which blocks meet.
template <class A> Tensor new_sums(const Tensor& like, Shape shape) {
  return torch::stable::new_empty(like, shape, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
}
inline Tensor new_meeting(const Tensor& like) { return torch::stable::new_zeros(like, {1}, ScalarType::Int); }

inline void check_device(const char* name, const Tensor& x, std::initializer_list<const Tensor*> others) {
  for (const Tensor* t : others)
    STD_TORCH_CHECK(t->is_cuda() == x.is_cuda() && t->get_device_index() == x.get_device_index(), name,
                    ": all tensors must be on x's device");
}

template <class Cell> Arguments check(const Tensor& x, const Tensor& h, const Optional& c, const Tensor& weight_ih,
                                      const Tensor& weight_hh, const Optional& bias_ih, const Optional& bias_hh,
                                      const Optional& batch_sizes, bool reverse) {
  check_device(Cell::name, x,
               {&h, &weight_ih, &weight_hh, c ? &*c : &x, bias_ih ? &*bias_ih : &x, bias_hh ? &*bias_hh : &x});
  STD_TORCH_CHECK(!batch_sizes || batch_sizes->is_cpu(), Cell::name, ": batch_sizes must be on the CPU");
  return recurrence::check<Cell>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, true);
}

// Where steps begin, on x's device; nothing where all have the whole batch.
inline Optional offsets_of(const Arguments& a, const Optional& batch_sizes) {
  if (!batch_sizes) return std::nullopt;
  const int64_t count = int64_t(a.offsets.size());
  const Tensor here = new_tensor(*batch_sizes, {count});
  std::copy(a.offsets.begin(), a.offsets.end(), out<int64_t>(here));
  Tensor there = torch::stable::new_empty(a.x, {count}, ScalarType::Long);
  torch::stable::copy_(there, here);
  return there;
}
inline RecurrentSteps steps_of(const Arguments& a, const Optional& offsets) {
  return {a.shape.batch, a.shape.hidden, a.shape.steps, offsets ? data<int64_t>(*offsets) : nullptr, a.shape.reverse};
}

template <class T> const T* data_or_null(const Optional& t) { return t ? data<T>(*t) : nullptr; }

template <class Cell> Result forward(const Tensor& x, const Tensor& h, const Optional& c, const Tensor& weight_ih,
                                     const Tensor& weight_hh, const Optional& bias_ih, const Optional& bias_hh,
                                     const Optional& batch_sizes, bool reverse, bool keep) {
  const OnDevice device(x);
  const Arguments a = check<Cell>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse);
  const int64_t hidden = a.shape.hidden, batch = a.shape.batch;
  Result r{new_tensor(x, {a.rows, hidden}), new_tensor(h, {batch, hidden}),
           c ? Optional(new_tensor(h, {batch, hidden})) : std::nullopt, x, new_tensor(x, {keep ? a.rows : 0, hidden})};
  if (a.rows == 0) {
    r.gates = new_tensor(x, {0, Cell::gates * hidden});
    torch::stable::copy_(r.h_n, a.h);
    if (c) torch::stable::copy_(*r.c_n, *a.c);
  } else {
    r.gates =
        torch::stable::matmul(torch::stable::reshape(a.x, {a.rows, a.in}), torch::stable::transpose(a.weight_ih, 0, 1));
    const Optional offsets = offsets_of(a, batch_sizes);
    const Tensor arrived = new_meeting(x);
    with_dtype(x.scalar_type(), Cell::name, [&]<class T, class A>() {
      const Optional cell = c ? Optional(new_sums<A>(x, {batch, hidden})) : std::nullopt;
      const RecurrentForward<T, A> o{steps_of(a, offsets),
                                     data<T>(a.weight_hh),
                                     data_or_null<T>(a.bias_ih),
                                     data_or_null<T>(a.bias_hh),
                                     data<T>(a.h),
                                     data_or_null<T>(a.c),
                                     out<T>(r.gates),
                                     keep ? out<T>(r.extra) : nullptr,
                                     out<T>(r.y),
                                     out<T>(r.h_n),
                                     c ? out<T>(*r.c_n) : nullptr,
                                     c ? out<A>(*cell) : nullptr,
                                     out<unsigned>(arrived)};
      recurrent_forward<Cell>(o, device.stream());
    });
  }
  r.y = recurrence::like_x(r.y, x);
  return r;
}

template <class Cell> Gradients backward(const Optional& dy, const Optional& dh_n, const Optional& dc_n,
                                         const Tensor& x, const Tensor& h, const Optional& c, const Tensor& weight_ih,
                                         const Tensor& weight_hh, const Optional& batch_sizes, bool reverse,
                                         const Tensor& y, const Tensor& gates, const Tensor& extra, bool need_dx,
                                         bool need_dweight) {
  const OnDevice device(x);
  const Arguments a = check<Cell>(x, h, c, weight_ih, weight_hh, std::nullopt, std::nullopt, batch_sizes, reverse);
  recurrence::check_kept<Cell>(a, dy, dh_n, dc_n, y, gates, extra);
  check_device(Cell::name, x, {dy ? &*dy : &x, dh_n ? &*dh_n : &x, dc_n ? &*dc_n : &x, &y, &gates, &extra});
  const int64_t hidden = a.shape.hidden, batch = a.shape.batch, all = Cell::gates * hidden;
  const Tensor dgates = new_tensor(x, {a.rows, all}), before = new_tensor(x, {a.rows, hidden});
  const Tensor dgates_h = Cell::split_gate ? new_tensor(x, {a.rows, all}) : dgates;
  const Tensor none = new_tensor(x, {0});
  Gradients g{none,
              new_tensor(h, {batch, hidden}),
              c ? Optional(new_tensor(h, {batch, hidden})) : std::nullopt,
              none,
              none,
              none,
              none};
  const Optional ddy = recurrence::dense(dy), ddh = recurrence::dense(dh_n), ddc = recurrence::dense(dc_n);
  const Tensor dense_y = pyflowgen::dense(y), dense_gates = pyflowgen::dense(gates);
  const Tensor dense_extra = pyflowgen::dense(extra), weights = turned(a.weight_hh), arrived = new_meeting(x);
  const Optional offsets = offsets_of(a, batch_sizes);
  if (batch > 0)
    with_dtype(x.scalar_type(), Cell::name, [&]<class T, class A>() {
      const Tensor dh = new_sums<A>(x, {batch, hidden}), dc = new_sums<A>(x, {c ? batch : 0, hidden});
      const RecurrentBackward<T, A> o{steps_of(a, offsets), data_or_null<T>(ddy), data_or_null<T>(ddh),
                                      data_or_null<T>(ddc), data<T>(dense_gates), data<T>(dense_extra),
                                      data<T>(dense_y),     data<T>(a.h),         data_or_null<T>(a.c),
                                      data<T>(weights),     out<T>(dgates),       out<T>(dgates_h),
                                      out<T>(before),       out<T>(g.dh),         g.dc ? out<T>(*g.dc) : nullptr,
                                      out<A>(dh),           out<A>(dc),           out<unsigned>(arrived)};
      recurrent_backward<Cell>(o, device.stream());
    });
  // One product over all steps for each weight.
  using torch::stable::matmul, torch::stable::transpose, torch::stable::sum;
  if (need_dx) g.dx = torch::stable::reshape(matmul(dgates, a.weight_ih), x.sizes());
  if (need_dweight) {
    const int64_t first[] = {0};
    const Tensor by_gate = transpose(dgates, 0, 1);
    g.dweight_ih = matmul(by_gate, torch::stable::reshape(a.x, {a.rows, a.in}));
    g.dweight_hh = matmul(Cell::split_gate ? transpose(dgates_h, 0, 1) : by_gate, before);
    g.dbias_ih = sum(dgates, first);
    g.dbias_hh = Cell::split_gate ? sum(dgates_h, first) : torch::stable::clone(g.dbias_ih);
  }
  return g;
}

}  // namespace pyflowgen::cuda
