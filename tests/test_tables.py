"""The paper's tables: like beside like, every printed number once, and no interval or share of labels that was not computed."""
import re

import numpy as np
import pandas as pd
import pytest

from glcm.core import read_params, root
from glcm.miniature.world import SIZES
from glcm.tables import (PAPER_METRICS, TASK_COLUMNS, input_name, paper_tables, read_layout, read_reported, share_of_labels, task_metrics,
                         variant_differences)
from glcm.tasks.protocol import settings_of, task_config

REPORTED = read_reported(root()/'nbs'/'reported.csv')
LAYOUT = read_layout(root()/'nbs'/'layout.csv', REPORTED)
FILES = 'params.yaml', 'params.paper.yaml'
METRIC = {task: dict(zip(('WER', 'top-1', 'AUC'), ('wer', 'top1', 'auc')))[name.split()[1]] for task, name in PAPER_METRICS.items()}


def full_grid(file):
    "What the full grid measures, each number another one."
    params = read_params(root()/file)
    grid, rows = params['grids']['full'], []
    for variant in grid['variants']:
        for task in grid['tasks']:
            for setting in settings_of(grid, variant, task):
                seen, value = input_name(task_config(params, task, setting)), 0.1 + len(rows)/1000
                row = [variant, 0, task, setting, seen, 1.0, METRIC[task], value, np.nan, value - 0.01, value + 0.01, 50, 20]
                rows.append(dict(zip(TASK_COLUMNS, row)))
    return pd.DataFrame(rows)


def table(text, number):
    return re.search(rf'### Table {number}:.*?(?=\n### |\Z)', text, re.DOTALL)[0]


@pytest.mark.parametrize('file', FILES)
def test_full_grid_fills_every_cell_with_the_papers_input(file):
    scores = full_grid(file).set_index(['variant', 'task', 'setting']).input
    for cell in LAYOUT.itertuples(): assert scores[cell.variant, cell.task, cell.setting] == cell.input, cell


@pytest.mark.parametrize('file', FILES)
def test_every_number_of_the_paper_is_shown_in_its_table(file):
    text = paper_tables(full_grid(file), LAYOUT, REPORTED)
    for number, rows in REPORTED.groupby('table'):
        shown = [cell.strip(' *') for line in table(text, number).splitlines() if '|' in line for cell in line.split('|')]
        for value, count in rows.value.value_counts().items(): assert shown.count(value) >= count, (number, value)


def test_competitors_stand_apart_from_what_was_measured():
    text = paper_tables(full_grid('params.yaml'), LAYOUT, REPORTED)
    for number, system in [(1, 'AVSlowFast'), (2, 'MDS'), (3, 'XDC'), (4, 'MoCo')]:
        lines = [line for line in table(text, number).splitlines() if f'| {system} |' in line]
        assert lines and all(line.startswith('> |') for line in lines)
    assert not [line for line in text.splitlines() if line.startswith('>') and 'here**' in line]
    assert '<' not in text # GitHub takes out styles


def test_tables_4_and_6_are_of_the_small_pretraining_set():
    scores = full_grid('params.yaml')
    text = paper_tables(scores, LAYOUT, REPORTED)
    other = scores.assign(value=scores.value.where(scores.variant.isin(['glcm_15k', 'glcm_15k_no_mil']), 0.999))
    without = paper_tables(other, LAYOUT, REPORTED)
    for number in (4, 6): assert table(without, number) == table(text, number)
    for number in (1, 2, 3, 5, 7): assert table(without, number) != table(text, number)
    assert set(LAYOUT[LAYOUT.table.isin(['4', '6'])].pretrain_data) == {'K-AV-15K'}
    assert set(LAYOUT[LAYOUT.table.isin(['5', '7'])].pretrain_data) == {'K-AV-240K'}
    assert (LAYOUT.variant.str.startswith('glcm_15k') == (LAYOUT.pretrain_data == 'K-AV-15K')).all()


