"""A dataset with everything that can be wrong: each fault is one row of rejected.csv, and the rest is used."""
import inspect
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest

import glcm.data.preprocess as preprocessing
from glcm.core import InputError, read_study, root
from glcm.data.audio import AudioConfig
from glcm.data.clip import ClipConfig
from glcm.data.preprocess import preprocess, summary
from glcm.data.shards import ClipStore, StoreConfig
from glcm.data.table import training_order
from glcm.data.video import write_video
from glcm.datasets.catalogue import read_catalogue
from glcm.miniature.world import write_world

AUDIO = AudioConfig(sample_rate=24000, bands=80, window=1024, hop=200)
STORE = StoreConfig(container='h264', crf=20, keyframe=16)
CLIP = ClipConfig(fps=10, short_side=64, max_rejected=0.9)


def run_on(catalogue, folder, out, config):
    return preprocess(catalogue, folder, out, config, AUDIO, STORE, 16)


def clip_names(folder):
    return [row['clip'] for row in ClipStore(folder).clips]


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')/'data'
    datasets = dict(kinetics700=dict(train=9, validate=1), vggss=dict(held_out=2), esc50=dict(recordings=1))
    write_world(folder, datasets, workers=0)
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
    rejected = run_on(catalogue, folder, tmp_path/'out', CLIP)
    assert Counter(rejected.reason) == {
        'does not decode': 3, 'missing file': 1, 'no audio': 1, 'too short': 1, 'unsafe path': 1}
    assert rejected['clip'].tolist() == catalogue['clip'][:7].tolist()
    assert pd.read_csv(tmp_path/'out'/'rejected.csv').equals(rejected)
    store = ClipStore(tmp_path/'out')
    assert [row['clip'] for row in store.clips] == catalogue['clip'][7:].tolist()
    for i, row in enumerate(store.clips):
        assert len(store.frames(i)) == row['steps']
        assert store.mel(i).shape[1] == 12*row['steps']


def test_a_line_that_is_not_understood_is_one_row_of_the_rejected(kinetics, tmp_path):
    folder, _ = kinetics
    lines = (folder/'train.csv').read_text().splitlines()
    lines.insert(3, 'yoga,JIemsK_0lXc,1:40,1:50,train')
    (folder/'train.csv').write_text('\n'.join(lines))
    catalogue = read_catalogue('kinetics700', folder)
    rejected = run_on(catalogue, folder, tmp_path/'out', CLIP)
    said = 'train.csv, line 4: JIemsK_0lXc has no times in seconds'
    assert rejected.values.tolist() == [['train.csv, line 4', 'bad entry', said]]
    store = ClipStore(tmp_path/'out')
    assert len(store) == 10 and 'problem' not in store.clips[0]
    said = r'1 of 11 clips cannot be used \(1 x bad entry\), more than max_rejected = 0.05 allows'
    with pytest.raises(InputError, match=said):
        run_on(catalogue, folder, tmp_path/'strict', replace(CLIP, max_rejected=0.05))


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "A dataset of which every third film is damaged, its training clips in their order by chance, and the usable ones."
    folder = tmp_path_factory.mktemp('many')/'data'
    write_world(folder, dict(kinetics700=dict(train=24, validate=6)), workers=0)
    order = training_order(read_catalogue('kinetics700', folder/'kinetics700'))
    for path in order.path[::3]:
        (folder/'kinetics700'/path).write_bytes(b'damaged')
    whole = [clip for k, clip in enumerate(order['clip']) if k % 3]
    return folder/'kinetics700', order['clip'].tolist(), whole


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('wanted', [1, 4, 9, 16])
def test_rejected_clips_are_replaced_by_the_next(many, tmp_path, monkeypatch, wanted):
    monkeypatch.setattr(preprocessing, 'ROWS_PER_SHARD', 4)
    folder, order, whole = many
    table, out = read_catalogue('kinetics700', folder), tmp_path/'out'
    rejected = run_on(table, folder, out, replace(CLIP, clips=wanted))
    assert clip_names(out) == whole[:wanted]
    tried = order[:order.index(whole[wanted - 1])]
    assert rejected['clip'].tolist() == [clip for clip in tried if clip not in whole]

    chosen = table.set_index('clip', drop=False).loc[whole[:wanted]] # the same clips without the rejected ones
    run_on(chosen, folder, tmp_path/'plain', CLIP)
    store, plain = ClipStore(out), ClipStore(tmp_path/'plain')
    for i in range(wanted):
        assert np.array_equal(store.planes(i), plain.planes(i))
        assert np.array_equal(store.mel(i), plain.mel(i))


