"""DPC's recurrence, predictions and loss are what the paper says, and no prediction has seen what it predicts."""
import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from glcm.losses import ALONE
from glcm.pretexts.blocks import encode_blocks
from glcm.pretexts.dpc import DPCOutputs
from test_pretexts import new_network, run_of
from test_pretexts_cpc import random_frames, seen_blocks, slow_losses

PAPER = dict(views=dict(frames=32, crop=112), model=dict(global_frames=8, local_stride=32), pretext=dict(predicted=3))


def network_of(**changes):
    "In float64, with frozen batch norm."
    return new_network(run_of('dpc', **changes)).double().eval()


def views_of(network, clips=2):
    "Frames that take a gradient, and what is drawn for them."
    views = dict(video=random_frames(clips, network.run.views.frames, network.run.views.crop))
    return network.before_step(views, [f'clip {k}' for k in range(clips)], 0, ALONE)


def random_outputs(clips, rows=4, size=6):
    torch.manual_seed(5)
    return DPCOutputs(*(torch.randn(clips, rows, size, dtype=torch.float64).requires_grad_() for _ in range(2)))


def gru_of_maps(recurrence, x, state):
    "One step of a GRU on (B, C, h, w) by its equations, with convolutions of one cell."
    def gates(weight, bias, maps):
        return F.conv2d(maps, weight[..., None, None], bias).chunk(3, 1)
    inputs = gates(recurrence.weight_ih, recurrence.bias_ih, x)
    states = gates(recurrence.weight_hh, recurrence.bias_hh, state)
    reset = (inputs[0] + states[0]).sigmoid()
    update = (inputs[1] + states[1]).sigmoid()
    new = (inputs[2] + reset*states[2]).tanh()
    return (1 - update)*new + update*state


def linear_of_maps(layer, maps):
    return F.conv2d(maps, layer.weight[..., None, None], layer.bias)


def outputs_by_hand(network, views):
    "(B, P, h, w, C) predictions and targets, as maps all the way."
    config = network.run.pretext
    features = encode_blocks(network.model, views['video'], config.block_frames)
    B, N, C, h, w = features.shape
    seen = N - config.predicted
    z = [linear_of_maps(network.project, block) for block in features.unbind(1)]
    kept = views['kept'].double().unflatten(2, (h, w)).permute(1, 0, 4, 2, 3) # (N - 1, B, C, h, w)
    state = torch.zeros(B, C, h, w, dtype=torch.float64)
    predictions = []
    for t in range(N - 1):
        x = z[t] if t < seen else predictions[-1]
        state = gru_of_maps(network.recurrence, x.relu(), state)*kept[t]/(1 - config.dropout)
        if t >= seen - 1: # the next block is to be predicted
            hidden = linear_of_maps(network.predict[0], state).relu()
            predictions.append(linear_of_maps(network.predict[2], hidden))
    return [torch.stack(maps, 1).permute(0, 1, 3, 4, 2) for maps in (predictions, z[seen:])]


@pytest.mark.parametrize('changes', [{}, dict(pretext=dict(predicted=3)), PAPER], ids=['one', 'three', 'paper'])
def test_outputs_are_those_of_maps(changes):
    network = network_of(**changes)
    with torch.no_grad():
        views = views_of(network)
        for found, expected in zip(network(views), outputs_by_hand(network, views)):
            torch.testing.assert_close(found, expected.flatten(1, 3), rtol=1e-9, atol=1e-12)


def test_no_prediction_has_seen_what_it_predicts():
    network = network_of(pretext=dict(predicted=2))
    views = views_of(network)
    predictions, targets = (tensor.unflatten(1, (2, -1)) for tensor in network(views))
    for block in range(2):
        seen = seen_blocks(predictions[1, block], views['video'], 4)
        assert not seen[0].any() and seen[1].tolist() == [True, True, False, False]
        assert seen_blocks(targets[1, block], views['video'], 4)[1].tolist() == [t == 2 + block for t in range(4)]


def slow_dpc(predictions, targets):
    "The loss over (clip, block, cell) by its definition."
    index = list(product(range(2), range(3), range(2)))
    total = 0.
    for positive in index:
        scores = [float(predictions[positive] @ targets[other]) for other in index]
        total -= math.log(math.exp(scores[index.index(positive)])/sum(map(math.exp, scores)))
    return total/len(index)


