"""The scripts of benchmarks/ can be begun: what they take from the package is there."""
import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / 'benchmarks'

pytestmark = pytest.mark.fast


@pytest.mark.parametrize('name', sorted(path.stem for path in SCRIPTS.glob('*.py')))
def test_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] in ('nbn_timm', *(path.stem for path in SCRIPTS.glob('*.py'))):
            raise
        pytest.skip(f'{error.name} is not installed')
    assert module.__doc__ and Path(module.__file__).parent == SCRIPTS
