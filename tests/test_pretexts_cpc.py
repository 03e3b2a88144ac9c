"""Blocks by themselves, and CPC: its loss is what the paper says, and no prediction has seen what it predicts."""
import math
import os
import textwrap
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from glcm.core import InputError, root
from glcm.data.views import prepare_inputs
from glcm.distributed import launch
from glcm.losses import ALONE
from glcm.model import GLCM
from glcm.pretexts.blocks import cut_blocks, encode_blocks, prediction_losses
from glcm.pretexts.cpc import CPCOutputs, prediction_pairs
from batches import noise_batch
from test_pretexts import new_network, run_of

PAPER = dict(views=dict(frames=32, crop=112), model=dict(global_frames=8, local_stride=32), pretext=dict(predicted=3))


def random_frames(clips=2, frames=16, side=56):
    "Frames that take a gradient."
    torch.manual_seed(4)
    return torch.randint(0, 256, (clips, 3, frames, side, side)).double().requires_grad_()


def seen_blocks(output, frames, length):
    "(B, N) bool: whether an output depends on the frames of each block of each clip."
    gradient, = torch.autograd.grad(output.square().sum(), frames, retain_graph=True)
    return cut_blocks(gradient, length).abs().sum((2, 3, 4, 5)) > 0


def random_outputs(clips, pairs, blocks=4, size=6):
    torch.manual_seed(5)
    shapes = (clips, pairs, size), (clips, blocks, size)
    return CPCOutputs(*(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes))


def slow_weights(prediction, candidates):
    "The exponential of a prediction's dot product with each of a clip's candidates."
    weights = []
    for candidate in candidates:
        score = sum(p*z for p, z in zip(prediction, candidate))
        weights.append(math.exp(score))
    return weights


def slow_losses(predictions, places, candidates):
    "Both parts of the loss by their definition, number by number."
    clip_loss = place_loss = 0.
    count = 0
    for clip, rows in enumerate(predictions.tolist()):
        for prediction, place in zip(rows, places):
            weights = [slow_weights(prediction, other) for other in candidates.tolist()]
            own = sum(weights[clip])
            clip_loss -= math.log(own/sum(map(sum, weights)))
            place_loss -= math.log(weights[clip][place]/own)
            count += 1
    return dict(loss=(clip_loss + place_loss)/count, clip_loss=clip_loss/count, place_loss=place_loss/count)


# Blocks

def test_blocks_are_encoded_as_clips_of_their_length():
    model = GLCM(run_of('cpc').model).double().eval()
    frames = random_frames()
    features = encode_blocks(model, frames, 4)
    for clip in range(2):
        for block in range(4):
            alone = encode_blocks(model, frames[clip:clip + 1, :, 4*block:4*block + 4], 4)
            torch.testing.assert_close(features[clip, block], alone[0, 0], rtol=1e-9, atol=1e-12)


def test_blocks_do_not_see_each_other():
    "Unlike steps of a clip that is encoded whole."
    model, frames = GLCM(run_of('cpc').model).double().eval(), random_frames()
    features = encode_blocks(model, frames, 4)
    for block in range(4):
        expected = torch.zeros(2, 4, dtype=torch.bool)
        expected[1, block] = True
        assert torch.equal(seen_blocks(features[1, block], frames, 4), expected)
    whole = encode_blocks(model, frames, 16)
    assert seen_blocks(whole[1, 0], frames, 4)[1].all()


def test_frames_that_are_left_over_are_refused():
    with pytest.raises(InputError, match='16 frames cannot be cut into blocks of 5'):
        cut_blocks(random_frames(), 5)


def test_losses_equal_their_definition():
    predictions, candidates = random_outputs(3, 5)
    places = [1, 2, 3, 0, 1]
    losses = prediction_losses(predictions, places, candidates)
    found = {name: value.item() for name, value in losses.items()}
    assert found == pytest.approx(slow_losses(predictions, places, candidates), rel=1e-12)


