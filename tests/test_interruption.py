"""Killed runs, decoders that crash or hang, a cluster instead of one machine: nothing is lost, and the bytes are the same."""
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

import glcm.data.preprocess as module
from glcm.core import InputError
from glcm.data.audio import AudioConfig
from glcm.datasets.catalogue import read_catalogue
from glcm.miniature.world import write_world
from glcm.data.preprocess import ClipConfig, Decoder, PreprocessConfig, Settings, attempt, preprocess
from glcm.data.shards import ClipStore, StoreConfig
from glcm.data.damage import Rejection

AUDIO = AudioConfig(sample_rate=24000, bands=80, window=1024, hop=200)
STORE = StoreConfig(container='h264', crf=20, keyframe=16)
CLIP = ClipConfig(fps=10, short_side=64, max_rejected=0.9)
SETTINGS = Settings(CLIP, AUDIO, STORE, 16, False)
ROWS = 4

SCRIPT = '''
import sys
import glcm.data.preprocess as module
from glcm.datasets.catalogue import read_catalogue
from test_interruption import AUDIO, CLIP, ROWS, STORE
module.ROWS_PER_SHARD = ROWS
folder, out = sys.argv[1:]
module.preprocess(read_catalogue('kinetics700', folder), folder, out, CLIP, AUDIO, STORE, 16)
'''


@pytest.fixture(scope='module')
def kinetics(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')/'data'
    write_world(folder, dict(kinetics700=dict(train=26)), workers=0)
    (sorted((folder/'kinetics700').rglob('*.mp4'))[9]).write_bytes(b'damaged')
    return folder/'kinetics700'


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch): monkeypatch.setattr(module, 'ROWS_PER_SHARD', ROWS)


@pytest.fixture(scope='module')
def unbroken(kinetics, tmp_path_factory):
    "The output of a run that nobody disturbed."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'ROWS_PER_SHARD', ROWS)
        out = tmp_path_factory.mktemp('unbroken')/'kinetics700'
        preprocess(read_catalogue('kinetics700', kinetics), kinetics, out, CLIP, AUDIO, STORE, 16)
    return contents(out)


def contents(folder): return {path.name: path.read_bytes() for path in folder.iterdir()}
def finished(folder): return sorted(folder.glob('.kinetics700.unfinished/*/block.json'))


def start(kinetics, out):
    here = Path(__file__).resolve().parent
    return subprocess.Popen([sys.executable, '-c', SCRIPT, str(kinetics), str(out)], stdout=subprocess.DEVNULL,
                            env=os.environ | dict(PYTHONPATH=f'{here}:{here.parent}'))


@pytest.mark.parametrize('after', [0, 2, 5])
def test_killed_run_does_only_what_is_missing(kinetics, unbroken, tmp_path, after):
    out = tmp_path/'kinetics700'
    run = start(kinetics, out)
    while len(finished(tmp_path)) < after and run.poll() is None: time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not out.exists()
    done = {path.parent: (path.parent/f'{n:07d}.tar').stat().st_ino for path in finished(tmp_path) for n in range(7)
            if (path.parent/f'{n:07d}.tar').exists()}
    assert len(done) >= min(after, 1)
    preprocess(read_catalogue('kinetics700', kinetics), kinetics, out, CLIP, AUDIO, STORE, 16)
    assert contents(out) == unbroken
    assert set(done.values()) <= {path.stat().st_ino for path in out.iterdir()}, 'a finished block was done again'
    assert [path.name for path in tmp_path.iterdir()] == ['kinetics700']


def test_children_end_with_a_killed_run(kinetics, tmp_path):
    run = start(kinetics, tmp_path/'kinetics700')
    while not finished(tmp_path): time.sleep(0.005)
    children = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(run.pid)], capture_output=True, text=True).stdout.split()
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in children) and time.monotonic() < deadline: time.sleep(0.05)
    assert children and not any(alive(pid) for pid in children)


def alive(pid):
    status = subprocess.run(['ps', '-o', 'stat=', '-p', pid], capture_output=True, text=True).stdout.strip()
    return bool(status) and not status.startswith('Z')


def test_damaged_leftovers_are_done_again(kinetics, unbroken, tmp_path):
    out = tmp_path/'kinetics700'
    run = start(kinetics, out)
    while len(finished(tmp_path)) < 2: time.sleep(0.005)
    run.kill()
    run.wait()
    shard = next(finished(tmp_path)[0].parent.glob('*.tar'))
    shard.write_bytes(shard.read_bytes()[:-600])
    preprocess(read_catalogue('kinetics700', kinetics), kinetics, out, CLIP, AUDIO, STORE, 16)
    assert contents(out) == unbroken


def test_mended_file_redoes_its_block_alone(kinetics, tmp_path):
    shutil.copytree(kinetics, tmp_path/'data')
    table = read_catalogue('kinetics700', tmp_path/'data')
    for path in table.path[1:3]: (tmp_path/'data'/path).write_bytes(b'bad')
    strict = ClipConfig(fps=10, short_side=64, max_rejected=0.05)
    with pytest.raises(InputError, match='3 of 26'): preprocess(table, tmp_path/'data', tmp_path/'out', strict, AUDIO, STORE, 16)
    before = {path.name for path in (tmp_path/'.out.unfinished').iterdir()}
    for path in table.path[1:3]: shutil.copy(kinetics/path, tmp_path/'data'/path)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = module.attempt
        patch.setattr(module, 'attempt', lambda folder, row, *rest: (seen.append(row['clip']), real(folder, row, *rest))[1])
        rejected = preprocess(table, tmp_path/'data', tmp_path/'out', strict, AUDIO, STORE, 16)
    assert len(rejected) == 1 and len(ClipStore(tmp_path/'out')) == 25 and len(before) == 8
    assert seen == table['clip'][:ROWS].tolist()


