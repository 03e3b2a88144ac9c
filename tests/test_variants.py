"""Every row of `variants:` is a run that works, and changes what its name says."""
from dataclasses import asdict

import pytest
import torch
import yaml
from batches import noise_batch

from glcm.core import InputError, override, parse, read_params, read_study, root
from glcm.data.views import prepare_inputs
from glcm.model import GLCM, PARTS, glcm_loss
from glcm.testing import tiny_params
from glcm.training.checkpoints import imported_files
from glcm.training.config import MachineConfig, run_config
from glcm.training.step import training_step

PARAMS = tiny_params()
STUDIES = 'full', 'pretexts', 'paper', 'grid', 'esc10', 'esc50_fold4', 'lrwar', 'lrwar_lips', 'seeds', 'talkers', 'world'
EXTENSIONS = 'lrwar_frames', 'lrwar_near', 'lrwar_ten', 'lrwar_wide', 'world_frames', 'world_long', 'world_near'


def rows_of(study):
    "The variants of a study that can be trained on its datasets."
    params = read_study(study)
    for variant, changes in params['variants'].items():
        if set(changes.get('pretrain', {}).get('datasets', [])) <= set(params['datasets']):
            yield variant


ROWS = [(study, variant) for study in STUDIES if study not in ('seeds', 'talkers', 'esc50_fold4') for variant in rows_of(study)]
ROWS += [('lrwar_ten', 'double_width'), ('lrwar_ten', 'longer_shift'), ('world_long', 'double_steps')]

@pytest.mark.parametrize('study, variant', ROWS)
def test_one_step_of_every_variant(study, variant):
    "As the study asks for, but for thinner encoders and fewer clips."
    params = read_study(study)
    assert run_config(params, variant, 0).variant == variant
    config = run_config(override(params, dict(model=dict(width=8, embedding=16)), 'the test'), variant, 0)
    torch.manual_seed(0)
    model = GLCM(config.model)
    network = config.pretext.network(model, config).train()
    optimizer = torch.optim.AdamW(network.parameters())
    values = training_step(network, optimizer, noise_batch(config, 2), config, 5)
    assert torch.isfinite(torch.tensor([values[name] for name in config.columns])).all()
    for name in PARTS:
        gradients = [p.grad for p in model.part(name).parameters()]
        trained = any(gradient is not None and gradient.any() for gradient in gradients)
        assert trained == (name in config.pretext.trained(config)), name


def test_each_part_of_a_batch_is_counted_once_by_batch_norm():
    config = run_config(override(PARAMS, dict(pretrain=dict(accumulate=3)), 'the test'), 'glcm', 0)
    network = config.pretext.network(GLCM(config.model), config).train()
    optimizer = torch.optim.AdamW(network.parameters())
    training_step(network, optimizer, noise_batch(config, 6), config, 5)
    counters = [buffer for name, buffer in network.named_buffers() if name.endswith('num_batches_tracked')]
    assert {counter.item() for counter in counters} == {3}


# what the notebook of each stage calls; pictures within a notebook are left out, so that they retrain nothing
STAGE_MODULES = {
    'draw': ['miniature.world'],
    'preprocess': ['datasets.catalogue', 'data.preprocess'],
    'gather': ['data.views'],
    'pretrain': ['training.pretrain'],
    'localize': ['tasks.measure', 'tasks.attend', 'tasks.listen', 'tasks.match', 'report.figures'],
    'finetune': ['tasks.experiment'],
    'figures': ['tasks.attend', 'report.claims', 'report.figures', 'report.learned', 'report.paper', 'report.tables'],
}


@pytest.mark.parametrize('stage', STAGE_MODULES)
def test_a_stage_depends_on_what_its_modules_import(stage):
    needed = set()
    for name in STAGE_MODULES[stage]:
        needed |= {path.relative_to(root()).as_posix() for path in imported_files(name)}
    entry = yaml.safe_load((root()/'dvc.yaml').read_text())['stages'][stage]
    deps = entry.get('do', entry)['deps'] # `do` where it runs for each row of a section
    named = {path for path in deps if path.startswith('glcm/')}
    lacking, for_nothing = sorted(needed - named), sorted(named - needed)
    assert named == needed, f'{stage} in dvc.yaml lacks {lacking}, and names {for_nothing} for nothing'


def differences(variant):
    "What a variant changes against `glcm`, as section.parameter -> value."
    mine, base = (asdict(run_config(read_params(), name, 0)) for name in (variant, 'glcm'))
    return {f'{section}.{k}': v for section, values in mine.items() if isinstance(values, dict)
            for k, v in values.items() if v != base[section].get(k)}


