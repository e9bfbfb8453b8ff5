"""The script that runs timm's own tests over our models, on tests that stand in for timm's."""
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

SCRIPT = Path(__file__).parent / 'run_timm_suite.py'
OF_MODELS = '''
import pytest, timm

@pytest.mark.parametrize('model_name', timm.list_models())
def test_default_cfgs(model_name):
    assert 'nbn' in model_name

@pytest.mark.parametrize('model_name', timm.list_models())
def test_that_is_skipped(model_name):
    pytest.skip('not for this model')

@pytest.mark.parametrize('model_name', ['resnet18'])
def test_of_another_model(model_name):
    assert False

def test_of_no_model():
    assert False
'''


@pytest.mark.slow
@pytest.mark.parametrize(('pattern', 'options', 'code', 'printed'), [
    ('resnet20_nbn', [], 0, 'tests that passed: 1, of so many models: 1'),
    ('resnet20_nbn', ['-k', 'skipped'], 1, 'no test of resnet20_nbn has passed'),
    ('resnet21_nbn', [], 1, "no model of this package matches 'resnet21_nbn'")])
def test_only_tests_of_our_models_count_and_without_any_the_run_fails(pattern, options, code, printed, tmp_path):
    with tarfile.open(tmp_path / 'timm.tar.gz', 'w:gz') as archive:
        member = tarfile.TarInfo(f'timm-{timm.__version__}/tests/test_models.py')
        member.size = len(OF_MODELS)
        archive.addfile(member, io.BytesIO(OF_MODELS.encode()))
    done = subprocess.run([sys.executable, str(SCRIPT), pattern, *options], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'TIMM_SDIST': str(tmp_path / 'timm.tar.gz'),
                               'PYTHONPATH': str(SCRIPT.parent.parent)}, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, printed), done.stdout + done.stderr
