"""exp, log, tanh, softplus, atan, the normal distribution for float32 and float64 blocks.

The polynomials and edges of ``csrc/formula/elementary.h``, which see. Triton's own ``tl.exp`` and ``tl.log`` are the
GPU's approximate instructions in float32 (an error that grows with the argument) and its libdevice does not run in the
interpreter; these functions are bound by memory in every kernel here and have the same error everywhere.
Flush-to-zero is not used. NaN gives NaN.
"""

import triton
import triton.language as tl


@triton.jit
def horner(x, C: tl.constexpr):
    """C[0] + C[1] x + C[2] x^2 + ..."""
    y = x * C[len(C) - 1] + C[len(C) - 2]
    for i in tl.static_range(3, len(C) + 1):
        y = y * x + C[len(C) - i]
    return y


@triton.jit
def divide(a, b):
    """a / b, correctly rounded."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def reciprocal(a):
    """1 / a, correctly rounded."""
    if a.dtype == tl.float64:
        return 1.0 / a
    else:
        return tl.div_rn(1.0, a)


@triton.jit
def at_most(x, bound):
    return tl.where(x > bound, bound, x)


@triton.jit
def at_least(x, bound):
    return tl.where(x < bound, bound, x)


@triton.jit
def _reduce_exp(x, BIAS: tl.constexpr):
    # x = n ln2 + r; n + bias in the low bits of the integer.
    if x.dtype == tl.float64:
        t = x * 1.44269504088896340736 + (6755399441055744.0 + BIAS)
        n = t - (6755399441055744.0 + BIAS)
        r = x - n * 6.93147180369123816490e-01
        return r - n * 1.90821492927058770002e-10, t.to(tl.int64, bitcast=True)
    else:
        t = x * 1.44269504088896340736 + (12582912.0 + BIAS)
        n = t - (12582912.0 + BIAS)
        r = x - n * 0.693359375
        return r - n * -2.12194440054690583e-4, t.to(tl.int32, bitcast=True)


@triton.jit
def _exp_tail(r):
    # (e^r - 1 - r) / r^2
    if r.dtype == tl.float64:
        return horner(
            r,
            (0.5, 0.16666666666666677, 0.041666666666666685, 0.008333333333322012, 0.0013888888888898918,
             0.00019841269883615157, 2.4801587217117757e-05, 2.7557247696584196e-06, 2.755742937841793e-07,
             2.510764536869655e-08, 2.0850552810955047e-09),
        )  # fmt: skip
    else:
        return horner(
            r,
            (
                0.4999999701976776,
                0.16666539013385773,
                0.041667744517326355,
                0.008367069996893406,
                0.0013839034363427634,
            ),
        )


@triton.jit
def exp(x):
    # 2^n in two factors, each a normal number: the first product is exact, the second rounds once, also to a denormal.
    if x.dtype == tl.float64:
        r, biased = _reduce_exp(at_most(at_least(x, -746.0), 710.0), 2046)
        y = r * (r * _exp_tail(r) + 1) + 1
        half = biased >> 1
        return y * (half << 52).to(tl.float64, bitcast=True) * ((biased - half) << 52).to(tl.float64, bitcast=True)
    else:
        r, biased = _reduce_exp(at_most(at_least(x, -104.0), 89.0), 254)
        y = r * (r * _exp_tail(r) + 1) + 1
        half = biased >> 1
        return y * (half << 23).to(tl.float32, bitcast=True) * ((biased - half) << 23).to(tl.float32, bitcast=True)


@triton.jit
def expm1(x):
    """e^x - 1 for x of 0 or less, without cancellation near 0."""
    if x.dtype == tl.float64:
        r, biased = _reduce_exp(at_least(x, -40.0), 1023)
        scale = (biased << 52).to(tl.float64, bitcast=True)
    else:
        r, biased = _reduce_exp(at_least(x, -20.0), 127)
        scale = (biased << 23).to(tl.float32, bitcast=True)
    return (r * r * _exp_tail(r) + r) * scale + (scale - 1)


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    return divide(tl.where(x < 0, e, 1.0), 1.0 + e)


@triton.jit
def with_sign_of(x, magnitude):
    """magnitude, whose sign bit is clear, with x's sign."""
    if x.dtype == tl.float64:
        sign = x.to(tl.int64, bitcast=True) & -9223372036854775808
        return (magnitude.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    else:
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    """(e^2|x| - 1) / (e^2|x| + 1) with x's sign; the numerator without cancellation near 0."""
    if x.dtype == tl.float64:
        r, biased = _reduce_exp(2 * at_most(tl.abs(x), 20.0), 1023)
        scale = (biased << 52).to(tl.float64, bitcast=True)
    else:
        r, biased = _reduce_exp(2 * at_most(tl.abs(x), 10.0), 127)
        scale = (biased << 23).to(tl.float32, bitcast=True)
    e = (r * r * _exp_tail(r) + r) * scale + (scale - 1)
    return with_sign_of(x, divide(e, e + 2))


@triton.jit
def _log_tail(f):
    # log(1 + f) - f for 1 + f in [3/4, 3/2]
    if f.dtype == tl.float64:
        s = f / (f + 2)
        z = s * s
        half_square = 0.5 * f * f
        p = horner(
            z,
            (0.6666666666667271, 0.399999999961601, 0.28571429395578946, 0.22222138477437978, 0.18186357075335013,
             0.15250168144349407, 0.15368351990329443),
        )  # fmt: skip
        return s * (half_square + z * p) - half_square
    else:
        return f * f * horner(
            f,
            (-0.5, 0.33333447575569153, -0.2500009536743164, 0.19990922510623932, -0.16647391021251678,
             0.14477752149105072, -0.13159875571727753, 0.10463769733905792, -0.045096393674612045),
        )  # fmt: skip


@triton.jit
def log_normal(x):
    """log x for x normal and positive, inf or NaN."""
    # x = 2^n (1 + f), 1 + f in [3/4, 3/2)
    if x.dtype == tl.float64:
        ratio = x.to(tl.int64, bitcast=True) + 0x0008000000000000
        n = ((ratio >> 52) - 1023).to(tl.float64)
        f = ((ratio & 0x000FFFFFFFFFFFFF) + 0x3FE8000000000000).to(tl.float64, bitcast=True) - 1
        y = n * 6.93147180369123816490e-01 + (f + (n * 1.90821492927058770002e-10 + _log_tail(f)))
    else:
        ratio = x.to(tl.int32, bitcast=True) + 0x00400000
        n = ((ratio >> 23) - 127).to(tl.float32)
        f = ((ratio & 0x007FFFFF) + 0x3F400000).to(tl.float32, bitcast=True) - 1
        y = n * 0.693359375 + (f + (n * -2.12194440054690583e-4 + _log_tail(f)))
    return tl.where(x < float("inf"), y, x)


@triton.jit
def log(x):
    """log x for x of 0 or more, denormal too, inf or NaN."""
    if x.dtype == tl.float64:
        small = x < 2.2250738585072014e-308
        y = log_normal(tl.where(small, x * 18014398509481984.0, x)) - tl.where(small, 37.42994775023705, 0.0)  # 2^54
    else:
        small = x < 1.1754943508222875e-38
        y = log_normal(tl.where(small, x * 16777216.0, x)) - tl.where(small, 16.635532333438686, 0.0)  # 2^24
    return tl.where(x == 0, float("-inf"), y)


@triton.jit
def square_root(x):
    """The square root, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1] or NaN."""
    if e.dtype == tl.float64:
        above = e > 0.5
        f = tl.where(above, 0.5 * e - 0.5, e)
        y = f + _log_tail(f)
        return tl.where(above, y + 0.693147180559945309417, y)
    else:
        p = horner(
            e,
            (-0.4999993145465851, 0.33330464363098145, -0.24958018958568573, 0.19692102074623108,
             -0.15344879031181335, 0.10661124438047409, -0.05745718255639076, 0.02008621022105217,
             -0.003290459979325533),
        )  # fmt: skip
        return e * e * p + e


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|)."""
    return at_least(x, 0.0) + log1p_unit(exp(-tl.abs(x)))


@triton.jit
def atan(x):
    """pi/2 - atan(1/|x|) beyond 1; else an odd polynomial; x's sign."""
    a = tl.abs(x)
    t = divide(at_most(a, 1.0), at_least(a, 1.0))
    z = t * t
    if x.dtype == tl.float64:
        tail = horner(
            z,
            (-0.33333333333333287, 0.19999999999990617, -0.14285714285041567, 0.11111111086445612,
             -0.09090908544605013, 0.07692299649203944, -0.06666582934882985, 0.05881709647017643,
             -0.05259395607298644, 0.047447600245212045, -0.04285841542922808, 0.03819603544541225,
             -0.03275755126279729, 0.02610846960539452, -0.01856221008730898, 0.011269570222760575,
             -0.00557888682875254, 0.002134582632919223, -0.0005869600471975236, 0.00010260010023232579,
             -8.527974161421435e-06),
        )  # fmt: skip
    else:
        tail = horner(
            z,
            (-0.33333298563957214, 0.1999852955341339, -0.14264015853405, 0.10950878262519836, -0.0839928537607193,
             0.05788065120577812, -0.03109574317932129, 0.010867682285606861, -0.00178250833414495),
        )  # fmt: skip
    y = t * z * tail + t
    return with_sign_of(x, tl.where(a > 1, 1.57079632679489661923 - y, y))


