"""The miniature task datasets: the same for the same seed, in the official layouts, and not solved by looking elsewhere."""
import hashlib
import json
import re
from collections import Counter
from itertools import combinations

import av
import numpy as np
import pytest

from glcm.core import InputError, parse, read_params
from glcm.data import miniature_tasks
from glcm.data.audio import AudioConfig
from glcm.data.catalogue import read_catalogue
from glcm.data.miniature import seeded
from glcm.data.miniature_tasks import (FAKES, FULL, GRID, HMDB, LIP_WORDS, UCF, VOICES, WRITERS, cast, deepfake_shot, grid_name,
                                       lrw_shot, made_as, programme, speakers, trajectory, write_tasks)
from glcm.data.preprocess import ClipConfig, preprocess
from glcm.data.shards import ClipStore, StoreConfig

TINY = dict(lrw=dict(train=1, val=0, test=1), lrs2=dict(pretrain=1, train=1, val=1, test=1, utterances=1),
            grid=dict(people=2, sentences=1), dfdc=dict(parts=3, pairs=1), ucf101=dict(groups=3, clips=2),
            hmdb51=dict(groups=3, clips=2), flickr_soundnet=dict(clips=2))


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tasks') / 'data'
    write_tasks(folder, sizes=TINY, workers=0)
    return folder


def digests(folder):
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob('*') if f.is_file()}


def files(folder, ending):
    return {str(f.relative_to(folder)) for f in folder.rglob(f'*.{ending}')}


def lines(path):
    return path.read_text().splitlines()


def test_same_seed_same_bytes(world, tmp_path):
    some = {name: TINY[name] for name in ('lrs2', 'grid', 'dfdc', 'hmdb51', 'flickr_soundnet')}
    write_tasks(tmp_path, sizes=some, workers=2)
    before = digests(world)
    assert digests(tmp_path) == {name: value for name, value in before.items() if name.split('/')[0] in some}


@pytest.mark.parametrize('reader, settings', [
    ('lrw', dict(fps=25)), ('lrs2', dict(fps=25)), ('grid', dict(fps=25)), ('grid_words', dict(fps=25)), ('dfdc', dict(fps=10)),
    ('ucf101', dict(fps=10, sound=False)), ('hmdb51', dict(fps=10, sound=False)), ('flickr_soundnet', dict(fps=10))])
def test_every_clip_can_be_used(world, tmp_path, reader, settings):
    folder, params = world/reader.removesuffix('_words'), read_params()
    clip = ClipConfig(short_side=64, max_rejected=0.0, **settings)
    catalogue = read_catalogue(reader, folder)
    preprocess(catalogue, folder, tmp_path/reader, clip, parse(AudioConfig, params['audio'], 'audio'), parse(StoreConfig, params['store'], 'store'), 3)
    store = ClipStore(tmp_path/reader)
    assert [row['clip'] for row in store.clips] == catalogue['clip'].tolist() and len(catalogue)
    assert min(store.frames(0).shape[-2:]) == 64


def test_existing_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / 'flickr_soundnet').mkdir()
    with pytest.raises(InputError, match='flickr_soundnet exists'): write_tasks(tmp_path, sizes=TINY, workers=0)
    assert [f.name for f in tmp_path.iterdir()] == ['flickr_soundnet']
    with pytest.raises(InputError, match='no dataset lrw2'): write_tasks(tmp_path, sizes=dict(lrw2={}), workers=0)


def test_failure_leaves_no_half_of_a_dataset(tmp_path, monkeypatch):
    def fail(*args): raise OSError('disk full')
    monkeypatch.setattr(miniature_tasks, 'annotations', fail)
    with pytest.raises(OSError, match='disk full'):
        write_tasks(tmp_path, sizes=dict(flickr_soundnet=dict(clips=1)), workers=0)
    assert not list(tmp_path.iterdir())


def test_lrw_layout(world):
    clips = files(world / 'lrw', 'mp4')
    assert clips == {f'lipread_mp4/{word}/{split}/{word}_00001.mp4' for word in LIP_WORDS for split in ('train', 'test')}
    for clip in clips:
        text = (world / 'lrw' / clip).with_suffix('.txt').read_text()
        assert 0.1 < float(re.search(r'^Duration: ([\d.]+) seconds$', text, re.M)[1]) < 1.16
        assert all(f'{key}: ' in text for key in ('Disk reference', 'Channel', 'Program start', 'Clip start', 'Clip end'))
        with av.open(str(world / 'lrw' / clip)) as file: assert len(list(file.decode(video=0))) == 29


