"""bfloat16 is right on every processor that can be imitated here, and what it is not used for is float32."""
import json
import os
import subprocess
import sys

import pytest
import torch

from glcm.core import root
from glcm.training.step import has_bfloat16, uses_bfloat16

INSTRUCTIONS = 'AVX2', 'AVX512_CORE', 'AVX512_CORE_BF16', 'DEFAULT'


def run(instructions, *arguments):
    "Run Python with oneDNN limited to these instructions."
    environment = os.environ | dict(ONEDNN_MAX_CPU_ISA=instructions, PYTHONPATH=str(root()), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=root(), capture_output=True, text=True,
                          timeout=600)


@pytest.mark.parametrize('network, threads', [('default', 1), ('paper', 1), ('released', 1), ('default', 2)])
@pytest.mark.parametrize('instructions', INSTRUCTIONS)
def test_each_convolution_in_bfloat16(instructions, network, threads):
    "Forward and both gradients differ from float32 by no more than rounding to 8 bits; a crash names its convolution."
    done = run(instructions, 'tests/convolutions.py', network, str(threads))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f'{lines[-1:]} ends with {done.returncode}: {done.stderr[-500:]}'
    errors = {name: json.loads(line) for name, line in zip(lines[::2], lines[1::2])}
    assert len(errors) > 25
    wrong = {name: error for name, error in errors.items() if not max(error) < 0.02}
    assert not wrong


@pytest.mark.parametrize('hardware, limit, chosen', [
    ('amx_bf16', None, True), ('avx512_bf16', None, True), ('avx512_vnni', None, False),
    ('amx_bf16', 'AVX2', False), ('amx_bf16', 'avx512_core', False), ('amx_bf16', 'AVX512_CORE_BF16', True),
])
def test_bfloat16_where_the_processor_has_it_and_may_use_it(monkeypatch, hardware, limit, chosen):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {hardware: True})
    if limit is None:
        monkeypatch.delenv('ONEDNN_MAX_CPU_ISA', raising=False)
    else:
        monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', limit)
    assert has_bfloat16(torch.device('cpu')) == chosen
    assert uses_bfloat16(torch.device('cpu'), 'auto') == chosen


PLAIN_CONVOLUTION = '''
import torch
torch.manual_seed(0)
conv = torch.nn.Conv3d(16, 16, 3, padding=1, bias=False)
x = torch.randn(2, 16, 2, 14, 14)
conv(x).sum().backward()
expected, conv.weight.grad = conv.weight.grad, None
with torch.autocast('cpu', torch.bfloat16):
    y = conv(x)
y.float().sum().backward()
print(float((conv.weight.grad - expected).norm()/expected.norm()))
'''


def test_plain_convolutions_would_fail():
    "The fault that is worked around is there: where it is gone, the workaround can go too."
    if not torch.cpu.get_capabilities().get('avx512_f'):
        pytest.skip('this processor has no AVX-512')
    done = run('AVX512_CORE', '-c', PLAIN_CONVOLUTION)
    assert done.returncode or not float(done.stdout) < 0.1


TWO_STEPS = '''
import json
import torch
from glcm.core import override, read_params
from glcm.model import GLCM
from glcm.training.config import run_config
from glcm.training.step import training_step
for precision in ('float32', 'bfloat16'):
    changes = dict(pretrain=dict(batch=2, precision=precision))
    config = run_config(override(read_params(), changes, 'the test'), 'glcm', 0)
    torch.manual_seed(0)
    model = GLCM(config.model).to(memory_format=torch.channels_last_3d)
    network = config.pretext.network(model, config)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    frames, side = config.views.frames, config.views.crop
    batch = dict(
        planes=torch.randint(0, 256, (2, frames, side*3//2, side), dtype=torch.uint8),
        mel=2*torch.randn(2, 80, 12*frames) - 2, shift=torch.zeros(2, dtype=torch.long), clip=list('ab'))
    losses = []
    for step in range(2):
        losses.append(training_step(network, optimizer, batch, config, step)['loss'])
    print(json.dumps(losses))
'''


@pytest.mark.parametrize('instructions', INSTRUCTIONS)
def test_training_in_bfloat16(instructions):
    "Two steps of the default network: no crash, and the losses of float32 within the rounding of bfloat16."
    done = run(instructions, '-c', TWO_STEPS)
    assert done.returncode == 0, done.stderr[-500:]
    expected, found = map(json.loads, done.stdout.splitlines()[-2:])
    assert found == pytest.approx(expected, rel=0.02)
