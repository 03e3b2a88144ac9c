"Recordings whose headers are wrong are read; recordings of which a part is missing are refused."
import io
import struct
import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from glcm.data.damage import Rejection
from glcm.data.video import read_recording, write_video

RATE, SECONDS = 24000, 3
SAMPLES = np.arange(SECONDS*RATE)
BEEP = np.where(SAMPLES//2400 == 10, 0.5*np.sin(SAMPLES*0.3), 0).astype(np.float32) # from 1.0 to 1.1 s


def wav(whole=None, data=None, tail=b''):
    "A wav file with a beep, its stated lengths as given."
    file = io.BytesIO()
    with wave.open(file, 'wb') as out:
        out.setparams((1, 2, RATE, 0, 'NONE', ''))
        out.writeframes((32767*BEEP).astype('<i2').tobytes())
    content = bytearray(file.getvalue() + tail)
    if whole is not None:
        content[4:8] = struct.pack('<I', whole)
    if data is not None:
        content[40:44] = struct.pack('<I', data)
    return bytes(content)


LENGTH = len(wav())
ODD_LENGTHS = {'whole counts its own head': wav(LENGTH), 'whole too long': wav(LENGTH + 500),
               'arecord': wav(0x80000024, 0x80000000),
               'sox': wav(0x7FFFF024, 0x7FFFF000), 'two gigabytes': wav(0x7FFFFFFF, 0x7FFFFFDB),
               'ffmpeg': wav(0xFFFFFFFF, 0xFFFFFFFF),
               'mplayer': wav(0x7FFFFFFF, 0xFFFFFFFF - 36), 'never filled in': wav(0, 0),
               'data never filled in': wav(data=0),
               'data counts the head': wav(data=LENGTH),
               'no pad byte': wav(tail=b'LIST' + struct.pack('<I', 5) + b'INFOx'),
               'tag cut off': wav(tail=b'LIST' + struct.pack('<I', 500) + b'INFOx'), 'ends in a sample': wav(0, 0)[:-1]}


def beep(path):
    "Seconds at which a file's beep begins, and seconds of the file."
    waveform = read_recording(path, None, None, RATE).waveform
    return np.flatnonzero(np.abs(waveform) > 0.1)[0]/RATE, len(waveform)/RATE


@pytest.mark.parametrize('kind', ODD_LENGTHS)
def test_wav_with_a_wrong_length_is_read(tmp_path, kind):
    (tmp_path/'a.wav').write_bytes(ODD_LENGTHS[kind])
    at, seconds = beep(tmp_path/'a.wav')
    assert abs(at - 1) < 0.01 and abs(seconds - SECONDS) < 0.1


TITLE = b'LIST' + struct.pack('<I', 5) + b'INFOx'


@pytest.mark.parametrize('chunk', [TITLE, b'bext' + struct.pack('<I', 7) + bytes(7),
                                   TITLE + b'\0' + b'JUNK' + struct.pack('<I', 7) + bytes(7)])
def test_a_chunk_without_its_pad_byte_in_front_of_the_sound_is_named(tmp_path, chunk):
    path = tmp_path/'a.wav'
    path.write_bytes(wav()[:36] + chunk + b'\0' + wav()[36:])
    at, seconds = beep(path)
    assert abs(at - 1) < 0.01 and abs(seconds - SECONDS) < 0.1
    path.write_bytes(wav()[:36] + chunk + wav()[36:])
    with pytest.raises(Rejection, match='does not decode: a.wav: its chunk .* has an odd length and no byte behind it'):
        read_recording(path, None, None, RATE)


NUMBERS = (32767*BEEP).astype('<i2').tobytes()
FORM = struct.pack('<HHIIHH', 1, 1, RATE, 2*RATE, 2, 16) # one channel of 16 bits


def rf64():
    size = len(NUMBERS)
    lengths = b'ds64' + struct.pack('<IQQQI', 28, 72 + size, size, size//2, 0)
    form = b'fmt ' + struct.pack('<I', 16) + FORM
    unknown = b'\xff\xff\xff\xff'
    return b'RF64' + unknown + b'WAVE' + lengths + form + b'data' + unknown + NUMBERS


def w64():
    def guid(name): return name + bytes.fromhex('f3acd3118cd100c04f8edb8a')
    def length(count): return struct.pack('<Q', count)
    riff = b'riff' + bytes.fromhex('2e91cf11a5d628db04c10000') + length(104 + len(NUMBERS))
    form = guid(b'fmt ') + length(40) + FORM
    return riff + guid(b'wave') + form + guid(b'data') + length(24 + len(NUMBERS)) + NUMBERS


def caf():
    described = b'desc' + struct.pack('>qd4s5I', 32, RATE, b'lpcm', 2, 2, 1, 1, 16)
    return b'caff\0\1\0\0' + described + b'data' + struct.pack('>qI', 4 + len(NUMBERS), 0) + NUMBERS


@pytest.mark.parametrize('written', [rf64, w64, caf])
def test_formats_with_lengths_of_eight_bytes_are_read_whole_and_refused_cut(tmp_path, written):
    path = tmp_path/f'a.{written.__name__}'
    path.write_bytes(written())
    at, seconds = beep(path)
    assert abs(at - 1) < 0.01 and abs(seconds - SECONDS) < 0.01
    path.write_bytes(written()[:LENGTH//2])
    with pytest.raises(Rejection, match='cut off'):
        beep(path)


UNKNOWN = {'zeros': bytes(24), 'largest': b'\xff'*24, 'empty': b'', 'absent': None}


@pytest.mark.parametrize('kind', UNKNOWN)
def test_rf64_whose_lengths_were_never_filled_in_is_read(tmp_path, kind):
    lengths, content = UNKNOWN[kind], rf64()
    chunk = b'' if lengths is None else b'ds64' + struct.pack('<I', len(lengths)) + lengths
    (tmp_path/'a.wav').write_bytes(content[:12] + chunk + content[48:])
    at, seconds = beep(tmp_path/'a.wav')
    assert abs(at - 1) < 0.01 and abs(seconds - SECONDS) < 0.01


def padded(taken, used, extensible=True):
    "The beep as a wav file of numbers that take more bytes than their bits need."
    levels = (2**(8*taken - 1)*BEEP.astype(float)).astype(np.int64)
    numbers = b''.join(int(level).to_bytes(taken, 'little', signed=True) for level in levels)
    kind, bits = (0xFFFE, 8*taken) if extensible else (1, used)
    form = struct.pack('<HHIIHH', kind, 1, RATE, RATE*taken, taken, bits)
    if extensible:
        form += struct.pack('<HHIH', 22, used, 4, 1) + bytes.fromhex('000000001000800000aa00389b71')
    content = b'WAVEfmt ' + struct.pack('<I', len(form)) + form + b'data' + struct.pack('<I', len(numbers)) + numbers
    return b'RIFF' + struct.pack('<I', len(content)) + content


@pytest.mark.parametrize('taken,used,extensible', [(4, 24, True), (4, 24, False), (4, 16, True), (3, 20, True),
                                                   (3, 12, True), (2, 8, True), (2, 12, True), (4, 32, True)])
def test_wav_whose_numbers_take_more_bytes_than_they_need_is_read(tmp_path, taken, used, extensible):
    (tmp_path/'a.wav').write_bytes(padded(taken, used, extensible))
    waveform = read_recording(tmp_path/'a.wav', None, None, RATE).waveform
    np.testing.assert_allclose(waveform, BEEP, atol=2**(1 - min(8*taken, 24)))


@pytest.mark.parametrize('kind', ['whole counts its own head', 'whole too long', 'no pad byte', 'data counts the head'])
@pytest.mark.parametrize('share', [0.1, 0.5, 0.9, 0.99])
def test_wav_that_was_cut_is_refused(tmp_path, kind, share):
    (tmp_path/'a.wav').write_bytes(ODD_LENGTHS[kind][:int(share*LENGTH)])
    with pytest.raises(Rejection, match='cut off'):
        beep(tmp_path/'a.wav')


def nist():
    "The beep as a NIST sphere file."
    lines = ['NIST_1A', '   1024', f'sample_count -i {len(BEEP)}', 'sample_n_bytes -i 2', 'channel_count -i 1',
             'sample_byte_format -s2 01', f'sample_rate -i {RATE}', 'sample_coding -s3 pcm', 'end_head', '']
    return '\n'.join(lines).encode().ljust(1024) + NUMBERS


def muxed(codec, container):
    "The beep as plain numbers in a container that PyAV writes."
    file = io.BytesIO()
    sound = av.AudioFrame.from_ndarray((32767*BEEP).astype(np.int16)[None], 's16', 'mono')
    sound.sample_rate = RATE
    with av.open(file, 'w', container) as out:
        stream = out.add_stream(codec, rate=RATE, layout='mono')
        out.mux([*stream.encode(sound), *stream.encode(None)])
    return file.getvalue()


PLAIN = {'au': ('pcm_s16be', 'au'), 'aiff': ('pcm_s16be', 'aiff'), 'aifc': ('pcm_s16le', 'aiff')}


@pytest.mark.parametrize('suffix', [*PLAIN, 'sph'])
@pytest.mark.parametrize('odd', [0, 1])
def test_plain_numbers_that_were_cut_are_refused(tmp_path, suffix, odd):
    path, content = tmp_path/f'a.{suffix}', muxed(*PLAIN[suffix]) if suffix in PLAIN else nist()
    path.write_bytes(content)
    at, seconds = beep(path)
    assert abs(at - 1) < 0.01 and abs(seconds - SECONDS) < 0.1
    path.write_bytes(content[:len(content)//4*2 + odd])
    with pytest.raises(Rejection, match='cut off'):
        beep(path)


def encoded(path, codec, container=None, tags=None, rate=RATE, sound=BEEP):
    "A sound in a compressed file."
    with av.open(str(path), 'w', container) as out:
        out.metadata.update(tags or {})
        layout = 'stereo' if codec == 'vorbis' else 'mono' # all that FFmpeg's own encoder knows
        stream = out.add_stream(codec, rate=rate, layout=layout, options=dict(strict='-2'))
        frame = av.AudioFrame.from_ndarray(sound[None], 'fltp', 'mono')
        frame.sample_rate = RATE
        resampler = av.AudioResampler(format=stream.format.name, layout=layout, rate=stream.rate,
                                      frame_size=stream.frame_size)
        time = 0
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            piece.pts, piece.time_base = time, Fraction(1, stream.rate)
            time += piece.samples
            out.mux(stream.encode(piece))
        last = stream.encode(None) # FLAC ends with a packet that holds nothing
        out.mux([packet for packet in last if packet.pts is not None])
    return path.read_bytes()


NO_HEADER = bytes.fromhex('fffbffef') + bytes(189) # begins as a header of AAC does, and is none


def test_a_raw_stream_that_begins_in_the_middle_of_a_packet_is_read(tmp_path):
    aac, ac3 = tmp_path/'a.aac', tmp_path/'a.ac3'
    aac.write_bytes(NO_HEADER + encoded(aac, 'aac', 'adts'))
    at, seconds = beep(aac)
    assert abs(at - 1) < 0.06 and abs(seconds - SECONDS) < 0.1
    whole = encoded(ac3, 'ac3', 'ac3', rate=48000)
    for missing in (75, 600, 2000):
        ac3.write_bytes(whole[missing:])
        at, seconds = beep(ac3)
        assert abs(seconds - at - 2) < 0.06 and SECONDS - 0.25 < seconds < SECONDS
    middle = len(whole)//2
    ac3.write_bytes(whole[:middle] + bytes(300) + whole[middle + 300:])
    with pytest.raises(Rejection, match='does not decode'):
        beep(ac3)


def crc(page):
    "Checksum of an Ogg page."
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            highest_bit = value >> 31
            value = value << 1 & 0xFFFFFFFF
            if highest_bit:
                value ^= 0x04C11DB7
    return struct.pack('<I', value)


def pages(content):
    "An Ogg file's pages."
    at = 0
    while at < len(content):
        head, parts = at + 27, content[at + 26]
        size = 27 + parts + sum(content[head:head + parts])
        yield bytearray(content[at:at + size])
        at += size


def changed(page, flags=None, number=None):
    "An Ogg page with other flags or another number."
    if flags is not None:
        page[5] = flags
    if number is not None:
        page[18:22] = struct.pack('<I', number)
    page[22:26] = bytes(4)
    page[22:26] = crc(page)
    return bytes(page)


@pytest.fixture(params=['vorbis', 'libopus', 'flac'])
def ogg(request, tmp_path):
    return list(pages(encoded(tmp_path/'source.ogg', request.param, 'ogg')))


def test_ogg_that_was_switched_off_is_read(tmp_path, ogg):
    ogg[-1] = changed(ogg[-1], flags=ogg[-1][5] & ~4)
    (tmp_path/'a.ogg').write_bytes(b''.join(ogg))
    assert abs(beep(tmp_path/'a.ogg')[0] - 1) < 0.02


def test_ogg_of_a_radio_whose_numbers_jump_behind_the_headers_is_read(tmp_path, ogg):
    headers = next(k for k, page in enumerate(ogg) if page[6:14] != bytes(8))
    ogg[headers:] = [changed(page, number=7000 + k) for k, page in enumerate(ogg[headers:])]
    (tmp_path/'a.ogg').write_bytes(b''.join(ogg))
    assert abs(beep(tmp_path/'a.ogg')[0] - 1) < 0.02


def test_ogg_that_was_cut_is_refused(tmp_path, ogg):
    content = b''.join(ogg)
    ends_of_pages = np.cumsum([len(page) for page in ogg])
    for end in np.random.default_rng(0).integers(len(ogg[0]), len(content), 20):
        if end in ends_of_pages: # as if switched off
            continue
        (tmp_path/'a.ogg').write_bytes(content[:end])
        with pytest.raises(Rejection):
            beep(tmp_path/'a.ogg')


def test_ogg_without_a_page_in_its_middle_is_refused(tmp_path, ogg):
    if len(ogg) < 5:
        pytest.skip('too few pages')
    (tmp_path/'a.ogg').write_bytes(b''.join(ogg[:-2] + ogg[-1:]))
    with pytest.raises(Rejection, match='cut off'):
        beep(tmp_path/'a.ogg')


def test_joined_mp3_is_read(tmp_path):
    song = encoded(tmp_path/'song.mp3', 'libmp3lame', 'mp3', dict(title='a song', comment='x'*3000))
    for tail in (b'', b'TAG' + b'a song'.ljust(125, b'\0')):
        (tmp_path/'joined.mp3').write_bytes((song + tail)*2)
        waveform = read_recording(tmp_path/'joined.mp3', None, None, RATE).waveform
        loud = np.flatnonzero(np.abs(waveform) > 0.1)/RATE
        first, second = loud[loud < SECONDS], loud[loud > SECONDS]
        assert abs(first[0] - 1) < 0.06 and abs(second[0] - SECONDS - 1) < 0.15


def test_joined_flac_is_read_in_place(tmp_path):
    path, noise = tmp_path/'joined.flac', np.random.default_rng(0).normal(0, 0.1, SECONDS*RATE).astype(np.float32)
    path.write_bytes(encoded(path, 'flac', 'flac', sound=noise)*2)
    waveform = read_recording(path, None, None, RATE).waveform
    np.testing.assert_allclose(waveform, np.tile(noise, 2), atol=1e-4)
    start, end = SECONDS + 0.5, SECONDS + 2
    span = read_recording(path, None, None, RATE, start, end).waveform
    np.testing.assert_allclose(span, waveform[int(start*RATE):int(end*RATE)], atol=1e-4)


def test_short_flac_files_that_were_joined_are_all_there(tmp_path):
    path, noise = tmp_path/'joined.flac', np.random.default_rng(0).normal(0, 0.1, RATE//2).astype(np.float32)
    path.write_bytes(encoded(path, 'flac', 'flac', sound=noise)*3)
    waveform = read_recording(path, None, None, RATE).waveform
    np.testing.assert_allclose(waveform, np.tile(noise, 3), atol=1e-4)


def test_joined_flac_of_two_kinds_is_refused_plainly(tmp_path):
    path, noise = tmp_path/'joined.flac', np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    path.write_bytes(b''.join(encoded(path, 'flac', 'flac', rate=rate, sound=noise) for rate in (24000, 48000)))
    with pytest.raises(Rejection, match='joined.flac: a recording of another kind is joined on .* split the file'):
        read_recording(path, None, None, RATE)


@pytest.fixture
def avi(tmp_path):
    "A film of three seconds with sound, as an avi file."
    pictures = np.random.default_rng(0).integers(0, 255, (30, 64, 96, 3)).astype(np.uint8)
    write_video(tmp_path/'film.mp4', pictures, BEEP)
    with av.open(str(tmp_path/'film.mp4')) as source, av.open(str(tmp_path/'film.avi'), 'w') as out:
        picture, sound = out.add_stream('mpeg4', rate=10), out.add_stream('pcm_s16le', rate=RATE, layout='mono')
        picture.width, picture.height, picture.pix_fmt = 96, 64, 'yuv420p'
        packets = [packet for frame in [*source.decode(video=0), None] for packet in picture.encode(frame)]
        source.seek(0)
        resampler = av.AudioResampler(format='s16', layout='mono', rate=RATE)
        pieces = [piece for frame in [*source.decode(audio=0), None] for piece in resampler.resample(frame)]
        packets += [packet for piece in pieces for packet in sound.encode(piece)]
        for packet in sorted(packets, key=lambda packet: float(packet.dts*packet.time_base)):
            out.mux(packet)
    return (tmp_path/'film.avi').read_bytes()


def test_avi_whose_header_counts_too_few_pictures_is_read(tmp_path, avi):
    at = avi.index(b'strh') + 40
    assert struct.unpack('<I', avi[at:at + 4]) == (30,)
    (tmp_path/'a.avi').write_bytes(avi[:at] + struct.pack('<I', 3) + avi[at + 4:])
    film = read_recording(tmp_path/'a.avi', 10, 64, RATE)
    assert len(film.planes) == 30
    assert abs(np.flatnonzero(np.abs(film.waveform) > 0.1)[0]/RATE - 1) < 0.06


def test_asf_whose_header_states_too_short_a_length_is_read(tmp_path):
    with av.open(str(tmp_path/'a.wmv'), 'w') as out:
        picture, sound = out.add_stream('wmv2', rate=10), out.add_stream('wmav2', rate=RATE, layout='mono')
        sound.bit_rate = 48000
        picture.width, picture.height, picture.pix_fmt = 96, 64, 'yuv420p'
        gray = [np.full((64, 96, 3), 8*number, np.uint8) for number in range(30)]
        frames = [av.VideoFrame.from_ndarray(image, format='rgb24') for image in gray]
        packets = [packet for frame in [*frames, None] for packet in picture.encode(frame)]
        heard = av.AudioFrame.from_ndarray(BEEP[None], 'fltp', 'mono')
        heard.sample_rate, heard.pts, heard.time_base = RATE, 0, Fraction(1, RATE)
        packets += [*sound.encode(heard), *sound.encode(None)]
        for packet in sorted(packets, key=lambda packet: float(packet.dts*packet.time_base)):
            out.mux(packet)
    content = (tmp_path/'a.wmv').read_bytes()
    at = content.index(bytes.fromhex('A1DCAB8C47A9CF118EE400C00C205365')) + 64 # its length in 100 ns
    units, = struct.unpack('<Q', content[at:at + 8])
    (tmp_path/'a.wmv').write_bytes(content[:at] + struct.pack('<Q', units//5) + content[at + 8:])
    film = read_recording(tmp_path/'a.wmv', 10, 64, RATE)
    assert abs(len(film.planes) - 30) <= 1
    assert abs(np.flatnonzero(np.abs(film.waveform) > 0.1)[0]/RATE - 1) < 0.06


def test_avi_without_its_index_is_read_and_without_pictures_refused(tmp_path, avi):
    movi, index = avi.index(b'movi'), avi.rindex(b'idx1')
    whole = avi[:4] + struct.pack('<I', len(avi)) + avi[8:]
    for content in (avi, whole, avi[:index], avi[:index + 100]):
        (tmp_path/'a.avi').write_bytes(content)
        film = read_recording(tmp_path/'a.avi', 10, 64, RATE)
        assert len(film.planes) == 30
        assert abs(np.flatnonzero(np.abs(film.waveform) > 0.1)[0]/RATE - 1) < 0.06
    for end in (movi + 1000, (movi + index)//2, index - 10):
        (tmp_path/'a.avi').write_bytes(avi[:end])
        with pytest.raises(Rejection):
            read_recording(tmp_path/'a.avi', 10, 64, RATE)
