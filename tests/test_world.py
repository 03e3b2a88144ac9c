"""Worlds of any size: resumed where they were cut off, the larger beginning with the smaller, nobody on two sides."""
import hashlib
from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest

from glcm.core import InputError, merge, parse, read_params
from glcm.data.audio import AudioConfig
from glcm.data.clip import ClipConfig
from glcm.data.preprocess import preprocess
from glcm.data.shards import ClipStore, StoreConfig
from glcm.datasets.catalogue import leaks, read_catalogue
from glcm.miniature.actions import FILMS, film_title
from glcm.miniature.deepfakes import dfdc_actors, dfdc_side
from glcm.miniature.drawing import RATE, background, clip_rng
from glcm.miniature.files import BLOCK, Dataset, write_dataset, write_lines
from glcm.miniature.lipreading import LRS2_PARTS, lrs2_programme
from glcm.miniature.talking import (
    ACCENTS, ALL_VOICES, HAIR, VOICES, Voice, draw_face, face_boxes, random_face, random_speakers, speak_for,
    talking_clip, voice_of,
)
from glcm.miniature.world import DATASETS, write_world
from glcm.params import check_params
from glcm.study import _link_data

SMALL = dict(
    kinetics700=dict(train=1, validate=1), avspeech=dict(speech=6), vggss=dict(held_out=1), talkers=dict(held_out=6),
    esc50=dict(recordings=1), lrw=dict(train=1, val=1, test=1),
    lrs2=dict(pretrain=0, train=1, val=1, test=1, utterances=1),
    dfdc=dict(parts=3, pairs=1), ucf101=dict(groups=3, clips=1), hmdb51=dict(groups=3, clips=1),
)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')
    write_world(folder, SMALL, seed=1, workers=0)
    return folder


def digests(folder):
    paths = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def count_keys(count):
    return [(number,) for number in range(count)]


def write_number(folder, seed, number):
    write_lines(folder/'clips'/f'{number}.txt', [seed, number])
    return number, 2*number


def write_rows(folder, rows, sizes):
    write_lines(folder/'list.txt', rows)


NUMBERS = Dataset(dict(count=3), count_keys, write_number, write_rows)


class CutOff(Exception):
    pass


def cut_after(blocks):
    "A `map` that is cut off, and the keys that it was asked for."
    def run(function, items):
        for number, item in enumerate(items):
            if number == blocks:
                raise CutOff
            yield function(item)
    return run


def test_a_run_that_is_cut_off_resumes(tmp_path):
    sizes, drawn = dict(count=5*BLOCK + 3), []
    def counting(function, items):
        for item in items:
            drawn.extend(item)
            yield function(item)

    with pytest.raises(CutOff):
        write_dataset(tmp_path/'numbers', NUMBERS, sizes, 7, cut_after(2))
    assert not (tmp_path/'numbers').exists()
    write_dataset(tmp_path/'numbers', NUMBERS, sizes, 7, counting)
    assert drawn == count_keys(5*BLOCK + 3)[2*BLOCK:]
    write_dataset(tmp_path/'whole', NUMBERS, sizes, 7)
    assert digests(tmp_path/'numbers') == digests(tmp_path/'whole')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['numbers', 'whole']


def test_what_was_cut_off_is_not_mixed_with_another_world(tmp_path):
    with pytest.raises(CutOff):
        write_dataset(tmp_path/'numbers', NUMBERS, dict(count=5*BLOCK), 7, cut_after(2))
    write_dataset(tmp_path/'numbers', NUMBERS, dict(count=BLOCK), 8)
    write_dataset(tmp_path/'whole', NUMBERS, dict(count=BLOCK), 8)
    assert digests(tmp_path/'numbers') == digests(tmp_path/'whole')


def test_only_what_was_drawn_is_replaced(tmp_path):
    write_dataset(tmp_path/'numbers', NUMBERS, dict(count=2), 7)
    write_dataset(tmp_path/'numbers', NUMBERS, dict(count=1), 7)
    assert len(list((tmp_path/'numbers'/'clips').iterdir())) == 1
    write_lines(tmp_path/'mine'/'a.txt', ['mine'])
    before = digests(tmp_path)
    with pytest.raises(InputError, match='mine exists and was not drawn: move it away'):
        write_dataset(tmp_path/'mine', NUMBERS, dict(count=1), 7)
    assert digests(tmp_path) == before


