"""Killed runs, decoders that crash or hang, a cluster instead of one machine: nothing is lost, nothing differs."""
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import glcm.data.preprocess as preprocessing
from glcm.core import InputError
from glcm.data import workers
from glcm.data.audio import AudioConfig
from glcm.data.clip import ClipConfig, Settings, encode_clip
from glcm.data.damage import Rejection
from glcm.data.preprocess import preprocess
from glcm.data.shards import ClipStore, StoreConfig
from glcm.data.workers import Decoder, PreprocessConfig, encode_row
from glcm.datasets.catalogue import read_catalogue
from glcm.miniature.world import write_world

AUDIO = AudioConfig(sample_rate=24000, bands=80, window=1024, hop=200)
STORE = StoreConfig(container='h264', crf=20, keyframe=16)
CLIP = ClipConfig(fps=10, short_side=64, max_rejected=0.9)
SETTINGS = Settings(CLIP, AUDIO, STORE, 16, False)
ROWS = 4

SCRIPT = '''
import sys
import glcm.data.preprocess as preprocessing
from glcm.datasets.catalogue import read_catalogue
from test_interruption import AUDIO, CLIP, ROWS, STORE
preprocessing.ROWS_PER_SHARD = ROWS
folder, out = sys.argv[1:]
preprocessing.preprocess(read_catalogue('kinetics700', folder), folder, out, CLIP, AUDIO, STORE, 16)
'''


@pytest.fixture(scope='module')
def kinetics(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')/'data'
    write_world(folder, dict(kinetics700=dict(train=26)), workers=0)
    (sorted((folder/'kinetics700').rglob('*.mp4'))[9]).write_bytes(b'damaged')
    return folder/'kinetics700'


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(preprocessing, 'ROWS_PER_SHARD', ROWS)


@pytest.fixture(scope='module')
def unbroken(kinetics, tmp_path_factory):
    "The output of a run that nobody disturbed."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, 'ROWS_PER_SHARD', ROWS)
        out = tmp_path_factory.mktemp('unbroken')/'kinetics700'
        run_on(kinetics, out)
    return contents(out)


@pytest.fixture
def film(kinetics):
    "A film that is in order."
    return next(path for path in sorted(kinetics.rglob('*.mp4')) if path.stat().st_size > 100)


def run_on(folder, out, config=CLIP, table=None, **options):
    "Preprocess a dataset, or the rows of a table of it."
    table = read_catalogue('kinetics700', folder) if table is None else table
    return preprocess(table, folder, out, config, AUDIO, STORE, 16, PreprocessConfig(**options))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(folder):
    return sorted(folder.glob('.kinetics700.unfinished/*/block.json'))


def wait_for(folder, count, run):
    "Until a run has finished so many blocks, or ends."
    while len(finished(folder)) < count and run.poll() is None:
        time.sleep(0.005)


