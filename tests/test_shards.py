"""A shard store that was damaged, edited or removed: one sentence with the file and the remedy, whatever the damage."""
import json
import os
import shutil

import numpy as np
import pytest

from glcm.core import InputError
from glcm.data.shards import ClipStore, StoreConfig, pack_clip, write_index, write_shard

ABOUT = dict(fps=10, bands=8, columns_per_second=120.0)
CLIPS, STEPS = 4, 12


def write_store(folder, container, change=lambda row: None):
    "A store of four clips in two shards; `change` is applied to the index row of the second clip before it is sealed."
    config, rng, rows = StoreConfig(container, 22, 4), np.random.default_rng(0), []
    folder.mkdir()
    for shard in range(2):
        clips = []
        for number in range(2*shard, 2*shard + 2):
            planes = rng.integers(16, 235, (STEPS, 48, 32), np.uint8)
            mel = rng.normal(size=(8, 12*STEPS)).astype(np.float32)
            about = dict(clip=f'clip {number}', path=f'{number}.mp4', split='train', label='a')
            clips.append((number, about, *pack_clip(planes, mel, STEPS, 10, 120.0, config)))
        rows += write_shard(folder/f'{shard:07d}.tar', clips)
    change(rows[1])
    write_index(folder, rows, ABOUT | dict(container=container, crf=22, keyframe=4))
    return folder


def read_all(folder):
    store = ClipStore(folder)
    for i in range(len(store)):
        store.planes(i)
        store.mel(i)
        store.planes(i, 5, 7)
        store.mel(i, 5, 7)
    return len(store)


@pytest.fixture(scope='module', params=['h264', 'raw'])
def whole(request, tmp_path_factory):
    return write_store(tmp_path_factory.mktemp('store')/'kinetics700', request.param)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path/'kinetics700')


def edit(name, change):
    "Damage done to the text of a file."
    def damage(folder):
        path = folder/name
        path.write_text(change(path.read_text()))
    return damage


def set_in_manifest(**values):
    return edit('manifest.json', lambda text: json.dumps(json.loads(text) | values))


def set_in_seal(shard, **values):
    def change(text):
        about = json.loads(text)
        about['shards'][shard] |= values
        return json.dumps(about)
    return edit('manifest.json', change)


def without(name):
    def change(text):
        about = json.loads(text)
        del about[name]
        return json.dumps(about)
    return edit('manifest.json', change)


def lines(change):
    return edit('clips.jsonl', lambda text: ''.join(change(text.splitlines(keepends=True))))


def loop(name):
    def damage(folder):
        (folder/name).unlink()
        os.symlink(name, folder/name)
    return damage


