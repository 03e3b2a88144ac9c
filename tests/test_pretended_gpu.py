"""What a GPU would do, on a machine without one: tensors that have its device and its memory formats, and no values."""
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import glcm.distributed as distributed
from glcm.core import override
from glcm.distributed import Ranks
from glcm.encoders import StemConv3d, video_resnet18
from glcm.losses import mil_nce_global, mil_nce_local
from glcm.model import GLCM
from glcm.pretexts.pretext import prepare_views
from glcm.testing import tiny_params
from glcm.training.config import run_config
from glcm.training.pretrain import copied_ahead
from glcm.training.step import tune_gpu

GPU = torch.device('cuda', 0)
VARIANTS = [
    'glcm', 'glcm_no_local', 'glcm_no_mil', 'glcm_silence', 'glcm_motion', 'glcm_motion_clip', 'glcm_motion_near',
    'moco', 'cpc', 'dpc', 'infomax', 'avts', 'avts_cross_entropy', 'avslowfast']
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    "Notes what makes a CPU wait for its GPU: values that come back, and copies that are not asynchronous."
    READ = aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default
    INDEX = aten.index.Tensor, aten.index_put_.default, aten.index_put.default

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.READ:
            self.found.append(str(func))
        if func in self.INDEX and args[0].device.type == 'cuda':
            others = [x for x in [*args[1], *args[2:]] if torch.is_tensor(x)]
            if any(x.device.type == 'cpu' for x in others):
                self.found.append(f'{func} with numbers of the CPU')
        if func == aten._to_copy.default:
            target = torch.device(kwargs.get('device') or args[0].device)
            if target.type != args[0].device.type and not kwargs.get('non_blocking'):
                self.found.append(f'a copy from {args[0].device} to {target}')
        return func(*args, **kwargs)


class Pretended(Ranks):
    "Rank 3 of 16, whose collective operations have the right shapes."
    def all_gather(self, x): return x.new_empty(self.size*len(x), *x.shape[1:])
    def reduce_scatter(self, x): return x.new_empty(len(x)//self.size, *x.shape[1:])
    def mean(self, x): return x


def on_gpu(module, mode):
    "The module with pretended parameters and buffers on a pretended GPU."
    def moved(x):
        layout = torch.channels_last_3d if x.dim() == 5 else torch.contiguous_format
        return mode.from_tensor(x).to(GPU, memory_format=layout)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(moved(parameter.data), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = moved(buffer)
    return module


def tiny_batch(run):
    "Eight clips of nothing, with all that a pretext may ask for."
    frames, side = run.views.frames, run.views.crop
    planes = torch.zeros(8, frames, side*3//2, side, dtype=torch.uint8)
    mel = torch.zeros(8, run.model.bands, run.model.mel_per_step*frames)
    numbers = dict(shift=torch.zeros(8, dtype=torch.long), distance=torch.full((8,), 9))
    return dict(planes=planes, mel=mel, second_planes=planes, second_mel=mel) | numbers


@pytest.mark.parametrize('ranks', [Ranks(), Pretended(3, 16)], ids=['alone', '16 ranks'])
@pytest.mark.parametrize('variant', [name for name in VARIANTS if name not in ('cpc', 'dpc')]) # PyTorch pretends no GRU
def test_no_step_waits_for_the_gpu(variant, ranks, monkeypatch):
    "From the batch in pinned memory to the loss, there is no wait and no tensor on the wrong device."
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: self) # which needs a GPU
    params = override(tiny_params(), dict(pretrain=dict(precision='float32', batch=8*ranks.size)), 'the test')
    run = run_config(params, variant, 0)
    network = run.pretext.network(GLCM(run.model), run).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        network, batch = on_gpu(network, mode), tiny_batch(run)
        with Waits() as waits:
            views = prepare_views(batch, GPU)
            with torch.no_grad():
                views = network.before_step(views, ['clip']*8, 5, ranks)
            outputs = network(views)
            losses = network.loss(outputs, views, ranks)
            with torch.no_grad():
                network.after_step(outputs, views, ranks)
    assert losses['loss'].device.type == 'cuda'
    assert not waits.found


def test_waits_are_found():
    "The check above sees what it looks for."
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        x = torch.zeros(3, device=GPU)
        torch.zeros(3).to(GPU)
        x[torch.tensor([0, 1])] = 1.
    assert len(waits.found) == 2


def test_backward_pass_of_the_losses_indexes_nothing():
    "Neither a number of the CPU nor an index tensor is written to the scores; the values are tested elsewhere."
    z = [torch.randn(shape, requires_grad=True) for shape in ((6, 4), (6, 4, 2, 2), (6, 4, 15), (6, 4, 5))]
    class Indexing(TorchDispatchMode):
        found = []
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in Waits.INDEX + Waits.READ:
                self.found.append(func)
            return func(*args, **kwargs or {})
    with Indexing() as indexing:
        (mil_nce_global(*z[:2]) + mil_nce_local(*z[2:], block=7)).backward()
    assert not indexing.found


def convolutions_of(encoder, x):
    "The shapes of weights that the convolutions of a network get, and whether their inputs are channels last."
    found = []
    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func == aten.convolution.default:
                last = args[0].is_contiguous(memory_format=torch.channels_last_3d)
                found.append((tuple(args[1].shape), last))
            return func(*args, **kwargs or {})
    with Convolutions():
        encoder(x)
    return found


def test_gpu_takes_squares_and_channels_last():
    "The first convolution has 12 channels there; every convolution of frames has its channels last."
    encoder = video_resnet18(width=8, spatial_stride=8).eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        found = convolutions_of(on_gpu(encoder, mode), torch.zeros(2, 3, 8, 56, 56, device=GPU))
    shapes, last = zip(*found)
    assert shapes[0] == (8, 12, 7, 4, 4) and all(last)
    assert shapes[-1] == (64, 64, 1, 3, 3) # the middle slice, of one frame
    encoder = video_resnet18(width=8, spatial_stride=8).eval()
    with torch.no_grad():
        assert convolutions_of(encoder, torch.zeros(2, 3, 8, 56, 56))[0][0] == (8, 3, 7, 7, 7)


def test_checkpoints_do_not_know_about_squares():
    plain, stem = (kind(3, 8, 7, (1, 2, 2), 3, bias=False) for kind in (nn.Conv3d, StemConv3d))
    stem.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 5, 31, 40)
    torch.testing.assert_close(stem._over_squares(x), plain(x), rtol=1e-4, atol=1e-5)


def test_batches_are_copied_ahead(monkeypatch):
    "A batch is copied before the one before it is handed out, beside the stream that computes."
    order, current = [], ['main']

    class Stream:
        def __init__(self, device=None): pass
        def wait_stream(self, other): order.append('wait')

    @contextmanager
    def stream(which):
        current.append('side')
        yield
        current.pop()

    def copy(self, device, non_blocking):
        order.append(f'copy {int(self)} on {current[-1]}')
        assert non_blocking
        return self

    monkeypatch.setattr(torch.cuda, 'Stream', Stream)
    monkeypatch.setattr(torch.cuda, 'current_stream', Stream)
    monkeypatch.setattr(torch.cuda, 'stream', stream)
    monkeypatch.setattr(torch.Tensor, 'to', copy)
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda self, stream: order.append('kept'))
    for batch in copied_ahead([dict(x=torch.tensor(k), clip=['a']) for k in range(3)], GPU):
        order.append(f'step {int(batch["x"])}')
        assert batch['clip'] == ['a']
    copies = [entry for entry in order if entry.startswith(('copy', 'step'))]
    assert copies == ['copy 0 on side', 'copy 1 on side', 'step 0', 'copy 2 on side', 'step 1', 'step 2']
    assert order.index('step 0') > order.index('wait') and order.count('kept') == 3


