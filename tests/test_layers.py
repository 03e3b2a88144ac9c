"""A learned sum over the layers of frozen encoders: by hand, and nothing else learns."""
from dataclasses import replace

import pytest
import torch
from test_tasks import config, films, new_model, sentence_config, twelve  # noqa: F401, fixtures
from torch.nn import functional as F

from glcm.core import InputError
from glcm.encoders import LAYERS
from glcm.model import normalize_frames
from glcm.tasks.classify import Classifier
from glcm.tasks.finetune import finetune, fit, load_network
from glcm.tasks.layers import LayerSum, task_features
from glcm.tasks.sentences import SentenceRecognizer
from glcm.tasks.windows import LabelledWindows

STATISTICS = 'running_mean', 'running_var', 'num_batches_tracked'


def layers_config(**values):
    return config(probe=True, encoder_layers='sum', precision='float32', **values)


def outputs_by_hand(encoder, x):
    "The outputs of the four layers, one after the other."
    x = encoder.pool(F.relu(encoder.bn1(encoder.conv1(x))))
    for name in LAYERS:
        x = getattr(encoder, name)(x)
        yield x


def means_by_hand(model, video):
    "The mean of each layer over space and over the frames that its steps stand for: global, then local."
    frames = normalize_frames(video, model.mean, model.std)
    steps = frames.shape[2]
    sparse = frames[:, :, ::4]  # four of sixteen frames in pretraining
    for encoder, seen in ((model.global_encoder, sparse), (model.local_encoder, frames)):
        for output in outputs_by_hand(encoder, seen):
            frames_per_step = steps//output.shape[2]
            assert frames_per_step*output.shape[2] == steps
            repeated = output.mean((3, 4)).repeat_interleave(frames_per_step, 2)
            yield repeated.mean(2)


def test_logits_are_those_of_a_sum_by_hand():
    "Each layer has weights of its own in the head, and the sum of what they give is weighted by a softmax."
    model, run = new_model()
    model.double()
    network = Classifier(model, run, layers_config(), ['A', 'B', 'C']).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        network.layer_sum.weights.copy_(torch.randn(8, generator=generator))
        network.norm.running_mean.normal_(generator=generator)
        network.norm.running_var.uniform_(0.5, 2, generator=generator)
    video = torch.randint(0, 256, (2, 3, 16, 56, 56), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        logits = network(video, None)
        weights = network.layer_sum.weights.exp()
        expected = network.head.bias.expand(2, 3).clone()
        start = 0 # of the layer's channels
        for weight, means in zip(weights, means_by_hand(model, video), strict=True):
            own = slice(start, start + means.shape[1])
            scale = (network.norm.running_var[own] + network.norm.eps).sqrt()
            normalised = (means - network.norm.running_mean[own])/scale
            expected += weight/weights.sum()*normalised @ network.head.weight[:, own].T
            start = own.stop
    assert start == network.head.in_features
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_sound_is_the_mean_over_the_slices_of_each_layer():
    model, run = new_model()
    features = task_features(model.double().eval(), run, layers_config(modality='audio')).eval()
    mel = torch.randn(2, run.model.bands, 96, dtype=torch.double)
    with torch.no_grad():
        found = features(None, mel).mean(2)
        means = [output.mean(2) for output in outputs_by_hand(model.audio_encoder, mel)]
        expected = torch.cat(means, 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def changed_by_training(network, films):  # noqa: F811
    "Names of the parameters and buffers that a training changes."
    before = {name: value.clone() for name, value in network.state_dict().items()}
    targets = {}
    for i, row in enumerate(films.clips):
        if row['split'] == 'train':
            targets[i] = network.target(row)
    windows = LabelledWindows(films, targets, network.config, 56, 0)
    fit(network, windows, list(targets), seed=0)
    changed = set()
    for name, value in network.state_dict().items():
        if not torch.equal(value, before[name]):
            changed.add(name)
    return changed


@pytest.mark.parametrize('values', [{}, dict(modality='video+audio'), dict(input='full_frame+attention')])
def test_only_the_head_and_the_layer_weights_learn(films, values):  # noqa: F811
    "No weight and no statistic of the encoders changes by a bit."
    network = Classifier(*new_model(), layers_config(**values), ['A', 'B'])
    learned = {'layer_sum.weights', 'head.weight', 'head.bias'}
    assert changed_by_training(network, films) == learned | {f'norm.{name}' for name in STATISTICS}


def test_of_a_recognizer_the_encoders_stay_as_they_are(films):  # noqa: F811
    recognizer = sentence_config(probe=True, encoder_layers='sum', batch=4)
    network = SentenceRecognizer(*new_model(), recognizer)
    changed = changed_by_training(network, films)
    assert 'layer_sum.weights' in changed
    assert not any(name.startswith('features.') for name in changed)


@pytest.mark.parametrize('values', [{}, dict(features='local'), dict(modality='audio'), dict(target='fake')])
def test_every_task_is_predicted_and_its_network_kept(films, tmp_path, values):  # noqa: F811
    if values.get('target') == 'fake':
        names = dict(A='REAL', B='FAKE')
        films.clips = [row | dict(label=names[row['label']]) for row in films.clips]
    table = finetune(*new_model(), films, layers_config(**values), 0, keep=tmp_path)
    assert set(table.predicted) <= set(table.label)
    network, _ = load_network(tmp_path/'test.pt')
    shares = network.layer_sum.shares()
    assert shares.sum().item() == pytest.approx(1)
    assert len(shares.unique()) > 1  # they have learned


def test_a_layer_that_says_nothing_loses_its_share():
    "Of two layers one is the class and the other is noise."
    torch.manual_seed(0)
    target = torch.randint(0, 2, (200,))
    noise = torch.randn(200, 4)
    classes = 2*target[:, None] - 1 + 0.1*torch.randn(200, 4)
    features = torch.cat([noise, classes], 1)
    layers, head = LayerSum(dict(noise=4, classes=4)), torch.nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*layers.parameters(), *head.parameters()], 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(head(layers(features)), target).backward()
        optimizer.step()
    noise, classes = layers.shares()
    assert classes > 2*noise


def test_encoders_that_learn_are_refused():
    with pytest.raises(InputError, match='needs probe: true'):
        replace(layers_config(), probe=False)
