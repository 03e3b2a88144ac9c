"""Every pretext keeps what training promises, and its loss is what its paper says.

A new pretext is a row of `VARIANTS`; what is special in it is tested at the end of the file.
"""
import copy
import math
import os
import signal
import textwrap
from dataclasses import asdict
from functools import cache
from statistics import median

import numpy as np
import pytest
import torch
from batches import NAMES, noise_batch

import glcm.training.pretrain as training
from glcm.core import InputError, override, parse, root
from glcm.distributed import launch
from glcm.losses import ALONE
from glcm.model import GLCM, PARTS
from glcm.pretexts.avts import AVTS, AVTSOutputs, choose_sounds, half_length, hard_share, margin_losses, is_informative
from glcm.pretexts.pretext import gather_clips, prepare_views
from glcm.tasks.config import parse_task
from glcm.tasks.features import Features
from glcm.tasks.localize import attention_heatmap, local_embeddings
from glcm.testing import tiny_params
from glcm.training.checkpoints import Resume, load_model, read_checkpoint
from glcm.training.config import MachineConfig, RunConfig, run_config
from glcm.training.pretrain import Stopped, train, wrap_network
from glcm.training.step import training_step
from test_resume import assert_equal_runs, write_clips
from test_views import numbered_views

# rows of `variants`, each with another pretext or part of one
VARIANTS = [
    'glcm', 'glcm_motion_near', 'glcm_no_local', 'glcm_silence',
    'moco', 'cpc', 'dpc', 'infomax', 'avts', 'avts_cross_entropy', 'avslowfast']
LATE = 5 # a step at which all that a pretext does is going on
SMALL = dict(views=dict(crop=32), model=dict(grid=8)) # a step on such pictures costs a third


def run_of(variant, **changes):
    "The tiny run of a variant, in float32, with other values of its sections."
    params = override(tiny_params(), dict(pretrain=dict(precision='float32', batch=8)), 'the test')
    run = asdict(run_config(params, variant, 0))
    return parse(RunConfig, run | {name: run[name] | values for name, values in changes.items()}, 'the run')


def small_run(variant, **changes):
    "The same on small pictures, where only equality counts."
    return run_of(variant, **SMALL, **changes)


def share_of(batch, ranks):
    "The clips of one rank, as the sampler shares a batch."
    return {name: values[ranks.rank::ranks.size] for name, values in batch.items()}


class Stateful(AVTS):
    "All that a pretext may have: a copy that follows, a queue of the last 16 sounds, and a count of the steps."
    def __init__(self, model, run):
        super().__init__(model, run)
        self.follower = copy.deepcopy(self.sound).requires_grad_(False)
        self.register_buffer('queue', torch.zeros(16, run.pretext.embedding))
        self.register_buffer('steps', torch.zeros((), dtype=torch.long))

    def before_step(self, views, clips, step, ranks):
        self.steps += 1
        for own, followed in zip(self.follower.parameters(), self.sound.parameters()):
            own.lerp_(followed, 0.1)
        return super().before_step(views, clips, step, ranks)

    def after_step(self, outputs, views, ranks):
        sounds = gather_clips(outputs.sound, ranks)
        self.queue.copy_(torch.cat([self.queue, sounds])[-16:])


def new_network(run, kind=None):
    "A network in training, of the run's pretext or of another class."
    torch.manual_seed(0)
    model = GLCM(run.model)
    return kind(model, run) if kind else run.pretext.network(model, run)


def one_step(run, ranks=ALONE, machine=None, step=LATE, kind=None):
    "Losses, gradients and state after a step in float64; batch norm is frozen, since it would look at the other clips."
    network = new_network(run, kind).double()
    if machine is not None:
        wrapped = wrap_network(network, run, machine, ranks)
    else:
        wrapped = network
    wrapped.eval()
    trained = [p for p in network.parameters() if p.requires_grad]
    batch = share_of(noise_batch(run, dtype=torch.float64), ranks)
    values = training_step(wrapped, torch.optim.SGD(trained, 0.), batch, run, step, ranks)
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return dict(values=values, gradients=gradients, state=network.state())


