"""Readers of official layouts: what they make of correct, damaged and hostile lists."""
import hashlib
import json
import random

import numpy as np
import pytest

from glcm.core import InputError, inside
from glcm.data.table import COLUMNS, clip_name, training_order
from glcm.datasets.catalogue import EXPECTED, READERS, leaks, read_catalogue
from glcm.datasets.lipreading import word_window

ALIGN = '''0 5000 sil
5000 10000 bin
10000 15000 blue
15000 20000 at
20000 21000 sp
21000 25000 f
25000 30000 two
30000 74500 now
'''
KINETICS = 'label,youtube_id,time_start,time_end,split\n'
XML = ('<r><a><bbox><t>x</t><a>0</a><b>0</b><c>{}</c><d>256</d></bbox></a>'
       '<a><bbox><t>x</t><a>64</a><b>0</b><c>256</c><d>256</d></bbox></a></r>')
LRWAR = 'clip,split,speaker,width,mouth_x0,mouth_y0,mouth_x1,mouth_y1\n'
ESC = 'filename,fold,target,category,esc10,src_file,take\n'
UCF = 'ucfTrainTestlist/'
HMDB = 'testTrainMulti_7030_splits/'


def ucf(test, clips):
    "The six lists and the classes for clips 'Class gXX', with those of `test` (a set per split) for testing."
    files = {UCF + 'classInd.txt': '1 Basketball\n2 YoYo\n'}
    names = {clip: '{0}/v_{0}_{1}_c01.avi'.format(*clip.split()) for clip in clips}
    for k, tested in enumerate(test, 1):
        training = [clip for clip in clips if clip not in tested]
        files[f'{UCF}testlist0{k}.txt'] = ''.join(f'{names[clip]}\n' for clip in clips if clip in tested)
        lines = [f"{names[clip]} {1 + clip.startswith('YoYo')}\r\n" for clip in training]
        files[f'{UCF}trainlist0{k}.txt'] = ''.join(lines)
    return files


GOOD = {
    'kinetics700': {'train.csv': KINETICS + 'singing,abc-_defghi,3,13,train\n',
                    'val.csv': KINETICS + '"yoga, hot",x1234567890,0,10,val\n'},
    'kinetics_sounds': {'train.csv': KINETICS + 'singing,abc-_defghi,3,13,train\nyoga,x1234567890,0,10,train\n'},
    'avspeech': {'avspeech_train.csv': 'abc,1.5,4.5,0.25,0.5\n', 'avspeech_test.csv': 'def,1,4,0,1\n'},
    'lrw': {f'lipread_mp4/ABOUT/{split}/ABOUT_00001.{ending}': 'Duration: 0.58 seconds\n'
            for split in ('train', 'val', 'test') for ending in ('mp4', 'txt')},
    'lrwar': {'lipread_mp4/ABOUT/train/ABOUT_00001.mp4': '',
              'lipread_mp4/ABOUT/train/ABOUT_00001.txt': 'Duration: 0.58 seconds\n',
              'clips.csv': LRWAR + 'ABOUT_00001,train,p01,256,108,139,141,155\n'},
    'lrs2': {'train.txt': '12/00001\n', 'test.txt': '13/00001 NF\n',
             'mvlrs_v1/main/12/00001.txt': 'Text:  IT IS\nConf:  3\n'},
    'grid': {'s1/bbaf2n.mpg': '', 's1/align/bbaf2n.align': ALIGN},
    'grid_words': {'video/bbaf2n.mp4': '', 'align/bbaf2n.align': ALIGN},
    'dfdc': {'dfdc_train_part_3/metadata.json': '{"a.mp4": {"label": "FAKE", "split": "train", "original": "b.mp4"}}'},
    'ucf101': ucf([{'YoYo g01'}]*3, ['YoYo g01', 'Basketball g02']),
    'hmdb51': {f'{HMDB}run_test_split{k}.txt': 'Film_run_f_cm_np1_fr_bad_0.avi 1 \n' for k in (1, 2, 3)},
    'esc50': {'meta/esc50.csv': ESC + '1-5-A-0.wav,1,0,dog,True,5,A\n'},
    'esc10': {'meta/esc50.csv': ESC + '1-5-A-0.ogg,1,0,dog,True,5,A\n'},
    'esc50_sources': {'meta/esc50.csv': ESC + '1-5-A-0.wav,1,0,dog,True,5,A\n1-6-A-0.wav,1,0,dog,True,6,A\n'},
    'vggss': {'vggss.json': '[{"file": "abc_000001", "class": "dog", "bbox": [[0, 0, 0.5, 1]]}]'},
    'flickr_soundnet': {'Annotations/12.xml': XML.format(128)}, 'folder': {'a/b.mp4': ''}}


