// mlp_coupling on the CPU: tensors to pointers, threads, registration.
#include "mlp_coupling.h"

#include <cmath>
#include <tuple>

#include "affine_coupling_call.h"
#include "cpu/rows.h"
#include "cpu/workspace.h"

namespace pyflowgen {
namespace {

// Multiply-adds worth a thread of their own.
constexpr int64_t work_of_a_thread = 1 << 18;

// The tensors of both directions.
struct Arguments {
  Tensor x;
  std::optional<Tensor> context;
  std::vector<Tensor> weights, biases, masks, indices, log_scales, shifts;
  std::vector<int64_t> options;
  std::vector<double> numbers;
};

// One step's part of them.
struct Step {
  int64_t layers, activation, same_start, same_step, start, step, scale;
  bool shift_first, inverse;
  int64_t layout;
  bool permuted;
  int64_t scaled;
  bool shifted;
  int64_t bins, convention, tails, blocks;
  const double* numbers;
  size_t weight, index, log_scale, shift;  // its first place in each list
  int64_t parameters, conditioning;

  bool gated() const { return blocks && layers == 2 + 3 * blocks; }
  int64_t derivatives() const { return SplineTails(tails) == SplineTails::linear ? bins - 1 : bins; }
  // Parameters of one channel.
  int64_t per_channel() const { return bins ? 2 * bins + derivatives() : scale ? 2 : 1; }
};

constexpr size_t options_of_step = 17, numbers_of_step = 11;

// The arguments, checked, and what keeps their memory alive.
struct Call {
  Arguments a;
  Rows x;
  std::optional<Rows> context;
  std::vector<Step> steps;
  int64_t channels = 0, context_size = 0, work = 0, saved = 0;

  explicit Call(Arguments&& arguments) : a(std::move(arguments)), x{a.x, 0, 0} {
    const char* op = "mlp_coupling";
    const auto dtype = a.x.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                    ": the kernel takes float32 and float64");
    STD_TORCH_CHECK(a.x.dim() >= 1, op, ": x must have shape (*batch, channels), got ", shape_of(a.x));
    channels = a.x.size(a.x.dim() - 1);
    x = rows_of(a.x, channels);
    if (a.context) {
      STD_TORCH_CHECK(a.context->dim() == a.x.dim() && a.context->scalar_type() == dtype, op,
                      ": context must have x's dimensions and dtype");
      for (int64_t d = 0; d + 1 < a.x.dim(); ++d)
        STD_TORCH_CHECK(a.context->size(d) == a.x.size(d), op, ": context has shape ", shape_of(*a.context), ", x ",
                        shape_of(a.x));
      context_size = a.context->size(a.x.dim() - 1);
      context = rows_of(*a.context, context_size);
    }
    const size_t count = a.masks.size();
    STD_TORCH_CHECK(count > 0 && a.biases.size() == a.weights.size() && a.options.size() == options_of_step * count &&
                        a.numbers.size() == numbers_of_step * count,
                    op, ": the lists do not belong together");
    size_t weight = 0, index = 0, log_scale = 0, shift = 0;
    for (size_t i = 0; i < count; ++i) {
      const int64_t* o = a.options.data() + options_of_step * i;
      Step s{o[0],        o[1],       o[2],       o[3],  o[4],        o[5],
             o[6],        bool(o[7]), bool(o[8]), o[9],  bool(o[10]), o[11],
             bool(o[12]), o[13],      o[14],      o[15], o[16],       a.numbers.data() + numbers_of_step * i,
             weight,      index,      log_scale,  shift, 0,           0};
      STD_TORCH_CHECK(0 <= s.layers && s.layers <= mlp_max_layers && weight + size_t(s.layers) <= a.weights.size(), op,
                      ": takes up to ", mlp_max_layers, " layers a step, and the weights of all");
      weight += size_t(s.layers), index += s.permuted, log_scale += s.scaled != 0, shift += s.shifted;
      STD_TORCH_CHECK(index <= a.indices.size() && log_scale <= a.log_scales.size() && shift <= a.shifts.size() &&
                          (s.scaled || !s.shifted),
                      op, ": the lists do not belong together");
      if (s.permuted) {
        Tensor& t = a.indices[s.index];
        STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.scalar_type() == ScalarType::Long, op,
                        ": an index has shape ", shape_of(t), ", expected int64 of (", channels, ",)");
        t = dense(t);
        const int64_t* k = static_cast<const int64_t*>(t.data_ptr());
        for (int64_t c = 0; c < channels; ++c)
          STD_TORCH_CHECK(0 <= k[c] && k[c] < channels, op, ": an index reaches beyond ", channels, " channels");
      }
      if (s.scaled) check_channels(a.log_scales[s.log_scale], "a log-scale");
      if (s.shifted) check_channels(a.shifts[s.shift], "a shift");
      if (s.layers) check_coupling(s, a.masks[i]);
      steps.push_back(s);
    }
    STD_TORCH_CHECK(weight == a.weights.size() && index == a.indices.size() && log_scale == a.log_scales.size() &&
                        shift == a.shifts.size(),
                    op, ": the lists do not belong together");
    saved += x.count * channels * int64_t(steps.size() - 1);
  }

