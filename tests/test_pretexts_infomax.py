"""InfoMax compares what it should with what it should, and its loss is what AMDIM's is."""
import math

import pytest
import torch
from torch.nn import functional as F

from glcm.core import InputError
from glcm.distributed import Ranks
from glcm.losses import ALONE
from glcm.model import GLCM
from glcm.pretexts.infomax import (InfoMaxOutputs, ResidualMLP, cell_losses, infomax_losses, tanh_clip, spread_cells,
                                   take_cells)
from glcm.pretexts.pretext import prepare_views
from batches import NAMES, noise_batch
from test_pretexts import LATE, new_network, run_of
from test_views import numbered_views


def random_scores(clips=5, cells=4):
    g = torch.Generator().manual_seed(2)
    return 3*torch.randn(clips, clips, cells, generator=g, dtype=torch.float64)


# The loss of single cells

@pytest.mark.parametrize('clips, cells', [(2, 1), (8, 32), (16, 7)])
def test_equal_scores_have_the_loss_of_chance(clips, cells):
    losses = cell_losses(torch.full((clips, clips, cells), 1.7, dtype=torch.float64), torch.arange(clips))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(1 + (clips - 1)*cells)), rtol=1e-12, atol=0)


def test_one_cell_is_infonce():
    scores, clips = random_scores(cells=1), torch.arange(5)
    expected = F.cross_entropy(scores[:, :, 0], clips, reduction='none')
    torch.testing.assert_close(cell_losses(scores, clips)[:, 0], expected, rtol=1e-12, atol=0)


def test_a_large_bound_changes_no_score_and_a_small_one_holds():
    scores = random_scores()
    torch.testing.assert_close(tanh_clip(scores, 1e8), scores, rtol=1e-10, atol=0)
    assert tanh_clip(1000*scores, 20.).abs().max() <= 20
    assert tanh_clip(torch.tensor(20.), 20.).item() == pytest.approx(20*math.tanh(1), rel=1e-6)


def test_only_its_own_score_and_those_of_other_clips_move_a_cell():
    scores = random_scores().requires_grad_()
    for clip in range(5):
        for cell in range(4):
            gradient, = torch.autograd.grad(cell_losses(scores, torch.arange(5))[clip, cell], scores)
            expected = torch.zeros(5, 5, 4, dtype=torch.bool)
            expected[clip] = True
            expected[clip, clip] = torch.arange(4) == cell
            assert torch.equal(gradient != 0, expected)
            assert gradient[clip, clip, cell] < 0 and gradient.sum().abs() < 1e-12


def test_a_perfect_network_has_no_loss():
    scores = torch.full((5, 5, 4), -20., dtype=torch.float64)
    scores[torch.arange(5), torch.arange(5)] = 20.
    assert cell_losses(scores, torch.arange(5)).max() < 16*math.exp(-39)


# The whole loss, by loops

def example(clips=6, cells=5, size=7):
    "Embeddings of both sequences, and the draws of antecedents."
    g = torch.Generator().manual_seed(3)
    shapes = [(clips, size), (clips, cells, size), (clips, cells, size)]*2
    outputs = InfoMaxOutputs(*(2*torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes))
    return outputs, dict(antecedents=torch.rand(clips, 2, generator=g))


def slow_score(antecedent, cell):
    "The score of a clip's vector and a cell, two lists of numbers: their product over the root of their length."
    product = 0.
    for x, y in zip(antecedent, cell):
        product += x*y
    return product/math.sqrt(len(antecedent))


def slow_term(antecedents, cells, largest):
    "Loss and mean squared score of one kind and one direction, cell by cell, in Python's numbers."
    cells = cells.tolist()
    losses, squares = [], []
    for b, antecedent in enumerate(antecedents.tolist()):
        positives, negatives = [], 0.
        for other, clip in enumerate(cells):
            for cell in clip:
                score = slow_score(antecedent, cell)
                squares.append(score**2)
                likelihood = math.exp(largest*math.tanh(score/largest))
                if other == b:
                    positives.append(likelihood)
                else:
                    negatives += likelihood
        for positive in positives:
            losses.append(-math.log(positive/(positive + negatives)))
    return sum(losses)/len(losses), sum(squares)/len(squares)