@pytest.mark.parametrize('wanted', [1, 9])
def test_shards_hold_the_clips_of_the_index_and_no_others(many, tmp_path, monkeypatch, wanted):
    monkeypatch.setattr(preprocessing, 'ROWS_PER_SHARD', 4)
    folder, _, _ = many
    run_on(read_catalogue('kinetics700', folder), folder, tmp_path/'out', replace(CLIP, clips=wanted))
    store = ClipStore(tmp_path/'out')
    store.verify()
    for shard in tmp_path.glob('out/*.tar'):
        with tarfile.open(shard) as tar:
            stems = {name.partition('.')[0] for name in tar.getnames()}
        assert len(stems) == sum(row['shard'] == shard.name for row in store.clips)


def interrupted_after(blocks):
    "A run that is interrupted when it has written so many blocks."
    write, left = preprocessing._write_block, iter(range(blocks))
    def interrupted(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return write(*args)
    return interrupted


def test_the_choice_survives_relisting_and_interruptions(many, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, 'ROWS_PER_SHARD', 4)
    folder, _, _ = many
    table, config = read_catalogue('kinetics700', folder), replace(CLIP, clips=9)
    run_on(table, folder, tmp_path/'once', config)
    run_on(table.sample(frac=1, random_state=0), folder, tmp_path/'shuffled', config)
    assert contents(tmp_path/'shuffled') == contents(tmp_path/'once')
    for blocks in (2, 1): # interrupted twice: four blocks are decoded, in two portions
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(preprocessing, '_write_block', interrupted_after(blocks))
            run_on(table, folder, tmp_path/'often', config)
    run_on(table, folder, tmp_path/'often', config)
    assert contents(tmp_path/'often') == contents(tmp_path/'once')


def test_a_list_that_is_too_short_is_said(many, tmp_path):
    folder, _, whole = many
    said = '16 clips stored of 17 that are wanted; no other training clips are listed'
    with pytest.warns(UserWarning, match=said):
        run_on(read_catalogue('kinetics700', folder), folder, tmp_path/'out', replace(CLIP, clips=17))
    assert clip_names(tmp_path/'out') == whole


def test_a_broken_dataset_is_not_searched_to_its_end(many, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, 'ROWS_PER_SHARD', 4)
    folder, _, _ = many
    table = read_catalogue('kinetics700', folder)
    with pytest.raises(InputError, match='2 of 4 clips cannot be used'):
        run_on(table, folder, tmp_path/'out', replace(CLIP, clips=3, max_rejected=0.3))
    only_validation = table.query('split == "validate"')
    with pytest.raises(InputError, match='lists no clips for training, of which 3 are wanted'):
        run_on(only_validation, folder, tmp_path/'none', replace(CLIP, clips=3))


def test_too_many_faults_fail_and_leave_nothing(kinetics, tmp_path):
    folder, catalogue = kinetics
    for path in catalogue.path[:5]:
        (folder/path).write_bytes(b'')
    strict = ClipConfig(fps=10, short_side=64, max_rejected=0.2)
    with pytest.raises(InputError, match=r'5 of 10 clips cannot be used \(5 x does not decode\)'):
        run_on(catalogue, folder, tmp_path/'out', strict)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.out.unfinished', 'kinetics700']
    assert len(pd.read_csv(tmp_path/'.out.unfinished'/'rejected.csv')) == 5


def test_missing_and_empty_datasets_are_named(tmp_path):
    with pytest.raises(InputError, match='kinetics700: no folder .*put the dataset there'):
        read_catalogue('kinetics700', tmp_path/'kinetics700')
    (tmp_path/'vggss').mkdir()
    with pytest.raises(InputError, match='vggss: .* lists no clips; expected vggss.json'):
        read_catalogue('vggss', tmp_path/'vggss')
    with pytest.raises(InputError, match='dvc repro preprocess@kinetics700'):
        ClipStore(tmp_path/'kinetics700')


def test_sound_only_dataset(world, tmp_path):
    catalogue = read_catalogue('esc50', world/'esc50')
    run_on(catalogue, world/'esc50', tmp_path/'out', CLIP)
    store = ClipStore(tmp_path/'out')
    assert len(store) == 50 and 'height' not in store.clips[0]
    assert store.mel(0).shape == (80, 600) and store.clips[0]['steps'] == 50
    with pytest.raises(InputError, match='sound and no pictures'):
        store.frames(0)


def test_silent_films_without_sound(tmp_path):
    "Action recognition needs no sound, and HMDB51 has none."
    folder = tmp_path/'films'
    folder.mkdir()
    pictures = np.full((30, 64, 80, 3), 90, np.uint8)
    write_video(folder/'silent.mp4', pictures)
    write_video(folder/'sounding.mp4', pictures, np.zeros(60000, np.float32))
    catalogue = read_catalogue('folder', folder, 'films')
    rejected = run_on(catalogue, folder, tmp_path/'with', CLIP)
    assert rejected[['clip', 'reason']].values.tolist() == [['silent.mp4', 'no audio']]

    rejected = run_on(catalogue, folder, tmp_path/'without', replace(CLIP, sound=False))
    store = ClipStore(tmp_path/'without')
    assert rejected.empty and [row['steps'] for row in store.clips] == [30, 30]
    assert np.array_equal(store.planes(0), store.planes(1)) and store.planes(0).shape == (30, 96, 80)
    with pytest.raises(InputError, match='stored without sound: set datasets.without.sound to true'):
        store.mel(0)


def test_silent_clips_are_stored_and_counted(tmp_path):
    folder = tmp_path/'films'
    folder.mkdir()
    pictures = np.full((30, 64, 80, 3), 90, np.uint8)
    tone = 0.1*np.sin(np.arange(72_000)/10)
    write_video(folder/'sounding.mp4', pictures, tone.astype(np.float32))
    for name in ('muted 1.mp4', 'muted 2.mp4'):
        write_video(folder/name, pictures, np.zeros(72_000, np.float32))
    rejected = run_on(read_catalogue('folder', folder, 'films'), folder, tmp_path/'out', CLIP)
    store = ClipStore(tmp_path/'out')
    assert len(store) == 3 and rejected.empty
    line, = summary(rejected, store.clips)
    assert line.startswith('2 x silent. These clips are stored, for example muted 1.mp4')


def test_sound_without_sound_is_refused(world, tmp_path):
    with pytest.raises(InputError, match='holds nothing but sound'):
        table = read_catalogue('esc50', world/'esc50')
        run_on(table, world/'esc50', tmp_path/'out', replace(CLIP, sound=False))


def test_boxes_survive(world, tmp_path):
    run_on(read_catalogue('vggss', world/'vggss'), world/'vggss', tmp_path/'out', CLIP)
    official = json.loads((world/'vggss'/'vggss.json').read_text())
    assert [row['boxes'] for row in ClipStore(tmp_path/'out').clips] == [item['bbox'] for item in official]


PACK = """
import hashlib
import numpy as np
from glcm.data.shards import StoreConfig, encode_h264
time, rows, columns = np.arange(40)[:, None, None], np.arange(96)[:, None], np.arange(72)
waves = 60*np.sin(0.2*rows + 0.3*time) + 50*np.cos(0.17*columns - 0.5*time)
planes = (128 + waves + 9*((rows*columns + 7*time) % 5)).clip(16, 235)
for width in (64, 72):
    for _ in range(3):
        packets = encode_h264(planes[..., :width].astype(np.uint8), 10, StoreConfig('h264', 22, 16))
        print(hashlib.sha256(b''.join(packets)).hexdigest())
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='only glibc can fill fresh memory with a value')
def test_packets_do_not_depend_on_what_memory_held():
    outputs = set()
    for fill in (0, 1, 85, 254):
        environment = os.environ | dict(MALLOC_PERTURB_=str(fill))
        ran = subprocess.run([sys.executable, '-c', PACK], env=environment, capture_output=True, text=True, check=True)
        outputs.add(ran.stdout)
    assert len(outputs) == 1 and len(set(outputs.pop().split())) == 2


CHILD = """
import sys
from pathlib import Path
from glcm.data.audio import AudioConfig
from glcm.data.clip import ClipConfig, Settings, encode_clip
from glcm.data.shards import StoreConfig
settings = Settings(ClipConfig(10, 64, 0.9), AudioConfig(24000, 80, 1024, 200), StoreConfig('h264', 20, 16), 16, False)
members, entries = encode_clip(Path(sys.argv[1]), settings)
assert set(members) == {'h264', 'mel.zlib'} and entries['steps'] == 60
heavy = ('torch', 'torchvision', 'librosa', 'numba', 'matplotlib', 'scipy', 'dlib')
print(*[name for name in heavy if name in sys.modules])
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells how much memory a process has had')
def test_a_decoding_process_is_small(tmp_path):
    "There is one for every core. Measured: 112 MB, and 875 MB when it imported PyTorch and librosa."
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (60, 120, 160, 3)).astype(np.uint8)
    write_video(tmp_path/'film.mp4', pictures, rng.normal(size=144000)*0.1)
    ran = subprocess.run([sys.executable, '-c', CHILD, tmp_path/'film.mp4'], capture_output=True, text=True, check=True)
    heavy, kilobytes = ran.stdout.split('\n')[:2]
    assert heavy == '' and int(kilobytes) < 150_000


