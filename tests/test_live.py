"""A run can be followed while it lasts: steps.csv, TensorBoard's files and traces of single steps."""
import json
import re
import sys

import pandas as pd
import pytest

import glcm.training.pretrain as module
from glcm.core import InputError, override, parse
from glcm.testing import tiny_clips, tiny_params
from glcm.training.config import MachineConfig, run_config


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp('live')/'clips'
    tiny_clips(folder, 'kinetics700', train=4)
    tiny_clips(folder, 'avspeech', speech=3)
    return folder


def follow(clips, folder, monkeypatch, **changes):
    "Train the tiny run; the steps that steps.csv holds at the beginning of each step, and the losses."
    params, seen = tiny_params(), []
    machine = parse(MachineConfig, params['machine'] | changes, 'machine')
    original = module.training_step

    def watched(*args):
        seen.append(pd.read_csv(folder/'resume'/'steps.csv').step.tolist())
        return original(*args)
    monkeypatch.setattr(module, 'training_step', watched)
    return seen, module.train(run_config(params, 'glcm', 0), machine, clips, folder/'glcm-0', folder/'resume')


def test_steps_grow_and_chosen_steps_are_traced(clips, tmp_path, monkeypatch):
    seen, losses = follow(clips, tmp_path, monkeypatch, trace=[1, 4])
    assert seen == [list(range(step)) for step in range(len(losses))]
    traces = sorted((tmp_path/'glcm-0.live').iterdir())
    assert [path.name for path in traces] == ['step-1.json', 'step-4.json']
    names = {event.get('name') for event in json.loads(traces[0].read_text())['traceEvents']}
    assert any('convolution_backward' in str(name) for name in names)
    assert not (tmp_path/'resume').exists()


def test_after_ten_steps_a_line_says_how_long_the_others_take(clips, tmp_path, capsys):
    params = override(tiny_params(), dict(pretrain=dict(steps=12)), 'the test')
    machine = parse(MachineConfig, params['machine'], 'machine')
    module.train(run_config(params, 'glcm', 0), machine, clips, tmp_path/'glcm-0', tmp_path/'resume')
    lines = [line.split('\r')[-1] for line in capsys.readouterr().out.split('\n')] # what a terminal shows
    said, = [line for line in lines if 'remaining' in line]
    assert re.fullmatch(r'\S+ s a step: about \d+ minutes for the remaining 2 steps', said)


def test_tensorboard_has_the_losses_of_each_step(clips, tmp_path, monkeypatch):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    _, losses = follow(clips, tmp_path, monkeypatch, tensorboard=True)
    written = events.EventAccumulator(str(tmp_path/'glcm-0.live'))
    written.Reload()
    for name in losses.columns.drop('step'):
        assert [event.step for event in written.Scalars(name)] == losses.step.tolist()
        assert [event.value for event in written.Scalars(name)] == pytest.approx(losses[name].tolist(), rel=1e-6)


def test_missing_tensorboard_is_said_before_the_first_step(clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(InputError, match=r'glcm\[live\]'):
        follow(clips, tmp_path, monkeypatch, tensorboard=True)
