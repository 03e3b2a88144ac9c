"""The preset `released` computes at the paper's width what the authors' released code computes.

released.json holds what that code computed: repository yunyikristy/global_local, commit 75c3c89, `GlobalLocal` of
model.py with no line changed, in float64 on a CPU, in training mode. Weights and clips were those made here by formulas
that any machine evaluates alike, with the names of parameters mapped by `THEIRS`. Two things were put in from
outside, the same on both sides. Its audio encoder is another one (LeakyReLU, biases, no pooling, no stride):
features of 96 slices take
the place of both. Its normalisation of frames has a slip of precedence: it was given ours. Compared are the two visual
encoders, the four projections, the attention, both losses, and the gradient of their sum for each parameter. Attention
and pooled features are not among what it returns; they were read by hooks on its layers.
"""
import json
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import nn

from glcm.core import read_study, root
from glcm.model import GLCM, glcm_loss
from glcm.training.config import run_config

REFERENCE = Path(__file__).with_name('released.json')
CONFIG = run_config(read_study('paper'), 'released', 0)
THEIRS = dict( # their names -> ours
    v_slow='global_encoder', v_fast='local_encoder', downsample='shortcut', v_proj1='project.video_global',
    v_proj2='project.video_local', a_proj1='project.audio_global', a_proj2='project.audio_local')
ENCODERS = 'global_encoder', 'local_encoder'
EMBEDDINGS = 'audio_global', 'video_global', 'attention', 'audio_local', 'video_local'


def mixed(x, shift, factor=1):
    "A step of SplitMix64: the upper bits of whole numbers are laid over the lower ones, and all are multiplied."
    return (x ^ (x >> np.uint64(shift)))*np.uint64(factor)


def uniform(shape, seed):
    "Numbers in -1..1 by SplitMix64: whole numbers only, so the same on every machine and in every version."
    counter = np.arange(1, np.prod(shape) + 1, dtype=np.uint64)
    x = counter*np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed << 32)
    x = mixed(x, 30, 0xBF58476D1CE4E5B9)
    x = mixed(x, 27, 0x94D049BB133111EB)
    x = mixed(x, 31)
    upper_bits = (x >> np.uint64(11)).astype(np.float64) # 53 of 64: as many as a float holds
    return torch.from_numpy(upper_bits/2**52 - 1).view(shape)


def weight(name, shape):
    "A parameter, from its name: convolutions keep the size of signals, projections make scores of a few units."
    values = uniform(shape, crc32(name.encode()))
    if len(shape) == 1:
        return 0.1*values + (1 if name.endswith('weight') else 0)
    scale = (6/np.prod(shape[1:]))**0.5
    if name.startswith('project'):
        scale = 0.3*scale
    return scale*values


def clips():
    "Three clips of 32 frames as bytes, and for each the features of 96 audio slices."
    frames = ((uniform((3, 3, 32, 64, 64), 1) + 1)*128).to(torch.uint8)
    return frames, uniform((3, 512, 96), 2).abs()


def sample(tensor):
    "Mean, norm and 12 values of a tensor, spread over it."
    flat = tensor.detach().flatten()
    spread = torch.arange(12)*(len(flat) - 1)//11
    return [float(value) for value in [flat.mean(), flat.norm(), *flat[spread]]]


class ConstantAudio(nn.Module):
    "In the place of an audio encoder: always these features."
    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, audio):
        return self.features


def recorder(outputs, name):
    "A forward hook that keeps the output of a module under this name."
    def hook(module, args, out):
        outputs[name] = out
    return hook


@pytest.fixture(scope='module')
def ours():
    "What the preset computes, named as in released.json."
    frames, audio_features = clips()
    model = GLCM(CONFIG.model).double().train()
    model.audio_encoder = ConstantAudio(audio_features)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weight(name, p.shape))
    outputs = {}
    for name in ENCODERS:
        getattr(model, name).register_forward_hook(recorder(outputs, name))
    z = model(frames, torch.zeros(3, 80, 384))
    outputs |= {name: getattr(z, name) for name in EMBEDDINGS}
    losses = glcm_loss(z, CONFIG.loss)
    losses['loss'].backward()
    return dict(
        outputs={name: sample(value) for name, value in outputs.items()},
        losses={name: float(value.detach()) for name, value in losses.items()},
        gradients={name: float(p.grad.norm()) for name, p in model.named_parameters()})


@pytest.fixture(scope='module')
def theirs():
    "What the released code computed."
    return json.loads(REFERENCE.read_text())


def test_formulas_make_the_same_numbers_everywhere():
    "The first SplitMix64 numbers of seed 0, as its authors publish them, brought to -1..1."
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert uniform((3,), 0).tolist() == [(x >> 11)/2**52 - 1 for x in published]


@pytest.mark.parametrize('name', [*ENCODERS, *EMBEDDINGS])
def test_outputs_are_those_of_the_released_code(ours, theirs, name):
    assert ours['outputs'][name] == pytest.approx(theirs['outputs'][name], rel=1e-8, abs=1e-9)


def test_losses_are_those_of_the_released_code(ours, theirs):
    assert ours['losses'] == pytest.approx(theirs['losses'], rel=1e-8)


def test_gradients_are_those_of_the_released_code(ours, theirs):
    assert ours['gradients'] == pytest.approx(theirs['gradients'], rel=1e-8)
