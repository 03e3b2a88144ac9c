"""Tasks on a pretended GPU: every tensor is on it, nothing in a step waits for it, channels lie side by side."""
from dataclasses import replace
from functools import partial

import pytest
import torch

from glcm.encoders import CONV
from glcm.losses import ALONE
from glcm.model import GLCM
from glcm.tasks.classify import Classifier
from glcm.tasks.config import task_config
from glcm.tasks.features import pack_steps
from glcm.tasks.finetune import FinetuneJob, forward_batch, to_inputs
from glcm.tasks.localize import embed_span
from glcm.testing import tiny_params
from glcm.training.config import run_config
from pretended import GPU, PretendedGPU, to_pretended
from test_task_ranks import NETWORKS, new_network, random_batch

PARAMS = tiny_params('full')
RUN = run_config(PARAMS, 'glcm', 0)
CPU = torch.device('cpu')


def on_gpu(name, gpu):
    "A network in training on the pretended GPU, and a batch of five clips."
    network = new_network(name).float()
    batch = {k: v.float() if k == 'mel' else v for k, v in random_batch(network, ALONE).items()}
    return to_pretended(network, gpu).train(), batch


@pytest.mark.parametrize('name', [name for name in NETWORKS if name != 'sentences'])
def test_a_step_does_not_wait_for_the_gpu(name):
    "PyTorch's CTC loss reads lengths itself and copies them: sentences are tested without it, and below with it."
    gpu = PretendedGPU()
    network, batch = on_gpu(name, gpu)
    with gpu:
        loss = network.loss(forward_batch(network, batch, GPU), batch)
    assert loss.device == GPU
    assert gpu.copies == 0


def test_lengths_for_ctc_are_on_the_cpu(monkeypatch):
    "Where the loss would otherwise fetch them from the GPU."
    gpu, seen = PretendedGPU(), {}

    def ctc_loss(log_p, target, length, characters, *rest, **options):
        seen.update(log_p=log_p.device, target=target.device, length=length.device, characters=characters.device)
        return log_p.sum()

    monkeypatch.setattr('glcm.tasks.sentences.F.ctc_loss', ctc_loss)
    network, batch = on_gpu('sentences', gpu)
    with gpu:
        network.loss(forward_batch(network, batch, GPU), batch)
    assert seen == dict(log_p=GPU, target=GPU, length=CPU, characters=CPU)
    assert gpu.copies == 0


def test_the_pretended_gpu_finds_what_waits():
    gpu = PretendedGPU()
    x = gpu.fake.from_tensor(torch.ones(2, 3, 4, 1, 1)).to(GPU)
    keep = torch.tensor([[True, True, True, False], [True, False, False, False]])
    with gpu:
        assert pack_steps(x, keep).shape == (1, 3, 4, 1, 1)
        with pytest.raises(Exception, match='nonzero'):
            x.transpose(1, 2)[keep.to(GPU)]
        with pytest.raises(Exception, match='_local_scalar_dense'):
            bool((x > 0).any())
        x.cpu()
    assert gpu.copies == 1


def test_spans_are_moved_to_the_model():
    gpu = PretendedGPU()
    model = to_pretended(GLCM(RUN.model).eval(), gpu)
    frames, side = RUN.views.frames, RUN.views.crop
    video = torch.zeros(1, 3, frames, side, side, dtype=torch.uint8)
    audio = torch.zeros(1, RUN.audio.bands, frames*RUN.model.mel_per_step)
    with gpu, torch.no_grad():
        embeddings = embed_span(model, video, audio)
        without = embed_span(model, video, audio, local=False)
    assert {x.device for x in embeddings if x is not None} == {GPU}
    assert without.video_local is None


def new_job(**values):
    torch.manual_seed(0)
    config = replace(task_config(PARAMS, 'ucf101'), modality='video+audio', frames=16, **values)
    return FinetuneJob(GLCM(RUN.model), RUN, None, config, 0, compile=True)


class Labels:
    "Stands for a store and a split of two classes."
    clips, train = [dict(label='A'), dict(label='B')], [0, 1]


def test_channels_lie_side_by_side():
    "Kernels of finetuning, and the input of every 3D convolution but the first."
    job = replace(new_job(), store=Labels, compile=False)
    network = job.network(Labels, job.config)
    convolutions = [m for m in network.modules() if isinstance(m, CONV[3]) and m.in_channels > 3]
    assert len(convolutions) > 30
    formats = []
    for convolution in convolutions:
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last_3d)
        convolution.register_forward_pre_hook(
            lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last_3d)))
    forward_batch(network, random_batch(new_network('words'), ALONE) | dict(mel=torch.zeros(5, 80, 192)), CPU)
    assert len(formats) == len(convolutions) and all(formats)


def test_encoders_are_compiled_whole_and_padding_is_not(monkeypatch):
    "One graph for each encoder; a batch with padding runs as it is, since its hooks come and go."
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=count))
    job = replace(new_job(precision='float32'), store=Labels)
    compiled, plain = job.network(Labels, job.config), replace(job, compile=False).network(Labels, job.config)
    batch = random_batch(new_network('words'), ALONE)
    video, _, _ = to_inputs(batch, CPU)
    inputs = video, torch.zeros(5, 80, 192)
    for length in (torch.full((5,), 16), torch.tensor([16, 9, 12, 16, 10])):
        found = compiled.eval().features(*inputs, length)
        assert torch.equal(found, plain.eval().features(*inputs, length))
        assert len(graphs) == 3 # the audio encoder takes no length