  void check_channels(Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.scalar_type() == a.x.scalar_type(),
                    "mlp_coupling: ", name, " has shape ", shape_of(t), ", expected (", channels, ",) of x's dtype");
    t = dense(t);
  }

  void check_coupling(Step& s, Tensor& mask) {
    const char* op = "mlp_coupling";
    const auto dtype = a.x.scalar_type();
    int64_t in = a.weights[s.weight].dim() == 2 ? a.weights[s.weight].size(1) : 0;
    s.conditioning = in - context_size;
    STD_TORCH_CHECK(s.blocks >= 0 && (!s.blocks || s.layers == 2 + 2 * s.blocks || (s.gated() && context_size)), op,
                    ": ", s.blocks, " residual blocks have two layers each, or three with a context, got ", s.layers,
                    " in all");
    for (int64_t l = 0; l < s.layers; ++l) {
      const size_t i = s.weight + size_t(l);
      Tensor &weight = a.weights[i], &bias = a.biases[i];
      const bool gate = s.gated() && l && l % 3 == 0, square = s.blocks && l && l + 1 < s.layers;
      if (gate) in = context_size;
      STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == in && weight.size(0) > 0 && weight.scalar_type() == dtype,
                      op, ": weight ", i, " has shape ", shape_of(weight), ", expected (out, ", in, ") of x's dtype");
      const int64_t hidden = a.weights[s.weight].size(0);
      STD_TORCH_CHECK(!square || weight.size(0) == hidden, op, ": weight ", i, " has shape ", shape_of(weight),
                      ", expected (", hidden, ", ", in, ") in a residual block");
      work += weight.numel();
      in = weight.size(0);
      saved += x.count * (gate ? 2 * in : in);
      STD_TORCH_CHECK(bias.numel() == 0 || (bias.dim() == 1 && bias.size(0) == in && bias.scalar_type() == dtype), op,
                      ": bias ", i, " has shape ", shape_of(bias), ", expected (", in, ",) of x's dtype");
      weight = dense(weight), bias = dense(bias);
    }
    s.parameters = in;
    STD_TORCH_CHECK(0 <= s.activation && s.activation < activations, op, ": there is no activation ", s.activation);
    STD_TORCH_CHECK(0 <= s.scale && s.scale <= int64_t(AffineScale::softplus), op, ": there is no scale ", s.scale);
    STD_TORCH_CHECK(s.layout == 1 || s.layout == 2, op, ": layout must be halves or interleaved");
    STD_TORCH_CHECK(
        s.bins == 0 || (2 <= s.bins && s.bins <= 64 && s.convention >= 0 &&
                        s.convention <= int64_t(SplineConvention::torchflows) &&
                        (SplineTails(s.tails) == SplineTails::linear || SplineTails(s.tails) == SplineTails::circular)),
        op, ": splines have 2 to 64 bins, a known convention, and linear or circular tails");
    const int64_t per = s.per_channel(), count = in / per;
    STD_TORCH_CHECK(in % per == 0 && s.start >= 0 && s.step >= 1 && s.start + (count - 1) * s.step < channels, op, ": ",
                    in, " parameters from channel ", s.start, " by ", s.step, " do not fit ", channels, " channels");
    STD_TORCH_CHECK(s.conditioning >= 1 && s.same_start >= 0 && s.same_step >= 1 &&
                        s.same_start + (s.conditioning - 1) * s.same_step < channels,
                    op, ": ", s.conditioning, " conditioning channels from ", s.same_start, " by ", s.same_step,
                    " do not fit ", channels, " channels");
    if (!mask.numel()) return;
    STD_TORCH_CHECK(mask.dim() == 1 && mask.size(0) == channels && mask.scalar_type() == ScalarType::Bool &&
                        s.conditioning == channels && count == channels,
                    op, ": mask must be bool of shape (", channels, ",), with a conditioner from and for all channels");
    mask = dense(mask);
  }

  int64_t threads() const {
    return std::clamp<int64_t>(x.count * work / work_of_a_thread, 1, torch::stable::get_num_threads());
  }

  // e^s or e^-s, and the shift as it is added: behind the scale, or with the other sign before its inverse.
  template <class T> std::vector<T> prepared() const {
    std::vector<T> values;
    values.reserve(size_t(2 * channels) * steps.size());  // never moved: the contracts point into it
    for (const Step& s : steps) {
      if (s.scaled) {
        const T* log_scale = data<T>(a.log_scales[s.log_scale]);
        for (int64_t k = 0; k < channels; ++k) values.push_back(std::exp(T(s.scaled) * log_scale[k]));
      }
      if (s.shifted) {
        const T* shift = data<T>(a.shifts[s.shift]);
        for (int64_t k = 0; k < channels; ++k) values.push_back(s.scaled < 0 ? -shift[k] : shift[k]);
      }
    }
    return values;
  }

  // The steps' contracts: `states` has what goes into each but the first, `kept` what is saved of it, or null both.
  template <class T> std::vector<MlpCoupling<T>> contracts(const std::vector<T>& prepared, T* saved_values) const {
    std::vector<MlpCoupling<T>> result;
    const T* ready = prepared.data();
    T* states = saved_values;
    T* kept = saved_values ? saved_values + x.count * channels * int64_t(steps.size() - 1) : nullptr;
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& s = steps[i];
      MlpCoupling<T> o{};
      o.rows = x.count, o.channels = channels;
      o.index = s.permuted ? static_cast<const int64_t*>(a.indices[s.index].data_ptr()) : nullptr;
      if (s.scaled) {
        o.scale = ready, ready += channels;
        if (s.shifted) o.shift = ready, ready += channels;
        o.shift_first = s.scaled < 0, o.scale_sign = int(s.scaled);
        const T* log_scale = data<T>(a.log_scales[s.log_scale]);
        for (int64_t k = 0; k < channels; ++k) o.logdet_start += double(s.scaled) * double(log_scale[k]);
      }
      o.layers = s.layers;
      o.saved = kept;
      if (s.layers) {
        for (int64_t l = 0; l < s.layers; ++l) {
          const Tensor &weight = a.weights[s.weight + size_t(l)], &bias = a.biases[s.weight + size_t(l)];
          o.in[l] = weight.size(1), o.out[l] = weight.size(0);
          o.weight[l] = data<T>(weight), o.bias[l] = bias.numel() ? data<T>(bias) : nullptr;
        }
        o.activation = Activation(s.activation), o.blocks = s.blocks, o.gated = s.gated();
        o.same_start = s.same_start, o.same_step = s.same_step, o.same_count = s.conditioning;
        o.mask = a.masks[i].numel() ? static_cast<const uint8_t*>(a.masks[i].data_ptr()) : nullptr;
        o.context_size = context_size;
        const int64_t per = s.per_channel(), count = s.parameters / per;
        const double* n = s.numbers;
        o.o = {0, channels, 1, s.start, s.step, count, AffineScale(s.scale), n[0], s.shift_first, s.inverse, false};
        const bool interleaved = s.scale && Layout(s.layout) == Layout::interleaved;
        o.parameter_stride = interleaved ? 2 : 1;
        o.log_scale_offset = !s.scale ? 0 : interleaved ? 1 : count;
        o.spline = s.bins > 0;
        if (o.spline) {
          o.s = {0,
                 channels,
                 1,
                 s.start,
                 s.step,
                 count,
                 s.bins,
                 s.derivatives(),
                 SplineConvention(s.convention),
                 SplineTails(s.tails),
                 n[1],
                 n[2],
                 n[3],
                 n[4],
                 n[5],
                 n[6],
                 n[7],
                 n[8],
                 n[9],
                 n[10],
                 s.inverse,
                 false};
          o.parameter_stride = per;
        }
        o.context = context ? data<T>(context->x) : nullptr, o.context_stride = context ? context->stride : 0;
        for (int64_t l = 0; kept && l < s.layers; ++l) kept += x.count * o.saved_columns(l);
      }
      o.x = i ? states : data<T>(x.x), o.x_stride = i ? channels : x.stride;
      if (i && saved_values) states += x.count * channels;
      o.add_logdet = i > 0;
      result.push_back(o);
    }
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, std::optional<Tensor> context, std::vector<Tensor> weights,
                                           std::vector<Tensor> biases, std::vector<Tensor> masks,
                                           std::vector<Tensor> indices, std::vector<Tensor> log_scales,
                                           std::vector<Tensor> shifts, std::vector<int64_t> options,
                                           std::vector<double> numbers, bool keep) {
  const Call call({x, std::move(context), std::move(weights), std::move(biases), std::move(masks), std::move(indices),
                   std::move(log_scales), std::move(shifts), std::move(options), std::move(numbers)});
  const Tensor y = empty(x.sizes().data(), x.dim(), x), logdet = empty(x.sizes().data(), x.dim() - 1, x);
  const Tensor saved = empty({keep ? call.saved : 0}, x);
  const auto run = [&]<class T>() {
    const auto prepared = call.prepared<T>();
    auto steps = call.contracts<T>(prepared, keep ? out<T>(saved) : nullptr);
    int64_t scratch = 0;
    for (size_t i = 0; i < steps.size(); ++i) {
      MlpCoupling<T>& o = steps[i];
      o.logdet = out<T>(logdet);
      // Where nothing is kept every step but the first works on y in place.
      if (i && !keep) o.x = out<T>(y);
      o.y = keep && i + 1 < steps.size() ? const_cast<T*>(steps[i + 1].x) : out<T>(y);
      scratch = std::max(scratch, PYFLOWGEN_CALL(mlp_coupling_workspace<T>, o));
    }
    const int64_t in_block = mlp_block_rows(call.x.count), blocks = (call.x.count + in_block - 1) / in_block;
    const int64_t parts = std::min(call.threads(), blocks);
    in_threads(parts, [&](int64_t part) {
      T* const space = workspace<T>(scratch, 0);
      for (const MlpCoupling<T>& o : steps)
        PYFLOWGEN_CALL(mlp_coupling<T>, o, blocks * part / parts, blocks * (part + 1) / parts, space);
    });
  };
  if (call.x.count) x.scalar_type() == ScalarType::Float ? run.operator()<float>() : run.operator()<double>();
  return {y, logdet, saved};
}

