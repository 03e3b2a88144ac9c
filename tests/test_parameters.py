"""What a params.yaml may hold: every parameter has bounds, all mistakes are told at once, no name leaves its folder."""
import copy
import json
import operator
import re
import shlex
from dataclasses import FrozenInstanceError

import jsonschema
import pytest
import yaml
from dvc.parsing.interpolate import to_str

from glcm.core import InputError, read_params, read_study, root
from glcm.data.audio import AudioConfig
from glcm.data.clip import ClipConfig
from glcm.data.workers import PreprocessConfig
from glcm.params import check_params, schema
from glcm.stage import names_of

STUDIES = (
    'full', 'pretexts', 'paper', 'grid', 'esc10', 'esc50_fold4', 'seeds', 'talkers',
    'lrwar', 'lrwar_frames', 'lrwar_lips', 'lrwar_near', 'lrwar_ten', 'lrwar_wide',
    'world', 'world_frames', 'world_long', 'world_near')
FILES = 'params.yaml', *(f'params.{study}.yaml' for study in STUDIES)
PARAMS = read_study('full')
BAD_NAMES = ['', '.', '..', '../x', 'a/../b', '/etc', 'a/b', 'a\\b', '-p', '--variant', '.hidden', 'a ', ' a',
             'a\n', 'a\nb', 'a\0', 'a' * 101,
             "x; touch PWNED", "x'; touch PWNED; '", 'x"y', '$(touch PWNED)', '${HOME}', '`touch PWNED`',
             'a&b', 'a|b', 'a>b', 'a*', 'a?', 'a!', 'a#', '~', 'a%b', '{x}']


def dvc_stages():
    "The stages of dvc.yaml; of one that runs for each dataset, what it does."
    stages = yaml.safe_load((root()/'dvc.yaml').read_text())['stages']
    return {name: stage.get('do', stage) for name, stage in stages.items()}


def told(params):
    "The mistakes of some parameters, a line each; none where they are accepted."
    try:
        check_params(params)
    except InputError as e:
        return str(e).splitlines()
    return []


# -- the files of the repository ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('study', ['default', *STUDIES])
def test_parameters_of_every_study_are_right_and_read_as_they_stand(study):
    sections = read_params() if study == 'default' else read_study(study)
    params = check_params(sections)
    for name in ('audio', 'store', 'preprocess', 'views', 'pretrain', 'machine', 'matrix', 'figures'):
        values = vars(getattr(params, name))
        assert {key: values[key] for key in sections[name]} == sections[name]
    datasets = sections['datasets']
    assert [params.datasets[name].fps for name in datasets] == [values['fps'] for values in datasets.values()]
    assert params.model == sections['model'] and params.loss == sections['loss'] and params.study == study


@pytest.mark.parametrize('study', STUDIES)
def test_a_study_holds_what_differs_and_nothing_else(study):
    "No value of its file is that of params.yaml, but for the paper's where a comment explains it."
    explained = {('views', 'flip'), ('views', 'gray'), ('model', 'detach_attention')} if study == 'paper' else set()

    def repeated(base, changes, place=()):
        found = set()
        for name, value in changes.items():
            if isinstance(value, dict) and isinstance(base.get(name), dict):
                found |= repeated(base[name], value, (*place, name))
            elif name in base and base[name] == value:
                found.add((*place, name))
        return found
    changes = read_params(root()/f'params.{study}.yaml')
    base = read_study(changes.pop('extends')) if 'extends' in changes else read_params()
    assert repeated(base, changes) == explained


def test_a_mistake_in_a_study_is_reported_as_one_in_the_whole(tmp_path):
    (tmp_path/'params.yaml').write_text((root()/'params.yaml').read_text())
    (tmp_path/'params.mine.yaml').write_text('pretrain: {stepz: 5}\nmatrix: {seeds: [0, 0]}\n')
    lines = told(read_study('mine', tmp_path))
    assert any("pretrain has no parameter 'stepz': did you mean 'steps'?" in line for line in lines)
    assert any('seeds holds 0 twice' in line for line in lines)


def test_schema_in_git_is_the_current_one():
    made = json.loads((root()/'params.schema.json').read_text())
    assert made == schema(), 'python -m glcm.params schema --out params.schema.json'
    for file in FILES:
        assert (root()/file).read_text().startswith('# yaml-language-server: $schema=params.schema.json\n')


@pytest.mark.parametrize('file', FILES)
def test_editors_find_no_mistake_in_the_files(file):
    jsonschema.validate(read_params(root()/file), schema())


