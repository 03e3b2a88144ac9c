"""The paper's tables: like beside like, every printed number once, intervals and shares of labels as computed."""
import re

import numpy as np
import pandas as pd
import pytest

from glcm.core import read_study, root
from glcm.miniature.world import SIZES
from glcm.report.paper import paper_tables, read_layout, read_reported
from glcm.report.tables import (
    TASK_COLUMNS, input_name, share_of_labels, task_metrics, variant_differences, write_between_markers)
from glcm.tasks.config import settings_of, task_config
from glcm.tasks.features import needed_parts
from glcm.training.config import run_config

REPORTED = read_reported(root()/'nbs'/'reported.csv')
LAYOUT = read_layout(root()/'nbs'/'layout.csv', REPORTED)
STUDIES = ['full', 'pretexts'], ['paper'] # those that fill the tables together
PAPER_METRICS = dict(zip(LAYOUT.task, LAYOUT.metric)) # task -> such as LRW top-1
PRETEXTS = 'moco', 'cpc', 'dpc', 'infomax', 'avts', 'avslowfast'
METRICS = dict(WER='wer', AUC='auc') | {'top-1': 'top1'}


def experiments_of(studies):
    "The variant, task, setting and parameters of all experiments; of one that two studies have, the last."
    found = {}
    for study in studies:
        params = read_study(study)
        for variant in params['matrix']['variants']:
            for task in params['experiments']:
                for setting in settings_of(params['experiments'], variant, task):
                    found[variant, task, setting] = params
    return found


def all_scores(studies):
    "The metrics of all experiments, each number another one."
    rows = []
    for (variant, task, setting), params in experiments_of(studies).items():
        metric = METRICS[PAPER_METRICS[task].split()[1]]
        input_ = input_name(task_config(params, task, setting))
        value = 0.1 + len(rows)/1000
        about = [variant, 0, task, setting, input_, 1.0, metric]
        numbers = [value, np.nan, value - 0.01, value + 0.01, 50, 20]
        rows.append(dict(zip(TASK_COLUMNS, about + numbers)))
    return pd.DataFrame(rows)


def table(text, number):
    "The part of a page about one table of the paper."
    return re.search(rf'### Table {number}:.*?(?=\n### |\Z)', text, re.DOTALL)[0]


def cells(line):
    "The texts of a line of a Markdown table."
    return [cell.strip() for cell in line.split('|')[1:-1]]


def test_a_task_has_one_metric():
    assert LAYOUT.groupby('task').metric.nunique().eq(1).all()


@pytest.mark.parametrize('studies', STUDIES)
def test_every_cell_is_filled_with_the_papers_input(studies):
    scores = all_scores(studies).set_index(['variant', 'task', 'setting']).input
    for cell in LAYOUT.itertuples():
        assert scores[cell.variant, cell.task, cell.setting] == cell.input, cell


@pytest.mark.parametrize('studies', STUDIES)
def test_every_number_of_the_paper_is_shown_in_its_table(studies):
    text = paper_tables(all_scores(studies), LAYOUT, REPORTED)
    for number, rows in REPORTED.groupby('table'):
        shown = []
        for line in table(text, number).splitlines():
            shown += [cell.strip('*') for cell in cells(line)]
        for value, count in rows.value.value_counts().items():
            assert shown.count(value) >= count, (number, value)


def test_competitors_stand_apart_from_what_was_measured():
    text = paper_tables(all_scores(STUDIES[0]), LAYOUT, REPORTED)
    for number, system in [(1, 'TM-CTC'), (2, 'MDS'), (3, 'XDC')]:
        lines = [line for line in table(text, number).splitlines() if f'| {system} |' in line]
        assert lines and all(line.startswith('> |') for line in lines)
    assert not [line for line in text.splitlines() if line.startswith('>') and 'here**' in line]
    assert '<' not in text # GitHub takes out styles


def test_tables_4_and_6_are_of_the_small_pretraining_set():
    scores = all_scores(STUDIES[0])
    text = paper_tables(scores, LAYOUT, REPORTED)
    names = {'glcm_15k', 'glcm_15k_no_mil', *PRETEXTS}
    small = scores.variant.isin(names)
    without = paper_tables(scores.assign(value=scores.value.where(small, 0.999)), LAYOUT, REPORTED)
    for number in (4, 6):
        assert table(without, number) == table(text, number)
    for number in (1, 2, 3, 5, 7):
        assert table(without, number) != table(text, number)
    assert set(LAYOUT[LAYOUT.table.isin(['4', '6'])].pretrain_data) == {'K-AV-15K'}
    assert set(LAYOUT[LAYOUT.table.isin(['5', '7'])].pretrain_data) == {'K-AV-240K'}
    assert (LAYOUT.variant.isin(names) == (LAYOUT.pretrain_data == 'K-AV-15K')).all()


def test_pretexts_stand_in_their_tables_with_what_they_train():
    "Seven rows in Table 4, in the paper's order; an encoder that was not trained is not used."
    rows = LAYOUT[LAYOUT.table == '4']
    assert rows.variant.unique().tolist() == [*PRETEXTS, 'glcm_15k']
    params = read_study('pretexts')
    for row in rows.itertuples():
        needed = needed_parts(task_config(params, row.task, row.setting))
        assert set(needed) <= set(run_config(params, row.variant, 0).trained), row


