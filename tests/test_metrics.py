"""Intervals and differences: coverage by simulation, equality with other libraries, and what cannot be compared."""
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from glcm.core import InputError, generator
from glcm.metrics import (FEWEST, deepfake_scores, group_numbers, localization_scores, paired_difference, task_scores, top1_hits, top1_scores,
                          with_intervals)


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


def two_variants(rng, groups=16, clips=6, seeds=2, gain=0.06):
    "Shares of steps found in the clips of some sources, by two variants that mostly agree, each with several seeds."
    rows = pd.DataFrame(dict(clip=[str(k) for k in range(groups*clips)], group=[f's{k//clips}' for k in range(groups*clips)], offset=0))
    shared = np.repeat(rng.normal(0.5, 0.2, size=groups), clips) + rng.normal(0, 0.05, size=len(rows))
    gains = np.repeat(rng.normal(gain, 0.05, size=groups), clips)
    tables = [[rows.assign(seed=seed, hits=level + rng.normal(0, 0.05, size=len(rows))) for seed in range(seeds)] for level in (shared + gains, shared)]
    return [pd.concat(table, ignore_index=True) for table in tables]


def test_paired_intervals_cover_the_difference_and_are_narrow():
    rng, sets = np.random.default_rng(0), 100
    held, certain, overlapping = [], [], []
    for _ in range(sets):
        ours, theirs = two_variants(rng)
        found = paired_difference(ours, theirs, samples=200).loc['synchronisation']
        held.append(covered(found, 0.06))
        certain.append(found.low > 0)
    assert 0.88 <= np.mean(held) <= 0.99 and np.mean(certain) > 0.9
    alone = [task_scores(table, samples=300).loc['synchronisation'] for table in (ours, theirs)]
    assert found.high - found.low < 0.5*min(one.high - one.low for one in alone)
    assert max(one.low for one in alone) < min(one.high for one in alone)  # by overlap, nothing would have been found
    assert (found.clips, found.groups, found.seeds) == (96, 16, 2)


def test_difference_is_that_of_the_means_over_seeds_and_scipys():
    ours, theirs = two_variants(np.random.default_rng(1))
    found = paired_difference(ours, theirs, samples=999).loc['synchronisation']
    assert found.difference == pytest.approx(ours.groupby('seed').hits.mean().mean() - theirs.groupby('seed').hits.mean().mean())
    by_group = ours.groupby('group').hits.mean() - theirs.groupby('group').hits.mean()
    order = pd.unique(ours.sort_values('clip').group)  # in which they are numbered
    reference = bootstrap((by_group[order],), np.mean, n_resamples=999, batch=100, rng=generator('bootstrap')).confidence_interval
    assert [found.low, found.high] == pytest.approx([reference.low, reference.high], abs=1e-12)


@pytest.mark.parametrize('outcome', [dict(label='a', predicted='a'), dict(label='FAKE', logit=2.0), dict(text='SET RED', predicted='SET')])
def test_identical_predictions_do_not_differ(outcome):
    table = pd.DataFrame(dict(seed=0, round='a', clip=[str(k) for k in range(12)], group='') | outcome)
    if 'logit' in outcome: table.loc[:5, 'label'] = 'REAL'
    found = paired_difference(table, table.iloc[::-1], samples=200)
    assert (found[['difference', 'low', 'high']] == 0).all(axis=None)


def test_metrics_are_differenced_not_clips():
    "Word error rates of two variants, against a direct computation for each seed."
    rng = np.random.default_rng(4)
    words = ['bin', 'blue', 'at', 'f', 'now']
    said = [' '.join(rng.choice(words, rng.integers(1, 6))) for _ in range(12)]
    def variant(right):
        tables = [pd.DataFrame(dict(seed=seed, round='a', clip=[str(k) for k in range(12)], group='', text=said,
                                    predicted=[' '.join(w if rng.random() < right else 'set' for w in s.split()) for s in said])) for seed in (0, 1)]
        return pd.concat(tables, ignore_index=True), np.mean([task_scores(t, samples=10).value['wer'] for t in tables])
    (ours, rate), (theirs, other) = variant(0.9), variant(0.3)
    found = paired_difference(ours, theirs, samples=300).loc['wer']
    assert found.difference == pytest.approx(rate - other) and found.low < found.difference < found.high < 0


def test_few_groups_have_a_difference_and_no_interval():
    found = paired_difference(*two_variants(np.random.default_rng(2), groups=FEWEST - 1), samples=100).loc['synchronisation']
    assert math.isfinite(found.difference) and math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize('change, message', [
    (lambda t: t[t.seed == 0], 'only one of two variants has the seed 1'),
    (lambda t: t.assign(seed=t.seed + 1), r'only one of two variants has the seed 0 \(and 1 more\)'),
    (lambda t: t[t['clip'] != '7'], 'only one of two variants has the clip 7'),
    (lambda t: t.drop(index=3), 'only one of two variants has the combination 0, 0, 3 of seed, offset, clip'),
    (lambda t: t.drop(columns='seed').drop_duplicates('clip'), 'one table has the columns seed, offset, clip, the other offset, clip'),
    (lambda t: t.assign(group=''), "has the group 's0' with one variant and '' with the other"),
    (lambda t: pd.concat([t, t]), 'several rows for seed 0, offset 0, clip 0'),
    (lambda t: t[:0], 'no clips to compare')])
def test_what_is_not_paired_is_named(change, message):
    ours, theirs = two_variants(np.random.default_rng(3))
    with pytest.raises(InputError, match=message): paired_difference(ours, change(theirs))


def test_localization_is_scored_as_in_a_loop():
    rng = np.random.default_rng(5)
    rows = pd.DataFrame(dict(pointing=rng.random(20) < 0.5, ciou=rng.random(20), ciou_median=rng.random(20)))
    counts = rng.integers(0, 3, size=20)
    found = localization_scores(rows, counts)
    for column, share, area in ('ciou', 'ciou_50', 'auc'), ('ciou_median', 'ciou_median', 'auc_median'):
        values = [value for value, count in zip(rows[column], counts) for _ in range(count)]
        rates = [sum(value >= k/20 for value in values)/len(values) for k in range(21)]
        assert found[share] == pytest.approx(sum(value >= 0.5 for value in values)/len(values))
        assert found[area] == pytest.approx(sum((a + b)/2*0.05 for a, b in zip(rates, rates[1:])))
    assert found['pointing'] == pytest.approx(sum(rows.pointing*counts)/counts.sum())
