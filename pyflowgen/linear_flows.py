"""Linear flows whose log-determinant is known without a factorisation: Householder products, matrix exponentials.

Plain PyTorch: one or two matrix products over the data carry all the time, and a kernel would gain nothing on torch's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyflowgen.bijection import Bijection, batch_shape, logdet_dtype


def _check_features(owner: object, x: Tensor, features: int, event_dim: int) -> torch.Size:
    """The batch's shape; a ValueError when x has not `features` on dimension `-event_dim`."""
    batch = batch_shape(x, event_dim, owner)
    if x.shape[-event_dim] != features:
        raise ValueError(
            f"{type(owner).__name__}: x has shape {tuple(x.shape)}, expected {features} on dimension {-event_dim}"
        )
    return batch


class Householder(Bijection):
    r"""Product of Householder reflections, an orthogonal map; its log-determinant is 0.

    .. math:: y = H_K \cdots H_1 x, \qquad H_k = I - 2\,\frac{v_k v_k^\top}{\lVert v_k \rVert^2}

    `features` reflections reach every orthogonal matrix of determinant :math:`(-1)^{features}`. The matrix is never
    formed: :math:`H_1 \cdots H_K = I - V T V^\top` with T upper triangular (the UT transform), so that a batch costs
    two products of rank K and one triangular solve of size K, whatever K.

    Args:
        features: size D of x's last dimension.
        reflections: their number K, by default `features`.

    The vectors start as normal noise: a random rotation or reflection.

    Errors: ValueError for sizes below 1 and for x of another size.

    Reference: Tomczak and Welling, *Improving Variational Auto-Encoders using Householder Flow*, 2016; Joffrain et al.,
    *Accumulating Householder transformations, revisited*, 2006.

    >>> import torch, pyflowgen
    >>> layer = pyflowgen.Householder(4, 3)
    >>> x = torch.randn(5, 4)
    >>> y, logdet = layer(x)
    >>> torch.allclose(y.norm(dim=-1), x.norm(dim=-1)), torch.allclose(layer.inverse(y)[0], x, atol=1e-5), logdet
    (True, True, tensor([0., 0., 0., 0., 0.]))
    """

    volume_preserving = True

    def __init__(self, features: int, reflections: int | None = None) -> None:
        super().__init__()
        reflections = features if reflections is None else reflections
        if features < 1 or reflections < 1:
            raise ValueError(f"Householder: features={features}, reflections={reflections}, expected at least 1 each")
        self.vectors = nn.Parameter(torch.randn(reflections, features))

    def _reflect(self, x: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        batch = _check_features(self, x, self.vectors.shape[1], 1)
        dtype = logdet_dtype(x.dtype)
        v = self.vectors.to(dtype)
        gram = v @ v.mT
        inverse_t = gram.triu(1) + torch.diag_embed(gram.diagonal() / 2)
        # T V^T for H_1 ... H_K, T^T V^T for its transpose.
        factor = torch.linalg.solve_triangular(inverse_t.mT if transposed else inverse_t, v, upper=not transposed)
        wide = x.to(dtype)
        y = wide - (wide @ v.mT) @ factor
        return y.to(x.dtype), torch.zeros((), dtype=dtype, device=x.device).expand(batch)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._reflect(x, False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._reflect(y, True)

    def matrix(self) -> Tensor:
        """The orthogonal matrix Q of :math:`y = Q x`."""
        return self.forward(torch.eye(self.vectors.shape[1]).to(self.vectors))[0].mT

    def extra_repr(self) -> str:
        return f"{self.vectors.shape[1]}, reflections={self.vectors.shape[0]}"


class MatrixExponential(Bijection):
    r"""Linear map by a matrix exponential, invertible for every weight; on images the same at every pixel.

    .. math:: y = e^{A} x, \qquad \log|\det| = H W \operatorname{tr} A, \qquad x = e^{-A} y

    with :math:`H W = 1` for vectors. `skew=True` takes :math:`A - A^\top` for A: a rotation, with log-determinant 0.

    Args:
        features: size C of the dimension that is mapped.
        event_dim: 1 for vectors `(..., C)`, 3 for images `(..., C, H, W)`: the map is on dimension `-event_dim`.
        skew: rotations only.

    A starts near 0, the map near the identity.

    Errors: ValueError for sizes below 1 and for x of another size.

    Reference: Hoogeboom et al., *The Convolution Exponential and Generalized Sylvester Flows*, 2020; Xiao and Liu,
    *Generative Flows with Matrix Exponential*, 2020.

    >>> import torch, pyflowgen
    >>> layer = pyflowgen.MatrixExponential(3, event_dim=3)
    >>> x = torch.randn(2, 3, 4, 4)
    >>> y, logdet = layer(x)
    >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-5)
    True
    >>> torch.allclose(logdet, 16 * layer.weight.trace().expand(2))
    True
    """

    def __init__(self, features: int, *, event_dim: int = 1, skew: bool = False) -> None:
        super().__init__()
        if features < 1 or event_dim < 1:
            raise ValueError(f"MatrixExponential: features={features}, event_dim={event_dim}, expected at least 1 each")
        self.features, self.event_dim, self.skew = features, event_dim, skew
        self.weight = nn.Parameter(torch.randn(features, features) * 0.1 / math.sqrt(features))

    def _apply_exponential(self, x: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        batch = _check_features(self, x, self.features, self.event_dim)
        dtype = logdet_dtype(x.dtype)
        a = self.weight.to(dtype)
        if self.skew:
            a = a - a.mT
        matrix = torch.linalg.matrix_exp(sign * a)
        wide = x.to(dtype)
        y = wide @ matrix.mT if self.event_dim == 1 else (matrix @ wide.flatten(len(batch) + 1)).reshape(x.shape)
        pixels = math.prod(x.shape[len(batch) + 1 :])
        logdet = a.new_zeros(()) if self.skew else sign * pixels * a.trace()
        return y.to(x.dtype), logdet.expand(batch)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_exponential(x, 1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_exponential(y, -1)

    def extra_repr(self) -> str:
        return f"{self.features}, event_dim={self.event_dim}, skew={self.skew}"
