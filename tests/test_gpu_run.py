"""`make gpu` without a GPU: the dry run, pieces that fail or take too long, studies that go on."""
import json
import sys
import time

import pytest
import torch

from glcm.gpu import run
from glcm.gpu.benchmark import DRY, FULL
from glcm.gpu.smoke import check_pipeline
from glcm.jobs import UNFINISHED, run_for

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU: `make gpu` is the test')


def test_without_a_gpu_it_says_so_and_runs_dry(monkeypatch, capsys):
    "One piece of each kind; `make slow` runs all of them."
    everything = run.dry_run
    monkeypatch.setattr(run, 'dry_run', lambda: everything(('check recompute', 'time released 6', 'profile')))
    run.main([])
    printed = capsys.readouterr().out
    assert 'There is no GPU here' in printed
    assert '| check recompute | True |' in printed
    assert '| released | 2 | compile |' in printed
    assert '| convolutions |' in printed


@pytest.mark.slow
def test_the_whole_dry_run(capsys):
    run.main([])
    assert '| False |' not in capsys.readouterr().out


def test_the_pipeline_in_small(tmp_path):
    found = check_pipeline(tmp_path)
    assert found['predictions'] == 50
    assert found['resumed'] == found['repeated'] == 0 # on a CPU


def test_every_measure_is_timed_on_a_gpu():
    names = list(run.pieces(FULL))
    assert len([name for name in names if name.startswith('time paper')]) == 7
    assert names.index('check pipeline') < names.index('time released 0')
    assert set(run.pieces(DRY)) < set(names)


def test_a_piece_that_crashes_leaves_its_error(tmp_path):
    "And what another process wrote before stays until a piece has a result of its own."
    run.run_apart(tmp_path/'no such piece.json', 2)
    result = json.loads((tmp_path/'no such piece.json').read_text())
    assert not result['ok'] and 'exit code 1' in result['found']['error']


def test_a_piece_that_takes_too_long_is_ended(tmp_path):
    start = time.monotonic()
    run.run_apart(tmp_path/'check pipeline.json', 1/60)
    assert time.monotonic() - start < 20
    assert 'not finished' in json.loads((tmp_path/'check pipeline.json').read_text())['found']['error']


@pytest.fixture
def no_pieces(monkeypatch):
    "Studies alone, whose runs are listed with their minutes."
    calls = []
    outcomes = dict(default=[UNFINISHED, UNFINISHED, 0], seeds=[1])

    def run_study(study, minutes, name, jobs):
        calls.append((study, name))
        return outcomes[study].pop(0)

    monkeypatch.setattr(run, 'pieces', lambda sizes: {})
    monkeypatch.setattr(run, 'run_study', run_study)
    return calls


def test_a_study_goes_on_until_it_is_finished(no_pieces, tmp_path):
    "One that fails is not tried again in the same call; one that is finished is not run again in the next."
    run.run_all(tmp_path, 60)
    assert no_pieces == [('default', 'default-gpu')]*3 + [('seeds', 'seeds-gpu')]
    assert 'it ended with exit code 1' in (tmp_path/'README.md').read_text()
    assert run.is_done(tmp_path/'study default.json')
    assert not run.is_done(tmp_path/'study seeds.json')


def test_nothing_is_started_when_time_is_up(no_pieces, tmp_path):
    run.run_all(tmp_path, 0.5)
    assert no_pieces == []


def test_a_result_of_other_code_is_not_done(tmp_path):
    run.write_result(tmp_path/'a.json', dict(found=1), 1.0)
    assert run.is_done(tmp_path/'a.json')
    result = json.loads((tmp_path/'a.json').read_text())
    (tmp_path/'a.json').write_text(json.dumps(result | dict(code='other')))
    assert not run.is_done(tmp_path/'a.json')


def test_a_command_that_ignores_requests_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr('glcm.jobs.GRACE', 0.5)
    stubborn = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)'
    start = time.monotonic()
    assert run_for(2/60, [sys.executable, '-c', stubborn], tmp_path) == UNFINISHED
    assert time.monotonic() - start < 20