def test_lrs2_lists_and_texts(world):
    listed = {part: [line.split()[0] for line in lines(world / f'lrs2/{part}.txt')] for part in ('pretrain', 'train', 'val', 'test')}
    assert all(re.fullmatch(r'\d{19}/\d{5}', clip) for clips in listed.values() for clip in clips)
    where = {f"mvlrs_v1/{'pretrain' if part == 'pretrain' else 'main'}/{clip}.mp4" for part, clips in listed.items() for clip in clips}
    assert files(world / 'lrs2', 'mp4') == where and len(where) == 4
    for a, b in combinations(listed, 2): assert not {c[:19] for c in listed[a]} & {c[:19] for c in listed[b]}
    for clip in listed['pretrain']:
        text, conf, empty, header, *rows = lines(world / f'lrs2/mvlrs_v1/pretrain/{clip}.txt')
        rows = [row.split() for row in rows]
        assert (conf[:7], empty, header) == ('Conf:  ', '', 'WORD START END ASDSCORE')
        assert text == 'Text:  ' + ' '.join(row[0] for row in rows)
        times = [float(t) for row in rows for t in row[1:3]]
        assert times == sorted(times) and times[0] >= 0


def test_grid_names_spell_the_alignments(world):
    for speaker in ('s1', 's2'):
        videos = files(world / 'grid' / speaker / 'video', 'mpg')
        assert {v[:-4] for v in videos} == {a[:-6] for a in files(world / 'grid' / speaker / 'align', 'align')} and len(videos) == 1
        for video in videos:
            rows = [line.split() for line in lines(world / f'grid/{speaker}/align/{video[:-4]}.align')]
            words = [word for _, _, word in rows]
            assert words[0] == words[-1] == 'sil' and grid_name(words[1:-1]) == video[:-4]
            assert all(word in choice for word, choice in zip(words[1:-1], GRID.values()))
            assert rows[0][0] == '0' and rows[-1][1] == '74500'
            assert all(a[1] == b[0] and int(a[0]) < int(a[1]) for a, b in zip(rows, rows[1:]))


def test_dfdc_metadata_and_lists(world):
    parts, sides = sorted((world / 'dfdc').glob('dfdc_train_part_*')), {}
    for part in parts:
        entries = json.loads((part / 'metadata.json').read_text())
        assert set(entries) == files(part, 'mp4') and all(re.fullmatch(r'[a-z]{10}\.mp4', name) for name in entries)
        assert Counter(e['label'] for e in entries.values()) == dict(FAKE=1, REAL=1)
        assert all(entries[e['original']]['label'] == 'REAL' for e in entries.values() if e['label'] == 'FAKE')
    for split in ('train', 'validate', 'test'): sides |= {line: split for line in lines(world / f'dfdc/{split}.txt')}
    assert set(sides) == {f'{part.name}/{name}' for part in parts for name in files(part, 'mp4')}
    assert len({(name.split('/')[0], split) for name, split in sides.items()}) == 3, 'a part is on one side'


@pytest.mark.parametrize('name, classes', [('ucf101', UCF), ('hmdb51', HMDB)])
def test_action_splits_keep_groups_together(world, name, classes):
    tested = []
    for split in (1, 2, 3):
        if name == 'ucf101':
            lists = world / 'ucf101/ucfTrainTestlist'
            train = [line.split()[0] for line in lines(lists / f'trainlist0{split}.txt')]
            test, rest = lines(lists / f'testlist0{split}.txt'), []
            group = lambda clip: re.search(r'_g\d\d_', clip)[0]
            numbers = dict(line.split()[::-1] for line in lines(lists / 'classInd.txt'))
            assert all(numbers[clip.split('/')[0]] == n for clip, n in map(str.split, lines(lists / f'trainlist0{split}.txt')))
            found = {clip[8:] for clip in files(world / name, 'avi')}
        else:
            sides = {f'{label}/{line.split()[0]}': line.split()[1] for label in classes
                     for line in lines(world / f'hmdb51/testTrainMulti_7030_splits/{label}_test_split{split}.txt')}
            rest, train, test = ([clip for clip, side in sides.items() if side == s] for s in '012')
            group = lambda clip: re.match(r'(\w+)/(.+)_\1_', clip)[2]
            found = files(world / name, 'avi')
        assert found == set(train + test + rest) and len(train + test + rest) == len(found) == 30
        assert not set(map(group, train)) & set(map(group, test))
        assert Counter(clip.split('/')[0] for clip in test).keys() == classes.keys()
        tested += test + rest
    assert Counter(tested) == dict.fromkeys(found, 1), 'each clip is held out once'


