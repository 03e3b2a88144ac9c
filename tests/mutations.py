"""Media files damaged in a thousand ways, each the same every time; and what the damage did to what was decoded."""
import io
import struct
import time
import wave
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from PIL import Image

from glcm.core import parse, read_params
from glcm.data.audio import LEVELS, AudioConfig
from glcm.data.damage import Rejection
from glcm.data.clip import ClipConfig, Settings
from glcm.data.shards import StoreConfig
from glcm.data.workers import Decoder
from glcm.data.video import write_video

ABSURD = [0, 1, 2, 255, 65535, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1] # values that no honest header has
# small harm: mean difference of the worst frame, of 255; median difference of log10 mel energies
SMALL_LUMA, SMALL_MEL = 12, 0.3
SHIFT = 6 # columns by which sound may have moved: half a visual step
REASONS = {'does not decode', 'cut off', 'no video', 'no audio', 'too short', 'clock jumps', 'changes size',
           'longer than its header says', 'unknown colours', 'too large', 'takes too long', 'crashes the decoder'}


# -- files to damage ---------------------------------------------------------------------------------------------------

def written_files(folder: Path, seconds: int = 3) -> list: # paths
    "Three films of moving waves and a gliding tone, as `write_video` makes them: H.264 with AAC."
    rng, paths = np.random.default_rng(0), []
    y, x = np.mgrid[:96, :128]
    for k, fps in enumerate((10, 25, 30)):
        t = np.arange(seconds*fps)[:, None, None]/fps
        luma = 128 + 60*np.sin(x/(9 + k) + 2*t) + 40*np.cos(y/11 - t*k) + rng.normal(0, 6, (seconds*fps, 96, 128))
        pictures = np.repeat(luma.clip(0, 255).astype(np.uint8)[..., None], 3, -1)
        time = np.arange(seconds*24000)/24000
        sound = 0.3*np.sin(2*np.pi*(300 + 200*k)*time*(1 + 0.2*time)) + 0.02*rng.normal(size=len(time))
        paths.append(folder/f'written{k}.mp4')
        write_video(paths[-1], pictures, sound, fps)
    return paths


def with_sound(film: Path, other: Path, out: Path):
    "An avi of the packets of a silent film and the re-encoded sound of another file."
    with (av.open(str(film), metadata_errors='ignore') as source,
          av.open(str(other)) as speaker,
          av.open(str(out), 'w') as container):
        picture = container.add_stream_from_template(source.streams.video[0])
        sound = container.add_stream('mp2', rate=44100, layout='mono')
        packets = [p for p in source.demux(video=0) if p.size]
        end = max(float((p.pts or p.dts)*p.time_base) for p in packets)
        resampler = av.AudioResampler(format='s16', layout='mono', rate=44100)
        for frame in speaker.decode(audio=0):
            if frame.time > end:
                break
            for piece in resampler.resample(frame):
                packets += sound.encode(piece)
        packets += sound.encode(None)
        for packet in sorted(packets, key=lambda p: float((p.dts if p.dts is not None else p.pts)*p.time_base)):
            if packet.stream is not sound:
                packet.stream = picture
            container.mux(packet)


def real_files(shared: Path, folder: Path) -> list: # paths
    "Kinetics clips, faces of GRID, films of UCF101 and HMDB51 that were given a sound, and recordings of ESC-10."
    formats, grid, esc10 = (shared/name for name in ('formats', 'grid', 'esc10'))
    kinetics = [formats/name for name in ('R6llTwEh07w.mp4', 'SOX5yA1l24A.mp4', 'WUzgd7C1pWA.mp4')]
    silent = sorted(formats.glob('*.avi'))
    avis = [folder/path.name for path in silent]
    for k, (film, out) in enumerate(zip(silent, avis)):
        with_sound(film, kinetics[k % 3], out)
    return kinetics + sorted((grid/'video').glob('*.mp4'))[::100] + avis + sorted((esc10/'audio').glob('*.ogg'))[::80]


# -- where the header is, and where the payload ------------------------------------------------------------------