def put(folder, files):
    for name, data in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


@pytest.mark.parametrize('reader', READERS)
def test_every_reader_gives_the_same_columns_of_plain_values(reader, tmp_path):
    table = read_catalogue(reader, put(tmp_path, GOOD[reader]))
    assert list(table.columns) == COLUMNS and len(table) and table['clip'].is_unique
    rows = table.to_dict('records')
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert not any(v != v for row in rows for v in row.values())
    assert set(EXPECTED) == set(READERS)


@pytest.mark.parametrize('reader', READERS)
def test_wrong_nesting_and_empty_folders_say_what_was_expected(reader, tmp_path):
    (tmp_path/'empty').mkdir()
    with pytest.raises(InputError, match='^mine: '):
        read_catalogue(reader, tmp_path/'empty', 'mine')
    put(tmp_path/'deep'/'down'/'below', GOOD[reader])
    if reader == 'folder':
        return
    with pytest.raises(InputError) as error:
        read_catalogue(reader, tmp_path/'deep')
    assert 'expected' in str(error.value) or 'no file' in str(error.value)


# what is wrong with a list as a whole: reader, file to replace, its content (None: remove it), what the message names
WHOLE = [
    ('kinetics700', 'train.csv', b'label,\xff\n', r'train\.csv is not UTF-8'),
    ('kinetics700', 'train.csv', 'label,id\nx,y\n', 'lacks youtube_id, time_start, time_end'),
    ('kinetics700', 'train.csv', 'youtube_id,time_start,time_end\na,1,2\n', 'lacks label'),
    ('grid', 's1/align/bbaf2n.align', None, r'no \.align files in .*align'),
    ('lrwar', 'clips.csv', LRWAR + 'ABOUT_00001,train,p01,wide,1,2,3,4\n', r'clips\.csv, line 2: no split, width'),
    ('lrwar', 'clips.csv', None, r'no file .*clips\.csv'),
    ('dfdc', 'dfdc_train_part_3/metadata.json', '["a.mp4"]', 'should hold a dict'),
    ('dfdc', 'dfdc_train_part_3/metadata.json', '{"a.mp4"', 'not valid json'),
    ('dfdc', 'dfdc_train_part_3/metadata.json', None, r'no file .*dfdc_train_part_3/metadata\.json'),
    ('ucf101', UCF + 'classInd.txt', None, r'no file .*classInd\.txt'),
    ('ucf101', UCF + 'trainlist03.txt', None, r'no file .*trainlist03\.txt'),
    ('hmdb51', HMDB + 'run_test_split2.txt', None, r'no file .*run_test_split2\.txt'),
    ('esc10', 'meta/esc50.csv', 'filename,fold,category\na.wav,1,dog\n', 'lacks esc10'),
    ('vggss', 'vggss.json', '{"file": "a"}', 'should hold a list'),
    ('vggss', 'vggss.json', '['*100000, 'not valid json'),
    ('folder', 'labels.csv', 'path,lable\na/b.mp4,x\n', "column 'lable'; it takes: path, label")]


