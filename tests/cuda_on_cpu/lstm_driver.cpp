// The launchers of csrc/cuda/lstm.cu under the sanitizers.
#include "lstm.h"
#include "recurrence_driver.h"

namespace {

struct Op {
  using Cell = Lstm;
  static Made forward(const double* x, const double* h, double, double before) {
    const double i = sigmoid(x[0] + h[0]), f = sigmoid(x[1] + h[1]), g = std::tanh(x[2] + h[2]),
                 o = sigmoid(x[3] + h[3]), c = f * before + i * g;
    return {{i, f, g, o}, c, o * std::tanh(c), c};
  }
  static Back backward(const Made& m, double, double before, double dh, double dc) {
    const auto [i, f, g, o] = m.gate;
    const double tc = std::tanh(m.c), d = dc + dh * o * (1 - tc * tc);
    Back b{{d * g * i * (1 - i), d * before * f * (1 - f), d * i * (1 - g * g), dh * tc * o * (1 - o)}, {}, 0, d * f};
    std::copy(b.x, b.x + 4, b.h);
    return b;
  }
};

}  // namespace

int main(int argc, char**) { return run<Op>(argc == 1); }
