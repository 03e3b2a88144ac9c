"""Films with odd clocks, streams and names: flash and beep meet, or the file is refused for the right reason."""
import struct
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import pytest

import glcm.data.video
from glcm.data.clock import Clock
from glcm.data.damage import Rejection
from glcm.data.video import read_recording, write_video

RATE = 48000 # of the sound in these files
FLASHES = (1.0, 2.6) # seconds, 0.2 s each; a tone sounds meanwhile


def pictures(seconds=4, fps=25):
    "A dark film with flashes, and a corner by which every picture can be told from its neighbours."
    frames = np.full((seconds*fps, 64, 96, 3), 20, np.uint8)
    for flash in FLASHES:
        frames[round(flash*fps):round((flash + 0.2)*fps)] = 235
    for k, frame in enumerate(frames):
        frame[:16, :16] = k*11 % 200
    return frames


def tone(seconds=4):
    "A quiet noise with a loud tone at each flash."
    time = np.arange(seconds*RATE)/RATE
    loud = sum((time >= flash) & (time < flash + 0.2) for flash in FLASHES)
    noise = np.random.default_rng(0).normal(size=len(time))
    return (0.5*np.sin(2*np.pi*1000*time)*loud + 0.001*noise).astype(np.float32)


def packets(container, seconds=4, sounds=1, gop=25, codec='aac', options=None):
    "The streams of a film in `container`, and its packets in order."
    video = container.add_stream('libx264', rate=25)
    video.width, video.height, video.pix_fmt = 96, 64, 'yuv420p'
    video.options = {'crf': '12', 'g': str(gop), 'bf': '2'} | (options or {})
    made = []
    for picture in pictures(seconds):
        made += video.encode(av.VideoFrame.from_ndarray(picture, format='rgb24'))
    made += video.encode(None)
    for _ in range(sounds):
        audio = container.add_stream(codec, rate=RATE, layout='mono')
        if codec == 'aac':
            audio.options = {'aac_pns': '0'} # else the decoder fills in noise at random
        sound = av.AudioFrame.from_ndarray(tone(seconds)[None], format='fltp', layout='mono')
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        for piece in split(sound, audio.frame_size or 1024):
            made += audio.encode(piece)
        made += audio.encode(None)
    return sorted(made, key=lambda packet: float(packet.dts*packet.time_base))


def split(sound, size):
    "One frame of sound as many."
    samples = sound.to_ndarray()
    for at in range(0, samples.shape[1], size):
        piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, at:at + size]), format='fltp', layout='mono')
        piece.sample_rate, piece.pts, piece.time_base = RATE, at, Fraction(1, RATE)
        yield piece


def film(path, keep=lambda packet, number: True, **how):
    "Write a film of the packets that `keep` wants; `number` counts those of a stream."
    counts = {}
    with av.open(str(path), 'w') as container:
        for packet in packets(container, **how):
            number = counts[packet.stream.index] = counts.get(packet.stream.index, -1) + 1
            if keep(packet, number):
                container.mux(packet)
    return path


def starts(on, rate):
    "Seconds at which runs of True begin, those that follow closely counted as one."
    found = np.flatnonzero(np.diff(np.r_[0, on.astype(int)]) > 0)/rate
    return [time for k, time in enumerate(found) if not k or time > found[k - 1] + 0.5]


def flashes_and_beeps(recording, fps=10, rate=24000):
    "When flashes and beeps begin, seconds."
    bright = recording.frames[:, 20:].mean((1, 2, 3)) > 128
    loud = np.convolve(np.abs(recording.waveform), np.ones(240)/240, 'same') > 0.1
    return starts(bright, fps), starts(loud, rate)


def assert_in_step(recording, expected=FLASHES, apart=0.1):
    flashes, beeps = flashes_and_beeps(recording)
    assert len(flashes) == len(beeps) == len(expected)
    np.testing.assert_allclose(flashes, expected, atol=0.1)
    np.testing.assert_allclose(beeps, flashes, atol=apart)


@pytest.mark.parametrize('suffix', ['mkv', 'mp4', 'flv', 'ts'])
@pytest.mark.parametrize('every', [3, 8])
def test_lost_sound_does_not_move_the_rest(tmp_path, suffix, every):
    path = film(tmp_path/f'lost.{suffix}', lambda packet, number: packet.stream.type == 'video' or number % every)
    assert_in_step(read_recording(path, 10, 64, 24000))


