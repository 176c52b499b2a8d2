// mlp_coupling on the CPU: tensors to pointers, threads, registration.
#include "mlp_coupling.h"

#include <cstdlib>
#include <memory>
#include <tuple>

#include "affine_coupling_call.h"
#include "cpu/rows.h"

namespace pyflowgen {
namespace {

// A thread's scratch, kept between calls: as fresh memory its page faults would cost as much as a small layer.
template <class T> T* workspace(int64_t elements, int slot) {
  struct Free { void operator()(void* p) const { std::free(p); } };
  thread_local std::unique_ptr<void, Free> memory[2];
  thread_local size_t capacity[2];
  const size_t bytes = (size_t(elements) * sizeof(T) + 4095) / 4096 * 4096;
  if (bytes > capacity[slot]) {
    memory[slot].reset();
    capacity[slot] = 0;
    memory[slot].reset(std::aligned_alloc(4096, bytes));
    STD_TORCH_CHECK(memory[slot], "mlp_coupling: no memory for ", bytes, " bytes of workspace");
    capacity[slot] = bytes;
  }
  return static_cast<T*>(memory[slot].get());
}

// Multiply-adds worth a thread of their own.
constexpr int64_t work_per_thread = 1 << 18;

// The arguments both directions have, checked, and what keeps their memory alive.
struct Call {
  Rows x;
  std::optional<Rows> context;
  std::vector<Tensor> weights, biases;
  std::optional<Tensor> mask;
  int64_t activation, same_start, same_step, start, step, scale, layout;
  double clamp;
  bool shift_first, inverse;
  int64_t channels, context_size = 0, work = 0;

  Call(const Tensor& x_, const std::optional<Tensor>& context_, std::vector<Tensor> weights_,
       std::vector<Tensor> biases_, std::optional<Tensor> mask_, int64_t activation_, int64_t same_start_,
       int64_t same_step_, int64_t start_, int64_t step_, int64_t scale_, double clamp_, bool shift_first_,
       bool inverse_, int64_t layout_)
      : x{x_, 0, 0},
        weights(std::move(weights_)),
        biases(std::move(biases_)),
        mask(std::move(mask_)),
        activation(activation_),
        same_start(same_start_),
        same_step(same_step_),
        start(start_),
        step(step_),
        scale(scale_),
        layout(layout_),
        clamp(clamp_),
        shift_first(shift_first_),
        inverse(inverse_) {
    const char* op = "mlp_coupling";
    STD_TORCH_CHECK(x_.scalar_type() == ScalarType::Float || x_.scalar_type() == ScalarType::Double, op,
                    ": the kernel takes float32 and float64");
    STD_TORCH_CHECK(x_.dim() >= 1, op, ": x must have shape (*batch, channels), got ", shape_of(x_));
    channels = x_.size(x_.dim() - 1);
    x = rows_of(x_, channels);
    const int64_t layers = int64_t(weights.size());
    STD_TORCH_CHECK(1 <= layers && layers <= mlp_max_layers && biases.size() == weights.size(), op, ": takes 1 to ",
                    mlp_max_layers, " layers, and a bias for each");
    if (context_) {
      STD_TORCH_CHECK(context_->dim() == x_.dim() && context_->scalar_type() == x_.scalar_type(), op,
                      ": context must have x's dimensions and dtype");
      for (int64_t d = 0; d + 1 < x_.dim(); ++d)
        STD_TORCH_CHECK(context_->size(d) == x_.size(d), op, ": context has shape ", shape_of(*context_), ", x ",
                        shape_of(x_));
      context_size = context_->size(x_.dim() - 1);
      context = rows_of(*context_, context_size);
    }
    int64_t in = weights[0].dim() == 2 ? weights[0].size(1) : 0;
    const int64_t same = in - context_size;
    for (int64_t i = 0; i < layers; ++i) {
      Tensor &weight = weights[i], &bias = biases[i];
      STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == in && weight.size(0) > 0 &&
                          weight.scalar_type() == x_.scalar_type(),
                      op, ": weight ", i, " has shape ", shape_of(weight), ", expected (out, ", in, ") of x's dtype");
      work += weight.numel();
      in = weight.size(0);
      STD_TORCH_CHECK(bias.numel() == 0 || (bias.dim() == 1 && bias.size(0) == in &&
                                            bias.scalar_type() == x_.scalar_type()),
                      op, ": bias ", i, " has shape ", shape_of(bias), ", expected (", in, ",) of x's dtype");
      weight = dense(weight), bias = dense(bias);
    }
    STD_TORCH_CHECK(0 <= activation && activation < activations, op, ": there is no activation ", activation);
    STD_TORCH_CHECK(0 <= scale && scale <= int64_t(AffineScale::softplus), op, ": there is no scale ", scale);
    STD_TORCH_CHECK(layout == 1 || layout == 2, op, ": layout must be halves or interleaved");
    const int64_t count = scale ? in / 2 : in;
    STD_TORCH_CHECK(in % (scale ? 2 : 1) == 0 && start >= 0 && step >= 1 && start + (count - 1) * step < channels, op,
                    ": ", in, " parameters from channel ", start, " by ", step, " do not fit ", channels, " channels");
    STD_TORCH_CHECK(same >= 1 && same_start >= 0 && same_step >= 1 && same_start + (same - 1) * same_step < channels,
                    op, ": ", same, " conditioning channels from ", same_start, " by ", same_step, " do not fit ",
                    channels, " channels");
    if (mask) {
      STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == channels && mask->scalar_type() == ScalarType::Bool &&
                          same == channels && count == channels,
                      op, ": mask must be bool of shape (", channels, ",), with a conditioner from and for all channels");
      mask = dense(*mask);
    }
  }