@cache
def whole_step(variant):
    "A step of one process on the whole batch, which the others are compared with."
    return one_step(small_run(variant))


def assert_same_step(found, expected):
    "Losses, gradients and state are equal to within rounding."
    assert found['values'] == pytest.approx(expected['values'], rel=1e-12)
    assert found['gradients'].keys() == expected['gradients'].keys()
    for part in ('gradients', 'state'):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            torch.testing.assert_close(found[part][name], tensor, rtol=1e-8, atol=1e-11, msg=f'{part}: {name}')


def machine_with(**changes):
    return parse(MachineConfig, tiny_params()['machine'] | changes, 'machine')


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_step_trains_what_the_pretext_names(variant):
    run, step = small_run(variant), whole_step(variant)
    assert list(step['values']) == [*run.columns, 'stop']
    assert all(math.isfinite(step['values'][name]) for name in run.columns)
    network = new_network(run)
    assert set(step['gradients']) == {name for name, p in network.named_parameters() if p.requires_grad}
    for name in PARTS:
        prefix = 'model.project.' if name == 'projections' else f'model.{name}_encoder.'
        trained = any(key.startswith(prefix) and gradient.any() for key, gradient in step['gradients'].items())
        assert trained == (name in run.trained), name


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_named_parts_are_the_loss(variant):
    "Weighted by one; GLCM's loss of silence is in no column."
    run, values = small_run(variant), whole_step(variant)['values']
    parts = sum(values[name] for name in run.pretext.losses)
    if run.loss.silence:
        assert values['loss'] > parts + 0.01
    else:
        assert values['loss'] == pytest.approx(parts, rel=1e-12)


@pytest.mark.parametrize('variant', VARIANTS)
def test_parts_of_a_batch_are_the_batch(variant):
    in_parts = one_step(small_run(variant, pretrain=dict(accumulate=4)))
    assert_same_step(in_parts, whole_step(variant))


@pytest.mark.parametrize('variant', VARIANTS)
def test_batch_norm_counts_a_step_once(variant):
    "Each part of the batch once, although it is computed twice; what the pretext does not train, not at all."
    network = new_network(small_run(variant, pretrain=dict(accumulate=2))).train()
    trained = [p for p in network.parameters() if p.requires_grad]
    training_step(network, torch.optim.SGD(trained, 0.), noise_batch(network.run), network.run, LATE)
    for name in ('global', 'local', 'audio'):
        counts = {int(value) for key, value in network.model.part(name).named_buffers() if key.endswith('tracked')}
        assert counts == ({2} if name in network.run.trained else {0}), name


@pytest.mark.parametrize('how', ['recompute', pytest.param('compile', marks=pytest.mark.slow)])
@pytest.mark.parametrize('variant', VARIANTS)
def test_gradients_stay_when_recomputed_or_compiled(variant, how):
    run = small_run(variant)
    assert_same_step(one_step(run, machine=machine_with(**{how: True})), whole_step(variant))


@pytest.mark.parametrize('variant', VARIANTS)
def test_bfloat16_is_near(variant):
    "Losses are computed in float32 from what autocast has made bfloat16."
    values = {}
    for precision in ('float32', 'bfloat16'):
        network = new_network(run_of(variant, pretrain=dict(precision=precision))).eval()
        trained = [p for p in network.parameters() if p.requires_grad]
        values[precision] = training_step(network, torch.optim.SGD(trained, 0.), noise_batch(network.run),
                                          network.run, LATE)
    assert values['bfloat16'] == pytest.approx(values['float32'], rel=0.05, abs=0.02)


