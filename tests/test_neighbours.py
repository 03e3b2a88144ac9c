"""Retrieval by frozen features: against loops, from predictions to tables."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from test_tasks import config, films, new_model, twelve  # noqa: F401, fixtures

from glcm.core import InputError
from glcm.report.tables import read_predictions
from glcm.tasks.features import Features
from glcm.tasks.finetune import finetune, load_network, to_inputs
from glcm.tasks.statistics import task_scores
from glcm.tasks.windows import LabelledWindows, collate_windows


def neighbours_config(**values):
    return config(neighbours=True, precision='float32', **values)


def features_by_hand(films, settings):  # noqa: F811
    "One clip, one window and one frame at a time: the mean of the features of each clip."
    features = Features(*new_model(), settings).eval()
    windows = LabelledWindows(films, {}, settings, 56, 0)
    clips = []
    for i in range(len(films.clips)):
        means = []
        for time in (0.0, 1.0):
            batch = collate_windows([windows[0, i, time, 0.5]])
            with torch.no_grad():
                of_window = features(*to_inputs(batch, torch.device('cpu')))[0].double()
            total = torch.zeros(len(of_window), dtype=torch.double)
            for step in of_window.T:
                total += step
            means.append(total/of_window.shape[1])
        clips.append((means[0] + means[1])/2)
    return clips


def cosine(a, b):
    return float(sum(x*y for x, y in zip(a.tolist(), b.tolist()))/math.sqrt(float((a*a).sum()*(b*b).sum())))


@pytest.mark.parametrize('values', [dict(features='local'), dict(modality='audio')])
def test_neighbours_are_those_of_a_loop(films, tmp_path, values):  # noqa: F811
    settings = neighbours_config(**values)
    table = finetune(*new_model(), films, settings, 0, keep=tmp_path).set_index('clip')
    clips = features_by_hand(films, settings)
    train, tested = films.select(split='train'), films.select(split='test')
    assert list(table.index) == [films.clips[i]['clip'] for i in tested]
    for i in tested:
        similarity = {k: cosine(clips[i], clips[k]) for k in train}
        nearest = sorted(train, key=similarity.get, reverse=True)[:5]
        labels = [films.clips[k]['label'] for k in nearest]
        row = table.loc[films.clips[i]['clip']]
        assert json.loads(row.neighbours) == labels
        assert row.predicted == labels[0]
        assert row.confidence == pytest.approx(similarity[nearest[0]], abs=2e-5)
    network, _ = load_network(tmp_path/'test.pt')
    expected = torch.stack([clips[k]/clips[k].norm() for k in train]).float()
    torch.testing.assert_close(network.memory, expected, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_encoders_changes(films, tmp_path):  # noqa: F811
    model, run = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finetune(model, run, films, neighbours_config(features='local'), 0, keep=tmp_path)
    network, _ = load_network(tmp_path/'test.pt')
    for name, value in network.features.encoders['local'].state_dict().items():
        assert torch.equal(value, before[f'local_encoder.{name}'])


def test_fakes_are_ranked_by_how_much_nearer_the_fakes_are(films):  # noqa: F811
    names = dict(A='REAL', B='FAKE')
    films.clips = [row | dict(label=names[row['label']]) for row in films.clips]
    settings = neighbours_config(target='fake', features='local')
    table = finetune(*new_model(), films, settings, 0).set_index('clip')
    clips = features_by_hand(films, settings)
    for i, row in enumerate(films.clips):
        if row['split'] == 'test':
            best = dict(REAL=-1.0, FAKE=-1.0)
            for k, other in enumerate(films.clips):
                if other['split'] == 'train':
                    best[other['label']] = max(best[other['label']], cosine(clips[i], clips[k]))
            found = table.loc[row['clip']]
            assert found.logit == pytest.approx(best['FAKE'] - best['REAL'], abs=2e-5)
            assert found.predicted == max(best, key=best.get)
    assert 0 <= task_scores(table.reset_index()).loc['auc', 'value'] <= 1


def predictions(clips, seed=0):
    "Predictions with five neighbours of six classes."
    rng = np.random.default_rng(seed)
    nearest = rng.choice(list('abcdef'), (clips, 5))
    return pd.DataFrame(dict(
        split=np.where(np.arange(clips) < 30, 'one', 'two'), clip=[f'c{k}' for k in range(clips)], group='',
        label=rng.choice(list('abcdef'), clips), predicted=nearest[:, 0],
        neighbours=[json.dumps(list(row)) for row in nearest]))


def test_recall_at_one_and_five_counted_by_hand():
    table = predictions(50)
    at_one, at_five = [], []
    for split in ('one', 'two'):
        rows = [row for row in table.itertuples() if row.split == split]
        at_one.append(sum(json.loads(row.neighbours)[0] == row.label for row in rows)/len(rows))
        at_five.append(sum(row.label in json.loads(row.neighbours) for row in rows)/len(rows))
    scores = task_scores(table)
    assert scores.loc['top1', 'value'] == pytest.approx(sum(at_one)/2)
    assert scores.loc['top5', 'value'] == pytest.approx(sum(at_five)/2)
    assert scores.loc['top5', 'value'] > scores.loc['top1', 'value']


def test_settings_in_one_file_keep_their_own_metrics(tmp_path):
    "A file that also holds a setting without neighbours, as the stage writes it."
    plain = predictions(50, 1).drop(columns='neighbours').assign(setting='plain')
    pd.concat([plain, predictions(50).assign(setting='neighbours')]).to_csv(tmp_path/'predictions.csv', index=False)
    found = {setting: list(task_scores(rows).index)
             for setting, rows in read_predictions(tmp_path/'predictions.csv').groupby('setting')}
    assert found == dict(plain=['top1'], neighbours=['top1', 'top5'])


@pytest.mark.parametrize('values, message', [
    (dict(choose=[dict(lr=0.1)]), 'trains nothing'),
    (dict(probe=True, encoder_layers='sum'), 'trains nothing')])
def test_what_would_be_trained_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        neighbours_config(**values)


def test_a_label_without_a_training_clip_is_named(films):  # noqa: F811
    films.clips = [row | (dict(label='C') if row['split'] == 'test' else {}) for row in films.clips]
    with pytest.raises(InputError, match="label 'C', which no training clip has"):
        finetune(*new_model(), films, neighbours_config(), 0)
