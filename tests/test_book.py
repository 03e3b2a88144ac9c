"""The book has every chapter once, says what each argument is, and has no link that leads nowhere."""
import importlib.util
import json
import subprocess
import sys

import pytest

from glcm.core import root
from glcm.losses import global_bags

DOCS = root()/'docs'


def load(name):
    "A file of docs/ as a module."
    spec = importlib.util.spec_from_file_location(name, DOCS/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def conf():
    pytest.importorskip('latex2mathml')
    return load('conf')


def test_every_notebook_is_in_the_sidebar_once(conf):
    pages = [page for _, pages in conf.parts() for page in pages]
    notebooks = [path.relative_to(root()).with_suffix('').as_posix() for path in (root()/'nbs').rglob('*.ipynb')
                 if '.ipynb_checkpoints' not in path.parts]
    assert sorted(page for page in pages if page.startswith('nbs/')) == sorted(notebooks)
    assert pages.index('nbs/04_model') < pages.index('nbs/23_data.views') < pages.index('nbs/48_tasks.localize')


def test_chapter_has_no_directives_and_ends_with_its_reference(conf):
    cells = json.loads(conf.chapter((root()/'nbs'/'03_losses.ipynb').read_text()))['cells']
    sources = [''.join(cell['source']) for cell in cells]
    assert not any('#|' in source for source in sources)
    assert any('def global_bags' in source for source in sources)
    assert '.. automodule:: glcm.losses' in sources[-1]


def test_progress_bars_are_left_out(conf):
    stream = conf.nbformat.v4.new_output('stream', text='clips:  33%|=====   | 1/3 [00:07<00:14,  7.21s/it]\n2 clips\n')
    assert conf.without_progress(stream).text == '2 clips\n'
    assert conf.without_progress(conf.nbformat.v4.new_output('stream', text='100%|=====| 3/3\n')) is None


def test_comments_on_arguments_are_in_the_reference(conf):
    lines = ['Anchors and bags.']
    conf.document_arguments(None, 'function', 'glcm.losses.global_bags', global_bags, None, lines)
    assert ':param z_v: (B, D, H, W) global visual embeddings, one per cell' in lines
    assert r':returns: anchors (B, D), bags (H\*W, B, D)' in lines
    assert conf.as_rst('folder of `Shard`s, or *.jsonl') == r'folder of ``Shard``\ s, or \*.jsonl'


PAGE = '<a href="b.html#there">b</a> <a href="https://example.com">out</a> <img src="data:image/png;base64,AA">'
FAULTS = {
    '<a href="c.html">c</a>': 'c.html does not exist',
    '<a href="b.html#gone">b</a>': 'b.html#gone names no place',
    '<img src="gone.png">': 'gone.png does not exist',
    '<script src="https://example.com/x.js"></script>': 'needs another host',
}


@pytest.mark.parametrize('fault', FAULTS)
def test_wrong_links_are_found(tmp_path, fault):
    (tmp_path/'b.html').write_text('<h1 id="there">b</h1>')
    (tmp_path/'a.html').write_text(PAGE)
    assert load('links').wrong_links(tmp_path) == []
    (tmp_path/'a.html').write_text(PAGE + fault)
    wrong, = load('links').wrong_links(tmp_path)
    assert FAULTS[fault] in wrong


@pytest.mark.slow
def test_book_is_built_without_warnings(conf, tmp_path):
    pytest.importorskip('furo')
    build = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-c', DOCS, '-d', tmp_path/'trees', root(), tmp_path/'book']
    subprocess.run(build, check=True)
    assert load('links').wrong_links(tmp_path/'book') == []
    assert (tmp_path/'book'/'index.html').exists()
