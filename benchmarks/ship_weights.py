"""Put the weights of a finished run into the package, with a record of how they were trained and what they reach.

    python benchmarks/ship_weights.py output/zoo/nbn_bs-s42 resnet32_nbn.cifar100_lt --data-dir /data/cifar100_png

writes `nbn_timm/weights/resnet32_nbn.cifar100_lt.safetensors` and, beside it, `.json`. The accuracy in it is what
`validate.py` gives for the written file, in float32; the run's own was evaluated as it was trained, in bfloat16. The
table of docs/weights.md is made anew from all records.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from nbn_timm.files import write_text_atomic
from nbn_timm.models._pretrained import shipped_names, write_zoo_file
from nbn_timm.models.weight_files import read_checkpoint, read_state_dict, save_weights, weights_digest
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.trained.results import Results, ResultsFile
from nbn_timm.training.settings import TrainSettings, public_record

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / 'nbn_timm' / 'weights'
BEGIN, END = '<!-- shipped -->', '<!-- /shipped -->'


def main() -> None:
    args = _parse()
    checkpoint = args.run / args.checkpoint
    target = WEIGHTS / f'{args.name}.safetensors'
    WEIGHTS.mkdir(exist_ok=True)
    write_zoo_file(checkpoint, target)
    if args.half:
        save_weights(halved(read_state_dict(target)), target)
    record = replace(
        public_record(NetworkRecord.of_checkpoint(read_checkpoint(checkpoint))), arch=None, name=args.name,
        digest=weights_digest(read_state_dict(target)), facts=_facts(args.run))
    write_text_atomic(target.with_suffix('.json'), _text(record))
    record = replace(record, test=_validated(args))
    write_text_atomic(target.with_suffix('.json'), _text(record))
    write_table(ROOT / 'docs' / 'weights.md')
    print(f'{args.name}: {target.stat().st_size / 1e6:.2f} MB, {record.test}')


def halved(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Kernels and matrices in float16; vectors, as BatchNorm's statistics, stay as they are."""
    return {key: value.half() if value.ndim > 1 else value for key, value in weights.items()}


def write_table(page: Path) -> None:
    """Put what is shipped between the markers of a page."""
    rows = ['| name | trained with | epochs | all | many | medium | few | file |', '|---|---|---|---|---|---|---|---|']
    for name in shipped_names():
        file = WEIGHTS / f'{name}.safetensors'
        record = NetworkRecord.from_dict(json.loads(file.with_suffix('.json').read_text()), f"the record of '{name}'")
        settings = record.told(TrainSettings)
        assert record.test is not None
        accuracy = ' | '.join(f'{record.test.accuracies[key]:.2f}' for key in ('top1', 'many', 'medium', 'few'))
        rows.append(f'| `{name}` | `{settings.loss.loss}`, seed {settings.run.seed} | '
                    f'{record.epoch}{", second stage" * bool(settings.second_stage.stage)} | {accuracy} '
                    f'| {file.stat().st_size / 1e6:.1f} MB |')
    before, _, rest = page.read_text().partition(BEGIN)
    write_text_atomic(page, '\n'.join([before + BEGIN, *rows, END]) + rest.partition(END)[2])


def _facts(run: Path) -> dict[str, str]:
    path = run / 'hardware.json'
    return json.loads(path.read_text()) if path.exists() else {}


def _validated(args: argparse.Namespace) -> Results:
    """Accuracies of the written file in percent, as validate.py gives them."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, 'results.json')
        data = ['--data-dir', args.data_dir] if args.data_dir else []
        subprocess.run([sys.executable, str(ROOT / 'validate.py'), '--model', args.name, '--pretrained', *data,
                        '--workers', '0', '--device', 'cpu', '--results-file', str(results)], check=True)
        return replace(ResultsFile.read(results).results, precision=None)


def _text(record: NetworkRecord) -> str:
    return json.dumps(record.to_dict(), indent=1, default=list) + '\n'


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, help='folder of a run of train.py')
    parser.add_argument('name', help='arch.tag')
    parser.add_argument('--data-dir', help='folder of the images and their lists')
    parser.add_argument('--checkpoint', default='last.pth.tar', help='file in the folder (default: last.pth.tar)')
    parser.add_argument('--half', action='store_true', help='kernels and matrices in float16')
    return parser.parse_args()


if __name__ == '__main__':
    main()
