"""MoCo is what its paper says: the loss, the slow encoder, the queue, the shuffle; on one rank and on more."""
import math
import os
import textwrap
from dataclasses import replace

import pytest
import torch

from glcm.core import InputError, read_study, root
from glcm.distributed import launch
from glcm.losses import ALONE
from glcm.pretexts.moco import momentum_update, key_groups, queue_loss, shuffle_order
from glcm.pretexts.pretext import prepare_views
from glcm.training.config import run_config
from glcm.training.pretrain import train
from glcm.training.step import training_step
from batches import NAMES, noise_batch
from test_pretexts import machine_with, new_network, run_of, share_of
from test_resume import write_clips
from test_views import numbered_views

SMALL = dict(frames=4, crop=32, shift=0)


def small_run(pretext=None, **changes):
    "Clips of four small frames; other values of the pretext, and of sections."
    return run_of('moco', views=SMALL, pretext=pretext or {}, **changes)


def views_of(run, dtype=torch.float32):
    return prepare_views(noise_batch(run, dtype=dtype))


def optimizer_of(network, lr=0.):
    return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr)


def unit_rows(rows, columns, seed):
    "Embeddings of length one."
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return z/torch.linalg.vector_norm(z, dim=1, keepdim=True)


# The loss

@pytest.mark.parametrize('K, temperature', [(1, 1.0), (7, 0.1), (256, 0.07), (4096, 0.07)])
def test_closed_forms(K, temperature):
    "Three clips of one query: its positive key and all of the queue are the query, or at right angles to it."
    same, other = torch.eye(8, dtype=torch.float64)[:2]

    def loss(key, waiting):
        return queue_loss(same.expand(3, -1), key.expand(3, -1), waiting.expand(K, -1), temperature).item()

    all_scores_equal = math.log(K + 1)
    assert loss(same, same) == pytest.approx(all_scores_equal, rel=1e-12)
    only_the_key_fits = math.log1p(K*math.exp(-1/temperature))
    assert loss(same, other) == pytest.approx(only_the_key_fits, rel=1e-9)
    only_the_queue_fits = math.log1p(K*math.exp(1/temperature))
    assert loss(other, same) == pytest.approx(only_the_queue_fits, rel=1e-12)


def slow_loss(query, key, queue, temperature):
    "Loss and its gradient by the queries, number by number."
    total, gradients = 0., []
    for q, own in zip(query.tolist(), key.tolist()):
        candidates = [own, *queue.tolist()]
        scores = [sum(a*b for a, b in zip(q, candidate))/temperature for candidate in candidates]
        denominator = sum(math.exp(score) for score in scores)
        total += math.log(denominator) - scores[0]
        gradient = []
        for d in range(len(q)):
            mean = sum(math.exp(score)/denominator*candidate[d] for score, candidate in zip(scores, candidates))
            gradient.append((mean - own[d])/temperature/len(query))
        gradients.append(gradient)
    return total/len(query), torch.tensor(gradients, dtype=torch.float64)


def test_loss_equals_its_definition():
    query, key, queue = unit_rows(5, 6, 0), unit_rows(5, 6, 1), unit_rows(11, 6, 2)
    query.requires_grad_()
    loss = queue_loss(query, key, queue, 0.2)
    loss.backward()
    expected, gradient = slow_loss(query.detach(), key, queue, 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(query.grad, gradient, rtol=1e-10, atol=1e-13)


# The slow encoder

def test_weights_that_stand_still_are_reached_by_powers_of_momentum():
    network = new_network(small_run(dict(momentum=0.9))).double()
    slow, fast = network.key_encoder, network.model.local_encoder
    for p in slow.parameters():
        p.add_(1.0)
    start = [p.clone() for p in slow.parameters()]
    for _ in range(20):
        momentum_update(slow, fast, 0.9)
    for p, first, still in zip(slow.parameters(), start, fast.parameters()):
        torch.testing.assert_close(p, still + 0.9**20*(first - still), rtol=1e-12, atol=1e-12)


def test_keys_are_made_by_weights_that_have_followed():
    "And not by those of the step before."
    network = new_network(small_run(dict(momentum=0.5))).double().eval()
    views = views_of(network.run, torch.float64)
    with torch.no_grad():
        for p in network.model.local_encoder.parameters():
            p.mul_(1.5)
        expected = new_network(network.run).double().eval()
        for p in expected.key_encoder.parameters():
            p.mul_(1.25)
        key = network.before_step(views, NAMES, 0, ALONE)['key']
        wanted = expected.embed(expected.key_encoder, expected.key_head, views['second_video'])
    torch.testing.assert_close(key, wanted, rtol=1e-10, atol=1e-12)


def test_only_queries_learn():
    network = new_network(small_run()).train()
    before = {name: p.clone() for name, p in network.named_parameters()}
    training_step(network, optimizer_of(network), noise_batch(network.run), network.run, 0)
    for name, p in network.named_parameters():
        learns = name.startswith(('model.local_encoder.', 'head.'))
        assert (p.grad is not None) == learns, name
        assert torch.equal(p, before[name]) == (not learns), name


def test_running_statistics_are_not_averaged():
    "Those of the key encoder are of the keys, whatever the query encoder's are."
    network = new_network(small_run()).eval()
    statistics = {name: buffer.clone() for name, buffer in network.key_encoder.named_buffers()}
    for norm in network.model.local_encoder.modules():
        if hasattr(norm, 'running_mean'):
            norm.running_mean += 3
    network.before_step(views_of(network.run), NAMES, 0, ALONE)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in network.key_encoder.named_buffers())


