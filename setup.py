"""Install `glcm`: everything about the package is read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=['='])
settings.read(Path(__file__).parent / 'settings.ini', encoding='utf-8')
cfg = settings['DEFAULT']
EXTRAS = [name.removesuffix('_requirements') for name in cfg if name.endswith('_requirements')]

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    author=cfg['author'],
    license='Apache-2.0',
    python_requires=f">={cfg['min_python']},<3.14",
    packages=find_packages(include=['glcm', 'glcm.*']),
    package_data={'glcm': ['py.typed', 'weights/*']},
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in EXTRAS},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
)