@pytest.mark.parametrize('reader, file, content, message', WHOLE)
def test_a_fault_of_a_whole_list_is_an_error_that_names_it(reader, file, content, message, tmp_path):
    put(tmp_path, GOOD[reader])
    if content is None:
        (tmp_path/file).unlink()
    else:
        put(tmp_path, {file: content})
    with pytest.raises(InputError, match=message):
        read_catalogue(reader, tmp_path)


# one line that is wrong: reader, file to replace, its content (None: remove it), the clip or line, the problem
LINES = [
    ('kinetics700', 'train.csv', KINETICS + 'singing,a,1,2,train\nsinging,b,x,2,train\n', 'train.csv, line 3',
     'b has no times'),
    ('kinetics700', 'train.csv', KINETICS + 'singing,a,nan,2,train\n', 'train.csv, line 2', 'a has no times'),
    ('kinetics700', 'train.csv', KINETICS + 'singing,a,1,2\nsinging,b,1,2,train\n', 'train.csv, line 2',
     '4 cells where 5 belong'),
    ('kinetics700', 'train.csv', KINETICS + '"sing"ing,a,1,2,train\nsinging,b,1,2,train\n', 'train.csv, line 2',
     'expected after'),
    ('kinetics_sounds', 'train.csv', KINETICS + 'singing,a,1,2\nsinging,b,1,2,train\n', 'train.csv, line 2',
     '4 cells where 5 belong'),
    ('avspeech', 'avspeech_train.csv', 'abc,1.5,4.5,0.25,0.5\nabc,1.5,4.5,0.25\n', 'avspeech_train.csv, line 2',
     '4 cells where 5 belong'),
    ('avspeech', 'avspeech_train.csv', 'abc,1.5,4.5,1.25,0.5\n', 'avspeech_train.csv, line 1', 'outside of the frame'),
    ('avspeech', 'avspeech_train.csv', 'abc,one,4.5,0.25,0.5\n', 'avspeech_train.csv, line 1', 'one'),
    ('lrw', 'lipread_mp4/ABOUT/train/ABOUT_00001.txt', 'Duration: long\n', 'train_ABOUT_00001',
     'train/ABOUT_00001.txt has no line like'),
    ('lrw', 'lipread_mp4/ABOUT/train/ABOUT_00001.txt', None, 'train_ABOUT_00001',
     'no file lipread_mp4/ABOUT/train/ABOUT_00001.txt'),
    ('lrs2', 'train.txt', '12/00001\n../00001\n', 'train.txt, line 2', "'../00001' is not <id>/<number>"),
    ('lrs2', 'train.txt', '/etc/passwd\n', 'train.txt, line 1', 'is not <id>/<number>'),
    ('lrs2', 'train.txt', '12/00001 XX\n', 'train.txt, line 1', 'is not <id>/<number>'),
    ('lrs2', 'mvlrs_v1/main/12/00001.txt', 'Conf: 3\n', 'main_12_00001', 'no line that begins with "Text:"'),
    ('lrs2', 'mvlrs_v1/main/12/00001.txt', 'Text: IT\nWORD START END ASDSCORE\nIT 0.1\n', 'main_12_00001',
     '00001.txt, line 3'),
    ('grid', 's1/align/bbaf2n.align', '0 5000 sil\n5000 bin\n', 's1_bbaf2n', 's1/align/bbaf2n.align, line 2'),
    ('grid', 's1/align/bbaf2n.align', '0 5000 sil\n', 's1_bbaf2n', 'has no words'),
    ('grid_words', 'align/bbaf2n.align', '0 5000 sil\n', 'bbaf2n', 'has no words'),
    ('dfdc', 'dfdc_train_part_3/metadata.json', '{"a.mp4": "FAKE"}', 'dfdc_train_part_3/metadata.json, video a.mp4',
     'are needed'),
    ('dfdc', 'dfdc_train_part_3/metadata.json', '{"a.mp4": {"label": "FAKE", "split": "train"}}',
     'dfdc_train_part_3/metadata.json, video a.mp4', "'original'"),
    ('dfdc', 'dfdc_train_part_3/metadata.json', '{"a.mp4": {"label": "MAYBE", "split": "train"}}',
     'dfdc_train_part_3/metadata.json, video a.mp4', 'MAYBE'),
    ('ucf101', UCF + 'classInd.txt', '1 Basketball\n2 YoYo\nthree\n', UCF + 'classInd.txt, line 3',
     "'three' is no number and class"),
    ('ucf101', UCF + 'trainlist01.txt', '\n../v_YoYo_g01_c01.avi 2\n', UCF + 'trainlist01.txt, line 2',
     'is not <Class>'),
    ('ucf101', UCF + 'trainlist01.txt', 'YoYo/v_Basketball_g03_c01.avi 2\n', UCF + 'trainlist01.txt, line 1',
     'is not <Class>'),
    ('ucf101', UCF + 'trainlist01.txt', 'YoYo/v_YoYo_g03_c01.avi 1\n', UCF + 'trainlist01.txt, line 1', 'does not fit'),
    ('ucf101', UCF + 'trainlist01.txt', 'YoYo/v_YoYo_g01_c01.avi 2\n', 'v_YoYo_g01_c01',
     'for training and for testing in split 1'),
    ('hmdb51', HMDB + 'run_test_split2.txt', 'Film_run_f_cm_np1_fr_bad_0.avi 3\n', HMDB + 'run_test_split2.txt, line 1',
     '0, 1 or 2'),
    ('hmdb51', HMDB + 'run_test_split2.txt', '../../x.avi 1\n', HMDB + 'run_test_split2.txt, line 1', '0, 1 or 2'),
    ('esc50', 'meta/esc50.csv', ESC + 'a.wav,one,0,dog,True,5,A\n', 'meta/esc50.csv, line 2', "'one' is no number"),
    ('esc10', 'meta/esc50.csv', ESC + 'a.wav,1,0\n', 'meta/esc50.csv, line 2', '3 cells where 7 belong'),
    ('vggss', 'vggss.json', '[{"file": "a", "class": "dog", "bbox": [0, 0, 1, 1]}]', 'vggss.json, item 1',
     'are needed'),
    ('vggss', 'vggss.json', '[{"file": 7, "class": "dog", "bbox": []}]', 'vggss.json, item 1', 'are needed'),
    ('flickr_soundnet', 'Annotations/12.xml', '<r><a>', '12', 'Annotations/12.xml is no annotation'),
    ('flickr_soundnet', 'Annotations/12.xml', XML.format('wide'), '12', 'Annotations/12.xml is no annotation'),
    ('folder', 'labels.csv', 'path,split\na/b.mp4,train\na/b.mp4,val\n', 'labels.csv, line 3',
     'split is train, validate or test, not val'),
    ('folder', 'labels.csv', 'path,start,end\na/b.mp4,5,4\n', 'labels.csv, line 2', 'end is not after start'),
    ('folder', 'labels.csv', 'path,start\na/b.mp4,1:30\n', 'labels.csv, line 2', 'start and end are seconds'),
    ('folder', 'labels.csv', 'path,label\n,x\n', 'labels.csv, line 2', 'there is no path')]