PAPER = dict(
    views=dict(shift=0), model=dict(normalize=False, attention_temperature=1.0),
    loss=dict(temperature=1.0, count_positives='once', negatives='world', normalize=False),
    pretrain=dict(lr=0.001, warmup_steps=500, schedule='constant', weight_decay=0.0))
RELEASED = dict(
    views=dict(jitter=False, shift=0, random_crop=False, flip=0.0, gray=0.0),
    model=dict(
        encoders='slow_fast', embedding=512, local_embedding=64, global_frames=4, grid=0, global_stride=16,
        local_stride=16, projection='linear', pooling='attention', attention_temperature=1.0, detach_attention=False,
        normalize=False),
    loss=dict(temperature=1.0, count_positives='twice', local_weight=1.0, mil=True, negatives='batch', normalize=False),
    pretrain=dict(lr=0.0001, warmup_steps=0, schedule='constant', weight_decay=0.0))
PRESETS = dict(paper=PAPER, released=RELEASED)


def choices(preset):
    "What a preset fixes: (section, name) -> value."
    return {(section, name): value for section, values in PRESETS[preset].items() for name, value in values.items()}


def claimed(config, preset):
    "What a configuration says of the parameters that a preset fixes."
    sections = asdict(config)
    return {(section, name): sections[section][name] for section, name in choices(preset)}


@pytest.mark.parametrize('study', STUDIES)
@pytest.mark.parametrize('preset', PRESETS)
def test_presets_are_what_they_claim(study, preset):
    assert claimed(run_config(read_study(study), preset, 0), preset) == choices(preset)


@pytest.mark.parametrize('preset', PRESETS)
def test_presets_do_not_depend_on_the_rest_of_the_file(preset):
    "Whatever the other sections say, a preset's own choices stay."
    count, negatives = dict(paper=('twice', 'batch'), released=('once', 'world'))[preset]
    other = dict(
        views=dict(jitter=True, shift=3, random_crop=True, flip=0.4, gray=0.3),
        model=dict(
            encoders='r3d', embedding=32, local_embedding=8, global_frames=8, grid=9, global_stride=8, local_stride=32,
            projection='mlp', pooling='mean', attention_temperature=0.2, detach_attention=True, normalize=True),
        loss=dict(temperature=0.2, count_positives=count, local_weight=0.5, mil=False, negatives=negatives),
        pretrain=dict(lr=0.01, warmup_steps=7, schedule='cosine', weight_decay=0.1))
    params = override(read_params(), other, 'the test')
    base = claimed(run_config(params, 'glcm', 0), preset)
    assert all(base[name] != value for name, value in choices(preset).items())
    assert claimed(run_config(params, preset, 0), preset) == choices(preset)


def test_released_at_the_size_of_the_paper():
    config = run_config(read_study('paper'), 'released', 0)
    assert config.views.frames//config.model.global_frames == 8 # every eighth frame
    assert (config.model.width, config.model.embedding) == (64, 512)
    assert config.model.slices_per_step*config.views.frames == 96


def test_studies_share_their_variants():
    "All but which clips they are trained on, and sizes of a pretext that fit these clips; learning curves are of one."
    base = read_params()['variants']
    base |= dict.fromkeys(('half_clips', 'half_steps', 'double_steps'), base['glcm_motion_clip'])
    for name, width in dict(half_width=8, double_width=32).items(): # of 16
        base[name] = base['glcm_motion_clip'] | dict(model=dict(local_input='motion', width=width))
    base['longer_shift'] = base['glcm_motion_clip'] | dict(views=dict(shift=7))
    for study in (*STUDIES, *EXTENSIONS):
        for name, changes in read_study(study)['variants'].items():
            fitted = () if name in ('glcm', 'paper', 'released', 'scratch') else ('pretrain', 'pretext')
            for section in changes | base[name]:
                assert section in fitted or changes[section] == base[name][section], (study, name, section)
            assert changes.get('pretext', {}).get('kind') == base[name].get('pretext', {}).get('kind')