def test_loss_equals_its_definition():
    outputs = random_outputs(2, 6)
    losses = new_network(run_of('dpc')).loss(outputs, {})
    by_cell = [tensor.detach().unflatten(1, (3, 2)) for tensor in outputs]
    assert losses['loss'].item() == pytest.approx(slow_dpc(*by_cell), rel=1e-12)
    expected = slow_losses(outputs.predictions, list(range(6)), outputs.targets)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-12)


def test_chance_of_dpc():
    "log BPS: 7.34 for 32 clips, 3 blocks and 16 cells."
    network, outputs = new_network(run_of('dpc')), random_outputs(32, 3*16)
    losses = network.loss(outputs._replace(predictions=torch.zeros_like(outputs.predictions)), {})
    assert losses['loss'].item() == pytest.approx(math.log(32*3*16), rel=1e-12) == pytest.approx(7.34, abs=0.005)
    assert losses['clip_loss'].item() == pytest.approx(math.log(32), rel=1e-12)


def test_one_candidate_leaves_nothing_to_choose():
    outputs = random_outputs(1, 1)
    losses = new_network(run_of('dpc')).loss(outputs, {})
    assert [value.item() for value in losses.values()] == [0, 0, 0]
    losses['loss'].backward()
    assert not any(tensor.grad.any() for tensor in outputs)


def test_negatives_are_counted():
    "The gradient of a prediction of zero is the mean of all candidates less its own: one positive, BPS - 1 negatives."
    network, outputs = new_network(run_of('dpc')), random_outputs(2, 2*4)
    zero = torch.zeros_like(outputs.predictions).requires_grad_()
    network.loss(outputs._replace(predictions=zero), {})['loss'].backward()
    targets = outputs.targets.detach()
    expected = (targets.mean((0, 1)) - targets)/16
    torch.testing.assert_close(zero.grad, expected, rtol=1e-10, atol=1e-14)


def test_one_cell_and_one_block_is_a_recurrence_and_two_layers():
    "As CPC's head would be with them: PyTorch's GRU over the blocks, and a softmax over the clips."
    network = network_of(views=dict(crop=32), model=dict(local_stride=32), pretext=dict(dropout=0.0))
    views, C = views_of(network, 3), network.recurrence.hidden_size
    gru = nn.GRU(C, C, batch_first=True).double()
    for name, weight in network.recurrence.named_parameters():
        getattr(gru, f'{name}_l0').data.copy_(weight)
    with torch.no_grad():
        outputs = network(views)
        blocks = network.project(encode_blocks(network.model, views['video'], 4).mean((3, 4)))
        contexts, _ = gru(blocks[:, :3].relu())
        scores = network.predict(contexts[:, -1]) @ blocks[:, 3].T
        expected = F.cross_entropy(scores, torch.arange(3))
        torch.testing.assert_close(network.loss(outputs, views)['loss'], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize('crop, stride', [(32, 32), (34, 1), (34, 8), (56, 16), (62, 4), (112, 32)])
def test_a_draw_for_each_cell(crop, stride):
    "However the frames' sides are rounded on their way through the encoder."
    network = network_of(views=dict(crop=crop), model=dict(local_stride=stride))
    views = views_of(network, 1)
    with torch.no_grad():
        cells = network(views).targets.shape[1]
    assert views['kept'].shape == (1, 3, cells, network.recurrence.hidden_size)


def test_dropout_keeps_the_mean():
    "Weights are 0 or 1/(1 - p), drawn anew for each block; without dropout nothing is left out."
    network = network_of(pretext=dict(dropout=0.25))
    kept = views_of(network, 40)['kept']
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.005)
    assert all((kept[:, t] != kept[:, t + 1]).any() for t in range(2))
    assert views_of(network_of(pretext=dict(dropout=0.0)))['kept'].all()


def test_nothing_is_predicted_from_a_state_that_is_left_out():
    "Predictions of clips without a state are what two layers make of zeros."
    network = network_of(pretext=dict(predicted=3))
    views = views_of(network)
    with torch.no_grad():
        outputs = network(views | dict(kept=torch.zeros_like(views['kept'])))
        expected = network.predict(torch.zeros(network.recurrence.hidden_size, dtype=torch.float64))
    torch.testing.assert_close(outputs.predictions, expected.expand_as(outputs.predictions))
