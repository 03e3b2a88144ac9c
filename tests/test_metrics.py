"""Metrics against other libraries and against loops."""
import math

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from glcm.tasks.metrics import deepfake_scores, localization_scores, top1_correct, top1_scores


def test_counts_are_repetitions():
    rng = np.random.default_rng(3)
    predicted = np.where(rng.random(30) < 0.5, 'a', 'b')
    split = np.repeat(['a', 'b', 'c'], 10)
    clips = top1_correct(pd.DataFrame(dict(split=split, label='a', predicted=predicted)))
    counts = rng.integers(0, 3, size=30)
    repeated = clips.iloc[np.repeat(np.arange(30), counts)]
    of_splits = repeated.groupby('split').correct.mean()
    assert top1_scores(clips, counts)['top1'] == pytest.approx(of_splits.mean())


def test_auc_ranks_logits_that_saturate():
    "Of logits above 37 the sigmoid is 1."
    logit = np.array([40.0, 50.0, 45.0, 60.0, 800.0, -800.0])
    fake = np.array([0, 1, 0, 1, 1, 0])
    table = pd.DataFrame(dict(label=np.where(fake, 'FAKE', 'REAL'), logit=logit))
    assert deepfake_scores(table)['auc'] == roc_auc_score(fake, logit) == 1
    mixed = table.assign(label=['FAKE', 'REAL', 'REAL', 'FAKE', 'FAKE', 'REAL'])
    assert deepfake_scores(mixed)['auc'] == pytest.approx(roc_auc_score(mixed.label == 'FAKE', logit))
    assert math.isfinite(deepfake_scores(mixed)['log_loss'])


def success_of(values):
    "Success rate and the area under it, in loops."
    rates = []
    for k in range(21):
        rates.append(sum(value >= k/20 for value in values)/len(values))
    area = 0.0
    for low, high in zip(rates, rates[1:]):
        area += (low + high)/2*0.05
    return sum(value >= 0.5 for value in values)/len(values), area


def test_localization_is_scored_as_in_a_loop():
    rng = np.random.default_rng(5)
    rows = pd.DataFrame(dict(
        pointing=rng.random(20) < 0.5,
        ciou=rng.random(20),
        ciou_median=rng.random(20)))
    counts = rng.integers(0, 3, size=20)
    scores = localization_scores(rows, counts)
    repeated = rows.iloc[np.repeat(np.arange(20), counts)]
    half_range = scores['ciou_50'], scores['auc']
    assert half_range == pytest.approx(success_of(repeated.ciou.tolist()))
    median = scores['ciou_median'], scores['auc_median']
    assert median == pytest.approx(success_of(repeated.ciou_median.tolist()))
    assert scores['pointing'] == pytest.approx(sum(rows.pointing*counts)/counts.sum())
