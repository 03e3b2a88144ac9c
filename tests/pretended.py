"""A pretended GPU: shapes, devices, dtypes and memory formats are those of a GPU, nothing is computed on it."""
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device('cuda', 0)
if not torch.cuda.is_available():
    torch.cuda._lazy_init = lambda: None # nothing is asked of a driver that is not there


class PretendedGPU(TorchDispatchMode):
    """Inside of it `cuda` is a device whose tensors have no values; what is on the CPU is computed.

    Where a program would have to know a value, an error is raised; copies to the CPU are counted in `copies`."""
    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = tree_leaves((args, kwargs))
        inputs = [x for x in values if isinstance(x, FakeTensor)]
        named = any(isinstance(x, torch.device) and x.type == 'cuda' for x in values)
        if not inputs and not named:
            return function(*args, **kwargs)
        with self.fake:
            output = function(*args, **kwargs)
        on_gpu = any(x.device.type == 'cuda' for x in inputs)
        self.copies += on_gpu and any(x.device.type == 'cpu' for x in tree_leaves(output) if isinstance(x, FakeTensor))
        return output


def to_pretended(
    module: nn.Module, # on the CPU
    gpu: PretendedGPU,
) -> nn.Module: # the same, its parameters and buffers on the pretended GPU, kernels in channels-last order
    "Move a module to the pretended GPU."
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                layout = torch.channels_last_3d if p.ndim == 5 else torch.preserve_format
                moved = gpu.fake.from_tensor(p.detach()).to(GPU, memory_format=layout)
                part._parameters[name] = nn.Parameter(moved, requires_grad=p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = gpu.fake.from_tensor(buffer).to(GPU)
    return module
