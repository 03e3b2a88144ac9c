"""Finetuning in several processes is finetuning in one: losses, gradients, statistics, predictions, resuming."""
import os
import textwrap
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from glcm.core import InputError, root
from glcm.data.shards import ClipStore
from glcm.distributed import Ranks, launch
from glcm.losses import ALONE
from glcm.model import GLCM
from glcm.tasks.classify import Classifier
from glcm.tasks.config import task_config
from glcm.tasks.finetune import CachedFeatures, FinetuneJob, FinetuneProgress, Phase, batch_loss, run_job, to_inputs
from glcm.tasks.measure import COLUMNS, MEASURES, run_measure
from glcm.tasks.sentences import SentenceRecognizer
from glcm.tasks.windows import LabelledWindows, collate_windows
from glcm.testing import tiny_clips, tiny_params
from glcm.training.checkpoints import save_checkpoint
from glcm.training.config import run_config

PARAMS = tiny_params('full')
RUN = run_config(PARAMS, 'glcm', 0)
LENGTHS = 16, 9, 12, 16, 10 # of the clips of a batch, frames; two processes have three and two of them

PROGRAM = textwrap.dedent('''
    """What the tests compare, computed by two processes."""
    import sys
    import torch
    from glcm.distributed import process_group
    from test_task_ranks import outcomes
    folder, out = sys.argv[1:]
    with process_group() as ranks:
        found = outcomes(folder, ranks)
        if ranks.rank == 0:
            torch.save(found, out)
''')

NETWORKS = { # name -> network, task and values
    'words': (Classifier, 'ucf101', dict(modality='video+audio', frames=16)),
    'fakes': (Classifier, 'ucf101', dict(target='fake', features='local')),
    'probe': (Classifier, 'ucf101', dict(probe=True)),
    'sentences': (SentenceRecognizer, 'lrs2', dict(size=16, heads=2, layers=1, dropout=0.0)),
    'without CTC': (SentenceRecognizer, 'lrs2', dict(size=16, heads=2, layers=1, dropout=0.0, ctc=0.0))}


def new_network(name):
    kind, task, values = NETWORKS[name]
    torch.manual_seed(0)
    config = replace(task_config(PARAMS, task), precision='float32', **values)
    return kind(GLCM(RUN.model), RUN, config, list('ABC')).double()


def random_batch(network, ranks):
    "This rank's share of five windows: of one length for classes, of many for sentences, which have many lengths too."
    generator = torch.Generator().manual_seed(0)
    windows = []
    for k, length in enumerate(LENGTHS):
        is_sentence = network.config.target == 'text'
        planes = torch.randint(0, 256, (length if is_sentence else 16, 48, 32), generator=generator, dtype=torch.uint8)
        mel = torch.randn(80, 192, generator=generator, dtype=torch.double)
        target = torch.arange(1, 3 + k) if is_sentence else torch.tensor(k % 2)
        windows.append(dict(clip=k, planes=planes, mel=mel, target=target))
    if not network.config.uses_audio:
        windows = [{name: window[name] for name in ('clip', 'planes', 'target')} for window in windows]
    return collate_windows(windows[ranks.rank::ranks.size])


def in_float64(network, batch, device):
    "The outputs of a batch without the rounding to float32."
    return network(*to_inputs(batch, device))


def one_step(name, ranks):
    "Loss, gradients and the statistics of batch norm after a step."
    network = new_network(name).train()
    module = batch_loss(network, ranks)
    with patch('glcm.tasks.finetune.forward_batch', in_float64):
        loss = module(random_batch(network, ranks))
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    buffers = {name: buffer for name, buffer in network.named_buffers() if buffer.is_floating_point()}
    return dict(loss=ranks.mean(loss.detach()), gradients=gradients, buffers=buffers)


class Stopped(Exception):
    "What interrupts a run here."


def job_of(folder, ranks, **values):
    "Two epochs with frozen encoders and two of all, on the clips of ESC-50; batches of five clips."
    torch.manual_seed(0)
    changed = dict(frozen=2, epochs=2, batch=5, windows=2, precision='float32') | values
    config = replace(task_config(tiny_params(), 'esc50'), **changed)
    store = ClipStore(f'{folder}/esc50')
    store.clips = [row | dict(fold=1 + (row['fold'] > 1)) for row in store.clips] # two folds
    return FinetuneJob(GLCM(RUN.model), RUN, store, config, 0, 0, ranks)


def cached(folder, ranks):
    "The features and the statistics that frozen encoders give 13 clips, in batches of five."
    job = job_of(folder, ranks)
    network = Classifier(job.model, RUN, job.config, list('AB'))
    source = CachedFeatures(network, job.windows({}, job.config), list(range(13)), 0, ranks=ranks)
    return dict(features=source.features, buffers=dict(network.features.named_buffers()))


