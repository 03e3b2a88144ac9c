"Both MIL-NCE losses against a reference of loops in float64, closed forms, and their own dense form."
import math
import re
from functools import partial
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from glcm.core import InputError
from glcm.losses import (
    COUNTS, dense_mil_nce, global_bags, local_bags, mil_nce_clip, mil_nce_global, mil_nce_local, mil_nce_near,
)


def looped_mil_nce(scores, own, count):
    "Mean MIL-NCE from scores[anchor][candidate] and own[anchor], the set of its candidates."
    losses = []
    for k, row in enumerate(scores):
        positives = [row[j] for j in own[k]]
        negatives = [score for j, score in enumerate(row) if j not in own[k]]
        for other, other_row in enumerate(scores):
            if other != k:
                negatives += [other_row[j] for j in own[k]]
        highest = max(positives + negatives)
        P = sum(math.exp(s - highest) for s in positives)
        N = sum(math.exp(s - highest) for s in negatives)
        losses.append(math.log((COUNTS[count]*P + N)/P))
    return sum(losses)/len(losses)


def dot(a, b):
    "Inner product of two vectors, number by number."
    return sum(float(x)*float(y) for x, y in zip(a, b, strict=True))


def looped_global(z_a, z_v, temperature, count):
    "Eq. 1 with one loop per index."
    B, D, H, W = z_v.shape
    cells = list(product(range(B), range(H), range(W)))
    scores, own = [], []
    for k in range(B):
        scores.append([dot(z_a[k], z_v[b, :, i, j])/temperature for b, i, j in cells])
        own.append({c for c, (b, _, _) in enumerate(cells) if b == k})
    return looped_mil_nce(scores, own, count)


