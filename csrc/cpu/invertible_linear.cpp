// invertible_linear on the CPU: the algebra of one matrix, threads, registration.
#include "formula/invertible_linear.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "invertible_linear_call.h"

namespace pyflowgen {
namespace {

namespace formula = PYFLOWGEN_ISA::formula;

// Elements worth a thread of their own, and the most sums that a gradient is gathered in.
constexpr int64_t grain = 16384, most_segments = 16;

template <class T> using ComputeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

std::vector<double> doubles(const Tensor& t) {
  const Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
  const auto copy = [&]<class T>(const Tensor& from, T) {
    const T* p = static_cast<const T*>(from.const_data_ptr());
    return std::vector<double>(p, p + from.numel());
  };
  if (t.scalar_type() == ScalarType::Float) return copy(dense, float());
  return copy(t.scalar_type() == ScalarType::Double ? dense : torch::stable::to(dense, ScalarType::Double), double());
}
std::vector<double> doubles(const std::optional<Tensor>& t) { return t ? doubles(*t) : std::vector<double>(); }
const double* or_null(const std::vector<double>& v) { return v.empty() ? nullptr : v.data(); }

// The parameters in double, and what follows from them alone.
struct Map {
  int64_t n;
  bool packed;
  std::vector<double> weight, log_scale, shift, sign, storage;
  std::vector<int64_t> permutation, rows, back;
  double log_abs = 0;
  formula::LinearFactors f;

