"""The notebooks are the source: `glcm/` is what they export, and nothing of the author's machine is left in them."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p.relative_to(ROOT) for p in (ROOT / 'glcm').rglob('*.py'))

ADDRESSES = {
    'package index': re.compile(r'pypi[.]|pythonhosted[.]|\s--(?:extra-)?index-url|\s--(?:find-links|trusted-host)'),
    'path of one machine': re.compile(r'(?<![\w.~-])/(?:home|Users|root|work|workspace)/\w'),
    'path of this clone': re.compile(r'(?<![\w.~-])' + re.escape(f'{ROOT}{os.sep}')),
}


def files_below(folder, pattern):
    "Bytes of every file below `folder` that fits `pattern`, by relative path; checkpoints of the editor left out."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob(pattern))
            if '.ipynb_checkpoints' not in p.parts}


def differing(ours, theirs):
    "Names that only one side has, or whose bytes differ."
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned into an otherwise empty package."
    copy = tmp_path_factory.mktemp('export')
    shutil.copy(ROOT / 'settings.ini', copy)
    shutil.copytree(ROOT / 'nbs', copy / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for init in (ROOT / 'glcm').rglob('__init__.py'):
        target = copy / init.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(init, target)
    # nbdev writes a file of its own below the user's configuration folder.
    env = dict(os.environ, XDG_CONFIG_HOME=str(copy / '.config'))
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, env=env, check=True)
    return copy


def test_modules_are_what_the_notebooks_export(exported):
    wrong = differing(files_below(ROOT / 'glcm', '*.py'), files_below(exported / 'glcm', '*.py'))
    assert not wrong, f'edit the notebook, not the module; stale modules must be deleted: {wrong}. Run nbdev_export'


def test_notebooks_are_clean(exported):
    wrong = differing(files_below(ROOT / 'nbs', '*.ipynb'), files_below(exported / 'nbs', '*.ipynb'))
    assert not wrong, f'run nbdev_clean: {wrong}'


@pytest.mark.parametrize('module', MODULES, ids=str)
def test_module_imports_names_explicitly(module):
    tree = ast.parse((ROOT / module).read_text(encoding='utf-8'))
    stars = [node.lineno for node in ast.walk(tree)
             if isinstance(node, ast.ImportFrom) and any(name.name == '*' for name in node.names)]
    assert not stars, f'{module} imports * in lines {stars}'


def tracked_texts():
    "Text files that git tracks or would add."
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split('\0')):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b''
        if b'\0' not in content:
            yield name, content.decode('utf-8', errors='replace')


@pytest.mark.parametrize('kind', ADDRESSES)
def test_no_address_in_the_repository(kind):
    found = [f'{name}: {text[max(m.start() - 30, 0):m.end() + 30]!r}'
             for name, text in tracked_texts() for m in ADDRESSES[kind].finditer(text)]
    assert not found, '\n'.join([kind, *found])
