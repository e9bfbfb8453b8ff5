"""What a network's normalisation looks like inside: the figures by which the NBN paper argues, of any checkpoint.

    python benchmarks/norm_figures.py output/full/modern-s42/last.pth.tar output/full/nbn_modern-s42/last.pth.tar \\
        --data-dir /data/cifar100_lt --output docs/images/norms.png
    python benchmarks/norm_figures.py resnet32.cifar100_lt resnet32_nbn.cifar100_lt --data-dir /data/cifar100_lt

A network is a checkpoint of a run, or a name of the zoo whose weights come with the package. Three panels, a line or
group of bars for each network: the applied weights |g| and biases |b| of the normalisation layers of the last stage,
sorted within each layer and averaged over its layers; and the mean length of the features before the classifier, for
test images of many-, medium- and few-shot classes. The numbers are printed as well.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.figure import Figure

from nbn_timm.data import create_eval_loader
from nbn_timm.errors import InputError, run_cli
from nbn_timm.evaluation import LongTailEvaluator, evaluate
from nbn_timm.files import atomic_write
from nbn_timm.report import NormSizes, norm_sizes
from nbn_timm.report.figures import draw_lengths, draw_sizes
from nbn_timm.training.distributed import init_world
from nbn_timm.validation import ValidateSettings, open_evaluated_data, open_network, resolve_input, validation_settings

COLORS = ('#5c5c5c', '#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7')


def look_inside(network: str, data_dir: str | None) -> tuple[NormSizes, dict[str, float]]:
    """Sizes of a network's normalisation layers, and the mean length of its features on test images by shot."""
    weights = {'model': network, 'pretrained': True} if is_zoo_name(network) else {'checkpoint': network}
    given = {**weights, 'workers': 0, 'device': 'cpu', **({'data_dir': data_dir} if data_dir else {})}
    settings = validation_settings(ValidateSettings.of(given), given)
    trained = open_network(settings)
    splits, counts = open_evaluated_data(settings, trained, init_world('cpu'))
    if counts is None or splits.test is None:
        raise InputError(f"'{network}' does not say how many training images its classes had: give another")
    loader = create_eval_loader(splits.test, batch_size=256, num_workers=0,
                                defaults=resolve_input(settings, splits.defaults, trained))
    evaluator = LongTailEvaluator(counts.num_classes, counts)
    evaluator.keep_predictions()
    evaluate(trained.model, loader, evaluator, torch.device('cpu'))
    kept = evaluator.predictions()
    if kept.feature_length is None:
        raise InputError(f"'{network}' has no single classifier of vectors: give a network with one")
    return norm_sizes(trained.model), {
        shot: float(kept.feature_length[np.isin(kept.labels, labels)].mean())
        for shot, labels in counts.shot_split(*splits.shot_limits).items()}


def is_zoo_name(network: str) -> bool:
    """Whether it is a name of a model and no file."""
    return not Path(network).exists() and timm.is_model(network)


def draw(networks: dict[str, tuple[NormSizes, dict[str, float]]]) -> Figure:
    """The three panels."""
    figure = Figure(figsize=(10, 3.2), layout='constrained')
    weights, biases, lengths = figure.subplots(1, 3)
    sizes = {name: sizes for name, (sizes, _) in networks.items()}
    draw_sizes(weights, sizes, 'weight', '|g|', COLORS)
    draw_sizes(biases, sizes, 'bias', '|b|', COLORS)
    draw_lengths(lengths, {name: by_shot for name, (_, by_shot) in networks.items()}, COLORS)
    lengths.set(xlabel='test images, by the shots of their class')
    for axes in (weights, biases, lengths):
        axes.spines[['top', 'right']].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('networks', nargs='+', metavar='CHECKPOINT|NAME')
    parser.add_argument('--names', nargs='+', default=[], help="of the networks (default: their folders' or their own)")
    parser.add_argument('--data-dir', help='folder of the test images (default: as recorded)')
    parser.add_argument('--output', type=Path, default=Path('norms.png'))
    args = parser.parse_args(argv)
    names = args.names or [network if is_zoo_name(network) else Path(network).resolve().parent.name
                           for network in args.networks]
    if len(names) != len(set(names)) or len(names) != len(args.networks):
        raise InputError('the networks need one name each: give --names')
    networks = {name: look_inside(network, args.data_dir) for name, network in zip(names, args.networks, strict=True)}
    for name, (sizes, by_shot) in networks.items():
        weight, bias = sizes.weight, sizes.bias
        told = ', '.join(f'{shot} {length:.3f}' for shot, length in by_shot.items())
        print(f'{name}: |g| {weight[0]:.3f} to {weight[-1]:.3f}, |b| {bias[0]:.3f} to {bias[-1]:.3f}; length {told}')
    figure = draw(networks)
    atomic_write(args.output, lambda path: figure.savefig(path, format='png', dpi=150))


if __name__ == '__main__':
    sys.exit(run_cli(main, 'norm_figures.py'))