@pytest.mark.parametrize('variant', VARIANTS)
def test_draws_belong_to_clips(variant):
    "What a step draws for a clip does not depend on the clips beside it, and so not on the number of ranks."
    network = new_network(run_of(variant)).eval()
    views, order = prepare_views(noise_batch(network.run)), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    for step in range(LATE, LATE + 4):
        torch.manual_seed(step)
        straight = network.before_step(views, NAMES, step, ALONE)
        mixed = network.before_step({name: view[order] for name, view in views.items()},
                                    [NAMES[k] for k in order], step, ALONE)
        for name, tensor in straight.items():
            torch.testing.assert_close(mixed[name], tensor[order], msg=name)


STEP = textwrap.dedent('''
    """One step of each pretext on this rank's share of eight clips; the first rank keeps it."""
    import sys
    import torch
    from glcm.distributed import process_group
    from test_pretexts import VARIANTS, Stateful, machine_with, one_step, small_run
    with process_group() as ranks:
        result = {}
        for accumulate in (1, 2):
            for variant in VARIANTS:
                run = small_run(variant, pretrain=dict(accumulate=accumulate))
                result[variant, accumulate] = one_step(run, ranks, machine_with())
        result['stateful'] = one_step(small_run('avts'), ranks, machine_with(), kind=Stateful)
        if ranks.rank == 0:
            torch.save(result, sys.argv[1])
''')


@pytest.fixture(scope='module', params=[2, pytest.param(4, marks=pytest.mark.slow)])
def over_ranks(request, tmp_path_factory):
    "A step of each pretext on several ranks."
    folder = tmp_path_factory.mktemp('ranks')
    (folder/'program.py').write_text(STEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join([str(root()), str(root()/'tests')]))
        patch.setenv('OMP_NUM_THREADS', '1')
        launch([str(folder/'program.py'), str(folder/'result')], request.param)
    return torch.load(folder/'result')


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('variant', VARIANTS)
def test_a_step_over_ranks_is_that_of_one_process(over_ranks, variant, accumulate):
    assert_same_step(over_ranks[variant, accumulate], whole_step(variant))


def test_state_over_ranks_is_that_of_one_process(over_ranks):
    "The queue too has the clips in the order of the batch."
    expected = one_step(small_run('avts'), kind=Stateful)
    assert expected['state']['queue'][-8:].any(dim=1).all() and not expected['state']['queue'][:8].any()
    assert_same_step(over_ranks['stateful'], expected)


@pytest.mark.parametrize('accumulate', [1, 4])
def test_state_changes_once_a_step(accumulate, tmp_path):
    "In a batch of several parts as well; and a resumed run has it again."
    run = run_of('avts', pretrain=dict(accumulate=accumulate, lr=1e-12)) # weights stay as they are
    network, batch = new_network(run, Stateful).eval(), noise_batch(run)
    torch.nn.init.zeros_(network.follower.weight)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.)
    with torch.no_grad():
        sounds = network(network.before_step(prepare_views(batch), NAMES, 0, ALONE)).sound # the first of four
    for step in range(1, 4):
        training_step(network, optimizer, batch, run, step)
    assert network.steps == 4
    torch.testing.assert_close(network.follower.weight, (1 - 0.9**4)*network.sound.weight)
    torch.testing.assert_close(network.queue, torch.cat([sounds, sounds]), rtol=1e-4, atol=1e-5)

    row = dict.fromkeys(run.columns, 0.)
    Resume(tmp_path, run, 'no data').save([row], network, optimizer)
    restored = new_network(run, Stateful)
    trained = [p for p in restored.parameters() if p.requires_grad]
    Resume(tmp_path, run, 'no data').restore(restored, torch.optim.SGD(trained, 0.))
    assert restored.state().keys() == network.state().keys()
    assert all(torch.equal(tensor, network.state()[name]) for name, tensor in restored.state().items())
    assert not set(network.state()) & set(saved_state(tmp_path)['model'])


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pretexts')
    write_clips(folder/'clips')
    return folder


def tiny_train(folder, variant, out, resume='resume', **changes):
    "A run of six steps on the clips of `folder`, a checkpoint after each step."
    fitted = dict(pretext=dict(queue=6)) if variant == 'moco' else {} # no more keys than the seven clips
    run = small_run(variant, pretrain=dict(batch=3) | changes, **fitted)
    return train(run, machine_with(checkpoint_minutes=0.0), folder/'clips', folder/out, folder/f'{resume}-{variant}')


