"""What `import nbn_timm` costs: which modules it loads beyond those of timm."""
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.fast

LOADED = '''
import json, sys
import timm
before = set(sys.modules)
import nbn_timm
print(json.dumps(sorted(set(sys.modules) - before)))
'''


def test_importing_the_package_loads_little_more_than_timm():
    """No other package, as matplotlib, sklearn or onnx, and of torch nothing heavy, as its compiler or exporter."""
    done = subprocess.run([sys.executable, '-c', LOADED], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert 'nbn_timm.models.ride' in loaded
    known = {'nbn_timm', 'torch', 'PIL', *sys.stdlib_module_names}
    assert not {name for name in loaded if name.partition('.')[0] not in known}
    assert not {name for name in loaded if name.startswith('torch.') and not name.startswith('torch.utils.')}
    parts = ('cli', 'deploy', 'hub', 'losses', 'trained', 'training', 'validation')
    assert not {name for name in loaded if name.startswith(tuple(f'nbn_timm.{part}' for part in parts))}