MANIFEST = {
    'empty': edit('manifest.json', lambda text: ''),
    'cut': edit('manifest.json', lambda text: text[:len(text)//2]),
    'binary': lambda folder: (folder/'manifest.json').write_bytes(bytes(range(256))),
    'a list': edit('manifest.json', lambda text: '[1, 2]'),
    'null': edit('manifest.json', lambda text: 'null'),
    'deep': edit('manifest.json', lambda text: '['*100_000),
    'a number of 5000 digits': edit('manifest.json', lambda text: f'{{"fps": {"9"*5000}}}'),
    'other version': set_in_manifest(format=99),
    'no version': without('format'),
    'no index': without('index'),
    'no shards': without('shards'),
    'no fps': without('fps'),
    'no keyframe': without('keyframe'),
    'keyframe 0': set_in_manifest(keyframe=0),
    'keyframe as text': set_in_manifest(keyframe='16'),
    'fps NaN': set_in_manifest(fps=float('nan')),
    'fps infinite': set_in_manifest(fps=float('inf')),
    'bands 0': set_in_manifest(bands=0),
    'bands negative': set_in_manifest(bands=-80),
    'columns 0': set_in_manifest(columns_per_second=0),
    'wrong count': set_in_manifest(clips=CLIPS + 1),
    'count as text': set_in_manifest(clips='4'),
    'shards as list': set_in_manifest(shards=['0000000.tar']),
    'shard outside': set_in_manifest(shards={'../0000000.tar': dict(bytes=1, sha256='0'*64)}),
    'shard without size': set_in_manifest(shards={'0000000.tar': 7}),
    'index as number': set_in_manifest(index=3),
}
INDEX = {
    'empty': edit('clips.jsonl', lambda text: ''),
    'cut': edit('clips.jsonl', lambda text: text[:-30]),
    'binary': lambda folder: (folder/'clips.jsonl').write_bytes(bytes(range(256))*20),
    'missing': lambda folder: (folder/'clips.jsonl').unlink(),
    'link loop': loop('clips.jsonl'),
    'line gone': lines(lambda rows: rows[1:]),
    'line twice': lines(lambda rows: [rows[0], rows[0], *rows[2:]]),
    'lines swapped': lines(lambda rows: [rows[1], rows[0], *rows[2:]]),
    'label changed': edit('clips.jsonl', lambda text: text.replace('"label": "a"', '"label": "b"', 1)),
}
SHARD = {
    'cut': lambda folder: (folder/'0000001.tar').write_bytes((folder/'0000001.tar').read_bytes()[:-512]),
    'empty': lambda folder: (folder/'0000001.tar').write_bytes(b''),
    'missing': lambda folder: (folder/'0000001.tar').unlink(),
    'link loop': loop('0000001.tar'),
    'other size': set_in_seal('0000001.tar', bytes=10**15),
}


DAMAGES = []
for name, kinds in {'manifest.json': MANIFEST, 'clips.jsonl': INDEX, '0000001.tar': SHARD}.items():
    DAMAGES += [pytest.param(name, damage, id=f'{name}-{kind}') for kind, damage in kinds.items()]


@pytest.mark.parametrize('name, damage', DAMAGES)
def test_damage_is_refused_when_the_store_is_opened(folder, name, damage):
    damage(folder)
    with pytest.raises(InputError) as e:
        ClipStore(folder)
    message = str(e.value)
    assert message.startswith(f'{folder/name} is damaged (') and '\n' not in message
    assert message.endswith(f'remove {folder} and run `dvc repro preprocess@kinetics700` again')


def places(of):
    "A change of where a member lies, whatever its container."
    def change(row):
        row['places'] = {suffix: of(place) for suffix, place in row['places'].items()}
    return change


ROWS = { # what a seal cannot know: a row that was written so
    'negative offset': places(of=lambda place: [-place[0], *place[1:]]),
    'huge offset': places(of=lambda place: [10**30, *place[1:]]),
    'outside of the shard': places(of=lambda place: [10**6, *place[1:]]),
    'beyond the end': places(of=lambda place: [*place[:-1], 10**6]),
    'negative size': places(of=lambda place: [place[0], -5, *place[2:]]),
    'chunks gone': places(of=lambda place: place[:2]),
    'place empty': places(of=lambda place: []),
    'place as text': places(of=lambda place: 'here'),
    'place null': places(of=lambda place: None),
    'sizes as text': places(of=lambda place: [place[0], *map(str, place[1:])]),
    'sizes nested': places(of=lambda place: [[size] for size in place]),
    'no places': lambda row: row.pop('places'),
    'places as list': lambda row: row.update(places=[1]),
    'no shard': lambda row: row.pop('shard'),
    'other shard': lambda row: row.update(shard='0000009.tar'),
    'shard outside': lambda row: row.update(shard='../../etc/passwd'),
    'no steps': lambda row: row.pop('steps'),
    'steps negative': lambda row: row.update(steps=-3),
    'steps as text': lambda row: row.update(steps='12'),
    'more steps': lambda row: row.update(steps=STEPS + 50),
    'width 0': lambda row: row.update(width=0),
    'width NaN': lambda row: row.update(width=float('nan')),
    'other height': lambda row: row.update(height=10**6),
    'no height': lambda row: row.pop('height'),
}


@pytest.mark.parametrize('container', ['h264', 'raw'])
@pytest.mark.parametrize('kind', ROWS)
def test_rows_are_trusted_no_further_than_their_shard(tmp_path, container, kind):
    folder = write_store(tmp_path/'kinetics700', container, ROWS[kind])
    with pytest.raises(InputError, match=f'{folder}/.* is damaged .*: remove {folder} and run') as e:
        read_all(folder)
    message = str(e.value)
    assert '\n' not in message
    assert any(place in message for place in ('clip 1', 'line 2', '0000009.tar', 'passwd'))


def test_spans_that_a_clip_does_not_have_are_refused(whole):
    store = ClipStore(whole)
    assert read_all(whole) == CLIPS
    for start, stop in ((0, STEPS + 1), (-1, 3), (5, 5), (7, 3), (STEPS, None)):
        for read in (store.planes, store.mel):
            with pytest.raises(InputError, match=f'clip 2 in {whole} has {STEPS} steps'):
                read(2, start, stop)


def test_store_removed_while_it_is_read(folder):
    store = ClipStore(folder)
    first = store.planes(0)
    shutil.rmtree(folder)
    assert np.array_equal(store.planes(0), first) # what is mapped stays
    said = f'{folder}/0000001.tar cannot be read any more .*: was it removed or made anew'
    with pytest.raises(InputError, match=said):
        store.planes(2)


def test_flipped_bit_is_found_by_verify(folder):
    data = bytearray((folder/'0000001.tar').read_bytes())
    data[700] ^= 4
    (folder/'0000001.tar').write_bytes(data)
    with pytest.raises(InputError, match='0000001.tar is damaged'):
        ClipStore(folder).verify()