# (kind, offset, size) of every box of an mp4 or chunk of an avi
def boxes(data: bytes, start: int = 0, end: int | None = None):
    "Walk the boxes of an mp4, or the chunks of an avi, down to those that hold no others."
    riff, at, end = data[:4] == b'RIFF', start, len(data) if end is None else end
    while at + 8 <= end:
        size, kind = (struct.unpack_from('<I', data, at + 4)[0] + 8, data[at:at + 4]) if riff else \
                     (struct.unpack_from('>I', data, at)[0], data[at + 4:at + 8])
        if size < 8:
            return
        if riff and data[at + 8:at + 12] == b'movi':
            kind = b'movi'
        yield kind, at, min(size, end - at)
        if kind in (b'RIFF', b'LIST'):
            yield from boxes(data, at + 12, min(at + size, end))
        elif kind in (b'moov', b'trak', b'mdia', b'minf', b'stbl', b'edts', b'dinf'):
            yield from boxes(data, at + 8, min(at + size, end))
        at += size + (size & 1 if riff else 0)


def payload(data: bytes) -> tuple: # first byte, byte after the last
    "Where the compressed pictures and sounds are."
    if data[:4] == b'OggS':
        return data.index(b'OggS', data.index(b'OggS', 4) + 4), len(data)
    spans = [(at + 8, at + size) for kind, at, size in boxes(data) if kind in (b'mdat', b'movi')]
    return max(spans, key=lambda span: span[1] - span[0])


# -- damage ------------------------------------------------------------------------------------------------------------

@dataclass
class Files:
    "The files that are damaged, and where the packets of their sound are."
    data: list   # bytes of each
    sounds: list # of lists of (offset, size)

    @classmethod
    def read(cls, paths):
        return cls([path.read_bytes() for path in paths], [list(_sounds(path)) for path in paths])


def _sounds(path: Path):
    "Offset and size of every packet of sound."
    with av.open(str(path)) as container:
        for packet in container.demux(audio=0):
            if packet.size and packet.pos is not None and packet.pos >= 0:
                yield packet.pos, packet.size


def _flipped(data, rng, start, end, count):
    damaged = bytearray(data)
    for at in rng.integers(start, end, count):
        damaged[at] ^= 1 << rng.integers(8)
    return bytes(damaged)


def cut_anywhere(files, k, rng): return files.data[k][:rng.integers(1, len(files.data[k]))]

def cut_in_payload(files, k, rng): return files.data[k][:rng.integers(*payload(files.data[k]))]

def piece_missing(files, k, rng):
    start, end = payload(files.data[k])
    a, b = sorted(rng.integers(start, end, 2))
    return files.data[k][:a] + files.data[k][b:]

def hole_of_zeros(files, k, rng):
    start, end = payload(files.data[k])
    a, b = sorted(rng.integers(start, end, 2))
    return files.data[k][:a] + bytes(int(b - a)) + files.data[k][b:]

def few_flips_in_header(files, k, rng):
    start = payload(files.data[k])[0]
    return _flipped(files.data[k], rng, 0, start, rng.integers(1, 5))

