"One channel from many: nothing is lost, nothing exceeds 1, in pieces as at once."
import io
import wave

import av
import numpy as np
import pytest

from glcm.data.mono import Downmix, sides_of
from glcm.data.video import read_recording
from glcm.data.waveform import Sound

RATE = 48000
TONE = 0.5*np.sin(np.arange(RATE)*2*np.pi*500/RATE)


def wav(path, channels):
    with wave.open(str(path), 'wb') as out:
        out.setparams((len(channels), 2, RATE, 0, 'NONE', ''))
        out.writeframes((32767*np.stack(channels, 1)).round().astype('<i2').tobytes())
    return path


def decoded(path):
    with av.open(str(path)) as container:
        return list(container.decode(audio=0))


def mono(frames):
    "As the reader does it: the mean of the sides, or the louder one where they cancel."
    downmix = Downmix()
    waveform = downmix.mono(frames)
    side = downmix.audible_side
    return waveform if side is None else Downmix(side).mono(frames)


def level(waveform):
    "Amplitude of a tone, its ends left out."
    return np.sqrt(2*np.square(waveform[2000:-2000], dtype=np.float64).mean())


@pytest.mark.parametrize('factors, expected', [
    ((1,), 0.5), ((1, 1), 0.5), ((1, 0), 0.25), ((0, 1), 0.25), ((1, -0.5), 0.125), # the mean of two sides
    ((1, -1), 0.5), ((-1, 1), 0.5), ((0.95, -1), 0.5), ((1, -0.7), 0.5)]) # or the louder one
def test_a_side_that_cancels_the_other_does_not_silence_it(tmp_path, factors, expected):
    waveform = read_recording(wav(tmp_path/'a.wav', [f*TONE for f in factors]), None, None, 24000).waveform
    assert abs(level(waveform) - expected) < 0.01


def test_sides_of_a_surround_film_may_cancel_too(tmp_path):
    silent = 0*TONE
    for channels in ([TONE, -TONE, silent, silent, silent, silent], [silent, silent, silent, silent, TONE, -TONE]):
        assert level(mono(decoded(wav(tmp_path/'a.wav', channels)))) > 0.1


def film(path, *parts):
    "Half a minute of each pair of factors, left and right, one after the other."
    sides = [np.concatenate([np.tile(factors[side]*TONE, 30) for factors in parts]) for side in (0, 1)]
    return wav(path, sides)


def levels(waveform, rate=24000, seconds=30):
    return [level(waveform[start:start + seconds*rate]) for start in range(0, len(waveform), seconds*rate)]


def test_it_is_decided_for_the_whole_film(tmp_path):
    "Opposed sides beside louder ones that are equal stay the mean: the sound does not change in the middle."
    path = film(tmp_path/'a.wav', (0.5, -0.5), (1, 1), (0.5, -0.5))
    np.testing.assert_allclose(levels(read_recording(path, None, None, 24000).waveform), [0, 0.5, 0], atol=0.01)


def test_a_short_part_that_is_equal_does_not_change_the_rest(tmp_path):
    "The louder side is kept, where it cancels and where it does not."
    path = film(tmp_path/'a.wav', (0.9, -1), (0.1, 0.1), (0.9, -1))
    np.testing.assert_allclose(levels(read_recording(path, None, None, 24000).waveform), [0.5, 0.05, 0.5], atol=0.01)


def test_a_span_is_decided_by_what_it_holds(tmp_path):
    path = film(tmp_path/'a.wav', (1, -1), (1, 1), (1, 1))
    assert abs(level(read_recording(path, None, None, 24000, 2.0, 20.0).waveform) - 0.5) < 0.01
    np.testing.assert_allclose(levels(read_recording(path, None, None, 24000).waveform), [0, 0.5, 0.5], atol=0.01)


def test_it_is_as_a_mono_file_of_the_louder_side(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, 25*RATE)
    found = read_recording(wav(tmp_path/'a.wav', [0.8*noise, -noise]), None, None, 24000).waveform
    expected = read_recording(wav(tmp_path/'b.wav', [-noise]), None, None, 24000).waveform
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('count', [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 17, 32, 64])
def test_any_number_of_channels_at_full_level_stays_within_one(tmp_path, count):
    waveform = mono(decoded(wav(tmp_path/'a.wav', [2*TONE]*count)))
    assert len(waveform) == RATE and np.isfinite(waveform).all()
    assert np.abs(waveform).max() <= 1 and level(waveform) > 0.9


@pytest.mark.parametrize('layout', ['5.1', '7.1'])
def test_planar_surround(tmp_path, layout):
    "PyAV reads past the eighth plane when such a frame is turned into an array."
    with av.open(str(tmp_path/'a.m4a'), 'w') as container:
        stream = container.add_stream('aac', rate=RATE, layout=layout, options={'b': '512k'})
        to_planar = av.AudioResampler(format='fltp', layout=layout, rate=RATE)
        source = decoded(wav(tmp_path/'a.wav', [TONE]*int(stream.layout.nb_channels)))
        for frame in [*source, None]:
            for piece in to_planar.resample(frame):
                piece.pts = None
                container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    waveform = read_recording(tmp_path/'a.m4a', None, None, 24000).waveform
    assert 0.3 < level(waveform) < 0.6


PLAIN = [('pcm_f32le', 'mono'), ('pcm_s32le', 'mono'), ('flac', 'mono'), ('pcm_f32le', 'stereo')]


@pytest.mark.parametrize('kind, layout', PLAIN)
def test_sound_that_needs_no_resampling(tmp_path, kind, layout):
    path = tmp_path/('a.flac' if kind == 'flac' else 'a.wav')
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(kind, rate=24000, layout=layout)
        to_kind = av.AudioResampler(format=stream.format.name, layout=layout, rate=24000)
        for frame in [*decoded(wav(tmp_path/'source.wav', [TONE]*stream.layout.nb_channels)), None]:
            for piece in to_kind.resample(frame):
                container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    waveform = read_recording(path, None, None, 24000).waveform
    assert len(waveform) == 24000 and abs(level(waveform) - 0.5) < 0.01


def test_blocks_are_as_the_whole(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 10*RATE))
    frames = decoded(wav(tmp_path/'a.wav', noise))
    assert len(frames) > 64
    downmix = Downmix()
    blocks = np.concatenate([downmix.mono(frames[k:k + 50]) for k in range(0, len(frames), 50)])
    np.testing.assert_array_equal(blocks, mono(frames))
    np.testing.assert_array_equal(sides_of(frames), (32767*noise).round()/2**15)


def test_format_may_change_in_mid_film(tmp_path):
    sound = Sound(24000)
    frames = decoded(wav(tmp_path/'a.wav', [TONE, TONE])) + decoded(wav(tmp_path/'b.wav', [TONE]))
    at = 0
    for frame in frames:
        sound.add(frame, at/RATE)
        at += frame.samples
    sound.finish()
    waveform = sound.waveform(0)
    assert len(waveform) == 48000
    assert abs(level(waveform[:24000]) - 0.5) < 0.01 and abs(level(waveform[24000:]) - 0.5) < 0.01
