"""Intervals and differences: coverage by simulation, equality with other libraries, and what cannot be compared."""
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from glcm.core import generator
from glcm.metrics import FEWEST, deepfake_scores, group_numbers, task_scores, top1_hits, top1_scores, with_intervals


def answers(hits, group, **columns):
    "A table of predictions of which some are right."
    return pd.DataFrame(dict(round='test', clip=[str(k) for k in range(len(hits))], group=group, label='a', predicted=np.where(hits, 'a', 'b')) | columns)


def covered(interval, truth): return interval.low <= truth <= interval.high


@pytest.mark.parametrize('groups', [10, 20])
def test_intervals_of_correlated_clips_cover_the_truth(groups):
    "Clips of a speaker are nearly all right or nearly all wrong. Drawing clips would hold the truth in two of three sets only."
    rng, sets, clips, truth = np.random.default_rng(groups), 300, 12, 0.6
    group, by_group, by_clip = np.repeat(np.arange(groups), clips), [], []
    for _ in range(sets):
        ease = rng.beta(1.5, 1.0, size=groups)[group]
        hits = rng.random(len(ease)) < ease
        accuracy = lambda counts: dict(top1=counts @ hits/counts.sum())
        by_group.append(covered(with_intervals(accuracy, group, samples=500).loc['top1'], truth))
        by_clip.append(covered(with_intervals(accuracy, np.arange(len(hits)), samples=200).loc['top1'], truth))
    assert 0.88 <= np.mean(by_group) <= 0.99
    assert np.mean(by_clip) < 0.75


def test_too_few_groups_have_no_interval():
    hits = np.tile([True, False, True], 12)
    enough, few = (task_scores(answers(hits, [f's{k % count}' for k in range(36)])).loc['top1'] for count in (FEWEST, FEWEST - 1))
    assert few[['low', 'high']].isna().all() and not enough[['low', 'high']].isna().any()
    assert few.value == enough.value == pytest.approx(2/3) and (few.groups, few.clips) == (FEWEST - 1, 36)


def test_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(0).exponential(size=25)
    ours = with_intervals(lambda counts: dict(mean=counts @ values/counts.sum()), np.arange(25), samples=999).loc['mean']
    theirs = bootstrap((values,), np.mean, n_resamples=999, batch=100, rng=generator('bootstrap')).confidence_interval
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=1e-12)


def test_interval_of_unequal_groups_is_scipys():
    "A ratio of sums over groups, which scipy draws as pairs."
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(14), rng.integers(1, 9, size=14))
    hits = rng.random(len(group)) < rng.random(14)[group]
    ours = task_scores(answers(hits, [f's{k}' for k in group]), samples=999).loc['top1']
    found, clips = np.bincount(group, hits), np.bincount(group)
    ratio = lambda found, clips, axis: found.sum(axis)/clips.sum(axis)
    theirs = bootstrap((found, clips), ratio, paired=True, n_resamples=999, batch=100, rng=generator('bootstrap')).confidence_interval
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=1e-12)


def test_what_bca_does_not_define_has_percentiles():
    perfect = task_scores(answers(np.ones(40, bool), '')).loc['top1']
    assert [perfect.low, perfect.high] == [1, 1]
    rng = np.random.default_rng(2)  # two real videos of sixteen: some draws hold none
    videos = pd.DataFrame(dict(round='test', clip=[str(k) for k in range(16)], group='', label=['REAL']*2 + ['FAKE']*14, logit=rng.normal(size=16)))
    auc = task_scores(videos).loc['auc']
    assert 0 <= auc.low < auc.value < auc.high <= 1
    one_sided = task_scores(videos.iloc[2:]).loc['auc']
    assert math.isnan(one_sided.value) and math.isnan(one_sided.low)


def test_counts_are_repetitions():
    rng = np.random.default_rng(3)
    hits = top1_hits(answers(rng.random(30) < 0.5, '').assign(round=np.repeat(['a', 'b', 'c'], 10)))
    counts = rng.integers(0, 3, size=30)
    repeated = hits.iloc[np.repeat(np.arange(30), counts)]
    assert top1_scores(hits, counts)['top1'] == pytest.approx(repeated.groupby('round').hit.mean().mean())


def test_groups_are_not_mistaken_for_clips():
    table = pd.DataFrame(dict(clip=['s1', 'b', 'c', 'd'], group=['', 's1', 's1', None]))
    assert group_numbers(table).tolist() == [0, 1, 1, 2]


def test_auc_ranks_logits_that_saturate():
    "Of logits above 37 the sigmoid is 1."
    logit, fake = np.array([40.0, 50.0, 45.0, 60.0, 800.0, -800.0]), np.array([0, 1, 0, 1, 1, 0])
    table = pd.DataFrame(dict(label=np.where(fake, 'FAKE', 'REAL'), logit=logit))
    assert deepfake_scores(table)['auc'] == roc_auc_score(fake, logit) == 1
    mixed = table.assign(label=['FAKE', 'REAL', 'REAL', 'FAKE', 'FAKE', 'REAL'])
    assert deepfake_scores(mixed)['auc'] == pytest.approx(roc_auc_score(mixed.label == 'FAKE', logit))
    assert math.isfinite(deepfake_scores(mixed)['log_loss'])
