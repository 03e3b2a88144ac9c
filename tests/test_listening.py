"""Maps with sounds of nothing, offsets of whole clips and mosaics, against loops; silence and noise in training."""
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from glcm.core import generator
from glcm.data.shards import ClipStore
from glcm.data.views import prepare_inputs
from glcm.losses import ALONE
from glcm.model import GLCM, glcm_loss
from glcm.tasks.listen import best_threshold, choosing_clips, measure_listening, similarity_maps, sounds_of
from glcm.tasks.localize import local_embeddings
from glcm.tasks.match import fit_of_sounds, longest_offset, measure_matching, measure_offsets, model_fit
from glcm.tasks.metrics import NEGATIVE_SOUNDS
from glcm.tasks.mosaic import choose_four, clips_by_speaker, mosaic, place_of_peak
from glcm.testing import tiny_clips, tiny_params
from glcm.training.config import run_config
from glcm.training.step import compute_gradients

RUN = run_config(tiny_params(), 'glcm', 0)
LISTENING = run_config(tiny_params(), 'glcm_silence', 0)
FRAMES = RUN.views.frames


def new_model(config=RUN.model):
    torch.manual_seed(0)
    return GLCM(config).eval()


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return ClipStore(tiny_clips(tmp_path_factory.mktemp('clips'), 'vggss', held_out=8))


def with_clips(store, change):
    "The same store with other rows of clips."
    changed = ClipStore(store.folder)
    changed.clips = [row | change(k, row) for k, row in enumerate(store.clips)]
    return changed


# -- it listens --------------------------------------------------------------------------------------------------------

def test_maps_of_several_sounds_are_those_of_each(store):
    model = new_model()
    video, sounds = sounds_of(store, 0, list(range(8)), RUN)
    maps = similarity_maps(model, video, sounds)
    for sound, found in zip(sounds, maps):
        with torch.inference_mode():
            embeddings = model(video, sound[None], local=False)
        by_hand = torch.einsum('d,dhw->hw', embeddings.audio_global[0], embeddings.video_global[0])
        torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)


def test_sounds_of_nothing_are_silent_loud_and_another_clips(store):
    "In the order of NEGATIVE_SOUNDS, after the own one."
    _, (own, silence, noise, other) = sounds_of(store, 0, list(range(8)), RUN)
    assert NEGATIVE_SOUNDS == ('silence', 'noise', 'other')
    torch.testing.assert_close(silence, torch.full_like(silence, -1.5)) # the floor of log-mel, as the encoder takes it
    assert noise.mean() > own.mean() > silence.mean() and noise.std() < own.std()
    middles = []
    for i in range(1, 8):
        _, sounds = sounds_of(store, i, list(range(8)), RUN)
        middles.append(torch.equal(sounds[0], other))
    assert sum(middles) == 1


def test_the_threshold_is_chosen_on_other_clips(store):
    choosing, scored = choosing_clips(store)
    assert choosing and scored and not set(choosing) & set(scored)
    table = measure_listening(new_model(), RUN, store)
    assert set(table['clip']) == {store.clips[i]['clip'] for i in scored}
    shuffled = with_clips(store, lambda k, row: dict(split='validate' if k < 3 else 'test'))
    assert choosing_clips(shuffled) == ([0, 1, 2], [3, 4, 5, 6, 7])


def test_clips_of_a_group_choose_or_are_scored_together(store):
    grouped = with_clips(store, lambda k, row: dict(split=None, group=f'g{k % 4}'))
    sides = []
    for numbers in choosing_clips(grouped):
        sides.append({grouped.clips[i]['group'] for i in numbers})
    choosing, scored = sides
    assert not choosing & scored
    assert choosing | scored == {'g0', 'g1', 'g2', 'g3'}


def test_threshold_has_the_highest_balanced_accuracy():
    rng = np.random.default_rng(0)
    own = rng.normal(1, 1, 20)
    other = rng.normal(0, 1, 60)
    peaks = pd.DataFrame(dict(sound=['own']*20 + ['noise']*60, peak=[*own, *other]))

    def accuracy(threshold):
        return ((own >= threshold).mean() + (other < threshold).mean())/2

    highest = max(accuracy(threshold) for threshold in np.linspace(-4, 4, 8001))
    assert accuracy(best_threshold(peaks)) == highest