def slow_infomax(outputs, views, largest, penalty):
    "The parts of the loss by their definition."
    sequences = [outputs[:3], outputs[3:]]
    parts = dict(layer3_loss=0., layer4_loss=0., cell_loss=0., penalty_loss=0.)
    for k in range(2):
        mean, _, layer4 = sequences[k]
        _, other3, other4 = sequences[1 - k]
        chosen = [int(u*layer4.shape[1]) for u in views['antecedents'][:, k].tolist()]
        cell = torch.stack([clip[i] for clip, i in zip(layer4, chosen)])
        terms = dict(layer3_loss=(mean, other3), layer4_loss=(mean, other4), cell_loss=(cell, other4))
        for name, pair in terms.items():
            loss, squares = slow_term(*pair, largest)
            parts[name] += loss/2
            parts['penalty_loss'] += penalty*squares/2
    return parts


def test_infomax_equals_its_definition():
    network = new_network(run_of('infomax'))
    outputs, views = example()
    values = {name: float(value) for name, value in network.loss(outputs, views).items()}
    expected = slow_infomax(outputs, views, largest=20, penalty=0.04)
    assert values == pytest.approx(expected | dict(loss=sum(expected.values())), rel=1e-12)


def test_the_penalty_knows_no_bound_and_its_weight_counts():
    outputs, views = example()
    outputs = InfoMaxOutputs(*(10*z for z in outputs))
    pretext = run_of('infomax').pretext
    weights = {}
    for weight in (0.04, 0.4):
        config = type(pretext)('infomax', 7, 5, 20., weight)
        weights[weight] = infomax_losses(outputs[:3], views['antecedents'][:, 0], outputs[3:], config, ALONE)
    assert weights[0.04][3] > 3*0.04*20**2 # the largest there could be of bent scores
    torch.testing.assert_close(weights[0.4][3], 10*weights[0.04][3])
    assert torch.equal(weights[0.4][:3], weights[0.04][:3])


class Together(Ranks):
    "A rank of several, in one process: it gathers what all of them have."
    def __init__(self, rank, size, everyone):
        super().__init__(rank, size)
        self.everyone = everyone # rows of all clips, in the order of the batch

    def all_gather(self, x):
        whole = next(z for z in self.everyone if torch.equal(z[self.rank::self.size], x))
        return torch.cat([whole[rank::self.size] for rank in range(self.size)])


def test_own_clips_are_found_among_those_of_all_ranks():
    "With several clips on each rank, the mean over ranks is the loss of the batch."
    outputs, views = example()
    pretext = run_of('infomax').pretext
    draws = views['antecedents'][:, 0]
    whole = infomax_losses(outputs[:3], draws, outputs[3:], pretext, ALONE)
    parts = []
    for rank in range(3):
        share = [z[rank::3] for z in outputs]
        parts.append(infomax_losses(share[:3], draws[rank::3], share[3:], pretext, Together(rank, 3, outputs)))
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-12, atol=0)


# Heads and cells

def test_a_head_begins_as_its_batch_norm():
    "Of the features themselves, but for a hundredth of the others."
    torch.manual_seed(0)
    head = ResidualMLP(6, 10).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    alone = F.batch_norm(x, None, None, training=True)
    assert (head(x)[:, :6] - alone).abs().max() < 0.1
    assert ResidualMLP(10, 6)(torch.randn(2, 3, 10)).shape == (2, 3, 6)


def test_a_head_gives_float32_of_bfloat16():
    with torch.autocast('cpu', torch.bfloat16):
        assert ResidualMLP(6, 10)(torch.randn(40, 6)).dtype == torch.float32


