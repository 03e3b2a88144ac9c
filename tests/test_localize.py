"""Localization against the published evaluation, written as loops; pictures and stages of datasets without boxes."""
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from torch.nn import functional as F

from glcm.attention import attention_scores
from glcm.core import InputError, root
from glcm.data.shards import ClipStore
from glcm.figures import plot_attention
from glcm.metrics import above_half_range, above_median, baseline_maps, box_weights, ciou, paired_difference, task_scores
from glcm.model import GLCM
from glcm.runs import run_config, save_checkpoint
from glcm.tasks.localize import evaluation_clips, localize, look, middle_span, score_map, summarise, synchronise
from glcm.testing import tiny_clips, tiny_params

RUN = run_config(tiny_params(), 'glcm', 0)


def new_model():
    torch.manual_seed(0)
    return GLCM(RUN.model).eval()


@pytest.fixture(scope='module')
def shards(tmp_path_factory): return tmp_path_factory.mktemp('clips')


@pytest.fixture(scope='module')
def boxed(shards): return ClipStore(tiny_clips(shards, 'vggss', held_out=3))


@pytest.fixture(scope='module')
def speech(shards): return ClipStore(tiny_clips(shards, 'avspeech', speech=4))


def published(heat, boxes, per_annotator, threshold):
    "cIoU pixel by pixel: annotators' boxes added up, at most 1; outside of all boxes, the region counts in full."
    height, width = heat.shape
    inside = total = 0.0
    for y in range(height):
        for x in range(width):
            weight = min(1.0, sum(per_annotator for x1, y1, x2, y2 in boxes if x1*width <= x + 0.5 < x2*width and y1*height <= y + 0.5 < y2*height))
            high = heat[y, x] >= threshold
            inside += weight*high
            total += weight + (1.0 if high and weight == 0 else 0.0)
    return inside/total


@pytest.mark.parametrize('annotators, weight', [(1, 1.0), (2, 1.0), (2, 0.5), (3, 0.5)])
def test_ciou_is_the_published_one(annotators, weight):
    rng = np.random.default_rng(annotators)
    for _ in range(10):
        heat = rng.normal(size=(22, 30)).cumsum(0).cumsum(1)
        corners = np.sort(rng.random((annotators, 2, 2)), axis=2)
        boxes = [[x[0], y[0], x[1], y[1]] for x, y in corners]
        weights = box_weights([[*box, weight] for box in boxes], *heat.shape)
        if weights.sum() == 0: continue
        scaled = (heat - heat.min())/(heat.max() - heat.min())
        median = np.sort(heat.flatten())[int(heat.shape[0]*heat.shape[1]*0.5)]
        assert ciou(above_half_range(heat), weights) == pytest.approx(published(scaled, boxes, weight, 0.5))
        assert ciou(above_median(heat), weights) == pytest.approx(published(heat, boxes, weight, median))


def test_boxes_of_four_numbers_count_fully():
    boxes = [[0.1, 0.2, 0.6, 0.7], [0.3, 0.1, 0.9, 0.5]]
    assert (box_weights(boxes, 40, 50) == box_weights([[*box, 1.0] for box in boxes], 40, 50)).all()
    assert set(np.unique(box_weights(boxes, 40, 50))) == {0, 1}


def test_a_small_box_cannot_be_found_with_half_of_the_frame():
    box = [[0.3, 0.3, 0.7, 0.7]]
    heat = baseline_maps(60, 60, 'a')['centre']
    found = score_map(heat, box)
    assert found['ciou'] > 0.6 and found['ciou_median'] == pytest.approx(0.16/0.5, abs=0.01)


def test_the_peak_may_lie_in_one_annotators_box():
    heat = np.zeros((10, 10))
    heat[8, 8] = 1
    assert score_map(heat, [[0, 0, 0.5, 0.5, 0.5], [0.7, 0.7, 1, 1, 0.5]])['pointing']
    assert not score_map(heat, [[0, 0, 0.5, 0.5, 0.5], [0.1, 0, 0.5, 0.5, 0.5]])['pointing']


