"""The tasks: their numbers against independent references, their faults, their sizes."""
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from torch.nn import functional as F

from glcm.core import InputError, generator, read_study
from glcm.data.shards import ClipStore
from glcm.encoders import BasicBlock
from glcm.model import GLCM
from glcm.tasks.classify import Classifier
from glcm.params import check_params
from glcm.tasks.config import task_config
from glcm.tasks.features import Features
from glcm.tasks.finetune import (
    CachedFeatures, decay_groups, finetune, fit, forward_batch, load_network, predict_clips, to_inputs)
from glcm.tasks.metrics import deepfake_scores, sentence_errors, sentence_scores
from glcm.tasks.sentences import BLANK, CHARACTERS, SentenceRecognizer, beam_search, encode_text
from glcm.tasks.statistics import task_scores
from glcm.tasks.windows import LabelledWindows, collate_windows, window_batches
from glcm.testing import tiny_clips, tiny_params
from glcm.training.checkpoints import StateFolder
from glcm.training.config import run_config

CPU = torch.device('cpu')
BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm
STATISTICS = 'running_mean', 'running_var', 'num_batches_tracked'
PARAMS = tiny_params('full')
RUN = run_config(PARAMS, 'glcm', 0)


def new_model(**changes):
    torch.manual_seed(0)
    return GLCM(replace(RUN.model, **changes)), RUN


def edits(a, b):
    "Levenshtein's distance of two lists."
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_word_errors_are_the_edit_distance():
    rng = np.random.default_rng(0)
    words = ['bin', 'blue', 'at', 'f', 'now']

    def sentences():
        return [' '.join(rng.choice(words, rng.integers(1, 7))) for _ in range(40)]

    table = pd.DataFrame(dict(text=sentences(), predicted=sentences()))
    word_errors, words_said, letter_errors, letters_said = 0, 0, 0, 0
    for said, predicted in zip(table.text, table.predicted):
        word_errors += edits(said.split(), predicted.split())
        words_said += len(said.split())
        letter_errors += edits(said, predicted)
        letters_said += len(said)
    scores = sentence_scores(sentence_errors(table))
    assert scores['wer'] == pytest.approx(word_errors/words_said)
    assert scores['cer'] == pytest.approx(letter_errors/letters_said)


def test_empty_predictions_are_all_errors():
    table = pd.DataFrame(dict(text=['set white', 'now'], predicted=''))
    assert sentence_scores(sentence_errors(table)) == dict(wer=1.0, cer=1.0)


def test_deepfake_scores_are_sklearns():
    rng = np.random.default_rng(0)
    logit = np.round(rng.normal(size=200), 1)  # with ties
    fake = rng.random(200) < 0.7
    scores = deepfake_scores(pd.DataFrame(dict(label=np.where(fake, 'FAKE', 'REAL'), logit=logit)))
    p = 1/(1 + np.exp(-logit))
    assert scores['auc'] == pytest.approx(roc_auc_score(fake, p), abs=1e-6)
    assert scores['log_loss'] == pytest.approx(log_loss(fake, p), abs=1e-6)
    assert scores['balanced_60'] == pytest.approx(balanced_accuracy_score(fake, p > 0.6))
    assert scores['balanced_60'] == pytest.approx(roc_auc_score(fake, p > 0.6))  # what some call AUC


def test_interval_holds_the_number_and_shrinks_with_clips():
    rng = np.random.default_rng(0)

    def top1(clips):
        predicted = np.where(rng.random(clips) < 0.6, 'a', 'b')
        names = [str(k) for k in range(clips)]
        table = pd.DataFrame(dict(split='test', clip=names, group='', label='a', predicted=predicted))
        return task_scores(table).loc['top1']

    few = top1(50)
    many = top1(800)
    assert few.low < few.value < few.high
    assert many.low < many.value < many.high
    assert 3 < (few.high - few.low)/(many.high - many.low) < 5.5  # by the square root of 16


@pytest.fixture(scope='module')
def twelve(tmp_path_factory):
    return tiny_clips(tmp_path_factory.mktemp('clips'), 'kinetics700', train=8, validate=4)