def test_strangers_on_every_side():
    for a, b in combinations(VOICES, 2): assert not set(VOICES[a]) & set(VOICES[b])
    parts = FULL['dfdc']['parts']
    voices = [{actor.voice for actor in cast(0, part, parts)} for part in range(parts)]
    assert all(len(v) == 4 for v in voices) and not any(a & b for a, b in combinations(voices, 2))
    for part in ('pretrain', 'train', 'val', 'test'):
        role = 'train' if part == 'pretrain' else part
        assert all(programme(0, part, k)[1].voice in VOICES[role] for k in range(FULL['lrs2'][part]))
    faces = [tuple(s.face.skin) for role in VOICES for s in speakers(seeded(0, 'lrw', role), role, FULL['lrw'][role], 0.52, 0.42)]
    assert len(set(faces)) == len(faces) == 34


def test_budget(world):
    size = {name: [f.stat().st_size for f in (world / name).rglob('*') if f.suffix in ('.mp4', '.mpg', '.avi')] for name in WRITERS}
    clips = dict(lrw=340, lrs2=100, grid=80, dfdc=120, ucf101=90, hmdb51=90, flickr_soundnet=30)
    assert sum(np.mean(size[name]) * count for name, count in clips.items()) < 8.8e6, 'a forecast from few clips'


def nearest(x, labels, groups):
    "Share of samples whose nearest class mean, over the other groups, is their own class's."
    x, labels, groups = np.asarray(x), np.asarray(labels), np.asarray(groups)
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    right = 0
    for one in set(groups):
        names = sorted(set(labels))
        means = np.stack([x[(groups != one) & (labels == name)].mean(0) for name in names])
        mine = groups == one
        guesses = ((x[mine][:, None] - means) ** 2).sum(-1).argmin(1)
        right += sum(names[g] == label for g, label in zip(guesses, labels[mine]))
    return right / len(x)


def test_words_are_in_the_motion_of_the_mouth():
    shots = [(word, k, lrw_shot(0, 'train', word, k, 8)) for word in LIP_WORDS for k in range(8)]
    labels, groups = [s[0] for s in shots], [s[1] for s in shots]
    assert nearest([s[2].mouth.ravel() for s in shots], labels, groups) > 0.8
    assert nearest([s[2].mouth[0] for s in shots], labels, groups) < 0.25


@pytest.mark.parametrize('motions', [UCF, HMDB])
def test_actions_are_in_how_the_pose_changes(motions):
    tracks = [(label, k, trajectory(seeded('test', label, k), motions, label, np.arange(50) / 25))
              for label in motions for k in range(60)]
    labels, groups = [t[0] for t in tracks], [t[1] % 5 for t in tracks]
    assert nearest([np.concatenate([t[2].std(0), np.abs(np.diff(t[2], axis=0)).mean(0)]) for t in tracks], labels, groups) > 0.8
    assert nearest([t[2][25] for t in tracks], labels, groups) < 0.28


def test_fakes_differ_from_their_originals_in_one_thing():
    assert Counter(made_as(n)[1] for n in range(12)) == dict.fromkeys(FAKES, 3)
    actor = cast(0, 0, 5)[0]
    real, fakes = deepfake_shot((0, 'test'), actor), {kind: deepfake_shot((0, 'test'), actor, kind) for kind in FAKES}
    for kind, fake in fakes.items():
        assert np.array_equal(fake.sound, real.sound)
        assert np.array_equal(fake.mouth, real.mouth) == (kind in ('eyes', 'seam'))
        assert (fake.face.uneven != real.face.uneven) == (kind == 'eyes') and (fake.tint is not None) == (kind == 'seam')