def test_a_model_that_does_not_hear_is_at_one_half(store):
    model = new_model()
    with torch.no_grad():
        model.project['audio_global'].weight.zero_()
    table = measure_listening(model, RUN, store)
    shares = table.groupby('sound').active.mean()
    assert shares.nunique() == 1 # every sound has the same map


# -- silence and noise in training -------------------------------------------------------------------------------------

def batch(clips=4):
    torch.manual_seed(1)
    video = torch.randint(0, 256, (clips, 3, FRAMES, 56, 56), dtype=torch.uint8)
    audio = torch.randn(clips, RUN.model.bands, FRAMES*RUN.model.mel_per_step)
    return dict(video=video, audio=audio, shift=torch.zeros(clips, dtype=torch.long))


def gradients(run, accumulate=1):
    "Loss and gradients of a step; batch norm with fixed statistics, so that parts are the whole."
    run = replace(run, pretrain=replace(run.pretrain, accumulate=accumulate, precision='float32'))
    network = run.pretext.network(new_model(), run).eval()
    views = network.before_step(batch(), list('abcd'), 3, ALONE)
    losses, outputs = compute_gradients(network, views, run)
    return losses, outputs, [p.grad for p in network.parameters() if p.grad is not None]


def test_without_silence_everything_is_equal_bit_for_bit():
    losses, outputs, grads = gradients(RUN)
    assert RUN.loss.silence == 0 and outputs.audio_nothing is None
    model = new_model()
    views = batch()
    expected = glcm_loss(model(views['video'], views['audio']), replace(RUN.loss))
    assert losses['loss'].item() == pytest.approx(losses['global_loss'].item() + losses['local_loss'].item(), rel=1e-6)
    assert losses['global_loss'].item() == expected['global_loss'].item()
    pretext = RUN.pretext.network(new_model(), RUN)
    assert pretext.before_step(views, list('abcd'), 0, ALONE) is views


def exponentials(sounds, cells):
    "Of the scores of each clip's sound, added up over the cells."
    scores = torch.einsum('bd,bdhw->bhw', sounds, cells)/LISTENING.loss.temperature
    return scores.exp().sum((1, 2))


def test_silence_is_part_of_the_loss_and_of_no_other_number():
    plain, _, _ = gradients(RUN)
    with_silence, outputs, _ = gradients(LISTENING)
    for name in ('global_loss', 'local_loss'):
        assert with_silence[name].item() == pytest.approx(plain[name].item(), rel=1e-5)
    fits = exponentials(outputs.audio_global, outputs.video_global)
    silent = exponentials(outputs.audio_nothing, outputs.video_global)
    expected = -(fits/(fits + silent)).log().mean()
    assert (with_silence['loss'] - plain['loss']).item() == pytest.approx(expected.item(), rel=1e-3)


