"""benchmarks/many_processes.py: it runs small, and a rank's share shrinks with the number of processes."""
import json
import runpy
import sys
from pathlib import Path

from nbn_timm.samplers import SAMPLERS

SCRIPT = Path(__file__).parent.parent / 'benchmarks' / 'many_processes.py'


def test_a_small_simulation(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out.json'
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), '--images', '3000', '--classes', '20', '--processes', '1', '3',
                                      '--json', str(out)])
    runpy.run_path(str(SCRIPT), run_name='__main__')
    one, three = json.loads(out.read_text())['rows']
    assert one['samplers'].keys() == set(SAMPLERS) and '3 processes, rank 1' in capsys.readouterr().out
    for name, alone in one['samplers'].items():
        assert three['samplers'][name]['images'] == -(-alone['images'] // 3)
    assert one['reduction_bytes'] == three['reduction_bytes']  # by the classes, not by the pictures
