"What a player shows of a film is what is read: shape, position and colours, whatever the file notes."
import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from glcm.data.damage import Rejection
from glcm.data.picture import planes_at
from glcm.data.planes import to_rgb
from glcm.data.video import read_recording

RED, GREEN, BLUE, GRAY = (200, 50, 50), (50, 160, 50), (50, 70, 200), (128, 128, 128)
UPRIGHT = RED, GREEN, BLUE, GRAY # top left, top right, bottom left, bottom right


def scene(width, height):
    "A dark picture with four coloured corners."
    picture = np.full((height, width, 3), 20, np.uint8)
    rows, columns = (slice(0, height//4), slice(-(height//4), None)), (slice(0, width//4), slice(-(width//4), None))
    for k, colour in enumerate(UPRIGHT):
        picture[rows[k//2], columns[k % 2]] = colour
    return picture


def film(path, width=128, height=96, codec='libx264', aspect=None, pixels='yuv420p'):
    "A silent film of four pictures of the scene."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if codec == 'libx264':
            stream.options = {'crf': '10'}
        if aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        picture = av.VideoFrame.from_ndarray(scene(width, height), format='rgb24')
        for _ in range(4):
            container.mux(stream.encode(picture.reformat(format=pixels, dst_colorspace='ITU601')))
        container.mux(stream.encode(None))
    return path


def patch(path, box, offset, content):
    "Write bytes into the first box of a kind."
    data = bytearray(path.read_bytes())
    at = data.index(box) + 4 + offset
    data[at:at + len(content)] = content
    path.write_bytes(data)


def lay_down(path, a, b, c, d):
    "Write a display matrix into the header of a film's only track."
    patch(path, b'tkhd', 40, struct.pack('>9i', *(round(x*65536) for x in (a, b, 0, c, d, 0, 0, 0)), 1 << 30))


def corners(picture):
    "Means of the four corners, (4, 3)."
    height, width = picture.shape[0]//8, picture.shape[1]//8
    rows, columns = (slice(0, height), slice(-height, None)), (slice(0, width), slice(-width, None))
    return np.array([picture[y, x].mean((0, 1)) for y in rows for x in columns])


def shown(path, short_side=64):
    return read_recording(path, 10, short_side, None).frames[0]


@pytest.mark.parametrize('name, width, height, codec, aspect, shape', [
    ('film.mp4', 720, 576, 'libx264', '16/15', (64, 86)), ('film.mkv', 720, 576, 'libx264', '64/45', (64, 114)), # PAL
    ('film.mp4', 720, 480, 'libx264', '8/9', (64, 86)), ('film.mpg', 720, 480, 'mpeg2video', '32/27', (64, 114)), # NTSC
    ('film.mp4', 1440, 1080, 'libx264', '4/3', (64, 114)), # HDV
    ('film.mpg', 480, 576, 'mpeg2video', '8/5', (64, 86)), # SVCD
    ('film.mpg', 352, 576, 'mpeg2video', '24/11', (64, 86)), # half a PAL picture
    ('film.mp4', 64, 96, 'libx264', '2', (64, 86)), ('film.mp4', 96, 96, 'libx264', '1/2', (128, 64))])
def test_pixels_that_are_not_square(tmp_path, name, width, height, codec, aspect, shape):
    picture = shown(film(tmp_path/name, width, height, codec, aspect))
    assert picture.shape[:2] == shape
    assert np.abs(corners(picture) - UPRIGHT).max() < 18


SPACINGS = [((4, 3), (64, 114)), ((0, 1), (64, 170)), ((1000, 1), (64, 86)), ((1, 1000), (64, 86))]


@pytest.mark.parametrize('spacing, shape', SPACINGS)
def test_container_is_believed_before_the_codec_unless_it_is_absurd(tmp_path, spacing, shape):
    film(tmp_path/'film.mp4', aspect='2')
    patch(tmp_path/'film.mp4', b'pasp', 0, struct.pack('>2I', *spacing))
    assert shown(tmp_path/'film.mp4').shape[:2] == shape # where it says nothing (0:1), the codec's 2:1 counts


QUARTER_TURNS = {
    (1, 0, 0, 1): (0, 1, 2, 3), (0, 1, -1, 0): (2, 0, 3, 1),
    (-1, 0, 0, -1): (3, 2, 1, 0), (0, -1, 1, 0): (1, 3, 0, 2),
    (0.05, 1, -1, 0.05): (2, 0, 3, 1)} # nearly one
MIRRORED = {
    (-1, 0, 0, 1): (1, 0, 3, 2), (1, 0, 0, -1): (2, 3, 0, 1),
    (0, 1, 1, 0): (0, 2, 1, 3), (0, -1, -1, 0): (3, 1, 2, 0)}
UNCHANGED = dict.fromkeys([(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 0, 2), (1, 0, 0, 0)], (0, 1, 2, 3)) # not to be believed
MATRICES = QUARTER_TURNS | MIRRORED | UNCHANGED


@pytest.mark.parametrize('matrix', MATRICES)
def test_every_display_matrix(tmp_path, matrix):
    lay_down(film(tmp_path/'film.mp4'), *matrix)
    picture, order = shown(tmp_path/'film.mp4'), MATRICES[matrix]
    assert picture.shape[:2] == ((64, 86) if order[1] in (order[0] ^ 1,) else (86, 64))
    assert np.abs(corners(picture) - [UPRIGHT[k] for k in order]).max() < 18


def test_square_pixels_and_a_quarter_turn_together(tmp_path):
    lay_down(film(tmp_path/'film.mp4', 64, 96, aspect='2'), 0, 1, -1, 0)
    picture = shown(tmp_path/'film.mp4')
    assert picture.shape[:2] == (86, 64)
    assert np.abs(corners(picture) - [BLUE, RED, GRAY, GREEN]).max() < 18


def test_orientation_of_a_photograph(tmp_path):
    "The side data of a camera's JPEG are of a kind that PyAV does not know."
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6 # to be turned clockwise
    Image.fromarray(scene(128, 96)).save(file, 'jpeg', quality=95, subsampling=0, exif=exif)
    (tmp_path/'photo.jpg').write_bytes(file.getvalue())
    with av.open(str(tmp_path/'photo.jpg')) as container:
        frame = next(container.decode(video=0))
    picture = rgb(planes_at(frame, 64))
    assert picture.shape[:2] == (86, 64)
    assert np.abs(corners(picture) - [BLUE, RED, GRAY, GREEN]).max() < 18


def rgb(planes):
    import torch
    return to_rgb(torch.from_numpy(planes)).permute(1, 2, 0).numpy()


def signal_of(picture, transfer):
    "Numbers of an HDR signal (0..1) of BT.2020 for an sRGB picture whose white is 203 cd/m²."
    light = np.where(picture <= 10, picture/255/12.92, ((picture/255 + 0.055)/1.055)**2.4)
    to_bt2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]) # BT.2087
    wide = light @ to_bt2020.T*203
    if transfer == 'pq':
        root = (wide/10000)**(2610/16384)
        return ((3424/4096 + 2413/128*root)/(1 + 2392/128*root))**(2523/32)
    luminance = (wide/1000) @ [0.2627, 0.6780, 0.0593]
    seen = wide/1000*luminance[..., None]**(1/1.2 - 1)
    bright = 0.17883277*np.log(np.maximum(12*seen - 0.28466892, 1e-9)) + 0.55991073
    return np.where(seen <= 1/12, np.sqrt(3*seen), bright)


@pytest.mark.parametrize('transfer, number, within', [('pq', 16, 16), ('hlg', 18, 16)])
def test_high_dynamic_range_is_shown_on_a_common_screen(tmp_path, transfer, number, within):
    numbers = (65535*signal_of(scene(128, 96), transfer)).round().astype(np.uint16)
    signal = av.VideoFrame.from_ndarray(numbers, format='rgb48le')
    signal = signal.reformat(format='yuv444p10le', dst_colorspace='BT2020', dst_color_range='MPEG')
    with av.open(str(tmp_path/'film.mkv'), 'w') as container:
        stream = container.add_stream('ffv1', rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, 'yuv444p10le'
        stream.codec_context.color_trc, stream.codec_context.color_primaries = number, 9
        stream.codec_context.colorspace = 9
        for _ in range(2):
            container.mux(stream.encode(signal))
        container.mux(stream.encode(None))
    picture = shown(tmp_path/'film.mkv')
    assert np.abs(corners(picture) - UPRIGHT).max() < within
    assert abs(picture[32, 43].astype(int) - 20).max() < 6


def test_light_brighter_than_paper_is_kept_apart():
    levels = np.array([0.5, 1, 2, 4])*203/10000
    root = levels**(2610/16384)
    signal = ((3424/4096 + 2413/128*root)/(1 + 2392/128*root))**(2523/32)
    stripes = np.repeat((65535*signal).round().astype(np.uint16), 32)
    picture = np.ascontiguousarray(np.broadcast_to(stripes[None, :, None], (96, 128, 3)))
    frame = av.VideoFrame.from_ndarray(picture, format='rgb48le')
    frame.color_trc, frame.color_primaries = 16, 9
    seen = rgb(planes_at(frame, 96))[48, 16::32, 1].astype(int)
    assert (np.diff(seen) > 4).all() and seen[0] > 150 and seen[-1] <= 255


@pytest.mark.parametrize('matrix', [*range(8), 9, 18, 200])
def test_a_number_for_the_matrix_of_colours_gives_a_picture(matrix):
    frame = av.VideoFrame.from_ndarray(scene(128, 96), format='rgb24')
    frame = frame.reformat(format='yuv420p', dst_colorspace='ITU601')
    frame.colorspace = matrix
    picture = rgb(planes_at(frame, 64))
    known = 1, 4, 7, 9 # that truly are other matrices: the corners differ by what they mean
    assert np.abs(corners(picture) - UPRIGHT).max() < (45 if matrix in known else 18)


@pytest.mark.parametrize('width, height', [(1280, 720), (720, 1280), (1440, 1080), (720, 576)])
@pytest.mark.parametrize('number', [2, 3]) # not named; a number that means nothing
def test_untagged_pictures_of_any_size_are_read_alike(width, height, number):
    frame = av.VideoFrame.from_ndarray(scene(width, height), format='rgb24')
    frame = frame.reformat(format='yuv420p', dst_colorspace='ITU601')
    frame.colorspace = number
    assert np.abs(corners(rgb(planes_at(frame, 64))) - UPRIGHT).max() < 6


@pytest.mark.parametrize('limited', [True, False])
@pytest.mark.parametrize('pixels, bits', [('gray', 8), ('gray10le', 10), ('gray16le', 16)])
def test_gray_films_are_as_dark_and_bright_as_they_are_meant(limited, pixels, bits):
    meant = np.repeat(np.linspace(0, 255, 8), 16).astype(np.float32)
    signal = 16 + meant*219/255 if limited else meant
    numbers = np.tile(signal*2**(bits - 8) + 0.5, (96, 1)).astype(np.uint8 if bits == 8 else np.uint16)
    frame = av.VideoFrame.from_ndarray(numbers, format=pixels)
    frame.color_range = 1 if limited else 2
    picture = rgb(planes_at(frame, 96)).astype(float)
    assert np.abs(picture[48, 8::16] - meant[8::16, None]).max() < 3


OTHER_COLOURS = [(8, 'YCgCo'), (10, 'constant luminance'), (14, 'ICtCp'), (15, 'IPT-C2'), (17, 'YCgCo-R')]


@pytest.mark.parametrize('matrix, name', OTHER_COLOURS)
def test_colours_that_cannot_be_converted_are_refused(tmp_path, matrix, name):
    with av.open(str(tmp_path/'film.mkv'), 'w') as container:
        stream = container.add_stream('ffv1', rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, 'yuv444p10le'
        stream.codec_context.colorspace = matrix
        picture = av.VideoFrame.from_ndarray(scene(128, 96), format='rgb24')
        container.mux(stream.encode(picture.reformat(format='yuv444p10le')))
        container.mux(stream.encode(None))
    with pytest.raises(Rejection, match=f'unknown colours: .*{name}.* cannot be converted'):
        shown(tmp_path/'film.mkv')


class Bits:
    "A row of bits, with the codes of H.265 (section 9.2)."
    def __init__(self):
        self.text = ''

    def fixed(self, *pairs):
        for count, value in pairs:
            self.text += format(value, f'0{count}b')

    def golomb(self, *values):
        for value in values:
            code = format(value + 1, 'b')
            self.text += '0'*(len(code) - 1) + code

    def to_bytes(self):
        padded = self.text + '0'*(-len(self.text) % 8)
        return int(padded, 2).to_bytes(len(padded)//8, 'big')


def crc32_mpeg2(data):
    "CRC-32 without reflection, as MPEG-2 has it."
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
    return crc.to_bytes(4, 'big')


def dolby_vision_unit():
    "A unit of H.265 with instructions of Dolby Vision that leave a picture as it is (ETSI TS 103 572, section 5)."
    bits = Bits()
    bits.fixed((6, 2), (11, 18), (4, 0), (4, 0)) # type, format, profile, level
    bits.fixed((1, 1), (1, 0), (2, 0)) # about the sequence: no filter, coefficients with fixed point
    bits.golomb(23) # of so many bits
    bits.fixed((2, 1), (1, 1)) # normalized, full range
    bits.golomb(2, 2, 4) # bits above 8
    bits.fixed((1, 0), (3, 0), (1, 0), (1, 1), (1, 0), (1, 0)) # no second layer, no metadata for displays
    bits.golomb(0, 0, 0)
    for _ in range(3): # channels: one piece from 0 to 1023
        bits.golomb(0)
        bits.fixed((10, 0), (10, 1023))
    bits.golomb(0, 0)
    for _ in range(3): # and a polynomial of order one for each
        bits.golomb(0, 0)
        bits.fixed((1, 0))
        bits.golomb(0)
        bits.fixed((23, 0))
        bits.golomb(1)
        bits.fixed((23, 0))
    body = bits.to_bytes()
    content, zeros = bytearray(), 0
    for byte in b'\x19' + body + crc32_mpeg2(body) + b'\x80':
        if zeros == 2 and byte <= 3: # what would look like the beginning of a unit
            content.append(3)
            zeros = 0
        content.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return b'\0\0\0\1\x7c\x01' + bytes(content)


def dolby_vision(path, colours=''):
    "A film in H.265 with instructions of Dolby Vision."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx265', rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, 'yuv420p10le'
        stream.options = {'x265-params': 'log-level=none:bframes=0:repeat-headers=1' + colours}
        picture = av.VideoFrame.from_ndarray(scene(128, 96), format='rgb24')
        encoded = [packet for _ in range(4) for packet in stream.encode(picture)] + stream.encode(None)
        for packet in encoded:
            film_packet = av.Packet(bytes(packet) + dolby_vision_unit())
            film_packet.stream, film_packet.time_base = stream, packet.time_base
            film_packet.pts, film_packet.dts, film_packet.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
            container.mux(film_packet)
    return path


@pytest.mark.skipif('libx265' not in av.codecs_available, reason='PyAV without an encoder for H.265')
@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
def test_dolby_vision_is_used_where_other_players_can_show_it(tmp_path, suffix):
    with pytest.raises(Rejection, match='unknown colours: .*Dolby Vision of profile 5'):
        shown(dolby_vision(tmp_path/f'five.{suffix}'))
    bt709 = ':colorprim=bt709:transfer=bt709:colormatrix=bt709'
    picture = shown(dolby_vision(tmp_path/f'eight.{suffix}', bt709))
    assert np.abs(corners(picture) - UPRIGHT).max() < 45 # encoded by the matrix of BT.601


def test_transparent_pixels_show_black_and_unused_alpha_shows_the_picture():
    picture = np.dstack([scene(128, 96), np.full((96, 128), 255, np.uint8)])
    picture[:, 64:, 3] = 0
    seen = rgb(planes_at(av.VideoFrame.from_ndarray(picture, format='rgba'), 96))
    assert np.abs(corners(seen) - [RED, (0, 0, 0), BLUE, (0, 0, 0)]).max() < 12
    picture[..., 3] = 0
    seen = rgb(planes_at(av.VideoFrame.from_ndarray(picture, format='rgba'), 96))
    assert np.abs(corners(seen) - UPRIGHT).max() < 12


def test_a_format_that_cannot_be_converted_is_refused():
    with pytest.raises(Rejection, match='pictures of the kind rgba128le'):
        planes_at(av.VideoFrame(64, 48, 'rgba128le'), 32)