def test_whole_frames_are_not_set_beside_crops():
    "A run whose words are read from whole frames leaves the cells of lip crops empty."
    scores = full_grid('params.yaml')
    frames = scores.assign(input=scores.input.mask(scores.task.isin(['lrw', 'lrs2']) & (scores.setting == 'plain'), 'full_frame'))
    line = next(line for line in table(paper_tables(frames, LAYOUT, REPORTED), 5).splitlines() if line.startswith('| global and local'))
    cells = [cell.strip() for cell in line.split('|')[2:-1]]
    assert cells[:4] == ['', '*45.1*', '', '*89.2*'] and all(cells[4:])


def words(right, seed, groups=20):
    "Predictions of two folds, of which some are right; the first fold was trained on 5 of 40 clips, the second on all of its 8."
    fold = np.arange(len(right)) % 2
    return pd.DataFrame({'round': np.where(fold, 'fold 2', 'fold 1'), 'clip': [f'c{k}' for k in range(len(right))],
                         'group': [f'g{k % groups}' for k in range(len(right))], 'label': 'a', 'predicted': np.where(right, 'a', 'b'),
                         'train': np.where(fold, 8, 5), 'available': np.where(fold, 8, 40), 'seed': seed})


def test_share_of_labels_is_counted():
    assert share_of_labels(words(np.ones(60, bool), 0)) == pytest.approx(13/48)


def test_differences_are_of_the_same_clips_and_seeds():
    "Against a loop: the mean over folds of the difference of hits, and no interval from fewer than ten groups."
    rng = np.random.default_rng(0)
    hits = {(variant, seed): rng.random(60) < chance for variant, chance in (('glcm', 0.8), ('glcm_no_mil', 0.6), ('scratch', 0.3)) for seed in (0, 1)}
    def tables(groups): return {(v, 'lrw', 'plain'): pd.concat([words(hits[v, seed], seed, groups) for seed in (0, 1)]) for v in ('glcm', 'glcm_no_mil', 'scratch')}
    found = variant_differences(tables(20), ['glcm', 'glcm_no_mil', 'scratch']).set_index(['variant', 'against'])
    assert set(found.index) == {('glcm', 'scratch'), ('glcm_no_mil', 'glcm'), ('glcm_no_mil', 'scratch')}
    for (variant, other), row in found.iterrows():
        each = [(hits[variant, seed][fold::2].mean() - hits[other, seed][fold::2].mean()) for seed in (0, 1) for fold in (0, 1)]
        assert row.difference == pytest.approx(np.mean(each))
        assert row.low < row.difference < row.high and (row.clips, row.groups, row.seeds) == (60, 20, 2)
    settings = {('glcm', 'lrw', setting): words(hits['glcm', seed], 0) for setting, seed in (('plain', 0), ('global', 1))}
    row, = variant_differences(settings, ['glcm']).itertuples()
    assert (row.setting, row.against, row.against_setting) == ('global', 'glcm', 'plain')
    assert row.difference == pytest.approx(hits['glcm', 1].mean() - hits['glcm', 0].mean())
    few = variant_differences(tables(5), ['glcm', 'glcm_no_mil', 'scratch'])
    assert few[['low', 'high']].isna().all(axis=None) and (few.groups == 5).all()


def test_scores_of_seeds_stay_apart():
    right = np.arange(60) < 30
    predictions = {('glcm', 'lrw', 'plain'): pd.concat([words(right, 0), words(~right, 1)])}
    scores = task_metrics(predictions, read_params())
    assert scores.seed.tolist() == [0, 1] and scores.value.tolist() == pytest.approx([0.5, 0.5]) and (scores.clips == 60).all()
    assert scores.labels.tolist() == pytest.approx([13/48]*2) and set(scores.input) == {'lip_crop'}


def test_words_for_the_tables_count_the_miniature():
    "54 clips are the share of the drawn training clips that 15,000 are of 240,000."
    params = read_params()
    drawn = SIZES['kinetics700']['train'] + SIZES['avspeech']['speech']*5//6 # a sixth of the speech is for testing
    clips = params['variants']['glcm_15k']['pretrain']['clips']
    assert clips == drawn*15_000//240_000
    assert f'{clips} of its {drawn} clips stand for K-AV-15K' in params['figures']['data']
