"""The commands as a user calls them: bad input in one sentence, long films in bounded memory, a film put right."""
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import glcm
from glcm import commands
from glcm.data.video import read_recording, write_video
from glcm.films import Film, film_writer, pieces
from glcm.offset import shift_sound

ROOT = Path(__file__).parents[1]


def call(*arguments, capsys):
    "Exit code and what was printed."
    with pytest.raises(SystemExit) as e:
        commands.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return e.value.code or 0, printed.out, printed.err


@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "A film of two seconds, one without sound, and files that are no films."
    folder = tmp_path_factory.mktemp('films')
    rng = np.random.default_rng(0)
    frames = np.kron(rng.integers(0, 255, (20, 8, 10, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    write_video(folder/'film.mp4', frames, 0.1*rng.standard_normal(48000), fps=10)
    write_video(folder/'silent.mp4', frames, None, fps=10)
    write_video(folder/'short.mp4', frames[:5], 0.1*rng.standard_normal(12000), fps=10)
    (folder/'text.mp4').write_text('no film')
    whole = (folder/'film.mp4').read_bytes()
    (folder/'torn.mp4').write_bytes(whole[:len(whole)//2])
    return folder


BAD = [ # arguments, and what the sentence says
    (('look', 'none.mp4'), 'missing file'),
    (('look', 'text.mp4'), 'does not decode'),
    (('look', 'torn.mp4'), 'torn.mp4'),
    (('look', 'silent.mp4'), 'no audio'),
    (('look', 'short.mp4'), 'too short'),
    (('look', 'film.mp4', '--out', 'film.mp4'), 'film itself'),
    (('look', 'film.mp4', '--out', 'film.gif'), 'mp4'),
    (('look', 'film.mp4', '--out', 'text.mp4/film.mp4'), 'text.mp4'),
    (('look', 'film.mp4', '--seconds', 'nan'), '--seconds'),
    (('look', 'film.mp4', '--short-side', '31'), '--short-side'),
    (('look', 'film.mp4', '--model', 'none'), 'no model none'),
    (('offset', 'silent.mp4'), 'no audio'),
    (('offset', 'film.mp4', '--write', 'fixed.mp4'), 'cannot be told'),
    (('embed', 'film.mp4'), 'no folder'),
    (('embed', '.', '--out', 'vectors.txt'), '.npz or .parquet'),
    (('export', 'none', 'bundle'), 'no checkpoint'),
    (('train', 'glcm', '--params', 'none.yaml'), 'does not exist'),
    (('dance',), 'no command')]


@pytest.mark.parametrize('arguments, sentence', BAD, ids=[' '.join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_sentence(films, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(films)
    before = {path: path.read_bytes() for path in films.iterdir()}
    code, _, err = call(*arguments, capsys=capsys)
    assert code == 2 and sentence in err
    assert len(err.strip().splitlines()) == 1, err
    assert {path: path.read_bytes() for path in films.iterdir()} == before, 'something was left behind, or overwritten'


@pytest.mark.parametrize('name', commands.COMMANDS)
def test_help_has_one_example(capsys, name):
    code, out, _ = call(name, '--help', capsys=capsys)
    assert code == 0 and out.count('example: glcm ' + name) == 1


@pytest.mark.parametrize('own', [None, 'ACTIVE'])
def test_threads_that_wait_leave_their_core(monkeypatch, capsys, own):
    "Spinning threads made `glcm offset` five times as slow on a busy machine; the user's own choice is kept."
    monkeypatch.setenv('OMP_WAIT_POLICY', 'ACTIVE')
    if own is None:
        monkeypatch.delenv('OMP_WAIT_POLICY')
    call('look', '--help', capsys=capsys)
    assert os.environ['OMP_WAIT_POLICY'] == (own or 'PASSIVE')


def test_parquet_holds_what_npz_holds(films, tmp_path, capsys, monkeypatch):
    pytest.importorskip('pyarrow')
    for kind in ('npz', 'parquet'):
        code, out, err = call('embed', films, '--out', tmp_path/f'vectors.{kind}', capsys=capsys)
        assert code == 0 and '1 spans of 1 films' in out
        assert all(name in err for name in ('silent.mp4', 'short.mp4', 'text.mp4', 'torn.mp4'))
    table = pd.read_parquet(tmp_path/'vectors.parquet')
    with np.load(tmp_path/'vectors.npz') as arrays:
        assert list(table.columns) == list(arrays)
        assert np.array_equal(np.stack(table.video_local), arrays['video_local'])


def test_rotation_and_second_track_survive_a_shift(tmp_path):
    "A phone's film lies on its side, with a note of how to turn it."
    import av
    frames = np.zeros((20, 64, 96, 3), np.uint8)
    frames[:, :32] = 255
    write_video(tmp_path/'film.mp4', frames, 0.1*np.random.default_rng(0).standard_normal(48000), fps=10)
    data = bytearray((tmp_path/'film.mp4').read_bytes())
    place = data.index(b'tkhd') + 44 # the display matrix of the first track: turn it by 90 degrees
    quarter = np.array([0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30], '>i4').tobytes()
    data[place:place + 36] = quarter
    (tmp_path/'turned.mp4').write_bytes(data)
    shift_sound(tmp_path/'turned.mp4', tmp_path/'moved.mp4', 120)
    turned, moved = (read_recording(tmp_path/f'{name}.mp4', 10, 64, None).frames for name in ('turned', 'moved'))
    assert turned.shape[1:3] == (96, 64) and np.array_equal(turned, moved)
    with av.open(str(tmp_path/'moved.mp4')) as container:
        assert len(container.streams) == 2


def test_pieces_leave_no_decoded_pictures_behind(films):
    "A piece of a phone's film of 1080 x 1920 pixels left 160 MB."
    import av
    _, config = glcm.load()
    counts = []
    gc.collect()
    gc.disable() # what is no longer used is to be free at once
    try:
        for _ in pieces(Film(films/'film.mp4', config, 64), 4, 12):
            counts.append(sum(type(thing) is av.VideoFrame for thing in gc.get_objects()))
    finally:
        gc.enable()
    assert len(counts) == 5 and max(counts) <= 2, f'{counts} pictures in memory; the film has 20'


LONG = '''
import resource, sys
from glcm import commands
try:
    commands.main(sys.argv[1:])
except SystemExit as e:
    assert not e.code, e.code
print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
'''


def peak_memory(*arguments, folder): # MiB
    "Of a command in a process of its own."
    command = [sys.executable, '-c', LONG, *map(str, arguments)]
    env = dict(PYTHONPATH=':'.join([str(ROOT), *sys.path]), OMP_NUM_THREADS='1', PATH='')
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unit = 2**20 if sys.platform == 'darwin' else 2**10 # macOS counts bytes, Linux KiB
    return int(done.stdout.split('peak')[-1])/unit


@pytest.mark.slow
@pytest.mark.parametrize('command', ['look', 'offset', 'embed'])
def test_memory_does_not_grow_with_the_film(tmp_path, command):
    "A film of four minutes takes as much as one of forty seconds."
    rng = np.random.default_rng(0)
    peaks = []
    for seconds in (40, 240):
        folder = tmp_path/str(seconds)
        folder.mkdir()
        film = folder/'film.mp4'
        with film_writer(film, 10, 24000) as writer:
            for _ in range(seconds//10):
                blocks = rng.integers(0, 255, (100, 9, 16, 3))
                frames = np.kron(blocks, np.ones((1, 20, 20, 1))).astype(np.uint8)
                writer.add(frames, 0.1*rng.standard_normal(240000))
        source = folder if command == 'embed' else film
        peaks.append(peak_memory(command, source, folder=folder))
    print(command, peaks)
    assert peaks[1] < peaks[0] + 60, 'MiB; all pictures of the long film take 240 MiB more, at the size they are drawn'


@pytest.mark.slow
def test_installed_package_needs_no_repository(films, tmp_path):
    "What setup.py puts into a wheel, in a folder that is no repository."
    source = tmp_path/'source'
    source.mkdir()
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md'):
        shutil.copy(ROOT/name, source)
    shutil.copytree(ROOT/'glcm', source/'glcm')
    folders = ['--build-base', tmp_path/'build', '--build-lib', tmp_path/'installed']
    build = [sys.executable, 'setup.py', '-q', 'build', *folders]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    packages = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    env = dict(PYTHONPATH=':'.join([str(tmp_path/'installed'), *packages]), OMP_NUM_THREADS='1', PATH='')
    look = [sys.executable, '-m', 'glcm.commands', 'look', films/'film.mp4', '--out', tmp_path/'look.mp4']
    done = subprocess.run(look, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path/'look.csv')) == 20
    assert len(read_recording(tmp_path/'look.mp4', 10, 64, 24000).frames) == 20
