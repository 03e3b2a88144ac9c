"""AVSlowFast turns clips as it says, compares after three layers, and its loss is its definition."""
import math

import numpy as np
import pytest
import torch

from glcm.core import InputError
from glcm.data.planes import from_rgb, to_rgb
from glcm.losses import ALONE
from glcm.model import GLCM
from glcm.pretexts.avslowfast import SYNC_LAYERS, AVSlowFastOutputs, rotate_clips
from glcm.pretexts.avts import AVTSOutputs, half_length
from glcm.pretexts.pretext import prepare_views
from glcm.training.step import training_step
from batches import NAMES, noise_batch
from test_pretexts import LATE, new_network, run_of, slow_avts

# Rotation

def noise(clips=4, side=6):
    g = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (clips, 3, 3, side, side), generator=g, dtype=torch.uint8)


def test_a_turn_is_numpys_of_every_frame():
    video = noise()
    turned = rotate_clips(video, [3, 0, 2, 1])
    for clip, turns in enumerate([3, 0, 2, 1]):
        for channel in range(3):
            for frame in range(3):
                expected = np.rot90(video[clip, channel, frame].numpy(), turns)
                assert np.array_equal(turned[clip, channel, frame], expected)


def test_four_quarter_turns_are_none():
    video = noise()
    turned = [video]
    for _ in range(4):
        turned.append(rotate_clips(turned[-1], [1]*4))
    assert torch.equal(turned[4], video)
    assert not any(torch.equal(turned[k], video) for k in (1, 2, 3))


def test_stored_planes_are_turned_as_the_picture_they_hold():
    "To within what colours at half the resolution lose: the picture varies slowly."
    ramp = np.linspace(40, 200, 32)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 120.), -1).round().astype(np.uint8)
    planes = torch.from_numpy(from_rgb(picture[None]))[None]
    video = to_rgb(planes).transpose(1, 2)
    for turns in range(4):
        turned = rotate_clips(video, [turns])[0, :, 0].permute(1, 2, 0).numpy()
        assert np.abs(turned.astype(int) - np.rot90(picture, turns)).max() < 10


def test_only_square_frames_can_be_turned():
    with pytest.raises(InputError, match='5x6 cannot be turned'):
        rotate_clips(noise()[..., :5], [0]*4)


# The loss

def example(clips=9, size=5):
    "Embeddings of length one half after three layers, some clips silent, some negatives hard."
    g = torch.Generator().manual_seed(4)
    z = torch.randn(3, clips, 3, size, generator=g, dtype=torch.float64)
    z = half_length(z.flatten(0, 2)).view(z.shape)
    scores = 2*torch.randn(clips, 4, generator=g, dtype=torch.float64)
    outputs = AVSlowFastOutputs(*(part.clone().requires_grad_() for part in (*z, scores)))
    flags = torch.rand(3, clips, generator=g)
    views = dict(hard=flags[0] < 0.4, audible=flags[1] < 0.8, second_audible=flags[2] < 0.8)
    return outputs, views | dict(turns=torch.randint(0, 4, (clips,), generator=g))


def slow_rotation(scores, turns):
    "Cross-entropy, clip by clip, in Python's numbers."
    rows = scores.tolist()
    losses = [math.log(sum(math.exp(s) for s in row)) - row[turn] for row, turn in zip(rows, turns.tolist())]
    return sum(losses)/len(losses)


def test_the_loss_is_three_of_avts_and_a_cross_entropy():
    network = new_network(run_of('avslowfast'))
    outputs, views = example()
    values = {name: value.item() for name, value in network.loss(outputs, views).items()}
    expected = {}
    for k, layer in enumerate(SYNC_LAYERS):
        embeddings = AVTSOutputs(*(z[:, k] for z in outputs[:3]))
        expected[f'{layer}_loss'] = slow_avts(embeddings, views, 0.99)
    expected['rotation_loss'] = slow_rotation(outputs.rotation, views['turns'])
    assert values == pytest.approx(expected | dict(loss=sum(expected.values())), rel=1e-12)