  int64_t threads() const {
    const int64_t wanted = x.count * work / work_per_thread;
    return std::clamp<int64_t>(wanted, 1, torch::stable::get_num_threads());
  }

  template <class T> MlpCoupling<T> contract() const {
    MlpCoupling<T> o{};
    o.rows = x.count, o.channels = channels;
    o.layers = int64_t(weights.size());
    o.size[0] = weights[0].size(1);
    for (int64_t i = 0; i < o.layers; ++i) {
      o.size[i + 1] = weights[i].size(0);
      o.weight[i] = data<T>(weights[i]);
      o.bias[i] = biases[i].numel() ? data<T>(biases[i]) : nullptr;
    }
    o.activation = Activation(activation);
    o.same_start = same_start, o.same_step = same_step, o.same_count = o.size[0] - context_size;
    o.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
    o.context_size = context_size;
    const int64_t parameters = o.size[o.layers], count = scale ? parameters / 2 : parameters;
    o.o = {0, channels, 1, start, step, count, AffineScale(scale), clamp, shift_first, inverse, false};
    const bool interleaved = scale && Layout(layout) == Layout::interleaved;
    o.parameter_stride = interleaved ? 2 : 1;
    o.log_scale_offset = !scale ? 0 : interleaved ? 1 : count;
    o.x = data<T>(x.x), o.x_stride = x.stride;
    o.context = context ? data<T>(context->x) : nullptr, o.context_stride = context ? context->stride : 0;
    return o;
  }
};

