"""A dataset with everything that can be wrong: each fault is one row of rejected.csv, and the rest is used."""
import json
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from glcm.core import InputError
from glcm.data.audio import AudioConfig
from glcm.data.catalogue import read_catalogue
from glcm.data.miniature import write_world
from glcm.data.preprocess import ClipConfig, preprocess
from glcm.data.shards import ClipStore, StoreConfig
from glcm.data.video import write_video

AUDIO = AudioConfig(sample_rate=24000, bands=80, window=1024, hop=200)
STORE = StoreConfig(container='h264', crf=20, keyframe=16)
CLIP = ClipConfig(fps=10, short_side=64, max_rejected=0.9)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')/'data'
    write_world(folder, workers=0, train=9, validate=1, speech=0, held_out=2, recordings=1)
    return folder


@pytest.fixture
def kinetics(world, tmp_path):
    "A private copy of the dataset and its catalogue."
    shutil.copytree(world/'kinetics700', tmp_path/'kinetics700')
    return tmp_path/'kinetics700', read_catalogue('kinetics700', tmp_path/'kinetics700')


def test_each_fault_is_one_row(kinetics, tmp_path):
    folder, catalogue = kinetics
    files = [folder/path for path in catalogue.path]
    files[0].write_bytes(b'')
    files[1].write_text('not a video')
    files[2].write_bytes(files[2].read_bytes()[:3000])
    files[3].unlink()
    write_video(files[4], np.zeros((30, 64, 64, 3), np.uint8))
    write_video(files[5], np.zeros((9, 64, 64, 3), np.uint8), np.zeros(21600, np.float32))
    catalogue.loc[6, 'path'] = '../../params.yaml'
    rejected = preprocess(catalogue, folder, tmp_path/'out', CLIP, AUDIO, STORE, 16)
    assert Counter(rejected.reason) == {'does not decode': 3, 'missing file': 1, 'no audio': 1, 'too short': 1, 'unsafe path': 1}
    assert rejected['clip'].tolist() == catalogue['clip'][:7].tolist()
    assert pd.read_csv(tmp_path/'out'/'rejected.csv').equals(rejected)
    store = ClipStore(tmp_path/'out')
    assert [row['clip'] for row in store.clips] == catalogue['clip'][7:].tolist()
    assert all(len(store.frames(i)) == store.clips[i]['steps'] == store.mel(i).shape[1]/12 for i in range(len(store)))


def test_too_many_faults_fail_and_leave_nothing(kinetics, tmp_path):
    folder, catalogue = kinetics
    for path in catalogue.path[:5]: (folder/path).write_bytes(b'')
    strict = ClipConfig(fps=10, short_side=64, max_rejected=0.2)
    with pytest.raises(InputError, match=r'5 of 10 clips cannot be used \(5 x does not decode\)'):
        preprocess(catalogue, folder, tmp_path/'out', strict, AUDIO, STORE, 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.out.unfinished', 'kinetics700']
    assert len(pd.read_csv(tmp_path/'.out.unfinished'/'rejected.csv')) == 5


def test_missing_and_empty_datasets_are_named(tmp_path):
    with pytest.raises(InputError, match='kinetics700: no folder .*put the dataset there'):
        read_catalogue('kinetics700', tmp_path/'kinetics700')
    (tmp_path/'vggss').mkdir()
    with pytest.raises(InputError, match='vggss: .* lists no clips; expected vggss.json'):
        read_catalogue('vggss', tmp_path/'vggss')
    with pytest.raises(InputError, match='dvc repro preprocess@kinetics700'): ClipStore(tmp_path/'kinetics700')


def test_sound_only_dataset(world, tmp_path):
    catalogue = read_catalogue('esc50', world/'esc50')
    preprocess(catalogue, world/'esc50', tmp_path/'out', CLIP, AUDIO, STORE, 16)
    store = ClipStore(tmp_path/'out')
    assert len(store) == 50 and 'height' not in store.clips[0]
    assert store.mel(0).shape == (80, 600) and store.clips[0]['steps'] == 50


def test_boxes_survive(world, tmp_path):
    preprocess(read_catalogue('vggss', world/'vggss'), world/'vggss', tmp_path/'out', CLIP, AUDIO, STORE, 16)
    official = json.loads((world/'vggss'/'vggss.json').read_text())
    assert [row['boxes'] for row in ClipStore(tmp_path/'out').clips] == [item['bbox'] for item in official]
