// Gated recurrence on the CPU: from the operators' arguments to the contract of recurrence.h, threads. Written for a
// Cell of lstm.h or gru.h; `c` and what belongs to it is null where there is none.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dense.h"
#include "cpu/shares.h"
#include "cpu/team.h"
#include "linear.h"
#include "recurrence.h"

namespace pyflowgen::recurrence {

using Optional = std::optional<Tensor>;

// f<T>() for the dtype.
template <class F> auto with_type(const Tensor& like, const F& f) {
  return like.scalar_type() == ScalarType::Float ? f.template operator()<float>() : f.template operator()<double>();
}

// The arguments every operator has, checked and dense.
struct Arguments {
  Tensor x, h, weight_ih, weight_hh;
  Optional c, bias_ih, bias_hh;
  std::vector<int64_t> offsets;
  RecurrentShape shape;
  int64_t in, rows;
};

inline Optional dense(const Optional& t) { return t ? Optional(pyflowgen::dense(*t)) : t; }

template <class Cell> void check_weights(const Tensor& weight_ih, const Tensor& weight_hh, const Optional& bias_ih,
                                         const Optional& bias_hh, bool any_dtype = false) {
  STD_TORCH_CHECK(weight_hh.dim() == 2 && weight_hh.size(0) == Cell::gates * weight_hh.size(1), Cell::name,
                  ": weight_hh must be (", Cell::gates, " * hidden, hidden), got ", shape_of(weight_hh));
  STD_TORCH_CHECK(weight_ih.dim() == 2 && weight_ih.size(0) == weight_hh.size(0), Cell::name, ": weight_ih must be (",
                  weight_hh.size(0), ", in) beside weight_hh ", shape_of(weight_hh), ", got ", shape_of(weight_ih));
  STD_TORCH_CHECK(
      any_dtype || weight_hh.scalar_type() == ScalarType::Float || weight_hh.scalar_type() == ScalarType::Double,
      Cell::name, ": the kernel takes float32 and float64");
  for (const Optional* bias : {&bias_ih, &bias_hh})
    STD_TORCH_CHECK(!*bias || ((*bias)->dim() == 1 && (*bias)->size(0) == weight_hh.size(0) &&
                               (*bias)->scalar_type() == weight_hh.scalar_type()),
                    Cell::name, ": biases must have shape (", weight_hh.size(0), ",) and the weights' dtype, got ",
                    *bias ? shape_of(**bias) : "");
  STD_TORCH_CHECK(weight_ih.scalar_type() == weight_hh.scalar_type(), Cell::name, ": weights must have one dtype");
}

template <class Cell> Arguments check(const Tensor& x, const Tensor& h, const Optional& c, const Tensor& weight_ih,
                                      const Tensor& weight_hh, const Optional& bias_ih, const Optional& bias_hh,
                                      const Optional& batch_sizes, bool reverse, bool any_dtype = false) {
  check_weights<Cell>(weight_ih, weight_hh, bias_ih, bias_hh, any_dtype);
  const int64_t hidden = weight_hh.size(1), in = weight_ih.size(1);
  STD_TORCH_CHECK(
      h.dim() == 2 && h.size(1) == hidden && (!c || (c->dim() == 2 && c->size(0) == h.size(0) && c->size(1) == hidden)),
      Cell::name, ": h", c ? " and c" : "", " must be (batch, ", hidden, "), got ", shape_of(h), c ? " and " : "",
      c ? shape_of(*c) : "");
  const int64_t batch = h.size(0);
  STD_TORCH_CHECK(x.dim() == (batch_sizes ? 2 : 3) && x.size(x.dim() - 1) == in && (batch_sizes || x.size(1) == batch),
                  Cell::name, ": x of shape ", shape_of(x), " must be (", batch_sizes ? "rows" : "time, batch", ", ",
                  in, ") with batch ", batch);
  for (const Tensor* t : {&x, &h, c ? &*c : &h})
    STD_TORCH_CHECK(t->scalar_type() == weight_hh.scalar_type(), Cell::name,
                    ": x, the state and the weights must have one dtype");
  Arguments a{pyflowgen::dense(x),
              pyflowgen::dense(h),
              pyflowgen::dense(weight_ih),
              pyflowgen::dense(weight_hh),
              dense(c),
              dense(bias_ih),
              dense(bias_hh),
              {0},
              {},
              in,
              0};
  if (batch_sizes) {
    STD_TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == ScalarType::Long, Cell::name,
                    ": batch_sizes must be int64 of shape (time,), got ", shape_of(*batch_sizes));
    const Tensor sizes = pyflowgen::dense(*batch_sizes);
    const int64_t* n = data<int64_t>(sizes);
    for (int64_t t = 0, last = batch; t < sizes.size(0); last = n[t++]) {
      STD_TORCH_CHECK(n[t] >= 0 && n[t] <= last, Cell::name, ": batch_sizes must not grow, nor exceed the batch of ",
                      batch, ", got ", n[t], " after ", last);
      a.offsets.push_back(a.offsets.back() + n[t]);
    }
  } else {
    for (int64_t t = 0; t < x.size(0); ++t) a.offsets.push_back(a.offsets.back() + batch);
  }
  a.rows = a.offsets.back();
  STD_TORCH_CHECK(!batch_sizes || a.rows == x.size(0), Cell::name, ": x has ", x.size(0),
                  " rows, batch_sizes add up to ", a.rows);
  a.shape = {batch, hidden, int64_t(a.offsets.size()) - 1, a.offsets.data(), reverse};
  return a;
}