def test_whole_frames_are_not_set_beside_crops():
    "A run whose words are read from whole frames leaves the cells of lip crops empty."
    scores = all_scores(STUDIES[0])
    plain_lips = scores.task.isin(['lrw', 'lrs2']) & (scores.setting == 'plain')
    frames = scores.assign(input=scores.input.mask(plain_lips, 'full_frame'))
    lines = table(paper_tables(frames, LAYOUT, REPORTED), 5).splitlines()
    line = next(line for line in lines if line.startswith('| global and local'))
    _, *numbers = cells(line)
    assert numbers[:4] == ['', '*45.1*', '', '*89.2*']
    assert all(numbers[4:])


def test_a_table_is_written_through_a_studys_link(tmp_path):
    "Into the repository's file, and the link stays one."
    readme, link = tmp_path/'README.md', tmp_path/'linked.md'
    readme.write_text('<!-- seeds -->\nold\n<!-- /seeds -->\n')
    link.symlink_to('README.md')
    write_between_markers(link, 'seeds', 'new')
    assert link.is_symlink() and readme.read_text() == '<!-- seeds -->\nnew\n<!-- /seeds -->\n'


def words(correct, seed, groups=20):
    "Predictions of two folds; the first fold was trained on 5 of 40 clips, the second on all of its 8."
    numbers = np.arange(len(correct))
    second = numbers % 2 == 1
    return pd.DataFrame(dict(
        split=np.where(second, 'fold 2', 'fold 1'),
        clip=[f'c{k}' for k in numbers],
        group=[f'g{k % groups}' for k in numbers],
        label='a',
        predicted=np.where(correct, 'a', 'b'),
        train=np.where(second, 8, 5),
        available=np.where(second, 8, 40),
        seed=seed))


def test_share_of_labels_is_counted():
    assert share_of_labels(words(np.ones(60, bool), 0)) == pytest.approx(13/48)


CHANCES = dict(glcm=0.8, glcm_no_mil=0.6, scratch=0.3)


@pytest.fixture
def correct():
    "(variant, seed) -> which of 60 clips are classified correctly."
    rng = np.random.default_rng(0)
    found = {}
    for variant, chance in CHANCES.items():
        for seed in (0, 1):
            found[variant, seed] = rng.random(60) < chance
    return found


def differences(correct, groups):
    "Of words that all variants were tested on with two seeds."
    tables = {}
    for variant in CHANCES:
        of_seeds = [words(correct[variant, seed], seed, groups) for seed in (0, 1)]
        tables[variant, 'lrw', 'plain'] = pd.concat(of_seeds)
    return variant_differences(tables, list(CHANCES))


def test_differences_are_of_the_same_clips_and_seeds(correct):
    "Against a loop: the mean over seeds and folds of the difference of accuracies."
    found = differences(correct, groups=20).set_index(['variant', 'against'])
    assert set(found.index) == {('glcm', 'scratch'), ('glcm_no_mil', 'glcm'), ('glcm_no_mil', 'scratch')}
    for (variant, other), row in found.iterrows():
        of_folds = []
        for seed in (0, 1):
            for fold in (0, 1):
                of_folds.append(correct[variant, seed][fold::2].mean() - correct[other, seed][fold::2].mean())
        assert row.difference == pytest.approx(np.mean(of_folds))
        assert row.low < row.difference < row.high
        assert (row.clips, row.groups, row.seeds) == (60, 20, 2)


def test_differences_of_few_groups_have_no_interval(correct):
    few = differences(correct, groups=5)
    assert few[['low', 'high']].isna().all(axis=None)
    assert (few.groups == 5).all()


def test_settings_of_a_variant_are_compared(correct):
    tables = {
        ('glcm', 'lrw', 'plain'): words(correct['glcm', 0], 0),
        ('glcm', 'lrw', 'global'): words(correct['glcm', 1], 0)}
    row, = variant_differences(tables, ['glcm']).itertuples()
    assert (row.setting, row.against, row.against_setting) == ('global', 'glcm', 'plain')
    assert row.difference == pytest.approx(correct['glcm', 1].mean() - correct['glcm', 0].mean())


def test_scores_of_seeds_stay_apart():
    correct = np.arange(60) < 30
    predictions = {('glcm', 'lrw', 'plain'): pd.concat([words(correct, 0), words(~correct, 1)])}
    scores = task_metrics(predictions, read_study('full'))
    assert scores.seed.tolist() == [0, 1]
    assert scores.value.tolist() == pytest.approx([0.5, 0.5])
    assert (scores.clips == 60).all()
    assert scores.labels.tolist() == pytest.approx([13/48]*2)
    assert set(scores.input) == {'lip_crop'}


def test_words_for_the_tables_count_the_miniature():
    "54 clips are the share of the drawn training clips that 15,000 are of 240,000."
    params = read_study('full')
    drawn = SIZES['kinetics700']['train'] + SIZES['avspeech']['speech']*5//6 # a sixth of the speech is for testing
    clips = params['variants']['glcm_15k']['pretrain']['clips']
    assert clips == drawn*15_000//240_000
    assert f'{clips} of its {drawn} clips stand for K-AV-15K' in params['figures']['data']