@pytest.mark.parametrize('reader, file, content, clip, problem', LINES)
def test_a_line_that_is_wrong_is_one_row_with_its_problem(reader, file, content, clip, problem, tmp_path):
    put(tmp_path, GOOD[reader])
    if content is None:
        (tmp_path/file).unlink()
    else:
        put(tmp_path, {file: content})
    table = read_catalogue(reader, tmp_path)
    wrong = table[table.problem.notna()]
    assert wrong['clip'].tolist() == [clip_name(clip)] and problem in wrong.problem.iloc[0]
    assert str(tmp_path) not in wrong.problem.iloc[0], 'another message on every machine'
    assert inside(tmp_path, wrong.path.iloc[0])


def test_official_lists_with_their_oddities_have_no_problems(tmp_path):
    "Lines as they stand in the lists that the authors publish, odd ones among them."
    files = {
        'ucf101': {f'{UCF}{side}list0{k}.txt': '' for side in ('train', 'test') for k in (1, 2, 3)} | {
            UCF + 'classInd.txt': '37 HandstandPushups\r\n38 HandstandWalking\r\n',
            UCF + 'trainlist01.txt': 'HandstandPushups/v_HandStandPushups_g08_c01.avi 37\r\n'
                                     'HandstandWalking/v_HandstandWalking_g08_c01.avi 38\r\n',
            UCF + 'testlist01.txt': 'HandstandPushups/v_HandStandPushups_g01_c01.avi\r\n'},
        'hmdb51': {f'{HMDB}kick_test_split{k}.txt': '#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi 1 \r\n'
                                                    'A_(2009)_[kick]!_&_50%_f_cm_np1_ba_bad_0.avi 2 \r\n'
                   for k in (1, 2, 3)},
        'lrs2': {'train.txt': '5535415699068794046/00001\n', 'val.txt': '6329000000000000000/00001\n',
                 'test.txt': '6330311066473698535/00011 NF\n6330311066473698535/00025 MV\n'},
        'kinetics700': {'train.csv': KINETICS
                        + 'testifying,---QUuC4vJs,84,94,train\n"baking cookies",-0WZKTu0xFk,116,126,train\n',
                        'test.csv': 'youtube_id,time_start,time_end,split\n--6bJUbfpnQ,17,27,test\n'},
        'avspeech': {'avspeech_train.csv': 'PmD-LzPS2rg,282.5823,285.5853,0.371875,0.425\n'
                                           '01qWxISqaHg,87,90,0.46875,0.303977\n'},
        'dfdc': {'dfdc_train_part_0/metadata.json':
                 '{"aagfhgtpmv.mp4":{"label":"FAKE","split":"train","original":"vudstovrck.mp4"},'
                 '"abarnvbtwb.mp4":{"label":"REAL","split":"train","original":null}}'},
        'vggss': {'vggss.json': '[{"file": "zpWuikVorYg_000032", "class": "elk bugling", '
                                '"bbox": [[0.4, 0.9, 0.7, -2.9e16], [0, 0.4, 1.1, 1]]}]'},
        'flickr_soundnet': {'Annotations/10000130166.xml': XML.format(128),
                            'flickr_test.csv': '10000130166,202\r\n10007936344,0\r\n'}}
    for reader, lists in files.items():
        table = read_catalogue(reader, put(tmp_path/reader, lists))
        assert table.problem.isna().all(), (reader, table.problem.dropna().tolist())
    pushups = read_catalogue('ucf101', tmp_path/'ucf101').set_index('clip').loc['v_HandStandPushups_g08_c01']
    assert (pushups.path, pushups.label) == ('UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi',
                                             'HandstandPushups')
    assert read_catalogue('lrs2', tmp_path/'lrs2').split.tolist() == ['train', 'validate', 'test', 'test']


