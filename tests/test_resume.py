"""A run that is killed goes on as if nothing had happened."""
import signal
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
import torch

from glcm.testing import tiny_clips, tiny_params
from glcm.train import load_model, run_config, train

SCRIPT = textwrap.dedent('''
    import os, signal, sys
    import glcm.train
    from glcm.train import run_config, train
    from glcm.testing import tiny_params
    folder, kill_at, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    params = tiny_params()
    params['pretrain'] |= dict(checkpoint_minutes=0.0)
    original = getattr(glcm.train, where)
    calls = 0
    def deadly(*args, **kwargs):
        global calls
        calls += 1
        if calls == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(glcm.train, where, deadly)
    train(run_config(params, 'glcm', 0), f'{folder}/clips', f'{folder}/out-{where}-{kill_at}', f'{folder}/resume-{where}-{kill_at}')
''')


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    "Clips, and the run that nobody disturbed."
    folder = tmp_path_factory.mktemp('resume')
    tiny_clips(folder/'clips', 'kinetics700', train=4)
    tiny_clips(folder/'clips', 'avspeech', speech=3)
    params = tiny_params()
    params['pretrain'] |= dict(checkpoint_minutes=0.0)
    train(run_config(params, 'glcm', 0), folder/'clips', folder/'unbroken', folder/'resume')
    return folder


# Killed before the first step, between steps, and while a checkpoint is being written.
@pytest.mark.parametrize('where, kill_at', [('training_step', 1), ('training_step', 4), ('save_checkpoint', 3)])
def test_killed_run_equals_unbroken_one(unbroken, where, kill_at):
    command = [sys.executable, '-c', SCRIPT, str(unbroken), str(kill_at), where]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not (unbroken/f'out-{where}-{kill_at}'/'checkpoint.pt').exists()
    params = tiny_params()
    params['pretrain'] |= dict(checkpoint_minutes=0.0)
    out = unbroken/f'again-{where}-{kill_at}'
    losses = train(run_config(params, 'glcm', 0), unbroken/'clips', out, unbroken/f'resume-{where}-{kill_at}')
    expected = pd.read_csv(unbroken/'unbroken'/'steps.csv')
    assert losses.step.tolist() == expected.step.tolist()
    assert losses.loss.tolist() == pytest.approx(expected.loss.tolist(), rel=1e-12)
    model, reference = (load_model(folder/'checkpoint.pt')[0].state_dict() for folder in (out, unbroken/'unbroken'))
    assert all(torch.equal(model[name], reference[name]) for name in reference)
