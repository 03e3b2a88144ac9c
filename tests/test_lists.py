"""Names, links and endings as they are in people's folders, and lists as people write them: found, or told."""
import json
import os
import re
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from av import formats_available
from av.format import ContainerFormat

from glcm.core import InputError, inside
from glcm.data.audio import AudioConfig
from glcm.datasets.catalogue import read_catalogue
from glcm.data.table import MEDIA, SOUND, VIDEO, csv_rows, listing
from glcm.data.clip import ClipConfig
from glcm.data.preprocess import REMEDIES, preprocess, summary
from glcm.data.workers import media_file
from glcm.data.shards import ClipStore, StoreConfig
from glcm.data.video import Rejection, write_video

AUDIO, STORE = AudioConfig(24000, 80, 1024, 200), StoreConfig('h264', 20, 16)
CLIP = ClipConfig(fps=10, short_side=64, max_rejected=0.9)
KINETICS = 'label,youtube_id,time_start,time_end,split\n'
NFC, NFD = 'caf\u00e9', unicodedata.normalize('NFD', 'caf\u00e9')


def put(folder, files):
    "Files with a text or bytes; a `Path` makes a link to it, `None` a named pipe."
    for name, what in files.items():
        path = Path(os.fsdecode(os.fsencode(folder) + b'/' + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        if what is None:
            os.mkfifo(path)
        elif isinstance(what, Path):
            path.symlink_to(what)
        else:
            path.write_bytes(what if isinstance(what, bytes) else what.encode())
    return folder


def run(reader, folder, out, clip=CLIP, **how):
    "The catalogue, what was rejected, the rows stored."
    table = read_catalogue(reader, folder)
    rejected = preprocess(table, folder, out, clip, AUDIO, STORE, 10, **how)
    return table, rejected, ClipStore(out).clips


@pytest.fixture(scope='module')
def film(tmp_path_factory):
    "A film of 2 s with a tone."
    path = tmp_path_factory.mktemp('film')/'film.mp4'
    frames = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    write_video(path, frames, 0.2*np.sin(np.arange(48000)/20))
    return path.read_bytes()


def tone(path, codec='libopus', rate=48000):
    "Two seconds of sound alone, in the container of the path's ending."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=rate, layout='mono')
        samples = (0.2*np.sin(np.arange(2*rate)/20)).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(samples[None], format='fltp', layout='mono')
        sound.sample_rate = rate
        container.mux([*stream.encode(sound), *stream.encode(None)])
    return path


# Formats of FFmpeg that are no film and no sound, or of which a file's ending says nothing.
PICTURES = '''
    avif bmp dpx exr fits hdr heic heif ico im1 im24 im8 j2c j2k jls jp2 jpeg jpg jxl jxs ljpg mpo pam
    pbm pcx pfm pgm pgmyuv phm pix png ppm qoi ras rs sgi sun sunras tga tif tiff vbn wbmp xbm xface xwd
    y flm'''
TEXTS = '''
    adf ans aqt art asc ass cdg cgi diz ffmeta ice idf idx js jss lrc m3u8 mcc mks mpl2 nfo pjs rt sami
    sbg scc smi srt ssa stl sub sup txt vt vtt webvtt xml ism'''
WITHOUT_HEADER = '''
    302 722 al aptx aptxhd bit bitpacked c2 cif codec2 daud dfpwm g722 g723_1 g728 g729 lbc msbc pcm
    qcif rco rgb sb sbc sln spdif sw tco ub ul uw v v210 yuv yuv10 dat'''
GAMES_AND_INSTRUMENTS = '''
    aa aax acm adp ads adx aix apc apm ast aud avs bcstm bfstm binka bmv brstm cdata cdxl cpk cvg dtk
    fsb fwse genh hca imx ipu kvag laf lvf mca mmf mods moflex msf mtaf musx mvi mxg nsp pdv rcv roq rsd
    rso sdns sdr2 sds sdx ser sga son ss2 str svag svs tun usm vag vb vpk vqe vqf vql wa way xl xmd xmv
    xvag yop'''


def test_every_ending_of_ffmpeg_is_media_or_known_to_be_none():
    "Demuxers name few endings, so those of the muxer of the same format count too."
    known = set()
    for name in formats_available:
        for mode in 'rw':
            try:
                ContainerFormat(name, 'r')
                known |= ContainerFormat(name, mode).extensions
            except ValueError:
                pass # a format that is only written, or only read
    assert {'mp4', 'wav', 'ts', 'caf', 'au', 'amr'} <= known
    others = set(' '.join([PICTURES, TEXTS, WITHOUT_HEADER, GAMES_AND_INSTRUMENTS]).split())
    assert sorted(e for e in known if f'.{e}' not in MEDIA | {f'.{o}' for o in others}) == []
    assert not MEDIA & {f'.{o}' for o in others}
    assert len(MEDIA) == len(VIDEO) + len(SOUND), 'an ending stands twice'


def test_endings_that_people_have(tmp_path):
    names = '''
        a.ts a.MTS a.m2ts a.vob a.asf a.f4v a.3g2 a.gif a.ogv a.divx a.dv a.mxf a.mts a.opus a.aac a.aif
        a.aiff a.wma a.caf a.au a.ac3 a.amr a.mka a.oga a.w64 a.RMVB a.ogg a.WaV a.dvr-ms a.b.c.mp4
        a.3gpp a.ogm a.vro a.lrv a.insv a.m4s a.mpga a.mp4v a.mpg4 a.mpv2 a.mp2v a.3gp2 a.hdmov a.nuv'''.split()
    others = 'notes.txt', 'b.JPG', 'a.mp4.part', 'mp4', '.DS_Store', '._x.mp4'
    table = read_catalogue('folder', put(tmp_path, dict.fromkeys((*names, *others), '')))
    assert table.path.tolist() == sorted(names)
    assert table.attrs['notes'] == ['left out: 4 (endings not of films or sounds): a.mp4.part, b.JPG, mp4, notes.txt']
    many = put(tmp_path/'many', {f'{i}.jpg': '' for i in range(1200)} | {'a.mp4': '', 'x.doc': ''})
    note, = read_catalogue('folder', many).attrs['notes']
    assert note.startswith('left out: 1,201 (endings not of films or sounds: .jpg 1,200, .doc 1): ')
    assert note.endswith('and 1,196 more')


@pytest.mark.parametrize('endings', [('.webm', '.mka', '.mkv'), ('.mp4', '.m4a'), ('.ogg', '.opus', '.oga')])
def test_sounds_in_containers_of_films_are_sounds(tmp_path, endings):
    (tmp_path/'in').mkdir()
    for ending in endings:
        tone(tmp_path/'in'/f'a{ending}', 'aac' if ending.startswith('.m') and 'mk' not in ending else 'libopus')
    with pytest.warns(UserWarning, match='no file has pictures'):
        _, rejected, rows = run('folder', tmp_path/'in', tmp_path/'out')
    assert rejected.empty and len(rows) == len(endings) and 'height' not in rows[0]


def test_a_film_among_sounds_keeps_its_pictures(tmp_path, film):
    put(tmp_path/'in', {'a.mp4': film})
    for i in range(3):
        tone(tmp_path/'in'/f'{i}.webm')
    _, rejected, rows = run('folder', tmp_path/'in', tmp_path/'out')
    assert [row['clip'] for row in rows] == ['a.mp4'] and 'height' in rows[0]
    assert set(rejected.reason) == {'no video'} and REMEDIES['no video'] in summary(rejected)[0]


NAMES = [f'{NFD}.mp4', '\u6771\u4eac \U0001f3ac.mp4', '\u202e4pm.mp4', 'a\nb.mp4', ' lead.mp4', 'trail .mp4', '-rf.mp4',
         '12:30.mp4', '%s $(x) `y`.mp4', 'x'*251 + '.mp4',
         'a..mp4', 'CON.mp4', '"quoted",.mp4', b'caf\xe9.mp4', b'\xff\xfe.mp4', 'back\\slash.mp4', '~.mp4', '#1?.mp4',
         '\x1b[31m.mp4']


def test_names_of_any_bytes_are_read_and_reported(tmp_path, film):
    good = put(tmp_path/'good', {name: film for name in NAMES})
    table, rejected, rows = run('folder', good, tmp_path/'out')
    assert rejected.empty and len(rows) == len(NAMES)
    assert {os.fsencode(row['path']) for row in rows} == set(map(os.fsencode, NAMES))
    bad = put(tmp_path/'bad', {name: 'no film' for name in NAMES} | {'fine.mp4': film})
    table, rejected, rows = run('folder', bad, tmp_path/'out', replace(CLIP, max_rejected=1.0))
    assert len(rejected) == len(NAMES) and all(map(str.isprintable, pd.read_csv(tmp_path/'out'/'rejected.csv').detail))
    shutil.rmtree(bad)
    of_no_kind = {os.fsencode(name)[:-4] + b'.bad': '' for name in NAMES}
    notes = read_catalogue('folder', put(bad, of_no_kind | {'a.mp4': ''})).attrs['notes']
    assert all(map(str.isprintable, notes))


@pytest.mark.parametrize('listed, there', [(NFC, NFD), (NFD, NFC)])
def test_accents_in_either_form(tmp_path, listed, there, film):
    put(tmp_path/'own', {f'{there}/{there}.mp4': film, 'labels.csv': f'path,label\n{listed}/{listed}.mp4,{listed}\n'})
    _, rejected, rows = run('folder', tmp_path/'own', tmp_path/'out')
    assert rejected.empty and [row['label'] for row in rows] == [NFC]
    put(tmp_path/'k', {f'train/{there}/abc_000001_000002.mp4': '', 'train.csv': KINETICS + f'{listed},abc,1,2,train\n'})
    table = read_catalogue('kinetics700', tmp_path/'k')
    assert (tmp_path/'k'/table.path[0]).exists() and table.label[0] == NFC


def test_two_files_whose_names_differ_in_form_stay_two(tmp_path):
    put(tmp_path, {f'{NFC}.mp4': '', f'{NFD}.mp4': '', 'labels.csv': f'path,label\n{NFC}.mp4,a\n{NFD}.mp4,b\n'})
    if len(listing(tmp_path, VIDEO)) < 2:
        pytest.skip('this file system has one form')
    table = read_catalogue('folder', tmp_path)
    assert table[['path', 'label']].values.tolist() == [[f'{NFC}.mp4', 'a'], [f'{NFD}.mp4', 'b']]


def test_links_of_the_owner_are_followed_and_loops_end(tmp_path, film):
    disk = put(tmp_path/'disk', {'films/a.mp4': film, 'films/deep/b.mp4': film, 'other/c.mp4': film, 'notes/d.txt': ''})
    good = {'x.mp4': disk/'other'/'c.mp4', 'more': disk/'films', 'again': disk/'films', 'real/e.mp4': film}
    loops = {'self': Path('.'), 'up': Path('..')/'mine', 'real/back': Path('..'), 'round.mp4': Path('round.mp4')}
    mine = put(tmp_path/'mine', good | loops | {'gone.mp4': Path('/nowhere/gone.mp4')})
    (disk/'films'/'home').symlink_to(mine)
    table, rejected, rows = run('folder', mine, tmp_path/'out')
    assert [row['path'] for row in rows] == ['again/a.mp4', 'again/deep/b.mp4', 'real/e.mp4', 'x.mp4']
    assert rejected.reason.tolist() == ['missing file']*2
    assert 'mine/gone.mp4 is a link to /nowhere/gone.mp4, which cannot be opened' in rejected.detail[0]
    assert table.attrs['notes'] == ['left out: 5 (folders listed already): again/home, more, real/back, self, up']


def test_links_that_lead_to_each_other_end(tmp_path, film):
    links = {'one': Path('two'), 'two': Path('one'), 'one.mp4': Path('two.mp4'), 'two.mp4': Path('one.mp4')}
    put(tmp_path/'in', links | {'a.mp4': film})
    table, rejected, rows = run('folder', tmp_path/'in', tmp_path/'out')
    assert [row['path'] for row in rows] == ['a.mp4']
    assert rejected[['clip', 'reason']].values.tolist() == [['one.mp4', 'missing file'], ['two.mp4', 'missing file']]
    assert table.attrs['notes'] == ['left out: 2 (endings not of films or sounds): one, two']


def of_lengths(path, pictures, sound):
    "A film with so many seconds of pictures and of sound."
    frames = np.full((10*pictures, 64, 64, 3), 90, np.uint8)
    write_video(path, frames, 0.2*np.sin(np.arange(24000*sound)/20))
    return path.read_bytes()


@pytest.mark.parametrize('pictures, sound, span, said', [
    (4, 2, '0.5,3.5', 'the sound ends at 2.0 s, its list says from 0.5 s to 3.5 s'),
    (2, 4, '0.5,3.5', 'the pictures end at 2.0 s, its list says from 0.5 s to 3.5 s'),
    (4, 2, '2.5,3.8', 'the sound ends before 2.5 s, its list says from 2.5 s to 3.8 s'),
    (4, 4, '9,11', 'the pictures end before 9.0 s, its list says from 9.0 s to 11.0 s'),
    (4, 4, '9,', 'the pictures end before 9.0 s, its list says from 9.0 s')])
def test_a_span_that_the_file_does_not_have_is_told(tmp_path, pictures, sound, span, said):
    film = of_lengths(tmp_path/'a.mp4', pictures, sound)
    put(tmp_path/'in', {'a.mp4': film, 'labels.csv': f'path,start,end\na.mp4,{span}\na.mp4,0,1.5\n'})
    _, rejected, rows = run('folder', tmp_path/'in', tmp_path/'out')
    assert len(rows) == 1 and rejected.reason.tolist() == ['too short for its list']
    assert rejected.detail[0] == f'a.mp4: {said}'
    line, = summary(rejected)
    assert 'correct the times in the list' in line and 'min_frames' not in line


@pytest.mark.parametrize('kind', ['pictures', 'sound'])
def test_the_last_steps_of_a_span_may_be_missing(tmp_path, kind):
    lengths = dict(pictures=4, sound=4) | {kind: 3}
    film = of_lengths(tmp_path/'a.mp4', **lengths)
    put(tmp_path/'in', {'a.mp4': film, 'labels.csv': 'path,start,end\na.mp4,1,3.2\n'})
    _, rejected, rows = run('folder', tmp_path/'in', tmp_path/'out')
    assert rejected.empty and 20 <= rows[0]['steps'] <= 22


OUTSIDE = ['../disk/a.mp4', 'link/../../disk/a.mp4', 'link/../../mine/../disk/a.mp4', '/etc/hosts', '//etc/hosts', '..',
           'a\0b', '\ud800.mp4', '{disk}/a.mp4']


@pytest.mark.parametrize('name', OUTSIDE)
def test_no_path_of_a_list_leads_out(tmp_path, name):
    disk, mine = put(tmp_path/'disk', {'a.mp4': 'secret', 'deep/b.mp4': ''}), tmp_path/'mine'
    put(mine, {'link': disk/'deep'})
    with pytest.raises(InputError, match='outside|no name'):
        inside(mine, name.format(disk=disk))
    with pytest.raises(Rejection, match='^unsafe path: .*(outside|no name)'):
        media_file(mine, name.format(disk=disk))


def test_links_are_no_ladder(tmp_path):
    "`link/../a.mp4` is beside the link, as it is written, not beside the folder that the link leads to."
    disk = put(tmp_path/'disk', {'a.mp4': 'secret', 'deep/b.mp4': ''})
    mine = put(tmp_path/'mine', {'link': disk/'deep', 'c.mp4': ''})
    assert media_file(mine, 'link/b.mp4').read_bytes() == b'' and media_file(mine, 'link/../c.mp4') == mine/'c.mp4'
    with pytest.raises(Rejection, match='missing file'):
        media_file(mine, 'link/../a.mp4')
    (tmp_path/'home').symlink_to(mine)
    for absolute in (tmp_path/'home'/'c.mp4', mine/'c.mp4'):
        assert media_file(tmp_path/'home', str(absolute)).exists()
    table = read_catalogue('folder', put(mine, {'labels.csv': f'path,label\n{mine}/c.mp4,x\nlink/b.mp4,y\n'}))
    assert table.path.tolist() == ['c.mp4', 'link/b.mp4']


def test_what_is_no_file_does_not_hold_the_run_up(tmp_path, film):
    files = {'pipe.mp4': None, 'zeros.mp4': Path('/dev/zero'), 'folder.mp4/inner.mp4': film,
             'link.mp4': Path('pipe.mp4'), 'a.mp4': film}
    put(tmp_path/'in', files)
    table, rejected, rows = run('folder', tmp_path/'in', tmp_path/'out')
    assert [row['path'] for row in rows] == ['a.mp4', 'folder.mp4/inner.mp4']
    assert rejected.values.tolist() == [['link.mp4', 'not a file', 'link.mp4 is a pipe or a device'],
                                        ['zeros.mp4', 'not a file', 'zeros.mp4 is a pipe or a device']]
    assert table.attrs['notes'] == ['left out: 1 (pipes or devices): pipe.mp4']
    put(tmp_path/'in', {'labels.csv': 'path\npipe.mp4\nzeros.mp4\nfolder.mp4\na.mp4\n'})
    _, rejected, rows = run('folder', tmp_path/'in', tmp_path/'out')
    assert len(rows) == 1 and rejected.reason.tolist() == ['not a file']*3
    for reader, name in (('folder', 'labels.csv'), ('vggss', 'vggss.json'), ('kinetics700', 'train.csv')):
        with pytest.raises(InputError, match=f'{name} is no file that can be read'):
            read_catalogue(reader, put(tmp_path/reader, {name: None, 'a.mp4': film}))


def test_a_folder_that_may_not_be_listed_is_told(tmp_path, monkeypatch):
    put(tmp_path, {'lost+found/a.mp4': '', 'b.mp4': ''})
    scandir = os.scandir
    def refuse(folder):
        if os.fspath(folder).endswith('lost+found'):
            raise PermissionError(13, 'Permission denied')
        return scandir(folder)
    monkeypatch.setattr(os, 'scandir', refuse)
    note, = read_catalogue('folder', tmp_path).attrs['notes']
    assert note == 'left out: 1 (folders that may not be listed): lost+found'
    with pytest.raises(InputError, match='cannot be listed: Permission denied'):
        listing(tmp_path/'lost+found')


TWICE = [ # reader, files, what the problem or the error says
    ('folder', {'labels.csv': 'path,label\na.mp4,dog\na.mp4,cat\n'},
     "labels.csv, line 2 and labels.csv, line 3 disagree about a.mp4: label 'dog' and label 'cat'"),
    ('folder', {'labels.csv': 'path,split\na.mp4,train\nb.mp4,train\n./a.mp4,test\n'},
     "line 2 and labels.csv, line 4 disagree about a.mp4: split 'train' and split 'test'"),
    ('folder', {'labels.csv': 'path,split\nsub//a.mp4,train\nsub/../sub/a.mp4,test\n'},
     'line 2 and labels.csv, line 3 disagree'),
    ('folder', {f'{NFC}.mp4': '', 'labels.csv': f'path,label\n{NFC}.mp4,dog\n{NFD}.mp4,cat\n'},
     'line 2 and labels.csv, line 3 disagree'),
    ('folder', {'labels.csv': 'path,start,end,label\na.mp4,1,2,dog\na.mp4,1.0,2.0,cat\n'},
     'line 2 and labels.csv, line 3 disagree'),
    ('esc50', {'meta/esc50.csv': 'filename,fold,category\nx.wav,1,dog\ny.wav,1,dog\nx.wav,2,dog\n'},
     'meta/esc50.csv, line 2 and meta/esc50.csv, line 4 disagree about x: fold 1 and fold 2'),
    ('kinetics700', {'train.csv': KINETICS + 'yoga,abc,1,2,train\n', 'val.csv': KINETICS + 'yoga,abc,1,2,val\n'},
     'train.csv, line 2 and val.csv, line 2 disagree about abc_000001_000002'),
    ('lrs2', {'train.txt': '12/1\n', 'test.txt': '12/1 NF\n'},
     "train.txt, line 1 and test.txt, line 1 disagree about main_12_1: split 'train' and split 'test'"),
    ('grid', {'video/a.mpg': '', 'video/a.mp4': '', 'align/a.align': '0 5 sil\n5 9 bin\n'},
     "video/a.mp4 and video/a.mpg disagree about a: path 'video/a.mp4' and path 'video/a.mpg'"),
    ('dfdc', {'dfdc_train_part_0/metadata.json': '{"a.mp4": {"label": "REAL", "split": "train"}, '
                                                 '"a.mp4": {"label": "FAKE", "split": "train", "original": "b.mp4"}}'},
     "'a.mp4' stands there twice")]


@pytest.mark.parametrize('reader, files, said', TWICE)
def test_rows_that_disagree_are_never_used(tmp_path, reader, files, said):
    put(tmp_path, files)
    if reader in ('folder', 'dfdc'):
        with pytest.raises(InputError, match=re.escape(said)):
            read_catalogue(reader, tmp_path)
    else:
        assert said in ' '.join(read_catalogue(reader, tmp_path).problem.dropna())


def test_rows_that_agree_count_once_and_are_told(tmp_path):
    lines = 'path,label,start,end', 'a.mp4,dog,,', 'a.mp4, dog ,,', 'a.mp4,cat,1,2', './a.mp4,cat,1,2'
    table = read_catalogue('folder', put(tmp_path, {'labels.csv': '\n'.join(lines) + '\n'}))
    assert table[['path', 'label', 'start']].values.tolist() == [['a.mp4', 'dog', None], ['a.mp4', 'cat', 1.0]]
    assert table.attrs['notes'] == ['listed twice, counted once: 2 clips: labels.csv, line 3, labels.csv, line 5']


def test_labels_csv_in_any_letters_and_one_only(tmp_path):
    put(tmp_path, {'LABELS.CSV': 'path,label\na.mp4,dog\n', 'a.mp4': '', 'b.mp4': '', 'c.txt': ''})
    table = read_catalogue('folder', tmp_path)
    assert table.label.tolist() == ['dog']
    assert table.attrs['notes'] == ['left out: 1 (not in LABELS.CSV): b.mp4',
                                    'left out: 1 (endings not of films or sounds): c.txt']
    put(tmp_path, {'labels.csv': 'path\nb.mp4\n'})
    if len(listing(tmp_path, ('.csv',))) < 2 and 'labels.csv' not in os.listdir(tmp_path):
        pytest.skip('this file system knows no capitals')
    with pytest.raises(InputError, match='LABELS.CSV and labels.csv: keep one'):
        read_catalogue('folder', tmp_path)


CSV = [ # content of a csv with the columns path and label; what is read, or the error
    (b'\xef\xbb\xbfpath,label\r\na.mp4,dog\r\n', [(2, 'a.mp4', 'dog')]),
    (b'path,label\n"a\nb.mp4",dog\nc.mp4,cat\n', [(2, 'a\nb.mp4', 'dog'), (4, 'c.mp4', 'cat')]),
    (b'path,label\n\n\na.mp4,\xc2\xa0dog\t\n', [(4, 'a.mp4', 'dog')]),
    (b'path,label\n a.mp4 ,x\n', [(2, ' a.mp4 ', 'x')]),
    (b'path,label\na.mp4,x\n,\n , \nb.mp4,y\n', 'line 3, 4: commas with nothing between them'),
    (b'path;label\na;b\n', 'separated by semicolons: use commas'),
    (b'path\tlabel\na\tb\n', 'separated by tabs: use commas'),
    (b'path,label,label\na,b,c\n', "two columns 'label'"), (b'', 'lacks|'),
    (b'path,label,,\na.mp4,dog,,\nb.mp4,cat, ,\n', [(2, 'a.mp4', 'dog'), (3, 'b.mp4', 'cat')]),
    (b'path,,,label\na.mp4,,,dog\n', 'two columns without a name'),
    ('path,label\n'.encode('utf-16'), 'not UTF-8')]


STRAY = { # what stands in which row of a list of 1,000 rows
    'never closed': {500: '"{0}.mp4,dog'},
    'closed by another stray quote': {500: '"{0}.mp4,dog', 900: '{0}.mp4,dog"'},
    'closed before a name': {500: '"{0}.mp4,dog', 900: '"{0}.mp4,dog'},
    'opened in the last cell': {500: '{0}.mp4,"dog', 900: '{0}.mp4,dog"'},
    'closed a few rows below, with another number of cells': {500: '"{0}.mp4,dog', 503: '{0}.mp4,dog"'}}


@pytest.mark.parametrize('case', STRAY)
def test_a_stray_quote_takes_no_rows_with_it(tmp_path, case):
    rows = [STRAY[case].get(k, '{0}.mp4,dog').format(k) for k in range(1000)]
    put(tmp_path, {'labels.csv': '\n'.join(['path,label', *rows, '']), '0.mp4': ''})
    with pytest.raises(InputError, match='a quote opened in line 502 of .*labels.csv is not closed before line'):
        read_catalogue('folder', tmp_path)


def test_a_stray_quote_in_an_official_list(tmp_path):
    rows = [f'yoga,id{k},1,2,train' for k in range(1000)]
    rows[500] = '"' + rows[500]
    put(tmp_path, {'train.csv': KINETICS + '\n'.join(rows) + '\n'})
    with pytest.raises(InputError, match='a quote opened in line 502 of .*train.csv'):
        read_catalogue('kinetics700', tmp_path)


def test_a_text_of_several_lines_is_one_cell(tmp_path):
    text = '\n'.join(['he said ""no""'] + ['and left']*9)
    put(tmp_path, {'labels.csv': f'path,text\na.mp4,"{text}"\nb.mp4,short\n"c.mp4\n', 'a.mp4': '', 'b.mp4': ''})
    table = read_catalogue('folder', tmp_path)
    assert table.text[0] == text.replace('""', '"') and table.path[1] == 'b.mp4'
    assert table.problem[2] == 'labels.csv, line 13: unexpected end of data'


@pytest.mark.parametrize('content, want', CSV)
def test_csv_files_as_spreadsheets_write_them(tmp_path, content, want):
    path = put(tmp_path, {'list.csv': content})/'list.csv'
    def read():
        rows = csv_rows(path, ['path', 'label'], exact=('path',))
        return [(number, row['path'], row['label']) for number, row in rows]

    if content == b'':
        assert read() == []
    elif isinstance(want, str):
        with pytest.raises(InputError, match=want):
            read()
    else:
        assert read() == want


def test_a_cell_in_a_column_without_a_name_spoils_its_row(tmp_path):
    put(tmp_path, {'labels.csv': 'path,label,,\na.mp4,x,,\nb.mp4,y,,mine\nc.mp4,z\n', 'a.mp4': ''})
    table = read_catalogue('folder', tmp_path)
    assert table.path[0] == 'a.mp4' and table.label[0] == 'x'
    assert table.problem.tolist() == [None, 'labels.csv, line 3: a cell in a column without a name', None]


def test_a_fold_of_five_thousand_digits_spoils_its_row(tmp_path):
    fold = '1'*5000
    put(tmp_path, {'meta/esc50.csv': f'filename,fold,category\na.wav,{fold},dog\nb.wav,2,dog\n', 'audio/b.wav': ''})
    table = read_catalogue('esc50', tmp_path)
    assert 'meta/esc50.csv, line 2' in table.problem[0] and 'is no number of a fold' in table.problem[0]
    assert table['clip'][1] == 'b' and table.fold[1] == 2 and table.problem[1] is None


def test_a_cell_that_is_too_long_or_has_no_text_spoils_one_row(tmp_path):
    put(tmp_path, {'labels.csv': b'path,label\na.mp4,' + b'x'*200_000 + b'\nn\0l.mp4,y\nb.mp4,z\n', 'b.mp4': ''})
    table = read_catalogue('folder', tmp_path)
    assert 'line 2: field larger than field limit' in table.problem[0]
    assert table.path.tolist()[1:] == ['n\0l.mp4', 'b.mp4'] and table['clip'][1] == 'n%00l.mp4'


def test_a_name_that_differs_in_capitals_or_spaces_is_told_with_the_right_one(tmp_path):
    put(tmp_path, {'A.MP4': '', 'sub/b c.mp4': '', 'labels.csv': 'path\na.mp4\nsub/b c.mp4 \nsub/d.mp4\n'})
    if (tmp_path/'a.mp4').exists():
        pytest.skip('this file system knows no capitals')
    assert read_catalogue('folder', tmp_path).problem.tolist() == [
        "labels.csv, line 2: there is no 'a.mp4', but 'A.MP4'",
        "labels.csv, line 3: there is no 'sub/b c.mp4 ', but 'sub/b c.mp4'", None]


DOWNLOADED = ['train/playing piano/ID.mkv', 'train/playing piano/ID.mp4.webm', 'train/playing piano/ID.MP4',
              'train/playing_piano/ID.mp4', 'train/ID.mp4', 'train/playing_piano/ID.mkv']


@pytest.mark.parametrize('there', DOWNLOADED)
def test_kinetics_as_downloaders_leave_it(tmp_path, there, film):
    name = '-id.B_CDEFGH_000010_000020'
    listed = KINETICS + 'playing piano,-id.B_CDEFGH,10,20,train\n'
    files = {there.replace('ID', name): film, f'train/playing piano/{name}.wav': ''}
    put(tmp_path/'k', {'train.csv': listed} | files)
    table, rejected, rows = run('kinetics700', tmp_path/'k', tmp_path/'out')
    assert rejected.empty and rows[0]['clip'] == name and rows[0]['path'] == there.replace('ID', name)
    assert 'found under another name than the list has: 1 files' in table.attrs['notes'][0]


@pytest.mark.parametrize('folder', ['val', 'validate'])
def test_two_lists_for_validation_name_a_clip_once(tmp_path, folder):
    lists = {f'{name}.csv': KINETICS + f'yoga,abc,1,2,{name}\nyoga,gone,1,2,{name}\n' for name in ('val', 'validate')}
    put(tmp_path, lists | {f'{folder}/yoga/abc_000001_000002.mp4': ''})
    table = read_catalogue('kinetics700', tmp_path)
    assert table.path.tolist() == [f'{folder}/yoga/{clip}_000001_000002.mp4' for clip in ('abc', 'gone')]
    assert table.problem.isna().all()


def test_an_ending_of_another_kind_is_another_file(tmp_path):
    put(tmp_path, {'vggss.json': '[{"file": "a", "class": "x", "bbox": [[0, 0, 1, 1]]}]'})
    put(tmp_path, {'clips/a.wav': '', 'clips/a.jpg': '', 'clips/.a.mkv': ''})
    assert read_catalogue('vggss', tmp_path).path.tolist() == ['clips/a.mp4']
    put(tmp_path/'own', {'labels.csv': 'path\na.mp4\n', 'a.mkv': ''})
    assert read_catalogue('folder', tmp_path/'own').path.tolist() == ['a.mp4'], 'names of an own list are exact'


def test_each_folder_is_listed_once_and_no_file_is_asked_for(tmp_path, monkeypatch):
    rows = [(f'class {i % 7}', f'id{i:09d}') for i in range(700)]
    put(tmp_path, {f'train/{label}/{clip}_000001_000002.mkv': '' for label, clip in rows[::2]})
    put(tmp_path, {'train.csv': KINETICS + ''.join(f'{label},{clip},1,2,train\n' for label, clip in rows)})
    listed, asked = [], []
    listdir, stat = os.listdir, os.stat
    monkeypatch.setattr(os, 'listdir', lambda folder: listed.append(str(folder)) or listdir(folder))
    monkeypatch.setattr(os, 'stat', lambda *args, **kw: asked.append(args) or stat(*args, **kw))
    table = read_catalogue('kinetics700', tmp_path)
    assert table.path.str.endswith('.mkv').sum() == 350
    assert len(listed) == len(set(listed)) <= 9 and len(asked) < 30


def failing(reader, folder, out, limit=1.0):
    with pytest.raises(InputError) as error:
        run(reader, folder, out, replace(CLIP, max_rejected=limit))
    return str(error.value)


def test_where_nothing_can_be_used_the_message_says_what_to_do(tmp_path):
    said = failing('folder', put(tmp_path/'in', {'a.mp4': '', 'b.mp4': 'x'}), tmp_path/'out')
    assert said.startswith('none of 2 clips can be used (2 x does not decode). For example ') and 'To do: ' in said
    assert 'max_rejected' not in said and str(tmp_path/'.out.unfinished'/'rejected.csv') in said
    said = failing('folder', put(tmp_path/'in', {'a.mp4': '', 'b.mp4': 'x'}), tmp_path/'out', 0.1)
    assert 'max_rejected' not in said, 'no limit below 1 would help'


def test_some_that_cannot_be_used_name_the_limit(tmp_path, film):
    said = failing('folder', put(tmp_path/'in', {'a.mp4': '', 'b.mp4': film, 'c.mp4': film}), tmp_path/'out', 0.1)
    assert '1 of 3 clips cannot be used (1 x does not decode), more than max_rejected = 0.1 allows' in said
    assert 'raise max_rejected' in said


def test_a_missing_file_names_the_folder_and_the_layout(tmp_path, film):
    listed = KINETICS + 'playing piano,abc,1,2,train\nyoga,def,1,2,train\n'
    put(tmp_path/'kinetics', {'train.csv': listed, 'train/yoga/other.mp4': film})
    said = failing('kinetics700', tmp_path/'kinetics', tmp_path/'out')
    rows = pd.read_csv(tmp_path/'.out.unfinished'/'rejected.csv')
    assert rows.reason.tolist() == ['missing file']*2
    label = 'kinetics/train/playing piano'
    assert f'{label}/abc_000001_000002.mp4: there is no folder {label}; expected: ' in rows.detail[0]
    assert 'kinetics/train/yoga/def_000001_000002.mp4: No such file or directory; expected: ' in rows.detail[1]
    for detail in (*rows.detail, said):
        assert '<split>/<label>/<id>_<start>_<end>.mp4' in detail
    assert not rows.detail.str.contains(str(tmp_path)).any(), 'another list on every machine'


def test_names_that_no_disk_can_have_are_missing_files(tmp_path, film):
    names = ['x'*300 + '.mp4', 'a/'*3000 + 'b.mp4', 'a.mp4/b.mp4', '\u0301.mp4']
    put(tmp_path/'in', {'a.mp4': film, 'labels.csv': 'path\na.mp4\n' + ''.join(f'{name}\n' for name in names)})
    _, rejected, rows = run('folder', tmp_path/'in', tmp_path/'out')
    assert len(rows) == 1 and rejected.reason.tolist() == ['missing file']*4
    listed = json.dumps([{'file': '\ud800', 'class': 'x', 'bbox': [[0, 0, 1, 1]]}])
    broken = put(tmp_path/'json', {'vggss.json': listed})
    assert 'is no name of a file' in failing('vggss', broken, tmp_path/'out')
