"""Every row of `variants:` is a run that works, and changes what its name says."""
from dataclasses import asdict

import pytest
import torch
import yaml

from glcm.core import InputError, override, parse, read_params, root
from glcm.data.video import to_rgb
from glcm.model import GLCM, glcm_loss
from glcm.testing import tiny_params
from glcm.runs import CODE, MachineConfig, run_config
from glcm.tasks.finetune import TASK_CODE
from glcm.train import training_step

PARAMS = tiny_params()


def batch(config, clips=3):
    g = torch.Generator().manual_seed(0)
    T, side = config.views.frames, config.views.crop
    return dict(planes=torch.randint(0, 256, (clips, T, side*3//2, side), generator=g, dtype=torch.uint8),
                audio=torch.randn(clips, config.audio.bands, config.model.mel_per_step*T, generator=g),
                shift=torch.zeros(clips, dtype=torch.long), clip=list('abc'))


@pytest.mark.parametrize('variant', PARAMS['variants'])
def test_one_step_of_every_variant(variant):
    config = run_config(PARAMS, variant, 0)
    torch.manual_seed(0)
    model = GLCM(config.model).train()
    values = training_step(model, torch.optim.AdamW(model.parameters()), batch(config), config, 5, torch.device('cpu'))
    assert torch.isfinite(torch.tensor([values['loss'], values['lr']])).all()
    trained = any(p.grad is not None for p in model.local_encoder.parameters())
    assert trained == (config.loss.local_weight > 0)


def test_each_part_of_a_batch_is_counted_once_by_batch_norm():
    config = run_config(override(PARAMS, dict(pretrain=dict(accumulate=3)), 'the test'), 'glcm', 0)
    model = GLCM(config.model).train()
    training_step(model, torch.optim.AdamW(model.parameters()), batch(config, 6), config, 5, torch.device('cpu'))
    counts = [buffer.item() for name, buffer in model.named_buffers() if name.endswith('num_batches_tracked')]
    assert set(counts) == {3}


def test_code_of_a_checkpoint_is_what_the_stage_depends_on():
    stage = yaml.safe_load((root()/'dvc.yaml').read_text())['stages']['pretrain']
    assert {f'glcm/{name}.py' for name in CODE} == {path for path in stage['deps'] if path.startswith('glcm/')}


def test_code_of_a_finetuning_is_what_the_stage_depends_on():
    stage = yaml.safe_load((root()/'dvc.yaml').read_text())['stages']['finetune']
    assert {f'glcm/{name}.py' for name in [*TASK_CODE, 'metrics']} == {path for path in stage['deps'] if path.startswith('glcm/')}


def differences(variant):
    "What a variant changes against `glcm`, as section.parameter -> value."
    mine, base = (asdict(run_config(read_params(), name, 0)) for name in (variant, 'glcm'))
    return {f'{section}.{k}': v for section, values in mine.items() if isinstance(values, dict)
            for k, v in values.items() if v != base[section][k]}


def test_presets_are_what_they_claim():
    paper = run_config(read_params(), 'paper', 0)
    assert (paper.model.normalize, paper.loss.temperature, paper.loss.count_positives) == (False, 1.0, 'once')
    assert (paper.pretrain.lr, paper.pretrain.warmup_steps, paper.pretrain.schedule) == (0.001, 500, 'constant')
    released = run_config(read_params(), 'released', 0)
    assert (released.model.normalize, released.loss.temperature, released.loss.count_positives) == (False, 1.0, 'twice')
    assert released.views.frames//released.model.global_frames == 8
    assert (released.model.global_stride, released.model.grid, released.model.detach_attention) == (16, 0, False)
    assert (released.model.encoders, released.model.local_embedding) == ('slow_fast', 16)
    assert (released.pretrain.lr, released.pretrain.warmup_steps) == (0.0001, 0)
    assert (released.views.jitter, released.views.random_crop, released.views.flip, released.views.gray) == (False, False, 0, 0)


def names(params):
    "All names in a file of parameters, but for those of single datasets and tasks."
    return {f'{section}.{name}' for section, values in params.items() if isinstance(values, dict)
            for name in (values if section not in ('datasets', 'finetune') else ['...'])} | set(params)


def test_parameters_of_the_paper_are_the_papers():
    params = read_params(root()/'params.paper.yaml')
    assert names(params) == names(read_params())
    parse(MachineConfig, params['machine'], 'machine')
    config = run_config(params, 'glcm', 0)
    assert sum(params['datasets'][name]['clips'] for name in config.pretrain.datasets) == 240_000 # K-AV-240K
    assert {params['datasets'][name]['fps'] for name in config.pretrain.datasets} == {10}
    assert (config.views.frames, config.views.crop, config.views.shift, config.views.jitter) == (32, 112, 0, True)
    assert (config.audio.bands, config.model.mel_per_step*config.views.frames) == (80, 384)
    assert (config.model.encoders, config.model.width, config.model.global_frames, config.model.grid, config.model.slices_per_step) == ('r3d', 64, 8, 16, 3)
    assert (config.model.normalize, config.loss.temperature, config.loss.count_positives, config.loss.mil) == (False, 1.0, 'once', True)
    assert (config.pretrain.batch/params['machine']['gpus'], config.pretrain.lr, config.pretrain.warmup_steps) == (32, 0.001, 500)
    assert (config.loss.negatives, config.model.pooling, config.loss.local_weight) == ('world', 'attention', 1.0)


@pytest.mark.parametrize('variant, changed', [
    ('glcm_no_local', {'loss.local_weight': 0.0}), ('glcm_no_mil', {'loss.mil': False}), ('glcm_mean_pool', {'model.pooling': 'mean'})])
def test_ablations_change_one_thing(variant, changed):
    assert differences(variant) == changed


def test_floor_of_the_released_loss():
    "Positives counted in both halves of the denominator: even perfect embeddings keep a loss of ln 2."
    config = run_config(PARAMS, 'released', 0)
    model = GLCM(config.model).eval()
    given = batch(config)
    losses = glcm_loss(model(to_rgb(given['planes']).transpose(1, 2), given['audio']), config.loss)
    assert losses['global_loss'] >= torch.log(torch.tensor(2.0)) and losses['local_loss'] >= torch.log(torch.tensor(2.0))


@pytest.mark.parametrize('section, values, message', [
    ('audio', dict(hop=256), 'whole number'),
    ('model', dict(global_frames=5), 'cannot be spread evenly'),
    ('model', dict(slices_per_step=5), 'not divisible'),
    ('model', dict(widht=5), "no parameter 'widht'"),
    ('loss', dict(temperature=0.0), 'temperature'),
    ('pretrain', dict(datasets=['kinetics']), 'kinetics'),
    ('pretrain', dict(batch=1), 'negatives'),
    ('views', dict(frames='16'), 'should be int'),
])
def test_impossible_parameters_are_refused_before_training(section, values, message):
    params = PARAMS | {section: PARAMS[section] | values}
    with pytest.raises(InputError, match=message): run_config(params, 'glcm', 0)


def test_missing_parameter_is_named():
    params = PARAMS | dict(pretrain={k: v for k, v in PARAMS['pretrain'].items() if k != 'lr'})
    with pytest.raises(InputError, match="lacks 'lr'"): run_config(params, 'glcm', 0)