// Asks for pages of 2 MB before memory is first touched. A step reads all weights: beyond the caches address
// translation of small pages costs it a seventh of its time.
inline void use_large_pages(const Tensor& t, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t page = 2 << 20;
  char* const at = static_cast<char*>(t.data_ptr());
  const int64_t from = page - 1 - (reinterpret_cast<int64_t>(at) - 1) % page, size = (bytes - from) / page * page;
  if (size > 0) madvise(at + from, size_t(size), MADV_HUGEPAGE);  // advice: may fail
#endif
}

inline Tensor copy_of(const Tensor& t) {
  const Tensor copy = empty(t.sizes().data(), t.dim(), t);
  int64_t bytes = t.numel() * (t.scalar_type() == ScalarType::Double ? 8 : 4);
  if (bytes) std::memcpy(copy.data_ptr(), t.data_ptr(), bytes);
  return copy;
}

// step(t, begin, end, first, last) for every t in the order of `forward`, `columns` and rows split between threads.
// Few weights and many rows: threads share the rows, and never wait. Otherwise they share the columns, so that each
// keeps its part of the weights in its own cache, and meet after every step, `meetings` times in it.
template <class T, class F>
void run(const RecurrentShape& shape, int64_t gates, int64_t columns, bool forward, int64_t meetings, const F& step) {
  // Weights that a core's own cache holds; work and weights below which two threads cost more than they save.
  constexpr int64_t cache = 512 << 10, least = 160 << 10;
  const int64_t weights = gates * shape.hidden * shape.hidden * int64_t(sizeof(T));
  const int64_t work = weights * std::max<int64_t>(1, shape.batch / 4);
  const int64_t most = work < least ? 1 : torch::stable::get_num_threads();
  const auto in_order = [&](const auto& f) {
    for (int64_t i = 0; i < shape.steps; ++i) f(shape.reverse == forward ? shape.steps - 1 - i : i);
  };
  if (weights <= cache && shape.batch >= 6 * most) {
    // The longest sequences come first: rows are shared so that steps add up to the same.
    std::vector<int64_t> start(size_t(most + 1), shape.batch);
    std::vector<int64_t> length(size_t(shape.batch), 0);
    for (int64_t t = 0; t < shape.steps; ++t)
      for (int64_t r = 0; r < shape.rows(t); ++r) ++length[size_t(r)];
    start[0] = 0;
    int64_t done = 0, part = 1;
    for (int64_t r = 0; r < shape.batch && part < most; ++r) {
      done += length[size_t(r)];
      if (done * most >= part * shape.offsets[shape.steps]) start[size_t(part++)] = r + 1;
    }
    return in_threads(most, [&](int64_t i) {
      in_order([&](int64_t t) {
        for (int64_t phase = 0; phase < meetings; ++phase)
          step(phase, t, 0, columns, start[size_t(i)], start[size_t(i + 1)]);
      });
    });
  }
  const int64_t parts = std::min(most, columns);
  if (parts <= 1) {
    return in_order([&](int64_t t) {
      for (int64_t phase = 0; phase < meetings; ++phase) step(phase, t, 0, columns, 0, shape.batch);
    });
  }
  Team team(parts);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t place = team.join(end - begin);
    if (place < 0) return;
    const int64_t from = columns * place / team.size(), to = columns * (place + 1) / team.size();
    in_order([&](int64_t t) {
      for (int64_t phase = 0; phase < meetings; ++phase) {
        step(phase, t, from, to, 0, shape.batch);
        // After the last phase only what the next step reads of other columns has to be waited for: in the backward
        // direction that is nothing.
        if (forward || phase + 1 < meetings) team.meet();
      }
    });
  });
}