@pytest.mark.parametrize('text', ['loss: {temperature: 0}', 'model: {widht: 3}',
                                  'variants: {a: {pretext: {queue: 1.5}}}', 'seeds: [0]'])
def test_editors_find_mistakes(text):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), schema())


def test_every_parameter_has_a_meaning():
    parts = {name: part for name, part in schema()['$defs'].items()} | dict(Params=schema())
    for name, part in parts.items():
        for key, values in part['properties'].items():
            assert 'description' in values, f'{name}.{key}'


# -- mutations ---------------------------------------------------------------------------------------------------------

WRONG = dict(
    text='abc', digits='3', true=True, list=[1], section=dict(a=1), null=None, negative=-1,
    small_negative=-0.5, zero=0, half=2.5, huge=10**12,
    huge_float=1e300, longer_than_a_float=10**400, infinite=float('inf'), minus_infinite=float('-inf'),
    nan=float('nan'))
MAY_BE_NULL = {'clips', 'min_frames', 'reader', 'path'}
MAY_BE_ZERO = {
    'seed', 'seeds', 'max_rejected', 'shift', 'flip', 'gray', 'local_embedding', 'grid', 'local_weight', 'silence', 'block',
    'steps', 'warmup_steps', 'weight_decay',
    'workers', 'restarts', 'checkpoint_minutes', 'frozen', 'frames', 'momentum', 'hard', 'hard_from',
    'penalty', 'dropout'}
REQUIRED = 'audio', 'store', 'world', 'views', 'model', 'loss', 'pretrain', 'machine', 'localize', 'figures'


def leaves(values, place=()):
    "Places of all values that are no sections or lists, and of empty ones."
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for name, value in items:
        if isinstance(value, (dict, list)) and value:
            yield from leaves(value, (*place, name))
        else:
            yield (*place, name)


def at(values, place):
    for part in place:
        values = values[part]
    return values


def without_aliases(values):
    if isinstance(values, dict):
        return {name: without_aliases(value) for name, value in values.items()}
    return [without_aliases(value) for value in values] if isinstance(values, list) else values


MUTABLE = without_aliases(PARAMS)
PLACES = [(place, at(MUTABLE, place)) for place in leaves(MUTABLE)]


def told_with(place, change):
    "The mistakes when `change` is made to the section or list that holds the value at `place`."
    holder = at(MUTABLE, place[:-1])
    before = copy.copy(holder)
    change(holder)
    try:
        return told(MUTABLE)
    finally:
        holder.clear()
        holder.update(before) if isinstance(before, dict) else holder.extend(before)


def parameter(place): return next(part for part in reversed(place) if isinstance(part, str))


def is_not_looked_up(place):
    "Free texts, folders, and names in what is not run."
    if place[0] == 'variants' and 'datasets' in place:
        return True
    return place[0] == 'study' or place == ('figures', 'data') or place[-1] == 'path'


def may_be(kind, place, original):
    "Whether a value of this kind makes sense for the parameter at `place`."
    if kind in ('text', 'digits'):
        return isinstance(original, str) and is_not_looked_up(place)
    if kind == 'true':
        return isinstance(original, bool)
    if kind == 'null':
        return parameter(place) in MAY_BE_NULL
    if kind == 'list':
        return isinstance(original, list) # an empty one has no leaves of its own
    if kind == 'zero':
        return parameter(place) in MAY_BE_ZERO and not isinstance(original, bool)
    return kind == 'half' and isinstance(original, float)


@pytest.mark.parametrize('kind', WRONG)
def test_each_leaf_with_a_value_of_another_kind(kind):
    for place, original in PLACES:
        lines = told_with(place, lambda holder: operator.setitem(holder, place[-1], WRONG[kind]))
        assert lines or may_be(kind, place, original), f'{kind} is accepted at {place}'
        assert all(len(line) < 800 for line in lines)
        if lines: # without the local loss, the local encoder is not trained
            said = ' '.join(lines)
            untrained = place == ('loss', 'local_weight') and "does not train the part 'local'" in said
            assert parameter(place) in said or untrained, (place, lines)


def test_each_leaf_left_out():
    for place, original in PLACES:
        lines = told_with(place, lambda holder: holder.pop(place[-1]))
        if isinstance(place[-1], str) and place[0] in (*REQUIRED, 'study'):
            assert lines and parameter(place) in ' '.join(lines), place


