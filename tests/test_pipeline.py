"""The whole pipeline on a tiny world: it runs, does nothing twice, and reruns just what a change asks for."""
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from glcm.core import override
from glcm.miniature.world import write_world
from glcm.testing import tiny_params

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
               'DVC_NO_ANALYTICS': '1'}


def run(folder, *command, fails=False):
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output[-4000:]
    return output


def to_run(folder):
    "The stages whose own parameters or dependencies have changed."
    return ran(run(folder, 'dvc', 'repro', '--dry'))


def runs(output):
    "The stages that `dvc repro` says it runs, each with what it runs for: `pretrain@glcm-0`."
    return {line.split("'")[1] for line in output.splitlines() if line.startswith('Running stage')}


def ran(output):
    "Names of these stages."
    return {name.split('@')[0] for name in runs(output)}


def change(folder, section, **values):
    params = yaml.safe_load((folder/'params.yaml').read_text())
    params[section] |= values
    (folder/'params.yaml').write_text(yaml.safe_dump(params, sort_keys=False))


def copy_of_the_repository(folder, params):
    "Its code with other parameters, without data and results."
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listed.stdout.split('\0')
    for name in filter(None, tracked):
        left_out = name.startswith(('.git/', 'sample/', 'results/')) or name in ('data.dvc', 'dvc.lock')
        if left_out or not (ROOT/name).exists():
            continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes((ROOT/name).read_bytes())
    (folder/'params.yaml').write_text(yaml.safe_dump(params, sort_keys=False))
    run(folder, 'git', 'init', '-q')


def parameters():
    "Those of a run that takes seconds, on small pictures and one dataset less."
    params = override(tiny_params(), dict(views=dict(crop=32), model=dict(grid=8)), 'the test')
    params['pretrain']['datasets'] = ['kinetics700']
    params['finetune']['esc50']['epochs'] = 1
    del params['datasets']['avspeech']
    return params


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A copy of the repository, with tiny parameters and a tiny world, after one `dvc repro`."
    folder = tmp_path_factory.mktemp('glcm')/'project'
    copy_of_the_repository(folder, parameters())
    counts = dict(kinetics700=dict(train=5, validate=1), vggss=dict(held_out=3), esc50=dict(recordings=1))
    write_world(folder/'data', counts, workers=0)
    run(folder, 'dvc', 'repro')
    return folder


def test_results_are_written(project):
    metrics = pd.read_csv(project/'results'/'default'/'metrics.csv')
    assert metrics.variant.tolist() == parameters()['matrix']['variants']
    assert metrics.drop(columns='variant').notna().all().drop('matching').all() # for which there are too few clips
    tasks = pd.read_csv(project/'results'/'default'/'tasks.csv').set_index('variant')
    for variant in metrics.variant:
        folder = project/'artifacts'/'finetune'/f'{variant}-esc50-0'
        predictions = pd.read_csv(folder/'predictions.csv')
        is_hit = predictions.label == predictions.predicted
        accuracies = is_hit.groupby(predictions.split).mean()
        assert len(accuracies) == 5
        assert tasks.value[variant] == pytest.approx(accuracies.mean(), abs=1e-5)
        assert (folder/'networks'/'plain'/'fold-5.pt').exists()
    assert '### Table 3' in (project/'results'/'default'/'tables.md').read_text()
    for name in ('losses', 'attention', 'similarity'):
        assert (project/'results'/'default'/f'{name}.png').stat().st_size > 5000
    steps = pd.read_csv(project/'artifacts'/'pretrain'/'glcm-0'/'steps.csv')
    assert steps.step.tolist() == list(range(parameters()['pretrain']['steps']))


def test_second_run_does_nothing(project):
    assert to_run(project) == set()


@pytest.mark.parametrize('section, values, stages', [
    ('figures', dict(clips=3), {'figures'}),
    ('finetune', dict(esc50=parameters()['finetune']['esc50'] | dict(epochs=2)), {'finetune', 'figures'}),
    ('pretrain', dict(lr=0.0005), {'pretrain'}),
    ('audio', dict(bands=64), {'preprocess', 'pretrain'}),
])
def test_change_touches_just_its_stages(project, section, values, stages):
    before = (project/'params.yaml').read_text()
    change(project, section, **values)
    try:
        assert to_run(project) == {'check'} | stages
    finally:
        (project/'params.yaml').write_text(before)