@triton.jit
def normal(x):
    """The standard normal distribution's Phi(x), and e^(-x^2/2)."""
    # a's upper half squared is exact: what rounding a^2/2 leaves out is known
    if x.dtype == tl.float64:
        a = at_most(tl.abs(x), 39.0)
        upper = (a.to(tl.int64, bitcast=True) & -134217728).to(tl.float64, bitcast=True)
        q = (a - 6.0) / (a + 6.0)
        p = horner(
            q,
            (0.45345520027112796, -0.0850253623057707, 0.03981142456242683, -0.00437338677959595, -0.016141517332057008,
             0.022592467062881844, -0.019766479222629245, 0.013246864152152999, -0.007059819394863694,
             0.002935655538050905, -0.0008689948160953325, 0.00011948952374797402, 3.7795429634074946e-05,
             -2.6352856104028564e-05, 4.411274547408162e-06, 1.782446479784095e-06, -9.98212226980031e-07,
             1.671511423192584e-09, 1.31642567384161e-07, -2.181881865158489e-08, -1.5780026161361482e-08,
             3.59170781101061e-09, 1.803838188253382e-09),
        )  # fmt: skip
    else:
        a = at_most(tl.abs(x), 15.0)
        upper = (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        q = divide(a - 4.0, a + 4.0)
        p = horner(
            q,
            (0.472053200006485, -0.09670347720384598, 0.014000090770423412, 0.028600487858057022, -0.03220316395163536,
             0.017932957038283348, -0.00498223165050149, -0.0002684409555513412, 0.0006741099059581757,
             -0.00011438697401899844, -9.486803173786029e-05),
        )  # fmt: skip
    square = 0.5 * upper * upper
    rest = 0.5 * (a - upper) * (a + upper)
    t = square + rest
    e = exp(-t)
    e = e - e * ((square - t) + rest)
    tail = e * divide(p, a + 1.0)
    return tl.where(x < 0, tail, 1.0 - tail), e