def test_each_parameter_misspelt():
    "The message says which name was meant."
    found = 0
    for place, original in PLACES:
        names_of_rows = place[:2] == place and place[0] in ('variants', 'settings')
        if not isinstance(place[-1], str) or place[0] in ('matrix', 'experiments') or names_of_rows:
            continue
        name = place[-1]
        lines = told_with(place, lambda holder: holder.update({f'{name}x': holder.pop(name)}))
        if name not in ('target', 'kind'): # without which nothing says what the others should be
            said = ' '.join(lines)
            is_corrected = f"no parameter '{name}x': did you mean '{name}'?" in said
            assert is_corrected or 'in choose may differ' in said, (place, lines)
        found += 1
    assert found > 150


def test_each_section_left_out_or_of_another_kind():
    for name in PARAMS:
        for value in (None, 0, 'abc', [], [1], True, {}, {1: 2}, {'a b': 'c'}, {None: None}):
            if (name, value) in [('experiments', {}), ('preprocess', {}), ('study', 'abc')]: # which are right
                continue
            assert name in ' '.join(told(PARAMS | {name: value})), (name, value)
        without = {section: values for section, values in PARAMS.items() if section != name}
        assert told(without)


@pytest.mark.parametrize('section', ['datasets', 'variants', 'finetune', 'settings'])
@pytest.mark.parametrize('value', [None, 0, 'abc', [], [1], True])
def test_each_row_of_another_kind(section, value):
    for name in PARAMS[section]:
        rows = PARAMS[section] | {name: value}
        lines = told(PARAMS | {section: rows})
        assert f'{section}.{name} should be a section' in '\n'.join(lines), (name, lines)


# -- many mistakes -----------------------------------------------------------------------------------------------

def test_all_mistakes_are_told_at_once():
    params = copy.deepcopy(PARAMS)
    params['loss']['temperature'] = float('inf')
    params['model']['widht'] = params['model'].pop('width')
    params['machine']['gpus'] = '1'
    params['variants']['paper']['views']['shift'] = -3
    params['settings']['tenth']['labels'] = 10
    params['matrix']['variants'] = ['glcm', 'sratch']
    params['datasets']['holiday'] = dict(path='holiday', fps=10, short_side=64, max_rejected=0.1)
    lines = told(params)
    for text in ('loss.temperature should be a finite number, not .inf',
                 "model has no parameter 'widht': did you mean 'width'?", "model lacks 'width'",
                 "machine.gpus should be a whole number, not '1'",
                 'variants.paper.views.shift should be 0 or more, not -3',
                 'settings.tenth.labels should be 1 or less, not 10',
                 'datasets.holiday.reader should say which layout'):
        assert sum(text in line for line in lines) == 1, (text, lines)
    params = copy.deepcopy(PARAMS)
    params['matrix']['variants'] = ['glcm', 'sratch']
    params['experiments'] = dict(vggss=dict(plain=['glcm']), lrw=dict(plain=['scratch']))
    params['localize']['dataset'] = 'vgss'
    lines = told(params)
    for text in ("matrix.variants names 'sratch', which `variants` has not: did you mean 'scratch'?",
                 "experiments names 'vggss', which `finetune` has not",
                 "experiments.lrw.plain names 'scratch', which `matrix.variants` has not",
                 "localize.dataset names 'vgss', which `datasets` has not: did you mean 'vggss'?"):
        assert sum(text in line for line in lines) == 1, (text, lines)


@pytest.mark.parametrize('place', [('loss', 'temperature'), ('model', 'attention_temperature'), ('pretrain', 'lr'),
                                   ('variants', 'moco', 'pretext', 'temperature'), ('settings', 'tenth', 'labels')])
def test_numbers_that_are_nothing_in_32_bits_are_told(place):
    for value in (1e-300, 5e-324):
        line, = told_with(place, lambda holder: holder.update({place[-1]: value}))
        assert '.'.join(place) in line and f'or more, not {value}' in line


@pytest.mark.parametrize('name, shown', [(None, 'null'), (2026, '2026'), (True, 'true')])
def test_a_name_that_is_no_text_is_told_with_its_section(name, shown):
    datasets = PARAMS['datasets'] | {name: PARAMS['datasets']['esc50']}
    lines = told(PARAMS | dict(datasets=datasets))
    assert any(f'a name in datasets should be a text, not {shown}' in line for line in lines), lines