// gates[rows][out] = x weight^T + bias
template <class T>
void product(int64_t rows, int64_t in, int64_t out_features, const T* x, const T* weight, const T* bias, T* y) {
  const LinearForward<T> o{
      rows, in,     out_features, threads_for(rows * in * out_features), x, in, weight, nullptr, bias, Activation::none,
      y,    nullptr};
  const int64_t tasks = PYFLOWGEN_CALL(linear_tasks<T>, o);
  in_threads(o.threads,
             [&](int64_t i) { PYFLOWGEN_CALL(linear<T>, o, tasks * i / o.threads, tasks * (i + 1) / o.threads); });
}

// dx, dweight, dbias of that product, each where it is not null.
template <class T> void product_backward(int64_t rows, int64_t in, int64_t out_features, const T* dy, const T* x,
                                         const T* weight, T* dx, T* dweight, T* dbias) {
  const LinearBackward<T> o{rows, in,      out_features, threads_for(2 * rows * in * out_features), dy, x, in, weight,
                            dx,   dweight, dbias};
  const int64_t tasks[3] = {dx ? PYFLOWGEN_CALL(linear_dx_tasks<T>, o) : 0,
                            dweight ? PYFLOWGEN_CALL(linear_dweight_tasks<T>, o) : 0,
                            dbias ? PYFLOWGEN_CALL(linear_dbias_tasks<T>, o) : 0};
  in_threads(o.threads, [&](int64_t i) {
    const auto from = [&](int which) { return tasks[which] * i / o.threads; };
    const auto to = [&](int which) { return tasks[which] * (i + 1) / o.threads; };
    if (dx) PYFLOWGEN_CALL(linear_dx<T>, o, from(0), to(0));
    if (dweight) PYFLOWGEN_CALL(linear_dweight<T>, o, from(1), to(1));
    if (dbias) PYFLOWGEN_CALL(linear_dbias<T>, o, from(2), to(2));
  });
}

struct Result {
  Tensor y, h_n;
  Optional c_n;
  Tensor gates, extra;
};