@pytest.mark.parametrize('reader, file, content', [
    ('kinetics700', 'train.csv', KINETICS + '../../..,a,1,2,train\n'),
    ('avspeech', 'avspeech_train.csv', '../../../etc/a,1,2,0,0\n'),
    ('dfdc', 'dfdc_train_part_3/metadata.json', '{"../../a.mp4": {"label": "REAL", "split": "train"}}'),
    ('esc50', 'meta/esc50.csv', ESC + '../../a.wav,1,0,dog,True,5,A\n'),
    ('vggss', 'vggss.json', '[{"file": "../../abc", "class": "dog", "bbox": [[0, 0, 0.5, 1]]}]'),
    ('folder', 'labels.csv', 'path\n/etc/hosts\n'), ('folder', 'labels.csv', 'path\na/../../b.mp4\n')])
def test_a_path_that_leads_outside_stays_recognisable(reader, file, content, tmp_path):
    table = read_catalogue(reader, put(tmp_path/'data', GOOD[reader] | {file: content}))
    outside = 0
    for row in table.itertuples():
        assert inside(tmp_path, row.clip).parent == tmp_path
        (tmp_path/row.clip).touch()
        try:
            inside(tmp_path/'data', row.path)
        except InputError:
            outside += 1
    assert outside == 1


