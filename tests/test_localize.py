"""Localization against the published evaluation, written as loops; pictures and stages of datasets without boxes."""
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from torch.nn import functional as F

from glcm.attention import attention_scores, attention_to_frame
from glcm.core import InputError, root
from glcm.data.clip import ClipConfig
from glcm.data.preprocess import preprocess
from glcm.data.shards import ClipStore, StoreConfig
from glcm.datasets.catalogue import read_catalogue
from glcm.miniature.world import write_world
from glcm.model import GLCM
from glcm.report.figures import plot_attention
from glcm.training.checkpoints import save_checkpoint
from glcm.training.config import run_config
from glcm.tasks.attend import attend_clips
from glcm.tasks.localize import (
    attention_heatmap, evaluation_clips, local_embeddings, localize, measure_synchronisation,
    middle_span, score_heatmap, summarise_localization)
from glcm.tasks.metrics import above_half_range, above_median, baseline_maps, box_weights, ciou
from glcm.tasks.statistics import paired_difference, task_scores
from glcm.testing import tiny_clips, tiny_params

RUN = run_config(tiny_params(), 'glcm', 0)


def new_model():
    torch.manual_seed(0)
    return GLCM(RUN.model).eval()


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    return tmp_path_factory.mktemp('clips')


@pytest.fixture(scope='module')
def boxed(shards):
    return ClipStore(tiny_clips(shards, 'vggss', held_out=3))


@pytest.fixture(scope='module')
def speech(shards):
    return ClipStore(tiny_clips(shards, 'avspeech', speech=4))


def decoded(source, reader, out):
    "A folder as the stage decodes it."
    config, store = ClipConfig(fps=10, short_side=64, max_rejected=0), StoreConfig(container='h264', crf=22, keyframe=16)
    preprocess(read_catalogue(reader, source), source, out, config, RUN.audio, store, RUN.views.frames)
    return ClipStore(out)


@pytest.fixture(scope='module')
def sounds(shards, tmp_path_factory):
    "Kinetics-Sounds: a list for training alone, of which one film in four is of an action that cannot be heard."
    source = tmp_path_factory.mktemp('source')/'kinetics700'
    write_world(source.parent, dict(kinetics700=dict(train=4)), workers=0)
    for path in (source/'train').glob('*/*.mp4'): # out of the folders of the drawn labels
        path.rename(source/'train'/path.name)
    table = pd.read_csv(source/'train.csv')
    labels = ['playing guitar', 'tapping pen', 'yoga', 'singing']
    table.assign(label=labels).to_csv(source/'train.csv', index=False)
    (source/'validate.csv').unlink()
    return decoded(source, 'kinetics_sounds', shards/'kinetics_sounds')


def with_clips(store, change):
    "The same store with other rows of clips."
    changed = ClipStore(store.folder)
    changed.clips = [row | change(k, row) for k, row in enumerate(store.clips)]
    return changed


def holds(box, x, y, width, height):
    "Whether the centre of a pixel lies in a box."
    x1, y1, x2, y2 = box
    return x1*width <= x + 0.5 < x2*width and y1*height <= y + 0.5 < y2*height


def published_ciou(heatmap, boxes, per_annotator, threshold):
    "cIoU pixel by pixel: annotators' boxes added up, at most 1; outside of all boxes, the region counts in full."
    height, width = heatmap.shape
    inside = total = 0.0
    for y in range(height):
        for x in range(width):
            weight = min(1.0, sum(per_annotator for box in boxes if holds(box, x, y, width, height)))
            high = heatmap[y, x] >= threshold
            inside += weight*high
            total += weight
            if high and weight == 0:
                total += 1.0
    return inside/total


@pytest.mark.parametrize('annotators, weight', [(1, 1.0), (2, 1.0), (2, 0.5), (3, 0.5)])
def test_ciou_is_the_published_one(annotators, weight):
    rng = np.random.default_rng(annotators)
    for _ in range(10):
        heatmap = rng.normal(size=(22, 30)).cumsum(0).cumsum(1)
        corners = np.sort(rng.random((annotators, 2, 2)), axis=2)
        boxes = [[x[0], y[0], x[1], y[1]] for x, y in corners]
        weights = box_weights([[*box, weight] for box in boxes], *heatmap.shape)
        if weights.sum() == 0:
            continue
        scaled = (heatmap - heatmap.min())/(heatmap.max() - heatmap.min())
        median = np.sort(heatmap.flatten())[int(heatmap.shape[0]*heatmap.shape[1]*0.5)]
        half_range = published_ciou(scaled, boxes, weight, 0.5)
        assert ciou(above_half_range(heatmap), weights) == pytest.approx(half_range)
        upper_half = published_ciou(heatmap, boxes, weight, median)
        assert ciou(above_median(heatmap), weights) == pytest.approx(upper_half)


