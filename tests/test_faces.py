"""Faces: what is known by construction, and what real faces show (where dlib and recordings are there)."""
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from glcm.core import InputError
from glcm.data import faces
from glcm.data.faces import (EYES_AND_NOSE, LIP_CORNERS, MEAN_FACE, align_crop, crop_matrices, face_track_crops,
                             faces_installed, fill_gaps, landmarks, moved, similarity, smooth, warp)
from glcm.data.audio import AudioConfig
from glcm.data.damage import Rejection
from glcm.data.planes import from_rgb
from glcm.data.clip import ClipConfig, Settings, encode_clip
from glcm.data.shards import StoreConfig
from glcm.data.video import read_recording

GRID = Path(__file__).resolve().parents[2]/'shared'/'data'/'grid'
dlib = pytest.mark.skipif(not faces_installed(), reason="dlib is not installed: pip install 'glcm[faces]'")
ABSENT = "no GRID beside the repository (../shared/data/grid), or no dlib: pip install 'glcm[faces]'"
real = pytest.mark.skipif(not (GRID.is_dir() and faces_installed()), reason=ABSENT)


def turned(degrees, scale, shift):
    "The matrix of a similarity transform."
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.column_stack([scale*np.array([[c, -s], [s, c]]), shift])


def lip_corners(points):
    "The corners of the mouth, and how far they are apart."
    corners = points[:, LIP_CORNERS]
    return corners, np.linalg.norm(corners[:, 1] - corners[:, 0], axis=-1)


@pytest.fixture(scope='module')
def clips():
    "Some recordings of GRID."
    paths = sorted((GRID/'video').glob('*.mp4'))[40::200]
    return [read_recording(path, 10, 288, 24000) for path in paths]


# Known by construction

@pytest.mark.parametrize('part', [EYES_AND_NOSE, range(68)], ids=['three points', 'all points'])
def test_known_transforms_are_recovered(part):
    rng = np.random.default_rng(0)
    truth = np.empty((100, 2, 3))
    for matrix in truth:
        degrees, scale, shift = rng.uniform(-180, 180), np.exp(rng.uniform(-4, 4)), rng.normal(0, 300, 2)
        matrix[:] = turned(degrees, scale, shift)
    placed = moved(MEAN_FACE[part], truth)
    for matrix, points in zip(truth, placed):
        np.testing.assert_allclose(similarity(MEAN_FACE[part], points), matrix, rtol=1e-6, atol=1e-6)
    back = similarity(placed, MEAN_FACE[part])
    np.testing.assert_allclose(moved(placed, back), np.broadcast_to(MEAN_FACE[part], placed.shape), atol=1e-6)


def test_a_mirrored_face_is_not_mirrored_back():
    assert np.linalg.det(similarity(MEAN_FACE*[-1, 1], MEAN_FACE)[:, :2]) > 0


@pytest.mark.parametrize('points', [np.full((2, 3, 2), 7.0), np.full((2, 3, 2), np.nan)], ids=['coincident', 'missing'])
def test_points_that_fit_nothing_are_refused(points):
    with pytest.raises(InputError, match='landmarks'):
        similarity(points, MEAN_FACE[EYES_AND_NOSE])


def test_gaps_are_bridged_and_ends_held():
    truth = MEAN_FACE*80 + np.arange(20)[:, None, None]*[3, -1]
    holes = truth.copy()
    holes[[0, 1, 7, 8, 9, 19]] = np.nan
    filled = fill_gaps(holes)
    np.testing.assert_allclose(filled[2:19], truth[2:19])
    np.testing.assert_allclose(filled[[0, 1, 19]], truth[[2, 2, 18]])
    assert np.isnan(holes[0]).all()


@pytest.mark.parametrize('count', [1, 2, 30])
@pytest.mark.parametrize('sigma', [0, 0.5, 3])
def test_smoothing_leaves_still_points_and_takes_trembling_away(count, sigma):
    still = np.repeat(MEAN_FACE[None]*100, count, 0).astype(np.float32)
    np.testing.assert_allclose(smooth(still, sigma), still, rtol=1e-6)
    trembling = still + np.random.default_rng(0).normal(0, 1, still.shape)
    if sigma and count == 30:
        assert np.std(smooth(trembling, sigma) - still) < 0.9


def test_shrinking_averages_over_fine_patterns():
    board = np.indices((256, 256)).sum(0) % 2*np.uint8(255)
    frames = np.repeat(board[None, :, :, None], 3, 3).astype(np.uint8)
    for scale in (0.5, 0.26, 0.1):
        about_the_middle = 7.5 - turned(10, scale, (0, 0))[:, :2] @ [127.5, 127.5]
        crop = warp(frames, turned(10, scale, about_the_middle)[None], 16)
        assert np.abs(crop.astype(int) - 127).max() < 40