def test_clip_names_are_files_and_differ(tmp_path):
    names = ['a', 'a/b', 'a%2Fb', 'a\\b', '.a', '..', '.', 'ü', 'ü'*200, 'ü'*201, 'a\0b', 'a\nb', 'x'*300, 'con:1',
             '\udcff.mp4']
    for name in names:
        (tmp_path/clip_name(name)).touch()
    assert len(list(tmp_path.iterdir())) == len(names)


def test_ucf_lists_give_the_written_splits(tmp_path):
    clips = ['YoYo g01', 'YoYo g02', 'Basketball g01', 'Basketball g25']
    files = ucf([{'YoYo g01', 'Basketball g01'}, {'YoYo g02'}, {'Basketball g25'}], clips)
    files[UCF + 'trainlist03.txt'] = 'YoYo/v_YoYo_g01_c01.avi 2\n'   # leaves two clips out of the third split
    table = read_catalogue('ucf101', put(tmp_path, files)).set_index('clip')
    assert table.splits.to_dict() == {
        'v_YoYo_g01_c01': ['test', 'train', 'train'], 'v_YoYo_g02_c01': ['train', 'test', 'unused'],
        'v_Basketball_g01_c01': ['test', 'train', 'unused'], 'v_Basketball_g25_c01': ['train', 'train', 'test']}
    assert table.path['v_YoYo_g02_c01'] == 'UCF-101/YoYo/v_YoYo_g02_c01.avi'
    assert table.group.tolist().count('g01') == 2 and leaks(table.reset_index()).empty


@pytest.mark.parametrize('base', ['', 'hmdb51_org/', 'videos/'])
def test_hmdb_lists_give_the_written_splits(base, tmp_path):
    names = ['#122_ Kate_brush_hair_f_nm_np1_ba_goo_2.avi', 'A_(b)_brush_hair_u_cm_np2_le_med_6.avi']
    for k, a, b in [(1, 1, 0), (2, 2, 1), (3, 0, 2)]:
        put(tmp_path, {f'{HMDB}brush_hair_test_split{k}.txt': f'{names[0]} {a}\n{names[1]} {b} \n'})
    put(tmp_path, {f'{base}brush_hair/{name}': '' for name in names})
    table = read_catalogue('hmdb51', tmp_path)
    assert table.splits.tolist() == [['train', 'test', 'unused'], ['unused', 'train', 'test']]
    assert table.group.tolist() == ['#122_ Kate', 'A_(b)']
    assert all((tmp_path/path).exists() for path in table.path)


def test_lrw_word_stands_in_the_middle(tmp_path):
    table = read_catalogue('lrw', put(tmp_path, GOOD['lrw']))
    assert table.words[0] == [['ABOUT', 0.29, 0.87]]
    assert table['clip'].tolist() == ['train_ABOUT_00001', 'validate_ABOUT_00001', 'test_ABOUT_00001']
    assert read_catalogue('lrw', tmp_path/'lipread_mp4').split.tolist() == ['train', 'validate', 'test']