using Gradients = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

// Where backward has no more than y, the call's x: x goes to `rebuilt`, or is given.
struct Rebuild {
  Tensor rebuilt;
  std::optional<Rows> x;
};

Gradients gradients_of(const Call& call, std::optional<Tensor> dy, std::optional<Tensor> dlogdet,
                       const std::optional<Tensor>& saved, const std::optional<Rebuild>& back, bool need_input,
                       bool need_parameters) {
  const Tensor& x = call.a.x;
  const auto& context = call.a.context;
  STD_TORCH_CHECK(!dy || (dy->numel() == x.numel() && dy->dim() == x.dim() && dy->scalar_type() == x.scalar_type()),
                  "mlp_coupling_backward: dy has shape ", dy ? shape_of(*dy) : "", ", expected x's ", shape_of(x));
  STD_TORCH_CHECK(!dlogdet || (dlogdet->numel() == call.x.count && dlogdet->scalar_type() == x.scalar_type()),
                  "mlp_coupling_backward: dlogdet has shape ", dlogdet ? shape_of(*dlogdet) : "",
                  ", expected the batch's");
  const Tensor dx = empty(x.sizes().data(), x.dim(), x);
  const Tensor dcontext = context && need_input ? empty(context->sizes().data(), context->dim(), x) : empty({0}, x);
  std::vector<Tensor> gradients;  // like weights, biases, log_scales, shifts
  for (const auto* list : {&call.a.weights, &call.a.biases, &call.a.log_scales, &call.a.shifts})
    for (const Tensor& t : *list)
      gradients.push_back(need_parameters ? empty(t.sizes().data(), t.dim(), x) : empty({0}, x));
  const Tensor* const dweights = gradients.data();
  const Tensor* const dbiases = dweights + call.a.weights.size();
  const Tensor* const dlog_scales = dbiases + call.a.biases.size();
  const Tensor* const dshifts = dlog_scales + call.a.log_scales.size();
  const auto run = [&]<class T>() {
    const T zero{};
    const auto prepared = call.prepared<T>();
    const auto forwards = call.contracts<T>(prepared, saved ? out<T>(*saved) : nullptr);
    const int64_t groups = mlp_coupling_groups(call.x.count), parts = std::min(call.threads(), groups);
    std::optional<Rows> rows;
    if (dy) rows = rows_of(*dy, call.channels);
    if (dlogdet && !joint_stride(*dlogdet, 0, dlogdet->dim())) dlogdet = torch::stable::contiguous(*dlogdet);
    std::vector<MlpCouplingBackward<T>> steps(forwards.size());
    int64_t scratch = 0, sums = 0;
    bool conditioned = false;
    for (size_t i = steps.size(); i-- > 0;) {  // as they are taken
      MlpCouplingBackward<T>& b = steps[i];
      const Step& s = call.steps[i];
      b.forward = forwards[i];
      if (back && !i && back->x) {
        b.forward.x = data<T>(back->x->x), b.forward.x_stride = back->x->stride;
      } else if (back) {
        const bool last = i + 1 == steps.size();
        b.y = last ? data<T>(call.x.x) : out<T>(back->rebuilt), b.y_stride = last ? call.x.stride : call.channels;
        b.forward.x = b.rebuilt = out<T>(back->rebuilt), b.forward.x_stride = call.channels;
      }
      if (i + 1 < steps.size()) b.dy = out<T>(dx), b.dy_strides = {call.channels, 1, 0};
      else if (rows) b.dy = data<T>(rows->x), b.dy_strides = {rows->stride, 1, 0};
      else b.dy = &zero;
      b.dlogdet = dlogdet ? data<T>(*dlogdet) : &zero;
      b.dlogdet_stride = dlogdet ? *joint_stride(*dlogdet, 0, dlogdet->dim()) : 0;
      // The first step's scale learns from what its conditioner hands back, too.
      b.need_input = need_input || i > 0 || (s.scaled && need_parameters), b.need_parameters = need_parameters;
      b.dx = out<T>(dx);
      if (s.layers) {
        b.dcontext = dcontext.numel() ? out<T>(dcontext) : nullptr;
        b.add_dcontext = conditioned, conditioned = true;
      }
      for (int64_t l = 0; l < s.layers; ++l) {
        b.dweight[l] = out<T>(dweights[s.weight + size_t(l)]);
        const Tensor& dbias = dbiases[s.weight + size_t(l)];
        b.dbias[l] = dbias.numel() ? out<T>(dbias) : nullptr;
      }
      b.dscale = s.scaled ? out<T>(dlog_scales[s.log_scale]) : nullptr;
      b.dshift = s.shifted ? out<T>(dshifts[s.shift]) : nullptr;
      scratch = std::max(scratch, PYFLOWGEN_CALL(mlp_coupling_backward_workspace<T>, b.forward));
      const int64_t own = need_parameters ? groups * PYFLOWGEN_CALL(mlp_coupling_sums<T>, b.forward) : 0;
      sums = back ? std::max(sums, own) : sums + own;
    }
    T* const space_of_sums = need_parameters ? workspace<T>(sums, 1) : nullptr;
    T* next = space_of_sums;
    for (MlpCouplingBackward<T>& b : steps) {
      b.sums = next;
      if (need_parameters && !back) next += groups * PYFLOWGEN_CALL(mlp_coupling_sums<T>, b.forward);
    }
    // Steps begin <= i < end, from the last to the first, then the sums over groups. All at once, or, where memory is
    // not to grow with depth, one by one in the same space.
    const auto go_back = [&](size_t begin, size_t end) {
      in_threads(parts, [&](int64_t part) {
        T* const space = workspace<T>(scratch, 0);
        for (size_t i = end; i-- > begin;)
          PYFLOWGEN_CALL(mlp_coupling_backward<T>, steps[i], groups * part / parts, groups * (part + 1) / parts, space);
      });
      if (need_parameters)
        in_threads(parts, [&](int64_t part) {
          for (size_t i = begin; i < end; ++i) PYFLOWGEN_CALL(mlp_coupling_reduce<T>, steps[i], part, parts);
        });
    };
    const size_t together = back ? 1 : steps.size();
    for (size_t end = steps.size(); end > 0; end -= together) go_back(end - together, end);
    if (dcontext.numel() && !conditioned) torch::stable::zero_(const_cast<Tensor&>(dcontext));
  };
  if (call.x.count) {
    x.scalar_type() == ScalarType::Float ? run.operator()<float>() : run.operator()<double>();
  } else {
    for (Tensor& gradient : gradients) torch::stable::zero_(gradient);
  }
  return {dx, dcontext, gradients};
}