def saved_state(folder):
    "The newest state of an unfinished run."
    return read_checkpoint(max(folder.glob('checkpoint-*.pt')))


@pytest.mark.parametrize('variant', VARIANTS)
def test_interrupted_run_equals_unbroken_one(clips, variant, monkeypatch):
    "Losses, weights, and also heads and state before the last step."
    states = {}
    def spy(self, history, *args):
        save(self, history, *args)
        states[len(history)] = saved_state(self.folder)['pretext']
    save = Resume.save
    monkeypatch.setattr(Resume, 'save', spy)
    tiny_train(clips, variant, f'{variant}-unbroken')
    unbroken = states.pop(6)

    original = training.training_step
    def interrupted_step(*args):
        if args[4] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)
    monkeypatch.setattr(training, 'training_step', interrupted_step)
    with pytest.raises(Stopped):
        tiny_train(clips, variant, f'{variant}-again')
    monkeypatch.setattr(training, 'training_step', original)
    tiny_train(clips, variant, f'{variant}-again')
    assert_equal_runs(clips/f'{variant}-again', clips/f'{variant}-unbroken')
    assert states[6].keys() == unbroken.keys()
    assert all(torch.equal(states[6][name], tensor) for name, tensor in unbroken.items())


TASK = dict(target='label', epochs=1, batch=2, lr=0.001, weight_decay=0.0, frames=16)
INPUTS = dict( # what a task takes -> the parts that it needs
    local=(dict(features='local'), {'local'}),
    both=(dict(features='global+local'), {'global', 'local'}),
    sound=(dict(modality='audio'), {'audio'}),
    attention=(dict(features='local', input='full_frame+attention'), set(PARTS)))


@pytest.mark.parametrize('variant', VARIANTS)
def test_untrained_parts_are_refused(clips, variant):
    "By every task, and by whatever looks at attention or synchronisation."
    out = clips/f'{variant}-trained'
    tiny_train(clips, variant, out.name, steps=1)
    state = read_checkpoint(out/'checkpoint.pt')
    assert state['model'].keys() == GLCM(run_of(variant).model).state_dict().keys()
    assert state['trained'] == list(run_of(variant).trained) and 'pretext' not in state
    model, run = load_model(out/'checkpoint.pt')
    for values, needed in INPUTS.values():
        config = parse_task(TASK | values, 'the task')
        if needed <= set(model.trained):
            Features(model, run, config)
        else:
            with pytest.raises(InputError, match='of the network, and pretraining has trained'):
                Features(model, run, config)
    views = prepare_views({name: values[:1] for name, values in noise_batch(run).items()})
    for function, needed in ((attention_heatmap, {'global', 'audio', 'projections'}), (local_embeddings, set(PARTS))):
        if not needed <= set(model.trained):
            with pytest.raises(InputError, match='of the network, and pretraining has trained'):
                function(model, views['video'], views['audio'])


@pytest.mark.parametrize('variant', VARIANTS)
def test_random_weights_are_allowed_for_everything(clips, variant):
    "Without a step they are what trained ones are compared with."
    out = clips/f'{variant}-random'
    tiny_train(clips, variant, out.name, steps=0)
    assert load_model(out/'checkpoint.pt')[0].trained == PARTS


# AVTS

def avts_losses(video, positive, negative, margin=0.99):
    "The loss, with embeddings of any length."
    positives, negatives = margin_losses(half_length(video), half_length(positive), half_length(negative), margin)
    return float((positives + negatives).mean())


def test_closed_forms_of_avts():
    x, y, z = torch.eye(3, dtype=torch.float64)[:, None]
    assert avts_losses(x, x, -x) == 0 # together, and as far apart as can be
    all_equal = 0.99**2/2
    assert avts_losses(x, x, x) == pytest.approx(all_equal, rel=1e-12)
    too_near = 0.99 - math.sqrt(0.5)
    all_at_right_angles = (0.5 + too_near**2)/2
    assert avts_losses(x, y, z) == pytest.approx(all_at_right_angles, rel=1e-12)