def test_pauses_in_which_nothing_is_sent(tmp_path):
    sent = [*range(46, 58), *range(121, 133)]
    path = film(tmp_path/'dtx.mkv', lambda packet, number: packet.stream.type == 'video' or number in sent)
    assert_in_step(read_recording(path, 10, 64, 24000))


def test_a_clock_that_restarts(tmp_path):
    path = film(tmp_path/'one.ts')
    (tmp_path/'joined.ts').write_bytes(path.read_bytes()*3)
    recording = read_recording(tmp_path/'joined.ts', 10, 64, 24000)
    assert abs(len(recording.planes) - 120) <= 1
    assert_in_step(recording, [time + k*4.0 for k in range(3) for time in FLASHES])


def written(path, container, codec, options):
    "A film of four seconds in a container without H.264, or without lengths."
    with av.open(str(path), 'w', container, options=options) as out:
        video, audio = out.add_stream(codec, rate=25), out.add_stream('libopus', rate=RATE, layout='mono')
        video.width, video.height, video.pix_fmt = 96, 64, 'yuv420p'
        made = []
        for picture in [*pictures(), None]:
            made += video.encode(picture if picture is None else av.VideoFrame.from_ndarray(picture, format='rgb24'))
        sound = av.AudioFrame.from_ndarray(tone()[None], format='fltp', layout='mono')
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        resampler = av.AudioResampler(format='flt', layout='mono', rate=RATE)
        for piece in [*resampler.resample(sound), *resampler.resample(None), None]:
            made += audio.encode(piece)
        for packet in sorted(made, key=lambda packet: float(packet.pts*packet.time_base)):
            out.mux(packet)
    return path.read_bytes()


@pytest.mark.parametrize('options', [{}, {'live': '1'}]) # with lengths; as a browser records
def test_matroska_films_that_were_joined_are_read_to_the_end(tmp_path, options):
    path = tmp_path/'film.webm'
    path.write_bytes(written(path, 'webm', 'libvpx', options)*2)
    seconds = read_recording(path, 10, 64, 24000).waveform.size/24000
    assert_in_step(read_recording(path, 10, 64, 24000), [*FLASHES, *(seconds/2 + flash for flash in FLASHES)])


def test_ogg_films_that_were_joined_are_refused_plainly(tmp_path):
    path = tmp_path/'film.ogv'
    path.write_bytes(written(path, 'ogg', 'libvpx', {})*2)
    with pytest.raises(Rejection, match='film.ogv: a second film is joined on behind the first, .* split the file'):
        read_recording(path, 10, 64, 24000)


