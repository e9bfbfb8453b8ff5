"""docs/own_pictures.ipynb: a valid notebook whose cells run in their order in a kernel, from pictures to ONNX."""
import json
import re
from pathlib import Path

import pytest

from nbn_timm.trained.opening import checkpoint_record

NOTEBOOK = Path(__file__).resolve().parent.parent / 'docs' / 'own_pictures.ipynb'


def read() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding='utf-8'))


def test_it_is_a_notebook_without_output():
    """What nbformat 4.5 asks of a notebook; output would go stale."""
    notebook = read()
    assert {*notebook} == {'cells', 'metadata', 'nbformat', 'nbformat_minor'}
    assert (notebook['nbformat'], notebook['nbformat_minor']) == (4, 5)
    assert notebook['metadata']['kernelspec'].keys() >= {'name', 'display_name'}
    names = [cell['id'] for cell in notebook['cells']]
    assert len(set(names)) == len(names) and all(re.fullmatch(r'[\w-]{1,64}', name) for name in names)
    for cell in notebook['cells']:
        assert all(isinstance(line, str) for line in cell['source']) and cell['metadata'] == {}
        if cell['cell_type'] == 'code':
            assert cell.keys() == {'cell_type', 'id', 'metadata', 'source', 'execution_count', 'outputs'}
            assert cell['outputs'] == [] and cell['execution_count'] is None
        else:
            assert cell['cell_type'] == 'markdown' and cell.keys() == {'cell_type', 'id', 'metadata', 'source'}


@pytest.mark.slow
def test_its_cells_run_in_a_kernel(tmp_path, monkeypatch):
    """As `jupyter execute` runs them: a kernel's standard output is another kind of stream than a terminal's."""
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    pytest.importorskip('ipykernel')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('NBN_TIMM_WEIGHTS', raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=600, resources={'metadata': {'path': str(tmp_path)}}).execute()
    told = ''.join(output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', ()))
    assert 'train/two/cut.png' in told and 'train/six/again.png = test/six/0.png' in told
    assert "nbn-predict: 300 images in " in told and "written to 'answers.csv'" in told
    record = checkpoint_record('output/digits/model_best.pth.tar')
    assert record.classes is not None and record.classes.names[:2] == ('eight', 'five')
    assert Path('output/digits/split.csv').is_file() and Path('output/digits/report.html').is_file()
    found = json.loads(Path('output/digits/test.json').read_text())
    assert found['mean_class'] > 60  # chance is 10
    answers = Path('answers.csv').read_text().splitlines()
    assert len(answers) == 1 + 300 and ',not sure,' in ''.join(answers)
    assert Path('exported/model.onnx').is_file()
