"""Sliding windows: what flashes in time with a sound is found, a window is as if alone, and mosaics by the command."""
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from glcm.core import InputError
from glcm.data.shards import ClipStore
from glcm.model import GLCM, normalize_frames
from glcm.tasks.mosaic import main
from glcm.tasks.sliding import spread_scores, window_heatmaps, window_scores, window_starts
from glcm.testing import tiny_clips, tiny_params
from glcm.training.checkpoints import save_checkpoint
from glcm.training.config import run_config

RUN = run_config(tiny_params(), 'glcm_motion_clip', seed=0)
FRAMES, SIDE = RUN.views.frames, 32


def new_model():
    torch.manual_seed(0)
    return GLCM(RUN.model).eval()


class Brightness(nn.Module):
    "Frames (B, 3, T, h, w) to a point on a circle for each moment, turned by how bright its middle is."
    def forward(self, frames):
        middle = frames[..., 8:24, 8:24].mean((1, 3, 4))
        return torch.stack([middle.cos(), middle.sin()], 1)[..., None, None]


class Loudness(nn.Module):
    "Sounds (S, F, N) to such points, turned by how loud each slice is."
    def __init__(self, slices):
        super().__init__()
        self.slices = slices

    def forward(self, sounds):
        loudness = sounds.mean(1).unflatten(1, (self.slices, -1)).mean(-1)
        return torch.stack([loudness.cos(), loudness.sin()], 1)


def test_each_sound_finds_the_square_that_flashes_with_it():
    "Two squares flash in time with a sound each, a third stands still, and a fourth flashes alone."
    model = new_model()
    slices = FRAMES*RUN.model.slices_per_step
    model.local_encoder, model.audio_encoder = Brightness(), Loudness(slices)
    model.project['video_local'] = model.project['audio_local'] = nn.Identity()
    rng = np.random.default_rng(3)
    flashes = torch.from_numpy(rng.integers(0, 256, (3, FRAMES)).astype(np.uint8))
    corners = dict(zip([(16, 24), (64, 80), (64, 16)], flashes))
    video = torch.full((1, 3, FRAMES, 112, 128), 90, dtype=torch.uint8)
    video[..., 8:40, 80:112] = 255
    for (top, left), flash in corners.items():
        video[..., top:top + SIDE, left:left + SIDE] = flash[:, None, None]
    turns = normalize_frames(flashes[:2, None, :, None, None].expand(-1, 3, -1, -1, -1), model.mean, model.std).mean((1, 3, 4))
    sounds = turns.repeat_interleave(RUN.model.mel_per_step, 1)[:, None].expand(-1, RUN.model.bands, -1)
    maps = window_heatmaps(model, video, sounds, SIDE, RUN.loss)
    assert maps.shape == (2, 112, 128)
    for heatmap, (top, left) in zip(maps, corners):
        y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
        assert abs(y + 0.5 - (top + SIDE/2)) <= SIDE/4 and abs(x + 0.5 - (left + SIDE/2)) <= SIDE/4


def inputs(height, width, sounds=2):
    rng = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (1, 3, FRAMES, height, width), generator=rng, dtype=torch.uint8)
    return video, torch.randn(sounds, RUN.model.bands, RUN.model.mel_per_step*FRAMES, generator=rng)


def test_a_window_has_the_score_that_it_has_alone_and_so_has_a_sound():
    model = new_model()
    video, sounds = inputs(80, 104) # more windows than go through the encoder at once
    scores = window_scores(model, video, sounds, SIDE, RUN.loss)
    assert scores.shape == (2, 7, 10)
    for row, column in ((0, 0), (3, 9), (6, 4), (6, 9)):
        window = video[..., 8*row:8*row + SIDE, 8*column:8*column + SIDE]
        alone = window_scores(model, window, sounds[1:], SIDE, RUN.loss)
        assert scores[1, row, column] == pytest.approx(alone.item(), abs=1e-4)


def test_still_pictures_fit_no_better_than_chance():
    "Every moment looks the same: of 2 T - 1 candidates each is as likely as the others."
    video, sounds = inputs(64, 64)
    still = video[:, :, :1].expand(-1, -1, FRAMES, -1, -1).clone()
    scores = window_scores(new_model(), still, sounds, SIDE, RUN.loss)
    assert np.ptp(scores, (1, 2)).max() < 1e-4


