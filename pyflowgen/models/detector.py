"""Online detectors: per-frame scores from past and present frames alone, for clips, and frame by frame for streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen.ops.gru import GRU
from pyflowgen.ops.lstm import LSTM

State = dict[str, Tensor]


# --------------------------------------------------------------------------------------------------------- losses
def frame_loss(scores: Tensor, targets: Tensor, ignored: tuple[int, ...] = ()) -> Tensor:
    r"""Cross-entropy :math:`-\sum_k y_k \log \mathrm{softmax}(s)_k`, averaged over frames.

    Args:
        scores: ``(..., classes)``.
        targets: ``(..., classes)`` of zeros and ones, several a frame where actions overlap. A row of zeros is left out
            of the mean.
        ignored: classes that the softmax does without.

    Returns a scalar; 0 where no frame is left.

    >>> import torch
    >>> frame_loss(torch.zeros(2, 3, 4), torch.eye(4)[torch.tensor([[0, 1, 2], [3, 3, 3]])])  # log 4
    tensor(1.3863)
    """
    if scores.shape != targets.shape:
        raise ValueError(f"frame_loss: targets have shape {tuple(targets.shape)}, expected {tuple(scores.shape)}")
    if ignored:
        kept = [i for i in range(scores.shape[-1]) if i not in ignored]
        scores, targets = scores[..., kept], targets[..., kept]
    each = -(targets * scores.log_softmax(-1)).sum(-1)
    return each.sum() / (targets > 0).any(-1).sum().clamp(min=1)


def monotone_ranking_loss(scores: Tensor, targets: Tensor) -> Tensor:
    r"""How far an action's probability falls below what it was before in that action, averaged over action frames.

    .. math:: \max\bigl(0, \max_{t' < t} p_{t'}(y) - p_t(y)\bigr), \quad t' \text{ in the same instance of action } y

    The more of an action was seen, the surer a detector should be of it (Ma et al., *Learning Activity Progression in
    LSTMs for Activity Detection and Early Detection*, 2016). Class 0 is the background; its frames, and
    frames left out, have no loss. Of several actions at once, each has its own. The gradient also lowers what was too
    sure too soon, so a large weight makes detection later: on the watch recordings 0.3 is about as much as does no
    harm.

    Args:
        scores: logits, ``(batch, frames, classes)``.
        targets: ``(batch, frames, classes)`` of zeros and ones.

    >>> import torch
    >>> p = torch.tensor([[[0.2, 0.8], [0.5, 0.5]]])
    >>> monotone_ranking_loss(p.log(), torch.tensor([[[0, 1], [0, 1]]]))  # (0 + 0.3) / 2
    tensor(0.1500)
    """
    if scores.dim() != 3 or scores.shape != targets.shape:
        raise ValueError(
            f"monotone_ranking_loss: scores of shape {tuple(scores.shape)} and targets of shape "
            f"{tuple(targets.shape)}, expected the same (batch, frames, classes)"
        )
    p = scores.softmax(-1)[..., 1:]
    on = targets[..., 1:] > 0
    # Each instance of a class is lifted above the one before it, so that one running maximum serves them all; in
    # float64, where the lift costs no digits.
    begins = on & ~F.pad(on, (0, 0, 1, 0))[:, :-1]
    lift = 2.0 * begins.cumsum(1, dtype=torch.float64)
    lifted = torch.where(on, p.double() + lift, lift)
    fall = (lifted.cummax(1).values - lifted).to(p.dtype)
    return torch.where(on, fall, 0.0).sum() / on.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------- model
class Detector(nn.Module):
    """What every online detector offers, and what :func:`pyflowgen.train.fit` and ``pyflowgen detect`` need of it.

    A subclass defines :meth:`run`; its scores of a frame must hang on frames up to it alone. Class 0 is the background.

    Attributes:
        features, classes: sizes of a frame and of its scores.
        window: frames of a training clip.
        lookahead: frames after the clip whose targets the loss needs.
        config: constructor arguments, for :meth:`from_config`.
        mean, scale: buffers; frames are standardised by them first, see :meth:`standardise`.
    """

    mean: Tensor
    scale: Tensor
    lookahead = 0

    def __init__(self, features: int, classes: int, window: int, ignored: tuple[int, ...] | list[int] = ()) -> None:
        super().__init__()
        if features < 1 or classes < 2 or window < 1:
            raise ValueError(
                f"{type(self).__name__}: features={features}, classes={classes}, window={window}, "
                "expected features and window of at least 1, and at least 2 classes"
            )
        if any(not 0 < c < classes for c in ignored):
            raise ValueError(
                f"{type(self).__name__}: ignored is {tuple(ignored)}, expected classes of 1 … {classes - 1}"
            )
        self.features, self.classes, self.window, self.ignored = features, classes, window, tuple(ignored)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.config: dict[str, Any] = {
            "features": features, "classes": classes, "window": window, "ignored": list(ignored)
        }  # fmt: skip
        self.register_load_state_dict_pre_hook(_foreign_weights)  # type: ignore[no-untyped-call]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Detector:
        """The model that has this ``config``, with new weights."""
        return cls(**config)

    def run(self, features: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Scores ``(batch, frames, classes)`` of frames ``(batch, frames, features)`` that follow ``state``, and the
        state after them. None is the state at the start of a stream."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Scores (logits) of every frame of clips, ``(batch, frames, features) -> (batch, frames, classes)``."""
        return self.run(features)[0]

    def step(self, frame: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Scores ``(batch, classes)`` of one frame ``(batch, features)``, and the state for the next."""
        if frame.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}.step: frame has shape {tuple(frame.shape)}, expected {self._frame}"
            )
        scores, state = self.run(frame[:, None], state)
        return scores[:, 0], state

    def init_state(self, batch: int) -> State:
        """The state of ``batch`` streams before their first frame: tensors whose first dimension is the batch."""
        raise NotImplementedError

    def pack(self, dtype: torch.dtype | None = None) -> Detector:
        """Hold the recurrent weights that :meth:`step` reads in ``dtype``: None (their own), bfloat16 or int8.

        Parameters, ``state_dict`` and clips stay as they are. Returns self.
        """
        raise NotImplementedError

    def probabilities(self, scores: Tensor) -> Tensor:
        """Softmax over the classes that are not ignored; those get 0."""
        if self.ignored:
            scores = scores.clone()
            scores[..., list(self.ignored)] = -torch.inf
        return scores.softmax(-1)

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Training loss of clips; ``targets`` go on for :attr:`lookahead` frames after ``features``."""
        return frame_loss(self(features), targets, self.ignored)

    def standardise(self, mean: Tensor, scale: Tensor) -> None:
        """Map frames to ``(frame - mean) / scale`` before anything else."""
        with torch.no_grad():
            self.mean.copy_(mean)
            self.scale.copy_(scale)

    @property
    def _frame(self) -> str:
        return f"(batch, {self.features})"

    def _standard(self, features: Tensor) -> Tensor:
        if features.dim() != 3 or features.shape[2] != self.features:
            raise ValueError(
                f"{type(self).__name__}: features have shape {tuple(features.shape)}, "
                f"expected (batch, frames, {self.features})"
            )
        return (features - self.mean) / self.scale


def _foreign_weights(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *rest: Any
) -> None:
    """Weights from elsewhere know no standardisation: what the model has stays."""
    for name in ("mean", "scale"):
        state_dict.setdefault(prefix + name, getattr(module, name))


class Recurrence(nn.Module):
    """One layer stack of `LSTM` or `GRU` as detectors use it: over clips with a state, and step by step.

    The one place that says which recurrence runs.

    >>> import torch
    >>> layer = Recurrence("gru", 3, 4)
    >>> y, state = layer(torch.randn(2, 5, 3), layer.init_state(2))
    >>> y.shape, state["h"].shape
    (torch.Size([2, 5, 4]), torch.Size([2, 1, 4]))
    """

    def __init__(self, kind: str, n_in: int, hidden: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if min(n_in, hidden, layers) < 1:
            raise ValueError(f"Recurrence: input {n_in}, hidden {hidden}, layers {layers}, expected at least 1")
        self.lstm = kind == "lstm"
        self.hidden, self.layers = hidden, layers
        between = dropout if layers > 1 else 0.0
        cls = LSTM if self.lstm else GRU
        self.rnn: LSTM | GRU = cls(n_in, hidden, layers, batch_first=True, dropout=between)

    def init_state(self, batch: int) -> State:
        zero = next(self.parameters()).new_zeros(batch, self.layers, self.hidden)
        return {"h": zero, "c": zero.clone()} if self.lstm else {"h": zero}

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if x.shape[1] == 0:
            return x.new_empty(len(x), 0, self.hidden), state
        if x.shape[1] == 1 and not torch.is_grad_enabled():
            return self._step(x[:, 0], state)
        before = [state[k].transpose(0, 1).contiguous() for k in ("h", "c")[: 1 + self.lstm]]
        y, after = self.rnn(x, tuple(before) if self.lstm else before[0])
        kept = after if self.lstm else (after,)
        return y, {k: v.transpose(0, 1) for k, v in zip("hc", kept, strict=False)}

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        before = tuple(state[k].transpose(0, 1).contiguous() for k in ("h", "c")[: 1 + self.lstm])
        y, after = self.rnn.step(x, before if self.lstm else before[0])
        kept = after if self.lstm else (after,)
        return y[:, None], {k: v.transpose(0, 1) for k, v in zip("hc", kept, strict=False)}


class LSTMDetector(Detector):
    r"""LSTM and a linear classifier, :math:`s_t = W\,\mathrm{LSTM}(x_{\le t}) + b`.

    Args:
        features, classes: sizes of a frame and of its scores; class 0 is the background.
        hidden, layers: of the LSTM.
        window: frames of a training clip.
        dropout: between layers and before the classifier.
        early: weight of :func:`monotone_ranking_loss`, which teaches to find an action before it ends.
        ignored: classes without loss and probability.

    >>> import torch
    >>> from pyflowgen.models import LSTMDetector
    >>> model = LSTMDetector(features=12, classes=5).eval()
    >>> frames = torch.randn(1, 20, 12)
    >>> state = model.init_state(1)
    >>> with torch.no_grad():
    ...     for t in range(20):
    ...         scores, state = model.step(frames[:, t], state)
    ...     clip = model(frames)
    >>> torch.allclose(scores, clip[:, -1], atol=1e-6)
    True
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        hidden: int = 64,
        layers: int = 1,
        window: int = 32,
        dropout: float = 0.0,
        early: float = 0.0,
        ignored: tuple[int, ...] | list[int] = (),
    ) -> None:
        super().__init__(features, classes, window, ignored)
        self.config |= {"hidden": hidden, "layers": layers, "dropout": dropout, "early": early}
        self.early = early
        self.recurrence = Recurrence("lstm", features, hidden, layers, dropout)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, classes)

    def init_state(self, batch: int) -> State:
        return self.recurrence.init_state(batch)

    def pack(self, dtype: torch.dtype | None = None) -> LSTMDetector:
        self.recurrence.rnn.pack(dtype)
        return self

    def run(self, features: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = self.recurrence(self._standard(features), state or self.init_state(len(features)))
        return self.classifier(self.dropout(y)), state

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        scores = self(features)
        loss = frame_loss(scores, targets, self.ignored)
        return loss + self.early * monotone_ranking_loss(scores, targets) if self.early else loss


class GRUDetector(Detector):
    r"""Linear, LayerNorm, ReLU, GRU, ReLU and Linear, trained on the last frame of each clip alone, as MiniROAD.

    .. math:: e_t = \mathrm{relu}(\mathrm{LN}(W_e x_t + b_e)), \quad s_t = W\,\mathrm{relu}(\mathrm{GRU}(e_{\le t})) + b

    A clip's early frames lack the past that a stream has; with the loss on the last frame alone, training sees scores
    as a stream makes them (An et al., *MiniROAD: Minimal RNN Framework for Online Action Detection*, 2023).

    Args:
        features, classes: sizes of a frame and of its scores; class 0 is the background.
        embedding, hidden, layers: of the input layer and the GRU.
        window: frames of a training clip.
        dropout: after the input layer, and between layers.
        last: frames at the end of each clip that have a loss.
        ignored: classes without loss and probability.

    >>> import torch
    >>> from pyflowgen.models import GRUDetector
    >>> model = GRUDetector(features=12, classes=5)
    >>> model(torch.randn(2, 7, 12)).shape
    torch.Size([2, 7, 5])
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        embedding: int = 2048,
        hidden: int = 1024,
        layers: int = 1,
        window: int = 128,
        dropout: float = 0.2,
        last: int = 1,
        ignored: tuple[int, ...] | list[int] = (),
    ) -> None:
        super().__init__(features, classes, window, ignored)
        if embedding < 1 or not 1 <= last <= window:
            raise ValueError(f"GRUDetector: embedding={embedding}, last={last}, expected at least 1 and last ≤ window")
        self.config |= {
            "embedding": embedding, "hidden": hidden, "layers": layers, "dropout": dropout, "last": last
        }  # fmt: skip
        self.last = last
        self.embed = nn.Sequential(
            nn.Linear(features, embedding), nn.LayerNorm(embedding), nn.ReLU(), nn.Dropout(dropout)
        )
        self.recurrence = Recurrence("gru", embedding, hidden, layers, dropout)
        self.classifier = nn.Linear(hidden, classes)

    def init_state(self, batch: int) -> State:
        return self.recurrence.init_state(batch)

    def pack(self, dtype: torch.dtype | None = None) -> GRUDetector:
        self.recurrence.rnn.pack(dtype)
        return self

    def run(self, features: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        embedded = self.embed(self._standard(features))
        y, state = self.recurrence(embedded, state or self.init_state(len(features)))
        return self.classifier(y.relu()), state

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        embedded = self.embed(self._standard(features))
        y, _ = self.recurrence(embedded, self.init_state(len(features)))
        return frame_loss(self.classifier(y[:, -self.last :].relu()), targets[:, -self.last :], self.ignored)


# --------------------------------------------------------------------------------------------------- many streams
class LiveStreams:
    """Many streams on one model: they join and leave as they like, and those that have a frame share one batch.

    ``LiveStreams(model.pack(torch.int8))`` runs them on 8-bit weights, see :meth:`Detector.pack`.

    >>> import torch
    >>> from pyflowgen.models import LiveStreams, LSTMDetector
    >>> live = LiveStreams(LSTMDetector(features=12, classes=5))
    >>> live.join("door")
    >>> live.join("yard")
    >>> scores = live.step({"yard": torch.randn(12), "door": torch.randn(12)})
    >>> scores["door"].shape
    torch.Size([5])
    >>> state = live.leave("door")  # to join again later where it stood
    >>> live.names
    ('yard',)
    """

    def __init__(self, model: Detector) -> None:
        self.model = model.eval()
        self._rows: dict[str, int] = {}
        self._state = model.init_state(0)

    @property
    def names(self) -> tuple[str, ...]:
        """Streams on board."""
        return tuple(self._rows)

    def join(self, name: str, state: State | None = None) -> None:
        """A new stream, or one that goes on from the ``state`` that :meth:`leave` or :meth:`state` returned."""
        if name in self._rows:
            raise ValueError(f"LiveStreams.join: there is a stream {name!r} already")
        new = self.model.init_state(1) if state is None else state
        if new.keys() != self._state.keys() or any(v.shape != (1, *self._state[k].shape[1:]) for k, v in new.items()):
            said = {k: tuple(v.shape) for k, v in new.items()}
            raise ValueError(f"LiveStreams.join: state is {said}, expected that of one stream of this model")
        self._rows[name] = len(self._rows)
        self._state = {k: torch.cat([v, new[k].to(v)]) for k, v in self._state.items()}

    def leave(self, name: str) -> State:
        """Take a stream off board; returns its state."""
        gone = self.state(name)
        row = self._rows.pop(name)
        kept = [i for i in range(len(self._rows) + 1) if i != row]
        self._state = {k: v[kept] for k, v in self._state.items()}
        self._rows = {n: i for i, n in enumerate(self._rows)}
        return gone

    def state(self, name: str) -> State:
        """A copy of one stream's state."""
        if name not in self._rows:
            raise ValueError(f"LiveStreams: no stream {name!r}, expected one of {', '.join(self._rows) or '(none)'}")
        row = self._rows[name]
        return {k: v[row : row + 1].clone() for k, v in self._state.items()}

    @torch.no_grad()
    def step(self, frames: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Probabilities ``(classes,)`` of one new frame ``(features,)`` for each stream named; others stand still."""
        if not frames:
            return {}
        unknown = [n for n in frames if n not in self._rows]
        if unknown:
            raise ValueError(f"LiveStreams.step: no stream {unknown[0]!r}, join it first")
        rows = torch.tensor([self._rows[n] for n in frames])
        wrong = [n for n, f in frames.items() if f.shape != (self.model.features,)]
        if wrong:
            raise ValueError(
                f"LiveStreams.step: frame of {wrong[0]!r} has shape {tuple(frames[wrong[0]].shape)}, "
                f"expected ({self.model.features},)"
            )
        batch = torch.stack(list(frames.values()))
        scores, after = self.model.step(batch, {k: v[rows] for k, v in self._state.items()})
        for k, v in after.items():
            self._state[k] = self._state[k].index_copy(0, rows, v)
        return dict(zip(frames, self.model.probabilities(scores).unbind(), strict=True))