def test_parameters_of_the_paper_are_the_papers():
    params = read_study('paper')
    parse(MachineConfig, params['machine'], 'machine')
    config = run_config(params, 'glcm', 0)
    views, model, loss, pretrain = config.views, config.model, config.loss, config.pretrain
    datasets = [params['datasets'][name] for name in pretrain.datasets]
    assert sum(dataset['clips'] for dataset in datasets) == 240_000 # K-AV-240K
    assert {dataset['fps'] for dataset in datasets} == {10}
    assert (views.frames, views.crop, views.shift, views.jitter) == (32, 112, 0, True)
    assert (config.audio.bands, model.mel_per_step*views.frames) == (80, 384)
    assert (model.encoders, model.width, model.global_frames) == ('r3d', 64, 8)
    assert (model.grid, model.slices_per_step) == (16, 3)
    assert (model.normalize, model.pooling) == (False, 'attention')
    assert (loss.temperature, loss.count_positives, loss.mil) == (1.0, 'once', True)
    assert (loss.negatives, loss.local_weight) == ('world', 1.0)
    assert (pretrain.batch/params['machine']['gpus'], pretrain.lr, pretrain.warmup_steps) == (32, 0.001, 500)


def test_k_av_15k_has_15000_clips_of_the_papers_240000():
    params = read_study('paper')
    clips = [run_config(params, variant, 0).pretrain.clips for variant in ('glcm', 'glcm_15k', 'glcm_15k_no_mil')]
    assert clips == [None, 15_000, 15_000]
    assert not run_config(params, 'glcm_15k_no_mil', 0).loss.mil


def test_kinetics_alone_has_the_papers_number_of_clips():
    params = read_study('paper')
    name, = run_config(params, 'glcm_kinetics', 0).pretrain.datasets
    alone, both = dict(params['datasets'][name]), dict(params['datasets']['kinetics700'])
    assert alone.pop('clips') == 240_000
    alone.pop('reader')
    both.pop('clips')
    assert alone == both


@pytest.mark.parametrize('variant, changed', [
    ('glcm_no_local', {'loss.local_weight': 0.0}), ('glcm_no_mil', {'loss.mil': False}),
    ('glcm_mean_pool', {'model.pooling': 'mean'}),
    ('glcm_15k', {'pretrain.clips': 54}), ('glcm_15k_no_mil', {'pretrain.clips': 54, 'loss.mil': False}),
    ('glcm_kinetics', {'pretrain.datasets': ['kinetics700']})])
def test_ablations_change_what_their_names_say(variant, changed):
    assert differences(variant) == changed


@pytest.mark.parametrize('variant', ['moco', 'cpc', 'dpc', 'infomax', 'avts', 'avts_cross_entropy', 'avslowfast'])
def test_table_4_varies_the_pretext_only(variant):
    "But for the shift, which a positive of AVTS cannot have."
    changed = {name: value for name, value in differences(variant).items() if not name.startswith('pretext.')}
    assert changed == ({'views.shift': 0} if variant.startswith('av') else {})


def test_floor_of_the_released_loss():
    "Positives counted in both halves of the denominator: even perfect embeddings keep a loss of ln 2."
    config = run_config(PARAMS, 'released', 0)
    model = GLCM(config.model).eval()
    clips = noise_batch(config, 3)
    losses = glcm_loss(model(*prepare_inputs(clips['planes'], clips['mel'])), config.loss)
    assert losses['global_loss'] >= torch.log(torch.tensor(2.0))
    assert losses['local_loss'] >= torch.log(torch.tensor(2.0))


@pytest.mark.parametrize('section, values, message', [
    ('audio', dict(hop=256), 'whole number'),
    ('model', dict(global_frames=5), 'cannot be spread evenly'),
    ('model', dict(slices_per_step=5), 'not divisible'),
    ('model', dict(widht=5), "no parameter 'widht'"),
    ('loss', dict(temperature=0.0), 'temperature'),
    ('pretrain', dict(datasets=['kinetics']), 'kinetics'),
    ('pretrain', dict(batch=1), 'batch should be 2 or more'),
    ('views', dict(frames='16'), 'should be a whole number'),
])
def test_impossible_parameters_are_refused_before_training(section, values, message):
    params = PARAMS | {section: PARAMS[section] | values}
    with pytest.raises(InputError, match=message):
        run_config(params, 'glcm', 0)


def test_negatives_within_no_shift_are_refused():
    params = PARAMS | dict(views=PARAMS['views'] | dict(shift=0))
    with pytest.raises(InputError, match='near compares steps within views.shift, which is 0'):
        run_config(params, 'glcm_motion_near', 0)
    run_config(params, 'glcm_motion_clip', 0)


def test_missing_parameter_is_named():
    params = PARAMS | dict(pretrain={k: v for k, v in PARAMS['pretrain'].items() if k != 'lr'})
    with pytest.raises(InputError, match="lacks 'lr'"):
        run_config(params, 'glcm', 0)
