"""The README says what the files in results/ say."""
import re
from pathlib import Path

import pandas as pd
import pytest

from glcm.figures import results_table

ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text()


def test_table_is_made_from_results():
    written = re.search(r'<!-- results -->\n(.*?)<!-- /results -->', README, re.DOTALL)[1].strip()
    study = 'seeds' if (ROOT/'results'/'seeds').exists() else 'default'
    assert written == results_table(ROOT/'results'/study).strip()


@pytest.mark.skipif(not (ROOT/'results'/'seeds').exists(), reason='the seeds study was not run yet (make seeds)')
def test_seeds_study_has_three_seeds_and_reaches_its_goals():
    metrics = pd.read_csv(ROOT/'results'/'seeds'/'metrics.csv')
    baselines = pd.read_csv(ROOT/'results'/'seeds'/'baselines.csv')
    glcm = metrics[metrics.variant == 'glcm']
    assert sorted(glcm.seed) == [0, 1, 2]
    assert glcm.pointing.mean() >= 0.75 and glcm.synchronisation.mean() >= 0.8
    for measure in ('pointing', 'ciou_50', 'auc'): assert glcm[measure].min() > baselines[measure].max()


@pytest.mark.parametrize('link', sorted(set(re.findall(r'\]\(([^)#]+)\)', README))))
def test_links_lead_somewhere(link):
    assert (ROOT/link).exists()