def looped_local(z_a, z_v, temperature, count):
    "Eq. 2 with one loop per index."
    B, D, T = z_v.shape
    M = z_a.shape[2]//T
    slices = list(product(range(B), range(T*M)))
    scores, own = [], []
    for b, t in product(range(B), range(T)):
        scores.append([dot(z_v[b, :, t], z_a[c, :, m])/temperature for c, m in slices])
        own.append({k for k, (c, m) in enumerate(slices) if c == b and m//M == t})
    return looped_mil_nce(scores, own, count)


def looped_near(z_a, z_v, shift, longest, temperature, count):
    "The loss with negatives within the shift, with one loop per index."
    B, D, T = z_v.shape
    M = z_a.shape[2]//T

    def bag(b, p, q):
        "Exponentials of a visual step with the slices of a step of audio."
        return [math.exp(dot(z_v[b, :, p], z_a[b, :, M*q + m])/temperature) for m in range(M)]

    losses = []
    for b in range(B):
        for t in range(longest, T - longest):
            steps = range(t - longest, t + longest + 1)
            for bags, own in (({q: sum(bag(b, t, q)) for q in steps}, t - shift[b]),
                              ({p: sum(bag(b, p, t)) for p in steps}, t + shift[b])):
                negatives = sum(value for step, value in bags.items() if step != own)
                losses.append(math.log((COUNTS[count]*bags[own] + negatives)/bags[own]))
    return sum(losses)/len(losses)


def dense_global(z_a, z_v, temperature, count):
    "The dense form of the global loss."
    anchors, bags = global_bags(z_a, z_v)
    return dense_mil_nce(anchors/temperature, bags, COUNTS[count])


def dense_local(z_a, z_v, temperature, count):
    "The dense form of the local loss."
    anchors, bags = local_bags(z_a, z_v)
    return dense_mil_nce(anchors/temperature, bags, COUNTS[count])


def embeddings(*shape, seed=0, dtype=torch.float32, requires_grad=False):
    "Normalised random embeddings."
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=1)
    return z.requires_grad_(requires_grad)


def relative(a, b):
    "Norm of the difference over the norm."
    return float((a - b).norm()/b.norm())


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize('temperature', [1., 0.07])
@pytest.mark.parametrize('B, D, H, W', [(4, 5, 2, 3), (2, 3, 1, 1), (1, 4, 3, 2)])
def test_global_equals_loops(B, D, H, W, temperature, count):
    z_a = embeddings(B, D)
    z_v = embeddings(B, D, H, W, seed=1)
    expected = looped_global(z_a, z_v, temperature, count)
    for form in (mil_nce_global, dense_global):
        found = form(z_a.double(), z_v.double(), temperature, count)
        assert float(found) == pytest.approx(expected, abs=1e-12, rel=1e-12)
    found = mil_nce_global(z_a, z_v, temperature, count)
    assert float(found) == pytest.approx(expected, abs=1e-6, rel=1e-5)


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize('temperature', [1., 0.07])
@pytest.mark.parametrize('B, D, T, M', [(3, 4, 3, 2), (2, 3, 4, 1), (1, 5, 3, 3), (1, 5, 1, 3)])
def test_local_equals_loops(B, D, T, M, temperature, count):
    z_a = embeddings(B, D, T*M)
    z_v = embeddings(B, D, T, seed=1)
    expected = looped_local(z_a, z_v, temperature, count)
    found = [mil_nce_local(z_a.double(), z_v.double(), temperature, count, block) for block in (None, 1, 2)]
    found.append(dense_local(z_a.double(), z_v.double(), temperature, count))
    for value in found:
        assert float(value) == pytest.approx(expected, abs=1e-12, rel=1e-12)
    found = mil_nce_local(z_a, z_v, temperature, count)
    assert float(found) == pytest.approx(expected, abs=1e-6, rel=1e-5)


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize('temperature', [1., 0.07])
@pytest.mark.parametrize('B, D, T, M', [(3, 4, 3, 2), (2, 3, 4, 1), (1, 5, 3, 3), (2, 5, 1, 3)])
def test_negatives_of_the_clip_alone_equal_loops(B, D, T, M, temperature, count):
    "The mean over clips of Eq. 2 with one loop per index, each clip by itself."
    z_a, z_v = embeddings(B, D, T*M, dtype=torch.float64), embeddings(B, D, T, seed=1, dtype=torch.float64)
    expected = sum(looped_local(z_a[b:b + 1], z_v[b:b + 1], temperature, count) for b in range(B))/B
    assert mil_nce_clip(z_a, z_v, temperature, count).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize('count', COUNTS)
def test_gradcheck_with_negatives_of_the_clip_alone(count):
    z_a, z_v = leaf(2, 3, 6, dtype=torch.float64), leaf(2, 3, 3, seed=1, dtype=torch.float64)
    assert gradcheck(lambda a, v: mil_nce_clip(a, v, 0.5, count), (z_a, z_v))


def test_who_it_is_does_not_lower_the_loss_of_the_clip_alone():
    "Embeddings that differ between clips and not in time: all steps of a clip are equally likely."
    who = 10*torch.eye(8)[..., None]
    z_a, z_v = who.expand(8, 8, 12), who.expand(8, 8, 4)
    assert mil_nce_clip(z_a, z_v).item() == pytest.approx(math.log(2*4 - 1), rel=1e-5)
    assert mil_nce_local(z_a, z_v).item() == pytest.approx(math.log(2*4 - 1), rel=1e-5) # of 32 steps the other clips' are excluded


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize('temperature', [1., 0.07])
@pytest.mark.parametrize('D, T, M, longest', [(4, 9, 3, 2), (3, 4, 1, 1), (5, 11, 2, 5)])
def test_negatives_within_the_shift_equal_loops(D, T, M, longest, temperature, count):
    "For every shift there can be."
    shift = torch.arange(-longest, longest + 1)
    z_a = embeddings(len(shift), D, T*M, dtype=torch.float64)
    z_v = embeddings(len(shift), D, T, seed=1, dtype=torch.float64)
    expected = looped_near(z_a, z_v, shift.tolist(), longest, temperature, count)
    assert mil_nce_near(z_a, z_v, shift, longest, temperature, count).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize('count', COUNTS)
def test_gradcheck_with_negatives_within_the_shift(count):
    z_a, z_v = leaf(2, 3, 10, dtype=torch.float64), leaf(2, 3, 5, seed=1, dtype=torch.float64)
    assert gradcheck(lambda a, v: mil_nce_near(a, v, torch.tensor([2, -1]), 2, 0.5, count), (z_a, z_v))


def test_counting_steps_does_not_lower_the_loss_within_the_shift():
    "The best that scores of places alone can do, over all shifts, is chance."
    T, longest = 10, 3
    shift = torch.arange(-longest, longest + 1)
    z_a, z_v = leaf(1, T, T), torch.eye(T)[None] # any table of scores
    optimizer = torch.optim.Adam([z_a], 0.2)
    for _ in range(200):
        loss = mil_nce_near(z_a.expand(len(shift), T, T), z_v.expand(len(shift), T, T), shift, longest, 1.)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(math.log(2*longest + 1), abs=1e-4)


def test_half_precision_is_computed_in_float32_with_negatives_within_the_shift():
    z_a, z_v, shift = embeddings(3, 8, 18).bfloat16(), embeddings(3, 8, 6, seed=1).bfloat16(), torch.tensor([2, 0, -1])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = mil_nce_near(z_a, z_v, shift, 2)
    assert found.dtype == torch.float32
    assert torch.equal(found, mil_nce_near(z_a.float(), z_v.float(), shift, 2))


@pytest.mark.parametrize('longest, message', [(0, 'shift of 0 need it to be 1'), (2, 'more than 4 steps, not 4')])
def test_shifts_that_leave_no_step(longest, message):
    with pytest.raises(InputError, match=message):
        mil_nce_near(torch.zeros(3, 8, 12), torch.zeros(3, 8, 4), torch.tensor([0, 0, 0]), longest)


def test_one_positive_is_infonce():
    z_a = 3*embeddings(7, 5)
    z_v = embeddings(7, 5, seed=1)
    S = z_a @ z_v.T
    rest_of_column = S.T[~torch.eye(7, dtype=torch.bool)].view(7, 6)
    target = torch.arange(7)
    once = F.cross_entropy(torch.cat([S, rest_of_column], 1), target)
    twice = F.cross_entropy(torch.cat([S, S.T], 1), target)
    for count, expected in [('once', once), ('twice', twice)]:
        found = mil_nce_global(z_a, z_v[..., None, None], 1., count)
        assert float(found) == pytest.approx(float(expected), rel=1e-6)
    as_steps = mil_nce_local(z_a=z_v.T[None], z_v=z_a.T[None], temperature=1.)
    assert float(as_steps) == pytest.approx(float(once), rel=1e-6)


@pytest.mark.parametrize('B, H, W', [(2, 3, 3), (8, 4, 4), (32, 1, 2)])
def test_uniform_scores_give_the_logarithm_of_the_ratio(B, H, W):
    z_a = torch.ones(B, 4)
    z_v = torch.ones(B, 4, H, W)
    assert float(mil_nce_global(z_a, z_v, 1., 'once')) == pytest.approx(math.log(2*B - 1), rel=1e-5)
    assert float(mil_nce_global(z_a, z_v, 1., 'twice')) == pytest.approx(math.log(2*B), rel=1e-5)
    local = mil_nce_local(torch.ones(B, 4, 5*3), torch.ones(B, 4, 5), 1., block=7)
    assert float(local) == pytest.approx(math.log(2*5*B - 1), rel=1e-5)


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('count, floor', [('once', 0.), ('twice', math.log(2))])
def test_scores_of_ten_thousand(sign, count, floor):
    B = 6
    z_a = (100*torch.eye(B)).requires_grad_()
    cells = (sign*100*torch.eye(B))[..., None, None] # own cells score +-1e4
    z_v = cells.repeat(1, 1, 2, 2).requires_grad_()
    loss = mil_nce_global(z_a, z_v, 1., count)
    loss.backward()
    expected = floor if sign == 1 else 1e4 + math.log(2*(B - 1))
    assert float(loss.detach()) == pytest.approx(expected, abs=2e-3)
    assert z_a.grad.isfinite().all()
    assert z_v.grad.isfinite().all()


@pytest.mark.parametrize('count', COUNTS)
def test_gradients_of_random_scores_of_ten_thousand(count):
    generator = torch.Generator().manual_seed(0)
    z_a = 100*torch.randn(6, 8, 12, generator=generator)
    z_v = 100*torch.randn(6, 8, 4, generator=generator)
    loss = mil_nce_local(z_a.requires_grad_(), z_v.requires_grad_(), 1., count, block=5)
    for gradient in torch.autograd.grad(loss, (z_a, z_v)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize('count, value', [('once', 0.), ('twice', math.log(2))])
@pytest.mark.parametrize('scale', [1., 100.])
def test_without_negatives(scale, count, value):
    z_a = scale*embeddings(1, 8, requires_grad=True)
    z_v = scale*embeddings(1, 8, 4, 4, seed=1)
    loss = mil_nce_global(z_a, z_v, 1., count)
    gradient, = torch.autograd.grad(loss, z_a)
    assert float(loss.detach()) == pytest.approx(value, abs=1e-6)
    assert gradient.abs().max() < 1e-4*scale


def leaf(*shape, seed=0, dtype=torch.float32):
    "Normalised random embeddings that take a gradient."
    return embeddings(*shape, seed=seed, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize('block', [None, 1, 4, 5, 100])
def test_gradcheck_of_the_local_loss(count, block):
    z_a = leaf(3, 4, 6, seed=6, dtype=torch.double)
    z_v = leaf(3, 4, 3, seed=3, dtype=torch.double)
    def loss(z_a, z_v):
        return mil_nce_local(z_a, z_v, 0.5, count, block)

    assert gradcheck(loss, (z_a, z_v))


@pytest.mark.parametrize('count', COUNTS)
def test_gradcheck_of_the_global_loss(count):
    z_a = leaf(4, 3, dtype=torch.double)
    z_v = leaf(4, 3, 2, 2, seed=1, dtype=torch.double)
    def loss(z_a, z_v):
        return mil_nce_global(z_a, z_v, 0.5, count)

    assert gradcheck(loss, (z_a, z_v))


def assert_equal_gradients(found, expected, inputs):
    "Both losses have the same gradients, to float32."
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize('temperature', [1., 0.07])
@pytest.mark.parametrize('block', [None, 1, 7, 16, 64, 96, 1000])
def test_streamed_equals_dense(block, temperature, count):
    z_a = leaf(6, 24, 16*3)
    z_v = leaf(6, 24, 16, seed=1)
    found = mil_nce_local(z_a, z_v, temperature, count, block)
    expected = dense_local(z_a, z_v, temperature, count)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_equal_gradients(found, expected, (z_a, z_v))


def test_streamed_equals_dense_for_the_global_loss():
    z_a = leaf(9, 24)
    z_v = leaf(9, 24, 7, 5, seed=1)
    expected = dense_global(z_a, z_v, 0.07, 'once')
    assert_equal_gradients(3*mil_nce_global(z_a, z_v), 3*expected, (z_a, z_v))


def test_clips_may_come_in_any_order():
    order = torch.tensor([3, 0, 4, 1, 2])
    z_a = embeddings(5, 8, 4*3)
    z_v = embeddings(5, 8, 4, seed=1)
    torch.testing.assert_close(mil_nce_local(z_a[order], z_v[order]), mil_nce_local(z_a, z_v))
    z_a = embeddings(5, 8)
    z_v = embeddings(5, 8, 3, 3, seed=1)
    cells = torch.randperm(9)
    shuffled = z_v.flatten(2)[..., cells].view_as(z_v)
    torch.testing.assert_close(mil_nce_global(z_a[order], shuffled[order]), mil_nce_global(z_a, z_v))


def test_time_matters_in_the_local_loss():
    "Steps of the same clip are negatives: turning one clip's audio around in time changes the loss."
    z = embeddings(2, 16, 6)
    aligned = z.repeat_interleave(3, dim=2)
    reversed_ = z.flip(2).repeat_interleave(3, dim=2)
    assert mil_nce_local(aligned, z) + 1 < mil_nce_local(reversed_, z)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    z_a = embeddings(4, 8, 12).to(dtype)
    z_v = embeddings(4, 8, 4, seed=1).to(dtype)
    expected = mil_nce_local(z_a.float(), z_v.float())
    z_a.requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = mil_nce_local(z_a, z_v)
        found.backward()
    assert found.dtype == torch.float32
    assert torch.equal(found.detach(), expected)
    reference = z_a.detach().float().requires_grad_()
    mil_nce_local(reference, z_v.float()).backward()
    assert torch.equal(z_a.grad, reference.grad.to(dtype))


def test_half_precision_is_computed_in_float32_with_negatives_of_the_clip_alone():
    z_a, z_v = embeddings(4, 8, 12).bfloat16(), embeddings(4, 8, 4, seed=1).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = mil_nce_clip(z_a, z_v)
    assert found.dtype == torch.float32
    assert torch.equal(found, mil_nce_clip(z_a.float(), z_v.float()))


def test_nan_stays_visible():
    z_a = embeddings(4, 8)
    z_v = embeddings(4, 8, 2, 2, seed=1)
    z_a[2, 3] = torch.nan
    assert mil_nce_global(z_a, z_v).isnan()


@pytest.mark.parametrize('loss, a, v', [
    (mil_nce_global, (3, 8), (4, 8, 2, 2)),
    (mil_nce_global, (4, 7), (4, 8, 2, 2)),
    (mil_nce_global, (4, 8), (4, 8, 2)),
    (mil_nce_global, (0, 8), (0, 8, 2, 2)),
    (mil_nce_global, (4, 8), (4, 8, 0, 2)),
    (mil_nce_local, (4, 8, 13), (4, 8, 4)),
    (mil_nce_local, (4, 8, 12), (3, 8, 4)),
    (mil_nce_local, (4, 8), (4, 8, 4)),
    (mil_nce_local, (4, 8, 2), (4, 8, 4)),
    (mil_nce_local, (4, 8, 0), (4, 8, 4)),
    (mil_nce_clip, (4, 8, 13), (4, 8, 4)),
    (mil_nce_clip, (4, 8, 12), (3, 8, 4)),
    (partial(mil_nce_near, shift=torch.zeros(4, dtype=torch.long), longest=1), (4, 8, 13), (4, 8, 4))])
def test_shapes_that_do_not_fit(loss, a, v):
    with pytest.raises(InputError, match=re.escape(f'not {a} and {v}')):
        loss(torch.zeros(a), torch.zeros(v))
