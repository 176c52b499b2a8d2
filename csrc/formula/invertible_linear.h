// Algebra of one channels x channels matrix: what an invertible linear map needs before and after its pass over the
// data. All in double: the matrices are tiny, and a log-determinant is a long sum.
//
// y = W (e^s * x + t), W dense, or P L U from LAPACK's packed form: the strictly lower triangle is L (unit diagonal),
// the strictly upper one U, the diagonal log|u_ii|, with the signs and the row order aside. Row i of W is row rows[i]
// of L U, for a dense W as well, which is factorised with partial pivoting (Golub and Van Loan, algorithm 3.4.1).
//
// The work is shared out over a team, each member doing rows rank, rank + size, ...: one thread, or a CUDA block.
// Matrices are row-major, n x n. Innermost loops run along rows, which a compiler turns into vectors.
#pragma once

#include "formula/elementary.h"

namespace pyflowgen::PYFLOWGEN_ISA::formula {

// The team of one.
struct Alone {
  static constexpr int rank = 0, size = 1;
  PYFLOWGEN_FORMULA void sync() const {}
};

// What the kernels use of a map; every array has n or n*n elements.
struct LinearFactors {
  double* matrix;   // W
  double* lower;    // L, ones on its diagonal and zeros above it
  double* upper;    // U, zeros below its diagonal
  int64_t* rows;    // row i of W is row rows[i] of L U
  double* scale;    // e^s
  double* log_abs;  // log|det W| + sum s, one number
  double* column;   // n + 1 numbers for the factorisation
};

PYFLOWGEN_FORMULA void add_row(int64_t first, int64_t last, double factor, const double* from, double* to) {
  for (int64_t j = first; j < last; ++j) to[j] += factor * from[j];
}

// factors of `weight` (packed L U where `permutation` is given, else dense); log_scale null: s = 0.
template <class Team> PYFLOWGEN_FORMULA void factorise(Team team, int64_t n, const double* weight,
                                                       const int64_t* permutation, const double* sign,
                                                       const double* log_scale, const LinearFactors& f) {
  const int64_t rank = team.rank, step = team.size;
  for (int64_t i = rank; i < n; i += step) {
    f.scale[i] = log_scale ? exp(log_scale[i]) : 1.0;
    f.rows[i] = permutation ? permutation[i] : i;
    for (int64_t j = 0; j < n; ++j) {
      const double w = weight[i * n + j];
      f.lower[i * n + j] = j < i && permutation ? w : j == i ? 1.0 : 0.0;
      f.upper[i * n + j] = !permutation || j > i ? w : j == i ? sign[i] * exp(w) : 0.0;
      f.matrix[i * n + j] = permutation ? 0.0 : w;
    }
  }
  team.sync();
  if (permutation) {
    for (int64_t i = rank; i < n; i += step) {
      const int64_t r = f.rows[i];
      for (int64_t k = 0; k <= r; ++k) add_row(k, n, f.lower[r * n + k], f.upper + k * n, f.matrix + i * n);
    }
  } else {  // here rows[k] is the row of W that comes k-th, turned round at the end
    for (int64_t k = 0; k < n; ++k) {
      if (rank == 0) {
        int64_t pivot = k;
        for (int64_t i = k + 1; i < n; ++i)
          if (abs(f.upper[i * n + k]) > abs(f.upper[pivot * n + k])) pivot = i;
        if (pivot != k) {
          for (int64_t j = 0; j < n; ++j) {
            const double u = f.upper[k * n + j], l = f.lower[k * n + j];
            f.upper[k * n + j] = f.upper[pivot * n + j], f.upper[pivot * n + j] = u;
            if (j < k) f.lower[k * n + j] = f.lower[pivot * n + j], f.lower[pivot * n + j] = l;
          }
          const int64_t r = f.rows[k];
          f.rows[k] = f.rows[pivot], f.rows[pivot] = r;
        }
      }
      team.sync();
      const double pivot = f.upper[k * n + k],
                   inverse = pivot == 0 ? 0 : 1 / pivot;  // 0: singular, its logarithm says so
      for (int64_t i = k + 1 + rank; i < n; i += step) {
        const double l = f.upper[i * n + k] * inverse;
        f.lower[i * n + k] = l;
        f.upper[i * n + k] = 0;
        add_row(k + 1, n, -l, f.upper + k * n, f.upper + i * n);
      }
      team.sync();
    }
    for (int64_t k = rank; k < n; k += step) f.column[k] = double(f.rows[k]);
    team.sync();
    for (int64_t k = rank; k < n; k += step) f.rows[int64_t(f.column[k])] = k;
    team.sync();
  }
  if (rank == 0) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i)
      total += (permutation ? weight[i * n + i] : log(abs(f.upper[i * n + i]))) + (log_scale ? log_scale[i] : 0.0);
    *f.log_abs = total;
  }
  team.sync();
}