def test_losses_and_gradients_are_those_of_cross_entropy():
    predictions, candidates = random_outputs(3, 5)
    places = [1, 2, 3, 0, 1]
    labels = (4*torch.arange(3)[:, None] + torch.tensor(places)).flatten()
    scores = predictions.flatten(0, 1) @ candidates.flatten(0, 1).T
    expected = F.cross_entropy(scores, labels)
    found = prediction_losses(predictions, places, candidates)['loss']
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(found, (predictions, candidates))
    expected_gradients = torch.autograd.grad(expected, (predictions, candidates))
    for mine, theirs in zip(gradients, expected_gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_scores_are_at_least_float32():
    "As bfloat16 they would be 256 and 256, and the loss log 2."
    predictions, candidates = torch.tensor([[[1.]]]), torch.tensor([[[256.], [257.]]])
    with torch.autocast('cpu', torch.bfloat16):
        loss = prediction_losses(predictions, [1], candidates)['loss']
    assert float(loss) == pytest.approx(math.log1p(math.exp(-1)), rel=1e-5)


def test_large_scores_stay_finite():
    "Raw dot products may grow: a wrong prediction costs the difference of the scores."
    predictions, candidates = torch.tensor([[[1e4]]]), torch.tensor([[[1.], [-1.]]])
    losses = prediction_losses(predictions, [1], candidates)
    assert losses['loss'].item() == pytest.approx(2e4) and losses['clip_loss'].item() == 0


RANKS = textwrap.dedent('''
    """The losses of this rank's clips, with those of all ranks as negatives and with its own alone."""
    import sys
    import torch
    from glcm.distributed import process_group
    from test_pretexts_cpc import losses_and_gradients
    with process_group() as ranks:
        torch.save(losses_and_gradients(ranks), f'{sys.argv[1]}-{ranks.rank}')
''')


def losses_and_gradients(ranks=ALONE, clips=8):
    "Of one rank's share of some clips: with negatives of all ranks, and of this one."
    whole = random_outputs(clips, 3)
    share = [tensor.detach()[ranks.rank::ranks.size].requires_grad_() for tensor in whole]
    losses = [prediction_losses(share[0], [1, 2, 3], share[1], which) for which in (ranks, ALONE)]
    gradients = torch.autograd.grad(losses[0]['loss'], share)
    return [{name: value.item() for name, value in parts.items()} for parts in losses], gradients


@pytest.mark.parametrize('processes', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_over_ranks_are_those_of_one_process(tmp_path, monkeypatch, processes):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(root()), str(root()/'tests')]))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    (tmp_path/'program.py').write_text(RANKS)
    launch([str(tmp_path/'program.py'), str(tmp_path/'rank')], processes)
    (expected, _), gradients = losses_and_gradients()
    together, alone, gradients_of_ranks = [], [], []
    for rank in range(processes):
        (world, own), found = torch.load(tmp_path/f'rank-{rank}')
        together.append(world)
        alone.append(own)
        gradients_of_ranks.append(found)
    for name, value in expected.items():
        mean = sum(losses[name] for losses in together)/processes
        assert mean == pytest.approx(value, rel=1e-12)
    mean = sum(losses['clip_loss'] for losses in alone)/processes
    assert mean < expected['clip_loss'] # fewer negatives are easier
    for part, whole in enumerate(gradients):
        for rank, found in enumerate(gradients_of_ranks): # a rank's loss is a mean over fewer clips
            torch.testing.assert_close(found[part]/processes, whole[rank::processes], rtol=1e-10, atol=1e-14)


# CPC

@pytest.mark.parametrize('blocks, predicted', [(4, 1), (4, 3), (8, 3), (2, 1)])
def test_pairs_are_all_that_fit(blocks, predicted):
    expected = []
    for last, target in product(range(blocks), range(blocks)):
        if 1 <= target - last <= predicted:
            expected.append((last, target))
    assert sorted(prediction_pairs(blocks, predicted)) == expected


def gru_step(recurrence, block, state):
    "One step of a GRU on (B, D) and (B, context), by its equations."
    of_block = F.linear(block, recurrence.weight_ih_l0, recurrence.bias_ih_l0).chunk(3, 1)
    of_state = F.linear(state, recurrence.weight_hh_l0, recurrence.bias_hh_l0).chunk(3, 1)
    reset = (of_block[0] + of_state[0]).sigmoid()
    update = (of_block[1] + of_state[1]).sigmoid()
    new = (of_block[2] + reset*of_state[2]).tanh()
    return (1 - update)*new + update*state


