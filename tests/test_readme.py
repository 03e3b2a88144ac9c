"""The README says what the files in results/ say."""
import re
from pathlib import Path

import pandas as pd
import pytest

from glcm.core import read_params, read_study
from glcm.report.claims import KINDS, read_claims, write_claims
from glcm.report.tables import PRETRAINED_TASKS, comparisons, write_tables

ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text()


def test_tables_are_made_from_results(tmp_path):
    copy = tmp_path/'README.md'
    tables = r'(<!-- (\w+ (?:localization|tasks|differences)) -->\n).*?(<!-- /\2 -->)'
    copy.write_text(re.sub(tables, r'\1\3', README, flags=re.DOTALL))
    assert copy.read_text() != README
    write_tables(copy, ROOT/'results')
    assert copy.read_text() == README


@pytest.mark.skipif(not (ROOT/'results'/'seeds').exists(),
                    reason='the seeds study was not run yet (make repro STUDY=seeds)')
def test_seeds_study_has_three_seeds_and_finds_what_sounds():
    metrics = pd.read_csv(ROOT/'results'/'seeds'/'metrics.csv')
    baselines = pd.read_csv(ROOT/'results'/'seeds'/'baselines.csv')
    glcm = metrics[metrics.variant == 'glcm']
    assert sorted(glcm.seed) == [0, 1, 2]
    assert glcm.pointing.mean() >= 0.75
    for measure in ('pointing', 'ciou_50', 'auc'):
        assert glcm[measure].min() > baselines[measure].max()


SEEDS = ROOT/'results'/'seeds'/'differences.csv'


@pytest.mark.skipif(not SEEDS.exists(), reason='the seeds study has no differences yet (make repro STUDY=seeds)')
@pytest.mark.parametrize('metric', ['pointing', 'synchronisation'])
def test_pretraining_is_told_from_random_weights_clip_by_clip(metric):
    "The whole interval of the paired difference is above zero."
    differences = pd.read_csv(SEEDS).set_index(['variant', 'against', 'metric'])
    row = differences.loc[('glcm', 'scratch', metric)]
    assert row.seeds == 3 and 0 < row.low < row.difference < row.high


PAGES = ['README.md', 'CONTRIBUTING.md', 'results/README.md', 'nbs/guide.ipynb']


def links_of(page):
    "The links of a page to other files."
    links = re.findall(r'\]\(([^)#\s]+)\)', (ROOT/page).read_text())
    return sorted(link for link in set(links) if not link.startswith('https:'))


@pytest.mark.parametrize('page, link', [(page, link) for page in PAGES for link in links_of(page)])
def test_links_lead_somewhere(page, link):
    assert ((ROOT/page).parent/link).exists()


def test_readme_is_short():
    prose = re.sub(r'<!-- (\w+ \w+) -->.*?<!-- /\1 -->', '', README, flags=re.DOTALL)
    assert len(prose.split()) < 900


def test_page_of_claims_is_made_from_results(tmp_path):
    page = (ROOT/'results'/'README.md').read_text()
    for folder in (ROOT/'results').iterdir():
        if folder.is_dir():
            (tmp_path/folder.name).symlink_to(folder)
    emptied = re.sub(r'(<!-- claims -->\n).*?(<!-- /claims -->)', r'\1\2', page, flags=re.DOTALL)
    (tmp_path/'README.md').write_text(emptied)
    assert emptied != page
    readme = tmp_path/'counts.md'
    readme.write_text(re.sub(r'(<!-- claims counts -->\n).*?(<!-- /claims counts -->)', r'\1\2', README, flags=re.DOTALL))
    write_claims(tmp_path/'README.md', ROOT/'nbs'/'claims.csv', readme)
    assert (tmp_path/'README.md').read_text() == page, 'python -m glcm.report.claims'
    assert readme.read_text() == README, 'python -m glcm.report.claims'


def test_every_claim_names_a_number_that_a_study_makes():
    "A claim that nothing could ever decide would stay unmeasured for ever."
    claims = read_claims(ROOT/'nbs'/'claims.csv')
    assert claims.claim.is_unique and set(claims.kind) <= set(KINDS)
    for claim in claims.itertuples():
        study = claim.file.split('/')[0]
        if study in ('mosaics', 'linear', 'saliency'): # of commands beside the studies, and measured
            assert (ROOT/'results'/claim.file).exists(), claim.claim
            continue
        params = read_params() if study == 'default' else read_study(study)
        wanted = dict(condition.split('=') for condition in claim.select.split())
        task = wanted.get('task')
        assert set(filter(None, [wanted.get('variant'), wanted.get('against')])) <= {*params['variants']}
        if task and task not in PRETRAINED_TASKS:
            settings = params['experiments'][task]
            for setting in filter(None, [wanted.get('setting'), wanted.get('against_setting')]):
                assert setting in settings, claim.claim
        if wanted.get('against') == wanted.get('variant'):
            pairs = comparisons(wanted['variant'], wanted['setting'], [wanted['variant']])
            assert (wanted['against'], wanted['against_setting']) in pairs, claim.claim