LARGER = dict(
    kinetics700=dict(train=3, validate=2), avspeech=dict(speech=9), vggss=dict(held_out=2), talkers=dict(held_out=8),
    esc50=dict(recordings=2), lrw=dict(train=2, val=2, test=2),
    lrs2=dict(pretrain=1, train=2, val=2, test=2, utterances=2),
    dfdc=dict(parts=8, pairs=2), ucf101=dict(groups=6, clips=2), hmdb51=dict(groups=9, clips=2),
)

@pytest.mark.parametrize('name', LARGER)
def test_a_larger_world_begins_with_the_smaller(world, tmp_path, name):
    def clips(sizes): # clip -> key; the last number of a key of LRW is how many speakers there are
        keys = list(DATASETS[name].keys(**sizes[name]))
        return {key[:3] if name == 'lrw' else key: key for key in keys}

    small, larger = clips(SMALL), clips(LARGER)
    assert set(small) < set(larger)
    first = next(iter(small))
    DATASETS[name].write_clip(tmp_path, 1, *larger[first])
    assert digests(tmp_path).items() <= digests(world/name).items()


def test_films_have_titles_of_their_own():
    assert len({film_title(number) for number in range(100)}) == 100
    assert [film_title(number) for number in range(len(FILMS))] == list(FILMS)


SIDES = dict( # of datasets with speakers
    avspeech={'train', 'test'}, talkers={'test'}, dfdc={'train', 'validate', 'test'},
    lrw={'train', 'validate', 'test'}, lrs2={'train', 'validate', 'test'})

@pytest.mark.parametrize('name', SMALL)
def test_nobody_is_on_two_sides(world, name):
    catalogue = read_catalogue('vggss' if name == 'talkers' else name, world/name)
    assert catalogue.problem.isna().all()
    assert leaks(catalogue).empty
    sides = set(catalogue.split.dropna())
    assert sides == SIDES.get(name, sides)


def speakers_of_sides(name, count):
    "The people of each side of a dataset of many."
    people = defaultdict(list)
    if name == 'lrw':
        for split in VOICES:
            people[split] = random_speakers(clip_rng(1, 'lrw', split), split, count, 0.52, 0.42)
    elif name == 'lrs2':
        for part in LRS2_PARTS:
            people['train' if part == 'pretrain' else part] += [lrs2_programme(1, part, k)[1] for k in range(count)]
    else:
        for part in range(count):
            people[dfdc_side(part)] += dfdc_actors(1, part)
    return people


@pytest.mark.parametrize('name', ['lrw', 'lrs2', 'dfdc'])
def test_faces_and_voices_of_sides_differ(name):
    people = speakers_of_sides(name, 40)
    assert set(people) == set(VOICES)
    skins = [{tuple(person.face.skin) for person in side} for side in people.values()]
    voices = [{person.voice.name for person in side} for side in people.values()]
    for one, other in [*combinations(skins, 2), *combinations(voices, 2)]:
        assert not one & other


def test_skin_and_hair_choose_the_voice():
    rng, found = np.random.default_rng(0), defaultdict(set)
    for _ in range(400):
        face = random_face(rng, 0.5, 0.5, 0.3)
        voice = voice_of(rng, face)
        accent, variant = voice.name.split('+')
        assert accent == ACCENTS[int(4*face.tone)]
        assert abs(voice.pitch - 25 - 50*(4*face.tone % 1)) <= 1
        found[face.hair].add(variant)
    assert set(found) == set(HAIR) and all(len(variants) == 1 for variants in found.values())
    assert len(set().union(*found.values())) == len(HAIR)
    faces = [random_face(rng, 0.5, 0.5, 0.3) for _ in range(100)]
    assert {voice_of(rng, face, VOICES['test']).name for face in faces} == set(VOICES['test'])
    assert set(VOICES['test']) < set(ALL_VOICES)


def test_a_speech_is_never_shorter_than_its_cut():
    hasty = Voice('en-us+m1', 450, 50)
    for seed in range(3):
        speech = speak_for(np.random.default_rng(seed), 3.4, ['a', 'by'], 1, hasty)
        assert 3.4*RATE <= len(speech.sound) < 6*RATE


@pytest.mark.parametrize('words', [['a'], ['wonderful']])
def test_a_clip_is_cut_out_of_any_words(monkeypatch, words):
    monkeypatch.setattr('glcm.miniature.talking.WORDS', words)
    clip = talking_clip(clip_rng(1, 'hasty'))
    assert len(clip.sound) == 3*RATE and clip.mouth.shape == (30, 2)
    assert np.ptp(clip.mouth[:, 0]) > 0, 'the mouth moves'


