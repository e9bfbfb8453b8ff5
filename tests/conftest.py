"""Settings of all tests: one thread a process, no network but loopback, caches in a temporary folder."""
import logging
import os

# Forks have one thread, and sums by another number of threads differ in the last bit. What is set here is what the
# processes of pytest-xdist inherit as well.
os.environ['OMP_NUM_THREADS'] = '1'
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_log_of_another_run():
    """A training run logs to the standard error of its own test, which is closed by now."""
    for handler in logging.root.handlers[:]:
        if type(handler).__module__.startswith('nbn_timm.'):
            logging.root.removeHandler(handler)
            logging.root.setLevel(logging.WARNING)


@pytest.fixture
def weights_cache(tmp_path, monkeypatch):
    """An empty cache of pretrained weights, and no folder of the user's."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('NBN_TIMM_WEIGHTS', raising=False)
    return tmp_path / 'torch' / 'hub' / 'checkpoints' / 'nbn_timm'


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Pages have no figures, which take seconds a run, but in modules that say `FIGURES = True`."""
    if not getattr(request.module, 'FIGURES', False):
        monkeypatch.setattr('nbn_timm.pages.figures.can_draw', lambda: False)
