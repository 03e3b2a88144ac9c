"""Files as they come: peculiar, damaged, and real."""
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from glcm.data.damage import Rejection
from glcm.data.video import read_recording, write_video

SHARED = Path(__file__).resolve().parents[2]/'shared'/'data'
real = pytest.mark.skipif(not SHARED.is_dir(), reason='no real recordings beside the repository (../shared/data)')


def write_at(path, times, pictures):
    "A silent film whose frames come at the given times (seconds), as phones write them."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, 'yuv420p'
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {'crf': '10', 'bf': '0'}
        for time, picture in zip(times, pictures):
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            frame.pts, frame.time_base = round(time*1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_variable_frame_rate_is_resampled_by_timestamps(tmp_path):
    rng = np.random.default_rng(0)
    times = np.concatenate([[0], np.cumsum(rng.uniform(0.02, 0.25, 30))])
    grays = np.linspace(20, 230, len(times)).astype(np.uint8)
    write_at(tmp_path/'vfr.mp4', times, [np.full((64, 64, 3), g) for g in grays])
    frames = read_recording(tmp_path/'vfr.mp4', 10, 64, None).frames
    expected = [grays[np.flatnonzero(times <= k/10 + 1e-3)[-1]] for k in range(len(frames))]
    assert abs(len(frames)/10 - times[-1]) < 0.3
    assert np.abs(frames.mean((1, 2, 3)) - expected).max() < 4


@pytest.mark.parametrize('delay', [0.0, 0.25, 0.5])
def test_sound_that_starts_late_stays_in_place(tmp_path, delay):
    rate = 24000
    sound = np.zeros(2*rate, np.float32)
    sound[30000:30240] = 0.9
    write_video(tmp_path/'late.mp4', np.zeros((20, 64, 64, 3), np.uint8), sound[round(delay*rate):], 10, rate, delay)
    waveform = read_recording(tmp_path/'late.mp4', 10, 64, rate).waveform
    assert abs(np.abs(waveform).argmax() - 30000) < 400


def test_a_span_of_pictures_with_a_palette(tmp_path):
    "The palette comes with the first packet alone."
    palette = np.zeros((256, 4), np.uint8) # alpha, red, green, blue
    palette[:, 0], palette[:, 1] = 255, np.arange(256)
    with av.open(str(tmp_path/'film.avi'), 'w') as container:
        stream = container.add_stream('rawvideo', rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, 'pal8'
        for number in range(30):
            numbers = np.full((64, 96), 60 + 5*number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray((numbers, palette), format='pal8')))
    whole, span = (read_recording(tmp_path/'film.avi', 10, 64, None, *at).frames for at in ((), (1.5, 2.5)))
    assert np.abs(whole[:, 32, 48, 0] - (60.0 + 5*np.arange(30))).max() < 4
    np.testing.assert_array_equal(span, whole[15:25])


@pytest.mark.parametrize('keep', [0, 8, 100, 1000, 4000])
def test_truncated_file_is_rejected(tmp_path, keep):
    write_video(tmp_path/'whole.mp4', np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3)).astype(np.uint8),
                np.random.default_rng(0).normal(size=48000)*0.1)
    (tmp_path/'cut.mp4').write_bytes((tmp_path/'whole.mp4').read_bytes()[:keep])
    with pytest.raises(Rejection):
        read_recording(tmp_path/'cut.mp4', 10, 64, 24000)


@real
def test_real_clips_of_kinetics_ucf_and_hmdb():
    reasons = {}
    for path in sorted((SHARED/'formats').rglob('*')):
        if path.suffix not in ('.mp4', '.avi'):
            continue
        try:
            recording = read_recording(path, 10, 128, 24000)
            assert min(recording.frames.shape[1:3]) == 128
            assert abs(len(recording.frames)/10 - len(recording.waveform)/24000) < 0.5
            reasons[path.name] = 'used'
        except Rejection as e:
            reasons[path.name] = e.reason
    assert set(reasons.values()) == {'used', 'no audio'}
    assert sum(reason == 'used' for reason in reasons.values()) >= 3


@real
def test_real_talking_faces():
    for path in sorted((SHARED/'grid').rglob('*.mp4'))[:20]:
        recording = read_recording(path, 10, 128, 24000)
        assert recording.frames.shape == (30, 128, 160, 3)
        assert abs(len(recording.waveform) - 72000) < 1500
