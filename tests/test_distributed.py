"""Several processes compute what one would, and lose nothing when one of them dies."""
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import yaml

from glcm.core import override, root
from glcm.distributed import Ranks, launch
from glcm.losses import mil_nce_global, mil_nce_local
from glcm.testing import tiny_params
from test_resume import assert_equal_runs, write_clips

IMPORTS = os.pathsep.join([str(root()), str(root()/'tests')]) # of the programs

STEP = textwrap.dedent('''
    """One step on this rank's share of eight clips; the first rank keeps loss and gradients."""
    import sys
    import torch
    from glcm.core import override, parse
    from glcm.distributed import process_group
    from glcm.model import GLCM
    from glcm.training.config import MachineConfig, run_config
    from glcm.testing import tiny_params
    from glcm.training.pretrain import wrap_network
    from glcm.training.step import training_step

    out, *how = sys.argv[1:]
    small = dict(views=dict(crop=32), model=dict(grid=8)) # a step on such pictures costs a third
    params = override(tiny_params(), small | dict(pretrain=dict(precision='float32', batch=8)), 'test')
    machine = parse(MachineConfig, params['machine'] | {name: True for name in how}, 'machine')
    changes = dict(
        accumulated=dict(pretrain=dict(accumulate=2)), alone=dict(loss=dict(negatives='batch')),
        synchronised=dict(pretrain=dict(sync_batchnorm=True)),
        gathered=dict(model=dict(encoders='slow_fast', normalize=False, detach_attention=False),
                      loss=dict(temperature=1.0, count_positives='twice')))

    def random_batch(config):
        largest = config.views.shift
        return dict(
            planes=torch.randint(0, 256, (8, 16, 48, 32), dtype=torch.uint8),
            mel=torch.randn(8, 80, 192, dtype=torch.float64),
            shift=torch.randint(-largest, largest + 1, (8,)))

    def one_step(variant, ranks):
        torch.manual_seed(0)
        changed = override(params, changes.get(variant, {}), 'test')
        config = run_config(changed, 'glcm' if variant in changes else variant, 0)
        model = GLCM(config.model).double().to(memory_format=torch.channels_last_3d)
        # otherwise batch norm is frozen, since it would average over fewer clips
        network = wrap_network(config.pretext.network(model, config), config, machine, ranks)
        network.train(config.pretrain.sync_batchnorm)
        batch = {name: value[ranks.rank::ranks.size] for name, value in random_batch(config).items()}
        batch['clip'] = ['clip']*8
        optimizer = torch.optim.SGD(model.parameters(), 0.)
        values = training_step(network, optimizer, batch, config, 0, ranks)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return dict(values=values, gradients=gradients)

    variants = ['glcm'] if how else ['glcm', 'glcm_no_local', 'glcm_no_mil', 'released', *changes]
    with process_group() as ranks:
        result = {variant: one_step(variant, ranks) for variant in variants}
        if ranks.rank == 0:
            torch.save(result, out)
''')

LOSSES = textwrap.dedent('''
    """Both losses in float64, each rank with its own clips."""
    import sys
    import torch
    from glcm.distributed import process_group
    from test_distributed import example, losses_and_gradients
    with process_group() as ranks:
        embeddings = example(ranks.rank, ranks.size)
        torch.save(losses_and_gradients(embeddings, ranks), f'{sys.argv[1]}-{ranks.rank}')
''')

TRAIN = textwrap.dedent('''
    """The tiny run, slowed down; rank 1 may die before step 3, once."""
    import os, signal, sys, time
    from pathlib import Path
    import glcm.training.pretrain
    from test_resume import tiny_train
    folder, out, resume, deadly = sys.argv[1:]
    original = glcm.training.pretrain.training_step
    mark = Path(folder, resume + '.dead')

    def step(*args):
        is_victim = deadly == 'deadly' and args[4] == 3 and os.environ.get('RANK') == '1'
        if is_victim and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if deadly == 'slow':
            time.sleep(0.5)
        return original(*args)

    glcm.training.pretrain.training_step = step
    tiny_train(folder, out, resume, batch=4)
''')


def script(folder, text):
    "A file with this program, for torchrun."
    path = folder/'program.py'
    path.write_text(text)
    return str(path)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    "Programs elsewhere import the tests' helpers."
    monkeypatch.setenv('PYTHONPATH', IMPORTS)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')


