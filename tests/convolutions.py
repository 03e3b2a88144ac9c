"""Compare each convolution of a network in bfloat16 with float32: python tests/convolutions.py default|paper|released [threads]

A processor's library may crash in a convolution, so this runs in a process of its own. It prints a line for each case
before the case begins, and then a line with its errors."""
import json
import sys

import torch
from torch import nn

from glcm.core import read_params, read_study
from glcm.model import GLCM
from glcm.training.config import run_config

CLIPS = 2


def convolutions(network):
    "The distinct convolutions of a network, and the shapes of their inputs: name -> (module, shape)."
    params = read_study('paper') if network == 'paper' else read_params()
    config = run_config(params, 'released' if network == 'released' else 'glcm', 0)
    side = 40 if network == 'paper' else config.views.crop # changes no depth and no kernel
    frames, found = config.views.frames, {}

    def record(module, args, out):
        shape = tuple(args[0].shape)
        found[f'{module} of {shape}'] = module, shape

    with torch.device('meta'):
        model = GLCM(config.model)
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv3d)):
                module.register_forward_hook(record)
        video = torch.empty(CLIPS, 3, frames, side, side)
        cells = model.global_encoder(video[:, :, ::frames//config.model.global_frames]).mean(2)
        model.local_encoder(video)
        slices = model.audio_encoder(torch.empty(CLIPS, config.audio.bands, config.model.mel_per_step*frames))
        model.project['video_global'](cells.flatten(2))
        model.project['audio_local'](slices)
    return found


def results(convolution, x, g, precision):
    "Output, gradient of the input and gradient of the weights."
    x = x.clone().requires_grad_()
    convolution.zero_grad(set_to_none=True)
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
        y = convolution(x)
    y.float().backward(g)
    return y.detach().float(), x.grad, convolution.weight.grad


def relative_errors(convolution, shape):
    "Of bfloat16 to float32, for random weights, inputs and gradients."
    torch.manual_seed(0)
    convolution = convolution.to_empty(device='cpu')
    nn.init.normal_(convolution.weight)
    if convolution.bias is not None:
        nn.init.normal_(convolution.bias)
    layout = torch.channels_last_3d if len(shape) == 5 else torch.contiguous_format
    convolution = convolution.to(memory_format=layout)
    x = torch.randn(shape).to(memory_format=layout)
    with torch.no_grad():
        g = torch.randn_like(convolution(x))
    expected = results(convolution, x, g, 'float32')
    found = results(convolution, x, g, 'bfloat16')
    return [float((a - b).norm()/b.norm()) for a, b in zip(found, expected)]


def main(network, threads='1'):
    torch.set_num_threads(int(threads))
    for name, (convolution, shape) in convolutions(network).items():
        print(name, flush=True)
        print(json.dumps(relative_errors(convolution, shape)), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
