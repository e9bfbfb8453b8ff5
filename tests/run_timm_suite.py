"""Run timm's own model tests over our models: `python tests/run_timm_suite.py [PATTERN [pytest options]]`.

The tests come from the source distribution of the installed timm, which pip fetches unless TIMM_SDIST names the file.
They see our models alone, and only tests of a model run and count: without any the run fails. Tests of pretrained
weights are left out unless NBN_TIMM_WEIGHTS names a folder that has them.
"""
import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import timm
from timm.models import list_modules

TIMM_MODULES = set(list_modules())

import nbn_timm  # noqa: E402, F401  (after the snapshot: what it registers is ours)

OUR_MODULES = sorted(set(list_modules()) - TIMM_MODULES)


def fetch_tests(folder: Path) -> Path:
    """Unpack timm's source distribution and return the path of its model tests."""
    if 'TIMM_SDIST' in os.environ:
        sdist = Path(os.environ['TIMM_SDIST'])
    else:
        pip = [sys.executable, '-m', 'pip', '-q']
        subprocess.run([*pip, 'download', '--no-deps', '--no-binary', ':all:', '-d', str(folder),
                        f'timm=={timm.__version__}'], check=True)
        sdist = next(folder.glob('timm-*.tar.gz'))
    with tarfile.open(sdist) as archive:
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


class TestsOfOurModels:
    """Leaves out tests that are not of one of our models, and counts what passes."""

    def __init__(self) -> None:
        self.names = set(timm.list_models())
        self.of: dict[str, str] = {}  # model by test
        self.passed: Counter[str] = Counter()  # tests by model

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        for item in items:
            model = getattr(item, 'callspec', None) and item.callspec.params.get('model_name')
            if model in self.names:
                self.of[item.nodeid] = model
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.of])
        items[:] = [item for item in items if item.nodeid in self.of]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == 'call' and report.passed:
            self.passed[self.of[report.nodeid]] += 1

    def untested(self) -> list[str]:
        """Models of which no test has passed."""
        return sorted(self.names - self.passed.keys())


def main() -> int:
    pattern, *options = sys.argv[1:] or ['*']
    show_only_our_models(pattern)
    counted = TestsOfOurModels()
    if not counted.names:
        print(f"no model of this package matches '{pattern}'")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        tests = fetch_tests(Path(folder))
        # Tests of timm's transformers bring their own models; those of weights need them.
        left_out = 'naflex or gemma4 or non_std or test_model_inference or with_features_fx'
        if 'NBN_TIMM_WEIGHTS' not in os.environ:
            left_out += ' or pretrained'
        code = pytest.main([str(tests), '-c', os.devnull, '-q', '-p', 'no:cacheprovider', '-W', 'ignore',
                            '-k', f'not ({left_out})', *options], plugins=[counted])
    print(f'tests that passed: {counted.passed.total()}, of so many models: {len(counted.passed)}')
    if counted.untested():
        print(f"no test of {', '.join(counted.untested())} has passed")
    return int(code) or bool(counted.untested())


if __name__ == '__main__':
    raise SystemExit(main())