# The views

@pytest.mark.parametrize('what, span, most', [('frame', 15, 4), ('row', 0, 11)])
def test_both_views_have_their_own_start_and_crop(what, span, most):
    "Inside of the clip's 40 frames and 64 rows. By chance, a few of 20 pairs start together: of 25 frames, or of 5 rows."
    together = 0
    for view in numbered_views(run_of('moco'), what):
        for name in ('planes', 'second_planes'):
            corner = view[name][:, 0, 0].tolist() # of each frame
            assert corner[-1] - corner[0] == span
            assert 0 <= corner[0] and corner[-1] < 40
        together += bool(view['planes'][0, 0, 0] == view['second_planes'][0, 0, 0])
    assert together <= most


# The queue

@pytest.mark.parametrize('accumulate', [1, 4])
def test_the_queue_holds_the_last_keys_in_order(accumulate, monkeypatch):
    "Twenty of them, which is no multiple of the batch; each step's keys once, however many parts it has."
    network = new_network(small_run(dict(queue=20), pretrain=dict(accumulate=accumulate))).train()
    seen, optimizer, before_step = [network.queue.clone()], optimizer_of(network), network.before_step
    def spy(*args):
        views = before_step(*args)
        seen.append(views['key'])
        return views
    monkeypatch.setattr(network, 'before_step', spy)
    for step in range(4):
        training_step(network, optimizer, noise_batch(network.run), network.run, step)
        assert torch.equal(network.queue, torch.cat(seen)[-20:])
    torch.testing.assert_close(network.queue.norm(dim=1), torch.ones(20))
    counts = {int(buffer) for name, buffer in network.key_encoder.named_buffers() if name.endswith('tracked')}
    assert counts == {4*network.run.pretext.key_groups}


def test_a_clip_is_compared_with_the_queue_before_its_own_keys_are_in_it():
    run = small_run(dict(queue=8, temperature=1.0))
    network = new_network(run).double().eval()
    queue = network.queue.clone()
    views = views_of(run, torch.float64)
    query = network(views).query.detach()
    values = training_step(network, optimizer_of(network), noise_batch(run, dtype=torch.float64), run, 0)
    key = network.queue # all eight of them are new
    assert values['loss'] == pytest.approx(slow_loss(query, key, queue, 1.0)[0], rel=1e-9)


# The shuffle

def test_keys_have_the_companions_of_their_group():
    "Frames of another clip change a key if both are in one group, and no query changes keys."
    network = new_network(small_run()).double().train()
    views = views_of(network.run, torch.float64)
    with torch.no_grad():
        keys = network.keys(views['second_video'], 0, ALONE)
        groups = key_groups(shuffle_order(network.run, 0, 8), network.run.pretext.key_groups, ALONE)
        assert sorted(len(group) for group in groups) == [2, 2, 2, 2]
        for clip in range(8):
            changed = views['second_video'].clone()
            changed[clip] = 255 - changed[clip]//2
            moved = (network.keys(changed, 0, ALONE) != keys).any(1)
            group, = (group.tolist() for group in groups if clip in group)
            assert moved.nonzero().flatten().tolist() == sorted(group)
        other = network.before_step(views | dict(video=255 - views['video']), NAMES, 0, ALONE)
        assert torch.equal(other['key'], keys)


def test_queries_see_no_second_view():
    network = new_network(small_run()).train()
    views = views_of(network.run)
    query = network(views).query
    assert torch.equal(network(views | dict(second_video=255 - views['second_video'])).query, query)


@pytest.mark.parametrize('clips, size', [(16, 4), (3, 1), (10, 3), (2, 1), (512, 128)])
def test_groups_share_the_batch(clips, size):
    order = shuffle_order(small_run(), 7, clips)
    groups = key_groups(order, 4, ALONE)
    assert max(len(group) for group in groups) == size
    assert sorted(torch.cat(groups).tolist()) == list(range(clips))