def test_nccl_knows_its_device(monkeypatch):
    given = {}
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(distributed.dist, 'init_process_group', lambda backend, **options: given.update(options, backend=backend))
    monkeypatch.setattr(distributed.dist, 'destroy_process_group', lambda: None)
    with distributed.process_group() as ranks:
        assert ranks.rank == 1
    assert given['backend'] == 'nccl' and given['device_id'] == torch.device('cuda', 1)


def graphs(network, *inputs):
    "Graphs that a network is compiled to, and breaks between them."
    torch._dynamo.reset()
    explained = torch._dynamo.explain(network)(*inputs)
    return explained.graph_count, explained.graph_break_count


@pytest.mark.parametrize('recompute', [False, True])
def test_an_encoder_is_one_graph(recompute):
    encoder = video_resnet18(width=2, temporal_stride=4, spatial_stride=8)
    encoder.recompute = recompute
    assert graphs(encoder, torch.randn(2, 3, 8, 32, 32)) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_pretext_is_one_graph(variant):
    params = override(tiny_params(), dict(pretrain=dict(precision='float32', batch=8)), 'the test')
    run = run_config(params, variant, 0)
    network = run.pretext.network(GLCM(run.model), run).train()
    for module in network.modules():
        if hasattr(module, 'recompute'):
            module.recompute = True
    with torch.no_grad():
        views = network.before_step(prepare_views(tiny_batch(run)), ['clip']*8, 5, Ranks())
    assert graphs(network, views) == (1, 0)


@pytest.fixture
def matmul():
    "The settings of multiplication on GPUs, put back afterwards."
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    yield matmul
    matmul.allow_tf32 = before


@pytest.mark.parametrize('supported, precision, tf32', [
    (True, 'auto', True), (True, 'float32', False), (False, 'auto', False), (False, 'bfloat16', True)])
def test_gpu_multiplies_in_tf32_what_comes_from_bfloat16(supported, precision, tf32, matmul, monkeypatch):
    "Also the fastest convolutions are looked for; who asks for float32 gets all of its digits."
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: supported)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    matmul.allow_tf32 = not tf32
    tune_gpu(torch.device('cpu'), precision)
    assert not torch.backends.cudnn.benchmark and matmul.allow_tf32 != tf32
    tune_gpu(GPU, precision)
    assert torch.backends.cudnn.benchmark and matmul.allow_tf32 == tf32