@pytest.fixture
def films(twelve):
    "Twelve clips of toys with picture and sound, labelled as two classes."
    store = ClipStore(twelve)
    labels = sorted({row['label'] for row in store.clips})
    rows = []
    for k, row in enumerate(store.clips):
        label = 'AB'[labels.index(row['label']) % 2]
        split = 'test' if k % 3 == 2 else 'train'
        rows.append(row | dict(label=label, split=split, text='bin blue', group=row['clip']))
    store.clips = rows
    return store


def config(**values):
    return replace(task_config(PARAMS, 'ucf101'), epochs=1, batch=4, frames=8, windows=2, **values)


CHOICES = [
    dict(features='global'),
    dict(features='local'),
    dict(probe=True),
    dict(frozen=2),
    dict(probe=True, modality='audio'),
    dict(input='full_frame+attention'),
    dict(modality='video+audio'),
    dict(modality='audio'),
    dict(crops=3, modality='video+audio', input='full_frame+attention'),
    dict(labels=0.5),
]


@pytest.mark.parametrize('values', CHOICES)
def test_every_choice_trains_and_predicts(films, values):
    table = finetune(*new_model(), films, config(**values), 0)
    assert table['clip'].tolist() == [row['clip'] for row in films.clips if row['split'] == 'test']
    assert set(table.predicted) <= {'A', 'B'}
    assert table.confidence.between(0.5, 1).all()


@pytest.fixture
def three_sides(films):
    "The same twelve clips: six for training, three for validation, three for the test."
    sides = 'train', 'validate', 'test', 'train'
    films.clips = [row | dict(split=sides[k % 4]) for k, row in enumerate(films.clips)]
    return films


CANDIDATES = [dict(lr=1e-6), dict(lr=0.01, epochs=3), dict(frozen=4)]


def test_the_best_candidate_on_the_validation_side_is_tested(three_sides, tmp_path):
    """A candidate's score is that of a run with its values alone, tested on the validation clips.

    The test is what a run with the best candidate's values gets."""
    choosing = replace(config(), choose=CANDIDATES)
    table = finetune(*new_model(), three_sides, choosing, 0, keep=tmp_path)
    choices = pd.read_csv(tmp_path/'choices.csv')
    assert choices.candidate.tolist() == ['lr: 1e-06', 'lr: 0.01, epochs: 3', 'frozen: 4']
    assert (choices.train == 6).all() and (choices.validate == 3).all()
    assert set(choices.metric) == {'top1'}
    for value, candidate in zip(choices.value, choosing.candidates()):
        alone = finetune(*new_model(), three_sides, replace(candidate, tested='validate'), 0)
        assert value == pytest.approx((alone.label == alone.predicted).mean())
    best = choices.value.argmax()
    assert choices.chosen.tolist() == [k == best for k in range(3)]
    assert table.equals(finetune(*new_model(), three_sides, choosing.candidates()[best], 0))
    network, _ = load_network(tmp_path/'test.pt')
    assert network.config == choosing.candidates()[best]


def test_test_clips_choose_nothing(three_sides, tmp_path):
    "Exchanging the labels of the test clips changes no score of a candidate and no prediction."
    choosing = replace(config(), choose=CANDIDATES[:2])
    before = finetune(*new_model(), three_sides, choosing, 0, keep=tmp_path/'before')
    exchanged = dict(A='B', B='A')
    for k, row in enumerate(three_sides.clips):
        if row['split'] == 'test':
            three_sides.clips[k] = row | dict(label=exchanged[row['label']])
    after = finetune(*new_model(), three_sides, choosing, 0, keep=tmp_path/'after')
    assert after.drop(columns='label').equals(before.drop(columns='label'))
    assert not after.label.equals(before.label)
    assert (tmp_path/'before'/'choices.csv').read_text() == (tmp_path/'after'/'choices.csv').read_text()


def sentence_config(**values):
    "A small recognizer of sentences that trains all of its network."
    return replace(task_config(PARAMS, 'lrs2'), **dict(frozen=0, epochs=1, size=16, heads=2, layers=1) | values)


