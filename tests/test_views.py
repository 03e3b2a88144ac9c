"""Which clips training sees, in which order, and that no recording is its own negative."""
import shutil

import pytest
import torch

from glcm.core import generator, parse, read_params
from glcm.data.shards import ClipStore
from glcm.data.views import TrainingViews, ViewConfig, clip_views, training_batches, training_clips
from glcm.testing import tiny_clips

CONFIG = parse(ViewConfig, read_params()['views'], 'views')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Two datasets, and a third that holds the recordings of the first again."
    clips = tmp_path_factory.mktemp('clips')
    tiny_clips(clips, 'kinetics700', train=5, validate=1)
    tiny_clips(clips, 'avspeech', speech=3)
    shutil.copytree(clips/'kinetics700', clips/'again')
    return clips


def test_without_copies_clips_views_and_random_numbers_are_as_ever(folders):
    "The definition, written out: clips of the split in the stores' order, shuffled anew in each pass, a generator for each view."
    stores = [ClipStore(folders/'kinetics700'), ClipStore(folders/'avspeech')]
    flat = [(store, i) for store in stores for i in store.select(split='train')]
    views = TrainingViews(training_clips(stores), CONFIG, seed=3)
    assert len(views) == len(flat) == 8
    keys = [(epoch, int(k)) for epoch in range(3) for k in generator(3, 'order', epoch).permutation(8)]
    for step, batch in enumerate(training_batches(views, batch=4, steps=6)):
        for b, (epoch, k) in enumerate(keys[4*step:4*step + 4]):
            store, i = flat[k]
            planes, audio, shift = clip_views(store, i, CONFIG, generator(3, 'views', epoch, k))
            assert batch['clip'][b] == store.clips[i]['clip'] and batch['shift'][b] == shift
            assert torch.equal(batch['planes'][b], planes) and torch.equal(batch['audio'][b], audio)


def remember(store, seen):
    "Have a store note in `seen` whenever it reads the pictures of a clip."
    read = store.planes
    def planes(i, *span):
        seen.setdefault(store.clips[i]['clip'], []).append(store.folder.name)
        return read(i, *span)
    store.planes = planes


def test_a_recording_is_in_a_pass_once_whichever_copy_is_shown(folders):
    stores = [ClipStore(folders/name) for name in ('kinetics700', 'avspeech', 'again')]
    recordings = training_clips(stores)
    assert [len(copies) for copies in recordings] == [2]*5 + [1]*3
    names = {store.clips[i]['clip'] for copies in recordings for store, i in copies}
    seen = {}
    for store in stores: remember(store, seen)
    for batch in training_batches(TrainingViews(recordings, CONFIG, seed=0), batch=8, steps=12):
        assert set(batch['clip']) == names and len(batch['clip']) == 8 # a pass is a batch here
    for store, i in (copies[0] for copies in recordings if len(copies) == 2):
        shown = seen[store.clips[i]['clip']]
        assert len(shown) == 12 and set(shown) == {'kinetics700', 'again'}, 'both copies have their turns'


def test_a_part_is_of_recordings(folders):
    stores = [ClipStore(folders/name) for name in ('kinetics700', 'again')]
    few, more = training_clips(stores, 2), training_clips(stores, 4)
    assert [len(copies) for copies in more] == [2]*4 and more[:2] == few
    alone = training_clips(stores[:1], 4)
    assert [copies[0] for copies in more] == [copies[0] for copies in alone]