def test_scores_do_not_saturate(boxed):
    "Raw dot products of hundreds: attention is zero almost everywhere, and its logarithm a plain."
    config = replace(RUN.model, normalize=False, attention_temperature=1.0)
    torch.manual_seed(0)
    model = GLCM(config).eval()
    with torch.no_grad(): model.project['video_global'].weight.mul_(3000)
    video, audio = middle_span(boxed, 0, RUN.views.frames)
    with torch.inference_mode(): embeddings = model(video, audio)
    scores = attention_scores(embeddings.audio_global, embeddings.video_global, 1.0)
    assert (embeddings.attention == 0).sum() > 10 and len(scores.unique()) == scores.numel()
    by_hand = [[(embeddings.audio_global[0].double()*embeddings.video_global[0, :, y, x].double()).sum().item() for x in range(config.grid)]
               for y in range(config.grid)]
    torch.testing.assert_close(scores[0].double(), torch.tensor(by_hand, dtype=torch.double), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(scores.flatten(1).softmax(1), embeddings.attention.flatten(1))
    heat, *_ = look(model, video, audio)
    expected = F.interpolate(scores[None], video.shape[-2:], mode='bilinear', align_corners=False)[0, 0]
    assert np.allclose(heat, expected.numpy()) and len(np.unique(heat)) > 0.9*heat.size


def test_localization_has_what_comparisons_need(boxed):
    boxed = ClipStore(boxed.folder)
    boxed.clips = [row | dict(boxes=[[*box, 0.5] for box in row['boxes']]) for row in boxed.clips]
    scores = localize(new_model(), RUN, boxed)
    own, centre = (scores[scores.method == method] for method in ('model', 'centre'))
    assert scores['clip'].nunique() == 3 and set(scores.group) == {row['group'] or '' for row in boxed.clips}
    found, table = paired_difference(own, centre, samples=10), summarise(scores)
    assert found.difference.to_dict() == pytest.approx((table.loc['model'] - table.loc['centre']).to_dict())
    assert task_scores(own, samples=10).value.to_dict() == pytest.approx(table.loc['model'].to_dict())
    sync = synchronise(new_model(), RUN, boxed)
    assert set(task_scores(sync, samples=10).index) == {'synchronisation', 'synchronisation_shifted'}


def test_clips_without_boxes_among_others_are_named(boxed):
    boxed = ClipStore(boxed.folder)
    boxed.clips = [row | (dict(boxes=None) if k == 1 else {}) for k, row in enumerate(boxed.clips)]
    with pytest.raises(InputError, match=f"clip {boxed.clips[1]['clip']} of .* has no boxes"): localize(new_model(), RUN, boxed)


def test_clips_to_look_at(speech, boxed):
    def choose(store, **pretrain): return evaluation_clips(store, replace(RUN, pretrain=replace(RUN.pretrain, **pretrain)))
    assert choose(boxed) == ([0, 1, 2], 'test clips')
    assert choose(speech) == ([0, 1, 2, 3], 'clips of pretraining')
    assert choose(speech, datasets=['kinetics700']) == ([0, 1, 2, 3], 'clips that pretraining did not use')
    some, name = choose(speech, datasets=['avspeech'], clips=3)
    assert len(some) == 1 and name == 'clips that pretraining did not use'
    split = ClipStore(speech.folder)
    split.clips = [row | dict(split='validate' if k == 2 else 'train') for k, row in enumerate(speech.clips)]
    assert choose(split) == ([2], 'validation clips')


def test_a_picture_without_boxes_and_scores(speech):
    for scores in (None, localize(new_model(), RUN, speech)):
        figure = plot_attention(new_model(), RUN, speech, scores, clips=3)
        assert figure.get_suptitle() == 'avspeech, clips of pretraining' and len(figure.axes) == 6
        assert not any(ax.patches for ax in figure.axes)
        plt.close(figure)


def test_weighted_boxes_are_drawn(boxed):
    boxed = ClipStore(boxed.folder)
    boxed.clips = [row | dict(boxes=[[0.1, 0.1, 0.5, 0.5, 0.5], [0.2, 0.2, 0.6, 0.6, 0.5]]) for row in boxed.clips]
    scores = localize(new_model(), RUN, boxed)
    figure = plot_attention(new_model(), RUN, boxed, scores, clips=2)
    assert [len(ax.patches) for ax in figure.axes] == [0, 0, 2, 2]
    plt.close(figure)


def test_stage_of_a_dataset_without_boxes(speech, tmp_path, monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    save_checkpoint(tmp_path/'checkpoint.pt', RUN, 'no data', 0, new_model())
    places = dict(checkpoint=str(tmp_path/'checkpoint.pt'), clips=str(speech.folder), out=str(tmp_path/'out'))
    done = papermill.execute_notebook(root()/'nbs'/'stages'/'localize.ipynb', tmp_path/'done.ipynb', places, progress_bar=False, cwd=str(root()))
    printed = ''.join(output.get('text', '') for cell in done.cells for output in cell.get('outputs', []))
    assert 'has boxes: there is nothing to score' in printed
    assert sorted(path.name for path in (tmp_path/'out').iterdir()) == ['attention.png', 'scores.csv', 'synchronisation.csv']
    scores, sync = (pd.read_csv(tmp_path/'out'/name) for name in ('scores.csv', 'synchronisation.csv'))
    assert scores.empty and summarise(scores).loc['model'].isna().all() and sync['clip'].nunique() == 4