def test_sentences_are_chosen_by_the_lower_word_error_rate(three_sides, tmp_path):
    candidates = [dict(epochs=1), dict(epochs=60, lr=0.01)]
    choosing = sentence_config(probe=True, batch=3, beam=1, choose=candidates)
    finetune(*new_model(), three_sides, choosing, 0, keep=tmp_path)
    choices = pd.read_csv(tmp_path/'choices.csv')
    assert set(choices.metric) == {'wer'}
    assert choices.value[1] < choices.value[0]
    assert choices.chosen.tolist() == [False, True]


def test_a_run_that_is_cut_between_candidates_resumes_with_the_best_so_far(three_sides, tmp_path, monkeypatch):
    choosing = replace(config(), choose=[dict(lr=0.01, epochs=3), dict(lr=1e-6)])
    expected = finetune(*new_model(), three_sides, choosing, 0)
    real_save = StateFolder.save

    def save(self, number, content):
        real_save(self, number, content)
        if len(content['choices']) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateFolder, 'save', save)
    with pytest.raises(KeyboardInterrupt):
        finetune(*new_model(), three_sides, choosing, 0, unfinished=tmp_path)
    monkeypatch.undo()
    left = newest_state(tmp_path)
    assert left['choices'][0]['candidate'] == 'lr: 0.01, epochs: 3'
    assert 'best' in left
    assert finetune(*new_model(), three_sides, choosing, 0, unfinished=tmp_path).equals(expected)


def newest_state(folder):
    return torch.load(max(folder.glob('state-*.pt')), weights_only=True)


def test_another_run_restarts_and_names_what_differs(films, tmp_path, capsys):
    first = finetune(*new_model(), films, config(), 0, unfinished=tmp_path)
    capsys.readouterr()
    assert finetune(*new_model(), films, config(), 0, unfinished=tmp_path).equals(first)
    assert 'restarting' not in capsys.readouterr().out
    other = finetune(*new_model(), films, config(lr=0.01), 0, unfinished=tmp_path)
    assert f'task.lr: {config().lr} then, 0.01 now' in capsys.readouterr().out
    assert other.equals(finetune(*new_model(), films, config(lr=0.01), 0))
    assert newest_state(tmp_path)['task']['lr'] == 0.01


def test_predictions_say_how_many_clips_were_used(films):
    "A tenth of eight clips of two classes are two: a quarter."
    table = finetune(*new_model(), films, config(labels=0.1), 0)
    assert set(zip(table.train, table.available)) == {(2, 8)}


def test_loader_processes_change_nothing(films):
    expected = finetune(*new_model(), films, config(), 0)
    assert finetune(*new_model(), films, config(), 0, workers=2).equals(expected)


def test_a_probe_leaves_the_encoders_alone(films):
    network = Classifier(*new_model(), config(probe=True), ['A', 'B'])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train = [i for i, row in enumerate(films.clips) if row['split'] == 'train']
    windows = LabelledWindows(films, dict.fromkeys(train, 0), network.config, 56, 0)
    fit(network, windows, train, seed=0)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name in before if name.endswith(STATISTICS)}
    assert changed - statistics == {'head.weight', 'head.bias'}
    assert {f'norm.{name}' for name in STATISTICS} <= changed


def test_videos_are_classified_by_their_mean_logit(films):
    fake_config = config(target='fake')
    network = Classifier(*new_model(), fake_config, []).eval()
    windows = LabelledWindows(films, {}, fake_config, 56, 0)
    for i, prediction in predict_clips(network, windows, [0, 3, 5]):
        both_ends = [[(0, i, 0.0, 0.5), (0, i, 1.0, 0.5)]]
        batch, = window_batches(windows, both_ends)
        with torch.inference_mode():
            logits = forward_batch(network, batch, CPU)
        assert logits.shape == (2, 1)
        assert prediction['logit'] == pytest.approx(logits.mean().item(), abs=1e-3)
        assert prediction['predicted'] == ('FAKE' if prediction['logit'] > 0 else 'REAL')