def many_flips_in_header(files, k, rng):
    start = payload(files.data[k])[0]
    return _flipped(files.data[k], rng, 0, start, max(8, start//100))

def few_flips_in_payload(files, k, rng):
    return _flipped(files.data[k], rng, *payload(files.data[k]), rng.integers(1, 5))

def many_flips_in_payload(files, k, rng):
    start, end = payload(files.data[k])
    return _flipped(files.data[k], rng, start, end, (end - start)//rng.choice([100, 1000, 5000]) + 1)

def payload_of_another(files, k, rng):
    start, end = payload(files.data[k])
    other = files.data[_another(files, k, rng)]
    first, last = payload(other)
    content = other[first:last][:end - start]
    return files.data[k][:start] + content + bytes(end - start - len(content)) + files.data[k][end:]

def sound_of_another(files, k, rng):
    damaged, j = bytearray(files.data[k]), _another(files, k, rng)
    for (at, size), (from_, length) in zip(files.sounds[k], files.sounds[j]):
        damaged[at:at + size] = files.data[j][from_:from_ + min(size, length)].ljust(size, b'\0')
    return bytes(damaged)

def kinds_exchanged(files, k, rng):
    data = files.data[k]
    for a, b in ((b'vide', b'soun'), (b'vids', b'auds'), (b'vmhd', b'smhd')):
        data = data.replace(a, b'\0\1\2\3').replace(b, a).replace(b'\0\1\2\3', b)
    if rng.random() < 0.5:
        data = data.replace(b'avc1', b'\0\1\2\3').replace(b'mp4a', b'avc1').replace(b'\0\1\2\3', b'mp4a')
    return data

def something_appended(files, k, rng):
    other = files.data[_another(files, k, rng)]
    return files.data[k] + other[:rng.integers(1, len(other))]

def zero_length(files, k, rng): return b''

def absurd_header(files, k, rng):
    damaged, start = bytearray(files.data[k]), payload(files.data[k])[0]
    if damaged[:4] == b'OggS':
        pages = [at for at in range(len(damaged)) if damaged[at:at + 4] == b'OggS']
        damaged[(at := int(rng.choice(pages)) + 4 + rng.integers(22)):at + 4] = struct.pack('<I', rng.choice(ABSURD))
        return bytes(damaged)
    heads = [(kind, at, size) for kind, at, size in boxes(files.data[k]) if kind not in (b'udta', b'free', b'JUNK')]
    kind, at, size = heads[rng.integers(len(heads))]
    at += 4*int(rng.integers(2 if kind in (b'mdat', b'movi') else min(size, 96)//4))
    form = '<I' if damaged[:4] == b'RIFF' else '>I'
    old, = struct.unpack_from(form, damaged, at)
    struct.pack_into(form, damaged, at, int(rng.choice([*ABSURD, min(old*1000, (1 << 32) - 1), old//1000])))
    return bytes(damaged)

def wrong_content(files, k, rng):
    noise, out = rng.integers(0, 255, (64, 96, 3), np.uint8), io.BytesIO()
    kind = rng.choice(['png', 'txt', 'zip', 'noise', 'gif'] + ([] if files.data[k][:4] == b'OggS' else ['wav']))
    if kind in ('png', 'gif'):
        Image.fromarray(noise).save(out, kind)
    elif kind == 'txt':
        out.write(b'not a video\n'*int(rng.integers(1, 1000)))
    elif kind == 'noise':
        out.write(noise.tobytes())
    elif kind == 'zip':
        with zipfile.ZipFile(out, 'w') as archive:
            archive.writestr('film.mp4', files.data[k])
    else:
        with wave.open(out, 'wb') as sound:
            sound.setparams((1, 2, 24000, 0, 'NONE', ''))
            sound.writeframes(rng.integers(-9999, 9999, 72000, np.int16).tobytes())
    return out.getvalue()

def wrong_ending(files, k, rng): return files.data[k]


def _another(files, k, rng): return (k + int(rng.integers(1, len(files.data)))) % len(files.data)


KINDS = [cut_anywhere, cut_in_payload, piece_missing, hole_of_zeros, few_flips_in_header,
         many_flips_in_header, few_flips_in_payload,
         many_flips_in_payload, payload_of_another, sound_of_another, kinds_exchanged, something_appended, zero_length,
         absurd_header, wrong_content, wrong_ending]


@dataclass
class Mutant:
    "One damaged file."
    number: int
    kind: str     # name of the damage
    source: Path  # the file as it was
    path: Path    # the file as it is


def mutants(paths: list, folder: Path, count: int, seed: int = 0):
    "Write and yield `count` damaged files, one at a time; number n is the same for the same files and seed."
    files = Files.read(paths)
    for n in range(count):
        rng = np.random.default_rng([seed, n])
        damage, k = KINDS[n % len(KINDS)], int(rng.integers(len(paths)))
        ending = rng.choice(['.avi', '.mp4', '.ogg', '.txt', '']) if damage is wrong_ending else paths[k].suffix
        path = folder/f'{n:04d}{ending}'
        path.write_bytes(damage(files, k, rng))
        yield Mutant(n, damage.__name__.replace('_', ' '), paths[k], path)
        path.unlink()


# -- what became of it -------------------------------------------------------------------------------------------------

@dataclass
class Content:
    "What was kept of a file: nothing is lost between the decoder and here."
    luma: np.ndarray | None # (F, h, w) uint8; None for sound alone
    levels: np.ndarray      # (bands, N) uint8

    @classmethod
    def unpack(cls, members: dict, entries: dict):
        bands = read_params()['audio']['bands']
        levels = np.concatenate([np.frombuffer(chunk, np.uint8).reshape(bands, -1) for chunk in members['mel.raw']], 1)
        if 'i420' not in members:
            return cls(None, levels)
        planes = np.stack([np.frombuffer(chunk, np.uint8) for chunk in members['i420']])
        height, width = entries['height'], entries['width']
        return cls(planes[:, :height*width].reshape(-1, height, width), levels)


def settings_of(path: Path) -> Settings:
    "How a file is decoded: as Kinetics or as ESC-50, stored without loss."
    params, sound_only = read_params(), path.suffix == '.ogg'
    store = replace(parse(StoreConfig, params['store'], 'store'), container='raw')
    clip = parse(ClipConfig, params['datasets']['esc50' if sound_only else 'kinetics700'], 'datasets')
    return Settings(clip, parse(AudioConfig, params['audio'], 'audio'), store, params['views']['frames'], sound_only)


def harm(original: Content, damaged: Content) -> tuple: # steps lost, luma, mel
    """Steps fewer or more; difference of luma in the worst frame, from the original's frame of the same time or of a
    neighbour's; median difference of log10 mel, at the best shift of the sound. A cut between scenes that comes a step
    early is thus small harm."""
    columns = min(original.levels.shape[1], damaged.levels.shape[1]) - 2*SHIFT
    ours = original.levels[:, SHIFT:SHIFT + columns].astype(int)
    mel = min(float(np.median(np.abs(ours - damaged.levels[:, at:at + columns]))) for at in range(2*SHIFT + 1))/LEVELS
    lost = abs(original.levels.shape[1] - damaged.levels.shape[1])//12
    if original.luma is None:
        return lost, 0.0, mel
    if original.luma.shape[1:] != damaged.luma.shape[1:]:
        return lost, 255.0, mel
    frames = min(len(original.luma), len(damaged.luma))
    neighbours = [np.roll(original.luma, s, 0)[:frames].astype(int) for s in (-1, 0, 1)]
    luma = np.stack([np.abs(frame - damaged.luma[:frames]).mean((1, 2)) for frame in neighbours])
    return lost, float(luma.min(0).max()), mel


def judge(original: Content, damaged: Content, others: list) -> str:
    "What an accepted file is: unchanged, with small harm, with pictures or sound of another file, or with large harm."
    same = lambda a, b: a is None and b is None or a.shape == b.shape and (a == b).all()
    if same(original.luma, damaged.luma) and same(original.levels, damaged.levels):
        return 'unchanged'
    lost, luma, mel = harm(original, damaged)
    if luma < SMALL_LUMA and mel < SMALL_MEL and lost <= 0.05*original.levels.shape[1]/12 + 5:
        return 'small harm'
    harms = [harm(other, damaged) for other in others if (other.luma is None) == (damaged.luma is None)]
    known = any(luma < 1 for _, luma, _ in harms) and any(mel < 0.1 for _, _, mel in harms)
    return 'of another file' if known and (luma >= 1 or mel >= 0.1) else 'large harm'


def fuzz(paths: list, folder: Path, count: int, seed: int = 0, seconds: float = 20):
    "Decode `count` damaged files, each in a child that may take so many seconds; yields a row for each."
    decoder = Decoder()
    originals = {path: Content.unpack(*decoder.encode(path, settings_of(path), None, None, seconds)) for path in paths}
    for mutant in mutants(paths, folder, count, seed):
        started, original, detail = time.monotonic(), originals[mutant.source], ''
        try:
            content = Content.unpack(*decoder.encode(mutant.path, settings_of(mutant.source), None, None, seconds))
            outcome = judge(original, content, list(originals.values()))
            lost, luma, mel = harm(original, content)
        except Rejection as e:
            outcome, detail, lost, luma, mel = e.reason, e.detail, None, None, None
        yield dict(number=mutant.number, kind=mutant.kind, source=mutant.source.name,
                   format=mutant.source.suffix[1:], outcome=outcome,
                   detail=detail, steps_lost=lost, luma=luma, mel=mel, seconds=time.monotonic() - started)
