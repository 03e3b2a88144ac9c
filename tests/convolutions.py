"""Compare each convolution of a network in bfloat16 with float32: python tests/convolutions.py default | paper

A processor's library may crash in a convolution, so this is run in a process of its own. One line for each case, written before it begins, then its errors."""
import json
import sys

import torch
from torch import nn

from glcm.core import read_params, root
from glcm.model import GLCM
from glcm.runs import run_config

CLIPS = 2
FILES = dict(default='params.yaml', paper='params.paper.yaml')


def cases(name):
    "The distinct convolutions of a network with the shapes of their inputs; the paper's at frames of a third, which changes no depth and no kernel."
    config = run_config(read_params(root()/FILES[name]), 'glcm', 0)
    side = 40 if name == 'paper' else config.views.crop
    steps, found = config.views.frames, {}
    with torch.device('meta'):
        model = GLCM(config.model)
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv3d)):
                module.register_forward_hook(lambda module, args, out: found.update({f'{module} of {tuple(args[0].shape)}': (module, args[0].shape)}))
        frames = torch.empty(CLIPS, 3, steps, side, side)
        seen = model.global_encoder(frames[:, :, ::steps//config.model.global_frames]).mean(2)
        model.local_encoder(frames)
        heard = model.audio_encoder(torch.empty(CLIPS, config.audio.bands, config.model.mel_per_step*steps))
        model.project['video_global'](seen.flatten(2))
        model.project['audio_local'](heard)
    return found


def results(convolution, x, g, precision):
    "Output, gradient of the input and gradient of the weights."
    x = x.clone().requires_grad_()
    convolution.zero_grad(set_to_none=True)
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
        y = convolution(x)
    y.float().backward(g)
    return y.detach().float(), x.grad, convolution.weight.grad


def main(name):
    torch.set_num_threads(1)
    for case, (module, shape) in cases(name).items():
        print(case, flush=True)
        torch.manual_seed(0)
        convolution = module.to_empty(device='cpu')
        nn.init.normal_(convolution.weight)
        if convolution.bias is not None: nn.init.normal_(convolution.bias)
        layout = torch.channels_last_3d if len(shape) == 5 else torch.contiguous_format
        convolution = convolution.to(memory_format=layout)
        x = torch.randn(shape).to(memory_format=layout)
        with torch.no_grad(): g = torch.randn_like(convolution(x))
        wanted, got = (results(convolution, x, g, precision) for precision in ('float32', 'bfloat16'))
        errors = [float((a - b).norm()/b.norm()) for a, b in zip(got, wanted)]
        print(json.dumps(errors), flush=True)


if __name__ == '__main__': main(sys.argv[1])