template <class Cell, class T> Result forward_as(const Arguments& a, const Optional& packed, bool keep) {
  constexpr int64_t gates = Cell::gates;
  const RecurrentShape& shape = a.shape;
  const int64_t hidden = shape.hidden;
  Result r{empty({a.rows, hidden}, a.x), copy_of(a.h), a.c ? Optional(copy_of(*a.c)) : std::nullopt,
           empty({a.rows, gates * hidden}, a.x), empty({keep ? a.rows : 0, hidden}, a.x)};
  if (a.rows == 0) return r;
  // What does not depend on the recurrence: x's part of all arguments, biases included.
  std::vector<T> bias(size_t(gates * hidden), T(0));
  for (int64_t i = 0; i < gates * hidden; ++i) {
    if (a.bias_ih) bias[size_t(i)] += data<T>(*a.bias_ih)[i];
    if (a.bias_hh && !(Cell::split_gate && i >= (gates - 1) * hidden)) bias[size_t(i)] += data<T>(*a.bias_hh)[i];
  }
  product<T>(a.rows, a.in, gates * hidden, data<T>(a.x), data<T>(a.weight_ih), bias.data(), out<T>(r.gates));

  RecurrentWeights<T> weights{
      a.in, hidden, data<T>(a.weight_ih), data<T>(a.weight_hh), nullptr, a.bias_hh ? data<T>(*a.bias_hh) : nullptr};
  const int64_t blocks = PYFLOWGEN_CALL(recurrent_blocks<T>, hidden);
  const auto bytes = [&] { return PYFLOWGEN_CALL_OF((recurrent_packed_bytes<Cell, T, T>), weights.in, hidden); };
  Optional own;
  if (!packed || packed->numel() * int64_t(sizeof(T)) != bytes() || packed->scalar_type() != a.x.scalar_type() ||
      !PYFLOWGEN_CALL_OF((recurrent_pack_matches<Cell, T>), weights, packed->data_ptr())) {
    weights.in = 0, weights.weight_ih = nullptr;
    own = empty({bytes() / int64_t(sizeof(T))}, a.x);
    use_large_pages(*own, bytes());
    const int64_t threads = threads_for(8 * gates * hidden * hidden);
    in_threads(threads, [&](int64_t i) {
      PYFLOWGEN_CALL_OF((recurrent_pack<Cell, T, T>), weights, own->data_ptr(), blocks * i / threads,
                        blocks * (i + 1) / threads);
    });
  }
  const RecurrentForward<T> o{shape,
                              weights.in,
                              own ? own->data_ptr() : packed->data_ptr(),
                              data<T>(a.h),
                              out<T>(r.gates),
                              keep ? out<T>(r.extra) : nullptr,
                              out<T>(r.y),
                              r.c_n ? out<T>(*r.c_n) : nullptr};
  run<T>(shape, gates, blocks, true, 1,
         [&](int64_t, int64_t t, int64_t begin, int64_t end, int64_t first, int64_t last) {
           PYFLOWGEN_CALL_OF((recurrent_forward<Cell, T>), o, t, begin, end, first, last);
         });
  for (int64_t t = 0; t < shape.steps; ++t)  // the last step of each row
    for (int64_t row = shape.reverse ? (t ? shape.rows(t) : 0) : shape.rows(t + 1); row < shape.rows(t); ++row)
      std::memcpy(out<T>(r.h_n) + row * hidden, o.y + (shape.offsets[t] + row) * hidden, hidden * sizeof(T));
  return r;
}

// y in x's shape, hidden instead of in.
inline Tensor like_x(const Tensor& y, const Tensor& x) {
  return x.dim() == 2 ? y : torch::stable::view(y, {x.size(0), x.size(1), y.size(1)});
}

template <class Cell> Result forward(const Tensor& x, const Tensor& h, const Optional& c, const Tensor& weight_ih,
                                     const Tensor& weight_hh, const Optional& bias_ih, const Optional& bias_hh,
                                     const Optional& batch_sizes, bool reverse, const Optional& packed, bool keep) {
  const Arguments a = check<Cell>(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse);
  Result r = with_type(x, [&]<class T>() { return forward_as<Cell, T>(a, packed, keep); });
  r.y = like_x(r.y, x);
  return r;
}

// dx and the weights' gradients are empty where they are not wanted.
struct Gradients {
  Tensor dx, dh;
  Optional dc;
  Tensor dweight_ih, dweight_hh, dbias_ih, dbias_hh;
};

