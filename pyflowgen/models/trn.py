"""Temporal Recurrent Network as a detector: its loss, and its stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyflowgen.models.detector import Detector, State, frame_loss
from pyflowgen.ops.trn import TRN as Layer
from pyflowgen.ops.trn import Pool, Start


class TRN(Detector):
    r"""Temporal Recurrent Network; see :func:`pyflowgen.trn` for the equations.

    Trained on :math:`\sum_t \ell(p_t, y_t) + \sum_{t,i} \ell(q_{t,i}, y_{t+i-1+\mathrm{offset}})`, cross-entropies
    averaged. With ``offset=0`` the decoder's first step names the present frame, as the authors' code has it; with 1
    the next one. Targets beyond the end of a stream are its last.

    ``load_state_dict`` takes the weights of the authors' code too (two-stream input; strip nothing, a ``module.``
    before the names is no matter).

    Args:
        features, classes: sizes of a frame and of its scores; class 0 is the background.
        hidden: of both cells.
        steps: decoder steps a frame.
        window: frames of a training clip.
        dropout, pool, start: see :func:`pyflowgen.trn`.
        offset: 0 or 1.
        ignored: classes without loss and probability.

    >>> import torch
    >>> from pyflowgen.models import TRN
    >>> model = TRN(features=12, classes=5, hidden=16, steps=4).eval()
    >>> frames = torch.randn(2, 7, 12)
    >>> model(frames).shape, model.anticipate(frames).shape
    (torch.Size([2, 7, 5]), torch.Size([2, 7, 4, 5]))
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        hidden: int = 64,
        steps: int = 8,
        window: int = 64,
        dropout: float = 0.1,
        pool: Pool = "after",
        start: Start = "current",
        offset: int = 0,
        ignored: tuple[int, ...] | list[int] = (),
    ) -> None:
        super().__init__(features, classes, window, ignored)
        if offset not in (0, 1):
            raise ValueError(f"TRN: offset is {offset}, expected 0 or 1")
        self.config |= {
            "hidden": hidden, "steps": steps, "dropout": dropout, "pool": pool, "start": start, "offset": offset
        }  # fmt: skip
        self.offset, self.lookahead = offset, steps - 1 + offset
        self.trn = Layer(features, hidden, classes, steps=steps, pool=pool, start=start, dropout=dropout)
        self.register_load_state_dict_pre_hook(_authors_names)  # type: ignore[no-untyped-call]

    def init_state(self, batch: int) -> State:
        zero = self.mean.new_zeros(batch, self.trn.hidden)
        return {"h": zero, "c": zero.clone(), "future": self.mean.new_zeros(batch, self.features)}

    def run(self, features: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        scores, _, *after = self._all(features, state)
        return scores, dict(zip(("h", "c", "future"), after, strict=True))

    def step(self, frame: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if torch.is_grad_enabled() or frame.dim() != 2:
            return super().step(frame, state)
        state = state or self.init_state(len(frame))
        x = self._standard(frame[:, None])[:, 0]
        scores, _, *after = self.trn.step(x, (state["h"], state["c"], state["future"]))
        return scores, dict(zip(("h", "c", "future"), after, strict=True))

    def pack(self, dtype: torch.dtype | None = None) -> TRN:
        self.trn.pack(dtype)
        return self

    def anticipate(self, features: Tensor) -> Tensor:
        """Scores of the decoder's steps, ``(batch, frames, steps, classes)``; step i is of frame t + i − 1 + offset."""
        return self.run_ahead(features)[0]

    def run_ahead(self, features: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Like :meth:`run`, with the scores of :meth:`anticipate`."""
        _, ahead, *after = self._all(features, state)
        return ahead, dict(zip(("h", "c", "future"), after, strict=True))

    def _all(self, features: Tensor, state: State | None) -> tuple[Tensor, ...]:
        before = None if state is None else (state["h"], state["c"], state["future"])
        return tuple(self.trn(self._standard(features), before))

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        scores, ahead, *_ = self._all(features, None)
        frames = features.shape[1]
        later = targets[:, self.offset :].unfold(1, self.trn.steps, 1)[:, :frames].movedim(3, 2)
        return frame_loss(scores, targets[:, :frames], self.ignored) + frame_loss(ahead, later, self.ignored)


def _authors_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *rest: Any
) -> None:
    """Names as in the authors' code get the prefix of this module's layer."""
    own = set(module.get_submodule("trn").state_dict())
    for key in list(state_dict):
        bare = key.removeprefix(prefix).removeprefix("module.")
        if key.startswith(prefix) and bare in own:
            state_dict[f"{prefix}trn.{bare}"] = state_dict.pop(key)
