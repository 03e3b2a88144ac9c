"""Damaged files are used or rejected for a known reason, in time, and without leaving a process behind."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mutations import REASONS, boxes, fuzz, real_files, written_files

from glcm.data.damage import Rejection
from glcm.data.video import read_recording, write_video

SHARED = Path(__file__).resolve().parents[2]/'shared'/'data'
USED = {'unchanged', 'small harm', 'of another file', 'large harm'}
# damage that must be seen
TELLING = ['cut anywhere', 'cut in payload', 'zero length', 'wrong content', 'wrong ending', 'absurd header']
SECONDS = 60 # that a file may take


def children() -> set:
    "Ids of the processes that this one has started; none where the system does not list them."
    listed = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children')
    return set(listed.read_text().split()) if listed.exists() else set()


def check(folder, count):
    "Damage files, and look at what became of each."
    before = children()
    paths = written_files(folder) + (real_files(SHARED, folder) if SHARED.is_dir() else [])
    table = pd.DataFrame(fuzz(paths, folder, count, seconds=SECONDS))
    assert len(table) == count
    assert set(table.outcome) <= REASONS | USED
    assert table.seconds.max() < SECONDS + 5
    assert children() <= before
    large = table[table.outcome == 'large harm']
    assert not large.kind.isin(TELLING).any(), large
    assert len(large) <= 0.01*count, large
    assert (table[table.kind == 'wrong ending'].outcome == 'unchanged').all()


def test_a_few_damaged_files(tmp_path): check(tmp_path, 160)


@pytest.mark.slow
def test_a_thousand_damaged_files(tmp_path): check(tmp_path, 1000)


@pytest.fixture
def film(tmp_path):
    "A film of 2 s whose upper half is bright."
    pictures = np.zeros((20, 64, 96, 3), np.uint8)
    pictures[:, :32] = 200
    write_video(tmp_path/'film.mp4', pictures, np.zeros(48000, np.float32))
    return tmp_path/'film.mp4'


def test_unknown_codec_is_rejected(film):
    film.write_bytes(film.read_bytes().replace(b'avc1', b'zzzz'))
    with pytest.raises(Rejection, match='video in an unknown codec'):
        read_recording(film, 10, 64, 24000)


def test_a_rotation_that_is_none_leaves_the_picture(film):
    data = bytearray(film.read_bytes())
    at, = (at for kind, at, _ in boxes(bytes(data)) if kind == b'mvhd')
    data[at + 48:at + 52] = (255).to_bytes(4, 'big') # the second number of the display matrix
    film.write_bytes(data)
    frames = read_recording(film, 10, 64, 24000).frames
    assert frames.shape == (20, 64, 96, 3)
    assert frames[:, :30].min() > 150 and frames[:, 34:].max() < 50