template <class Cell, class T> Gradients backward_as(const Arguments& a, const Optional& dy, const Optional& dh_n,
                                                     const Optional& dc_n, const Tensor& y, const Tensor& kept_gates,
                                                     const Tensor& extra, bool need_dx, bool need_dweight) {
  constexpr int64_t gates = Cell::gates;
  const RecurrentShape& shape = a.shape;
  const int64_t hidden = shape.hidden;
  const auto start = [&](const Optional& d) {
    const Tensor t = empty({shape.batch, hidden}, a.x);
    if (t.numel() == 0) return t;
    if (d) std::memcpy(t.data_ptr(), d->data_ptr(), t.numel() * sizeof(T));
    else std::memset(t.data_ptr(), 0, t.numel() * sizeof(T));
    return t;
  };
  const Tensor none = empty({0}, a.x);
  Gradients g{need_dx ? empty(a.x.sizes().data(), a.x.dim(), a.x) : none,
              start(dh_n),
              a.c ? Optional(start(dc_n)) : std::nullopt,
              need_dweight ? empty({gates * hidden, a.in}, a.x) : none,
              need_dweight ? empty({gates * hidden, hidden}, a.x) : none,
              need_dweight ? empty({gates * hidden}, a.x) : none,
              need_dweight && Cell::split_gate ? empty({gates * hidden}, a.x) : none};
  const int64_t panels = PYFLOWGEN_CALL(recurrent_panels<T>, hidden);
  const Tensor packed = empty({panels, gates * hidden, PYFLOWGEN_CALL(recurrent_panel_width<T>)}, a.x);
  const Tensor dgates = empty({a.rows, gates * hidden}, a.x), before = empty({a.rows, hidden}, a.x);
  const Tensor dgates_h = Cell::split_gate ? empty({a.rows, gates * hidden}, a.x) : dgates;
  const int64_t threads = threads_for(4 * gates * hidden * hidden);
  in_threads(threads, [&](int64_t i) {
    PYFLOWGEN_CALL_OF((recurrent_pack_backward<Cell, T>), hidden, data<T>(a.weight_hh), out<T>(packed),
                      panels * i / threads, panels * (i + 1) / threads);
  });
  const RecurrentBackward<T> o{shape,
                               dy ? data<T>(*dy) : nullptr,
                               data<T>(kept_gates),
                               data<T>(extra),
                               data<T>(y),
                               data<T>(a.h),
                               a.c ? data<T>(*a.c) : nullptr,
                               data<T>(packed),
                               out<T>(dgates),
                               out<T>(dgates_h),
                               out<T>(before),
                               out<T>(g.dh),
                               g.dc ? out<T>(*g.dc) : nullptr};
  run<T>(shape, gates, panels, false, 2,
         [&](int64_t phase, int64_t t, int64_t begin, int64_t end, int64_t first, int64_t last) {
           if (phase == 0) PYFLOWGEN_CALL_OF((recurrent_backward_gates<Cell, T>), o, t, begin, end, first, last);
           else PYFLOWGEN_CALL_OF((recurrent_backward_hidden<Cell, T>), o, t, begin, end, first, last);
         });
  // One product over all steps for each weight.
  if (need_dx || need_dweight)
    product_backward<T>(a.rows, a.in, gates * hidden, o.dgates, data<T>(a.x), data<T>(a.weight_ih),
                        need_dx ? out<T>(g.dx) : nullptr, need_dweight ? out<T>(g.dweight_ih) : nullptr,
                        need_dweight ? out<T>(g.dbias_ih) : nullptr);
  if (need_dweight)
    product_backward<T>(a.rows, hidden, gates * hidden, o.dgates_h, o.before, data<T>(a.weight_hh), nullptr,
                        out<T>(g.dweight_hh), Cell::split_gate ? out<T>(g.dbias_hh) : nullptr);
  if (need_dweight && !Cell::split_gate) g.dbias_hh = copy_of(g.dbias_ih);
  return g;
}

// What the forward pass kept, and the gradients that come in.
template <class Cell> void check_kept(const Arguments& a, const Optional& dy, const Optional& dh_n,
                                      const Optional& dc_n, const Tensor& y, const Tensor& gates, const Tensor& extra) {
  const int64_t hidden = a.shape.hidden;
  for (const Optional* d : {&dh_n, &dc_n})
    STD_TORCH_CHECK(!*d || ((*d)->numel() == a.h.numel() && (*d)->scalar_type() == a.x.scalar_type()), Cell::name,
                    "_backward: gradients of the last state must have its shape ", shape_of(a.h));
  const Optional kept[] = {dy, y, extra, gates};
  for (const Optional& t : kept)
    STD_TORCH_CHECK(!t || (t->numel() == a.rows * hidden * (&t == kept + 3 ? Cell::gates : 1) &&
                           t->scalar_type() == a.x.scalar_type()),
                    Cell::name, "_backward: dy, y, gates and what else was kept must be those of ", a.rows, " rows");
}

