"""Measures of online and early action detection: per-frame, calibrated, point-level, AMOC and observation ratio.

Scores are compared within a class, so any increasing function of them gives the same precision. Targets are
``(frames, classes)`` of zeros and ones, several ones a frame where actions overlap; a frame whose row is all zeros is
left out, and so are the background and the classes named in ``ignore``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ClassPrecision(NamedTuple):
    """The mean over classes that occur, and the value of each of them."""

    mean: float
    per_class: dict[int, float]


class Point(NamedTuple):
    """A class at a time of a stream: the start of an action, or its detection with a score."""

    stream: int
    time: float
    label: int
    score: float = 0.0


class Segment(NamedTuple):
    """Frames ``start … end-1`` of a stream with one label."""

    start: int
    end: int
    label: int


def average_precision(scores: Tensor, positives: Tensor, *, calibrated: bool = False) -> float:
    r"""Area under the precision–recall curve of one class, :math:`\sum_k P(k)\,[k\ \text{positive}] / \#\text{pos}`.

    Frames are taken by falling score; frames of equal score come together, as in
    :func:`sklearn.metrics.average_precision_score`. With ``calibrated``, precision is
    :math:`w\,\mathrm{TP} / (w\,\mathrm{TP} + \mathrm{FP})` with :math:`w = \#\text{neg}/\#\text{pos}`, so that chance
    is one half however rare the class is (De Geest et al., *Online Action Detection*, 2016).

    Args:
        scores: ``(frames,)``, finite.
        positives: ``(frames,)``, true where the class is on.

    Returns NaN where there is no positive frame. Raises ValueError for shapes that differ or scores that are NaN.

    >>> average_precision(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 0, 1, 0]))  # (1 + 2/3) / 2
    0.8333333333333333
    """
    if scores.dim() != 1 or scores.shape != positives.shape:
        raise ValueError(
            f"average_precision: scores of shape {tuple(scores.shape)} and positives of shape "
            f"{tuple(positives.shape)}, expected the same (frames,)"
        )
    if bool(scores.isnan().any()):
        raise ValueError("average_precision: scores have NaN among them, expected numbers")
    total = int(positives.bool().sum())
    if total == 0:
        return math.nan
    order = scores.argsort(descending=True, stable=True)
    ranked, hit = scores[order], positives[order].bool()
    true = hit.cumsum(0, dtype=torch.float64)
    false = (~hit).cumsum(0, dtype=torch.float64)
    last = torch.ones_like(hit)  # of a run of equal scores
    last[:-1] = ranked[1:] != ranked[:-1]
    true, false = true[last], false[last]
    weight = (len(hit) - total) / total if calibrated else 1.0
    # without a negative frame the weight is 0, and every precision 1
    precision = torch.where(false > 0, weight * true / (weight * true + false).clamp_min(1e-300), 1.0)
    precision = torch.where(true > 0, precision, 0.0)
    gained = true.diff(prepend=true.new_zeros(1))
    return float((precision * gained).sum() / total)


def frame_precision(
    scores: Tensor,
    targets: Tensor,
    *,
    background: int | None = 0,
    ignore: Sequence[int] = (),
    calibrated: bool = False,
) -> ClassPrecision:
    """Per-frame mAP (``calibrated``: mcAP): mean :func:`average_precision` over the action classes that occur.

    Args:
        scores: ``(frames, classes)``, all streams one after the other.
        targets: ``(frames, classes)`` of zeros and ones; frames without a one are left out.
        background, ignore: classes without a precision of their own.

    >>> scores = torch.tensor([[0.1, 0.9], [0.6, 0.4], [0.7, 0.3]])
    >>> frame_precision(scores, torch.tensor([[0, 1], [1, 0], [0, 1]])).mean
    0.8333333333333333
    """
    if scores.dim() != 2 or scores.shape != targets.shape:
        raise ValueError(
            f"frame_precision: scores of shape {tuple(scores.shape)} and targets of shape {tuple(targets.shape)}, "
            "expected the same (frames, classes)"
        )
    kept = (targets > 0).any(1)
    scores, positives = scores[kept], targets[kept] > 0
    found = {
        c: average_precision(scores[:, c], positives[:, c], calibrated=calibrated)
        for c in range(scores.shape[1])
        if c != background and c not in ignore and bool(positives[:, c].any())
    }
    return ClassPrecision(sum(found.values()) / len(found) if found else math.nan, found)


def segments(labels: Tensor) -> list[Segment]:
    """Runs of equal values in ``(frames,)`` labels.

    >>> segments(torch.tensor([0, 0, 2, 2, 2]))
    [Segment(start=0, end=2, label=0), Segment(start=2, end=5, label=2)]
    """
    if not len(labels):
        return []
    values, counts = torch.unique_consecutive(labels, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [Segment(end - n, end, v) for end, n, v in zip(ends, counts.tolist(), values.tolist(), strict=True)]


# ------------------------------------------------------------------------------------------------- action starts
def starts(labels: Tensor, stream: int = 0, *, rate: float = 1.0, background: int = 0) -> list[Point]:
    """Where actions begin in ``(frames,)`` labels; times in seconds at ``rate`` frames a second.

    Negative labels (frames left out) begin nothing, and neither does an action that goes on after them.

    >>> starts(torch.tensor([0, 0, 2, 2, 1]), rate=2.0)
    [Point(stream=0, time=1.0, label=2, score=0.0), Point(stream=0, time=2.0, label=1, score=0.0)]
    """
    found, before = [], None
    for part in segments(labels):
        if part.label not in (background, before) and part.label >= 0:
            found.append(Point(stream, part.start / rate, part.label))
        before = part.label if part.label >= 0 else before
    return found


def detected_starts(
    scores: Tensor,
    stream: int = 0,
    *,
    rate: float = 1.0,
    background: int = 0,
    ignore: Sequence[int] = (),
    threshold: float = 0.0,
) -> list[Point]:
    """Action starts read off the ``(frames, classes)`` probabilities of one stream, frame by frame.

    An action starts where the most probable class is an action, differs from the frame before, and has at least
    ``threshold`` (Gao et al., *StartNet*, 2019). The score is that probability.

    >>> detected_starts(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]))[0].time
    1.0
    """
    shown = scores.clone()
    shown[:, list(ignore)] = -math.inf
    best, label = shown.max(1)
    changed = torch.ones(len(label), dtype=torch.bool, device=label.device)
    changed[1:] = label[1:] != label[:-1]
    frames = (changed & (label != background) & (best >= threshold)).nonzero()[:, 0].tolist()
    return [Point(stream, t / rate, int(label[t]), float(best[t])) for t in frames]


def point_precision(
    detections: Iterable[Point], truth: Iterable[Point], *, offset: float, depth: float = 1.0
) -> ClassPrecision:
    """Point-level mAP of action starts (Shou et al., *Online Detection of Action Start*, 2018).

    A detection is right if an unclaimed start of its class in its stream lies within ``offset``; detections claim by
    falling score, each the nearest start. ``depth`` averages precision up to that recall only ("AP depth at recall X"):
    over the first ``depth·#starts`` right detections, those never made counting 0.

    >>> truth = [Point(0, 10.0, 1), Point(0, 50.0, 1)]
    >>> made = [Point(0, 11.0, 1, 0.9), Point(0, 30.0, 1, 0.8), Point(0, 50.0, 1, 0.7)]
    >>> point_precision(made, truth, offset=2.0).mean  # (1 + 2/3) / 2
    0.8333333333333333
    """
    if not 0 < depth <= 1 or offset < 0:
        raise ValueError(f"point_precision: offset={offset}, depth={depth}, expected offset ≥ 0 and 0 < depth ≤ 1")
    wanted: dict[int, dict[int, list[float]]] = {}
    for point in truth:
        wanted.setdefault(point.label, {}).setdefault(point.stream, []).append(point.time)
    made: dict[int, list[Point]] = {}
    for point in sorted(detections, key=lambda p: -p.score):
        made.setdefault(point.label, []).append(point)
    found = {}
    for label, open_starts in sorted(wanted.items()):
        asked = max(1, math.floor(depth * sum(map(len, open_starts.values())) + 1e-9))
        right, total = 0, 0.0
        for rank, point in enumerate(made.get(label, ()), 1):
            times = open_starts.get(point.stream, [])
            nearest = min(times, key=lambda t: abs(t - point.time), default=math.inf)
            if abs(nearest - point.time) > offset:
                continue
            times.remove(nearest)
            right += 1
            total += right / rank
            if right == asked:
                break
        found[label] = total / asked
    return ClassPrecision(sum(found.values()) / len(found) if found else math.nan, found)


# ---------------------------------------------------------------------------------------------- early detection
class AMOC(NamedTuple):
    """Activity monitoring operating characteristic: points of rising false-positive rate."""

    false_positive_rate: Tensor
    time_to_detection: Tensor

    def at(self, rate: float) -> float:
        """Least normalised time to detection with a false-positive rate of at most ``rate``."""
        return float(self.time_to_detection[self.false_positive_rate <= rate].min())


def amoc(scores: Sequence[Tensor], labels: Sequence[Tensor], label: int) -> AMOC:
    r"""AMOC curve of one class: how early it is found against how often it is found where it is not.

    A segment is a run of one label. At threshold θ an instance of the class, frames s…e, is found at its first frame t
    with score ≥ θ, after the normalised time :math:`(t-s+1)/(e-s+1)`, or 1 if at none; any other segment is a false
    positive if it has such a frame (Fawcett and Provost 1999; Hoai and De la Torre, *Max-margin early event detectors*,
    2012). Segments of negative labels are left out.

    Args:
        scores: for each stream ``(frames,)``, the class's score.
        labels: for each stream ``(frames,)`` integers.

    >>> curve = amoc([torch.tensor([0.1, 0.3, 0.2, 0.9])], [torch.tensor([0, 0, 1, 1])], 1)
    >>> curve.at(0.0), curve.at(1.0)  # the second frame of two at once, the first one with a false alarm
    (1.0, 0.5)
    """
    instances: list[Tensor] = []
    others: list[Tensor] = []
    for given, truth in zip(scores, labels, strict=True):
        for part in segments(truth):
            if part.label >= 0:
                (instances if part.label == label else others).append(given[part.start : part.end].double())
    if not instances or not others:
        raise ValueError(f"amoc: {len(instances)} segments of class {label} and {len(others)} others, expected both")
    peaks = torch.stack([s.max() for s in others]).sort().values
    thresholds = torch.cat([*instances, peaks, torch.tensor([math.inf])]).unique().flip(0)
    times = torch.zeros(len(thresholds), dtype=torch.float64)
    for given in instances:
        reached = given.cummax(0).values  # first frame at or above θ = frames strictly below θ, plus one
        below = torch.searchsorted(reached, thresholds)
        times += ((below + 1) / len(given)).clamp(max=1.0)
    rate = (len(peaks) - torch.searchsorted(peaks, thresholds)) / len(peaks)
    return AMOC(rate.double(), times / len(instances))


RATIOS = tuple(i / 10 for i in range(1, 11))


def observed_accuracy(
    scores: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    background: int = 0,
    ignore: Sequence[int] = (),
    ratios: Sequence[float] = RATIOS,
) -> dict[float, float]:
    """Share of action instances named right when only the first part of each was seen.

    At ratio ρ an instance of n frames is judged by the scores of its frame ⌈ρn⌉, among the action classes alone.

    >>> observed_accuracy([torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])], [torch.tensor([2, 2])], ratios=(0.5, 1.0))
    {0.5: 0.0, 1.0: 1.0}
    """
    right, total = dict.fromkeys(ratios, 0), 0
    for given, truth in zip(scores, labels, strict=True):
        shown = given.clone()
        shown[:, [background, *ignore]] = -math.inf
        named = shown.argmax(1)
        for part in segments(truth):
            if part.label < 0 or part.label == background:
                continue
            total += 1
            for ratio in ratios:
                frame = part.start + max(1, math.ceil(ratio * (part.end - part.start) - 1e-9)) - 1
                right[ratio] += int(named[frame]) == part.label
    if not total:
        raise ValueError("observed_accuracy: labels have no action in them")
    return {ratio: count / total for ratio, count in right.items()}


def decile_precision(
    scores: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    background: int = 0,
    ignore: Sequence[int] = (),
    calibrated: bool = True,
) -> list[float]:
    """Mean (calibrated) precision by tenth of the action: of each instance only the frames of that tenth are positive
    frames, against all frames of other labels (De Geest et al., 2016).

    >>> values = decile_precision([torch.eye(2)[[0] * 10 + [1] * 10]], [torch.tensor([0] * 10 + [1] * 10)])
    >>> values == [1.0] * 10
    True
    """
    given, truth = torch.cat(list(scores)), torch.cat(list(labels))
    tenth = torch.cat([_tenths(label) for label in labels])
    classes = [c for c in truth.unique().tolist() if c >= 0 and c != background and c not in ignore]
    means = []
    for k in range(10):
        found = []
        for c in classes:
            mine = truth == c
            kept = (truth >= 0) & (~mine | (tenth == k))
            if bool((mine & kept).any()):
                found.append(average_precision(given[kept, c], mine[kept], calibrated=calibrated))
        means.append(sum(found) / len(found) if found else math.nan)
    return means


def _tenths(labels: Tensor) -> Tensor:
    parts = [torch.arange(p.end - p.start) * 10 // (p.end - p.start) for p in segments(labels)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
