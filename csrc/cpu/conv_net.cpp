// conv_net on the CPU: tensors to pointers, threads, registration.
#include "conv_net.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "cpu/dense.h"
#include "cpu/workspace.h"
#include "strides.h"

namespace pyflowgen {
namespace {

// Elements of the taps of one round of images, and of all groups' sums: as much as a shared cache may hold.
constexpr int64_t taps_elements = 1 << 21, sums_elements = 4 << 20;
// More groups of rows let more threads share the backward pass, and are more to add up.
constexpr int64_t most_groups = 16;

// (images, channels, height, width) with the channels last in memory.
Tensor empty_images(int64_t images, int64_t channels, int64_t height, int64_t width, const Tensor& like) {
  const int64_t sizes[] = {images, channels, height, width};
  const int64_t strides[] = {height * width * channels, 1, width * channels, channels};
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

bool channels_last(const Tensor& t) {
  int64_t stride = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

Tensor with_channels_last(const Tensor& t) {
  if (channels_last(t)) return t;
  const Tensor result = empty_images(t.size(0), t.size(1), t.size(2), t.size(3), t);
  torch::stable::copy_(const_cast<Tensor&>(result), t);
  return result;
}

struct Call {
  Tensor x, weights[3];
  std::optional<Tensor> biases[3];
  Activation activation;
  int64_t images, height, width;

  Call(const char* op, const Tensor& given, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
       const std::optional<Tensor>& b2, const Tensor& w3, const std::optional<Tensor>& b3, int64_t code)
      : x(given), weights{w1, w2, w3}, biases{b1, b2, b3} {
    STD_TORCH_CHECK(0 <= code && code < activations && conv_net_takes(Activation(code)), op, ": activation ", code,
                    " is none that the kernel takes");
    activation = Activation(code);
    STD_TORCH_CHECK(x.dim() == 4, op, ": x must be (images, channels, height, width), got shape ", shape_of(x));
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, op,
                    ": the kernel takes float32 and float64");
    int64_t channels = x.size(1);
    for (int i = 0; i < 3; ++i) {
      Tensor& w = weights[i];
      STD_TORCH_CHECK(w.dim() == 4 && w.size(1) == channels && w.size(2) == w.size(3) && w.size(2) % 2 == 1 &&
                          (i != 1 || w.size(2) == 1) && w.scalar_type() == x.scalar_type(),
                      op, ": weight", i + 1, " has shape ", shape_of(w), ", expected (out, ", channels,
                      i == 1 ? ", 1, 1)" : ", k, k) with k odd", " and x's dtype");
      channels = w.size(0);
      STD_TORCH_CHECK(!biases[i] || (biases[i]->dim() == 1 && biases[i]->size(0) == channels &&
                                     biases[i]->scalar_type() == x.scalar_type()),
                      op, ": bias", i + 1, " must have shape (", channels, ",) and x's dtype");
      w = dense(w);
      if (biases[i]) biases[i] = dense(*biases[i]);
    }
    x = with_channels_last(x);
    images = x.size(0), height = x.size(2), width = x.size(3);
  }

  int64_t pixels() const { return height * width; }
  int64_t rows() const { return images * pixels(); }
  bool empty() const { return !rows() || !x.size(1) || !weights[0].size(0) || !weights[1].size(0) || !out(); }
  int64_t out() const { return weights[2].size(0); }

  template <class T> ConvNet<T> contract(T* panels) const {
    ConvNet<T> o{};
    o.images = images, o.height = height, o.width = width;
    o.channels[0] = x.size(1);
    for (int i = 0; i < 3; ++i) {
      o.channels[i + 1] = weights[i].size(0);
      o.weight[i] = data<T>(weights[i]), o.bias[i] = biases[i] ? data<T>(*biases[i]) : nullptr;
    }
    o.kernel1 = weights[0].size(2), o.kernel3 = weights[2].size(2);
    o.activation = activation;
    o.x = data<T>(x), o.panels = panels;
    return o;
  }

  // Rounds of images whose taps take so many elements a row, and the first image of one.
  int64_t rounds(int64_t columns) const {
    const int64_t most = std::max<int64_t>(1, taps_elements / (columns * pixels()));
    return (images + most - 1) / most;
  }
  int64_t first(int64_t rounds, int64_t round) const { return images * round / rounds; }
};

// f(begin, end) for parts of [0, n), one a thread.
template <class F> void share(int64_t threads, int64_t n, const F& f) {
  const int64_t parts = std::min(threads, n);
  in_threads(parts, [&](int64_t i) { f(n * i / parts, n * (i + 1) / parts); });
}

// f(i) for every i < n, by whichever thread is free: cores are not equally fast when they have neighbours. No result
// depends on who does what.
template <class F> void share_out(int64_t threads, int64_t n, const F& f) {
  std::atomic<int64_t> next = 0;
  in_threads(std::min(threads, n), [&](int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

int64_t multiply_adds(const Call& call) {
  int64_t per_row = 0;
  for (const Tensor& w : call.weights) per_row += w.numel();
  return call.rows() * per_row;
}

// Where hidden layers are kept: behind each other.
template <class T> void keep_in(ConvNet<T>& o, T* kept, int64_t all_rows, int64_t first_row) {
  const int64_t stride1 = conv_net_stride(o.channels[1]), stride2 = conv_net_stride(o.channels[2]);
  o.hidden[0] = kept + first_row * stride1;
  o.hidden[1] = kept + all_rows * stride1 + first_row * stride2;
}

template <class T> void forward(const Call& call, const Tensor& y, T* kept) {
  const int64_t threads = threads_for(multiply_adds(call)), pixels = call.pixels();
  ConvNet<T> o = call.contract<T>(nullptr);
  const int64_t columns = conv_net_stride(o.columns3()), rounds = call.rounds(columns);
  const int64_t largest = (call.images + rounds - 1) / rounds * pixels;
  const int64_t panels = PYFLOWGEN_CALL(conv_net_panels<T>, o, false);
  o.panels = workspace<T>(panels + largest * columns + conv_net_slack, 1);
  o.taps3 = o.panels + panels;
  share(threads, PYFLOWGEN_CALL(conv_net_pack_tasks<T>, o, false),
        [&](int64_t begin, int64_t end) { PYFLOWGEN_CALL(conv_net_pack<T>, o, false, begin, end); });
  const T* const x = o.x;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t first = call.first(rounds, round);
    o.images = call.first(rounds, round + 1) - first;
    o.x = x + first * pixels * o.channels[0];
    o.y = out<T>(y) + first * pixels * o.channels[3];
    if (kept) keep_in(o, kept, call.rows(), first * pixels);
    share_out(threads, conv_net_blocks(o), [&](int64_t block) {
      T* const scratch = workspace<T>(PYFLOWGEN_CALL(conv_net_workspace<T>, o), 0);
      PYFLOWGEN_CALL(conv_net_products<T>, o, block, block + 1, scratch);
    });
    share(threads, o.rows(), [&](int64_t begin, int64_t end) { PYFLOWGEN_CALL(conv_net_add_taps<T>, o, begin, end); });
  }
}

struct Gradients { Tensor dx, dweights[3], dbiases[3]; };

template <class T>
void backward(const Call& call, const Tensor& dy, T* kept, bool need_dx, bool need_parameters, const Gradients& g) {
  const int64_t threads = threads_for(2 * multiply_adds(call)), pixels = call.pixels();
  ConvNetBackward<T> b{};
  ConvNet<T>& o = b.forward;
  o = call.contract<T>(nullptr);
  const int64_t columns = conv_net_stride(o.columns1()), rounds = need_dx ? call.rounds(columns) : 1;
  const int64_t largest = (call.images + rounds - 1) / rounds * pixels;
  // One piece of memory for all.
  int64_t size = 0;
  const auto piece = [&](int64_t elements) {
    const int64_t at = size;
    size += (elements + conv_net_slack + 15) / 16 * 16;
    return at;
  };
  const int64_t at_panels = piece(PYFLOWGEN_CALL(conv_net_panels<T>, o, true));
  const int64_t at_taps = need_dx ? piece(largest * columns) : 0;
  const int64_t sums = PYFLOWGEN_CALL(conv_net_sums<T>, o);
  o.images = call.images / rounds;  // of the smallest round
  b.groups = std::clamp<int64_t>(sums_elements / sums, 1, std::min(most_groups, conv_net_blocks(o)));
  const int64_t at_sums = need_parameters ? piece(b.groups * sums) : 0;
  T* const memory = workspace<T>(size, 1);
  o.panels = memory + at_panels;
  if (need_dx) b.dtaps1 = memory + at_taps;
  if (need_parameters) {
    b.sums = memory + at_sums;
    for (int i = 0; i < 3; ++i) {
      b.dweight[i] = out<T>(g.dweights[i]);
      b.dbias[i] = call.biases[i] ? out<T>(g.dbiases[i]) : nullptr;
    }
  }
  share(threads, PYFLOWGEN_CALL(conv_net_pack_tasks<T>, o, true),
        [&](int64_t begin, int64_t end) { PYFLOWGEN_CALL(conv_net_pack<T>, o, true, begin, end); });
  const T* const x = o.x;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t first = call.first(rounds, round);
    o.images = call.first(rounds, round + 1) - first;
    o.x = x + first * pixels * o.channels[0];
    b.dy = data<T>(dy) + first * pixels * o.channels[3];
    b.add = round > 0;
    keep_in(o, kept, call.rows(), first * pixels);
    share_out(threads, b.groups, [&](int64_t group) {
      T* const scratch = workspace<T>(PYFLOWGEN_CALL(conv_net_backward_workspace<T>, o), 0);
      PYFLOWGEN_CALL(conv_net_backward_products<T>, b, group, group + 1, scratch);
    });
    if (!need_dx) continue;
    b.dx = out<T>(g.dx) + first * pixels * o.channels[0];
    share(threads, o.rows(),
          [&](int64_t begin, int64_t end) { PYFLOWGEN_CALL(conv_net_backward_add_taps<T>, b, begin, end); });
  }
  if (need_parameters) in_threads(threads, [&](int64_t i) { PYFLOWGEN_CALL(conv_net_reduce<T>, b, i, threads); });
}

std::tuple<Tensor, Tensor> conv_net(Tensor x, Tensor weight1, std::optional<Tensor> bias1, Tensor weight2,
                                    std::optional<Tensor> bias2, Tensor weight3, std::optional<Tensor> bias3,
                                    int64_t activation, bool keep) {
  const Call call("conv_net", x, weight1, bias1, weight2, bias2, weight3, bias3, activation);
  STD_TORCH_CHECK(!call.empty(), "conv_net: the kernel takes no empty tensors, got x of shape ", shape_of(x));
  const Tensor y = empty_images(call.images, call.out(), call.height, call.width, x);
  const int64_t columns = conv_net_stride(weight1.size(0)) + conv_net_stride(weight2.size(0));
  const Tensor kept = empty({keep ? call.rows() * columns : 0}, x);
  if (x.scalar_type() == ScalarType::Float) forward<float>(call, y, keep ? out<float>(kept) : nullptr);
  else forward<double>(call, y, keep ? out<double>(kept) : nullptr);
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_net_backward(
    Tensor dy, Tensor x, Tensor weight1, std::optional<Tensor> bias1, Tensor weight2, std::optional<Tensor> bias2,
    Tensor weight3, std::optional<Tensor> bias3, Tensor kept, int64_t activation, bool need_dx, bool need_parameters) {
  const Call call("conv_net_backward", x, weight1, bias1, weight2, bias2, weight3, bias3, activation);
  const int64_t columns = conv_net_stride(weight1.size(0)) + conv_net_stride(weight2.size(0));
  STD_TORCH_CHECK(!call.empty() && dy.dim() == 4 && dy.size(0) == call.images && dy.size(1) == call.out() &&
                      dy.size(2) == call.height && dy.size(3) == call.width && dy.scalar_type() == x.scalar_type(),
                  "conv_net_backward: dy of shape ", shape_of(dy), " does not fit x ", shape_of(x), " and ", call.out(),
                  " output channels");
  STD_TORCH_CHECK(
      kept.numel() == call.rows() * columns && kept.scalar_type() == x.scalar_type() && kept.is_contiguous(),
      "conv_net_backward: kept is not what the forward pass kept for these arguments");
  Gradients g;
  g.dx = need_dx ? empty_images(call.images, x.size(1), call.height, call.width, x) : empty({0}, x);
  for (int i = 0; i < 3; ++i) {
    const Tensor& w = call.weights[i];
    g.dweights[i] = need_parameters ? empty(w.sizes().data(), 4, x) : empty({0}, x);
    g.dbiases[i] = empty({need_parameters && call.biases[i] ? w.size(0) : 0}, x);
  }
  dy = with_channels_last(dy);
  if (x.scalar_type() == ScalarType::Float) backward<float>(call, dy, out<float>(kept), need_dx, need_parameters, g);
  else backward<double>(call, dy, out<double>(kept), need_dx, need_parameters, g);
  return {g.dx, g.dweights[0], g.dbiases[0], g.dweights[1], g.dbiases[1], g.dweights[2], g.dbiases[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("conv_net", TORCH_BOX(&conv_net));
  m.impl("conv_net_backward", TORCH_BOX(&conv_net_backward));
}

}  // namespace pyflowgen