@pytest.mark.parametrize('section, values, message', [
    ('variants', dict(glcm=dict(views=dict(frames=18))),
     'cannot be spread evenly over views.frames = 18 (variant glcm)'),
    ('variants', dict(scratch=dict(model=dict(slices_per_step=5))), 'is not divisible by'),
    ('variants', dict(glcm=dict(pretrain=dict(datasets=['flickr_soundnet']))),
     "pretrain.datasets names flickr_soundnet; `datasets` has: kinetics700"),
    ('variants', dict(glcm=dict(model=dict(bands=3))), "variants.glcm.model has no parameter 'bands'"),
    ('settings', dict(plain=dict(frames=0)), 'with audio, frames should say how long a window is'),
    ('settings', dict(plain=dict(layers=3)), "no parameter 'layers'"),
    ('settings', dict(plain=dict(choose=[dict(lr=-1)])), 'choose[0].lr should be 1e-12 or more, not -1'),
])
def test_what_is_wrong_only_after_merging(section, values, message):
    lines = told(PARAMS | {section: PARAMS[section] | values})
    assert any(message in line for line in lines), lines


# -- names -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', BAD_NAMES)
def test_names_that_would_reach_a_shell_or_leave_a_folder(name):
    "Refused where the file is read, and by each stage once more."
    matrix = PARAMS['matrix']
    for params, where in (
            (PARAMS | dict(study=name), 'study'),
            (PARAMS | dict(datasets=PARAMS['datasets'] | {name: PARAMS['datasets']['esc50']}), 'datasets'),
            (PARAMS | dict(variants=PARAMS['variants'] | {name: {}}), 'variants'),
            (PARAMS | dict(finetune=PARAMS['finetune'] | {name: PARAMS['finetune']['esc50']}), 'finetune'),
            (PARAMS | dict(settings=PARAMS['settings'] | {name: {}}), 'settings'),
            (PARAMS | dict(localize=dict(dataset=name)), 'localize.dataset'),
            (PARAMS | dict(matrix=matrix | dict(variants=[name])), 'matrix.variants[0]'),
            (PARAMS | dict(experiments={name: dict(plain=['glcm'])}), 'experiments'),
            (PARAMS | dict(experiments=dict(esc50={name: ['glcm']})), 'experiments.esc50'),
            (PARAMS | dict(experiments=dict(esc50=dict(plain=[name]))), 'experiments.esc50.plain[0]')):
        expected = f'{where} should be', f'a name in {where} should be'
        lines = [line.removeprefix('params.yaml: ').strip() for line in told(params)]
        assert any(line.startswith(expected) for line in lines), where
    for option in ('dataset', 'variant', 'task'):
        with pytest.raises(InputError, match=f'^{option} should be'):
            names_of({option: name}, PARAMS)
    with pytest.raises(InputError, match='^study should be'):
        names_of({}, PARAMS | dict(study=name))
    with pytest.raises(InputError, match='^localize.dataset should be'):
        names_of({}, PARAMS | dict(localize=dict(dataset=name)))


def test_names_with_spaces_are_good():
    params = copy.deepcopy(PARAMS)
    params['study'] = 'my study 1.0'
    params['datasets']['my films'] = params['datasets']['kinetics700'] | dict(path='films of 2026', reader='folder')
    params['variants']['my-variant_2'] = {}
    params['matrix']['variants'] = ['my-variant_2']
    params['experiments'] = {}
    params['localize']['dataset'] = 'my films'
    assert told(params) == []


def test_commands_get_names_from_nothing_but_the_dictionary_that_dvc_quotes():
    stages = dvc_stages()
    for name, stage in stages.items():
        command = stage['cmd'][0] if isinstance(stage['cmd'], list) else stage['cmd']
        words = [word for word in shlex.split(command) if '$' in word]
        assert set(words) <= {'${run}', '${item}'} - ({'${item}'} if name == 'preprocess' else set()), (name, words)
    for name in BAD_NAMES:
        assert shlex.split(to_str(dict(dataset=name))) == ['--dataset', name]


def test_every_stage_comes_after_the_check():
    "What a stage depends on leads to the check of the parameters."
    stages = dvc_stages()
    def folder(path):
        return path.split('$')[0].rstrip('/')

    outs = {}
    for name, stage in stages.items():
        for out in stage['outs']:
            outs[folder(next(iter(out)) if isinstance(out, dict) else out)] = name

    def before(name):
        return {outs[folder(path)] for path in stages[name]['deps'] if folder(path) in outs}

    for name in stages:
        seen, todo = set(), [name]
        while todo:
            seen.add(one := todo.pop())
            todo += before(one) - seen
        assert 'check' in seen, name