def slow_avts(outputs, views, margin):
    "The loss of AVTS by its definition, clip by clip, in Python's numbers."
    def loss(video, positive, negative):
        near = math.dist(video, positive)**2
        far = max(0, margin - math.dist(video, negative))**2
        return (near + far)/2
    return mean_of_triples(outputs, views, loss)


def slow_cross_entropy(outputs, views, score):
    "The same of its other objective: concatenated features, two layers, yes or no."
    *weights, bias = score

    def yes(video, sound):
        answer = bias + sum(weight*max(0, v + s) for weight, v, s in zip(weights, video, sound))
        return 1/(1 + math.exp(-answer))

    def loss(video, positive, negative):
        return -(math.log(yes(video, positive)) + math.log(1 - yes(video, negative)))/2
    return mean_of_triples(outputs, views, loss)


def mean_of_triples(outputs, views, loss):
    "The mean over the clips that teach of a loss of frames, their sound and another sound."
    video, sound, second = (tensor.tolist() for tensor in outputs[:3])
    total, count = 0., 0
    for k in range(len(video)):
        hard = bool(views['hard'][k])
        negative = second[k] if hard else sound[k - 1]
        teaches = views['second_audible'][k] if hard else views['audible'][k - 1]
        if not (views['audible'][k] and teaches):
            continue
        total += loss(video[k], sound[k], negative)
        count += 1
    return total/count


def example_of_avts(clips=9):
    "Embeddings of length one half, some clips silent, some negatives hard."
    g = torch.Generator().manual_seed(3)
    z = half_length(torch.randn(3*clips, 5, generator=g, dtype=torch.float64)).unflatten(0, (3, clips))
    flags = torch.rand(3, clips, generator=g)
    views = dict(hard=flags[0] < 0.4, audible=flags[1] < 0.8, second_audible=flags[2] < 0.8)
    return AVTSOutputs(*(part.clone().requires_grad_() for part in z)), views


def test_avts_equals_its_definition():
    network = new_network(run_of('avts'))
    outputs, views = example_of_avts()
    assert network.loss(outputs, views)['loss'].item() == pytest.approx(slow_avts(outputs, views, 0.99), rel=1e-12)