@pytest.mark.parametrize('length, count', [(32, 1), (39, 1), (40, 2), (160, 17)])
def test_windows_stay_within_the_picture(length, count):
    starts = window_starts(length, SIDE)
    assert len(starts) == count and starts[-1] + SIDE <= length < starts[-1] + SIDE + 8


def test_scores_lie_at_the_centres_of_their_windows():
    scores = np.add.outer(np.arange(9.0), 10*np.arange(11.0)) # a plane, which smoothing leaves inside as it is
    heatmap = spread_scores(scores, (96, 112), SIDE)
    y, x = np.meshgrid(np.arange(28, 68), np.arange(28, 84), indexing='ij')
    np.testing.assert_allclose(heatmap[28:68, 28:84], (y + 0.5 - 16)/8 + 10*(x + 0.5 - 16)/8, atol=1e-9)


def test_what_cannot_be_scored_is_refused():
    video, sounds = inputs(48, 64)
    with pytest.raises(InputError, match='48 pixels is smaller than a window of 56'):
        window_scores(new_model(), video, sounds, 56, RUN.loss)
    no_local = run_config(tiny_params(), 'glcm_no_local', seed=0)
    with pytest.raises(InputError, match='local_weight is 0'):
        window_scores(new_model(), video, sounds, SIDE, no_local.loss)
    model = new_model()
    model.trained = ('global', 'audio', 'projections')
    with pytest.raises(InputError, match='a map of windows needs local'):
        window_scores(model, video, sounds, SIDE, RUN.loss)
    with pytest.raises(InputError, match='mel frames'):
        window_scores(new_model(), video, sounds[..., :-1], SIDE, RUN.loss)


@pytest.fixture(scope='module')
def talkers(tmp_path_factory):
    store = ClipStore(tiny_clips(tmp_path_factory.mktemp('clips'), 'avspeech', speech=8))
    store.clips = [row | dict(split='test', group=f's{k % 5}') for k, row in enumerate(store.clips)]
    return store


@pytest.fixture
def command(talkers, tmp_path, monkeypatch):
    "The command of mosaics, with the clips of five speakers."
    monkeypatch.setattr('glcm.tasks.mosaic.ClipStore', lambda folder: talkers)
    save_checkpoint(tmp_path/'checkpoint.pt', RUN, 'no data', 0, new_model())

    def run(*options):
        main([str(tmp_path/'checkpoint.pt'), 'clips', str(tmp_path/'out.csv'), '--count', '2', *options])
        return pd.read_csv(tmp_path/'out.csv')
    return run


def test_mosaics_of_any_size_and_length(command, monkeypatch):
    "Quarters of 40 pixels, of more frames than a view has: a view's windows, over all of the mosaic."
    seen = []

    def found(model, video, sounds, side, loss):
        seen.append((tuple(video.shape), tuple(sounds.shape), side))
        return np.zeros((len(sounds), *video.shape[-2:]))

    monkeypatch.setattr('glcm.tasks.mosaic.window_heatmaps', found)
    frames = FRAMES + RUN.model.global_frames
    table = command('--map', 'windows', '--crop', '40', '--frames', str(frames))
    assert len(table) == 8
    columns = frames*RUN.model.mel_per_step
    assert seen == 2*[((1, 3, frames, 80, 80), (4, RUN.model.bands, columns), RUN.views.crop)]


def test_mosaics_with_windows_to_the_end(command):
    table = command('--map', 'windows')
    assert len(table) == 8 and table.predicted.between(0, 3).all()
    assert table.equals(command('--map', 'windows'))


@pytest.mark.parametrize('options, message', [
    (('--crop', '4096'), 'a quarter cannot have 4096'), (('--crop', '5'), 'crop'), (('--frames', '4000'), 'a mosaic cannot have 4000'),
    (('--frames', '0'), 'frames'), (('--frames', str(FRAMES + 1)), 'do not spread evenly')])
def test_mosaics_that_cannot_be_made(command, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        command('--map', 'windows', *options)
    assert not (tmp_path/'out.csv').exists()