Gradients backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet, Tensor x, std::optional<Tensor> context,
                   std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> masks,
                   std::vector<Tensor> indices, std::vector<Tensor> log_scales, std::vector<Tensor> shifts,
                   Tensor saved, std::vector<int64_t> options, std::vector<double> numbers, bool need_input,
                   bool need_parameters) {
  const Call call({x, std::move(context), std::move(weights), std::move(biases), std::move(masks), std::move(indices),
                   std::move(log_scales), std::move(shifts), std::move(options), std::move(numbers)});
  STD_TORCH_CHECK(saved.numel() == call.saved && saved.scalar_type() == x.scalar_type() && saved.is_contiguous(),
                  "mlp_coupling_backward: saved is not what the forward pass kept for these arguments");
  return gradients_of(call, std::move(dy), std::move(dlogdet), saved, {}, need_input, need_parameters);
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> rebuild(
    std::optional<Tensor> dy, std::optional<Tensor> dlogdet, Tensor y, std::optional<Tensor> x,
    std::optional<Tensor> context, std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> masks,
    std::vector<Tensor> indices, std::vector<Tensor> log_scales, std::vector<Tensor> shifts,
    std::vector<int64_t> options, std::vector<double> numbers, bool need_input, bool need_parameters) {
  const Call call({y, std::move(context), std::move(weights), std::move(biases), std::move(masks), std::move(indices),
                   std::move(log_scales), std::move(shifts), std::move(options), std::move(numbers)});
  STD_TORCH_CHECK(!x || (x->numel() == y.numel() && x->dim() == y.dim() && x->scalar_type() == y.scalar_type()),
                  "mlp_coupling_rebuild: x has shape ", x ? shape_of(*x) : "", ", expected y's ", shape_of(y));
  Rebuild back{empty(y.sizes().data(), y.dim(), y), {}};
  if (x) back.x = rows_of(*x, call.channels);
  auto [dx, dcontext, gradients] =
      gradients_of(call, std::move(dy), std::move(dlogdet), {}, back, need_input, need_parameters);
  return {back.rebuilt, dx, dcontext, gradients};
}

}  // namespace
}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("mlp_coupling", TORCH_BOX(&pyflowgen::forward));
  m.impl("mlp_coupling_backward", TORCH_BOX(&pyflowgen::backward));
  m.impl("mlp_coupling_rebuild", TORCH_BOX(&pyflowgen::rebuild));
}