template <class Cell> Gradients backward(const Optional& dy, const Optional& dh_n, const Optional& dc_n,
                                         const Tensor& x, const Tensor& h, const Optional& c, const Tensor& weight_ih,
                                         const Tensor& weight_hh, const Optional& batch_sizes, bool reverse,
                                         const Tensor& y, const Tensor& gates, const Tensor& extra, bool need_dx,
                                         bool need_dweight) {
  const Arguments a = check<Cell>(x, h, c, weight_ih, weight_hh, std::nullopt, std::nullopt, batch_sizes, reverse);
  check_kept<Cell>(a, dy, dh_n, dc_n, y, gates, extra);
  return with_type(x, [&]<class T>() {
    return backward_as<Cell, T>(a, dense(dy), dense(dh_n), dense(dc_n), pyflowgen::dense(y), pyflowgen::dense(gates),
                                pyflowgen::dense(extra), need_dx, need_dweight);
  });
}

// In the order of the operators' `storage` argument.
enum class Storage : int64_t { same, bf16, int8 };

template <class Cell> Tensor pack(const Tensor& weight_ih, const Tensor& weight_hh, const Optional& bias_ih,
                                  const Optional& bias_hh, int64_t storage) {
  check_weights<Cell>(weight_ih, weight_hh, bias_ih, bias_hh);
  STD_TORCH_CHECK(storage == 0 || (storage <= 2 && weight_hh.scalar_type() == ScalarType::Float), Cell::name,
                  "_pack: bf16 and int8 storage is for float32 weights");
  const Tensor w_ih = pyflowgen::dense(weight_ih), w_hh = pyflowgen::dense(weight_hh);
  const Optional b_ih = dense(bias_ih), b_hh = dense(bias_hh);
  return with_type(weight_hh, [&]<class T>() {
    const RecurrentWeights<T> weights{w_ih.size(1),
                                      w_hh.size(1),
                                      data<T>(w_ih),
                                      data<T>(w_hh),
                                      b_ih ? data<T>(*b_ih) : nullptr,
                                      b_hh ? data<T>(*b_hh) : nullptr};
    const auto as = [&]<class W>(ScalarType dtype) {
      const int64_t bytes = PYFLOWGEN_CALL_OF((recurrent_packed_bytes<Cell, T, W>), weights.in, weights.hidden);
      const Tensor packed = torch::stable::new_empty(w_hh, {bytes / int64_t(sizeof(W))}, dtype);
      use_large_pages(packed, bytes);
      const int64_t blocks = PYFLOWGEN_CALL(recurrent_blocks<T>, weights.hidden);
      const int64_t threads = threads_for(8 * (weights.in + weights.hidden) * Cell::gates * weights.hidden);
      in_threads(threads, [&](int64_t i) {
        PYFLOWGEN_CALL_OF((recurrent_pack<Cell, T, W>), weights, packed.data_ptr(), blocks * i / threads,
                          blocks * (i + 1) / threads);
      });
      return packed;
    };
    if constexpr (std::is_same_v<T, float>) {
      if (storage == int64_t(Storage::bf16)) return as.template operator()<bf16>(ScalarType::BFloat16);
      if (storage == int64_t(Storage::int8)) return as.template operator()<int8_t>(ScalarType::Char);
    }
    return as.template operator()<T>(weight_hh.scalar_type());
  });
}

// Whether to go through the weights from their end: every second time. What a core read last is then still in its own
// cache; always from the front it would push out what it is about to need. A bit for each calling thread and address:
// one that is wrong costs time alone.
inline bool turn(const Tensor& weights) {
  static thread_local std::array<bool, 64> turns{};
  bool& t = turns[size_t(reinterpret_cast<uintptr_t>(weights.data_ptr()) >> 12) % turns.size()];
  return t = !t;
}