def test_each_layer_has_the_loss_of_avts():
    "Of the pretext itself, with its own options."
    outputs, views = example()
    losses = new_network(run_of('avslowfast')).loss(outputs, views)
    avts = new_network(run_of('avts'))
    for k, layer in enumerate(SYNC_LAYERS):
        alone = avts.loss(AVTSOutputs(*(z[:, k] for z in outputs[:3])), views)['loss']
        torch.testing.assert_close(losses[f'{layer}_loss'], alone, rtol=1e-12, atol=0)


def test_closed_forms():
    "Even scores have log 4; equal embeddings have half the square of the margin at each layer."
    network = new_network(run_of('avslowfast'))
    outputs, views = example()
    same = torch.full((9, 3, 4), 0.25, dtype=torch.float64) # of length 1/2
    losses = network.loss(AVSlowFastOutputs(same, same, same, torch.full((9, 4), 1.7, dtype=torch.float64)), views)
    assert float(losses['rotation_loss']) == pytest.approx(math.log(4), rel=1e-12)
    for layer in SYNC_LAYERS:
        assert float(losses[f'{layer}_loss']) == pytest.approx(0.99**2/2, rel=1e-12)
    certain = 100*torch.nn.functional.one_hot(views['turns'], 4).double()
    views['hard'] = torch.ones(9, dtype=torch.bool)
    losses = network.loss(AVSlowFastOutputs(same, same, -same, certain), views)
    assert float(losses['loss']) < 1e-40


def test_silence_keeps_a_clip_out_of_the_sound_but_not_of_the_rotation():
    network = new_network(run_of('avslowfast'))
    outputs, views = example()
    network.loss(outputs, views | dict(audible=torch.zeros(9, dtype=torch.bool)))['loss'].backward()
    assert not any(z.grad.any() for z in outputs[:3])
    assert outputs.rotation.grad.abs().sum(1).min() > 0


# The network: what depends on what, and what trains what

@pytest.fixture(scope='module')
def seen():
    "A network with frozen batch norm, and its views of eight clips."
    network = new_network(run_of('avslowfast')).eval()
    return network, network.before_step(prepare_views(noise_batch(network.run)), NAMES, LATE, ALONE)


def gradients_of(network, loss):
    network.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}


def test_rotation_alone_trains_no_sound(seen):
    network, views = seen
    reached = gradients_of(network, network.loss(network(views), views)['rotation_loss'])
    parts = {name.split('.')[1] if name.startswith('model.') else name.split('.')[0] for name in reached}
    assert parts == {'global_encoder', 'local_encoder', 'rotation'}


@pytest.mark.parametrize('k', range(3))
def test_a_layer_trains_what_is_before_it(seen, k):
    network, views = seen
    layer = list(SYNC_LAYERS)[k]
    reached = gradients_of(network, network.loss(network(views), views)[f'{layer}_loss'])
    for encoder in ('global', 'local', 'audio'):
        found = {name.split('.')[2] for name in reached if name.startswith(f'model.{encoder}_encoder.')}
        assert found == {'conv1', 'bn1', *[f'layer{number}' for number in range(1, k + 3)]}, encoder
    heads = {name.rsplit('.', 1)[0] for name in reached if not name.startswith('model.')}
    assert heads == {f'video.{k}', f'sound.{k}'}


def test_pictures_do_not_hear_and_sounds_do_not_see(seen):
    network, views = seen
    with torch.no_grad():
        outputs = network(views)
        deaf = network(views | dict(audio=views['second_audio'], second_audio=views['audio']))
        blind = network(views | dict(video=views['video'].flip(0)))
    assert torch.equal(deaf.video, outputs.video) and torch.equal(deaf.rotation, outputs.rotation)
    torch.testing.assert_close(deaf.sound, outputs.second)
    assert torch.equal(blind.sound, outputs.sound) and torch.equal(blind.second, outputs.second)
    assert not torch.equal(blind.video, outputs.video) and not torch.equal(blind.rotation, outputs.rotation)


