"""Two runs of one folder, full disks, and what is left of a run that was killed."""
import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

import glcm.data.preprocess as preprocessing
import glcm.processes as processes
from glcm.core import InputError, parse
from glcm.data.audio import AudioConfig
from glcm.datasets.catalogue import read_catalogue
from glcm.data.clip import ClipConfig, Settings
from glcm.data.preprocess import preprocess
from glcm.data.shards import ClipStore, StoreConfig
from glcm.data.video import write_video
from glcm.processes import only_run
from glcm.training.checkpoints import save_tensors
from glcm.training.config import MachineConfig, run_config
from glcm.stage import run_stage
from glcm.testing import tiny_params
from glcm.training.pretrain import train

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | dict(PYTHONPATH=f'{ROOT}:{ROOT/"tests"}')
AUDIO = AudioConfig(sample_rate=24000, bands=80, window=1024, hop=200)
STORE = StoreConfig(container='h264', crf=20, keyframe=16)
CLIP = ClipConfig(fps=10, short_side=64, max_rejected=0.9)


@pytest.fixture(scope='module')
def films(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('data')/'films', np.random.default_rng(0)
    folder.mkdir()
    for name in 'ab':
        write_video(folder/f'{name}.mp4', rng.integers(0, 255, (30, 64, 64, 3), np.uint8),
                    rng.normal(size=72000).astype(np.float32)*0.1)
    return folder


def make(films, out): return preprocess(read_catalogue('folder', films, 'films'), films, out, CLIP, AUDIO, STORE, 16)


HOLD = '''
import os, sys, time
from glcm.processes import only_run
with only_run(sys.argv[1]):
    if 'fork' in sys.argv and not os.fork(): time.sleep(20) # as a loader process that outlives its parent
    print('held', flush=True)
    time.sleep(60)
'''


@pytest.fixture
def hold():
    "Start another process that holds an output."
    started = []
    def start(output, *how):
        started.append(subprocess.Popen([sys.executable, '-c', HOLD, str(output), *how], env=ENVIRONMENT,
                                        stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == 'held\n'
        return started[-1]
    yield start
    for process in started:
        process.kill()


def test_second_run_says_which_is_the_first(films, tmp_path, hold, monkeypatch):
    monkeypatch.setattr(processes, 'PATIENCE', 0.2)
    first, out = hold(tmp_path/'out'), tmp_path/'out'
    params = tiny_params()
    config, machine = run_config(params, 'glcm', 0), parse(MachineConfig, params['machine'], 'machine')
    holder = rf'process {first.pid} on {socket.gethostname()}, since 2'
    going_on = rf'a run is going on in {out} \({holder}.*: wait for it or end it'
    for second in (lambda: make(films, out),
                   lambda: train(config, machine, tmp_path/'clips', out, tmp_path/'resume'),
                   lambda: train(config, machine, tmp_path/'clips', tmp_path/'other', out),
                   lambda: run_stage(ROOT/'nbs'/'stages'/'gather.ipynb', out, {})):
        with pytest.raises(InputError, match=going_on):
            second()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.out.lock'], 'the second run left something'
    first.kill()
    first.wait()
    monkeypatch.setattr(processes, 'PATIENCE', 5.0)
    assert make(films, out).empty and len(ClipStore(out)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_lock_ends_with_its_process_even_if_a_child_lives_on(tmp_path, hold, monkeypatch):
    monkeypatch.setattr(processes, 'PATIENCE', 0.2)
    first = hold(tmp_path/'out', 'fork')
    first.kill()
    first.wait()
    with only_run(tmp_path/'out'):
        pass


@pytest.mark.parametrize('left', ['', '{"pid": 1', '{"pid": 1, "host": "elsewhere", "since": "2020-01-01"}'])
def test_lock_file_without_a_process_stops_nobody(tmp_path, left):
    (tmp_path/'.out.lock').write_text(left)
    with only_run(tmp_path/'out'):
        assert (tmp_path/'.out.lock').read_text().startswith(f'{{"pid": {os.getpid()},')
    assert not list(tmp_path.iterdir())


def test_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def no_locks(file, how): raise OSError(errno.ENOLCK, 'no locks')
    monkeypatch.setattr(processes.fcntl, 'lockf', no_locks)
    with pytest.warns(UserWarning, match=f'the file system of {tmp_path} has no locks'), only_run(tmp_path/'out'):
        pass


def test_half_written_files_of_the_dead_are_removed_and_no_others(tmp_path):
    dead = ['.out.abcdefgh.partial', 'out/.state.pt.abcd_123.partial', 'out/networks/.fold-1.pt.abcdefgh.partial']
    others = ['.other.abcdefgh.partial', '.outer.abcdefgh.partial', 'out/.mine.partial', 'out/notes.partial']
    for name in dead + others:
        (tmp_path/name).mkdir(parents=True)
    with only_run(tmp_path/'out'):
        assert not any((tmp_path/name).exists() for name in dead)
    assert all((tmp_path/name).exists() for name in others)


FULL = r'''
import resource, sys
import test_processes as t
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)) # as on a disk with little room
films, out = map(Path, sys.argv[1:])
try: t.make(films, out)
except t.InputError as e: print(f'\nsaid: {e}')
try:
    with t.only_run(out/'checkpoint.pt'): t.save_tensors(out/'checkpoint.pt', dict(weights=t.torch.zeros(100_000)))
except t.InputError as e: print(f'\nsaid: {e}')
'''


def test_full_disk_is_one_sentence_and_nothing_half_written(films, tmp_path):
    ran = subprocess.run([sys.executable, '-c', FULL, str(films), str(tmp_path/'out')], env=ENVIRONMENT,
                         capture_output=True, text=True)
    lines = [line.removeprefix('said: ') for line in ran.stdout.splitlines() if line.startswith('said: ')]
    assert ran.returncode == 0, ran.stderr
    assert [line.partition(' cannot be written: File too large. Make room on that disk')[0] for line in lines] == \
        [str(tmp_path/'out'), str(tmp_path/'out'/'checkpoint.pt')]
    assert [path.name for path in tmp_path.rglob('*') if path.is_file()] == []
    assert make(films, tmp_path/'out').empty


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disks_that_cannot_be_written_are_named(films, tmp_path, monkeypatch, number):
    def write_shard(path, clips): raise OSError(number, os.strerror(number), str(path))
    monkeypatch.setattr(preprocessing, 'write_shard', write_shard)
    reason = os.strerror(number)
    message = f'{tmp_path}/out .* cannot be written: {reason}. .* what was finished is kept'
    with pytest.raises(InputError, match=message):
        make(films, tmp_path/'out')
    assert not (tmp_path/'out').exists()
    assert not list(tmp_path.rglob('*.partial'))
    assert not list(tmp_path.rglob('*.lock'))


STAGE = '''
import threading
from pathlib import Path
import glcm.data.workers
from glcm.data.workers import encode_row
from glcm.distributed import launch
from test_processes import settings
folder = Path(%r)
glcm.data.workers.media_file = lambda folder, name: folder/name # lets the pipe through to the decoder
threading.Thread(target=encode_row, args=[folder, dict(path='hangs.mp4'), settings(), 600.0], daemon=True).start()
launch([str(folder/'rank.py')], 2)
'''
RANK = '''
import os, sys, time
from glcm.processes import end_with_parent
end_with_parent()
open(os.path.join(os.path.dirname(__file__), f"rank-{os.environ['RANK']}"), 'w')
time.sleep(600)
'''


def settings(): return Settings(CLIP, AUDIO, STORE, 16, False)


def descendants(pid):
    "Processes that a process has started, and those that they have."
    listed = subprocess.run(['ps', '-eo', 'pid=,ppid='], capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    found = [pid]
    for parent in found:
        found += [int(child) for child, of in rows if int(of) == parent]
    return found[1:]


def alive(pid):
    status = subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(status) and not status.startswith('Z')


def wait_until(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, 'it takes too long'
        time.sleep(0.1)


def stage_of(tmp_path, source):
    "Start a stage whose notebook is one cell."
    cells = [nbformat.v4.new_code_cell(source)]
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path/'stage.ipynb')
    command = [sys.executable, '-m', 'glcm.stage', str(tmp_path/'stage.ipynb'), str(tmp_path/'ran.ipynb')]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_nothing_is_left_of_a_killed_stage(tmp_path):
    "Its kernel, a decoder that hangs, torchrun and its ranks."
    os.mkfifo(tmp_path/'hangs.mp4')
    (tmp_path/'rank.py').write_text(RANK)
    stage = stage_of(tmp_path, STAGE % str(tmp_path))
    wait_until(lambda: (tmp_path/'rank-0').exists() and (tmp_path/'rank-1').exists(), 120)
    started = descendants(stage.pid)
    assert len(started) >= 5
    stage.kill()
    stage.wait()
    wait_until(lambda: not any(map(alive, started)), 20)


def test_kernel_that_is_still_starting_ends_too(tmp_path):
    stage = stage_of(tmp_path, 'import time; time.sleep(600)')
    wait_until(lambda: descendants(stage.pid))
    started = descendants(stage.pid)
    stage.kill()
    stage.wait()
    wait_until(lambda: not any(map(alive, started)), 30)


def test_stage_ends_with_dvc_and_not_with_a_shell(tmp_path):
    for environment in (dict(DVC_STAGE='preprocess'), {}):
        shell = textwrap.dedent('''
            import subprocess, sys, time
            stage = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            print(stage.pid, flush=True)
            time.sleep(60)
        ''')
        (tmp_path/'began').unlink(missing_ok=True)
        stage_of(tmp_path, f'open("{tmp_path}/began", "w"); import time; time.sleep(600)').kill() # for its notebook
        command = [sys.executable, '-c', shell, sys.executable, '-m', 'glcm.stage',
                   str(tmp_path/'stage.ipynb'), str(tmp_path/'ran.ipynb')]
        parent = subprocess.Popen(command, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, text=True)
        stage = int(parent.stdout.readline())
        wait_until((tmp_path/'began').exists)
        parent.kill()
        if environment:
            wait_until(lambda: not alive(stage), 10)
        else:
            time.sleep(2)
            assert alive(stage)
            os.kill(stage, signal.SIGKILL)