// A^-T M for A = W diag(e^s) and M of n rows of m numbers, negated; in its place.
template <class Team> PYFLOWGEN_FORMULA void solve_transposed(Team team, int64_t n, int64_t m, const LinearFactors& f,
                                                              double* matrix, double* work) {
  for (int64_t j = team.rank; j < m; j += team.size) {  // a column is one member's
    for (int64_t i = 0; i < n; ++i) {
      double v = -matrix[i * m + j] / f.scale[i];
      for (int64_t k = 0; k < i; ++k) v -= f.upper[k * n + i] * work[k * m + j];
      work[i * m + j] = v / f.upper[i * n + i];
    }
    for (int64_t i = n - 1; i >= 0; --i)
      for (int64_t k = i + 1; k < n; ++k) work[i * m + j] -= f.lower[k * n + i] * work[k * m + j];
    for (int64_t i = 0; i < n; ++i) matrix[i * m + j] = work[f.rows[i] * m + j];
  }
  team.sync();
}

// Gradients of weight, log_scale and shift. Forward: from dmatrix = sum of dy x^T and dbias = sum of dy over pixels,
// the gradients of A = W diag(e^s) and b = W t. Inverse: the same sums with the gradient of what it returned, x, for
// dy; they are overwritten. dlog: the gradient of log|det W| + sum s. work: 2 n*n numbers.
template <class Team> PYFLOWGEN_FORMULA void linear_parameters_backward(Team team, int64_t n, const LinearFactors& f,
                                                                        bool packed, bool inverse, const double* shift,
                                                                        double* dmatrix, double* dbias, double dlog,
                                                                        double* work, double* dweight,
                                                                        double* dlog_scale, double* dshift) {
  const int64_t rank = team.rank, step = team.size;
  double *dlu = work, *transposed = work + n * n;
  for (int64_t j = rank; j < n; j += step) {
    // The parameters' own sums where there are such: by way of W they would lose what W's condition costs.
    double by_scale = inverse ? -dmatrix[j * n + j] : 0, by_shift = inverse ? -dbias[j] / f.scale[j] : 0;
    for (int64_t i = 0; i < n && !inverse; ++i) {
      by_scale += f.scale[j] * f.matrix[i * n + j] * dmatrix[i * n + j];
      by_shift += f.matrix[i * n + j] * dbias[i];
    }
    if (dlog_scale) dlog_scale[j] = by_scale + dlog;
    if (dshift) dshift[j] = by_shift;
  }
  team.sync();
  if (inverse) {
    solve_transposed(team, n, n, f, dmatrix, work);
    solve_transposed(team, n, 1, f, dbias, work);
  }
  for (int64_t i = rank; i < n; i += step)
    for (int64_t j = 0; j < n; ++j) {
      const double d = dmatrix[i * n + j] * f.scale[j] + (shift ? dbias[i] * shift[j] : 0.0);
      dlu[(packed ? f.rows[i] : i) * n + j] = d;
      transposed[i * n + j] = packed ? f.upper[j * n + i] : i == j ? 1.0 : 0.0;
    }
  team.sync();
  if (packed) {
    for (int64_t i = rank; i < n; i += step) {
      double* row = dweight + i * n;
      for (int64_t j = 0; j < n; ++j) row[j] = 0;
      for (int64_t k = 0; k < n; ++k) add_row(0, k < i ? k + 1 : i, dlu[i * n + k], transposed + k * n, row);
      for (int64_t k = i; k < n; ++k) add_row(i, n, f.lower[k * n + i], dlu + k * n, row);
      row[i] = row[i] * f.upper[i * n + i] + dlog;
    }
  } else {  // dW + dlog W^-T: row j of W^-T is column j of the inverse, solved for by member j alone
    for (int64_t j = rank; j < n; j += step) {
      double* column = transposed + j * n;  // its unit vector, in the order of L U's rows
      for (int64_t i = 0; i < n; ++i) column[i] = f.rows[j] == i ? 1.0 : 0.0;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < i; ++k) column[i] -= f.lower[i * n + k] * column[k];
      for (int64_t i = n - 1; i >= 0; --i) {
        for (int64_t k = i + 1; k < n; ++k) column[i] -= f.upper[i * n + k] * column[k];
        column[i] /= f.upper[i * n + i];
      }
      for (int64_t i = 0; i < n; ++i) dweight[j * n + i] = dlu[j * n + i] + dlog * column[i];
    }
  }
  team.sync();
}

}  // namespace pyflowgen::PYFLOWGEN_ISA::formula
