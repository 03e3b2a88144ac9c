"""A user's own videos, by the words of the README."""
import re
import shutil
import sys

import pandas as pd
import yaml

from glcm.miniature.world import write_world
from glcm.testing import tiny_params
from test_pipeline import ROOT, copy_of_the_repository, parameters, ran, run


def test_own_videos_as_the_readme_describes_them(tmp_path):
    "A folder of films, the file of parameters that README prints, and one command, with a tiny network."
    folder = tmp_path/'project'
    figures = dict(data='films', clips=2, dpi=50)
    copy_of_the_repository(folder, parameters() | dict(datasets=tiny_params()['datasets'], figures=figures))
    printed = re.search(r'```yaml\n(datasets:.*?)```', (ROOT/'README.md').read_text(), re.DOTALL)[1]
    study = yaml.safe_load(printed)
    study['datasets']['holiday'] |= dict(path='films of 2026', short_side=64, max_rejected=0.5)
    (folder/'params.holiday.yaml').write_text(yaml.safe_dump(study))
    write_world(tmp_path/'world', dict(kinetics700=dict(train=5)), workers=0)
    for k, film in enumerate(sorted((tmp_path/'world'/'kinetics700').rglob('*.mp4'))):
        day = folder/'data'/'films of 2026'/f'day {k//3}'
        day.mkdir(parents=True, exist_ok=True)
        shutil.copy(film, day/f'film {k}.mp4')
    (folder/'data'/'films of 2026'/'notes.mp4').write_text('not a film')
    output = run(folder, sys.executable, '-m', 'glcm.study', 'holiday')
    assert ran(output) == {'check', 'preprocess', 'gather', 'pretrain', 'localize', 'figures'}
    artifacts = folder/'studies'/'holiday'/'artifacts'
    assert (artifacts/'pretrain'/'glcm-0'/'checkpoint.pt').exists()
    rejected = pd.read_csv(artifacts/'clips'/'holiday'/'rejected.csv')
    assert rejected[['clip', 'reason']].values.tolist() == [['notes.mp4', 'does not decode']]
    assert (folder/'results'/'holiday'/'attention.png').stat().st_size > 1000