def test_lrs2_lists_may_name_clips_that_are_not_there(tmp_path):
    spoken = 'Text:  GO ON\n\nWORD START END ASDSCORE\nGO 0 1 2\nON 1 2.5 3\n'
    files = GOOD['lrs2'] | {'pretrain.txt': '12/00001\n', 'mvlrs_v1/pretrain/12/00001.txt': spoken}
    table = read_catalogue('lrs2', put(tmp_path, files))
    assert table.path.tolist() == [f'mvlrs_v1/{p}.mp4' for p in ('pretrain/12/00001', 'main/12/00001', 'main/13/00001')]
    assert table.text.tolist() == ['GO ON', 'IT IS', None] and table.words[0] == [['GO', 0, 1], ['ON', 1, 2.5]]
    assert leaks(table).empty
    table.loc[1, 'split'] = 'validate'
    assert leaks(table).values.tolist() == [['12', 1, ['train', 'validate'], 2]]


def grid_files(clips):
    return {f'video/{c}.mpg': '' for c in clips} | {f'align/{c}.align': ALIGN for c in clips}


def test_grid_split_does_not_depend_on_the_other_files(tmp_path):
    clips = [f'{i:06d}' for i in range(300)]
    everything = read_catalogue('grid', put(tmp_path/'all', grid_files(clips))).set_index('clip').split
    chosen = random.Random(1).sample(clips, 40)
    few = read_catalogue('grid', put(tmp_path/'few', grid_files(chosen))).set_index('clip').split
    assert (everything[few.index] == few).all()
    counts = everything.value_counts()
    assert 210 <= counts['train'] <= 270 and min(counts['validate'], counts['test']) >= 15
    for clip in clips[:20]:  # by hand: 80, 10 and 10 percent of the range of a checksum
        draw = int(hashlib.sha256(f'0/{clip}'.encode()).hexdigest()[:16], 16)/16**16
        assert everything[clip] == ('train' if draw < 0.8 else 'validate' if draw < 0.9 else 'test')
    words = read_catalogue('grid_words', tmp_path/'all')
    assert (words.split.to_numpy() == everything[[c.rpartition('_')[0] for c in words['clip']]].to_numpy()).all()


def test_grid_words_lie_in_their_windows(tmp_path):
    words = read_catalogue('grid_words', put(tmp_path, GOOD['grid_words']))
    assert words.label.tolist() == 'bin blue at f two now'.split()
    assert words[['start', 'end']].iloc[[0, 3, 5]].values.tolist() == [[0.0, 1.16], [0.34, 1.5], [1.51, 2.67]]
    assert words.words[3] == [['f', 0.5, 0.66]]
    lines = [line.split() for line in ALIGN.splitlines()]
    spoken = [[int(s)/25000, int(e)/25000] for s, e, w in lines if w not in ('sil', 'sp')]
    for row, (s, e) in zip(words.itertuples(), spoken):
        assert 0 <= row.start and row.end <= 74500/25000 and row.end - row.start == pytest.approx(1.16)
        _, begin, end = row.words[0]
        assert row.start + begin == pytest.approx(max(s, row.start))
        assert row.start + end == pytest.approx(min(e, row.end))
    assert word_window(['x', 0.2, 0.4], (0.1, 0.9)) == (0.1, 1.26)


def test_both_official_grid_layouts(tmp_path):
    files = {'s1/video/a.mpg': '', 's1/align/a.align': ALIGN, 's2/a.mpg': '', 'align/s2/a.align': ALIGN, 's2/b.mpg': ''}
    table = read_catalogue('grid', put(tmp_path, files))
    assert table[['clip', 'path', 'group']].values.tolist() == [
        ['s1_a', 's1/video/a.mpg', 's1'], ['s2_a', 's2/a.mpg', 's2'], ['s2_b', 's2/b.mpg', 's2']]
    assert table.text.tolist() == ['bin blue at f two now']*2 + [None]