def example(rank=0, ranks=1):
    "Embeddings of one rank's share of 12 clips of 5 steps of 3 slices, and 4 cells."
    generator = torch.Generator().manual_seed(0)
    shapes = dict(audio=(12, 8), cells=(12, 8, 2, 2), slices=(12, 8, 15), steps=(12, 8, 5))
    z = {}
    for name, shape in shapes.items():
        whole = torch.randn(shape, generator=generator, dtype=torch.float64)
        z[name] = whole.chunk(ranks)[rank].requires_grad_()
    return z


def losses_and_gradients(z, ranks=Ranks()):
    "Both losses, in blocks that divide nothing evenly, and the gradients of their sum."
    global_loss = mil_nce_global(z['audio'], z['cells'], 0.5, 'twice', ranks)
    local_loss = mil_nce_local(z['slices'], z['steps'], 0.5, 'once', 7, ranks)
    gradients = torch.autograd.grad(global_loss + local_loss, list(z.values()))
    return [global_loss.item(), local_loss.item()], [gradient.detach() for gradient in gradients]


@pytest.mark.parametrize('processes', [2, 4])
def test_losses_over_ranks_are_those_of_one_process(tmp_path, processes):
    launch([script(tmp_path, LOSSES), str(tmp_path/'rank')], processes)
    losses, gradients = losses_and_gradients(example())
    parts = [torch.load(tmp_path/f'rank-{rank}') for rank in range(processes)]
    mean_losses = torch.tensor([part_losses for part_losses, _ in parts], dtype=torch.float64).mean(0)
    assert mean_losses.tolist() == pytest.approx(losses, rel=1e-12)
    for k, expected in enumerate(gradients):
        found = torch.cat([part_gradients[k] for _, part_gradients in parts])
        found /= processes # each rank's loss is a mean over its own clips: P times as large
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.fixture(scope='module')
def one_step(tmp_path_factory):
    "Losses and gradients of one process with all eight clips."
    folder = tmp_path_factory.mktemp('one')
    environment = os.environ | dict(PYTHONPATH=IMPORTS, OMP_NUM_THREADS='1')
    subprocess.run([sys.executable, script(folder, STEP), str(folder/'result')], check=True, env=environment)
    return torch.load(folder/'result')


def all_gradients(step):
    "The gradients of a step in one vector."
    return torch.cat([gradient.flatten() for gradient in step['gradients'].values()])


def assert_same_step(found, expected):
    "Losses and gradients are equal to within rounding."
    assert found['values'] == pytest.approx(expected['values'], rel=1e-12)
    assert found['gradients'].keys() == expected['gradients'].keys()
    difference = all_gradients(found) - all_gradients(expected)
    assert float(difference.norm()/all_gradients(expected).norm()) < 1e-10


@pytest.mark.parametrize('how', [['recompute'], pytest.param(['recompute', 'compile'], marks=pytest.mark.slow)])
def test_gradients_stay_when_recomputed_or_compiled(tmp_path, one_step, how):
    launch([script(tmp_path, STEP), str(tmp_path/'result'), *how], 2)
    assert_same_step(torch.load(tmp_path/'result')['glcm'], one_step['glcm'])


@pytest.mark.parametrize('processes', [2, 4])
def test_gradients_over_ranks_are_those_of_one_process(tmp_path, one_step, processes):
    launch([script(tmp_path, STEP), str(tmp_path/'result')], processes)
    result = torch.load(tmp_path/'result')
    own_negatives = 'alone', 'released' # clips of other ranks are no negatives
    for variant, expected in one_step.items():
        if variant not in own_negatives:
            assert_same_step(result[variant], expected)
    for variant in own_negatives: # fewer negatives are easier
        assert result[variant]['values']['loss'] < one_step[variant]['values']['loss'] - 0.5


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "Clips, and the undisturbed run of two processes."
    folder = tmp_path_factory.mktemp('two')
    write_clips(folder/'clips')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', IMPORTS)
        patch.setenv('OMP_NUM_THREADS', '1')
        launch([script(folder, TRAIN), str(folder), 'unbroken', 'resume', 'no'], 2)
    return folder


