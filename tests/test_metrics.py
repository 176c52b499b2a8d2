"""Measures of detection against cases worked out by hand, and against scikit-learn where it has the measure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from pyflowgen.metrics import (
    AMOC,
    Point,
    amoc,
    average_precision,
    decile_precision,
    detected_starts,
    frame_precision,
    observed_accuracy,
    point_precision,
    segments,
    starts,
)


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 400))
    # with few distinct scores most of them are ties
    scores = rng.integers(0, int(rng.choice([3, 20, 10**6])), n).astype(np.float64)
    positives = rng.random(n) < rng.choice([0.02, 0.3, 0.9])
    positives[rng.integers(n)] = True
    got = average_precision(torch.from_numpy(scores), torch.from_numpy(positives))
    assert got == pytest.approx(average_precision_score(positives, scores), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "positives", "plain", "calibrated"),
    [
        # hits at ranks 1 and 3 of 5; w = 3/2: (1 + 3/(3 + 1)) / 2
        ([5, 4, 3, 2, 1], [1, 0, 1, 0, 0], (1 + 2 / 3) / 2, (1 + 3 / 4) / 2),
        # the one hit last of four; w = 3: 3/(3 + 3)
        ([4, 3, 2, 1], [0, 0, 0, 1], 1 / 4, 1 / 2),
        # ties: the two first come together, one of them a hit; w = 1: 1/(1 + 1), then 2/(2 + 2)
        ([2, 2, 1, 1], [1, 0, 0, 1], 1 / 2, 1 / 2),
        # three hits of four, w = 1/3: 1, 1, then 1/(1 + 1)
        ([4, 3, 2, 1], [1, 1, 0, 1], (1 + 1 + 3 / 4) / 3, (1 + 1 + 1 / 2) / 3),
        ([2, 1], [1, 1], 1.0, 1.0),
    ],
)
def test_average_precision_by_hand(scores, positives, plain, calibrated):
    scores, positives = torch.tensor(scores, dtype=torch.float64), torch.tensor(positives)
    assert average_precision(scores, positives) == pytest.approx(plain, abs=1e-15)
    assert average_precision(scores, positives, calibrated=True) == pytest.approx(calibrated, abs=1e-15)


def test_chance_is_the_share_of_positives_and_calibrated_one_half():
    torch.manual_seed(0)
    scores, positives = torch.rand(200_000), torch.rand(200_000) < 0.03
    assert average_precision(scores, positives) == pytest.approx(0.03, abs=0.004)
    assert average_precision(scores, positives, calibrated=True) == pytest.approx(0.5, abs=0.02)


def test_frames_left_out_and_classes_without_frames():
    scores = torch.rand(300, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(1))  # class 4 never occurs
    targets = torch.nn.functional.one_hot(labels, 5)
    targets[::7] = 0
    kept = targets.any(1)
    got = frame_precision(scores, targets, ignore=[2])
    want = {c: average_precision_score(labels[kept] == c, scores[kept, c]) for c in (1, 3)}
    assert got.per_class == pytest.approx(want, abs=1e-12) and got.mean == pytest.approx(sum(want.values()) / 2)
    assert set(frame_precision(scores, targets, background=None).per_class) == {0, 1, 2, 3}
    assert math.isnan(frame_precision(scores, torch.zeros(300, 5)).mean)
    two = targets.clone()  # actions may overlap
    two[5, 1] = two[5, 3] = 1
    assert frame_precision(scores, two).per_class[1] == pytest.approx(
        average_precision_score(two[two.any(1), 1], scores[two.any(1), 1])
    )


def test_wrong_arguments_are_named():
    for message, call in {
        r"scores of shape \(3,\) and positives of shape \(2,\)": lambda: average_precision(
            torch.rand(3), torch.ones(2)
        ),
        "NaN": lambda: average_precision(torch.tensor([1.0, math.nan]), torch.ones(2)),
        r"scores of shape \(3, 2\)": lambda: frame_precision(torch.rand(3, 2), torch.ones(2, 3)),
        "depth=0": lambda: point_precision([], [], offset=1.0, depth=0.0),
        "0 segments of class 3": lambda: amoc([torch.rand(4)], [torch.tensor([0, 0, 1, 1])], 3),
        "no action": lambda: observed_accuracy([torch.rand(4, 2)], [torch.zeros(4, dtype=torch.long)]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert math.isnan(average_precision(torch.rand(3), torch.zeros(3)))


# ---- starts


def test_starts_of_labels():
    labels = torch.tensor([2, 2, 0, 1, 1, 3, -1, -1, 3, 0, 3, -1, 1])
    assert segments(labels)[0] == (0, 2, 2) and segments(labels)[-1] == (12, 13, 1) and segments(labels[:0]) == []
    # 3 goes on behind the frames left out, and begins anew behind the background
    assert starts(labels, 7, rate=2.0) == [Point(7, t / 2, c) for t, c in ((0, 2), (3, 1), (5, 3), (10, 3), (12, 1))]


def test_starts_read_off_scores():
    scores = torch.tensor(
        [[0.1, 0.9, 0.0], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.3, 0.1, 0.6], [0.1, 0.5, 0.4], [0.2, 0.3, 0.5]]
    )
    found = detected_starts(scores, rate=2.0)
    assert [(p.time, p.label, round(p.score, 3)) for p in found] == [
        (0, 1, 0.9),
        (1.5, 2, 0.6),
        (2, 1, 0.5),
        (2.5, 2, 0.5),
    ]
    assert len(detected_starts(scores, threshold=0.55)) == 2
    assert [p.label for p in detected_starts(scores, ignore=[2])] == [1, 1]
    part = detected_starts(scores[:4])  # and no frame after it has a say
    assert part == [p._replace(time=2 * p.time) for p in found[:2]]


def test_point_precision_by_hand():
    truth = [Point(0, 10, 1), Point(0, 20, 1), Point(1, 10, 1), Point(0, 5, 2)]
    made = [
        Point(0, 12, 1, 0.9),  # claims 10
        Point(0, 11, 1, 0.8),  # 10 is taken: wrong
        Point(1, 13.5, 1, 0.7),  # too late
        Point(1, 8, 1, 0.6),  # claims 10 of stream 1
        Point(2, 10, 1, 0.5),  # no such stream
        Point(0, 5, 1, 0.95),  # another class starts there
        Point(0, 5, 2, 0.1),
        Point(0, 5, 3, 0.9),  # a class that never starts has no precision
    ]
    found = point_precision(made, truth, offset=2)
    # class 1 by score: wrong, right 1/2, wrong, wrong, right 2/5; three starts
    assert found.per_class == pytest.approx({1: (1 / 2 + 2 / 5) / 3, 2: 1.0})
    assert found.mean == pytest.approx((0.3 + 1) / 2)
    # up to a recall of two thirds: the first two right ones
    assert point_precision(made, truth, offset=2, depth=2 / 3).per_class[1] == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert point_precision(made, truth, offset=2, depth=0.01).per_class[1] == pytest.approx(1 / 2)
    assert point_precision(made, truth, offset=4).per_class[1] == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert point_precision([], truth, offset=2).mean == 0 and math.isnan(point_precision(made, [], offset=2).mean)


def test_a_detection_claims_the_nearest_start():
    truth = [Point(0, 10, 1), Point(0, 13, 1)]
    made = [Point(0, 12.5, 1, 0.9), Point(0, 8, 1, 0.8)]
    assert point_precision(made, truth, offset=3).mean == 1.0


# ---- early detection


def test_amoc_by_hand():
    scores = [torch.tensor([0.2, 0.4, 0.1, 0.5, 0.9, 0.3]), torch.tensor([0.6, 0.8, 0.7, 0.7])]
    labels = [torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([2, 2, 1, 1])]
    curve = amoc(scores, labels, 1)
    assert isinstance(curve, AMOC)
    points = {(round(f, 6), round(t, 6)) for f, t in zip(*(c.tolist() for c in curve), strict=True)}
    # thresholds: inf none found; .9 first instance at 3/4; .8 one false alarm of two; .7 second instance at 1/2;
    # .5 first at 2/4; .4 the other segment too; .1 all at once
    assert points == {(0, 1), (0, 0.875), (0.5, 0.875), (0.5, 0.625), (0.5, 0.5), (1, 0.5), (1, 0.375)}
    assert curve.at(0.0) == 0.875 and curve.at(0.5) == 0.5 and curve.at(0.49) == 0.875 and curve.at(1.0) == 0.375
    assert (curve.false_positive_rate.diff() >= 0).all() and (curve.time_to_detection.diff() <= 0).all()


def test_amoc_of_a_seer_and_of_a_late_one():
    labels = [torch.tensor([0] * 10 + [1] * 10 + [0] * 10)]
    seer = (labels[0] == 1).float()
    assert amoc([seer], labels, 1).at(0.0) == pytest.approx(0.1)
    late = seer.clone()
    late[10:19] = 0
    assert amoc([late], labels, 1).at(0.0) == 1.0
    assert amoc([1 - seer], labels, 1).at(0.1) == 1.0


def test_observed_accuracy_by_hand():
    labels = torch.tensor([0] * 3 + [1] * 10 + [2] * 5 + [-1] * 2)
    scores = torch.zeros(20, 3)
    scores[:, 0] = 9.0  # the background is no answer
    scores[:, 2] = 0.5
    scores[7:13, 1] = 1.0  # class 1 is known from its fifth frame on
    found = observed_accuracy([scores], [labels])
    assert found == {r: 0.5 if r < 0.45 else 1.0 for r in (i / 10 for i in range(1, 11))}


def test_decile_precision_sees_what_gets_better():
    labels = torch.tensor([0] * 40 + [1] * 40)
    scores = torch.zeros(80, 2)
    scores[:40, 1] = torch.linspace(0, 1, 40)
    scores[40:, 1] = torch.linspace(0, 2, 40)
    found = decile_precision([scores], [labels])
    assert all(a < b for a, b in zip(found[:5], found[1:6], strict=True)) and found[6:] == [1.0] * 4
    first = scores[[*range(40), *range(40, 44)], 1]
    assert found[0] == pytest.approx(average_precision(first, torch.tensor([0] * 40 + [1] * 4), calibrated=True))