def test_cross_entropy_of_avts_equals_its_definition():
    network = new_network(run_of('avts_cross_entropy'))
    outputs, views = example_of_avts()
    score = torch.randn(6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    expected = slow_cross_entropy(outputs, views, score.tolist())
    outputs = outputs._replace(score=score.expand(9, -1))
    assert network.loss(outputs, views)['loss'].item() == pytest.approx(expected, rel=1e-12)


def test_projections_of_avts_are_a_layer_over_both_features():
    "Concatenated, as the paper has it."
    network = new_network(run_of('avts_cross_entropy')).double()
    video, sound = network.video, network.sound
    frames = torch.randn(4, video.in_features, dtype=torch.float64)
    sounds = torch.randn(4, sound.in_features, dtype=torch.float64)
    weight = torch.cat([video.weight, sound.weight], 1)
    both = torch.cat([frames, sounds], 1) @ weight.T + video.bias + sound.bias
    torch.testing.assert_close(video(frames) + sound(sounds), both)
    last = torch.cat([network.score.weight[0], network.score.bias])
    assert torch.equal(network.second_layer(2)[1], last)


def test_gradients_of_avts_are_zero_where_nothing_is_compared():
    network = new_network(run_of('avts'))
    outputs, views = example_of_avts()
    network.loss(outputs, views)['loss'].backward()
    before = torch.roll(views['audible'], 1)
    useful = views['audible'] & torch.where(views['hard'], views['second_audible'], before)
    assert not outputs.video.grad[~useful].any() and outputs.video.grad[useful].abs().sum(1).min() > 0
    assert not outputs.second.grad[~(useful & views['hard'])].any()
    next_takes_it = torch.roll(useful & ~views['hard'], -1) # as its easy negative
    assert not outputs.sound.grad[~useful & ~next_takes_it].any()


def test_avts_in_the_first_half_has_easy_negatives_alone():
    config = run_of('avts').pretext
    shares = [hard_share(step, 1000, config) for step in range(1000)]
    assert shares == [0.]*500 + [config.hard]*500


def test_the_second_window_of_avts_is_of_another_moment():
    "At least half a second away from the first, which is that of the frames, and inside of the clip."
    distances = set()
    for view in numbered_views(run_of('avts'), 'frame'):
        start, second = int(view['mel'][0, 0]), int(view['second_mel'][0, 0])
        assert view['mel'][0, ::12].tolist() == view['planes'][:, 0, 0].tolist()
        assert view['second_mel'][-1, ::12].tolist() == list(range(second, second + 16))
        assert 0 <= second <= 40 - 16
        assert second - start == view['distance'] and abs(second - start) >= 5
        distances.add(second - start)
    assert min(distances) < 0 < max(distances)


def noise_of_variance_one(count):
    "(count, 6, 20) noise in float64; any two are orthogonal, and each has mean 0."
    g = torch.Generator().manual_seed(7)
    noise = torch.randn(120, count, generator=g, dtype=torch.float64)
    columns, _ = torch.linalg.qr(noise - noise.mean(0))
    return columns.T.view(count, 6, 20)*math.sqrt(119)


def test_silence_and_sameness_have_a_threshold_each():
    "A variance of 0.01, and a cosine of 0.99999."
    x, y = noise_of_variance_one(2).unsqueeze(1)
    assert x.var().item() == pytest.approx(1) and abs((x*y).sum().item()) < 1e-10
    assert is_informative(0.11*x) and not is_informative(0.09*x)
    assert is_informative(x + 0.006*y, x) and not is_informative(x + 0.003*y, x)
    assert is_informative(0.11*y, x) and not is_informative(0.09*y, x)
    views = dict(
        audio=torch.cat([x, x, 0.09*x]), second_audio=torch.cat([x + 0.006*y, x + 0.003*y, y]),
        distance=torch.tensor([7, 7, 7]))
    chosen = choose_sounds(views, [np.random.default_rng(0)]*3, 0.5)
    assert chosen['audible'].tolist() == [True, True, False]
    assert chosen['second_audible'].tolist() == [True, False, True]


def test_avts_needs_another_clip_and_no_shift():
    network = new_network(run_of('avts'))
    outputs, views = example_of_avts(1)
    with pytest.raises(InputError, match='needs two clips'):
        network.loss(outputs, views)
    with pytest.raises(InputError, match='views.shift: 0, not 3'):
        run_of('avts', views=dict(shift=3))


CHANCE = dict( # the least loss of a network that cannot tell a positive from a negative
    cpc=math.log(8*4),
    dpc=math.log(8), # that of clips: it can tell the cells of a clip by padding
    infomax=3*math.log(1 + 7*32),
    avts=0.99**2/4,
    avts_cross_entropy=math.log(2),
    avslowfast=3*0.99**2/4 + math.log(4))


@pytest.mark.parametrize('variant', CHANCE)
def test_a_tiny_run_learns(variant):
    "Eight clips by heart. Rotations and hard negatives are drawn anew for each step, so that single losses leap: the median counts."
    rate = 0.001 if variant == 'infomax' else 0.003 # with 0.003 rounding decides how long it stays at chance
    run = run_of(variant, pretrain=dict(steps=60, lr=rate, schedule='constant', warmup_steps=5))
    network = new_network(run).train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    batch = noise_batch(network.run)
    losses = []
    for step in range(60):
        values = training_step(network, optimizer, batch, network.run, step)
        losses.append(values['loss'])
    assert losses[0] > CHANCE[variant]
    assert median(losses[-10:]) < 0.8*CHANCE[variant]
