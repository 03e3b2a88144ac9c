"""The layout of the package: imports go one way, chapters are in reading order."""
import ast
import re

import nbformat
import pytest

from glcm.core import root

FLOORS = [ # a module imports from lower floors and from its own
    {'core'},
    {'processes', 'distributed'},
    {'encoders', 'attention', 'losses', 'model'},
    {'data'},
    {'datasets'},
    {'pretexts'},
    {'training'},
    {'tasks'},
    {'report'},
    {'miniature'},
    {'params', 'export', 'stage', 'jobs', 'study'},
    {'films', 'look', 'offset', 'embed', 'commands'},
    {'testing'},
    {'gpu'},
]
PARTS = ['core', 'encoders', 'attention', 'losses', 'model', 'distributed', 'processes', 'data', 'datasets', 'pretexts',
         'training', 'tasks', 'report', 'params', 'export', 'stage', 'jobs', 'study', 'testing',
         'films', 'look', 'offset', 'embed', 'commands', 'gpu', 'miniature']


def module_names(path):
    "The name of a module relative to the package, as parts: ('data', 'views')."
    return path.relative_to(root()/'glcm').with_suffix('').parts


def floor_of(name):
    return next(number for number, names in enumerate(FLOORS) if name in names)


def imported(path):
    "First parts of the names of all modules of the package that a module imports."
    names = module_names(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = names[:len(names) - node.level] + tuple((node.module or '').split('.'))
            yield target[0] or node.names[0].name


@pytest.mark.parametrize('path', sorted((root()/'glcm').rglob('*.py')), ids=lambda path: '.'.join(module_names(path)))
def test_imports_go_one_way(path):
    name = module_names(path)[0]
    if name.startswith('_'): # __init__ loads export when it is asked to
        return
    for other in set(imported(path)) - {'__version__'}:
        assert floor_of(other) <= floor_of(name), f'{path} imports from {other}'


def test_chapters_are_in_reading_order():
    found = []
    for path in sorted((root()/'nbs').glob('*.ipynb')):
        sources = [cell.source for cell in nbformat.read(path, 4).cells]
        directive = '#| default_exp '
        exports = [source.removeprefix(directive).strip() for source in sources if source.startswith(directive)]
        if not exports: # prose alone
            continue
        module, = exports
        assert path.stem.split('_', 1)[1] == module, f'{path.name} exports {module}'
        found.append(module.split('.')[0])
    assert found == sorted(found, key=PARTS.index)


@pytest.mark.parametrize('path', sorted((root()/'nbs').rglob('*.ipynb')), ids=lambda path: path.stem)
def test_notebooks_keep_no_logs(path):
    for number, cell in enumerate(nbformat.read(path, 4).cells):
        for output in cell.get('outputs', []):
            if output.output_type != 'stream':
                continue
            logged = output.name == 'stderr' or not output.text.strip() or re.search('it/s|s/it', output.text)
            assert not logged, f'cell {number} of {path.name} keeps a progress bar or a warning'
