"""The interface of AV-SUPERB: called by a stand-in for the part of its code that meets a model."""
import pytest
import torch

from glcm.core import InputError
from glcm.export import export
from glcm.model import GLCM
from glcm.tasks.layers import LayerSum
from glcm.tasks.upstream import UpstreamExpert, frames_at, square_frames
from glcm.testing import tiny_params
from glcm.training.checkpoints import save_checkpoint
from glcm.training.config import run_config

SAMPLE_RATE, FRAME_RATE = 16_000, 16


class Harness:
    "Pairs through a model, and a learned sum over the list that was chosen."
    def __init__(self, upstream, chosen):
        self.upstream, self.chosen = upstream.eval(), chosen
        layers = self.layers(self.noise(2, 3))
        self.weights = torch.nn.Parameter(torch.zeros(len(layers)))
        self.output_dim = self.weighted_sum(layers).size(-1)

    def noise(self, *seconds):
        "Sound and pictures of random numbers, as it probes a model."
        generator = torch.Generator().manual_seed(0)
        for length in seconds:
            audio = torch.randn(length*SAMPLE_RATE, generator=generator)
            yield audio, torch.randn(length*FRAME_RATE, 3, 112, 112, generator=generator)

    def layers(self, clips):
        pairs = []
        for audio, video in clips:
            sound = self.upstream.preprocess_audio(audio, SAMPLE_RATE)
            frames = self.upstream.preprocess_video(video, FRAME_RATE)
            pairs.append((sound, frames))
        return self.upstream(pairs)[self.chosen]

    def weighted_sum(self, layers):
        shares = self.weights.softmax(0)
        return sum(share*layer for share, layer in zip(shares, torch.stack(layers)))


def write_checkpoint(folder, variant='glcm'):
    torch.manual_seed(0)
    run = run_config(tiny_params(), variant, 0)
    save_checkpoint(folder/'checkpoint.pt', run, 'no data', 0, GLCM(run.model))
    return str(folder/'checkpoint.pt')


@pytest.fixture(scope='module')
def upstream(tmp_path_factory):
    return UpstreamExpert(write_checkpoint(tmp_path_factory.mktemp('run')), None, refresh=False)


@pytest.mark.parametrize('chosen, layers', [('video_feats', 8), ('audio_feats', 4), ('fusion_feats', 12)])
def test_the_harness_gets_what_it_asks_for(upstream, chosen, layers):
    "Lists of one shape, a learned sum over them, a rate; and its sum is the one of the setting `layers`."
    harness = Harness(upstream, chosen)
    assert len(harness.weights) == layers
    assert harness.output_dim == sum(upstream.networks[chosen].layers.values())
    with torch.no_grad():
        harness.weights.copy_(torch.randn(layers, generator=torch.Generator().manual_seed(1)))
    found = harness.layers(harness.noise(2, 3))
    seconds = found[0].shape[1]*upstream.get_downsample_rates(chosen)/upstream.audio_sample_rate
    assert seconds == pytest.approx(3)
    summed = LayerSum(upstream.networks[chosen].layers)
    summed.weights = harness.weights
    side_by_side = torch.stack(found).sum(0).transpose(1, 2)
    torch.testing.assert_close(harness.weighted_sum(found), summed(side_by_side).transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_a_longer_clip_beside_it_changes_nothing_of_a_clips_pictures(upstream):
    harness = Harness(upstream, 'video_feats')
    short, _ = clips = list(harness.noise(2, 3))
    alone, together = harness.layers([short]), harness.layers(clips)
    steps = alone[0].shape[1]
    for one, both in zip(alone, together, strict=True):
        torch.testing.assert_close(both[:1, :steps], one, rtol=1e-4, atol=1e-4)


def test_nothing_learns_and_frames_may_be_floats_by_then(upstream):
    audio, video = next(Harness(upstream, 'video_feats').noise(2))
    audio = upstream.preprocess_audio(audio, SAMPLE_RATE)
    video = upstream.preprocess_video(100*video + 128, FRAME_RATE)
    expected = upstream([(audio, video)])
    found = upstream([(audio, video.float())])
    for name in expected:
        for layer, same in zip(expected[name], found[name], strict=True):
            assert torch.equal(layer, same)
            assert not layer.requires_grad
    assert not any(p.requires_grad for p in upstream.parameters())


def test_sound_and_pictures_of_other_lengths_are_brought_together(upstream):
    (audio, video), = Harness(upstream, 'video_feats').noise(2)
    video = upstream.preprocess_video(video, FRAME_RATE)
    steps = len(video)
    for samples in (SAMPLE_RATE, 4*SAMPLE_RATE):
        features = upstream([(upstream.preprocess_audio(torch.randn(2, samples), SAMPLE_RATE), video)])
        assert {layer.shape[1] for layer in features['fusion_feats']} == {steps}
        assert {layer.shape[1] for layer in features['audio_feats']} == {3*steps}


def test_a_bundle_is_the_same_upstream(tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    export(checkpoint, tmp_path/'bundle')
    ours, theirs = UpstreamExpert(checkpoint).state_dict(), UpstreamExpert(str(tmp_path/'bundle')).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_encoders_that_a_pretext_did_not_train_are_no_features(tmp_path):
    upstream = UpstreamExpert(write_checkpoint(tmp_path, 'moco'))
    audio, video = torch.randn(SAMPLE_RATE), torch.randint(0, 256, (16, 1, 80, 100))
    features = upstream([(upstream.preprocess_audio(audio, SAMPLE_RATE), upstream.preprocess_video(video, 10))])
    counts = {name: len(layers) for name, layers in features.items()}
    assert counts == dict(video_feats=4, audio_feats=0, fusion_feats=0)


RATES = [(50, 25, 10), (48, 16, 10), (30, 29.97, 10), (20, 10, 25), (1, 30, 10)]


@pytest.mark.parametrize('count, rate, wanted', RATES)
def test_a_frame_is_the_one_that_is_shown_at_its_time(count, rate, wanted):
    "The last frame that has begun by then."
    for k, number in enumerate(frames_at(count, rate, wanted).tolist()):
        time = k/wanted + 1e-6
        begun = [n for n in range(count) if n/rate <= time]
        assert number == begun[-1]


@pytest.mark.parametrize('shape', [(4, 2, 80, 80), (3, 80, 80), (0, 3, 80, 80)])
def test_frames_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match='video should be'):
        square_frames(torch.zeros(shape), 56)