@pytest.mark.parametrize('changes', [dict(pretext=dict(predicted=2)), PAPER], ids=['miniature', 'paper'])
def test_predictions_are_those_of_a_recurrence_by_hand(changes):
    "A GRU by its equations, a matrix for each distance."
    network = new_network(run_of('cpc', **changes)).double().eval()
    config, frames = network.run.pretext, network.run.views.frames
    video = random_frames(frames=frames, side=network.run.views.crop)
    with torch.no_grad():
        outputs = network(dict(video=video))
        blocks = network.embed(encode_blocks(network.model, video, 4).mean((3, 4)))
        torch.testing.assert_close(outputs.blocks, blocks)
        state = torch.zeros(2, config.context, dtype=torch.float64)
        contexts = []
        for block in blocks.unbind(1):
            state = gru_step(network.recurrence, block, state)
            contexts.append(state)
        matrices = network.predict.weight.view(config.predicted, config.embedding, config.context)
        for row, (last, target) in enumerate(network.pairs):
            expected = contexts[last] @ matrices[target - last - 1].T
            torch.testing.assert_close(outputs.predictions[:, row], expected, rtol=1e-9, atol=1e-12)


def test_no_prediction_has_seen_what_it_predicts():
    network = new_network(run_of('cpc', pretext=dict(predicted=3))).double().eval()
    frames = random_frames()
    outputs = network(dict(video=frames))
    for row, (last, target) in enumerate(network.pairs):
        seen = seen_blocks(outputs.predictions[1, row], frames, 4)
        assert not seen[0].any() and seen[1].tolist() == [block <= last for block in range(4)]
        assert seen_blocks(outputs.blocks[1, target], frames, 4)[1].tolist() == [block == target for block in range(4)]


def test_in_training_batch_norm_alone_leaks():
    "Its means and variances are those of all blocks, as chapter 31a says."
    network = new_network(run_of('cpc')).double().train()
    frames = random_frames()
    assert seen_blocks(network(dict(video=frames)).predictions[1, 0], frames, 4).all()


def test_chance_of_cpc():
    "No prediction, or blocks that are all the same: log BN."
    network = new_network(run_of('cpc')).eval()
    nothing, same = random_outputs(5, 3), random_outputs(5, 3)
    nothing = nothing._replace(predictions=torch.zeros_like(nothing.predictions))
    same = CPCOutputs(same.blocks[:, :3], same.blocks[:1, :1].expand_as(same.blocks))
    for outputs in (nothing, same):
        losses = network.loss(outputs, {})
        assert losses['loss'].item() == pytest.approx(math.log(5*4), rel=1e-12)
        assert losses['clip_loss'].item() == pytest.approx(math.log(5), rel=1e-12)


def test_the_first_block_is_a_negative_alone():
    "Nothing predicts it: its gradient is that of the denominators."
    network = new_network(run_of('cpc')).double().eval()
    outputs = random_outputs(3, 3)
    network.loss(outputs, {})['loss'].backward()
    scores = torch.einsum('bqd,ckd->bqck', outputs.predictions, outputs.blocks).detach()
    chances = scores.flatten(2).softmax(2).view_as(scores)/9
    expected = torch.einsum('bqc,bqd->cd', chances[..., 0], outputs.predictions)
    torch.testing.assert_close(outputs.blocks.grad[:, 0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('variant', ['cpc', 'dpc'])
@pytest.mark.parametrize('values, message', [
    (dict(block_frames=5), 'pretext.block_frames: 5 does not divide views.frames: 16'),
    (dict(block_frames=32), 'pretext.block_frames: 32 does not divide views.frames: 16'),
    (dict(predicted=4), 'pretext.predicted: 4 leaves none of the 4 blocks'),
    (dict(block_frames=16), 'pretext.predicted: 1 leaves none of the 1 blocks'),
    (dict(predicted=0), 'predicted should be 1 or more'),
])
def test_blocks_that_do_not_fit_are_refused(variant, values, message):
    with pytest.raises(InputError, match=message):
        run_of(variant, pretext=values)


def test_values_of_the_paper_fit():
    run = run_of('cpc', **PAPER)
    network = new_network(run).eval()
    batch = noise_batch(run)
    video, _ = prepare_inputs(batch['planes'][:2], None)
    with torch.no_grad():
        outputs = network(dict(video=video))
    assert outputs.blocks.shape == (2, 8, 128) and outputs.predictions.shape == (2, 7 + 6 + 5, 128)
