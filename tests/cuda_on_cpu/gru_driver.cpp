// The launchers of csrc/cuda/gru.cu under the sanitizers.
#include "gru.h"
#include "recurrence_driver.h"

namespace {

struct Op {
  using Cell = Gru;
  static Made forward(const double* x, const double* h, double before, double) {
    const double r = sigmoid(x[0] + h[0]), z = sigmoid(x[1] + h[1]), n = std::tanh(x[2] + r * h[2]);
    return {{r, z, n, 0}, h[2], (1 - z) * n + z * before, 0};
  }
  static Back backward(const Made& m, double before, double, double dh, double) {
    const double r = m.gate[0], z = m.gate[1], n = m.gate[2], dn = dh * (1 - z) * (1 - n * n);
    const double dr = dn * m.extra * r * (1 - r), dz = dh * (before - n) * z * (1 - z);
    return {{dr, dz, dn, 0}, {dr, dz, dn * r, 0}, dh * z, 0};
  }
};

}  // namespace

int main(int argc, char**) { return run<Op>(argc == 1); }
