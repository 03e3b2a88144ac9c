"""Saliency of motion: against a picture that is stopped a little, of stills, of the shipped network, and by the command."""
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from glcm.core import InputError
from glcm.data.shards import ClipStore
from glcm.export import load
from glcm.model import GLCM, glcm_loss, normalize_frames
from glcm.tasks.localize import localize, middle_span
from glcm.tasks.mosaic import choose_four, clips_by_speaker, for_each_sound, measure_mosaics
from glcm.tasks.saliency import main, motion_heatmap, motion_relevance, saliency_heatmap
from glcm.testing import tiny_clips, tiny_params
from glcm.training.checkpoints import save_checkpoint
from glcm.training.config import run_config


def config_of(variant='glcm', seed=0):
    return run_config(tiny_params(), variant, seed)


RUN = config_of()


def new_model(config=RUN):
    torch.manual_seed(config.seed)
    return GLCM(config.model).eval()


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return ClipStore(tiny_clips(tmp_path_factory.mktemp('clips'), 'vggss', held_out=12))


@pytest.mark.parametrize('variant', ['glcm', 'glcm_no_mil', 'glcm_motion', 'glcm_motion_clip', 'glcm_motion_near'])
def test_relevance_is_what_stopping_a_patch_costs(store, variant):
    config = config_of(variant)
    model = new_model(config).double()
    video, audio = middle_span(store, 0, config.views.frames)
    audio = audio.double()
    loss = replace(config.loss, local_negatives='all') # of one clip, uncut, all are those of the clip
    relevance = motion_relevance(model, video, audio, config.loss)

    frames = normalize_frames(video, model.mean, model.std)
    still = frames.mean(2, keepdim=True)
    patch = torch.zeros_like(frames)
    patch[..., 20:36, 30:50] = 1
    with torch.inference_mode():
        embeddings = model.embed_views(frames, model.audio_encoder(audio), local=True)

    def loss_of(stopped):
        with torch.inference_mode():
            features = model.local_features(frames + stopped*patch*(still - frames), embeddings.attention)
            changed = embeddings._replace(video_local=model.embed('video_local', features))
            return glcm_loss(changed, loss)['local_loss'].item()

    slope = (loss_of(1e-6) - loss_of(-1e-6))/2e-6
    assert relevance[20:36, 30:50].sum() == pytest.approx(slope, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_still_has_no_relevance(store):
    video, audio = middle_span(store, 0, RUN.views.frames)
    still = video[:, :, :1].expand_as(video)
    model = new_model()
    assert abs(motion_relevance(model, still, audio, RUN.loss)).max() < 1e-6
    assert motion_heatmap(model, still, audio).max() < 1e-6


def test_motion_is_the_variance_over_time(store):
    video, audio = middle_span(store, 1, RUN.views.frames)
    model = new_model()
    moving = video.clone()
    moving[...] = 128
    moving[:, :, ::2, 40:44, 20:24] = 255 # a square that flickers
    row, column = np.unravel_index(motion_heatmap(model, moving, audio).argmax(), moving.shape[-2:])
    assert 40 <= row < 44 and 20 <= column < 24


def test_the_shipped_network_hears_motion(store):
    model, config = load()
    of_saliency = localize(model, config, store, heatmap=partial(saliency_heatmap, loss=config.loss))
    of_motion = localize(model, config, store, heatmap=motion_heatmap)
    hits = [scores[scores.method == 'model'].pointing.sum() for scores in (of_saliency, of_motion)]
    assert hits[0] > hits[1], hits


def test_a_network_without_local_pathway_is_refused(store):
    model = new_model()
    model.trained = ('global', 'audio', 'projections')
    with pytest.raises(InputError, match='a saliency map needs local'):
        motion_relevance(model, *middle_span(store, 0, RUN.views.frames), RUN.loss)
    untrained = config_of('glcm_no_local') # random weights, of which every part counts as trained
    with pytest.raises(InputError, match='loss.local_weight is 0'):
        motion_relevance(new_model(untrained), *middle_span(store, 0, RUN.views.frames), untrained.loss)


def test_sound_of_another_length_is_refused(store):
    video, audio = middle_span(store, 0, RUN.views.frames)
    with pytest.raises(InputError, match='mel frames'):
        saliency_heatmap(new_model(), video, torch.cat([audio, audio], -1), RUN.loss)


def test_mosaics_take_the_map_that_is_asked_for(store):
    speakers = ClipStore(store.folder)
    speakers.clips = [row | dict(group=f's{k % 5}') for k, row in enumerate(store.clips)]
    clips = clips_by_speaker(speakers, 'test')
    model, seen = new_model(), []

    def lower_right(model, video, audio):
        seen.append(tuple(video.shape[-2:]))
        heatmap = np.zeros(seen[-1])
        heatmap[-1, -1] = 1
        return heatmap

    table = measure_mosaics(model, RUN.views, speakers, clips, {}, 2, 0, for_each_sound(lower_right))
    assert table.predicted.eq(3).all() and table.quarter.tolist() == 2*[False, False, False, True]
    assert seen == 8*[(2*RUN.views.crop,)*2]


def test_mouths_of_a_mosaic_may_be_among_the_others(store):
    speakers = ClipStore(store.folder)
    everywhere = [[0, 0, 1, 1]]
    speakers.clips = [row | dict(group=f's{k % 5}', others=dict(mouth=everywhere)) for k, row in enumerate(store.clips)]
    clips = clips_by_speaker(speakers, 'test')
    assert measure_mosaics(new_model(), RUN.views, speakers, clips, {}, 2, 0).fixed.all()


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoints')
    paths = {}
    for variant, seed in (('glcm', 0), ('glcm', 1), ('glcm_motion', 0)):
        config = config_of(variant, seed)
        paths[variant, seed] = folder/f'{variant}-{seed}.pt'
        save_checkpoint(paths[variant, seed], config, 'no data', 0, new_model(config))
    return {key: str(path) for key, path in paths.items()}


def test_the_command_writes_a_file_for_each_map(store, checkpoints, tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'notes.txt').write_text('keep me')
    main([str(store.folder), str(tmp_path/'out'), checkpoints['glcm', 0], checkpoints['glcm', 1]])
    assert (tmp_path/'out'/'notes.txt').read_text() == 'keep me'
    assert (tmp_path/'out'/'maps.png').stat().st_size
    tables = {path.stem: pd.read_csv(path) for path in (tmp_path/'out').glob('*.csv')}
    assert set(tables) == {'saliency', 'attention', 'motion'}
    for table in tables.values():
        assert len(table) == 24 and set(table.seed) == {0, 1}
    clip = tables['motion']['clip'].iloc[0]
    assert tables['motion'][tables['motion']['clip'] == clip].ciou.nunique() == 1 # no network
    assert not tables['saliency'].ciou.equals(tables['attention'].ciou)


def test_the_command_refuses_what_cannot_be_compared(store, checkpoints, tmp_path):
    out = tmp_path/'out'
    with pytest.raises(SystemExit, match='several variants'):
        main([str(store.folder), str(out), checkpoints['glcm', 0], checkpoints['glcm_motion', 0]])
    with pytest.raises(SystemExit, match='the same seed: 0, 0'):
        main([str(store.folder), str(out), checkpoints['glcm', 0], checkpoints['glcm', 0]])
    without = tiny_clips(tmp_path, 'esc50', recordings=1)
    with pytest.raises(SystemExit, match='no test clips with boxes'):
        main([str(without), str(out), checkpoints['glcm', 0]])
    assert not out.exists()
