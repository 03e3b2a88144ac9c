"""Intervals and differences: coverage by simulation, equality with scipy, and tables that cannot be compared."""
import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from glcm.core import InputError, generator
from glcm.tasks.statistics import (
    MIN_GROUPS, PairedDesign, design_of, detectable_difference, group_numbers, paired_difference, task_scores,
    with_intervals)


def classified(correct, group, **columns):
    "A table of predictions of which some are correct."
    clips = [str(k) for k in range(len(correct))]
    predicted = np.where(correct, 'a', 'b')
    table = dict(split='test', clip=clips, group=group, label='a', predicted=predicted)
    return pd.DataFrame(table | columns)


def scipy_interval(data, statistic, **options):
    "Low and high of scipy's BCa interval from the same samples."
    result = bootstrap(data, statistic, n_resamples=999, batch=100, rng=generator('bootstrap'), **options)
    return list(result.confidence_interval)


def covers(interval, truth):
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize('groups', [10, 20])
def test_intervals_of_correlated_clips_cover_the_truth(groups):
    "Clips of a speaker are nearly all correct or all wrong. Drawing clips would cover the truth in two of three sets."
    rng, clips, truth = np.random.default_rng(groups), 12, 0.6
    group = np.repeat(np.arange(groups), clips)
    by_group, by_clip = [], []
    for k in range(300):
        ease = rng.beta(1.5, 1.0, size=groups)[group]
        correct = (rng.random(len(ease)) < ease).astype(float)

        def accuracy(counts):
            return dict(top1=counts @ correct/counts.sum())

        interval = with_intervals(accuracy, group, samples=500).loc['top1']
        by_group.append(covers(interval, truth))
        if k % 3 == 0:
            interval = with_intervals(accuracy, np.arange(len(group)), samples=200).loc['top1']
            by_clip.append(covers(interval, truth))
    assert 0.88 <= np.mean(by_group) <= 0.99
    assert np.mean(by_clip) < 0.75


def test_too_few_groups_have_no_interval():
    correct = np.tile([True, False, True], 12)

    def scores(groups):
        speakers = [f's{k % groups}' for k in range(36)]
        return task_scores(classified(correct, speakers)).loc['top1']

    enough = scores(MIN_GROUPS)
    few = scores(MIN_GROUPS - 1)
    assert few[['low', 'high']].isna().all()
    assert not enough[['low', 'high']].isna().any()
    assert few.value == enough.value == pytest.approx(2/3)
    assert (few.groups, few.clips) == (MIN_GROUPS - 1, 36)


def test_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(0).exponential(size=25)

    def mean(counts):
        return dict(mean=counts @ values/counts.sum())

    ours = with_intervals(mean, np.arange(25), samples=999).loc['mean']
    assert [ours.low, ours.high] == pytest.approx(scipy_interval((values,), np.mean), abs=1e-12)


def test_interval_of_unequal_groups_is_scipys():
    "A ratio of sums over groups, which scipy draws as pairs."
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(14), rng.integers(1, 9, size=14))
    correct = rng.random(len(group)) < rng.random(14)[group]
    ours = task_scores(classified(correct, [f's{k}' for k in group]), samples=999).loc['top1']

    def ratio(correct, clips, axis):
        return correct.sum(axis)/clips.sum(axis)

    theirs = scipy_interval((np.bincount(group, correct), np.bincount(group)), ratio, paired=True)
    assert [ours.low, ours.high] == pytest.approx(theirs, abs=1e-12)


def test_undefined_bca_is_replaced_by_percentiles():
    perfect = task_scores(classified(np.ones(40, bool), '')).loc['top1']
    assert [perfect.low, perfect.high] == [1, 1]
    logit = np.random.default_rng(2).normal(size=16)
    clips = [str(k) for k in range(16)]
    label = ['REAL']*2 + ['FAKE']*14  # two real videos: some samples have none
    videos = pd.DataFrame(dict(split='test', clip=clips, group='', label=label, logit=logit))
    auc = task_scores(videos).loc['auc']
    assert 0 <= auc.low < auc.value < auc.high <= 1
    one_sided = task_scores(videos.iloc[2:]).loc['auc']
    assert math.isnan(one_sided.value) and math.isnan(one_sided.low)


def test_groups_are_not_mistaken_for_clips():
    table = pd.DataFrame(dict(clip=['s1', 'b', 'c', 'd'], group=['', 's1', 's1', None]))
    assert group_numbers(table).tolist() == [0, 1, 1, 2]


