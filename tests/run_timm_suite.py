"""Run timm's own model tests over our models: `python tests/run_timm_suite.py [PATTERN [pytest options]]`.

The tests come from the source distribution of the installed timm (fetched with pip), and see our models alone. Tests
of pretrained weights are left out unless NBN_TIMM_WEIGHTS names a folder that has them.
"""
import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm
from timm.models import list_modules

TIMM_MODULES = set(list_modules())

import nbn_timm  # noqa: E402, F401  (after the snapshot: what it registers is ours)

OUR_MODULES = sorted(set(list_modules()) - TIMM_MODULES)


def fetch_tests(folder: Path) -> Path:
    """Download timm's source distribution and return the path of its model tests."""
    pip = [sys.executable, '-m', 'pip', '-q']
    subprocess.run([*pip, 'download', '--no-deps', '--no-binary', ':all:', '-d', str(folder),
                    f'timm=={timm.__version__}'], check=True)
    with tarfile.open(next(folder.glob('timm-*.tar.gz'))) as archive:
        archive.extractall(folder, filter='data')
    return folder / f'timm-{timm.__version__}' / 'tests' / 'test_models.py'


def show_only_our_models(pattern: str) -> None:
    """Make `timm.list_models` list this package's models that match, whatever timm modules a test asks for."""
    list_models = timm.list_models

    def ours(filter='', module='', **kwargs):
        kwargs.pop('exclude_filters', None)
        names = list_models(filter, module=OUR_MODULES, **kwargs)
        return [name for name in names if fnmatch.fnmatch(name, pattern)]

    timm.list_models = ours
    timm.list_pretrained = lambda filter='', **kwargs: ours(filter, pretrained=True)


def main() -> int:
    pattern, *options = sys.argv[1:] or ['*']
    show_only_our_models(pattern)
    with tempfile.TemporaryDirectory() as folder:
        tests = fetch_tests(Path(folder))
        # Tests of timm's transformers bring their own models; those of weights need them.
        left_out = 'naflex or gemma4 or non_std or test_model_inference or with_features_fx'
        if 'NBN_TIMM_WEIGHTS' not in os.environ:
            left_out += ' or pretrained'
        return pytest.main([str(tests), '-c', os.devnull, '-q', '-p', 'no:cacheprovider', '-W', 'ignore',
                            '-k', f'not ({left_out})', *options])


if __name__ == '__main__':
    raise SystemExit(main())