def interrupted(folder, name, job, at):
    "The rows of a job that fails after so many states and is started again."
    save = FinetuneProgress.save

    def save_and_fail(self, *args):
        save(self, *args)
        self.calls = getattr(self, 'calls', 0) + 1
        if self.calls == at: # on every rank, though only the first one writes
            raise Stopped

    state = f'{folder}/{name}-{job.ranks.size}'
    FinetuneProgress.save = save_and_fail
    try:
        run_job(job, None, state, 0.0)
        raise AssertionError('the job was not interrupted')
    except Stopped:
        pass
    finally:
        FinetuneProgress.save = save
    return run_job(job, None, state, 0.0)


def measured(folder, name, ranks):
    "The rows of a measure of a pretrained model."
    table = run_measure(name, f'{folder}/pretrained.pt', f'{folder}/vggss', ranks)
    return table.to_dict('records')


def outcomes(folder, ranks):
    "All that one process and two should agree on."
    job = job_of(folder, ranks)
    return dict(
        measures={name: measured(folder, name, ranks) for name in MEASURES},
        steps={name: one_step(name, ranks) for name in NETWORKS}, cached=cached(folder, ranks),
        rows=run_job(job, f'{folder}/kept-{ranks.size}'), again=interrupted(folder, 'state', job, 6),
        probe=run_job(job_of(folder, ranks, probe=True, frozen=0), f'{folder}/probe-{ranks.size}'))


@pytest.fixture(scope='module')
def one_and_two(tmp_path_factory):
    "The outcomes of one process and of two."
    folder = tmp_path_factory.mktemp('ranks')
    tiny_clips(folder, 'esc50', recordings=1)
    tiny_clips(folder, 'vggss', held_out=17)
    torch.manual_seed(0)
    save_checkpoint(folder/'pretrained.pt', RUN, 'no data', 0, GLCM(RUN.model))
    (folder/'program.py').write_text(PROGRAM)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv('PYTHONPATH', os.pathsep.join([str(root()), str(root()/'tests')]))
        environment.setenv('OMP_NUM_THREADS', '1')
        launch([str(folder/'program.py'), str(folder), str(folder/'two')], 2)
    return outcomes(folder, ALONE), torch.load(folder/'two', weights_only=True)


def relative_error(found, expected):
    "Of all tensors together."
    assert found.keys() == expected.keys()
    distance = sum(float((found[name].double() - expected[name].double()).norm()**2) for name in expected)
    return (distance/sum(float(x.double().norm()**2) for x in expected.values()))**0.5


@pytest.mark.parametrize('name', NETWORKS)
def test_a_step_of_two_processes_is_that_of_one(one_and_two, name):
    "Batches of three and of two clips, in float64."
    one, two = (outcome['steps'][name] for outcome in one_and_two)
    assert two['loss'].item() == pytest.approx(one['loss'].item(), rel=1e-6) # of fakes it is float32
    assert relative_error(two['gradients'], one['gradients']) < 1e-6
    assert relative_error(two['buffers'], one['buffers']) < 1e-10


def test_features_of_frozen_encoders_are_computed_once_for_all(one_and_two):
    one, two = (outcome['cached'] for outcome in one_and_two)
    assert len(one['features']) == 26
    assert relative_error(two['features'], one['features']) < 1e-5
    assert relative_error(two['buffers'], one['buffers']) < 1e-6


def test_predictions_come_in_order(one_and_two):
    one, two = (outcome['rows'] for outcome in one_and_two)
    assert [row['clip'] for row in two] == [row['clip'] for row in one]


def test_predictions_of_a_probe_agree(one_and_two):
    "Where encoders learn, Adam's first steps make much of what float32 rounds off; their gradients are compared above."
    one, two = (outcome['probe'] for outcome in one_and_two)
    assert [row['clip'] for row in two] == [row['clip'] for row in one]
    assert [row['predicted'] for row in two] == [row['predicted'] for row in one]
    assert [row['confidence'] for row in two] == pytest.approx([row['confidence'] for row in one], abs=1e-4)


def test_an_interrupted_run_of_two_processes_ends_the_same(one_and_two):
    "To the last digit."
    for outcome in one_and_two:
        assert outcome['again'] == outcome['rows']


@pytest.mark.parametrize('name', MEASURES)
def test_a_measure_of_two_processes_is_that_of_one(one_and_two, name):
    "17 clips, in their order, to the last digit."
    one, two = (outcome['measures'][name] for outcome in one_and_two)
    assert two == one and len(one) >= 17
    assert set(COLUMNS[name]) <= set(one[0])


def test_batches_that_are_too_small_are_named(one_and_two, tmp_path):
    tiny_clips(tmp_path, 'esc50', recordings=1)
    job = job_of(tmp_path, ALONE)
    network = Classifier(job.model, RUN, job.config, list('AB'))
    windows = LabelledWindows(job.store, {}, job.config, 56, 0)
    with pytest.raises(InputError, match='batches of 5 clips are too small for 6 processes: lower machine.gpus'):
        Phase(network, windows, list(range(20)), 0, False, 0, Ranks(0, 6))