  Map(int64_t n, const Tensor& given, const std::optional<Tensor>& log_scale, const std::optional<Tensor>& shift,
      const std::optional<Tensor>& order, const std::optional<Tensor>& sign)
      : n(n),
        packed(order.has_value()),
        weight(doubles(given)),
        log_scale(doubles(log_scale)),
        shift(doubles(shift)),
        sign(doubles(sign)),
        storage(size_t(3 * n * n + 2 * n + 1)),
        rows(size_t(n)),
        back(size_t(n)) {
    if (order) {
      const Tensor dense = torch::stable::contiguous(*order);
      const int64_t* p = static_cast<const int64_t*>(dense.const_data_ptr());
      permutation.assign(p, p + n);
      for (const int64_t row : permutation)
        STD_TORCH_CHECK(row >= 0 && row < n, "invertible_linear: permutation has an entry beyond the channels");
    }
    double* p = storage.data();
    f = {p, p + n * n, p + 2 * n * n, rows.data(), p + 3 * n * n, &log_abs, p + 3 * n * n + n};
    formula::factorise(formula::Alone(), n, weight.data(), packed ? permutation.data() : nullptr, or_null(this->sign),
                       or_null(this->log_scale), f);
    for (int64_t i = 0; i < n; ++i) back[size_t(rows[size_t(i)])] = i;
  }
};

// A = W diag(e^s), transposed when asked, and b = W t after it.
template <class C> std::vector<C> folded(const Map& m, bool transposed) {
  const int64_t n = m.n;
  std::vector<C> a(size_t(n * n + n));
  for (int64_t i = 0; i < n; ++i) {
    double bias = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double w = m.f.matrix[i * n + j];
      a[size_t(transposed ? j * n + i : i * n + j)] = C(w * m.f.scale[j]);
      if (!m.shift.empty()) bias += w * m.shift[size_t(j)];
    }
    a[size_t(n * n + i)] = C(bias);
  }
  return a;
}

// A C array of what an index gives.
template <class C, class F> void fill(C* to, int64_t count, F f) {
  for (int64_t i = 0; i < count; ++i) to[i] = C(f(i));
}

// The two triangular systems of the inverse map, or of its transpose.
template <class T, class C> struct Solver {
  std::vector<C> v;
  std::vector<int64_t> identity;
  ChannelSolve<T, C> a{};

  Solver(const Map& m, bool transposed) : v(size_t(2 * m.n * m.n + 5 * m.n)), identity(size_t(m.n)) {
    const int64_t n = m.n;
    C *lower = v.data(), *upper = lower + n * n, *more = upper + n * n;
    const auto turned = [n](const double* p) { return [p, n](int64_t i) { return p[i % n * n + i / n]; }; };
    const auto plain = [](const double* p) { return [p](int64_t i) { return p[i]; }; };
    if (transposed) fill(lower, n * n, turned(m.f.upper)), fill(upper, n * n, turned(m.f.lower));
    else fill(lower, n * n, plain(m.f.lower)), fill(upper, n * n, plain(m.f.upper));
    const auto one = [](int64_t) { return 1.0; };
    const auto reciprocal = [&](int64_t i) { return 1 / m.f.upper[i * n + i]; };
    const auto inverse_scale = [&](int64_t i) { return 1 / m.f.scale[i]; };
    if (transposed) fill(more, n, reciprocal), fill(more + n, n, one);
    else fill(more, n, one), fill(more + n, n, reciprocal);
    fill(more + 2 * n, n, inverse_scale);
    fill(more + 3 * n, n, [&](int64_t i) { return m.shift.empty() ? 0.0 : -m.shift[size_t(i)] / m.f.scale[i]; });
    fill(identity.data(), n, [](int64_t i) { return i; });
    a.lower = lower, a.upper = upper, a.lower_reciprocal = more, a.upper_reciprocal = more + n;
    a.from = transposed ? identity.data() : m.back.data();
    a.to = transposed ? m.back.data() : identity.data();
    const bool scaled = !m.log_scale.empty() || !m.shift.empty();
    if (scaled && transposed) a.in_scale = more + 2 * n;
    if (scaled && !transposed) a.out_scale = more + 2 * n, a.out_shift = more + 3 * n;
  }
};

// Call f(begin, end, scratch) on shares of the chunks.
template <class C, class F> void each_chunk(const InvertibleLinearSizes& n, F f) {
  const int64_t chunks = invertible_linear_chunks(n);
  torch::stable::parallel_for(0, chunks, 1 + (grain - 1) / (invertible_linear_chunk(n) * n.channels),
                              [&](int64_t begin, int64_t end) {
                                const std::unique_ptr<C[]> scratch(new C[size_t(invertible_linear_scratch(n))]);
                                f(begin, end, scratch.get());
                              });
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> log_scale,
                                           std::optional<Tensor> shift, std::optional<Tensor> permutation,
                                           std::optional<Tensor> sign, int64_t head, bool inverse, int64_t event_dim) {
  const InvertibleLinearCall call(x, weight, log_scale, shift, permutation, sign, inverse ? -head : head, event_dim);
  const InvertibleLinearSizes& n = call.sizes();
  const Map map(n.channels, weight, log_scale, shift, permutation, sign);
  const Input in(x, call.batch_dims(), call.dims());
  Output y(x, call.batch_dims(), call.dims());
  Tensor logdet = call.new_logdet(), part = call.new_part();
  with_dtype(x.scalar_type(), "invertible_linear", [&]<class T, class A>() {
    using C = ComputeType<T>;
    A* to = static_cast<A*>(logdet.mutable_data_ptr());
    const A logdet_of_each = A((inverse ? -map.log_abs : map.log_abs) * double(call.positions()));
    for (int64_t i = 0; i < call.batch(); ++i) to[i] = logdet_of_each;
    if (!x.numel()) return;
    if (inverse) {
      Solver<T, C> solver(map, false);
      solver.a.n = n, solver.a.x = call.image<T>(in), solver.a.y = call.image<T>(y);
      each_chunk<C>(n, [&](int64_t begin, int64_t end, C* scratch) {
        PYFLOWGEN_CALL(channel_solve, solver.a, begin, end, scratch);
      });
      return;
    }
    const std::vector<C> a = folded<C>(map, false);
    ChannelProduct<T, C> product{
        n, a.data(), a.data() + n.channels * n.channels, call.image<T>(in), call.image<T>(y), head, {}};
    if (head) product.part = call.image<T>(part);
    each_chunk<C>(n, [&](int64_t begin, int64_t end, C* scratch) {
      PYFLOWGEN_CALL(channel_product, product, begin, end, scratch);
    });
  });
  return {y.finish(), logdet, part};
}

// The sum of all elements, in order.
double total(const std::optional<Tensor>& t) {
  double sum = 0;
  for (const double v : doubles(t)) sum += v;
  return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> dy, std::optional<Tensor> dlogdet,
                                                    std::optional<Tensor> dpart, Tensor x, Tensor weight,
                                                    std::optional<Tensor> log_scale, std::optional<Tensor> shift,
                                                    std::optional<Tensor> permutation, std::optional<Tensor> sign,
                                                    bool inverse, int64_t event_dim) {
  const int64_t head = dpart && dpart->dim() == x.dim() ? dpart->size(x.dim() - event_dim) : 0;
  const InvertibleLinearCall call(x, weight, log_scale, shift, permutation, sign, inverse ? -head : head, event_dim);
  call.check_gradients(dy, dlogdet, dpart);
  const InvertibleLinearSizes& n = call.sizes();
  const int64_t c = n.channels;
  const Map map(c, weight, log_scale, shift, permutation, sign);
  if (!dy) {
    Tensor zeros = torch::stable::empty_like(x);
    dy = torch::stable::zero_(zeros);
  }
  Output dx(x, call.batch_dims(), call.dims());
  std::vector<double> sums(size_t(c * c + c)), work(size_t(2 * c * c)), gradients(size_t(c * c + 2 * c));
  with_dtype(x.scalar_type(), "invertible_linear_backward", [&]<class T, class A>() {
    using C = ComputeType<T>;
    const Image<T> dx_image = call.image<T>(dx);
    const Input in(x, call.batch_dims(), call.dims());
    const Input gradient(*dy, call.batch_dims(), call.dims());
    ChannelBackward<T, C> a{n, nullptr, call.image<T>(gradient), call.image<T>(in), {}, 0, {}};
    std::vector<C> matrix;
    std::optional<Input> more;
    if (inverse) {
      Solver<T, C> solver(map, true);
      solver.a.n = n, solver.a.x = a.dy, solver.a.y = dx_image;
      each_chunk<C>(n, [&](int64_t begin, int64_t end, C* scratch) {
        PYFLOWGEN_CALL(channel_solve, solver.a, begin, end, scratch);
      });
    } else {
      matrix = folded<C>(map, true);
      a.transposed = matrix.data(), a.dx = dx_image;
      if (head) {
        more.emplace(*dpart, call.batch_dims(), call.dims());
        a.head = head, a.dpart = call.image<T>(*more);
      }
    }
    if (x.numel()) {  // the sums of a segment's chunks in order, then the segments' in order
      const int64_t chunks = invertible_linear_chunks(n), size = int64_t(sums.size());
      const int64_t segments = std::min(chunks, most_segments);
      std::vector<double> partial(size_t(segments * size));
      const int64_t share = invertible_linear_chunk(n) * c * chunks / segments;
      torch::stable::parallel_for(0, segments, 1 + (grain - 1) / share, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<C[]> scratch(new C[size_t(invertible_linear_scratch(n))]);
        for (int64_t s = begin; s < end; ++s) {
          double* to = partial.data() + s * size;
          PYFLOWGEN_CALL(channel_backward, a, chunks * s / segments, chunks * (s + 1) / segments, scratch.get(), to,
                         to + c * c);
        }
      });
      for (int64_t s = 0; s < segments; ++s)
        for (int64_t i = 0; i < size; ++i) sums[size_t(i)] += partial[size_t(s * size + i)];
    }
  });
  const double dlog = (inverse ? -1 : 1) * total(dlogdet) * double(call.positions());
  double* g = gradients.data();
  formula::linear_parameters_backward(formula::Alone(), c, map.f, map.packed, inverse, or_null(map.shift), sums.data(),
                                      sums.data() + c * c, dlog, work.data(), g, g + c * c, g + c * c + c);
  const auto narrowed = [&](const double* from, std::initializer_list<int64_t> sizes) {
    Tensor result = call.empty(sizes);
    with_dtype(x.scalar_type(), "invertible_linear_backward", [&]<class T, class A>() {
      if constexpr (std::is_floating_point_v<T>) {
        fill(static_cast<T*>(result.mutable_data_ptr()), result.numel(), [&](int64_t i) { return from[i]; });
      } else {
        Tensor wide = torch::stable::new_empty(x, sizes, ScalarType::Double);
        fill(static_cast<double*>(wide.mutable_data_ptr()), wide.numel(), [&](int64_t i) { return from[i]; });
        torch::stable::copy_(result, wide);
      }
    });
    return result;
  };
  const Tensor dweight = narrowed(g, {c, c});
  return {dx.finish(), dweight, log_scale ? narrowed(g + c * c, {c}) : call.empty({0}),
          shift ? narrowed(g + c * c + c, {c}) : call.empty({0})};
}

}  // namespace
}  // namespace pyflowgen

STABLE_TORCH_LIBRARY_IMPL(pyflowgen, CPU, m) {
  m.impl("invertible_linear", TORCH_BOX(&pyflowgen::forward));
  m.impl("invertible_linear_backward", TORCH_BOX(&pyflowgen::backward));
}
