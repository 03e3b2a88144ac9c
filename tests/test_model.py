"The model at the size of the paper, its presets and variants, and what each loss may train."
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from glcm.attention import area_resample, attention_map, attention_pool, attention_scores, mean_pool
from glcm.core import InputError
from glcm.encoders import audio_resnet18, video_resnet18
from glcm.losses import LossConfig, mil_nce_clip, mil_nce_local, mil_nce_near
from glcm.model import GLCM, Embeddings, ModelConfig, glcm_loss, overlap

SMALL = ModelConfig(
    encoders='r3d', width=4, embedding=16, local_embedding=0, bands=80, global_frames=4, slices_per_step=3,
    mel_per_step=12, grid=8, global_stride=8, local_stride=16, projection='linear', pooling='attention',
    attention_temperature=0.07, detach_attention=False, normalize=True)
LOSS = LossConfig(
    temperature=0.07, count_positives='once', local_weight=1., mil=True, normalize=True, block=0, negatives='world')
LOCAL = {'local_encoder', 'video_local', 'audio_local'}
GLOBAL = {'global_encoder', 'video_global', 'audio_global'}


def clips(B=3, T=8, side=40, mel_per_step=12, seed=0):
    "Random views of B clips."
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (B, 3, T, side, side), dtype=torch.uint8, generator=generator)
    return video, torch.randn(B, 80, mel_per_step*T, generator=generator)


def build(seed=0, **changes):
    "A seeded small model."
    torch.manual_seed(seed)
    return GLCM(replace(SMALL, **changes))


def trained_parts(model, loss):
    "Names of the encoders and projections that the gradient of a loss arrives at."
    model.zero_grad()
    loss.backward()
    parts = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            parts.add(name.removeprefix('project.').split('.')[0])
    return parts


def shapes(z):
    "The shape of each of the model's outputs."
    return {name: tuple(value.shape) for name, value in z._asdict().items() if value is not None}


def test_paper_size():
    model = build(width=64, embedding=128, global_frames=8, grid=16, local_stride=32).eval()
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert parameters == dict(
        global_encoder=33_203_904, local_encoder=33_203_904, audio_encoder=3_879_296, project=4*(512 + 1)*128)
    with torch.no_grad():
        z = model(*clips(B=1, T=32, side=112))
    assert shapes(z) == dict(
        audio_global=(1, 128), video_global=(1, 128, 16, 16), attention=(1, 16, 16),
        audio_local=(1, 128, 96), video_local=(1, 128, 32))


