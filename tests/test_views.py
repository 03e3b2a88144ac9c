"Which clips training takes, in which order, and that no recording is its own negative."
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from glcm.core import generator, parse, read_params
from glcm.data.shards import ClipStore
from glcm.data.planes import to_rgb
from glcm.data.views import (
    StepSampler, TrainingViews, ViewConfig, clip_views, loader_options, prepare_inputs, training_batches,
    training_clips)
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


def test_clips_and_views_without_copies(folders):
    "By the definition: clips of the split in the stores' order, shuffled in each epoch, a generator for each view."
    stores = [ClipStore(folders/'kinetics700'), ClipStore(folders/'avspeech')]
    flat = [(store, i) for store in stores for i in store.select(split='train')]
    views = TrainingViews(training_clips(stores), CONFIG, seed=3)
    assert len(views) == len(flat) == 8
    keys = []
    for epoch in range(3):
        order = generator(3, 'order', epoch).permutation(8)
        keys += [(epoch, int(k)) for k in order]
    for step, batch in enumerate(training_batches(views, batch=4, steps=6)):
        for b, (epoch, k) in enumerate(keys[4*step:4*step + 4]):
            store, i = flat[k]
            planes, mel, shift = clip_views(store, i, CONFIG, generator(3, 'views', epoch, k))
            assert batch['clip'][b] == store.clips[i]['clip'] and batch['shift'][b] == shift
            assert torch.equal(batch['planes'][b], planes) and torch.equal(batch['mel'][b], mel)


def test_processes_that_load_for_a_gpu_are_not_forked_from_this_one(folders, monkeypatch):
    "They come from a server, and give the same batches."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    options = loader_options(1)
    assert options['pin_memory'] and options['multiprocessing_context'].get_start_method() == 'forkserver'
    monkeypatch.undo()
    assert loader_options(1) == dict(num_workers=1, pin_memory=False)
    views = TrainingViews(training_clips([ClipStore(folders/'avspeech')]), CONFIG, seed=0)
    expected = list(training_batches(views, batch=2, steps=2))
    loader = DataLoader(views, batch_sampler=StepSampler(len(views), 2, 2, seed=0), **options | dict(pin_memory=False))
    for ours, theirs in zip(expected, loader, strict=True):
        assert torch.equal(ours['planes'], theirs['planes']) and torch.equal(ours['mel'], theirs['mel'])


def record_reads(store, reads):
    "Have a store add its name to `reads[clip]` whenever it reads the frames of a clip."
    read = store.planes
    def planes(i, *span):
        reads.setdefault(store.clips[i]['clip'], []).append(store.folder.name)
        return read(i, *span)
    store.planes = planes


def test_an_epoch_has_one_copy_of_each_recording(folders):
    stores = [ClipStore(folders/name) for name in ('kinetics700', 'avspeech', 'again')]
    recordings = training_clips(stores)
    assert [len(copies) for copies in recordings] == [2]*5 + [1]*3
    names = {store.clips[i]['clip'] for copies in recordings for store, i in copies}
    reads = {}
    for store in stores:
        record_reads(store, reads)
    for batch in training_batches(TrainingViews(recordings, CONFIG, seed=0), batch=8, steps=12):
        assert set(batch['clip']) == names and len(batch['clip']) == 8 # an epoch is a batch here
    twice = [copies[0] for copies in recordings if len(copies) == 2]
    for store, i in twice:
        read = reads[store.clips[i]['clip']]
        assert len(read) == 12 and set(read) == {'kinetics700', 'again'}, 'both copies are used'


def test_a_part_is_of_recordings(folders):
    stores = [ClipStore(folders/name) for name in ('kinetics700', 'again')]
    few, more = training_clips(stores, 2), training_clips(stores, 4)
    assert [len(copies) for copies in more] == [2]*4 and more[:2] == few
    alone = training_clips(stores[:1], 4)
    assert [copies[0] for copies in more] == [copies[0] for copies in alone]


@pytest.mark.parametrize('dtype, expected', [
    (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_inputs_of_the_network(dtype, expected):
    "Time and colour change places, mel is scaled in float32 or better, and what is missing stays missing."
    planes = torch.randint(0, 256, (2, 4, 48, 36), dtype=torch.uint8)
    mel = torch.tensor([-5., -2., 0., 3.]).repeat(2, 3, 1).to(dtype)
    video, audio = prepare_inputs(planes, mel)
    assert video.shape == (2, 3, 4, 32, 36) and video.dtype == torch.uint8
    for b in range(2):
        for t in range(4):
            assert torch.equal(video[b, :, t], to_rgb(planes[b, t]))
    assert audio.dtype == expected and audio[1, 2].tolist() == [-1.5, 0., 1., 2.5]
    assert torch.equal(prepare_inputs(planes, None)[0], video) and prepare_inputs(planes, None)[1] is None
    assert torch.equal(prepare_inputs(None, mel)[1], audio) and prepare_inputs(None, mel)[0] is None


# Second views: those of a clip that tells where they were taken

class Numbered:
    "A clip whose brightness is the number of the frame, or of the row; its mel is that of the frame."
    clips = [dict(clip='a', steps=40)]

    def __init__(self, what):
        self.what = what

    def planes(self, i, start, end):
        planes = np.zeros((end - start, 96, 64), np.uint8)
        frames = np.arange(start, end, dtype=np.uint8)[:, None, None]
        rows = np.arange(96, dtype=np.uint8)[:, None]
        return planes + (frames if self.what == 'frame' else rows)

    def mel(self, i, start, end):
        frames = np.arange(start, end, dtype=np.float32).repeat(12)
        return np.tile(frames, (80, 1))


def numbered_views(run, what):
    "The views of such a clip in twenty epochs."
    views = TrainingViews([[(Numbered(what), 0)]], run.views, 0, run.pretext.extra)
    return [views[epoch, 0] for epoch in range(20)]
