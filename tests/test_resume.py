"""A run that is killed goes on as if nothing had happened."""
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from glcm.core import InputError, override, parse, root
from glcm.training.checkpoints import load_model
from glcm.training.config import MachineConfig, run_config
from glcm.testing import tiny_clips, tiny_params
from glcm.training.pretrain import train

SCRIPT = textwrap.dedent('''
    import os, signal, sys
    import glcm.training.checkpoints, glcm.training.pretrain
    from test_resume import tiny_train
    folder, kill_at, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    module = glcm.training.checkpoints if where == 'save_tensors' else glcm.training.pretrain
    original = getattr(module, where)
    calls = 0
    def deadly(*args, **kwargs):
        global calls
        calls += 1
        if calls == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, where, deadly)
    tiny_train(folder, f'out-{where}-{kill_at}', f'resume-{where}-{kill_at}')
''')


def write_clips(clips):
    "The clips that the tiny run trains on."
    tiny_clips(clips, 'kinetics700', train=4)
    tiny_clips(clips, 'avspeech', speech=3)


def tiny_train(folder, out, resume, **changes):
    "The tiny run on the clips of `folder`, a checkpoint after each step."
    params = override(tiny_params(), dict(pretrain=changes), 'the test')
    machine = parse(MachineConfig, params['machine'] | dict(checkpoint_minutes=0.0), 'machine')
    return train(run_config(params, 'glcm', 0), machine, f'{folder}/clips', f'{folder}/{out}', f'{folder}/{resume}')


def assert_equal_runs(out, reference):
    "The same losses at the same steps, and the same weights."
    assert (out/'steps.csv').read_text() == (reference/'steps.csv').read_text()
    model, expected = (load_model(folder/'checkpoint.pt')[0].state_dict() for folder in (out, reference))
    assert all(torch.equal(model[name], expected[name]) for name in expected)


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    "Clips, and the run that nobody disturbed."
    folder = tmp_path_factory.mktemp('resume')
    write_clips(folder/'clips')
    tiny_train(folder, 'unbroken', 'resume')
    return folder


def kill(folder, where, kill_at):
    "Run until the `kill_at`-th call of `where`, then die without warning."
    command = [sys.executable, '-c', SCRIPT, str(folder), str(kill_at), where]
    assert subprocess.run(command, cwd=root()/'tests').returncode == -signal.SIGKILL
    assert not (folder/f'out-{where}-{kill_at}'/'checkpoint.pt').exists()
    return folder/f'resume-{where}-{kill_at}'


# Killed before the first step, between steps, and while a checkpoint is being written.
@pytest.mark.parametrize('where, kill_at', [('training_step', 1), ('training_step', 4), ('save_tensors', 3)])
def test_killed_run_equals_unbroken_one(unbroken, where, kill_at):
    resume = kill(unbroken, where, kill_at)
    tiny_train(unbroken, f'again-{where}-{kill_at}', resume.name)
    assert_equal_runs(unbroken/f'again-{where}-{kill_at}', unbroken/'unbroken')
    assert not resume.exists()


def test_damaged_checkpoint_is_passed_over(unbroken, capsys):
    resume = kill(unbroken, 'training_step', 5)
    newest, older = sorted(resume.glob('checkpoint-*.pt'), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-1000])
    tiny_train(unbroken, 'damaged', resume.name)
    assert f'{newest} is not a readable checkpoint' in capsys.readouterr().out
    assert_equal_runs(unbroken/'damaged', unbroken/'unbroken')


def test_changed_code_is_not_gone_on_with(unbroken, monkeypatch):
    resume = kill(unbroken, 'training_step', 3)
    monkeypatch.setattr('glcm.training.checkpoints.code_version', lambda: dict(code='other', commit='4711'))
    with pytest.raises(InputError, match=r'code: [0-9a-f]{16} then, other now\n.*commit: .* then, 4711 now'):
        tiny_train(unbroken, 'changed', resume.name)


@pytest.mark.slow
def test_compiled_run_learns_the_same(unbroken):
    params = tiny_params()
    machine = parse(MachineConfig, params['machine'] | dict(compile=True), 'machine')
    config = run_config(override(params, dict(pretrain=dict(precision='float32')), 'the test'), 'glcm', 0)
    runs = [train(config, replace(machine, compile=compiled), unbroken/'clips',
                  unbroken/f'compiled-{compiled}', unbroken/'resume-compiled')
            for compiled in (True, False)]
    assert runs[0].loss[0] == pytest.approx(runs[1].loss[0], rel=1e-5)
    # Adam makes whole steps of rounding errors
    assert runs[0].loss.tolist() == pytest.approx(runs[1].loss.tolist(), rel=1e-2)
    model, config = load_model(unbroken/'compiled-True'/'checkpoint.pt')
    assert not any('_orig_mod' in name for name in model.state_dict())