def test_each_step_and_seed_has_an_order_of_its_own():
    run = small_run()
    orders = [shuffle_order(run, 7, 16), shuffle_order(run, 8, 16), shuffle_order(replace(run, seed=1), 7, 16)]
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[0], shuffle_order(run, 7, 16))


# Ranks

KEYS = textwrap.dedent('''
    """Keys and queue of this rank, while batch norm looks at the batch."""
    import sys
    import torch
    from glcm.distributed import process_group
    from test_pretexts_moco import keys_and_queue
    with process_group() as ranks:
        torch.save(keys_and_queue(ranks), f'{sys.argv[1]}-{ranks.rank}')
''')


def keys_and_queue(ranks):
    "Of this rank's share of eight clips, in float64, after two steps."
    network = new_network(small_run(dict(queue=20))).double().train()
    batch = share_of(noise_batch(network.run, dtype=torch.float64), ranks)
    views, keys = prepare_views(batch), []
    with torch.no_grad():
        for step in range(2):
            with_keys = network.before_step(views, batch['clip'], step, ranks)
            network.after_step(None, with_keys, ranks)
            keys.append(with_keys['key'])
    return torch.stack(keys), network.queue


@pytest.mark.parametrize('processes', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_keys_over_ranks_are_those_of_one_process(tmp_path, monkeypatch, processes):
    "With batch norm in training: the groups are the same ones."
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(root()), str(root()/'tests')]))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    (tmp_path/'program.py').write_text(KEYS)
    launch([str(tmp_path/'program.py'), str(tmp_path/'rank')], processes)
    keys, queue = keys_and_queue(ALONE)
    for rank in range(processes):
        found, found_queue = torch.load(tmp_path/f'rank-{rank}')
        torch.testing.assert_close(found, keys[:, rank::processes], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found_queue, queue, rtol=1e-10, atol=1e-12)


# Values

@pytest.mark.parametrize('changes, message', [
    (dict(pretext=dict(queue=7)), 'queue 7 is shorter than a batch: set it to pretrain.batch = 8 or more'),
    (dict(pretrain=dict(clips=255)), 'queue 256 holds old keys of every clip .* set it to 255 or less'),
    (dict(loss=dict(negatives='batch')), 'set loss.negatives to world, not batch'),
    (dict(pretext=dict(key_groups=1)), 'key_groups should be 2 or more'),
    (dict(pretext=dict(momentum=1.0)), 'momentum should be below 1'),
    (dict(pretext=dict(temperature=0.0)), 'temperature should be 1e-06 or more')])
def test_values_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        run_of('moco', **changes)


def test_clips_are_counted_before_training(tmp_path):
    "Where `pretrain.clips` is null, the queue is compared with the clips that there are."
    write_clips(tmp_path/'clips')
    run = small_run(dict(queue=8), pretrain=dict(batch=4, steps=1))
    with pytest.raises(InputError, match='queue 8 holds old keys of every clip .* there are 7 clips'):
        train(run, machine_with(), tmp_path/'clips', tmp_path/'out', tmp_path/'resume')
    assert not (tmp_path/'out'/'checkpoint.pt').exists()
    run.pretext.check_clips(8, run)


@pytest.mark.parametrize('queue', [4_096, 65_536])
def test_sizes_of_the_paper_fit(queue):
    params = read_study('paper')
    params['variants']['moco'] = dict(pretext=params['variants']['moco']['pretext'] | dict(queue=queue)) # of all clips
    config = run_config(params, 'moco', 0)
    assert config.pretext == replace(config.pretext, queue=queue, embedding=128, temperature=0.07, momentum=0.999)
    assert (config.trained, config.columns) == (('local',), ('loss', 'contrast_loss', 'lr'))


# Learning

def patterned_batches(run):
    "Three batches of clips; both views of a clip are its pattern of colours, with noise of their own."
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        batch = noise_batch(run)
        pattern = torch.randint(0, 192, (8, 1, 6, 4), generator=g).repeat_interleave(8, 2).repeat_interleave(8, 3)
        for name in ('planes', 'second_planes'):
            noise = torch.randint(0, 64, batch[name].shape, generator=g)
            batch[name] = (pattern + noise).to(torch.uint8)
        yield batch


def test_a_tiny_run_learns():
    "Below chance, once true keys have replaced the random directions; the queue never holds an older key of a clip."
    schedule = dict(steps=50, lr=0.001, schedule='constant', warmup_steps=5)
    run = small_run(dict(queue=16, momentum=0.9), pretrain=schedule)
    network, batches = new_network(run).train(), list(patterned_batches(run))
    optimizer = optimizer_of(network)
    losses = [training_step(network, optimizer, batches[step % 3], run, step)['loss'] for step in range(50)]
    chance = math.log(17)
    assert losses[0] < 0.1 and max(losses[2:6]) > 0.85*chance
    assert sum(losses[-10:])/10 < 0.6*chance
