"""Stages side by side: nothing is left running, each GPU is used, and a study takes the same way."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glcm.core import read_params, root
from glcm.jobs import UNFINISHED, run_jobs
from glcm.study import run_study


def pipeline(folder: Path, **commands) -> Path:
    "A DVC repository of stages, each with its command."
    folder.mkdir(exist_ok=True)
    stages = ''.join(f'  {name}: {{cmd: "{command}", outs: [{name}.txt]}}\n' for name, command in commands.items())
    (folder/'dvc.yaml').write_text(f'stages:\n{stages}')
    subprocess.run([sys.executable, '-m', 'dvc', 'init', '--no-scm', '--quiet'], cwd=folder, check=True)
    return folder


def runs(pid: int) -> bool:
    state = Path(f'/proc/{pid}/stat')
    return state.exists() and state.read_text().split()[2] != 'Z'


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(0.1)


SLEEPERS = dict(a='echo $$ > a.pid && sleep 60', b='echo $$ > b.pid && sleep 60')


def started(folder: Path) -> list[int]:
    "The processes of the two stages that sleep."
    return [int(path.read_text()) for path in folder.glob('*.pid') if path.read_text().strip()]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_what_was_started_ends_with_it(tmp_path, number):
    folder = pipeline(tmp_path/'pipeline', **SLEEPERS)
    environment = os.environ | dict(PYTHONPATH=str(root()))
    process = subprocess.Popen([sys.executable, '-m', 'glcm.jobs', '2'], cwd=folder, env=environment)
    wait_for(lambda: len(started(folder)) == 2)
    process.send_signal(number)
    assert process.wait(30) != 0
    wait_for(lambda: not any(map(runs, started(folder))))


def test_it_ends_when_the_time_is_up(tmp_path):
    folder = pipeline(tmp_path/'pipeline', **SLEEPERS)
    start = time.monotonic()
    assert run_jobs(folder, 2, minutes=0.5) == UNFINISHED
    assert time.monotonic() - start < 55
    assert len(started(folder)) == 2 # at the same time
    wait_for(lambda: not any(map(runs, started(folder))))


def test_stages_share_the_gpus(tmp_path):
    echo = 'echo $CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS > {name}.txt && sleep 4'
    folder = pipeline(tmp_path/'pipeline', **{name: echo.format(name=name) for name in 'ab'})
    assert run_jobs(folder, 2, gpus=['3', '5']) == 0
    seen = [(folder/f'{name}.txt').read_text().split() for name in 'ab']
    assert sorted(gpu for gpu, _ in seen) == ['3', '5']
    assert all(int(threads) >= 1 for _, threads in seen)


def test_a_study_runs_in_jobs(tmp_path, monkeypatch, capfd):
    (tmp_path/'params.yaml').write_text((root()/'params.yaml').read_text())
    (tmp_path/'dvc.yaml').write_text('stages:\n  a: {cmd: "echo made > a.txt", outs: [a.txt]}\n'
                                     '  b: {cmd: "cat a.txt > b.txt", deps: [a.txt], outs: [b.txt]}\n')
    monkeypatch.chdir(tmp_path)
    folder = tmp_path/'studies'/'other'
    assert run_study('default', name='other', stages=('a',), jobs=2) == 0
    assert (folder/'a.txt').exists() and not (folder/'b.txt').exists()
    assert run_study('default', name='other', minutes=1, jobs=2) == 0
    assert (folder/'b.txt').read_text() == 'made\n'
    assert read_params(folder/'params.yaml')['machine']['checkpoint_minutes'] == 1 # since its time is limited
    assert 'b: done in' in capfd.readouterr().out