@pytest.mark.parametrize('study, dataset, crops', [('grid', 'grid', ['lips']), ('full', 'dfdc', ['none', 'face'])])
def test_the_stage_hands_over_the_side_that_the_network_sees(monkeypatch, study, dataset, crops):
    "The cells of the stage up to its pictures, with `preprocess` replaced."
    calls, params = [], read_study(study)

    def record(*args, **how):
        calls.append(inspect.signature(preprocess).bind(*args, **how).arguments)
        return pd.DataFrame(columns=['clip', 'reason', 'detail'])

    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setattr('glcm.core.read_params', lambda: params)
    monkeypatch.setattr('glcm.datasets.catalogue.read_catalogue', lambda *names: catalogue_of_one())
    monkeypatch.setattr('glcm.data.shards.ClipStore', NoClips)
    monkeypatch.setattr('glcm.data.preprocess.preprocess', record)
    names = {}
    for cell in nbformat.read(root()/'nbs'/'stages'/'preprocess.ipynb', 4).cells:
        if cell.cell_type == 'code':
            exec(cell.source, names)
            names['dataset'] = dataset
        if cell.id == '008':
            break
    assert [call['clip'].crop for call in calls] == crops
    assert [call['seen'] for call in calls] == [params['views']['crop']]*len(crops)


class NoClips(list):
    "A store of no clips."
    def __init__(self, folder):
        self.clips = []


def catalogue_of_one():
    table = pd.DataFrame([dict(clip='a', path='a.mp4', split='train')])
    table.attrs['notes'] = []
    return table