def test_both_pathways_see_the_turned_clip_and_the_slow_one_few_frames(seen):
    network, views = seen
    seen_by = {}
    hooks = [network.model.part(name).conv1.register_forward_pre_hook(
        lambda module, inputs, name=name: seen_by.update({name: inputs[0]})) for name in ('global', 'local')]
    with torch.no_grad():
        network(views)
    for hook in hooks:
        hook.remove()
    stride = network.run.views.frames//network.run.model.global_frames
    assert torch.equal(seen_by['global'], seen_by['local'][:, :, ::stride])
    upright = prepare_views(noise_batch(network.run))['video']
    turns = views['turns'].tolist()
    assert len(set(turns)) > 1 and torch.equal(views['video'], rotate_clips(upright, turns))


def test_a_clip_does_not_depend_on_others(seen):
    network, views = seen
    with torch.no_grad():
        alone, together = network({name: view[2:3] for name, view in views.items()}), network(views)
    for a, b in zip(alone, together):
        torch.testing.assert_close(a, b[2:3], rtol=1e-4, atol=1e-4)


# What is drawn

def test_turns_are_even_and_know_nothing_of_the_negatives(seen):
    network, _ = seen
    views = prepare_views(noise_batch(network.run))
    views['video'] = views['video'][:, :, :1, :2, :2] # what is drawn does not depend on the pictures
    counts = np.zeros((2, 4))
    for step in range(network.run.pretrain.steps, network.run.pretrain.steps + 500):
        drawn = network.before_step(views, NAMES, step, ALONE)
        np.add.at(counts, (drawn['hard'].int().numpy(), drawn['turns'].numpy()), 1)
    expected = counts.sum(1, keepdims=True)*counts.sum(0)/counts.sum()
    assert ((counts - expected)**2/expected).sum() < 16.3 # chi-squared of 3 degrees of freedom, p = 0.001
    assert abs(counts.sum(0)/counts.sum() - 0.25).max() < 0.025


def test_negatives_are_those_of_avts():
    "The same clips have hard ones, so that rows of the ablation differ in what they say only."
    views = prepare_views(noise_batch(run_of('avts')))
    avts, avslowfast = new_network(run_of('avts')), new_network(run_of('avslowfast'))
    for step in range(LATE, LATE + 10):
        drawn = [network.before_step(views, NAMES, step, ALONE)['hard'] for network in (avts, avslowfast)]
        assert torch.equal(*drawn)


# Sizes, refusals, learning

@pytest.mark.parametrize('encoders', ['r3d', 'slow_fast'])
def test_heads_fit_the_encoders(encoders):
    run = run_of('avslowfast', model=dict(encoders=encoders))
    network = run.pretext.network(GLCM(run.model), run).eval()
    views = network.before_step(prepare_views(noise_batch(run)), NAMES, 0, ALONE)
    with torch.no_grad():
        sizes = [tuple(z.shape) for z in network(views)]
    assert sizes == [(8, 3, 64)]*3 + [(8, 4)]


def test_a_shift_is_refused_by_name():
    with pytest.raises(InputError, match='pretext avslowfast needs views.shift: 0, not 3'):
        run_of('avslowfast', views=dict(shift=3))


def test_one_clip_is_refused():
    network = new_network(run_of('avslowfast'))
    outputs, views = example(1)
    with pytest.raises(InputError, match='needs two clips'):
        network.loss(outputs, views)


def mean_rotation_loss(slope, steps=24):
    "Of the last steps of a tiny run on noise, new in each step, that may be brighter above."
    schedule = dict(steps=steps, lr=0.003, schedule='constant', warmup_steps=0)
    network = new_network(run_of('avslowfast', pretrain=schedule)).train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    batch, side, losses = noise_batch(network.run), network.run.views.crop, []
    light = slope*torch.linspace(1, -1, side)[:, None]
    for step in range(steps):
        planes = torch.full_like(batch['planes'], 128)
        luma = 128 + light + 10*torch.randn(8, network.run.views.frames, side, side)
        planes[:, :, :side] = luma.round().to(torch.uint8)
        values = training_step(network, optimizer, batch | dict(planes=planes), network.run, step)
        losses.append(values['rotation_loss'])
    return sum(losses[-5:])/5


def test_which_way_is_up_is_learnt_where_it_can_be_seen():
    "Far below log 4. Even noise looks the same from all sides: there the loss stays at it, and nothing else tells."
    assert mean_rotation_loss(60) < 0.3*math.log(4)
    assert mean_rotation_loss(0) > 0.9*math.log(4)