// One step of a stream with packed weights. Every microsecond counts: few checks, no temporaries, one parallel region.
template <class Cell, class T, class W> void step_as(const RecurrentStep<T>& o, const Tensor& packed) {
  const int64_t bytes = PYFLOWGEN_CALL_OF((recurrent_packed_bytes<Cell, T, W>), o.in, o.hidden);
  STD_TORCH_CHECK(packed.numel() * int64_t(sizeof(W)) == bytes && packed.is_contiguous(), Cell::name,
                  "_step: x and the state have ", o.in, " and ", o.hidden, " features, the packed weights do not");
  const int64_t blocks = PYFLOWGEN_CALL(recurrent_blocks<T>, o.hidden);
  // Weights that one core reads in less time than another takes to wake up.
  constexpr int64_t alone = 256 << 10;
  constexpr int64_t turned = 3 << 19;  // what is read from both ends in turn, see turn()
  const int64_t work = bytes * std::max<int64_t>(1, o.batch / 4);
  const int64_t threads =
      work < 2 * alone ? 1 : std::min<int64_t>({int64_t(torch::stable::get_num_threads()), work / alone, blocks});
  const int64_t scratch = (PYFLOWGEN_CALL(recurrent_scratch_bytes<W>, o.batch, o.in, o.hidden) + 63) / 64 * 64;
  alignas(64) char few[8192];
  std::unique_ptr<char[]> many;
  if (threads * scratch > int64_t(sizeof few)) many = std::make_unique_for_overwrite<char[]>(size_t(threads * scratch));
  char* const room = many ? many.get() : few;
  Shares shares(threads, blocks, bytes / threads <= turned && turn(packed));
  in_threads(threads, [&](int64_t i) {
    char* const own = room + i * scratch;
    PYFLOWGEN_CALL_OF((recurrent_inputs<T, W>), o, own);
    shares.each(i, [&](int64_t b) { PYFLOWGEN_CALL_OF((recurrent_step<Cell, T, W>), o, b, own); });
  });
}

template <class Cell>
std::tuple<Tensor, Optional> step(const Tensor& x, const Tensor& h, const Optional& c, const Tensor& packed) {
  STD_TORCH_CHECK(x.dim() == 2 && h.dim() == 2 && x.size(0) == h.size(0) &&
                      (!c || (c->dim() == 2 && c->size(0) == h.size(0) && c->size(1) == h.size(1))),
                  Cell::name, "_step: x must be (batch, in) and the state (batch, hidden), got ", shape_of(x), " and ",
                  shape_of(h), c ? " and " : "", c ? shape_of(*c) : "");
  const ScalarType dtype = x.scalar_type(), storage = packed.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) && h.scalar_type() == dtype &&
                      (!c || c->scalar_type() == dtype) &&
                      (storage == dtype || (dtype == ScalarType::Float &&
                                            (storage == ScalarType::BFloat16 || storage == ScalarType::Char))),
                  Cell::name, "_step: x and the state must have the dtype that the weights were packed from");
  const Tensor dense_x = pyflowgen::dense(x), dense_h = pyflowgen::dense(h);
  const Optional dense_c = dense(c);
  const int64_t batch = h.size(0), hidden = h.size(1);
  const Tensor h_next = empty({batch, hidden}, h);
  const Optional c_next = c ? Optional(empty({batch, hidden}, h)) : std::nullopt;
  with_type(x, [&]<class T>() {
    const RecurrentStep<T> o{batch,
                             x.size(1),
                             hidden,
                             data<T>(dense_x),
                             data<T>(dense_h),
                             dense_c ? data<T>(*dense_c) : nullptr,
                             packed.data_ptr(),
                             out<T>(h_next),
                             c_next ? out<T>(*c_next) : nullptr};
    if constexpr (std::is_same_v<T, float>) {
      if (storage == ScalarType::BFloat16) return step_as<Cell, T, bf16>(o, packed);
      if (storage == ScalarType::Char) return step_as<Cell, T, int8_t>(o, packed);
    }
    step_as<Cell, T, T>(o, packed);
  });
  return {h_next, c_next};
}

}  // namespace pyflowgen::recurrence