@pytest.mark.parametrize('total, count', [(196, 32), (256, 32), (16, 5), (7, 7), (1, 3), (1568, 32)])
def test_cells_are_of_the_map_and_spread_over_it(total, count):
    g = torch.Generator().manual_seed(0)
    draws = torch.rand(500, count, generator=g)
    draws[0], draws[1] = 0, 1 - 2**-24
    cells = spread_cells(draws, total)
    taken = min(total, count)
    assert cells.shape == (500, taken) and cells.min() >= 0 and cells.max() < total
    assert (cells.diff() >= 0).all()
    if total % taken == 0: # a stretch has whole cells: none is taken twice
        assert (cells//(total//taken) == torch.arange(taken)).all()


def test_taken_cells_are_those_of_the_clip():
    features = torch.randn(3, 4, 2, 3, 5)
    draws = torch.rand(3, 6)
    taken = take_cells(features, draws)
    cells = spread_cells(draws, 30)
    for clip in range(3):
        for v, cell in enumerate(cells[clip].tolist()):
            step, row, column = cell//15, cell//5 % 3, cell % 5
            assert torch.equal(taken[clip, v], features[clip, :, step, row, column])


# The network: what depends on what

@pytest.fixture(scope='module')
def seen():
    "A network with frozen batch norm, and its views of eight clips."
    network = new_network(run_of('infomax')).eval()
    views = network.before_step(prepare_views(noise_batch(network.run)), NAMES, LATE, ALONE)
    with torch.no_grad():
        return network, views, network(views)


def outputs_with(network, views, **changed):
    with torch.no_grad():
        return network(views | changed)


def test_each_encoder_sees_its_own_sequence_alone(seen):
    network, views, outputs = seen
    other = views['video'].flip(0)
    local = outputs_with(network, views, video=other)
    few = outputs_with(network, views, second_video=other)
    for k, output in enumerate(outputs):
        of_local_encoder = k < 3
        assert torch.equal(few[k], output) == of_local_encoder
        assert torch.equal(local[k], output) != of_local_encoder


def test_the_global_encoder_sees_few_frames(seen):
    network, views, outputs = seen
    stride = network.run.views.frames//network.run.model.global_frames
    between = views['second_video'].clone()
    between[:, :, torch.arange(between.shape[2]) % stride > 0] = 0
    assert all(torch.equal(a, b) for a, b in zip(outputs_with(network, views, second_video=between), outputs))


def test_each_map_has_its_own_draws(seen):
    network, views, outputs = seen
    for k, name in enumerate(('local_layer3', 'local_layer4', 'global_layer3', 'global_layer4')):
        cells = views['cells'].clone()
        cells[:, k] = cells[:, k]/2
        found = outputs_with(network, views, cells=cells)
        changed = [field for field in found._fields if not torch.equal(getattr(found, field), getattr(outputs, field))]
        assert changed == [name]


def test_sound_plays_no_part(seen):
    network, views, outputs = seen
    assert all(torch.equal(a, b) for a, b in zip(outputs_with(network, views, audio=views['audio'] + 1), outputs))


def test_a_clip_does_not_depend_on_others(seen):
    network, views, outputs = seen
    alone = outputs_with(network, {name: view[2:3] for name, view in views.items()})
    for a, b in zip(alone, outputs):
        torch.testing.assert_close(a, b[2:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('what, least, most', [('frame', 20, 20), ('row', 1, 11)])
def test_both_sequences_start_together_and_are_cropped_apart(what, least, most):
    "All of 20 views share the span; of 64 rows there are 5 crops of 56, so that some share theirs by chance."
    equal = 0
    for view in numbered_views(run_of('infomax'), what):
        first, second = (view[name][:, 0, 0].tolist() for name in ('planes', 'second_planes'))
        assert first[-1] - first[0] == (15 if what == 'frame' else 0)
        equal += first == second
    assert least <= equal <= most


@pytest.mark.parametrize('encoders', ['r3d', 'slow_fast'])
def test_heads_fit_the_encoders(encoders):
    run = run_of('infomax', model=dict(encoders=encoders))
    network = run.pretext.network(GLCM(run.model), run).eval()
    views = network.before_step(prepare_views(noise_batch(run)), NAMES, 0, ALONE)
    sizes = [tuple(z.shape) for z in outputs_with(network, views)]
    assert sizes == [(8, 512), (8, 32, 512), (8, 32, 512)]*2


def test_small_maps_are_taken_whole():
    run = run_of('infomax', pretext=dict(cells=1000), model=dict(global_stride=32, local_stride=32))
    network = run.pretext.network(GLCM(run.model), run).eval()
    views = network.before_step(prepare_views(noise_batch(run)), NAMES, 0, ALONE)
    outputs = outputs_with(network, views)
    assert [z.shape[1] for z in (outputs.local_layer4, outputs.global_layer4)] == [16*2*2, 1*2*2]
    assert math.isfinite(network.loss(outputs, views)['loss'])


def test_one_clip_in_a_part_is_refused():
    network = new_network(run_of('infomax', pretrain=dict(accumulate=8))).train()
    views = network.before_step(prepare_views(noise_batch(network.run)), NAMES, 0, ALONE)
    with pytest.raises(InputError, match='two clips in each part of a batch.*lower pretrain.accumulate'):
        network({name: view[:1] for name, view in views.items()})


@pytest.mark.parametrize('values, message', [
    (dict(cells=0), 'cells should be 1 or more'), (dict(largest_score=0.), 'largest_score'),
    (dict(penalty=-1.), 'penalty')])
def test_impossible_values_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        run_of('infomax', pretext=values)