def test_a_recording_that_begins_between_key_frames(tmp_path):
    data = film(tmp_path/'whole.ts').read_bytes()
    (tmp_path/'cut.ts').write_bytes(data[188*(len(data)//188//5):])
    recording = read_recording(tmp_path/'cut.ts', 10, 64, 24000)
    flashes, beeps = flashes_and_beeps(recording)
    assert 25 <= len(recording.planes) <= 35
    np.testing.assert_allclose(beeps[-1], flashes[-1], atol=0.1)


def test_leading_pictures_of_an_open_group_are_dropped(tmp_path):
    group = {'x264-params': 'open-gop=1:bframes=3:keyint=20:min-keyint=20:scenecut=0'}
    film(tmp_path/'whole.mkv', options=group)
    with av.open(str(tmp_path/'whole.mkv')) as source, av.open(str(tmp_path/'cut.mkv'), 'w') as out:
        streams = {stream: out.add_stream_from_template(stream) for stream in source.streams}
        keys = 0
        for packet in source.demux():
            keys += packet.stream.type == 'video' and packet.is_keyframe
            if packet.dts is None or packet.stream.type == 'video' and keys < 2:
                continue
            packet.stream = streams[packet.stream]
            out.mux(packet)
    flashes, beeps = flashes_and_beeps(read_recording(tmp_path/'cut.mkv', 10, 64, 24000))
    assert flashes
    np.testing.assert_allclose(beeps, flashes, atol=0.1)


def test_a_lost_packet_of_a_broadcast_is_bridged_and_a_long_loss_refused(tmp_path):
    data = film(tmp_path/'film.ts').read_bytes()
    at = 188*(len(data)//188*2//5)
    (tmp_path/'noise.ts').write_bytes(data[:at] + data[at + 3*188:])
    assert_in_step(read_recording(tmp_path/'noise.ts', 10, 64, 24000))
    film(tmp_path/'sparse.ts', gop=250, options={'sc_threshold': '0'})
    data = (tmp_path/'sparse.ts').read_bytes()
    at = 188*(len(data)//188*2//5)
    (tmp_path/'noise.ts').write_bytes(data[:at] + data[at + 3*188:])
    recording = read_recording(tmp_path/'noise.ts', 10, 64, 24000) # no key frame follows: the film ends there
    assert 5 < len(recording.planes) < 30


def test_damage_in_the_middle_is_refused(tmp_path):
    data = bytearray(film(tmp_path/'film.mkv').read_bytes())
    data[len(data)//2:len(data)//2 + 4000] = bytes(4000)
    (tmp_path/'film.mkv').write_bytes(data)
    with pytest.raises(Rejection, match='does not decode'):
        read_recording(tmp_path/'film.mkv', 10, 64, 24000)


def still(path, seconds, count, heard=None):
    "So many pictures, each shown for so long, over a tone (of `heard` seconds)."
    heard = heard or seconds*count
    waveform = np.tile(tone(), -(-heard//4))[:heard*RATE]
    sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform[None]), format='fltp', layout='mono')
    with av.open(str(path), 'w') as container:
        video = container.add_stream('libx264', rate=Fraction(1, seconds))
        audio = container.add_stream('aac', rate=RATE, layout='mono')
        video.width, video.height, video.pix_fmt = 96, 64, 'yuv420p'
        for picture in pictures()[:count]:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        container.mux(video.encode(None))
        for piece in split(sound, 1024):
            container.mux(audio.encode(piece))
        container.mux(audio.encode(None))
    return path


@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
# of three and more, the second one that is stored is not shown second
@pytest.mark.parametrize('seconds,count', [(4, 1), (5, 3), (12, 2), (15, 5), (40, 1)])
def test_a_still_lasts_as_long_as_the_file_says(tmp_path, suffix, seconds, count):
    recording = read_recording(still(tmp_path/f'still.{suffix}', seconds, count), 10, 32, 24000)
    assert abs(len(recording.planes) - 10*seconds*count) <= 2
    assert len(set(recording.planes[:, 2, 2].tolist())) == count # each is shown


def test_stills_may_end_before_the_sound(tmp_path):
    "Matroska states one length for all streams."
    recording = read_recording(still(tmp_path/'still.mkv', 5, 2, heard=15), 10, 32, 24000)
    assert abs(len(recording.planes) - 100) <= 2 and abs(len(recording.waveform)/24000 - 15) < 0.1


def paused(path, resumes, options):
    "A film of 20 s with sound, without pictures from 3 s to picture number `resumes`, of which 25 make a second."
    with av.open(str(path), 'w', options=options) as container:
        video = container.add_stream('libx264', rate=25, options={'crf': '12', 'bf': '3'})
        audio = container.add_stream('aac', rate=RATE, layout='mono')
        video.width, video.height, video.pix_fmt = 96, 64, 'yuv420p'
        for number, picture in enumerate(pictures(20)):
            if not 75 <= number < resumes:
                frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(video.encode(frame))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(tone(20)[None], format='fltp', layout='mono')
        for piece in split(sound, 1024):
            container.mux(audio.encode(piece))
        container.mux(audio.encode(None))
    return path


FRAGMENTED = {'movflags': 'frag_keyframe+empty_moov'}


@pytest.mark.parametrize('suffix,options', [('mp4', {}), ('mp4', FRAGMENTED), ('mkv', {})])
@pytest.mark.parametrize('resumes', [325, 450])
def test_a_pause_of_pictures_that_refer_to_later_ones(tmp_path, suffix, options, resumes):
    "The duration of a picture in mp4 is the step to the next one in the file, which is not the next one shown."
    path = paused(tmp_path/f'film.{suffix}', resumes, options)
    recording = read_recording(path, 10, 64, 24000)
    assert len(recording.planes) == 200 and abs(len(recording.waveform)/24000 - 20) < 0.1
    assert_in_step(recording)
    marks = recording.planes[:, 2, 2].astype(int)
    held = marks[30:resumes*10//25]
    assert held.max() - held.min() <= 1 and len(set(marks[-20:])) > 5
    assert len(read_recording(path, 10, 64, None).planes) == 200
    span = read_recording(path, 10, 64, 24000, 2.0, 19.0)
    np.testing.assert_array_equal(span.planes, recording.planes[20:190])


@pytest.mark.parametrize('promised', [1.0, 100.0])
def test_a_header_of_the_wrong_length(tmp_path, promised):
    data = bytearray(film(tmp_path/'film.flv').read_bytes())
    at = data.find(b'duration') + 8
    data[at + 1:at + 9] = struct.pack('>d', promised)
    (tmp_path/'film.flv').write_bytes(data)
    assert_in_step(read_recording(tmp_path/'film.flv', 10, 64, 24000))


def test_the_default_sound_track_is_read(tmp_path):
    with av.open(str(tmp_path/'film.mkv'), 'w') as container:
        made = packets(container, sounds=2)
        silent, spoken = container.streams.audio
        silent.disposition, spoken.disposition = av.stream.Disposition(0), av.stream.Disposition.default
        for packet in made:
            if packet.stream is not silent or packet.dts < RATE:
                container.mux(packet)
    assert_in_step(read_recording(tmp_path/'film.mkv', 10, 64, 24000))


@pytest.mark.parametrize('begins', [dict(video=0.5, audio=0), dict(video=0, audio=0.5), dict(video=1, audio=1)])
def test_an_empty_edit_counts_once(tmp_path, begins):
    path = tmp_path/'film.mp4'
    with av.open(str(path), 'w') as container:
        made = packets(container)
        for packet in made:
            ticks = round(begins[packet.stream.type]/packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        container.mux(sorted(made, key=lambda packet: float(packet.dts*packet.time_base)))
    assert path.read_bytes().count(struct.pack('>i', -1) + struct.pack('>HH', 1, 0)), 'no edit is empty'
    shift = begins['audio'] - begins['video'] # of the sound against the pictures
    for start, end in ((None, None), (0.5, 3.0)):
        recording = read_recording(path, 10, 64, 24000, start, end)
        bright = np.flatnonzero(recording.planes[:, 20:60].mean((1, 2)) > 150)[0]/10 + (start or 0)
        loud = np.flatnonzero(np.abs(recording.waveform) > 0.25)[0]/24000 + (start or 0)
        assert bright == FLASHES[0] and abs(loud - FLASHES[0] - shift) < 0.03
        assert len(recording.planes) == (25 if end else 40)


@pytest.mark.parametrize('suffix', ['nut', 'avi'])
def test_pictures_without_content_repeat_the_one_before(tmp_path, suffix):
    path = tmp_path/f'film.{suffix}'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mjpeg', rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, 'yuvj420p'
        made = []
        for k in range(30):
            picture = np.full((64, 96, 3), 20 + 7*k, np.uint8)
            made += stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24'))
        made += stream.encode(None)
        for k, packet in enumerate(made):
            if 10 <= k < 15 or k >= 25:
                packet, full = av.Packet(), packet
                packet.pts, packet.dts, packet.duration = full.pts, full.dts, full.duration
                packet.time_base, packet.stream = full.time_base, full.stream
            container.mux(packet)
    for start, end in ((None, None), (0.8, 1.8), (2.2, 2.8)):
        grays = read_recording(path, 10, 64, None, start, end).planes[:, 2, 2].astype(int)
        ticks = slice(start and round(10*start), end and round(10*end))
        shown = [*range(10), *[9]*5, *range(15, 25), *[24]*5][ticks]
        assert len(grays) == len(shown)
        assert (np.sign(np.diff(grays)) == np.sign(np.diff(shown))).all()


def test_a_span_of_a_long_black_film_keeps_no_more_than_the_span(tmp_path, monkeypatch):
    path = tmp_path/'black.mp4'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=Fraction(1, 1000))
        stream.width, stream.height, stream.pix_fmt = 64, 64, 'yuv420p'
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format='rgb24')))
        container.mux(stream.encode(None))
    monkeypatch.setattr(glcm.data.video, 'LARGEST', 1 << 20)
    for start, end in ((0.5, 2.5), (1500.0, 1502.0), (2000.5, 2002.5)):
        assert len(read_recording(path, 10, 64, None, start, end).planes) == 20
    with pytest.raises(Rejection, match='too large'):
        read_recording(path, 10, 64, None)


def two_tracks(path, heard, disposition=av.stream.Disposition(0)):
    "A film whose default sound track is silent but in a span (`heard`, seconds); the other is a tone throughout."
    samples = np.arange(4*RATE)
    is_heard = (samples >= heard[0]*RATE) & (samples < heard[1]*RATE)
    tracks = [(0.3*np.sin(samples/20)*is_heard, av.stream.Disposition.default),
              (0.2*np.sin(samples/9), disposition)]
    with av.open(str(path), 'w') as container:
        made = packets(container, sounds=0)
        for waveform, flags in tracks:
            stream = container.add_stream('flac', rate=RATE, layout='mono')
            stream.disposition = flags
            sound = av.AudioFrame.from_ndarray(waveform[None].astype(np.float32), format='fltp', layout='mono')
            sound.sample_rate = RATE
            for piece in split(sound, 4608):
                made += stream.encode(piece)
            made += stream.encode(None)
        container.mux(sorted(made, key=lambda packet: float(packet.dts*packet.time_base)))
    return path


@pytest.mark.parametrize('disposition', ['comment', 'visual_impaired', None])
def test_a_span_in_which_a_film_is_silent_is_silence(tmp_path, disposition):
    flags = av.stream.Disposition[disposition] if disposition else av.stream.Disposition(0)
    path = two_tracks(tmp_path/'film.mkv', (2.5, 4), flags)
    assert not read_recording(path, 10, 64, 24000, 0.5, 2.0).waveform.any()
    assert read_recording(path, 10, 64, 24000, 2.6, 3.6).waveform.std() > 0.1


def test_a_film_that_is_silent_throughout_has_its_other_track_in_all_spans(tmp_path):
    path = two_tracks(tmp_path/'film.mkv', (0, 0))
    whole = read_recording(path, 10, 64, 24000).waveform
    span = read_recording(path, 10, 64, 24000, 1.0, 2.0).waveform
    np.testing.assert_allclose(span, whole[24000:48000], atol=1e-3)
    assert span.std() > 0.1


@pytest.mark.parametrize('disposition', ['comment', 'visual_impaired', 'hearing_impaired'])
def test_no_commentary_stands_in_for_a_silent_film(tmp_path, disposition):
    path = two_tracks(tmp_path/'film.mkv', (0, 0), av.stream.Disposition[disposition])
    assert not read_recording(path, 10, 64, 24000).waveform.any()
    assert not read_recording(path, 10, 64, 24000, 1.0, 2.0).waveform.any()


@pytest.mark.parametrize('attached', [True, False])
def test_a_cover_in_front_is_not_the_film(tmp_path, attached):
    with av.open(str(tmp_path/'film.mp4'), 'w') as container:
        cover = container.add_stream('mjpeg', rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, 'yuvj420p'
        if attached:
            cover.disposition = av.stream.Disposition.attached_pic
        black = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format='rgb24')
        image = cover.encode(black) + cover.encode(None)
        made = packets(container)
        for packet in image + made:
            container.mux(packet)
    assert_in_step(read_recording(tmp_path/'film.mp4', 10, 64, 24000))


@pytest.mark.parametrize('name', ['12:30 talk.mp4', 'my:video.mp4', '-my.mp4', 'file:film.mp4', 'http:film.mp4'])
def test_a_name_is_never_a_protocol(tmp_path, monkeypatch, name):
    film(tmp_path/'plain.mp4').rename(tmp_path/name)
    monkeypatch.chdir(tmp_path)
    assert_in_step(read_recording(name, 10, 64, 24000))


PLAYLISTS = [
    ('list.mp4', 'ffconcat version 1.0\nfile film.mp4\n'),
    ('list.m3u8', '#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4.0,\nfilm.ts\n#EXT-X-ENDLIST\n'),
]


@pytest.mark.parametrize('name,text', PLAYLISTS)
def test_a_playlist_is_no_film(tmp_path, name, text):
    film(tmp_path/'film.mp4')
    film(tmp_path/'film.ts')
    (tmp_path/name).write_text(text)
    with pytest.raises(Rejection, match='list of other files'):
        read_recording(tmp_path/name, 10, 64, 24000)


def test_sound_that_ends_before_the_first_picture(tmp_path):
    with av.open(str(tmp_path/'late.mkv'), 'w') as container:
        for packet in packets(container):
            if packet.stream.type == 'video':
                packet.pts += round(35/packet.time_base)
                packet.dts += round(35/packet.time_base)
            container.mux(packet)
    with pytest.raises(Rejection, match='sound ends before the first picture'):
        read_recording(tmp_path/'late.mkv', 10, 64, 24000)


FORMATS = [('mp4', 'aac'), ('mkv', 'aac'), ('webm', 'libopus'), ('ts', 'aac'), ('avi', 'mp3'), ('mov', 'pcm_s16le')]


@pytest.mark.parametrize('suffix,codec', FORMATS)
@pytest.mark.parametrize('start,end', [(0.5, 2.0), (5.3, 7.1), (7.0, None)])
def test_a_span_is_what_the_whole_film_holds(tmp_path, suffix, codec, start, end):
    container = 'mkv' if suffix == 'webm' else suffix
    path = film(tmp_path/f'film.{container}', seconds=9, codec=codec)
    whole, span = read_recording(path, 10, 64, 24000), read_recording(path, 10, 64, 24000, start, end)
    ticks, samples = (slice(round(start*rate), end and round(end*rate)) for rate in (10, 24000))
    np.testing.assert_array_equal(span.planes, whole.planes[ticks])
    assert len(span.waveform) == len(whole.waveform[samples])
    np.testing.assert_allclose(span.waveform, whole.waveform[samples], atol=1e-3)


class Counted:
    "A decoding whose frames are counted."
    def __init__(self, source, frames):
        self.source, self.counted = source, frames

    def __getattr__(self, name):
        return getattr(self.source, name)

    def frames(self):
        for frame in self.source.frames():
            self.counted.append(frame)
            yield frame


def test_a_span_of_a_long_film_is_found_by_seeking(tmp_path, monkeypatch):
    path, frames, decoding = film(tmp_path/'film.mp4', seconds=24), [], glcm.data.video.decoding
    @contextmanager
    def counted(*args, **kwargs):
        with decoding(*args, **kwargs) as source:
            yield Counted(source, frames)
    monkeypatch.setattr(glcm.data.video, 'decoding', counted)
    assert len(read_recording(path, 10, 64, 24000, 18, 20).planes) == 20
    assert len(frames) < 500 # of 1700
    frames.clear()
    read_recording(path, 10, 64, 24000)
    assert len(frames) > 1700


def test_a_transport_stream_is_looked_through_once_for_all_its_spans(tmp_path, monkeypatch):
    path, placed, place = film(tmp_path/'film.ts', seconds=24), [], Clock.place
    def counted(clock, packet):
        placed.append(packet)
        place(clock, packet)
    monkeypatch.setattr(Clock, 'place', counted)
    whole = read_recording(path, 10, 64, 24000)
    needed = []
    for start in (20, 18, 2, 20):
        placed.clear()
        span = read_recording(path, 10, 64, 24000, start, start + 1)
        np.testing.assert_array_equal(span.planes, whole.planes[10*start:10*start + 10])
        np.testing.assert_allclose(span.waveform, whole.waveform[24000*start:][:24000], atol=1e-3)
        needed.append(len(placed))
    assert needed[0] > 1500 # of 1725 packets
    assert max(needed[1:]) < 500


def test_a_span_of_joined_transport_streams(tmp_path):
    path = film(tmp_path/'film.ts', seconds=9)
    path.write_bytes(path.read_bytes()*2)
    whole = read_recording(path, 10, 64, 24000)
    for start in (6, 13, 7, 15):
        span = read_recording(path, 10, 64, 24000, start, start + 2)
        np.testing.assert_array_equal(span.planes, whole.planes[10*start:10*start + 20])
        np.testing.assert_allclose(span.waveform, whole.waveform[24000*start:][:48000], atol=1e-3)


def test_a_film_that_does_not_fit_is_refused_early(tmp_path, monkeypatch):
    path = film(tmp_path/'film.mp4')
    monkeypatch.setattr(glcm.data.video, 'LARGEST', 100_000)
    with pytest.raises(Rejection, match='too large.*start and end'):
        read_recording(path, 10, 64, 24000)