def test_what_is_named_by_a_name_alone_is_not_removed_by_dvc():
    "Of these paths DVC would remove whatever `..` makes of them, before a stage begins."
    stages = dvc_stages()
    for stage in stages.values():
        for out in stage['outs']:
            path, options = next(iter(out.items())) if isinstance(out, dict) else (out, {})
            assert not path.endswith('}') or options.get('persist') or path.endswith('-${item.seed}'), path


# -- YAML --------------------------------------------------------------------------------------------------------

TEN_TIMES = [f'a{k}: &a{k} [{", ".join([f"*a{k - 1}"]*10)}]\n' for k in range(1, 30)]
LAUGHS = 'a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(TEN_TIMES)

@pytest.mark.parametrize('text, message', [
    (b'', 'is empty'), (b'# nothing\n', 'is empty'), (b'- 1\n- 2\n', 'should hold sections'),
    (b'abc', 'should hold sections'), (b'12', 'should hold sections'),
    (b'a: 1\nb: 2\na: 3\n', "line 1: 'a' stands 2 times"),
    (b'a:\n  b: 1\n  b: 1\n', "line 2: 'b' stands 2 times"), (b'a: {b: 1, b: 2}', "'b' stands 2 times"),
    (b'a: &a [*a]\n', 'holds itself'), (b'a: &a {b: *a}\n', 'holds itself'),
    (b'a: &a\n  b: {c: [*a]}\n', 'holds itself'), (b'a: *b\n', 'undefined alias'),
    (LAUGHS.encode(), 'once its aliases are written out'), (b'a: "\xe9"\n', 'UTF-8'),
    ('a: é\n'.encode('utf-16'), 'UTF-8'), (b'\xff\xfe', 'UTF-8'),
    (b'a:\n\tb: 1\n', 'line 2'), (b'a: [1, 2\n', 'not valid YAML'), (b'a: 1\n b: 2\n', 'not valid YAML'),
    (b'a: !!python/object/apply:os.system [ls]\n', 'not valid YAML'),
    (b'a: 1\n---\nb: 2\n', 'not valid YAML'), (b'a: \x00\n', 'not valid YAML'),
    (b'[' * 1000, 'nested too deeply'), (b'{a: ' * 5000, 'nested too deeply'),
    (b'a: ' + b'9' * 5000, 'cannot be read'), (b'a: 2026-02-30\n', 'cannot be read'),
    (b'a: !!bool maybe\n', 'cannot be read'), (b'a: !!int x\n', 'cannot be read'),
    (b'a: ' + b'x' * 2_000_000, 'has 2000003 bytes'), ('a: x\u0085# y\n'.encode(), 'U+0085'),
    ('a: x\u2028b: y\n'.encode(), 'U+2028'), (b'? [1]\n: 2\n', 'not valid YAML')])
def test_a_yaml_file_that_is_none(tmp_path, text, message):
    "One sentence each, at once."
    (tmp_path/'params.yaml').write_bytes(text)
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        read_params(tmp_path/'params.yaml')
    assert str(raised.value).startswith(str(tmp_path))
    assert '\n' not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(InputError, match='does not exist'):
        read_params(tmp_path/'params.yaml')
    with pytest.raises(InputError, match='cannot be read'):
        read_params(tmp_path)


@pytest.mark.parametrize('text',
                         [b'\xef\xbb\xbfa: 1\r\nb: &x {c: 1}\r\nd: *x\r\n', b'a: 1\nb: &x {c: 1}\nd:\n  <<: *x\n'])
def test_what_editors_and_people_write_is_read(tmp_path, text):
    "A byte order mark, line ends of Windows, aliases and merged sections."
    (tmp_path/'params.yaml').write_bytes(text)
    assert read_params(tmp_path/'params.yaml') == dict(a=1, b=dict(c=1), d=dict(c=1))


# -- classes in Python -------------------------------------------------------------------------------------------

def test_configurations_made_in_python_are_checked_too():
    for make in (lambda: ClipConfig(0, 64, 0.1), lambda: ClipConfig(fps=10, short_side=63, max_rejected=0.1),
                 lambda: AudioConfig(24000, 80, 1024, '200'),
                 lambda: PreprocessConfig(time_limit=float('nan')), lambda: PreprocessConfig('tcp://nowhere'),
                 lambda: PreprocessConfig(limit=3)):
        with pytest.raises(InputError):
            make()
    with pytest.raises(FrozenInstanceError):
        ClipConfig(10, 64, 0.1).fps = 3