def test_own_dfdc_lists_override(tmp_path):
    meta = {clip: dict(label='REAL', split='train') for clip in ('a.mp4', 'b.mp4', 'c.mp4')}
    meta['f.mp4'] = dict(label='FAKE', split='train', original='a.mp4')
    lists = {'validate.txt': 'b.mp4\nnot_there.mp4\n', 'test.txt': 'dfdc_train_part_3/f.mp4\n'}
    put(tmp_path, {'dfdc_train_part_3/metadata.json': json.dumps(meta)} | lists)
    table = read_catalogue('dfdc', tmp_path)
    assert table.split.tolist() == ['train', 'validate', 'train', 'test']
    assert leaks(table)[['group', 'sides']].values.tolist() == [['a.mp4', ['test', 'train']]]
    put(tmp_path, {'train.txt': 'c.mp4\n'})
    assert read_catalogue('dfdc', tmp_path).split.tolist() == [None, 'validate', 'train', 'test']
    put(tmp_path, {'train.txt': 'c.mp4\nb.mp4\n'})
    problems = read_catalogue('dfdc', tmp_path).problem.tolist()
    assert problems == [None, 'b.mp4 is in train.txt and in validate.txt', None, None]


def test_flickr_boxes_of_all_annotators_make_the_published_map(tmp_path):
    "The map that LVS and EZ-VSL compare with: half of each box, summed, at most 1."
    people = [(0, 0, 128, 256), (64, 0, 256, 256), (96, 0, 160, 256)]
    boxes = ''.join(f'<a><bbox><t>box</t><a>{a}</a><b>{b}</b><c>{c}</c><d>{d}</d></bbox></a>' for a, b, c, d in people)
    table = read_catalogue('flickr_soundnet', put(tmp_path, {'Annotations/12.xml': f'<r>{boxes}</r>'}))
    published, ours = np.zeros((256, 256)), np.zeros((256, 256))
    for x1, y1, x2, y2 in people:
        published[y1:y2, x1:x2] += 1/2
    for x1, y1, x2, y2, weight in table.boxes[0]:
        ours[round(256*y1):round(256*y2), round(256*x1):round(256*x2)] += weight
    assert np.array_equal(ours, published) and set(published[0].clip(max=1)) == {0.5, 1}


def test_training_order_depends_on_the_clips_alone(tmp_path):
    rows = [f'singing,id{i:09d},0,10,train\n' for i in range(500)]
    others = {'val.csv': KINETICS + 'singing,v,0,10,val\n', 'test.csv': KINETICS + 'singing,t,0,10,test\n'}
    table = read_catalogue('kinetics700', put(tmp_path/'a', {'train.csv': KINETICS + ''.join(rows)} | others))
    random.Random(0).shuffle(rows)
    again = read_catalogue('kinetics700', put(tmp_path/'b', {'train.csv': KINETICS + 'broken\n' + ''.join(rows[:450])}))
    order, kept = training_order(table)['clip'].tolist(), set(again['clip'])
    assert len(order) == 500 and set(training_order(table).split) == {'train'}
    assert training_order(again)['clip'].tolist() == [clip for clip in order if clip in kept]
    ranked = sorted(table['clip'][table.split == 'train'], key=lambda c: hashlib.sha256(f'3/{c}'.encode()).digest()[:8])
    assert training_order(table, seed=3)['clip'].tolist() == ranked


def test_what_counts_as_training_material(tmp_path):
    lists = {'pretrain.txt': '1/1\n', 'train.txt': '2/1\n', 'val.txt': '3/1\n', 'test.txt': '4/1 NF\n'}
    lrs2 = read_catalogue('lrs2', put(tmp_path/'lrs2', lists))
    assert set(training_order(lrs2).split) == {'pretrain', 'train'}
    meta = {c: dict(label='REAL', split='train') for c in ('a.mp4', 'b.mp4')}
    lists = {'dfdc_train_part_3/metadata.json': json.dumps(meta), 'train.txt': 'a.mp4\n'}
    dfdc = read_catalogue('dfdc', put(tmp_path/'dfdc', lists))
    assert training_order(dfdc)['clip'].tolist() == ['dfdc_train_part_3_a'] # the user's list leaves the other out
    assert len(training_order(read_catalogue('esc50', put(tmp_path/'esc50', GOOD['esc50'])))) == 1 # folds, no split