@pytest.mark.parametrize('temporal', [1, 2, 4, 8, 16])
@pytest.mark.parametrize('spatial', [1, 2, 4, 8, 16, 32])
def test_video_strides(temporal, spatial):
    with torch.device('meta'):
        encoder = video_resnet18(width=2, temporal_stride=temporal, spatial_stride=spatial)
        out = encoder(torch.empty(2, 3, 16, 64, 96))
    assert out.shape == (2, 16, 16//temporal, 64//spatial, 96//spatial)


@pytest.mark.parametrize('stride', [1, 2, 4, 8, 16, 32])
def test_audio_strides(stride):
    encoder = audio_resnet18(width=2, bands=7, temporal_stride=stride)
    for slices in (1, 2, 5, 24):
        assert encoder.eval()(torch.zeros(1, 7, slices*stride)).shape == (1, encoder.channels, slices)


CHOICES = dict( # changes of the model, changes of the loss
    default=(dict(), dict()),
    paper=(dict(normalize=False, attention_temperature=1.), dict(temperature=1.)),
    released=(dict(encoders='slow_fast', width=8, local_embedding=8, normalize=False, attention_temperature=1.,
                   global_stride=16, grid=0),
              dict(temperature=1., count_positives='twice')),
    mlp=(dict(projection='mlp'), dict(block=5)),
    no_projection=(dict(projection='none', embedding=32), dict()))

@pytest.mark.parametrize('choice', CHOICES)
def test_presets_and_projections_learn(choice):
    "Some steps of Adam on three clips lower the loss."
    model_changes, loss_changes = CHOICES[choice]
    model, views, loss = build(**model_changes), clips(), replace(LOSS, **loss_changes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(8):
        value = glcm_loss(model(*views), loss)['loss']
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(float(value.detach()))
    assert history[-1] < 0.8*history[0]


def test_loss_is_the_weighted_sum():
    z = build()(*clips())
    losses = glcm_loss(z, replace(LOSS, local_weight=0.3))
    assert set(losses) == {'loss', 'global_loss', 'local_loss'}
    torch.testing.assert_close(losses['loss'], losses['global_loss'] + 0.3*losses['local_loss'])


def test_negatives_of_the_clip_alone_leave_the_other_clips_out():
    "The local loss of a batch is the mean over its clips, each by itself; the global loss is as ever."
    z = build().eval()(*clips())
    apart = replace(LOSS, local_negatives='clip')
    found, expected = glcm_loss(z, apart), glcm_loss(z, LOSS)
    alone = [type(z)(*[x if x is None else x[i:i + 1] for x in z]) for i in range(len(z.audio_global))]
    by_clip = [glcm_loss(one, LOSS)['local_loss'] for one in alone]
    torch.testing.assert_close(found['local_loss'], torch.stack(by_clip).mean())
    assert found['local_loss'] < expected['local_loss'] and found['global_loss'] == expected['global_loss']


def test_overlap_is_the_moments_that_both_contain():
    "Embeddings that carry clip and moment, for every shift there can be."
    B, T, M, longest = 7, 9, 3, 3
    shift = torch.arange(-longest, longest + 1)
    clip = torch.arange(float(B)).view(B, 1, 1).expand(B, 1, T)
    moments = torch.arange(float(T)).expand(B, 1, T)
    z_v = torch.cat([clip, moments], 1)
    z_a = torch.cat([clip, moments + shift.view(B, 1, 1)], 1).repeat_interleave(M, 2)
    z_a = torch.cat([z_a, torch.arange(M).repeat(T).expand(B, 1, T*M)], 1) # which slice of its step
    slices, steps = overlap(z_a, z_v, shift, longest)
    assert steps.shape == (B, 2, T - longest) and slices.shape == (B, 3, (T - longest)*M)
    assert torch.equal(slices[:, :2], steps.repeat_interleave(M, 2))
    assert torch.equal(slices[:, 2], torch.arange(float(M)).repeat(T - longest).expand(B, -1))
    assert torch.equal(steps[:, 0], clip[:, 0, :T - longest])
    assert (steps[:, 1].diff(dim=1) == 1).all()


def test_the_local_loss_knows_how_the_views_were_cut():
    "Each kind of negatives with the shift of its clips; the ablation of slices comes first."
    z = build().eval()(*clips())
    shift, longest = torch.tensor([2, -1, 0]), 2
    common = overlap(z.audio_local, z.video_local, shift, longest)
    means = F.normalize(z.audio_local.unflatten(2, (8, 3)).mean(-1), dim=1)
    for changes, expected in [
            (dict(), mil_nce_local(*common)),
            (dict(local_negatives='clip'), mil_nce_clip(*common)),
            (dict(local_negatives='near'), mil_nce_near(z.audio_local, z.video_local, shift, longest)),
            (dict(local_negatives='near', mil=False), mil_nce_near(means, z.video_local, shift, longest))]:
        found = glcm_loss(z, replace(LOSS, **changes), shift=shift, longest=longest)
        torch.testing.assert_close(found['local_loss'], expected)
        torch.testing.assert_close(found['loss'], found['global_loss'] + expected)


def test_glcm_trains_everything():
    model = build()
    losses = glcm_loss(model(*clips()), LOSS)
    assert trained_parts(model, losses['loss']) == LOCAL | GLOBAL | {'audio_encoder'}
    assert all(p.grad is not None for p in model.parameters())


def test_no_local_leaves_the_local_pathway_alone():
    model = build()
    for local in (True, False):
        losses = glcm_loss(model(*clips(), local=local), replace(LOSS, local_weight=0.))
        assert trained_parts(model, losses['loss']) == GLOBAL | {'audio_encoder'}
        assert losses['loss'] == losses['global_loss'] and losses['local_loss'] == 0


@pytest.mark.parametrize('change, parts', [
    (dict(), LOCAL | GLOBAL | {'audio_encoder'}),
    (dict(detach_attention=True), LOCAL | {'audio_encoder'}),
    (dict(pooling='mean'), LOCAL | {'audio_encoder'})])
def test_what_the_local_loss_trains(change, parts):
    model = build(**change)
    assert trained_parts(model, glcm_loss(model(*clips()), LOSS)['local_loss']) == parts


@pytest.mark.parametrize('normalize', [True, False])
def test_no_mil_averages_the_slices(normalize):
    "By loops in float64: a mean of unit vectors has length one again, a mean of raw ones stays as it is."
    z, loss = build(normalize=normalize)(*clips()), replace(LOSS, normalize=normalize)
    slices = z.audio_local.detach().double()
    means = torch.zeros(3, 16, 8, dtype=torch.double)
    for b in range(3):
        for t in range(8):
            mean = (slices[b, :, 3*t] + slices[b, :, 3*t + 1] + slices[b, :, 3*t + 2])/3
            means[b, :, t] = mean/mean.norm() if normalize else mean
    without = glcm_loss(z, replace(loss, mil=False))
    expected = glcm_loss(z._replace(audio_local=means), loss)
    torch.testing.assert_close(without['local_loss'].double(), expected['local_loss'], rtol=1e-5, atol=1e-6)
    assert without['global_loss'] == glcm_loss(z, loss)['global_loss']
    assert without['local_loss'] != glcm_loss(z, loss)['local_loss']


def test_without_mil_the_length_of_a_mean_is_no_temperature():
    "Slices on both sides of a step's direction: apart, their mean is shorter; its direction and so the loss stay."
    steps = torch.eye(8)[:, :4].unsqueeze(0) # (1, 8, 4)
    aside = torch.eye(8)[:, 4:].unsqueeze(0)
    losses = []
    for spread in (0., 1., 3.):
        one_side, other_side = F.normalize(steps + spread*aside, dim=1), F.normalize(steps - spread*aside, dim=1)
        slices = torch.stack([one_side, other_side], 3).flatten(2)
        z = Embeddings(torch.ones(1, 8), torch.ones(1, 8, 1, 1), None, slices, steps)
        losses.append(float(glcm_loss(z, replace(LOSS, temperature=1., mil=False))['local_loss']))
    own, other = 1., 0. # scores of a step with its slice, and with another's; 3 others in each of two directions
    assert losses == pytest.approx([math.log(1 + 6*math.exp(other - own))]*3, rel=1e-6)


@pytest.mark.parametrize('projection', ['linear', 'mlp'])
@pytest.mark.parametrize('normalize', [True, False])
def test_averages_are_taken_of_features(normalize, projection):
    "Whatever is averaged is averaged before projection and normalisation, so no embedding is shorter for it."
    model = build(normalize=normalize, projection=projection).eval()
    features = {}
    def record_audio(module, args, out): features['audio'] = out
    def record_frames(module, args, out): features['frames'] = out
    model.audio_encoder.register_forward_hook(record_audio)
    model.global_encoder.register_forward_hook(record_frames)
    with torch.no_grad():
        z = model(*clips())
        audio = model.project['audio_global'](features['audio'].mean(2, keepdim=True)).squeeze(2)
        grid = F.interpolate(features['frames'].mean(2), size=(8, 8), mode='bilinear')
        cells = model.project['video_global'](grid.flatten(2)).view(3, 16, 8, 8)
    if normalize:
        audio = audio/audio.norm(dim=1, keepdim=True)
        cells = cells/cells.norm(dim=1, keepdim=True)
    torch.testing.assert_close(z.audio_global, audio)
    torch.testing.assert_close(z.video_global, cells)
    for name in ('audio_global', 'video_global', 'audio_local', 'video_local'):
        lengths = getattr(z, name).norm(dim=1)
        assert normalize == torch.allclose(lengths, torch.ones(()), rtol=0, atol=1e-5)


def test_global_view_is_every_few_frames_of_the_local_view():
    model, (video, audio) = build().eval(), clips()
    other = video.clone()
    other[:, :, [1, 3, 5, 7]] = 255 - other[:, :, [1, 3, 5, 7]]
    with torch.no_grad():
        a, b = model(video, audio), model(other, audio)
    assert torch.equal(a.video_global, b.video_global) and torch.equal(a.attention, b.attention)
    assert not torch.equal(a.video_local, b.video_local)


def test_frames_are_normalised():
    inputs = []
    model = build()
    def record(module, args): inputs.append(args[0])
    model.local_encoder.register_forward_pre_hook(record)
    video, audio = clips()
    for channel, value in enumerate([0, 255, 128]):
        video[:, channel] = value
    model(video, audio)
    expected = torch.tensor([(0 - .43216)/.22803, (1 - .394666)/.22145, (128/255 - .37645)/.216989])
    torch.testing.assert_close(inputs[0].mean((0, 2, 3, 4)), expected)


@pytest.mark.parametrize('height, width', [(32, 32), (33, 50), (57, 112)])
@pytest.mark.parametrize('grid', [0, 16])
def test_any_frame_size(height, width, grid):
    model, (_, audio) = build(grid=grid).eval(), clips()
    z = model(torch.zeros(3, 3, 8, height, width, dtype=torch.uint8), audio)
    side = (grid, grid) if grid else (-(-height//8), -(-width//8))
    assert z.attention.shape[1:] == z.video_global.shape[2:] == side
    torch.testing.assert_close(z.attention.sum((1, 2)), torch.ones(3))


@pytest.mark.parametrize('channels_last', [False, True])
def test_bfloat16_autocast(channels_last):
    model, views = build().eval(), clips()
    with torch.no_grad():
        expected = model(*views)
        if channels_last:
            model = model.to(memory_format=torch.channels_last_3d)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            found = model(*views)
    for name in shapes(expected):
        value = getattr(found, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, getattr(expected, name), atol=0.05, rtol=0.05)


def test_same_seed_same_model():
    z, again = build()(*clips()), build()(*clips())
    assert all(torch.equal(getattr(z, name), getattr(again, name)) for name in shapes(z))
    state = build().state_dict()
    other = build(seed=1)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(*clips()).video_local, build().eval()(*clips()).video_local)


def test_uniform_attention_is_mean_pooling():
    features = torch.randn(2, 5, 3, 4, 7)
    for size in [(4, 7), (1, 1), (16, 16), (3, 5), (14, 14), (5, 2)]:
        torch.testing.assert_close(attention_pool(features, torch.ones(2, *size)), mean_pool(features))


def shared_length(i, n, j, m):
    "The length that part `i` of `n` and part `j` of `m` of the unit interval have in common."
    return max(0., min((i + 1)/n, (j + 1)/m) - max(i/n, j/m))


def looped_area(maps, h, w):
    "Mass of each cell, divided over the targets by the area that they share; both grids cover the unit square."
    B, H, W = maps.shape
    out = torch.zeros(B, h, w, dtype=torch.double)
    for i in range(h):
        for j in range(w):
            for y in range(H):
                for x in range(W):
                    area = shared_length(i, h, y, H)*shared_length(j, w, x, W)
                    out[:, i, j] += area*H*W*maps[:, y, x]
    return out


GRIDS = [((14, 14), (4, 4)), ((16, 16), (4, 4)), ((14, 14), (7, 7)), ((3, 5), (4, 2)), ((2, 2), (5, 3)),
         ((1, 1), (4, 4))]

@pytest.mark.parametrize('cells, size', GRIDS)
def test_area_resampling_equals_loops(cells, size):
    maps = torch.rand(2, *cells, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    expected = looped_area(maps, *size)
    torch.testing.assert_close(area_resample(maps, size), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(area_resample(maps.float(), size), expected.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(expected.sum((1, 2)), maps.sum((1, 2)))


@pytest.mark.parametrize('cells, size', GRIDS)
def test_pooling_reads_the_features_under_a_single_cell(cells, size):
    "Wherever a map has all of its mass, the pooled feature is the mean of those under it, weighted by area."
    count = cells[0]*cells[1]
    one_cell_each = torch.eye(count, dtype=torch.double).view(count, *cells)
    numbers = torch.arange(size[0]*size[1], dtype=torch.double).view(size)
    expected = (looped_area(one_cell_each, *size)*numbers).sum((1, 2))
    features = numbers.expand(count, 1, 1, *size)
    pooled = attention_pool(features, 0.2*one_cell_each) # which brings each map to a sum of one
    torch.testing.assert_close(pooled.flatten(), expected)


@pytest.mark.parametrize('cells, size', [
    ((14, 14), (7, 7)), ((16, 16), (8, 8)), ((16, 16), (4, 4)), ((12, 8), (3, 4))])
def test_area_is_adaptive_average_where_grids_divide(cells, size):
    features, maps = torch.randn(2, 5, 3, *size), torch.rand(2, *cells)
    average = F.adaptive_avg_pool2d(maps, size)
    weights = average/average.sum((1, 2), keepdim=True)
    expected = torch.einsum('bcthw,bhw->bct', features, weights)
    torch.testing.assert_close(attention_pool(features, maps), expected)


def test_area_resampling_keeps_float32_under_autocast():
    maps = torch.rand(2, 14, 14)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        under = area_resample(maps, (4, 4))
    assert torch.equal(under, area_resample(maps, (4, 4)))


def test_compiled_pooling():
    torch.manual_seed(0)
    features = torch.randn(2, 5, 3, 4, 4).to(memory_format=torch.channels_last_3d)
    maps = torch.rand(2, 14, 14)

    def result_and_gradients(pool):
        leaves = features.clone().requires_grad_(), maps.clone().requires_grad_()
        pooled = pool(*leaves)
        return pooled, *torch.autograd.grad(pooled.square().sum(), leaves)

    compiled = torch.compile(attention_pool, fullgraph=True, backend='aot_eager')
    for found, expected in zip(result_and_gradients(compiled), result_and_gradients(attention_pool)):
        torch.testing.assert_close(found, expected)


def test_attention_equals_loops():
    z_a, z_v = torch.randn(2, 3, dtype=torch.double), torch.randn(2, 3, 2, 4, dtype=torch.double)
    expected = torch.zeros(2, 2, 4, dtype=torch.double)
    for b in range(2):
        for i in range(2):
            for j in range(4):
                expected[b, i, j] = z_a[b] @ z_v[b, :, i, j]/0.5
    torch.testing.assert_close(attention_scores(z_a, z_v, temperature=0.5), expected)
    weights = expected.exp()
    expected = weights/weights.sum((1, 2), keepdim=True)
    torch.testing.assert_close(attention_map(z_a, z_v, temperature=0.5), expected)


VIDEO, AUDIO = clips()

@pytest.mark.parametrize('video, audio, message', [
    (VIDEO.float()/255, AUDIO, 'uint8'), (VIDEO[0], AUDIO, 'uint8'), (VIDEO[:, :1], AUDIO, 'uint8'),
    (VIDEO[:, :, :6], AUDIO, '4 frames .* over 6'), (VIDEO[:, :, :2], AUDIO, '4 frames .* over 2'),
    (VIDEO[:, :, :0], AUDIO, '0 frames'), (VIDEO[..., :31], AUDIO, '40x31'),
    (VIDEO, AUDIO[..., :-1], '96 mel frames, not 95'), (VIDEO[:, :, :4], AUDIO, '48 mel frames, not 96'),
    (VIDEO, AUDIO[:2], r'\(3, 80, N\)'), (VIDEO, AUDIO[:, :64], r'\(3, 80, N\)')])
def test_views_that_do_not_fit_together(video, audio, message):
    with pytest.raises(InputError, match=message):
        build()(video, audio)


@pytest.mark.parametrize('change, message', [
    (dict(slices_per_step=5), '12 is not divisible'), (dict(slices_per_step=4), '= 3 is impossible'),
    (dict(mel_per_step=9), '= 3 is impossible'), (dict(global_stride=64), 'global_stride 64'),
    (dict(local_stride=3), 'local_stride 3'), (dict(embedding=0), 'embedding should be 1 or more'),
    (dict(grid=-1), 'grid'),
    (dict(pooling='max'), 'max'), (dict(projection='deep'), 'deep'), (dict(encoders='r2d'), 'r2d'),
    (dict(projection='none'), '32, not r3d and 16'), (dict(attention_temperature=-1.), 'attention_temperature')])
def test_impossible_models(change, message):
    with pytest.raises(InputError, match=message):
        replace(SMALL, **change)


def test_recomputed_activations_give_the_same_gradients():
    video, audio = clips()
    gradients, statistics = [], []
    for recompute in (False, True):
        model = build().train()
        for encoder in (model.global_encoder, model.local_encoder, model.audio_encoder):
            encoder.recompute = recompute
        glcm_loss(model(video, audio), LOSS)['loss'].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        statistics.append(dict(model.named_buffers()))
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-8)
    for name, expected in statistics[0].items():
        assert torch.equal(statistics[1][name], expected), name


@pytest.mark.parametrize('encoders', ['r3d', 'slow_fast'])
def test_motion_is_blind_to_what_stands_still(encoders):
    "Another background, the same in all frames, changes the local embeddings of frames, and not those of motion."
    video, audio = clips()
    moving, background = video//2, torch.randint(0, 128, (1, 3, 1, *video.shape[3:]), dtype=torch.uint8)
    for local_input, blind in dict(motion=True, frames=False).items():
        model = build(encoders=encoders, width=8, pooling='mean', local_input=local_input).eval()
        z, other = model(moving, audio), model(moving + background, audio)
        assert torch.allclose(z.video_local, other.video_local, rtol=0, atol=1e-5) == blind
        assert not torch.allclose(z.video_global, other.video_global, rtol=0, atol=1e-3)
        assert not torch.allclose(*z.video_local[0, :, [2, 6]].T, rtol=0, atol=1e-3) # moments differ


@pytest.mark.parametrize('changes', [dict(encoders='slow_fast', width=8, local_embedding=4), dict(local_embedding=4)])
def test_local_embeddings_of_their_own_size(changes):
    z = build(**changes)(*clips())
    sizes = {name: shape[1] for name, shape in shapes(z).items() if name != 'attention'}
    assert sizes == dict(audio_global=16, video_global=16, audio_local=4, video_local=4)
    assert torch.isfinite(glcm_loss(z, LOSS)['loss'])