@pytest.mark.parametrize('size, seen, widths', [(112, None, 3), (128, 112, 3), (64, 56, 3), (64, 56, 1.5)])
@pytest.mark.parametrize('degrees', [0, 25, 180])
def test_lips_lie_in_the_middle_and_fill_their_part_of_what_is_seen(degrees, size, seen, widths):
    "White dots at the corners of the mouth, measured in the crop."
    placed = np.stack([moved(MEAN_FACE, turned(degrees, 120, (200, 200)))]*3)
    y, x = np.indices((400, 400))
    frame = np.zeros((400, 400))
    for dot_x, dot_y in placed[0, LIP_CORNERS]:
        frame += 255*np.exp(-((x - dot_x)**2 + (y - dot_y)**2)/8)
    frames = np.broadcast_to(frame[None, :, :, None], (3, 400, 400, 3)).astype(np.uint8)
    crops = align_crop(frames, placed, 'lips', size, seen=seen, widths=widths)
    assert crops.shape == (3, size, size, 3) and crops.dtype == np.uint8
    weight, places = crops[0, :, :, 0].astype(float), np.arange(size)
    left = np.average(places[:size//2], weights=weight[:, :size//2].sum(0))
    right = np.average(places[size//2:], weights=weight[:, size//2:].sum(0))
    height = np.average(places, weights=weight.sum(1))
    middle = (size - 1)/2
    np.testing.assert_allclose([right - left, (left + right)/2, height], [(seen or size)/widths, middle, middle], atol=0.3)


def test_a_face_with_its_margin_fills_what_is_seen():
    placed = moved(MEAN_FACE, turned(15, 120, (200, 200)))[None]
    inner = moved(placed, crop_matrices(placed, 'face', 128, 0.3, 112)) - 8
    np.testing.assert_allclose(inner, moved(placed, crop_matrices(placed, 'face', 112, 0.3)), atol=1e-6)


def test_crops_beyond_the_border_and_wrong_arguments():
    frames = np.full((2, 60, 60, 3), 90, np.uint8)
    points = np.stack([moved(MEAN_FACE, turned(0, 80, (-60, 30)))]*2)
    assert (align_crop(frames, points, 'lips', 32) == 90).all() and (align_crop(frames, points, 'face', 48) == 90).all()
    with pytest.raises(InputError, match="'lips' or 'face'"):
        align_crop(frames, points, 'eyes', 32)
    with pytest.raises(InputError, match='as many as frames'):
        align_crop(frames, points[:1], 'lips', 32)


# A stand-in for the detector: a face stands where the frame is bright

@pytest.fixture
def looked(monkeypatch):
    "Bright frames show a face that walks to the right, black ones none; returns the frames that were looked at."
    times = []
    def detect(frame, short_side):
        number, left, is_bright = frame[0, 0].tolist()
        times.append(number)
        square = [left, 50., left + 100, 150.]
        return np.array([square] if is_bright else []).reshape(-1, 4)
    def predict(frame, box):
        return box[:2] + MEAN_FACE*(box[2:] - box[:2])
    monkeypatch.setattr(faces, 'detect_faces', detect)
    monkeypatch.setattr(faces, 'predict_landmarks', predict)
    return times


def film(count, dark=()):
    "Frames that carry, in a pixel, their number, the face's place, and whether there is one."
    frames = np.zeros((count, 240, 320, 3), np.uint8)
    frames[:, 0, 0] = [(t, 3*t, t not in dark) for t in range(count)]
    return frames


def test_every_third_frame_is_looked_at(looked):
    points = landmarks(film(30), smoothing=0)
    assert looked == [*range(0, 30, 3), 29]
    np.testing.assert_allclose(points, [[3*t, 50] + 100*MEAN_FACE for t in range(30)], atol=1e-4)


def test_missing_frames_are_looked_for_and_interpolated(looked):
    points = landmarks(film(30, dark=range(10, 17)), smoothing=0)
    assert set(range(9, 18)) <= set(looked)
    np.testing.assert_allclose(points, [[3*t, 50] + 100*MEAN_FACE for t in range(30)], atol=1e-3)


def test_too_few_frames_with_a_face_are_rejected_with_their_number(looked):
    for dark, seen in ((range(30), 0), (range(16), 14), (range(4, 20), 14)):
        with pytest.raises(Rejection, match=f'{seen} of 30 frames') as e:
            landmarks(film(30, dark))
        assert e.value.reason == 'no face'
    assert landmarks(film(30, dark=range(15))).shape == (30, 68, 2)
    assert landmarks(film(30, dark=range(16)), min_seen=0.4).shape == (30, 68, 2)
    assert landmarks(film(1)).shape == (1, 68, 2)


# With and without dlib

def test_without_dlib_the_module_imports_and_names_the_remedy():
    code = '''if True:
        import sys
        import numpy as np
        import glcm.data.faces as faces
        assert not sys.modules.get('dlib') and 'face_recognition_models' not in sys.modules
        sys.modules['dlib'] = None
        try: faces.landmarks(np.zeros((2, 64, 64, 3), np.uint8))
        except faces.InputError as e: print(e)'''
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert "pip install 'glcm[faces]'" in ran.stdout


@dlib
def test_black_and_noisy_frames_have_no_face():
    noise = np.random.default_rng(0).integers(0, 256, (9, 120, 160, 3)).astype(np.uint8)
    for frames in (noise*0, noise):
        with pytest.raises(Rejection, match='no face: 0 of 9'):
            face_track_crops(frames, 'lips', 112)


@real
def test_lips_of_real_faces_fill_a_third_of_the_crop(clips):
    "Measured anew on a canvas around the crop, at its scale: within 0.02 of a third, and within 4 % of the middle."
    for clip in clips:
        matrices = crop_matrices(landmarks(clip.frames), 'lips', 112, 0)
        matrices[..., 2] += 112
        canvas = warp(clip.frames, matrices, 336)
        corners, widths = lip_corners(landmarks(canvas, short_side=336, every=1, smoothing=0) - 112)
        assert abs(np.median(widths)/112 - 1/3) < 0.02
        assert np.abs(corners.mean(1) - 55.5).max() < 0.04*112


@real
@pytest.mark.parametrize('widths', [3.0, 1.5])
def test_stored_lips_fill_their_part_of_what_the_network_sees(widths):
    "The whole way from a file to what is stored: its middle is the crop of that size, in which lips fill their part."
    path = sorted((GRID/'video').glob('*.mp4'))[40]
    settings = Settings(ClipConfig(25, 128, 0.1, crop='lips', lip_widths=widths), AudioConfig(24000, 80, 1024, 240),
                        StoreConfig('raw', 22, 16), min_frames=16, sound_only=False, seen=112)
    members, entries = encode_clip(path, settings)
    assert entries['boxes'] is None # a list's are of whole frames
    planes = np.frombuffer(b''.join(members['i420']), np.uint8).reshape(entries['steps'], 192, 128)
    stored = planes[:, 8:120, 8:120].astype(float)
    recording = read_recording(path, 25, 288, 24000)
    points = landmarks(recording.frames, recording.waveform, 24000, 25)
    _, across = lip_corners(moved(points, crop_matrices(points, 'lips', 112, 0, widths=widths)))
    assert abs(np.median(across)/112 - 1/widths) < 1e-3
    expected = from_rgb(align_crop(recording.frames, points, 'lips', 112, widths=widths))[:entries['steps'], :112]
    assert np.abs(stored - expected).mean() < 1.5


@real
def test_a_turned_recording_gives_the_same_crops(clips):
    def leaned(degrees):
        turn = turned(degrees, 1, (0, 0))
        turn[:, 2] = 143.5 - turn[:, :2] @ [179.5, 143.5] # the middle of the frame goes to the middle of the crop
        return warp(clips[0].frames, np.stack([turn]*30), 288)

    def apart(a, b): return np.abs(a.astype(float) - b).mean()

    still, leaning = leaned(0), leaned(15)
    unaligned = apart(still[:, 116:172, 116:172], leaning[:, 116:172, 116:172])
    for kind in ('lips', 'face'):
        a, b = (align_crop(frames, landmarks(frames), kind, 112)[:, 28:84, 28:84] for frames in (still, leaning))
        assert apart(a, b) < 0.6*unaligned, kind


@real
@pytest.mark.parametrize('side', [0, 1])
def test_the_face_that_speaks_is_chosen(clips, side):
    speaker, other = clips[side], clips[side + 1].frames
    listener = np.resize(other[[0, 1, 2, 3, 4, 3, 2, 1]], other.shape)
    frames = np.concatenate([speaker.frames, listener][::1 if side == 0 else -1], 2)
    middle = landmarks(frames, speaker.waveform, 24000)[..., 0].mean()
    assert (middle > 360) == bool(side)


@real
def test_the_largest_face_is_chosen_without_sound(clips):
    small = warp(clips[1].frames, np.stack([turned(0, 0.7, (0, 40))]*30), 288)
    for order in (1, -1):
        points = landmarks(np.concatenate([clips[0].frames, small][::order], 2), short_side=288)
        alone = landmarks(clips[0].frames, short_side=288)
        assert np.abs(np.ptp(points, 1) - np.ptp(alone, 1)).mean() < 3


@real
def test_threads_do_not_disturb_each_other(clips):
    alone = [landmarks(clip.frames) for clip in clips]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda clip: landmarks(clip.frames), clips*2))
    for a, b in zip(alone*2, together):
        np.testing.assert_array_equal(a, b)
