"""The book: every chapter as a page, the reference of its module at its end. Built by `make docs`."""
import inspect
import json
import re
import shutil
import sys
from configparser import ConfigParser
from importlib import import_module
from itertools import accumulate
from pathlib import Path

import latex2mathml.converter
import nbformat
from docutils import nodes
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
settings = ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')

project, author = 'glcm', settings['DEFAULT']['author']
version = release = settings['DEFAULT']['version']
project_copyright = settings['DEFAULT']['copyright']
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx_copybutton']
root_doc = 'README'
include_patterns = ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'nbs/*.ipynb', 'nbs/*/*.ipynb', 'results/*.md', 'results/*/*.md',
                    'results/gpu/*/*.md', 'glcm/weights/README.md']
exclude_patterns = ['.*', '**/.*', 'artifacts', 'build', 'data', 'sample', 'studies', 'tests'] # not even searched

nb_execution_mode = 'off'
nb_ipywidgets_js = {} # a page asks no other host for anything
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented_params'
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False # those of torch name places in torch's own pages
default_role = 'code'

html_theme = 'furo'
html_title = 'glcm'
html_static_path = ['static']
html_css_files = ['book.css']
html_favicon = 'static/favicon.svg'
html_copy_source = html_show_sourcelink = False
html_math_renderer = 'mathml'
html_theme_options = dict(navigation_with_keys=True)

# Chapters by their number; what comes after the last bound is the appendix.
PARTS = [('Method', 0, 9), ('Data', 10, 23), ('Datasets', 24, 29), ('Pretexts', 30, 35), ('Training', 36, 39), ('Tasks', 40, 49),
         ('Report', 50, 59), ('Running it', 60, 69), ('Appendix: a drawn world', 70, 99)]


def parts() -> list: # of (title, names of pages)
    "The pages of the book in reading order."
    numbered = [path for path in sorted((ROOT/'nbs').glob('*.ipynb')) if path.stem[:2].isdigit()]
    tables = [f'Tables: {path.parent.name} <results/{path.parent.name}/tables>' for path in sorted((ROOT/'results').glob('*/tables.md'))]
    gpus = [f'On a GPU: {folder.name} <results/gpu/{folder.name}/README>' for folder in sorted((ROOT/'results'/'gpu').iterdir())]
    pages = [('Start', ['nbs/guide', 'nbs/explore/attention', 'results/README', *tables, *gpus,
                        'The weights <glcm/weights/README>', 'CONTRIBUTING', 'CHANGELOG'])]
    for title, first, last in PARTS:
        chapters = [f'nbs/{path.stem}' for path in numbered if first <= int(path.stem[:2]) <= last]
        pages.append((title, chapters))
    for title, folder in (('Stages', 'stages'), ('Benchmarks', 'benchmarks')):
        pages.append((title, [f'nbs/{folder}/{path.stem}' for path in sorted((ROOT/'nbs'/folder).glob('*.ipynb'))]))
    return pages


def contents() -> str: # Markdown
    "The tables of contents that make the sidebar."
    blocks = [f'```{{toctree}}\n:hidden:\n:caption: {title}\n\n' + '\n'.join(pages) + '\n```' for title, pages in parts()]
    return '\n\n' + '\n\n'.join(blocks) + '\n'


def module_of(notebook) -> str | None:
    "The module that a notebook exports; None where it is prose alone."
    for cell in notebook.cells:
        if cell.source.startswith('#| default_exp'):
            return cell.source.split()[2]
    return None


def without_progress(output):
    "An output of a cell without bars of progress and widgets; None where nothing is left."
    if output.output_type == 'stream':
        output.text = re.sub(r'^.*\d+%\|.*\n?', '', output.text, flags=re.MULTILINE)
        return output if output.text.strip() else None
    output.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)
    return output


REFERENCE = '''## Reference: `glcm.{module}`

```{{eval-rst}}
.. automodule:: glcm.{module}
   :members:
```'''


def chapter(text: str) -> str: # a notebook's JSON, as is and for a reader
    "A notebook without directives, hidden cells and widgets, with the reference of its module at its end."
    notebook = nbformat.reads(text, 4)
    module = module_of(notebook)
    notebook.cells = [cell for cell in notebook.cells if not re.match(r'#\| *(hide|default_exp)', cell.source)]
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            cell.source = re.sub(r'^#\|.*\n', '', cell.source, flags=re.MULTILINE)
            cell.outputs = [shown for output in cell.outputs if (shown := without_progress(output))]
    if module:
        notebook.cells.append(nbformat.v4.new_markdown_cell(REFERENCE.format(module=module)))
    # Where each cell begins. Without it cell n begins at line 10,000 n, and the reference is parsed below so many empty lines.
    lengths = [len(cell.source.splitlines()) for cell in notebook.cells]
    notebook.metadata.source_map = [0, *accumulate(lengths)][:-1]
    return nbformat.writes(notebook)


def read_source(app, page, source):
    "Sphinx reads a page: chapters for readers, the README with the sidebar."
    if page == root_doc:
        source[0] += contents()
    elif app.env.doc2path(page).suffix == '.ipynb':
        source[0] = chapter(source[0])


def import_modules(app):
    "Import what is documented, once; each process of Sphinx would do so anew."
    for page in sorted((ROOT/'nbs').glob('*.ipynb')):
        if module := module_of(nbformat.read(page, 4)):
            import_module(f'glcm.{module}')


def as_rst(comment: str) -> str:
    "A comment for Sphinx: names in backticks as code, everything else as it stands."
    parts = re.split('`([^`]*)`', ' '.join(comment.split()))
    parts[::2] = [re.sub(r'([*_|\\`])', r'\\\1', part) for part in parts[::2]]
    parts[1::2] = [f'``{part}``\\ ' for part in parts[1::2]]
    return ''.join(parts)


def document_arguments(app, what, name, thing, options, lines):
    "Put the comments on arguments and on the returned value where Sphinx looks for them."
    if not (inspect.isroutine(thing) or inspect.isclass(thing)):
        return
    try:
        comments = docments(thing, full=True)
    except (TypeError, OSError, SyntaxError): # nothing that Python could show the source of
        return
    lines.append('')
    for argument, about in comments.items():
        if about.get('docment'):
            text = as_rst(about['docment'])
            lines.append(f':returns: {text}' if argument == 'return' else f':param {argument}: {text}')


def mathml(translator, node, display):
    "Write a formula as MathML, which browsers show without any script."
    translator.body.append(latex2mathml.converter.convert(node.astext(), display='block' if display else 'inline'))
    raise nodes.SkipNode


def write_index(app, exception):
    "The first page under the name that servers look for."
    if exception is None:
        shutil.copy(Path(app.outdir)/f'{root_doc}.html', Path(app.outdir)/'index.html')


def setup(app):
    "Called by Sphinx."
    app.add_html_math_renderer('mathml', (lambda t, n: mathml(t, n, False), None), (lambda t, n: mathml(t, n, True), None))
    app.connect('builder-inited', import_modules)
    app.connect('source-read', read_source)
    app.connect('autodoc-process-docstring', document_arguments)
    app.connect('build-finished', write_index)