def two_variants(rng, groups=16, clips=6, seeds=2, gain=0.06):
    "Shares of time steps found in clips of some sources, by two variants that mostly agree, with several seeds."
    numbers = np.arange(groups*clips)
    rows = pd.DataFrame(dict(clip=numbers.astype(str), group=[f's{k//clips}' for k in numbers], offset=0))
    by_group = rng.normal(0.5, 0.2, size=groups)
    shared = np.repeat(by_group, clips) + rng.normal(0, 0.05, size=len(rows))
    gains = np.repeat(rng.normal(gain, 0.05, size=groups), clips)

    def variant(level):
        tables = []
        for seed in range(seeds):
            noise = rng.normal(0, 0.05, size=len(rows))
            tables.append(rows.assign(seed=seed, hits=level + noise))
        return pd.concat(tables, ignore_index=True)

    return variant(shared + gains), variant(shared)


def test_paired_intervals_cover_the_difference_and_are_narrow():
    rng, sets = np.random.default_rng(0), 100
    covered, above_zero = [], []
    for _ in range(sets):
        ours, theirs = two_variants(rng)
        difference = paired_difference(ours, theirs, samples=200).loc['synchronisation']
        covered.append(covers(difference, 0.06))
        above_zero.append(difference.low > 0)
    assert 0.88 <= np.mean(covered) <= 0.99
    assert np.mean(above_zero) > 0.9
    first, second = (task_scores(table, samples=300).loc['synchronisation'] for table in (ours, theirs))
    narrowest = min(first.high - first.low, second.high - second.low)
    assert difference.high - difference.low < 0.5*narrowest
    assert first.low < second.high and second.low < first.high  # their own intervals overlap
    assert (difference.clips, difference.groups, difference.seeds) == (96, 16, 2)


def test_difference_is_that_of_the_means_over_seeds_and_scipys():
    ours, theirs = two_variants(np.random.default_rng(1))
    difference = paired_difference(ours, theirs, samples=999).loc['synchronisation']
    means = [table.groupby('seed').hits.mean().mean() for table in (ours, theirs)]
    assert difference.difference == pytest.approx(means[0] - means[1])
    by_group = ours.groupby('group').hits.mean() - theirs.groupby('group').hits.mean()
    order = pd.unique(ours.sort_values('clip').group)  # in which they are numbered
    reference = scipy_interval((by_group[order],), np.mean)
    assert [difference.low, difference.high] == pytest.approx(reference, abs=1e-12)


@pytest.mark.parametrize('prediction', [
    dict(label='a', predicted='a'),
    dict(label='FAKE', logit=2.0),
    dict(text='SET RED', predicted='SET')])
def test_identical_predictions_do_not_differ(prediction):
    clips = [str(k) for k in range(12)]
    table = pd.DataFrame(dict(seed=0, split='a', clip=clips, group='') | prediction)
    if 'logit' in prediction:
        table.loc[:5, 'label'] = 'REAL'
    difference = paired_difference(table, table.iloc[::-1], samples=200)
    assert (difference[['difference', 'low', 'high']] == 0).all(axis=None)


def test_metrics_are_subtracted_not_clips():
    "Word error rates of two variants, against a direct computation for each seed."
    rng = np.random.default_rng(4)
    words = ['bin', 'blue', 'at', 'f', 'now']
    texts = [' '.join(rng.choice(words, rng.integers(1, 6))) for _ in range(12)]
    clips = [str(k) for k in range(12)]

    def predict(text, accuracy):
        return ' '.join(word if rng.random() < accuracy else 'set' for word in text.split())

    def variant(accuracy):
        tables = []
        for seed in (0, 1):
            predicted = [predict(text, accuracy) for text in texts]
            table = dict(seed=seed, split='a', clip=clips, group='', text=texts, predicted=predicted)
            tables.append(pd.DataFrame(table))
        rates = [task_scores(table, samples=10).value['wer'] for table in tables]
        return pd.concat(tables, ignore_index=True), np.mean(rates)

    ours, our_rate = variant(0.9)
    theirs, their_rate = variant(0.3)
    difference = paired_difference(ours, theirs, samples=300).loc['wer']
    assert difference.difference == pytest.approx(our_rate - their_rate)
    assert difference.low < difference.difference < difference.high < 0