def test_logits_of_videos_keep_their_digits(films):
    "With encoders in bfloat16, which has three digits, and for logits at which a sigmoid is 1."
    fake_config = config(target='fake', precision='bfloat16')
    network = Classifier(*new_model(), fake_config, []).eval()
    with torch.no_grad():
        network.head.bias.fill_(60)
    predictions = predict_clips(network, LabelledWindows(films, {}, fake_config, 56, 0), list(range(12)))
    logits = [prediction['logit'] for _, prediction in predictions]
    assert len(set(logits)) == 12
    assert min(logits) > 30
    assert not torch.equal(torch.tensor(logits), torch.tensor(logits).bfloat16().float())
    rank = np.argsort(np.argsort(logits))
    table = pd.DataFrame(dict(label=np.where(rank < 6, 'REAL', 'FAKE'), logit=logits))
    assert roc_auc_score(table.label == 'FAKE', table.logit) == 1


def names_of(network, parameters):
    "The names of some parameters of a network."
    wanted = {id(p) for p in parameters}
    return {name for name, p in network.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize('kind, task, values', [
    (Classifier, 'ucf101', {}),
    (Classifier, 'ucf101', dict(modality='video+audio', frames=8)),
    (SentenceRecognizer, 'lrs2', dict(size=16, heads=2, layers=1))])
def test_weights_decay_and_biases_norms_and_embeddings_do_not(kind, task, values):
    network = kind(*new_model(), replace(task_config(PARAMS, task), **values), ['A', 'B'])
    with_decay, without = decay_groups(network, 0.01)
    decayed, others = names_of(network, with_decay['params']), names_of(network, without['params'])
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert decayed | others == learning
    assert not decayed & others
    modules = dict(network.named_modules())
    for name in learning:
        module, _, end = name.rpartition('.')
        is_unmixed = isinstance(modules[module], BATCH_NORM | torch.nn.LayerNorm | torch.nn.Embedding)
        is_bias = end in ('bias', 'in_proj_bias')
        assert (name in others) == (is_unmixed or is_bias), name


def test_what_does_not_decay_keeps_its_length(films):
    "A step without a gradient: AdamW shrinks the weights by 1 - lr * weight_decay and nothing else."
    network = Classifier(*new_model(), config(), ['A', 'B'])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(decay_groups(network, 0.5), lr=0.1).step()
    for name, p in network.named_parameters():
        factor = 0.95 if p.ndim > 1 else 1
        assert torch.allclose(p, factor*before[name], rtol=1e-6, atol=0), name


def outputs_of_norms(features, batches):
    "Channel means and variances of what each batch norm of the encoders returns, in evaluation."
    seen = {}

    def record(norm, _, output):
        seen.setdefault(norm, []).append(output.transpose(0, 1).flatten(1))

    norms = [module for module in features.encoders.modules() if isinstance(module, BATCH_NORM)]
    hooks = [norm.register_forward_hook(record) for norm in norms]
    with torch.no_grad():
        for inputs in batches:
            assert torch.isfinite(features(*inputs)).all()
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(norms) > 0
    outputs = [torch.cat(parts, 1) for parts in seen.values()]
    return torch.cat([x.mean(1) for x in outputs]), torch.cat([x.var(1) for x in outputs])


class DarkAndBright(torch.utils.data.Dataset):
    "Noise of two brightnesses, the dark clips before the bright ones, as datasets list their classes."
    targets = {i: int(i >= 16) for i in range(32)}

    def __getitem__(self, key):
        _, clip, *_ = key
        noise = torch.randint(-20, 20, (8, 48, 32), generator=torch.Generator().manual_seed(clip))
        brightness = 70 if clip < 16 else 180
        planes = (noise + brightness).to(torch.uint8)
        return dict(clip=clip, target=torch.tensor(self.targets[clip]), planes=planes)


def test_frozen_encoders_take_statistics_of_mixed_batches():
    "The variance of the first layer is that of all clips, not that inside of a class."
    network = Classifier(*new_model(), config(probe=True, precision='float32', features='local'), ['A', 'B'])
    windows = DarkAndBright()
    CachedFeatures(network, windows, list(range(32)), 0)
    video, _, _ = to_inputs(collate_windows([windows[0, i] for i in range(32)]), CPU)
    encoder = network.features.encoders['local']
    with torch.no_grad():
        seen = encoder.conv1(network.features.normalized(video, None))
    total = seen.var((0, 2, 3, 4))
    inside = (seen[:16].var((0, 2, 3, 4)) + seen[16:].var((0, 2, 3, 4)))/2
    between = (encoder.bn1.running_var - inside)/(total - inside)
    assert between.median() > 0.6  # batches of four: three quarters on average; 0 where a batch has one class
    assert torch.allclose(encoder.bn1.running_mean, seen.mean((0, 2, 3, 4)), atol=1e-4)


@pytest.mark.parametrize('values', [
    {},
    dict(features='global'),
    dict(features='local'),
    dict(modality='audio'),
    dict(modality='video+audio'),
    dict(input='full_frame+attention'),
    dict(input='full_frame+attention', modality='video+audio')])
def test_a_probe_of_random_weights_has_normalised_features(films, values):
    clips = list(range(8))
    probe_config = replace(config(probe=True, precision='float32', **values), batch=8)
    network = Classifier(*new_model(), probe_config, ['A', 'B']).eval()
    windows = LabelledWindows(films, dict.fromkeys(clips, 0), probe_config, 56, 0)
    first_views = [(0, i, generator(0, 'frozen', 0, i).random(), None) for i in clips]
    batches = [to_inputs(batch, CPU) for batch in window_batches(windows, [first_views])]
    _, variance = outputs_of_norms(network.features, batches)
    assert variance.log().abs().max() > 1  # the statistics of no data
    CachedFeatures(network, windows, clips, 0)
    mean, variance = outputs_of_norms(network.features, batches)
    assert mean.abs().max() < 0.05
    assert (variance - 1).abs().max() < 0.1  # running variances are those of a sample, layer after layer


TEST_CLIPS = [2, 5, 8, 11] # of `films`


@pytest.mark.parametrize('clips, values, message', [
    ([0], dict(label=None), '1 clips have no label, for example'),
    (range(12), dict(split='train'), '0 for test'),
    (range(12), dict(group='s1'), 's1 has clips in test and train'),
    (TEST_CLIPS, dict(label='C'), "label 'C', which is not among the 2 labels in training")])
def test_clips_that_cannot_be_evaluated_are_named(films, clips, values, message):
    for i in clips:
        films.clips[i] |= values
    with pytest.raises(InputError, match=message):
        finetune(*new_model(), films, config(), 0)


def test_text_that_cannot_be_spelt_is_named(films):
    films.clips[1] |= dict(text='d\u00e9j\u00e0 vu')
    with pytest.raises(InputError, match=f"clip {films.clips[1]['clip']}: .* is none of the characters"):
        finetune(*new_model(), films, sentence_config(), 0)


class TwoLetters:
    "Stands for a sentence recognizer: random scores for two letters and five frames, the decoder's for each prefix."
    def __init__(self, seed, ctc):
        self.seed, self.config = seed, SimpleNamespace(ctc=ctc)
        self.letters = [BLANK, *encode_text('AB')]
        self.frames = self.random_logits(5, 0)

    def random_logits(self, rows, *names):
        generator = torch.Generator().manual_seed(hash((self.seed, *names)))
        logits = torch.full((rows, len(CHARACTERS) + 1), -30.)
        logits[:, self.letters] = 2*torch.randn(rows, 3, generator=generator)
        return logits

    def ctc(self, frames):
        return self.frames[None]

    def next_characters(self, frames, sentences):
        logits = []
        for sentence in sentences.tolist():
            rows = [self.random_logits(1, *sentence[:k + 1]) for k in range(len(sentence))]
            logits.append(torch.cat(rows))
        return torch.stack(logits).log_softmax(-1)

    def score(self, sentence):
        "Log-probability of a whole sentence, with PyTorch's CTC loss."
        log_p = self.next_characters(None, torch.tensor([[BLANK, *sentence]]))[0].double()
        decoder_score = sum(log_p[k, c] for k, c in enumerate([*sentence, BLANK]))
        if not self.config.ctc:
            return decoder_score
        targets = torch.tensor([sentence], dtype=torch.long)
        lengths = torch.tensor([5]), torch.tensor([len(sentence)])
        log_p = self.frames.double().log_softmax(-1).unsqueeze(1)
        ctc_score = -F.ctc_loss(log_p, targets, *lengths, BLANK, reduction='none')[0]
        return (1 - self.config.ctc)*decoder_score + self.config.ctc*ctc_score


@pytest.mark.parametrize('ctc', [0.0, 0.3, 0.9])
def test_the_search_finds_the_best_of_all_sentences(ctc):
    "With repeated letters, and with a beam that is larger than the alphabet."
    sentences = []
    for length in range(6):
        sentences += map(list, product(encode_text('AB'), repeat=length))
    for seed in range(12):
        recognizer = TwoLetters(seed, ctc)
        assert beam_search(recognizer, torch.zeros(1, 5, 1), 200) == max(sentences, key=recognizer.score)


def norm_of_clips(norm, clips, statistics):
    "Batch norm in training of clips (C, T, h, w) of any length; its statistics are kept under its name."
    frames = torch.cat([x.flatten(1) for x in clips], 1)
    mean = frames.mean(1)
    var = frames.var(1, unbiased=False)
    running_mean = 0.9*norm.running_mean + 0.1*mean
    running_var = 0.9*norm.running_var + 0.1*frames.var(1)
    statistics[norm] = running_mean, running_var
    shape = -1, 1, 1, 1
    scale = (norm.weight/(var + norm.eps).sqrt()).view(shape)
    return [(x - mean.view(shape))*scale + norm.bias.view(shape) for x in clips]


def layer_of_clips(layer, clips, statistics):
    "What a layer in training makes of clips of different length, each one by itself."
    if isinstance(layer, torch.nn.BatchNorm3d):
        return norm_of_clips(layer, clips, statistics)
    if isinstance(layer, torch.nn.Sequential):
        for part in layer:
            clips = layer_of_clips(part, clips, statistics)
        return clips
    if isinstance(layer, BasicBlock):
        main = torch.nn.Sequential(layer.conv1, layer.bn1, torch.nn.ReLU(), layer.conv2, layer.bn2)
        inner = layer_of_clips(main, clips, statistics)
        shortcut = layer_of_clips(layer.shortcut, clips, statistics)
        return [(x + y).relu() for x, y in zip(inner, shortcut)]
    return [layer(x[None])[0] for x in clips]


def padded_features(network, name, clips):
    "The features of an encoder for clips in one batch, padded with what must not be seen."
    longest = max(clip.shape[1] for clip in clips)
    batch = torch.stack([F.pad(clip, (0, 0, 0, 0, 0, longest - clip.shape[1]), value=200) for clip in clips])
    length = torch.tensor([clip.shape[1] for clip in clips])
    frames = network.normalized(batch, length)
    if name == 'global':
        frames, length = frames[:, :, ::network.stride], -(-length//network.stride)
    return network.pooled(name, frames, None, length)


@pytest.mark.parametrize('name, local_input', [('global', 'frames'), ('local', 'frames'), ('local', 'motion')])
def test_padding_is_not_in_the_batch_statistics(name, local_input):
    "In training, against a loop over the clips in float64: features, running statistics and gradients."
    torch.manual_seed(0)
    network = Features(*new_model(local_input=local_input), replace(task_config(PARAMS, 'lrs2'), features=name)).double().train()
    encoder = network.encoders[name]
    stages = [encoder.input, encoder.conv1, encoder.bn1, torch.nn.ReLU(), encoder.pool]
    stages += [encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4]
    clips = [torch.randint(0, 256, (3, length, 32, 32), dtype=torch.uint8) for length in (9, 16, 12, 10)]
    stride = network.stride if name == 'global' else 1
    frames = [((clip.double()/255 - network.mean[0])/network.std[0])[:, ::stride] for clip in clips]
    statistics, weights = {}, torch.randn(16, dtype=torch.double)

    def gradient(features):
        "Of a weighted sum over the steps of all clips."
        total = sum((x.sum(0)*weights[:x.shape[1]]).sum() for x in features)
        return torch.autograd.grad(total, encoder.conv1.weight)[0]

    expected = [x.mean((2, 3)) for x in layer_of_clips(torch.nn.Sequential(*stages), frames, statistics)]
    padded = padded_features(network, name, clips)
    features = [own[:, :alone.shape[1]] for own, alone in zip(padded, expected)]
    for own, alone in zip(features, expected):
        assert torch.allclose(own, alone, rtol=0, atol=1e-10)
    for norm, (mean, var) in statistics.items():
        assert torch.allclose(norm.running_mean, mean, rtol=0, atol=1e-10)
        assert torch.allclose(norm.running_var, var, rtol=0, atol=1e-10)
    assert len(statistics) == sum(isinstance(module, torch.nn.BatchNorm3d) for module in encoder.modules())
    assert torch.allclose(gradient(features), gradient(expected), rtol=1e-9, atol=1e-9)


def test_features_of_utterances_are_kept_without_their_padding(films):
    reading = sentence_config(frozen=1, batch=8, precision='float32', flip=0.0)
    network = SentenceRecognizer(*new_model(), reading)
    films.clips = [row | dict(steps=row['steps'] - 3*k) for k, row in enumerate(films.clips[:4])]
    windows = LabelledWindows(films, dict.fromkeys(range(4), encode_text('A B')), reading, 56, 0)
    cached = CachedFeatures(network, windows, [0, 1, 2, 3], 0)
    for i in range(4):
        alone = collate_windows([windows[1, i, 0.0, None]])
        kept = collate_windows([cached[1, i]])
        expected = forward_batch(network, alone, CPU)
        assert torch.allclose(forward_batch(network, kept, CPU), expected, atol=1e-4)


def test_sentences_can_be_memorised(films):
    "Two utterances of different length are memorised, and found again by the beam search."
    values = dict(epochs=150, batch=2, lr=0.003, size=32, dropout=0.0, flip=0.0, weight_decay=0.0, probe=True)
    reading = sentence_config(**values)
    texts = {0: 'SET RED', 1: 'AT TWO'}
    torch.manual_seed(0)
    network = SentenceRecognizer(*new_model(), reading)
    targets = {i: encode_text(text) for i, text in texts.items()}
    windows = LabelledWindows(films, targets, reading, 56, 0)
    fit(network, windows, [0, 1], seed=0)
    predicted = {i: prediction['predicted'] for i, prediction in predict_clips(network, windows, [0, 1])}
    assert predicted == texts


def test_sizes_of_the_paper():
    "LRW by Table 1: 29 frames of 112x112 pixels, 1,024 features a frame, 500 words."
    params = read_study('paper')
    run = run_config(params, 'glcm', 0)
    words = [f'word {k}' for k in range(500)]
    network = Classifier(GLCM(run.model), run, task_config(params, 'lrw'), words).eval()
    with torch.inference_mode():
        video = torch.zeros(1, 3, 29, 112, 112, dtype=torch.uint8)
        features = network.features(video, None)
        assert features.shape == (1, 1024, 29)
        assert network(video, None).shape == (1, 500)


@pytest.mark.parametrize('name, task, probes', [
    ('full', 'lrs2', ['probe']),
    ('grid', 'grid', ['probe', 'probe_tenth', 'probe_hundredth'])])
def test_recognizers_choose_between_frozen_encoders_first_and_none(name, task, probes):
    params = read_study(name)
    assert [bool(c.frozen) for c in task_config(params, task).candidates()] == [True, False]
    for probe in probes:
        assert task_config(params, task, probe).choose == []


@pytest.mark.parametrize('study', ['full', 'pretexts', 'paper', 'grid', 'esc10', 'esc50_fold4', 'lrwar', 'seeds', 'world_frames'])
def test_experiments_of_every_study_fit_together(study):
    "Every task, in every setting, of every variant; each variant is finetuned for something, each dataset used."
    params = read_study(study)
    check_params(params, study)
    finetuned = set()
    for task, settings in params['experiments'].items():
        for setting, variants in settings.items():
            task_config(params, task, setting)
            finetuned |= set(variants)
    assert finetuned == set(params['matrix']['variants'])
    used = {params['localize']['dataset'], *params['experiments']}
    for variant in params['matrix']['variants']:
        used |= set(run_config(params, variant, 0).pretrain.datasets)
    assert set(params['datasets']) == used
