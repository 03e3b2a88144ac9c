"""Real talkers and real sounds where they are there, and the linear model on talkers of whom everything is known."""
from pathlib import Path

import numpy as np
import pytest

from glcm.core import InputError, root
from glcm.datasets.catalogue import leaks, read_catalogue
from glcm.tasks.linear import collect_sums, in_context, linear_fit, measure_linear, mouth_pixels, ridge, sound_bands

SHARED = root().parent/'shared'/'data'


def needs(name):
    return pytest.mark.skipif(not (SHARED/name).is_dir(), reason=f'the recordings of {name} are not in ../shared/data')


# -- recordings --------------------------------------------------------------------------------------------------------

@needs('lrwar')
def test_no_presenter_is_on_two_sides():
    table = read_catalogue('lrwar', SHARED/'lrwar')
    assert len(table) == 1525 and table.problem.isna().all() and leaks(table).empty
    assert table.split.value_counts().to_dict() == dict(train=1110, validate=143, test=272)
    assert table.groupby('split').group.nunique().to_dict() == dict(test=5, train=22, validate=5)
    boxes = np.array([box for boxes in table.boxes for box in boxes])
    assert (boxes[:, :2] < boxes[:, 2:]).all() and (boxes > 0).all() and (boxes < 1).all()
    assert abs((boxes[:, 0] + boxes[:, 2]).mean()/2 - 0.5) < 0.02 # the mouths are in the middle


@needs('esc50_fold4')
def test_sources_are_dealt_out_so_that_every_class_can_be_learned():
    table = read_catalogue('esc50_sources', SHARED/'esc50_fold4')
    assert table.label.nunique() == 49 and 'washing_machine' not in set(table.label)
    assert leaks(table).empty and set(table.fold) == {1, 2, 3, 4, 5}
    for fold in range(1, 6):
        assert set(table.label[table.fold == fold]) <= set(table.label[table.fold != fold])
    assert table.fold.value_counts().min() > 60


# -- the linear model --------------------------------------------------------------------------------------------------

class Talkers:
    "Clips of 30 frames in which the brightness of the mouth is the loudness of the sound."
    folder = Path('talkers')

    def __init__(self, clips=60, noise=0.0):
        rng = np.random.default_rng(0)
        splits = ['train', 'validate', 'test']
        self.clips = [dict(clip=f'c{k}', group=f's{k % 12}', split=splits[k % 12//4], steps=30, boxes=[[0.4, 0.6, 0.6, 0.8]])
                      for k in range(clips)]
        self.loudness = rng.random((clips, 30)).astype(np.float32)
        self.hiss = noise*rng.normal(size=(clips, 10, 30)).astype(np.float32)

    def select(self, split):
        return [k for k, row in enumerate(self.clips) if row['split'] == split]

    def planes(self, i, start=0, stop=30):
        planes = np.full((30, 96, 64), 100, np.uint8)
        planes[:, 38:52, 25:39] = (55 + 200*self.loudness[i])[:, None, None].astype(np.uint8)
        return planes[start:stop]

    def mel(self, i, start, stop):
        bands = np.linspace(1, 2, 10)[:, None]*self.loudness[i] + self.hiss[i]
        return np.repeat(bands, 2, 1)[:, 2*start:2*stop].astype(np.float32)


def test_linear_model_finds_talkers_whose_mouths_are_their_loudness():
    offsets, matching, penalty = measure_linear(Talkers(), 16, count=8)
    assert offsets.within.all() and matching.matched.all()
    assert set(matching.group) == {f's{k}' for k in range(8, 12)} and offsets.chance.iloc[0] == pytest.approx(3/15)


def test_linear_model_is_at_chance_where_the_mouth_says_nothing():
    talkers = Talkers(240)
    talkers.loudness = np.random.default_rng(1).random((240, 30)).astype(np.float32)
    shown = Talkers(240)
    shown.mel = lambda i, start, stop: Talkers.mel(talkers, i, start, stop)
    offsets, matching, _ = measure_linear(shown, 16, count=8)
    assert offsets.within.mean() < 0.4 and matching.matched.mean() < 0.3


def test_linear_fit_is_the_correlation_of_a_loop():
    talkers = Talkers(24, noise=0.5)
    weights = ridge(collect_sums(talkers, talkers.select('train')), 1e-3)
    spans = [(8, 7), (9, 7), (8, 3)]
    found = linear_fit(weights, talkers, 16)((8, 7), spans)
    whole = in_context(mouth_pixels(talkers, 8)) @ weights
    predicted = whole[7:23] - whole[7:23].mean(0)
    for score, (k, start) in zip(found, spans):
        actual = sound_bands(talkers, (k, start, start + 16))
        by_hand = np.corrcoef(predicted.flatten(), actual.flatten())[0, 1]
        assert score == pytest.approx(by_hand, abs=1e-5)


def test_clips_without_mouths_or_splits_are_named():
    talkers = Talkers(24)
    talkers.clips[0]['boxes'] = None
    with pytest.raises(InputError, match='clip c0 of talkers has no box of a mouth'):
        collect_sums(talkers, [0])
    for missing in ('train', 'test'):
        talkers = Talkers(24)
        talkers.clips = [row for row in talkers.clips if row['split'] != missing]
        with pytest.raises(InputError, match=f"no clips of the split '{missing}'"):
            measure_linear(talkers, 16)


def test_linear_model_needs_no_validation_clips():
    talkers = Talkers(60)
    talkers.clips = [row | dict(split='test' if row['split'] == 'validate' else row['split']) for row in talkers.clips]
    offsets, matching, _ = measure_linear(talkers, 16, count=8)
    assert offsets.within.all() and matching.matched.all()
    assert set(matching.group) == {f's{k}' for k in range(4, 12)}
