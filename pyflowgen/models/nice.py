"""NICE: additive couplings and one diagonal scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pyflowgen.bijection import CHECKPOINT_EVERY, Bijection, Chain, Memory
from pyflowgen.flow import DiagNormal, Flow, Logistic
from pyflowgen.layers import Scale
from pyflowgen.nets import MLP
from pyflowgen.ops.affine_coupling import AdditiveCoupling

_PRIORS = {"logistic": (Logistic, math.pi / math.sqrt(3)), "normal": (DiagNormal, 1.0)}  # base, standard deviation


class NICE(Flow):
    r"""Non-linear Independent Components Estimation for vectors.

    `couplings` additive couplings :math:`y_b = x_b + m(x_a)`, where a and b are the even and odd dimensions and change
    places from one to the next, then :math:`z = y \odot e^{s}` (`Scale`, set from the first batch), then a factorised
    prior: :math:`\log p(x) = \log p_Z(z) + \sum_i s_i`.

    Args:
        features: number of dimensions, at least 2.
        couplings: number of additive couplings.
        hidden: widths of the hidden layers of each m.
        prior: `"logistic"` as in the paper, or `"normal"`.
        activation: activation of m.
        scale: end with the scaling layer; without it the map preserves volume.
        context_features: size of a context vector given to every m; 0 for none.
        memory, checkpoint_every: what backward keeps of the layers, see `Chain`.

    Defaults are the paper's for MNIST (five hidden layers of 1000). Data are floats; dequantise pixels to [0, 1] first.

    Reference: Dinh, Krueger and Bengio, *NICE: Non-linear Independent Components Estimation*, 2014.

    >>> import torch
    >>> from pyflowgen.models.nice import NICE
    >>> model = NICE(4, hidden=(16,))
    >>> model.log_prob(torch.rand(10, 4)).shape, model.sample(3).shape
    (torch.Size([10]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        features: int,
        *,
        couplings: int = 4,
        hidden: Sequence[int] = (1000,) * 5,
        prior: Literal["logistic", "normal"] = "logistic",
        activation: str = "relu",
        scale: bool = True,
        context_features: int = 0,
        memory: Memory = "store",
        checkpoint_every: int | None = CHECKPOINT_EVERY,
    ) -> None:
        if features < 2 or couplings < 1:
            raise ValueError(f"NICE: features={features}, couplings={couplings}, expected at least 2 and 1")
        if prior not in _PRIORS:
            raise ValueError(f"NICE: prior is {prior!r}, expected 'logistic' or 'normal'")
        base, std = _PRIORS[prior]
        layers: list[Bijection] = []
        for i in range(couplings):
            odd = features // 2
            n_in, n_out = (odd, features - odd) if i % 2 else (features - odd, odd)
            net = MLP(n_in, hidden, n_out, activation, context_features=context_features)
            layers.append(AdditiveCoupling(net, mask="interleaved", swap=bool(i % 2)))
        if scale:
            layers.append(Scale(features, std=std))
        super().__init__(base(features), Chain(*layers, memory=memory, checkpoint_every=checkpoint_every))
        self.config: dict[str, Any] = dict(
            features=features,
            couplings=couplings,
            hidden=list(hidden),
            prior=prior,
            activation=activation,
            scale=scale,
            context_features=context_features,
            memory=memory,
            checkpoint_every=checkpoint_every,
        )