int64_t saved_size(const Call& call) {
  int64_t size = 0;
  for (const Tensor& weight : call.weights) size += weight.size(0);
  return call.x.count * size;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights,
                                           std::vector<Tensor> biases, std::optional<Tensor> mask, int64_t activation,
                                           int64_t same_start, int64_t same_step, int64_t start, int64_t step,
                                           int64_t scale, double clamp, bool shift_first, bool inverse, int64_t layout,
                                           bool keep) {
  const Call call(x, context, std::move(weights), std::move(biases), mask, activation, same_start, same_step, start,
                  step, scale, clamp, shift_first, inverse, layout);
  const Tensor y = empty(x.sizes().data(), x.dim(), x), logdet = empty(x.sizes().data(), x.dim() - 1, x);
  const Tensor saved = empty({keep ? saved_size(call) : 0}, x);
  const auto run = [&]<class T>() {
    MlpCoupling<T> o = call.contract<T>();
    o.y = out<T>(y), o.logdet = out<T>(logdet), o.saved = keep ? out<T>(saved) : nullptr;
    const int64_t blocks = (o.rows + mlp_block_rows - 1) / mlp_block_rows, parts = std::min(call.threads(), blocks);
    const int64_t scratch = PYFLOWGEN_CALL(mlp_coupling_workspace<T>, o);
    if (blocks)
      in_threads(parts, [&](int64_t i) {
        PYFLOWGEN_CALL(mlp_coupling<T>, o, blocks * i / parts, blocks * (i + 1) / parts, workspace<T>(scratch, 0));
      });
  };
  x.scalar_type() == ScalarType::Float ? run.operator()<float>() : run.operator()<double>();
  return {y, logdet, saved};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> backward(
    std::optional<Tensor> dy, std::optional<Tensor> dlogdet, Tensor x, std::optional<Tensor> context,
    std::vector<Tensor> weights, std::vector<Tensor> biases, std::optional<Tensor> mask, Tensor saved,
    int64_t activation, int64_t same_start, int64_t same_step, int64_t start, int64_t step, int64_t scale, double clamp,
    bool shift_first, bool inverse, int64_t layout, bool need_input, bool need_parameters) {
  const Call call(x, context, std::move(weights), std::move(biases), mask, activation, same_start, same_step, start,
                  step, scale, clamp, shift_first, inverse, layout);
  STD_TORCH_CHECK(saved.numel() == saved_size(call) && saved.scalar_type() == x.scalar_type() && saved.is_contiguous(),
                  "mlp_coupling_backward: saved is not what the forward pass kept for these arguments");
  STD_TORCH_CHECK(!dy || (dy->numel() == x.numel() && dy->dim() == x.dim() && dy->scalar_type() == x.scalar_type()),
                  "mlp_coupling_backward: dy has shape ", dy ? shape_of(*dy) : "", ", expected x's ", shape_of(x));
  STD_TORCH_CHECK(!dlogdet || (dlogdet->numel() == call.x.count && dlogdet->scalar_type() == x.scalar_type()),
                  "mlp_coupling_backward: dlogdet has shape ", dlogdet ? shape_of(*dlogdet) : "",
                  ", expected the batch's");
  const Tensor dx = empty(x.sizes().data(), x.dim(), x);
  const Tensor dcontext = context && need_input ? empty(context->sizes().data(), context->dim(), x) : empty({0}, x);
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < call.weights.size(); ++i) {
    const int64_t sizes[] = {call.weights[i].size(0), call.weights[i].size(1)};
    gradients.push_back(need_parameters ? empty(sizes, 2, x) : empty({0}, x));
    gradients.push_back(empty({need_parameters ? call.biases[i].numel() : 0}, x));
  }
  const auto run = [&]<class T>() {
    const T zero{};
    MlpCouplingBackward<T> b{};
    b.forward = call.contract<T>();
    b.forward.saved = out<T>(saved);
    b.dy = &zero, b.dlogdet = &zero;
    std::optional<Rows> rows;
    if (dy) {
      rows = rows_of(*dy, call.channels);
      b.dy = data<T>(rows->x), b.dy_strides = {rows->stride, 1, 0};
    }
    if (dlogdet) {
      if (!joint_stride(*dlogdet, 0, dlogdet->dim())) dlogdet = torch::stable::contiguous(*dlogdet);
      b.dlogdet = data<T>(*dlogdet), b.dlogdet_stride = *joint_stride(*dlogdet, 0, dlogdet->dim());
    }
    b.need_input = need_input, b.need_parameters = need_parameters;
    b.dx = out<T>(dx), b.dcontext = dcontext.numel() ? out<T>(dcontext) : nullptr;
    int64_t parameter_rows = 0;
    for (int64_t i = 0; i < b.forward.layers; ++i) {
      b.dweight[i] = out<T>(gradients[2 * i]);
      b.dbias[i] = gradients[2 * i + 1].numel() ? out<T>(gradients[2 * i + 1]) : nullptr;
      parameter_rows += b.forward.size[i + 1];
    }
    const int64_t groups = mlp_coupling_groups(b.forward.rows), parts = std::min(call.threads(), groups);
    if (need_parameters) b.sums = workspace<T>(groups * PYFLOWGEN_CALL(mlp_coupling_sums<T>, b.forward), 1);
    const int64_t scratch = PYFLOWGEN_CALL(mlp_coupling_backward_workspace<T>, b.forward);
    in_threads(parts, [&](int64_t i) {
      PYFLOWGEN_CALL(mlp_coupling_backward<T>, b, groups * i / parts, groups * (i + 1) / parts,
                     workspace<T>(scratch, 0));
    });
    if (need_parameters)
      in_threads(parts, [&](int64_t i) {
        PYFLOWGEN_CALL(mlp_coupling_reduce<T>, b, parameter_rows * i / parts, parameter_rows * (i + 1) / parts);
      });
  };
  if (call.x.count) {
    x.scalar_type() == ScalarType::Float ? run.operator()<float>() : run.operator()<double>();
  } else {
    for (Tensor& gradient : gradients) torch::stable::zero_(gradient);
  }
  return {dx, dcontext, gradients};
}

}  // namespace
}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("mlp_coupling", TORCH_BOX(&pyflowgen::forward));
  m.impl("mlp_coupling_backward", TORCH_BOX(&pyflowgen::backward));
}