def test_boxes_of_four_numbers_count_fully():
    boxes = [[0.1, 0.2, 0.6, 0.7], [0.3, 0.1, 0.9, 0.5]]
    weights = box_weights(boxes, 40, 50)
    assert (weights == box_weights([[*box, 1.0] for box in boxes], 40, 50)).all()
    assert set(np.unique(weights)) == {0, 1}


def test_a_small_box_cannot_be_found_with_half_of_the_frame():
    box = [[0.3, 0.3, 0.7, 0.7]]
    scores = score_heatmap(baseline_maps(60, 60, 'a')['centre'], box)
    assert scores['ciou'] > 0.6
    assert scores['ciou_median'] == pytest.approx(0.16/0.5, abs=0.01)


def test_the_peak_may_lie_in_one_annotators_box():
    heatmap = np.zeros((10, 10))
    heatmap[8, 8] = 1
    assert score_heatmap(heatmap, [[0, 0, 0.5, 0.5, 0.5], [0.7, 0.7, 1, 1, 0.5]])['pointing']
    assert not score_heatmap(heatmap, [[0, 0, 0.5, 0.5, 0.5], [0.1, 0, 0.5, 0.5, 0.5]])['pointing']


def test_scores_do_not_saturate(boxed):
    "Raw dot products of hundreds: attention is zero almost everywhere, and its logarithm a plain."
    config = replace(RUN.model, normalize=False, attention_temperature=1.0)
    torch.manual_seed(0)
    model = GLCM(config).eval()
    with torch.no_grad():
        model.project['video_global'].weight.mul_(3000)
    video, audio = middle_span(boxed, 0, RUN.views.frames)
    with torch.inference_mode():
        embeddings = model(video, audio)
    scores = attention_scores(embeddings.audio_global, embeddings.video_global, 1.0)
    assert (embeddings.attention == 0).sum() > 10
    assert len(scores.unique()) == scores.numel()
    sound = embeddings.audio_global[0].double()
    cells = embeddings.video_global[0].double()
    by_hand = torch.zeros(config.grid, config.grid, dtype=torch.double)
    for y in range(config.grid):
        for x in range(config.grid):
            by_hand[y, x] = (sound*cells[:, y, x]).sum()
    torch.testing.assert_close(scores[0].double(), by_hand, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(scores.flatten(1).softmax(1), embeddings.attention.flatten(1))
    heatmap = attention_heatmap(model, video, audio)
    expected = F.interpolate(scores[None], video.shape[-2:], mode='bilinear', align_corners=False)[0, 0]
    assert np.allclose(heatmap, expected.numpy())
    assert len(np.unique(heatmap)) > 0.9*heatmap.size


def test_local_embeddings_are_the_models(boxed):
    span = middle_span(boxed, 0, RUN.views.frames)
    model = new_model()
    with torch.inference_mode():
        embeddings = model(*span)
    video, audio = local_embeddings(model, *span)
    assert torch.equal(video, embeddings.video_local[0]) and torch.equal(audio, embeddings.audio_local[0])
    assert video.shape == (16, RUN.views.frames)
    assert audio.shape == (16, RUN.views.frames*RUN.model.slices_per_step)


def test_localization_has_what_comparisons_need(boxed):
    def half_weight(k, row):
        return dict(boxes=[[*box, 0.5] for box in row['boxes']])

    boxed = with_clips(boxed, half_weight)
    scores = localize(new_model(), RUN, boxed)
    own, centre = (scores[scores.method == method] for method in ('model', 'centre'))
    assert scores['clip'].nunique() == 3
    assert set(scores.group) == {row['group'] or '' for row in boxed.clips}
    table = summarise_localization(scores)
    difference = paired_difference(own, centre, samples=10).difference.to_dict()
    assert difference == pytest.approx((table.loc['model'] - table.loc['centre']).to_dict())
    assert task_scores(own, samples=10).value.to_dict() == pytest.approx(table.loc['model'].to_dict())
    synchronisation = measure_synchronisation(new_model(), RUN, boxed)
    metrics = task_scores(synchronisation, samples=10).index
    assert set(metrics) == {'synchronisation', 'synchronisation_shifted'}


def test_clips_without_boxes_among_others_are_named(boxed):
    boxed = with_clips(boxed, lambda k, row: dict(boxes=None) if k == 1 else {})
    with pytest.raises(InputError, match=f"clip {boxed.clips[1]['clip']} of .* has no boxes"):
        localize(new_model(), RUN, boxed)


def test_peaks_on_a_silent_face_are_counted(shards, tmp_path):
    "The mouth of every speaker, and a silent face where there is one: as a loop over pixels finds them."
    write_world(tmp_path, dict(talkers=dict(held_out=5)), workers=0)
    store, model = decoded(tmp_path/'talkers', 'vggss', shards/'talkers'), new_model()
    scores = localize(model, RUN, store)
    scores = scores[scores.method == 'model'].set_index('clip')
    beside = []
    for i, clip in enumerate(store.clips):
        heatmap = attention_heatmap(model, *middle_span(store, i, RUN.views.frames))
        height, width = heatmap.shape
        y, x = divmod(int(heatmap.argmax()), width)
        row = scores.loc[clip['clip']]
        assert row.on_mouth == holds(clip['others']['mouth'][0], x, y, width, height)
        assert pd.isna(row.on_silent) == (clip['label'] == 'alone')
        if 'silent' in clip['others']:
            assert row.on_silent == holds(clip['others']['silent'][0], x, y, width, height)
            beside.append(holds(clip['boxes'][0], x, y, width, height))
    assert 0 < len(beside) < 5
    metrics = summarise_localization(scores.reset_index()).loc['model']
    assert metrics.beside_silent == np.mean(beside)


def test_clips_for_evaluation(speech, boxed):
    def choose(store, **pretrain):
        return evaluation_clips(store, replace(RUN, pretrain=replace(RUN.pretrain, **pretrain)))

    assert choose(boxed) == ([0, 1, 2], 'test clips')
    assert choose(speech) == ([0, 1, 2, 3], 'clips of pretraining')
    assert choose(speech, datasets=['kinetics700']) == ([0, 1, 2, 3], 'clips that pretraining did not use')
    unused, name = choose(speech, datasets=['avspeech'], clips=3)
    assert len(unused) == 1 and name == 'clips that pretraining did not use'
    split = with_clips(speech, lambda k, row: dict(split='validate' if k == 2 else 'train'))
    assert choose(split) == ([2], 'validation clips')


def test_a_picture_without_boxes_and_scores(speech):
    for scores in (None, localize(new_model(), RUN, speech)):
        _, name = evaluation_clips(speech, RUN)
        figure = plot_attention(attend_clips(new_model(), RUN, speech, scores, count=3), f'avspeech, {name}')
        assert figure.get_suptitle() == 'avspeech, clips of pretraining'
        assert len(figure.axes) == 6
        assert not any(ax.patches for ax in figure.axes)
        plt.close(figure)


def test_weighted_boxes_are_drawn(boxed):
    boxes = [[0.1, 0.1, 0.5, 0.5, 0.5], [0.2, 0.2, 0.6, 0.6, 0.5]]
    boxed = with_clips(boxed, lambda k, row: dict(boxes=boxes))
    scores = localize(new_model(), RUN, boxed)
    figure = plot_attention(attend_clips(new_model(), RUN, boxed, scores, count=2), 'weighted boxes')
    assert [len(ax.patches) for ax in figure.axes] == [0, 0, 2, 2]
    plt.close(figure)


def bilinear(image, height, width):
    "A value for each pixel of a larger frame, between the centres of the four cells around it."
    def neighbours(pixel, pixels, cells):
        place = min(max((pixel + 0.5)*cells/pixels - 0.5, 0), cells - 1)
        low = int(place)
        return low, min(low + 1, cells - 1), place - low

    resampled = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            top, bottom, down = neighbours(y, height, image.shape[0])
            left, right, across = neighbours(x, width, image.shape[1])
            above = (1 - across)*image[top, left] + across*image[top, right]
            below = (1 - across)*image[bottom, left] + across*image[bottom, right]
            resampled[y, x] = (1 - down)*above + down*below
    return resampled


def test_overlay_is_a_second_softmax_resampled_to_the_frame():
    "Figure 3, with loops."
    attention = torch.randn(2, 16, 16, dtype=torch.float64).flatten(1).mul(3).softmax(1).view(2, 16, 16)
    overlays = attention_to_frame(attention, (36, 56)).numpy()
    for weights, overlay in zip(attention.numpy(), overlays):
        softened = np.exp(weights)/np.exp(weights).sum()
        np.testing.assert_allclose(overlay, bilinear(softened, 36, 56), rtol=1e-12)
        assert overlay.max()/overlay.min() < np.e


def test_stage_of_a_dataset_without_boxes(sounds, tmp_path, monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    save_checkpoint(tmp_path/'checkpoint.pt', RUN, 'no data', 0, new_model())
    places = dict(checkpoint=str(tmp_path/'checkpoint.pt'), clips=str(sounds.folder), out=str(tmp_path/'out'))
    stage = root()/'nbs'/'stages'/'localize.ipynb'
    executed = papermill.execute_notebook(stage, tmp_path/'executed.ipynb', places, progress_bar=False, cwd=str(root()))
    printed = ''
    for cell in executed.cells:
        for output in cell.get('outputs', []):
            printed += output.get('text', '')
    assert 'has boxes: there is nothing to score' in printed
    files = sorted(path.name for path in (tmp_path/'out').iterdir())
    tables = ['listening.csv', 'matching.csv', 'offsets.csv', 'scores.csv', 'synchronisation.csv']
    assert files == ['attention.png', *tables]
    scores = pd.read_csv(tmp_path/'out'/'scores.csv')
    synchronisation = pd.read_csv(tmp_path/'out'/'synchronisation.csv')
    assert scores.empty and summarise_localization(scores).loc['model'].isna().all()
    assert synchronisation['clip'].nunique() == 3, 'all but the one of yoga'
