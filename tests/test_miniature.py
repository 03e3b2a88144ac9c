"""The miniature world: the same for the same seed, in the official layouts, and not solved by looking elsewhere."""
import hashlib
import json
import re
from collections import Counter, defaultdict
from itertools import combinations, product

import av
import numpy as np
import pytest

from glcm.core import InputError, parse, read_params
from glcm.data.audio import AudioConfig
from glcm.datasets.catalogue import read_catalogue
from glcm.data.clip import ClipConfig
from glcm.data.preprocess import preprocess
from glcm.data.shards import ClipStore, StoreConfig
from glcm.miniature import world as module
from glcm.miniature.actions import HMDB_ACTIONS, UCF_ACTIONS, trajectory
from glcm.miniature.deepfakes import FAKES, deepfake_shot, dfdc_actors, dfdc_pair, dfdc_side
from glcm.miniature.drawing import clip_rng
from glcm.miniature.lipreading import GRID_WORDS, LRW_WORDS, grid_name, lrs2_programme, lrw_shot
from glcm.miniature.talking import VOICES, random_speakers
from glcm.miniature.world import DATASETS, SIZES, write_world

TINY = dict(
    lrw=dict(train=1, test=1), lrs2=dict(pretrain=1, train=1, val=1, test=1, utterances=1),
    grid=dict(people=2, sentences=1), dfdc=dict(parts=3, pairs=1), ucf101=dict(groups=3, clips=2),
    hmdb51=dict(groups=3, clips=2), flickr_soundnet=dict(clips=2),
)
READERS = {
    'lrw': dict(fps=25), 'lrs2': dict(fps=25), 'grid': dict(fps=25), 'grid_words': dict(fps=25), 'dfdc': dict(fps=10),
    'ucf101': dict(fps=10, sound=False), 'hmdb51': dict(fps=10, sound=False), 'flickr_soundnet': dict(fps=10),
}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tasks')/'data'
    write_world(folder, TINY, workers=0)
    return folder


