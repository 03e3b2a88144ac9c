"""The wheel works without the repository: it imports, it loads a model, and says what only the repository can do."""
import os
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from glcm.model import GLCM
from glcm.testing import tiny_params
from glcm.training.checkpoints import save_checkpoint
from glcm.training.config import run_config

ROOT = Path(__file__).resolve().parents[1]
SOURCES = 'setup.py', 'pyproject.toml', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE'


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A folder of packages that holds the installed wheel, and nothing else."
    folder = tmp_path_factory.mktemp('wheel')
    source, packages = folder/'source', folder/'site'
    shutil.copytree(ROOT/'glcm', source/'glcm', ignore=shutil.ignore_patterns('__pycache__'))
    for name in SOURCES:
        shutil.copy(ROOT/name, source)
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    offline = ['--no-deps', '--no-build-isolation']
    subprocess.run([*pip, 'wheel', *offline, '--wheel-dir', folder, source], check=True)
    wheel, = folder.glob('*.whl')
    subprocess.run([*pip, 'install', *offline, '--no-compile', '--target', packages, wheel], check=True)
    return packages


def run(site, code, folder):
    "What a program prints that sees the installed wheel, from a folder outside of any repository."
    env = os.environ | dict(PYTHONPATH=str(site))
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_is_in_the_wheel(site):
    def modules(package):
        return {str(path.relative_to(package)) for path in package.rglob('*.py')}
    assert modules(site/'glcm') == modules(ROOT/'glcm')
    assert (site/'glcm'/'py.typed').exists()


USE = """
import pkgutil, importlib, pathlib, glcm, torch
for module in pkgutil.walk_packages(glcm.__path__, 'glcm.'):
    importlib.import_module(module.name)
model, config = glcm.load('model.pt')
views, size = config.views, config.model
video = torch.zeros(1, 3, views.frames, views.crop, views.crop, dtype=torch.uint8)
audio = torch.zeros(1, size.bands, views.frames*size.mel_per_step)
assert model(video, audio).attention.isfinite().all()
try:
    glcm.core.root()
except glcm.core.InputError as e:
    print(e)
print(pathlib.Path(glcm.__file__).parent)
"""


def test_wheel_works_outside_of_the_repository(site, tmp_path):
    config = run_config(tiny_params(), 'glcm', 0)
    save_checkpoint(tmp_path/'model.pt', config, 'no data', 0, GLCM(config.model))
    refusal, package = run(site, USE, tmp_path).splitlines()
    assert package == str(site/'glcm')
    assert refusal == f'no params.yaml in {tmp_path} or above: run this from inside the glcm repository'


def test_console_scripts_lead_to_functions(site):
    dist = PathDistribution(next(site.glob('glcm-*.dist-info')))
    for script in dist.entry_points.select(group='console_scripts'):
        assert callable(script.load()), script
