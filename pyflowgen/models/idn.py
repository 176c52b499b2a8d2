"""Information Discrimination Network: early embedding, the unit over a window, and a classifier of its last state."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen.models.detector import Detector, State, frame_loss
from pyflowgen.ops.idu import IDU, Gate, Reset, Update
from pyflowgen.ops.linear import Linear


class IDN(Detector):
    r"""Information Discrimination Network; see :func:`pyflowgen.idu` for the recurrence.

    .. math::
        e_t = \mathrm{relu}(W_e x_t + b_e), \quad h = \mathrm{IDU}(e_{t-T+1}, \dots, e_t), \quad
        s_t = W_2\,\mathrm{relu}(W_1 h + b_1) + b_2

    Trained on windows by :math:`\ell(s_0, y_0) + \ell(W_p e_t + b_p, y_t) + \alpha c_t` averaged over the window, with
    the contrast :math:`c_t = d^2` of :math:`d = \|e_t - e_0\|` where chunk t has the current chunk's labels, and
    :math:`\max(0, 1 - d^2)` where it has others.

    A stream runs its window again at every frame, since the current chunk gates all of it; the chunks' own products
    are kept from frame to frame.

    Args:
        features, classes: sizes of a chunk and of its scores; class 0 is the background.
        hidden: of embedding, unit and classifier.
        window: chunks of a window, of which the last is the current one.
        dropout: on embedding and classifier.
        alpha: weight of the contrast.
        bias, reset, gate, update: see :func:`pyflowgen.idu`; the defaults are the paper's.
        ignored: classes without loss and probability.

    >>> import torch
    >>> from pyflowgen.models import IDN
    >>> IDN(features=12, classes=5, hidden=16)(torch.randn(2, 40, 12)).shape
    torch.Size([2, 40, 5])
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        hidden: int = 512,
        window: int = 16,
        dropout: float = 0.1,
        alpha: float = 0.3,
        bias: bool = False,
        reset: Reset = "before",
        gate: Gate = "sigmoid",
        update: Update = "candidate",
        ignored: tuple[int, ...] | list[int] = (),
    ) -> None:
        super().__init__(features, classes, window, ignored)
        self.config |= {
            "hidden": hidden, "dropout": dropout, "alpha": alpha,
            "bias": bias, "reset": reset, "gate": gate, "update": update,
        }  # fmt: skip
        self.alpha = alpha
        self.embed = nn.Sequential(Linear(features, hidden, activation="relu"), nn.Dropout(dropout))
        self.early = nn.Linear(hidden, classes)
        self.idu = IDU(hidden, hidden, window, bias=bias, reset=reset, gate=gate, update=update)
        # Named as with a layer of its own for the relu.
        self.classifier = nn.Sequential(
            OrderedDict[str, nn.Module]({
                "0": Linear(hidden, hidden, activation="relu"), "2": nn.Dropout(dropout), "3": Linear(hidden, classes)
            })
        )  # fmt: skip

    def init_state(self, batch: int) -> State:
        kept, seen = self.idu.init_cache(batch)
        return {"kept": kept, "seen": seen}

    def run(self, features: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        cache = None if state is None else (state["kept"], state["seen"])
        h, (kept, seen) = self.idu.frames(self.embed(self._standard(features)), cache)
        return self.classifier(h), {"kept": kept, "seen": seen}

    def step(self, frame: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if torch.is_grad_enabled() or frame.dim() != 2:
            return super().step(frame, state)
        e = self.embed(self._standard(frame[:, None]))[:, 0]
        h, (kept, seen) = self.idu.step(e, None if state is None else (state["kept"], state["seen"]))
        return self.classifier(h), {"kept": kept, "seen": seen}

    def pack(self, dtype: torch.dtype | None = None) -> IDN:
        self.idu.pack(dtype)
        return self

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        e = self.embed(self._standard(features))
        kept = (targets > 0).any(-1)
        pairs = kept & kept[:, -1:]
        same = (targets == targets[:, -1:]).all(-1)
        distance = (e - e[:, -1:]).square().sum(-1)
        contrast = torch.where(same, distance, F.relu(1 - distance)) * pairs
        loss = frame_loss(self.classifier(self.idu(e)), targets[:, -1], self.ignored)
        loss = loss + frame_loss(self.early(e), targets, self.ignored)
        return loss + self.alpha * contrast.sum() / pairs.sum().clamp(min=1)