def digests(folder):
    paths = [path for path in folder.rglob('*') if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def files(folder, ending):
    return {str(path.relative_to(folder)) for path in folder.rglob(f'*.{ending}')}


def lines(path):
    return path.read_text().splitlines()


def test_same_seed_same_bytes_in_other_processes(world, tmp_path):
    again = {name: TINY[name] for name in ('grid', 'flickr_soundnet')}
    write_world(tmp_path, again, workers=2)
    before = {name: value for name, value in digests(world).items() if name.split('/')[0] in again}
    assert digests(tmp_path) == before


@pytest.mark.parametrize('name', ['lrw', 'lrs2', 'dfdc', 'ucf101', 'hmdb51'])
def test_a_clip_is_the_same_whatever_is_written_beside_it(world, tmp_path, name):
    *_, last = DATASETS[name].keys(**TINY[name])
    DATASETS[name].write_clip(tmp_path, 0, *last)
    alone = digests(tmp_path)
    assert any(name.endswith(('.mp4', '.avi')) for name in alone)
    assert alone.items() <= digests(world/name).items()


@pytest.mark.parametrize('reader', READERS)
def test_every_clip_can_be_used(world, tmp_path, reader):
    folder, out = world/reader.removesuffix('_words'), tmp_path/reader
    params = read_params()
    clip = ClipConfig(short_side=64, max_rejected=0.0, **READERS[reader])
    audio = parse(AudioConfig, params['audio'], 'audio')
    store = parse(StoreConfig, params['store'], 'store')
    catalogue = read_catalogue(reader, folder)
    preprocess(catalogue, folder, out, clip, audio, store, 3)
    stored = ClipStore(out)
    assert len(catalogue)
    assert [row['clip'] for row in stored.clips] == catalogue['clip'].tolist()
    assert min(stored.frames(0).shape[-2:]) == 64


def test_existing_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path/'flickr_soundnet').mkdir()
    with pytest.raises(InputError, match='flickr_soundnet exists'):
        write_world(tmp_path, TINY, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ['flickr_soundnet']
    with pytest.raises(InputError, match='no dataset lrw2'):
        write_world(tmp_path, dict(lrw2={}), workers=0)


def test_failure_leaves_no_half_of_a_dataset(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError('disk full')

    monkeypatch.setattr(module, 'annotations', fail)
    with pytest.raises(OSError, match='disk full'):
        write_world(tmp_path, dict(flickr_soundnet=dict(clips=1)), workers=0)
    assert not list(tmp_path.iterdir())


def test_lrw_layout(world):
    clips = files(world/'lrw', 'mp4')
    splits = 'train', 'test'
    assert clips == {f'lipread_mp4/{word}/{split}/{word}_00001.mp4' for word in LRW_WORDS for split in splits}
    for clip in clips:
        text = (world/'lrw'/clip).with_suffix('.txt').read_text()
        duration = re.search(r'^Duration: ([\d.]+) seconds$', text, re.M)[1]
        assert 0.1 < float(duration) < 1.16
        for key in ('Disk reference', 'Channel', 'Program start', 'Clip start', 'Clip end'):
            assert f'{key}: ' in text
        with av.open(str(world/'lrw'/clip)) as file:
            assert len(list(file.decode(video=0))) == 29


@pytest.fixture(scope='module')
def lrs2_lists(world):
    parts = 'pretrain', 'train', 'val', 'test'
    return {part: [line.split()[0] for line in lines(world/f'lrs2/{part}.txt')] for part in parts}


def test_lrs2_lists(world, lrs2_lists):
    expected = set()
    for part, clips in lrs2_lists.items():
        folder = 'pretrain' if part == 'pretrain' else 'main'
        for clip in clips:
            assert re.fullmatch(r'\d{19}/\d{5}', clip)
            expected.add(f'mvlrs_v1/{folder}/{clip}.mp4')
    assert files(world/'lrs2', 'mp4') == expected
    assert len(expected) == 4
    for one, other in combinations(lrs2_lists.values(), 2):
        assert not {clip[:19] for clip in one} & {clip[:19] for clip in other}, 'a programme is in one part'


def test_lrs2_texts(world, lrs2_lists):
    for clip in lrs2_lists['pretrain']:
        text, conf, empty, header, *rows = lines(world/f'lrs2/mvlrs_v1/pretrain/{clip}.txt')
        rows = [row.split() for row in rows]
        assert (conf[:7], empty, header) == ('Conf:  ', '', 'WORD START END ASDSCORE')
        assert text == 'Text:  ' + ' '.join(row[0] for row in rows)
        times = [float(time) for row in rows for time in row[1:3]]
        assert times == sorted(times) and times[0] >= 0


@pytest.mark.parametrize('speaker', ['s1', 's2'])
def test_grid_names_spell_the_alignments(world, speaker):
    name, = [path.stem for path in (world/'grid'/speaker/'video').glob('*.mpg')]
    assert files(world/'grid'/speaker/'align', 'align') == {f'{name}.align'}
    rows = [line.split() for line in lines(world/f'grid/{speaker}/align/{name}.align')]
    starts, ends, (before, *words, after) = zip(*rows)
    assert before == after == 'sil'
    assert grid_name(words) == name
    for word, choices in zip(words, GRID_WORDS.values()):
        assert word in choices
    assert starts[0] == '0' and ends[-1] == '74500'
    assert starts[1:] == ends[:-1]
    times = [int(end) for end in ends]
    assert times == sorted(set(times))


def test_dfdc_metadata(world):
    parts = sorted((world/'dfdc').glob('dfdc_train_part_*'))
    assert len(parts) == 3
    for part in parts:
        entries = json.loads((part/'metadata.json').read_text())
        assert set(entries) == files(part, 'mp4')
        for name in entries:
            assert re.fullmatch(r'[a-z]{10}\.mp4', name)
        assert Counter(entry['label'] for entry in entries.values()) == dict(FAKE=1, REAL=1)
        fake, = [entry for entry in entries.values() if entry['label'] == 'FAKE']
        assert entries[fake['original']]['label'] == 'REAL'


def test_dfdc_lists(world):
    split_of = {}
    for split in ('train', 'validate', 'test'):
        for line in lines(world/f'dfdc/{split}.txt'):
            split_of[line] = split
    assert set(split_of) == files(world/'dfdc', 'mp4')
    pairs = {(name.split('/')[0], split) for name, split in split_of.items()}
    assert len(pairs) == 3, 'a part is in one split'


def ucf101_sides(world, split):
    "Clips of the training, test and unused sides of a split, and every clip's group."
    lists = world/'ucf101/ucfTrainTestlist'
    train = [line.split() for line in lines(lists/f'trainlist0{split}.txt')]
    numbers = dict(line.split()[::-1] for line in lines(lists/'classInd.txt'))
    for clip, number in train:
        assert numbers[clip.split('/')[0]] == number
    test = lines(lists/f'testlist0{split}.txt')
    return [clip for clip, _ in train], test, [], lambda clip: re.search(r'_g\d\d_', clip)[0]


def hmdb51_sides(world, split):
    "As above."
    sides = {'0': [], '1': [], '2': []}
    for label in HMDB_ACTIONS.motions:
        for line in lines(world/f'hmdb51/testTrainMulti_7030_splits/{label}_test_split{split}.txt'):
            name, side = line.split()
            sides[side].append(f'{label}/{name}')
    return sides['1'], sides['2'], sides['0'], lambda clip: re.match(r'(\w+)/(.+)_\1_', clip)[2]


@pytest.mark.parametrize('actions, sides', [
    pytest.param(UCF_ACTIONS, ucf101_sides, id='ucf101'),
    pytest.param(HMDB_ACTIONS, hmdb51_sides, id='hmdb51')])
def test_action_splits_keep_groups_together(world, actions, sides):
    found = {clip.removeprefix('UCF-101/') for clip in files(world/actions.name, 'avi')}
    held_out = []
    for split in (1, 2, 3):
        train, test, unused, group = sides(world, split)
        assert found == set(train + test + unused)
        assert len(train + test + unused) == len(found) == 30
        assert not set(map(group, train)) & set(map(group, test))
        assert {clip.split('/')[0] for clip in test} == set(actions.motions)
        held_out += test + unused
    assert Counter(held_out) == dict.fromkeys(found, 1), 'each clip is held out once'


def test_voices_of_splits_differ():
    for one, other in combinations(VOICES.values(), 2):
        assert not set(one) & set(other)
    for part in ('pretrain', 'train', 'val', 'test'):
        split = 'train' if part == 'pretrain' else part
        for number in range(SIZES['lrs2'][part]):
            _, speaker = lrs2_programme(0, part, number)
            assert speaker.voice.name in VOICES[split]


def test_voices_of_dfdc_sides_differ():
    voices = defaultdict(set)
    for part in range(2*SIZES['dfdc']['parts']):
        voices[dfdc_side(part)] |= {actor.voice.name for actor in dfdc_actors(0, part)}
    assert set(voices) == set(VOICES)
    for one, other in combinations(voices.values(), 2):
        assert not one & other


def test_faces_of_lrw_differ():
    faces = []
    for split in VOICES:
        speakers = random_speakers(clip_rng(0, 'lrw', split), split, SIZES['lrw'][split], 0.52, 0.42)
        faces += [tuple(speaker.face.skin) for speaker in speakers]
    assert len(set(faces)) == len(faces) == 34


def test_budget(world):
    clips = dict(lrw=340, lrs2=100, grid=80, dfdc=120, ucf101=90, hmdb51=90, flickr_soundnet=30)
    total = 0
    for name, count in clips.items():
        media = [path for path in (world/name).rglob('*') if path.suffix in ('.mp4', '.mpg', '.avi')]
        total += count*np.mean([path.stat().st_size for path in media])
    assert set(clips) == set(TINY) and total < 8.8e6, 'a forecast from few clips'


def nearest_mean_accuracy(x, labels, groups):
    "Share of samples whose nearest class mean, over the other groups, is their own class's."
    labels, groups = np.asarray(labels), np.asarray(groups)
    names = np.unique(labels)
    x = np.asarray(x)
    x = (x - x.mean(0))/(x.std(0) + 1e-9)
    correct = 0
    for group in set(groups):
        own = groups == group
        means = np.stack([x[~own & (labels == name)].mean(0) for name in names])
        distances = ((x[own][:, None] - means)**2).sum(-1)
        correct += (names[distances.argmin(1)] == labels[own]).sum()
    return correct/len(x)


def test_words_are_in_the_motion_of_the_mouth():
    tracks, first, labels, groups = [], [], [], []
    for word, k in product(LRW_WORDS, range(8)):
        mouth = lrw_shot(0, 'train', word, k, 8).mouth
        tracks.append(mouth.ravel())
        first.append(mouth[0])
        labels.append(word)
        groups.append(k)
    assert nearest_mean_accuracy(tracks, labels, groups) > 0.8
    assert nearest_mean_accuracy(first, labels, groups) < 0.25


@pytest.mark.parametrize('actions', [UCF_ACTIONS, HMDB_ACTIONS], ids=['ucf101', 'hmdb51'])
def test_actions_are_in_how_the_pose_changes(actions):
    changes, middle, labels, groups = [], [], [], []
    for label, k in product(actions.motions, range(60)):
        track = trajectory(clip_rng('test', label, k), actions.motions, label, np.arange(50)/25)
        speed = np.abs(np.diff(track, axis=0)).mean(0)
        changes.append([*track.std(0), *speed])
        middle.append(track[25])
        labels.append(label)
        groups.append(k % 5)
    assert nearest_mean_accuracy(changes, labels, groups) > 0.8
    assert nearest_mean_accuracy(middle, labels, groups) < 0.28


def test_fakes_are_made_equally_often():
    assert Counter(dfdc_pair(number)[1] for number in range(12)) == dict.fromkeys(FAKES, 3)


@pytest.mark.parametrize('kind', FAKES)
def test_fakes_differ_from_their_originals_in_one_thing(kind):
    actor = dfdc_actors(0, 0)[0]
    real = deepfake_shot((0, 'test'), actor)
    fake = deepfake_shot((0, 'test'), actor, kind)
    assert np.array_equal(fake.sound, real.sound)
    assert np.array_equal(fake.mouth, real.mouth) == (kind in ('eyes', 'seam'))
    assert (fake.face.uneven != real.face.uneven) == (kind == 'eyes')
    assert (fake.tint is not None) == (kind == 'seam')