def start(kinetics, out):
    here = Path(__file__).resolve().parent
    environment = os.environ | dict(PYTHONPATH=f'{here}:{here.parent}')
    command = [sys.executable, '-c', SCRIPT, str(kinetics), str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


@pytest.mark.parametrize('after', [0, 2, 5])
def test_killed_run_does_only_what_is_missing(kinetics, unbroken, tmp_path, after):
    out = tmp_path/'kinetics700'
    run = start(kinetics, out)
    wait_for(tmp_path, after, run)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not out.exists()
    shards = [shard for path in finished(tmp_path) for shard in path.parent.glob('*.tar')]
    done = {shard.stat().st_ino for shard in shards}
    assert len(done) >= min(after, 1)
    run_on(kinetics, out)
    assert contents(out) == unbroken
    assert done <= {path.stat().st_ino for path in out.iterdir()}, 'a finished block was done again'
    assert [path.name for path in tmp_path.iterdir()] == ['kinetics700']


def test_children_end_with_a_killed_run(kinetics, tmp_path):
    run = start(kinetics, tmp_path/'kinetics700')
    wait_for(tmp_path, 1, run)
    children = ps('-o', 'pid=', '--ppid', str(run.pid)).split()
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children and not any(is_alive(pid) for pid in children)


def ps(*arguments):
    return subprocess.run(['ps', *arguments], capture_output=True, text=True).stdout


def is_alive(pid):
    status = ps('-o', 'stat=', '-p', pid).strip()
    return bool(status) and not status.startswith('Z')


def test_damaged_leftovers_are_done_again(kinetics, unbroken, tmp_path):
    out = tmp_path/'kinetics700'
    run = start(kinetics, out)
    wait_for(tmp_path, 2, run)
    run.kill()
    run.wait()
    shard = next(finished(tmp_path)[0].parent.glob('*.tar'))
    shard.write_bytes(shard.read_bytes()[:-600])
    run_on(kinetics, out)
    assert contents(out) == unbroken


def test_mended_file_redoes_its_block_alone(kinetics, tmp_path, monkeypatch):
    folder, out = tmp_path/'data', tmp_path/'out'
    shutil.copytree(kinetics, folder)
    table = read_catalogue('kinetics700', folder)
    for path in table.path[1:3]:
        (folder/path).write_bytes(b'bad')
    strict = ClipConfig(fps=10, short_side=64, max_rejected=0.05)
    with pytest.raises(InputError, match='3 of 26'):
        run_on(folder, out, strict)
    assert len(list((tmp_path/'.out.unfinished').iterdir())) == 8 # seven blocks, and the list of what was rejected
    for path in table.path[1:3]:
        shutil.copy(kinetics/path, folder/path)

    encoded = []
    def recorded(folder, row, *rest):
        encoded.append(row['clip'])
        return encode_row(folder, row, *rest)
    monkeypatch.setattr(workers, 'encode_row', recorded)
    rejected = run_on(folder, out, strict)
    assert len(rejected) == 1 and len(ClipStore(out)) == 25
    assert encoded == table['clip'][:ROWS].tolist()


def test_file_that_hangs_is_rejected_and_the_rest_used(kinetics, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, 'media_file', lambda folder, name: folder/name) # lets the pipe through to the decoder
    monkeypatch.setattr(workers, 'DISK_TIMEOUT', 1)
    folder, out = tmp_path/'data', tmp_path/'out'
    shutil.copytree(kinetics, folder)
    table = read_catalogue('kinetics700', folder).head(6)
    clip, path = table.iloc[2][['clip', 'path']]
    (folder/path).unlink()
    os.mkfifo(folder/path) # reading it waits for ever
    began = time.monotonic()
    with pytest.warns(UserWarning, match='1 clips are left out that another run may decode'):
        rejected = run_on(folder, out, table=table, time_limit=0.5)
    assert time.monotonic() - began < 60
    slow = pd.read_csv(out/'rejected.csv').set_index('clip').loc[clip]
    assert slow.reason == 'takes too long'
    assert slow.detail.endswith('10 x preprocess.time_limit + 1 s; tried twice, another run may decode it')
    assert rejected['clip'][rejected.reason == 'takes too long'].tolist() == [clip]
    assert len(ClipStore(out)) == 6 - len(rejected)


def test_longer_time_limit_gives_files_another_chance(kinetics, tmp_path):
    table, out = read_catalogue('kinetics700', kinetics).head(6), tmp_path/'out'
    said = '6 x takes too long.* more than 1e-06 s of computing for each minute of it, as preprocess.time_limit says'
    with pytest.raises(InputError, match=said):
        run_on(kinetics, out, table=table, time_limit=1e-6)
    rejected = run_on(kinetics, out, table=table, time_limit=60.0)
    assert 'takes too long' not in rejected.reason.tolist()
    assert len(ClipStore(out)) >= 5


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


def test_film_on_a_busy_machine_is_as_good_as_on_an_idle_one(film):
    limit, idle, busy = 0.5, Decoder(), Busy()
    expected = idle.encode(film, SETTINGS, None, None, 60)
    busy._start()
    begin = time.monotonic()
    assert busy.encode(film, SETTINGS, None, None, limit) == expected
    assert time.monotonic() - begin > limit, 'it was not slowed down'


def test_transient_failure_is_tried_once_more(kinetics, film, monkeypatch):
    children, start = [], Decoder._start
    def first_is_killed(self):
        start(self)
        children.append(self.child)
        if len(children) == 1:
            self.child.kill()
    monkeypatch.setattr(Decoder, '_start', first_is_killed)
    monkeypatch.setattr(workers, '_idle_decoders', queue.SimpleQueue())
    row = dict(path=str(film.relative_to(kinetics)))
    encoded, rejection = encode_row(kinetics, row, SETTINGS, 60)
    assert rejection is None and len(children) == 2
    assert encoded == Decoder().encode(film, SETTINGS, None, None, 60)


@pytest.mark.parametrize('sign', [signal.SIGSEGV, signal.SIGKILL])
def test_crash_of_the_decoder_is_a_rejection(film, tmp_path, sign):
    hanging = tmp_path/'crash.mp4'
    os.mkfifo(hanging)
    decoder = Decoder()
    first = decoder.encode(film, SETTINGS, None, None, 60)
    threading.Timer(0.3, decoder.child.send_signal, [sign]).start()
    with pytest.raises(Rejection, match=f'crashes the decoder: crash.mp4: {sign.name}'):
        decoder.encode(hanging, SETTINGS, None, None, 30)
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
    options = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with distributed.LocalCluster(**options) as cluster:
        run_on(kinetics, tmp_path/'kinetics700', executor=cluster.scheduler_address)
    assert contents(tmp_path/'kinetics700') == unbroken


def test_cluster_that_does_not_answer_is_named(kinetics, tmp_path, monkeypatch):
    pytest.importorskip('distributed')
    monkeypatch.setattr(workers, 'CONNECT_TIMEOUT', 1)
    said = 'no Dask cluster answers at preprocess.executor = .tcp://127.0.0.1:9'
    with pytest.raises(InputError, match=said):
        run_on(kinetics, tmp_path/'out', executor='tcp://127.0.0.1:9')


def test_long_files_may_take_longer(tmp_path):
    "Ten minutes of sound get ten times the limit, a span of its first minute only one."
    with wave.open(str(tmp_path/'long.wav'), 'wb') as file:
        file.setparams((1, 2, 8000, 0, 'NONE', ''))
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 600*8000).astype('<i2').tobytes())
    settings = Settings(ClipConfig(10, 64, 0.0), AUDIO, STORE, min_frames=10, sound_only=True)
    began = time.process_time()
    expected = encode_clip(tmp_path/'long.wav', settings)
    cost = time.process_time() - began
    decoder = Decoder()
    assert decoder.encode(tmp_path/'long.wav', settings, None, None, cost/4) == expected
    for end, limit in ((None, cost/50), (60, cost/200)):
        with pytest.raises(Rejection, match='takes too long.*for each minute of it'):
            decoder.encode(tmp_path/'long.wav', settings, None, end, limit)