def test_dead_rank_ends_the_others(clips, capfd):
    started = time.monotonic()
    with pytest.raises(RuntimeError, match='exit code 1'):
        launch([script(clips, TRAIN), str(clips), 'never', 'dead', 'deadly'], 2)
    assert time.monotonic() - started < 60
    assert not (clips/'never').exists()


def test_restarted_ranks_resume_from_the_last_checkpoint(clips):
    launch([script(clips, TRAIN), str(clips), 'restarted', 'restart', 'deadly'], 2, restarts=1)
    assert (clips/'restart.dead').exists()
    assert_equal_runs(clips/'restarted', clips/'unbroken')


WRONG = textwrap.dedent('''
    """The module's own main, whose parameters are missing; each start leaves a file."""
    import os, sys, tempfile
    from glcm.training.pretrain import main
    tempfile.mkstemp(prefix=f'start-{os.environ["RANK"]}-', dir=sys.argv[1])
    main(['glcm', f'--params={sys.argv[1]}/missing.yaml'])
''')


def test_wrong_parameters_start_nothing_again(tmp_path, capfd):
    "What cannot be mended by a new start uses up no restarts."
    with pytest.raises(RuntimeError, match='ended with exit code'):
        launch([script(tmp_path, WRONG), str(tmp_path)], 1, restarts=3)
    assert len(list(tmp_path.glob('start-0-*'))) == 1
    assert 'missing.yaml' in capfd.readouterr().out


WAITING = textwrap.dedent('''
    """The first rank waits for one that sleeps."""
    import sys, time
    import torch
    from glcm.distributed import process_group
    with process_group() as ranks:
        ranks.mean(torch.ones(1))
        ranks.limit_waiting(1)
        if ranks.rank == 1:
            time.sleep(600)
        ranks.mean(torch.ones(1))
''')


def test_silent_rank_is_given_up(tmp_path):
    "In a step sooner than at the start."
    started = time.monotonic()
    with pytest.raises(RuntimeError, match='exit code 1'):
        launch([script(tmp_path, WAITING)], 2)
    assert time.monotonic() - started < 300


def wait_until(condition, seconds):
    "Return when the condition holds, or after these seconds."
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_warned_ranks_save_and_resume(clips, number):
    name = number.name
    program = 'import sys; from glcm.distributed import launch; launch(sys.argv[1:], 2)'
    command = [sys.executable, '-c', program, script(clips, TRAIN), str(clips), name, f'resume-{name}', 'slow']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
    wait_until(lambda: list((clips/f'resume-{name}').glob('checkpoint-*.pt')), seconds=60)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode and 'the same call resumes from' in output
    assert not (clips/name).exists()
    launch([script(clips, TRAIN), str(clips), name, f'resume-{name}', 'no'], 2)
    assert_equal_runs(clips/name, clips/'unbroken')


SRUN = '''#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
'''
SCONTROL = '''#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$1 $2"; fi
'''


@pytest.mark.slow
def test_slurm_script_queues_a_warned_job_again(clips, tmp_path):
    "With an srun that runs its command, and an scontrol that prints its arguments."
    for name, text in dict(srun=SRUN, scontrol=SCONTROL).items():
        (tmp_path/name).write_text(text)
        (tmp_path/name).chmod(0o755)
    params = override(tiny_params(), dict(pretrain=dict(steps=10_000, batch=4)), 'the test')
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(params))
    environment = os.environ | dict(
        PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_SUBMIT_DIR=str(root()), SLURM_JOB_NODELIST='x',
        SLURM_NNODES='1', SLURM_GPUS_ON_NODE='2', SLURM_JOB_ID='77', SLURM_CPUS_PER_TASK='2')
    command = ['bash', str(root()/'pretrain.slurm'), 'glcm', f'--params={tmp_path}/params.yaml',
               f'--clips={clips}/clips', f'--out={tmp_path}/out', f'--resume={tmp_path}/resume']
    log = tmp_path/'log'
    with open(log, 'w') as file:
        job = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        wait_until(lambda: 'global' in log.read_text(), seconds=120)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 0
    assert 'requeue 77' in log.read_text()
    assert len(list((tmp_path/'resume').glob('checkpoint-*.pt'))) == 1