def test_few_groups_have_a_difference_and_no_interval():
    ours, theirs = two_variants(np.random.default_rng(2), groups=MIN_GROUPS - 1)
    difference = paired_difference(ours, theirs, samples=100).loc['synchronisation']
    assert math.isfinite(difference.difference)
    assert math.isnan(difference.low) and math.isnan(difference.high)


CHANGES = { # what is done to one of two tables, and what is said of it
    'a seed less': (
        lambda table: table[table.seed == 0],
        'only one of two variants has the seed 1'),
    'other seeds': (
        lambda table: table.assign(seed=table.seed + 1),
        r'only one of two variants has the seed 0 \(and 1 more\)'),
    'a clip less': (
        lambda table: table[table['clip'] != '7'],
        'only one of two variants has the clip 7'),
    'a row less': (
        lambda table: table.drop(index=3),
        'only one of two variants has the combination 0, 0, 3 of seed, offset, clip'),
    'no seeds': (
        lambda table: table.drop(columns='seed').drop_duplicates('clip'),
        'one table has the columns seed, offset, clip, the other offset, clip'),
    'other groups': (
        lambda table: table.assign(group=''),
        "has the group 's0' with one variant and '' with the other"),
    'rows twice': (
        lambda table: pd.concat([table, table]),
        'several rows for seed 0, offset 0, clip 0'),
    'nothing': (
        lambda table: table[:0],
        'no clips to compare'),
}


@pytest.mark.parametrize('name', CHANGES)
def test_rows_without_a_pair_are_named(name):
    change, message = CHANGES[name]
    ours, theirs = two_variants(np.random.default_rng(3))
    with pytest.raises(InputError, match=message):
        paired_difference(ours, change(theirs))


# -- power -------------------------------------------------------------------------------------------------------------

def simulated_differences(design, difference, rng):
    "The mean difference of each clip over the seeds, and its group: of groups, clips and seeds."
    per_group = design.clips//design.groups
    group = np.repeat(np.arange(design.groups), per_group)
    of_clip = design.discordant*(design.common + (1 - design.common)/design.seeds)
    of_group = design.correlation*of_clip
    noise = (1 - design.common)*design.discordant
    clips = rng.normal(0, math.sqrt(design.common*design.discordant - of_group), design.clips)
    groups = rng.normal(0, math.sqrt(of_group), design.groups)[group]
    seeds = rng.normal(0, math.sqrt(noise), (design.seeds, design.clips)).mean(0)
    return difference + clips + groups + seeds, group


def share_shown(design, difference, studies=200):
    "How many simulated studies have an interval above zero."
    rng, shown = np.random.default_rng(0), 0
    for _ in range(studies):
        values, group = simulated_differences(design, difference, rng)

        def mean(counts):
            return dict(mean=counts @ values/counts.sum())
        shown += with_intervals(mean, group, samples=300).low['mean'] > 0
    return shown/studies


@pytest.mark.parametrize('design', [PairedDesign(120, 120, 1), PairedDesign(400, 40, 3, correlation=0.1),
                                    PairedDesign(300, 20, 3, discordant=0.15, common=0.8, correlation=0.2)])
def test_four_of_five_studies_show_the_detectable_difference(design):
    difference = detectable_difference(design)
    assert 0.72 <= share_shown(design, difference) <= 0.9
    assert share_shown(design, difference/3, 60) < 0.4
    assert detectable_difference(design, power=0.5) < difference < detectable_difference(design, power=0.95)


def test_a_pilot_study_tells_its_design():
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(60), 5)
    skill = rng.beta(1, 1, 60)[group] # of the other variant, shared by the clips of a group
    tables = []
    for chance in (np.full(300, 0.9), skill):
        rows = []
        for k, seed in product(range(300), range(3)):
            right = rng.random() < chance[k]
            rows.append(dict(clip=str(k), group=f'g{group[k]}', seed=seed, right=right))
        tables.append(pd.DataFrame(rows))
    design = design_of(*tables)
    assert (design.clips, design.groups, design.seeds) == (300, 60, 3)
    difference = (tables[0].right.astype(int) - tables[1].right.astype(int)).to_numpy().reshape(300, 3)
    assert design.discordant == pytest.approx(difference.var())
    expected_common = np.cov(difference[:, 0], difference[:, 1])[0, 1]/difference.var()
    assert design.common == pytest.approx(expected_common, abs=0.1)
    assert 0.3 < design.correlation < 0.9
    with pytest.raises(InputError, match='only one of two variants'):
        design_of(tables[0], tables[1][:-1])