def test_boxes_are_around_what_is_drawn():
    rng, width, height = np.random.default_rng(3), 72, 64
    for _ in range(10):
        face = random_face(rng, rng.uniform(0.4, 0.7), rng.uniform(0.4, 0.6), 0.3)
        empty, = background(rng, (width, height), 1)
        closed, opened = empty.copy(), empty.copy()
        draw_face(closed, face, 0.5, (0, 0.8))
        draw_face(opened, face, 0.5, (1, 0.8))
        boxes = face_boxes(face, 0.5, (width, height))
        y, x = np.mgrid[:height, :width] # of the upper left corner of each pixel
        x1, y1, x2, y2 = np.array(boxes['mouth'])*(width, height, width, height)
        in_mouth = (x + 1 > x1) & (x < x2) & (y + 1 > y1) & (y < y2) # at least in part
        moves = np.abs(opened - closed).sum(-1)
        assert moves[in_mouth].sum() > 0.99*moves.sum()
        x1, y1, x2, y2 = np.array(boxes['face'])*(width, height, width, height)
        in_face = (x > x1) & (x + 1 < x2) & (y > y1) & (y + 1 < y2) # as a whole
        is_drawn = np.abs(closed - empty).sum(-1) > 0.05
        assert is_drawn[in_face].mean() > 0.75, 'an ellipse fills 79% of its box'
        assert boxes['mouth'][1] > (boxes['face'][1] + boxes['face'][3])/2, 'below the middle of the face'


def test_boxes_of_talkers_reach_the_shards(world, tmp_path):
    params = read_params()
    clip = ClipConfig(fps=10, short_side=64, max_rejected=0.0)
    audio, store = parse(AudioConfig, params['audio'], 'audio'), parse(StoreConfig, params['store'], 'store')
    preprocess(read_catalogue('vggss', world/'talkers'), world/'talkers', tmp_path/'out', clip, audio, store, 16)
    rows = list(ClipStore(tmp_path/'out').clips)
    assert {row['label'] for row in rows} == {'alone', 'beside a silent face'}
    for row in rows:
        (x1, y1, x2, y2), = row['boxes']
        (left, top, right, bottom), = row['others']['mouth']
        assert x1 < left < right < x2 and y1 < top < bottom
        assert ('silent' in row['others']) == (row['label'] != 'alone')
        if 'silent' in row['others']:
            (first, _, last, _), = row['others']['silent']
            assert last < x1 + 0.02 or first > x2 - 0.02, 'the faces stand side by side'


@pytest.mark.parametrize('drawn, message', [
    (dict(lrw2={}), "'lrw2', which cannot be drawn; there are: kinetics700"),
    (dict(talkers=dict(held_out=4)), "world.datasets names 'talkers', which `datasets` has not"),
    (dict(esc50=dict(clips=4)), 'world.datasets.esc50 should give these numbers, and no others: recordings'),
    (dict(esc50=dict(recordings=-1)), 'world.datasets.esc50.recordings should be 0 or more'),
])
def test_mistakes_are_named(drawn, message):
    params = merge(read_params(), dict(world=dict(datasets=drawn)), 'the test')
    with pytest.raises(InputError, match=message.replace('.', r'\.')):
        check_params(params)


def test_a_dataset_is_read_where_it_was_drawn():
    changes = dict(world=dict(datasets=dict(esc50=dict(recordings=1))), datasets=dict(esc50=dict(path='elsewhere')))
    with pytest.raises(InputError, match='datasets.esc50.path should be esc50'):
        check_params(merge(read_params(), changes, 'the test'))


def test_a_study_draws_beside_the_data_of_the_user(tmp_path):
    (tmp_path/'data'/'esc50').mkdir(parents=True)
    folder, params = tmp_path/'studies'/'some', read_params()
    folder.mkdir(parents=True)
    _link_data(folder, params)
    assert (folder/'data').is_symlink() and (folder/'data'/'esc50').is_dir()
    drawing = merge(params, dict(world=dict(datasets=dict(avspeech=dict(speech=1)))), 'the test')
    for _ in range(2):
        _link_data(folder, drawing)
        assert not (folder/'data').is_symlink() and not (folder/'data'/'avspeech').exists()
        assert (folder/'data'/'esc50').resolve() == (tmp_path/'data'/'esc50').resolve()
    with pytest.raises(InputError, match='remove that folder'):
        _link_data(folder, params)