def test_silence_in_parts_is_that_of_the_whole():
    whole, _, grads = gradients(LISTENING)
    parts, _, grads_of_parts = gradients(LISTENING, accumulate=2)
    assert parts['loss'].item() == pytest.approx(whole['loss'].item(), rel=1e-5)
    for one, other in zip(grads, grads_of_parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_sounds_of_nothing_depend_on_clip_and_step_alone():
    network = LISTENING.pretext.network(new_model(), LISTENING)

    def sounds(step, clips):
        return network.before_step(batch(len(clips)), clips, step, ALONE)['nothing']
    torch.testing.assert_close(sounds(3, list('abcd'))[2], sounds(3, ['c'])[0], rtol=0, atol=0)
    many = torch.stack([sounds(step, ['a'])[0] for step in range(40)])
    silent = (many + 1.5).abs().amax((1, 2)) < 1e-5
    assert 8 < silent.sum() < 32


def test_a_step_makes_silence_fit_less():
    network = LISTENING.pretext.network(new_model(), LISTENING).eval()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    views = network.before_step(batch(), list('abcd'), 0, ALONE)

    def peaks():
        "The mean peak of the maps of silence and noise."
        with torch.no_grad():
            outputs = network(views)
        maps = torch.einsum('bd,bdhw->bhw', outputs.audio_nothing, outputs.video_global)
        return maps.amax((1, 2)).mean().item()

    before = peaks()
    for _ in range(10):
        optimizer.zero_grad()
        network.loss(network(views), views)['loss'].backward()
        optimizer.step()
    assert peaks() < before - 0.1


# -- whole clips -------------------------------------------------------------------------------------------------------

def embedded(model, name, features):
    "Features (1, C, positions) as embeddings (D, positions) of length one."
    return F.normalize(model.project[name](features), dim=1)[0]


def attention_by_hand(model, frames, sound_features):
    "(1, 14, 14): the attention of the mean of some sounds (C, slices)."
    mean = sound_features.mean(-1)[None, :, None]
    sound = embedded(model, 'audio_global', mean)[:, 0]
    cells = embedded(model, 'video_global', model.global_features(frames).flatten(2))
    scores = sound @ cells/model.config.attention_temperature
    return scores.softmax(0).view(1, 14, 14)


def fit_by_hand(steps, slices, temperature):
    "The mean over the time steps of the logarithm of each step's sum over its three slices."
    total = 0
    for t in range(FRAMES):
        own = 0
        for m in range(3):
            score = steps[:, t] @ slices[:, 3*t + m]/temperature
            own += score.exp()
        total += own.log()
    return float(total)/FRAMES


def test_fit_of_sounds_is_that_of_a_loop(store):
    model, temperature = new_model(), RUN.loss.temperature
    planes = torch.from_numpy(store.planes(0, 0, FRAMES).copy())
    mels = torch.from_numpy(np.stack([store.mel(k, 0, FRAMES) for k in range(3)]))
    video, audio = prepare_inputs(planes[None], mels)
    found = fit_of_sounds(model, video, audio, temperature)
    with torch.inference_mode():
        frames = (video/255 - model.mean)/model.std
        features = model.audio_encoder(audio)
        attention = attention_by_hand(model, frames, features.mean(0))
        steps = embedded(model, 'video_local', model.local_features(frames, attention))
        for k in range(3):
            slices = embedded(model, 'audio_local', features[k:k + 1])
            assert found[k] == pytest.approx(fit_by_hand(steps, slices, temperature), rel=1e-3)


def test_the_own_sound_alone_is_that_of_the_model(store):
    "With one sound the attention is the model's own, and so are the local embeddings."
    model = new_model()
    planes = torch.from_numpy(store.planes(0, 0, FRAMES).copy())
    video, audio = prepare_inputs(planes[None], torch.from_numpy(store.mel(0, 0, FRAMES))[None])
    steps, slices = local_embeddings(model, video, audio)
    found = fit_of_sounds(model, video, audio, RUN.loss.temperature)
    expected = fit_by_hand(steps, slices, RUN.loss.temperature)
    assert found[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('true', [-2, 0, 1, 3])
def test_offsets_count_within_one_step(store, true):
    def fit(picture, sounds):
        "The best sound begins `true` steps later than the picture."
        _, start = picture
        return np.array([-abs(first - start - true) for _, first in sounds], float)

    table = measure_offsets(fit, store, [0, 1], FRAMES, 4)
    assert (table.predicted == true).all()
    assert (table.within == (abs(true) <= 1)).all()
    assert table.chance.iloc[0] == pytest.approx(3/9)


def test_a_model_that_counts_steps_finds_no_offset(store):
    "Sounds are encoded by themselves: whatever a network knows of positions in a span is the same for all."
    numbers = list(range(8))
    longest = longest_offset(store, numbers, FRAMES)
    assert longest == min(15, (min(row['steps'] for row in store.clips) - FRAMES)//2)
    silent = ClipStore(store.folder)

    def silence(i, start, stop):
        columns = (stop - start)*RUN.model.mel_per_step
        return np.full((RUN.model.bands, columns), -5, np.float32)

    silent.mel = silence
    scores = model_fit(new_model(), RUN, silent)((0, 10), [(0, start) for start in range(8, 13)])
    assert np.ptp(scores) < 1e-5


def test_other_sounds_are_of_other_groups(store):
    grouped = with_clips(store, lambda k, row: dict(group=f'g{k % 4}'))
    seen = []

    def fit(picture, sounds):
        seen.append([grouped.clips[k]['group'] for k, start in sounds])
        return np.arange(len(sounds), dtype=float)
    table = measure_matching(fit, grouped, list(range(8)), FRAMES, count=5)
    assert len(table) == 8 and not table.matched.any()
    for own, *others in seen:
        assert own not in others and len(others) == 4
    assert measure_matching(fit, grouped, list(range(8)), FRAMES, count=16).empty


# -- mosaics -----------------------------------------------------------------------------------------------------------

def places_of(part, whole):
    "Top and left of each place where one video (3, T, h, w) lies in a larger one."
    height, width = part.shape[2:]
    tops = range(0, whole.shape[2] - height + 1, 2)
    lefts = range(0, whole.shape[3] - width + 1, 2)
    places = []
    for top, left in product(tops, lefts):
        if torch.equal(whole[:, :, top:top + height, left:left + width], part):
            places.append((top, left))
    return places


def test_quarters_are_the_clips_as_they_are_cropped(store):
    "The third clip of a mosaic is below on the left, its box moves with the crop, and its sound is whole."
    box = [0.4, 0.4, 0.6, 0.6]
    talkers = with_clips(store, lambda k, row: dict(split='test', group=f's{k}', boxes=[box]))
    crop = RUN.views.crop
    video, sounds, boxes = mosaic(talkers, [3, 1, 4, 6], RUN.views, generator('crops', 5))
    assert video.shape == (1, 3, FRAMES, 2*crop, 2*crop)
    assert len(sounds) == len(boxes) == 4
    start = (talkers.clips[4]['steps'] - FRAMES)//2
    planes = torch.from_numpy(talkers.planes(4, start, start + FRAMES).copy())
    mel = torch.from_numpy(talkers.mel(4, start, start + FRAMES))
    whole, sound = prepare_inputs(planes[None], mel)
    (top, left), = places_of(video[0, :, :, crop:, :crop], whole[0])
    height, width = whole.shape[3:]
    x1, y1, *_ = boxes[2][0]
    assert [x1*crop + left, y1*crop + top] == pytest.approx([0.4*width, 0.4*height])
    assert torch.equal(sounds[2], sound)


def test_mosaics_of_one_kind_and_of_four_speakers(store):
    talkers = with_clips(store, lambda k, row: dict(split='test', group=f's{k}'))
    clips = clips_by_speaker(talkers, 'test')
    kinds = {f's{k}': 'f' if k < 4 else 'm' for k in range(7)} # the last is of no known kind
    for k in range(20):
        numbers, alike = choose_four(clips, kinds, 7, k)
        found = {kinds.get(talkers.clips[i]['group']) for i in numbers}
        assert len(set(numbers)) == 4
        assert alike == (k % 2 == 1)
        if alike: # there are only three of the other kind
            assert found == {'f'}
    again = choose_four(clips, kinds, 7, 3)
    assert again == choose_four(clips, kinds, 7, 3)
    assert again != choose_four(clips, kinds, 8, 3)
    unknown = [choose_four(clips, {}, 7, k) for k in range(20)]
    assert not any(alike for _, alike in unknown)


@pytest.mark.parametrize('row, column, expected', [(0, 0, 0), (3, 9, 1), (4, 0, 2), (7, 5, 3)])
def test_place_of_peak(row, column, expected):
    heatmap = np.zeros((8, 10))
    heatmap[row, column] = 1
    quarter, x, y = place_of_peak(heatmap)
    assert quarter == expected and 0 <= x < 1 and 0 <= y < 1