def test_file_that_hangs_is_rejected_and_the_rest_used(kinetics, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'media_file', lambda folder, name: folder/name) # lets the pipe through to the decoder
    shutil.copytree(kinetics, tmp_path/'data')
    table = read_catalogue('kinetics700', tmp_path/'data').head(6)
    (tmp_path/'data'/table.path[2]).unlink()
    os.mkfifo(tmp_path/'data'/table.path[2]) # reading it waits for ever
    monkeypatch.setattr(module, 'DISK', 1)
    began = time.monotonic()
    with pytest.warns(UserWarning, match='1 clips are left out that another run may decode'):
        rejected = preprocess(table, tmp_path/'data', tmp_path/'out', CLIP, AUDIO, STORE, 16, PreprocessConfig(time_limit=0.5))
    assert time.monotonic() - began < 60
    slow = pd.read_csv(tmp_path/'out'/'rejected.csv').set_index('clip').loc[table['clip'][2]]
    assert slow.reason == 'takes too long' and slow.detail.endswith('10 x preprocess.time_limit + 1 s; tried twice, another run may decode it')
    assert rejected['clip'][rejected.reason == 'takes too long'].tolist() == [table['clip'][2]]
    assert len(ClipStore(tmp_path/'out')) == 6 - len(rejected)


def test_longer_time_limit_gives_files_another_chance(kinetics, tmp_path):
    table = read_catalogue('kinetics700', kinetics).head(6)
    def attempt(seconds):
        return preprocess(table, kinetics, tmp_path/'out', CLIP, AUDIO, STORE, 16, PreprocessConfig(time_limit=seconds))
    with pytest.raises(InputError, match='6 x takes too long.* more than 1e-06 s of computing, as preprocess.time_limit says'): attempt(1e-6)
    assert 'takes too long' not in attempt(60.0).reason.tolist()
    assert len(ClipStore(tmp_path/'out')) >= 5


class Busy(Decoder):
    "A decoder on a machine so busy that the child gets a tenth of the time."
    def _start(self):
        super()._start()
        threading.Thread(target=self.slow_down, args=[self.child], daemon=True).start()

    def slow_down(self, child):
        while child.poll() is None:
            child.send_signal(signal.SIGSTOP)
            time.sleep(0.18)
            child.send_signal(signal.SIGCONT)
            time.sleep(0.02)


def test_film_on_a_busy_machine_is_as_good_as_on_an_idle_one(kinetics, monkeypatch):
    film, limit = next(path for path in sorted(kinetics.rglob('*.mp4')) if path.stat().st_size > 100), 0.5
    idle, busy = Decoder(), Busy()
    expected = idle.encode(film, SETTINGS, None, None, 60)
    busy._start()
    begin = time.monotonic()
    assert busy.encode(film, SETTINGS, None, None, limit) == expected
    assert time.monotonic() - begin > limit, 'it was not slowed down'


def test_passing_trouble_is_tried_once_more(kinetics, monkeypatch):
    film = next(path for path in sorted(kinetics.rglob('*.mp4')) if path.stat().st_size > 100)
    row, children, real = dict(path=str(film.relative_to(kinetics))), [], Decoder._start
    def first_is_killed(self):
        real(self)
        children.append(self.child)
        if len(children) == 1: self.child.kill()
    monkeypatch.setattr(Decoder, '_start', first_is_killed)
    monkeypatch.setattr(module, '_idle', queue.SimpleQueue())
    encoded, rejection = attempt(kinetics, row, SETTINGS, 60)
    assert rejection is None and len(children) == 2
    assert encoded == Decoder().encode(film, SETTINGS, None, None, 60)


@pytest.mark.parametrize('sign', [signal.SIGSEGV, signal.SIGKILL])
def test_crash_of_the_decoder_is_a_rejection(kinetics, tmp_path, sign):
    os.mkfifo(tmp_path/'crash.mp4')
    film = next(path for path in sorted(kinetics.rglob('*.mp4')) if path.stat().st_size > 100)
    decoder = Decoder()
    first = decoder.encode(film, SETTINGS, None, None, 60)
    threading.Timer(0.3, lambda: decoder.child.send_signal(sign)).start()
    with pytest.raises(Rejection, match=f'crashes the decoder: crash.mp4: {sign.name}'): decoder.encode(tmp_path/'crash.mp4', SETTINGS, None, None, 30)
    assert decoder.encode(film, SETTINGS, None, None, 60) == first


@pytest.fixture
def environment():
    "Dask leaves thread limits in the environment, which the processes of later tests would inherit."
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_dask_cluster_gives_the_same_bytes(kinetics, unbroken, tmp_path, environment):
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        preprocess(read_catalogue('kinetics700', kinetics), kinetics, tmp_path/'kinetics700', CLIP, AUDIO, STORE, 16,
                   PreprocessConfig(executor=cluster.scheduler_address))
    assert contents(tmp_path/'kinetics700') == unbroken


def test_cluster_that_does_not_answer_is_named(kinetics, tmp_path, monkeypatch):
    pytest.importorskip('distributed')
    monkeypatch.setattr(module, 'ANSWERING', 1)
    with pytest.raises(InputError, match='no Dask cluster answers at preprocess.executor = .tcp://127.0.0.1:9'):
        preprocess(read_catalogue('kinetics700', kinetics), kinetics, tmp_path/'out', CLIP, AUDIO, STORE, 16, PreprocessConfig(executor='tcp://127.0.0.1:9'))
