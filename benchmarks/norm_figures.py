"""What a network's normalisation looks like inside: the figures by which the NBN paper argues, of any checkpoint.

    python benchmarks/norm_figures.py output/full/modern-s42/last.pth.tar output/full/nbn_modern-s42/last.pth.tar \\
        --data-dir /data/cifar100_lt --output docs/images/norms.png

Three panels, a line or group of bars for each network: the applied weights |g| and biases |b| of the normalisation
layers of the last stage, sorted within each layer and averaged over its layers; and the mean length of the features
before the classifier, for test images of many-, medium- and few-shot classes. The numbers are printed as well.
"""
import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from nbn_timm.data import create_eval_loader
from nbn_timm.errors import InputError, run_cli
from nbn_timm.files import atomic_write
from nbn_timm.layers import NormalizedBatchNorm2d
from nbn_timm.training.distributed import init_world
from nbn_timm.validation import ValidateSettings, open_evaluated_data, open_network, resolve_input, validation_settings

SHOTS = ('many', 'medium', 'few')
COLORS = ('#5c5c5c', '#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7')


def applied_affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias [C] that a normalisation layer applies."""
    if isinstance(norm, NormalizedBatchNorm2d):
        return norm.effective_affine()
    return norm.weight, norm.bias


def last_stage(model: Any) -> list[nn.BatchNorm2d]:
    """The normalisation layers with parameters of the last stage that has any."""
    stage = model.feature_info[-1]['module']
    names = [name for name, _ in model.named_modules() if name == stage or name.startswith(f'{stage}.')]
    found = [module for name, module in model.named_modules()
             if name in names and isinstance(module, nn.BatchNorm2d) and module.affine]
    if not found:
        raise InputError(f"there is no BatchNorm2d in '{stage}': give a network with BatchNorm or NBN")
    width = found[-1].num_features
    return [norm for norm in found if norm.num_features == width]


@torch.no_grad()
def sorted_sizes(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """|g| and |b|, largest first, each [C], averaged over the layers of the last stage."""
    pairs = [applied_affine(norm) for norm in last_stage(model)]
    return tuple(torch.stack([pair[part].abs().sort(descending=True).values for pair in pairs]).mean(0)
                 for part in (0, 1))  # type: ignore[return-value]


@torch.inference_mode()
def feature_lengths(checkpoint: str, data_dir: str | None) -> tuple[Any, dict[str, float]]:
    """The network, and the mean length of its features on test images by shot."""
    given = {'checkpoint': checkpoint, 'workers': 0, 'device': 'cpu', **({'data_dir': data_dir} if data_dir else {})}
    settings = validation_settings(ValidateSettings.of(given), given)
    trained = open_network(settings)
    splits, counts = open_evaluated_data(settings, trained, init_world('cpu'))
    if counts is None or splits.test is None:
        raise InputError(f"'{checkpoint}' does not say how many training images its classes had: give another")
    loader = create_eval_loader(splits.test, batch_size=256, num_workers=0,
                                defaults=resolve_input(settings, splits.defaults, trained))
    model = trained.model.eval()
    sums, numbers = torch.zeros(counts.num_classes, dtype=torch.float64), torch.zeros(counts.num_classes)
    for images, target in loader:
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        sums.index_add_(0, target, features.flatten(1).norm(dim=1).double())
        numbers.index_add_(0, target, torch.ones(len(target)))
    shots = counts.shot_split(*splits.shot_limits)
    return model, {shot: float(sums[mask := torch.as_tensor(getattr(shots, shot))].sum() / numbers[mask].sum())
                   for shot in SHOTS}


def draw(networks: dict[str, tuple[Any, dict[str, float]]]) -> Figure:
    """The three panels."""
    figure = Figure(figsize=(10, 3.2), layout='constrained')
    weights, biases, lengths = figure.subplots(1, 3)
    for position, (name, (model, by_shot)) in enumerate(networks.items()):
        for axes, sizes in zip((weights, biases), sorted_sizes(model), strict=True):
            axes.plot(range(1, len(sizes) + 1), sizes, color=COLORS[position % len(COLORS)], label=name)
        bar = 0.8 / len(networks)
        lengths.bar([shot + (position - (len(networks) - 1) / 2) * bar for shot in range(len(SHOTS))],
                    list(by_shot.values()), width=bar, color=COLORS[position % len(COLORS)], label=name)
    for axes, title in ((weights, '|g|, sorted'), (biases, '|b|, sorted')):
        axes.set(title=title, xlabel='channel', ylim=(0, None))
    lengths.set(title='mean feature length', xlabel='test images, by the shots of their class')
    lengths.set_xticks(range(len(SHOTS)), SHOTS)
    weights.legend(frameon=False, fontsize=8)
    for axes in (weights, biases, lengths):
        axes.spines[['top', 'right']].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoints', nargs='+', metavar='CHECKPOINT')
    parser.add_argument('--names', nargs='+', default=[], help="of the networks (default: their folders')")
    parser.add_argument('--data-dir', help='folder of the test images (default: as recorded)')
    parser.add_argument('--output', type=Path, default=Path('norms.png'))
    args = parser.parse_args(argv)
    names = args.names or [Path(checkpoint).resolve().parent.name for checkpoint in args.checkpoints]
    if len(names) != len(set(names)) or len(names) != len(args.checkpoints):
        raise InputError('the networks need one name each: give --names')
    networks = {name: feature_lengths(checkpoint, args.data_dir)
                for name, checkpoint in zip(names, args.checkpoints, strict=True)}
    for name, (model, by_shot) in networks.items():
        weight, bias = sorted_sizes(model)
        told = ', '.join(f'{shot} {length:.3f}' for shot, length in by_shot.items())
        print(f'{name}: |g| {weight[0]:.3f} to {weight[-1]:.3f}, |b| {bias[0]:.3f} to {bias[-1]:.3f}; length {told}')
    figure = draw(networks)
    atomic_write(args.output, lambda path: figure.savefig(path, format='png', dpi=150))


if __name__ == '__main__':
    sys.exit(run_cli(main, 'norm_figures.py'))
