"""Batches of noise, with all that a pretext may ask for."""
import torch

NAMES = [f'clip {k}' for k in range(8)]


def noise_batch(run, clips=8, dtype=torch.float32):
    "As many clips of noise, with a second view, as the loader gives them; the same each time."
    torch.manual_seed(1)
    T, side, longest = run.views.frames, run.views.crop, run.views.shift
    planes = torch.randint(0, 256, (2, clips, T, side*3//2, side), dtype=torch.uint8)
    mel = torch.randn(2, clips, run.model.bands, run.model.mel_per_step*T, dtype=dtype)
    distance = torch.tensor([-7, 9]).repeat(clips)[:clips]
    shift = torch.randint(-longest, longest + 1, (clips,))
    second = dict(second_planes=planes[1], second_mel=mel[1], distance=distance)
    return second | dict(planes=planes[0], mel=mel[0], shift=shift, clip=NAMES[:clips])
