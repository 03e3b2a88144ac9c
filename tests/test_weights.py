"""Weights for others: the package's bundle, the Hugging Face hub's cache, torch.hub, and files of strangers."""
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import glcm
from glcm.core import InputError
from glcm.export import BUNDLED

ROOT = Path(__file__).parents[1]


def same(ours, theirs):
    "Whether two models have the same weights."
    theirs = theirs.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_bundle_of_the_package_is_trained_and_says_what_it_is():
    model, config = glcm.load()
    assert config.variant == 'glcm' and config.pretrain.steps > 0
    _, front, card = (BUNDLED/'README.md').read_text().split('---\n', 2)
    front = yaml.safe_load(front)
    assert front['license'] == 'apache-2.0' and front['library_name'] == 'glcm'
    assert 'A drawn world' in card and '| pointing game |' in card and 'random weights' in card
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 10e6


@pytest.mark.slow
def test_bundle_finds_what_sounds_in_the_drawn_world(tmp_path):
    "Weights that were mixed up would still load."
    from glcm.data.shards import ClipStore
    from glcm.tasks.localize import localize
    from glcm.testing import tiny_clips
    model, config = glcm.load()
    scores = localize(model, config, ClipStore(tiny_clips(tmp_path, 'vggss', held_out=12)))
    hits = scores.groupby('method').pointing.mean()
    assert hits['model'] >= 0.5 and hits['model'] >= 0.3 + hits['centre']


def hub_cache(folder, name):
    "What the hub's library leaves behind after a download: a snapshot of a repository, and where its branch is."
    repository = folder/f'models--{name.replace("/", "--")}'
    revision = '0123456789abcdef0123456789abcdef01234567'
    shutil.copytree(BUNDLED, repository/'snapshots'/revision)
    (repository/'refs').mkdir()
    (repository/'refs'/'main').write_text(revision)
    return repository/'snapshots'/revision


HUB = '''
import sys, glcm
from glcm.core import InputError
model, config = glcm.load('somebody/model')
print(config.variant, sum(p.numel() for p in model.parameters()))
for name in ('somebody/other', 'somebody/pickled'):
    try:
        glcm.load(name)
    except InputError as e:
        print(e)
'''


def test_name_on_the_hub_is_loaded_from_its_cache(tmp_path):
    "In a process of its own: the library reads where its cache is when it is imported."
    pytest.importorskip('huggingface_hub')
    hub_cache(tmp_path, 'somebody/model')
    pickled = hub_cache(tmp_path, 'somebody/pickled')
    (pickled/'model.safetensors').rename(pickled/'checkpoint.pt')
    paths = ':'.join([str(ROOT), *sys.path])
    env = dict(HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE='1', PYTHONPATH=paths, OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', HUB], env=env, cwd=tmp_path, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].startswith('glcm 4'), done.stderr
    assert lines[1].startswith('no model somebody/other') and lines[2].startswith('no model somebody/pickled')


def test_without_the_hubs_library_a_name_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(InputError, match='pip install huggingface_hub') as e:
        glcm.load('somebody/model')
    assert '\n' not in str(e.value)


def test_torch_hub_loads_the_same_from_a_local_folder(monkeypatch):
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if Path(path or '.').resolve() != ROOT])
    model, config = torch.hub.load(str(ROOT), 'glcm', source='local')
    ours, how = glcm.load()
    assert config == how and same(ours, model)
    model, _ = torch.hub.load(str(ROOT), 'glcm', source='local', weights=str(BUNDLED))
    assert same(ours, model)


class Trap:
    "Writes a file when it is unpickled."
    def __init__(self, path): self.path = path

    def __reduce__(self): return open, (str(self.path), 'w')


@pytest.mark.parametrize('name', ['checkpoint.pt', 'model.safetensors'])
def test_code_in_weights_does_not_run(tmp_path, name):
    sprung, trap = tmp_path/'sprung', Trap(tmp_path/'sprung')
    (tmp_path/name).write_bytes(pickle.dumps(trap))
    with pytest.raises(InputError):
        glcm.load(tmp_path)
    torch.save(dict(format=1, config={}, data='', step=0, model=dict(x=trap)), tmp_path/name)
    with pytest.raises(InputError):
        glcm.load(tmp_path/name)
    assert not sprung.exists()
    torch.load(tmp_path/name, weights_only=False)
    assert sprung.exists(), 'the trap works'