def test_a_variants_learning_rate_reruns_what_follows(project):
    "And nothing of the other variant."
    before = (project/'params.yaml').read_text()
    change(project, 'variants', glcm=dict(pretrain=dict(lr=0.0005)))
    stages = {'check', 'pretrain@glcm-0', 'localize@glcm-0', 'finetune@glcm-esc50-0', 'figures'}
    try:
        assert runs(run(project, 'dvc', 'repro')) == stages
    finally:
        (project/'params.yaml').write_text(before)
    run(project, 'dvc', 'repro')
    assert to_run(project) == set()


def test_wrong_parameters_are_named_and_nothing_is_touched(project):
    "All of them, by a stage before all others; what there is stays."
    before, checkpoint = (project/'params.yaml').read_text(), project/'artifacts'/'pretrain'/'glcm-0'/'checkpoint.pt'
    bytes_before = checkpoint.read_bytes()
    change(project, 'pretrain', lr='3e-4', steps=-1)
    try:
        output = run(project, 'dvc', 'repro', 'pretrain@glcm-0', fails=True)
        assert "pretrain.lr should be a number, not '3e-4' (YAML reads 1e-3 as text" in output
        assert 'pretrain.steps should be 0 or more, not -1' in output
        assert ran(output) == {'check'} and checkpoint.read_bytes() == bytes_before
    finally:
        (project/'params.yaml').write_text(before)
    run(project, 'dvc', 'repro')
    assert to_run(project) == set()


@pytest.mark.parametrize('name', ["x'; touch PWNED; '", 'a\ntouch PWNED\n', '../nbs', '..'])
def test_names_reach_no_shell_and_leave_no_folder(project, name):
    "Nor do they where the stages before are left out, and DVC alone sees the name before the stage does."
    before = (project/'params.yaml').read_text()
    params = yaml.safe_load(before)
    (project/'params.yaml').write_text(yaml.safe_dump(params | dict(study=name), sort_keys=False))
    try:
        output = run(project, 'dvc', 'repro', '-s', 'figures', fails=True)
        assert 'study should be a name of letters' in output or name == '..' # which DVC refuses by itself
        matrix = dict(variants=[name], seeds=[0])
        (project/'params.yaml').write_text(yaml.safe_dump(params | dict(matrix=matrix, variants={name: {}}),
                                                          sort_keys=False))
        assert 'variant should be a name of letters' in run(project, 'dvc', 'repro', '-s', '-f', 'localize', fails=True)
    finally:
        (project/'params.yaml').write_text(before)
    assert not list(project.rglob('PWNED'))
    assert (project/'nbs'/'00_core.ipynb').exists()
    assert (project/'results'/'default'/'tables.md').exists()


def test_a_study_runs_beside_the_default_run(project):
    """In a folder of its own, with another pretext that is finetuned for nothing; a training that both have in common
    comes from the cache, and nothing of the default run is touched."""
    (project/'params.more.yaml').write_text('matrix: {variants: [glcm, avts]}\nexperiments: {esc50: {plain: [glcm]}}\n')
    kept = {name: (project/name).read_bytes() for name in ('params.yaml', 'dvc.yaml', 'dvc.lock')}
    output = run(project, sys.executable, '-m', 'glcm.study', 'more')
    again = {name for name in runs(output) if name.startswith(('gather', 'pretrain', 'localize'))}
    assert again == {'pretrain@avts-0', 'localize@avts-0'}
    metrics = pd.read_csv(project/'results'/'more'/'metrics.csv').set_index('variant')
    assert metrics.index.tolist() == ['glcm', 'avts']
    assert metrics.loc['glcm', ['pointing', 'esc50']].notna().all()
    assert metrics.loc['avts', ['pointing', 'esc50']].isna().all()
    assert {name: (project/name).read_bytes() for name in kept} == kept
    assert to_run(project) == set()
