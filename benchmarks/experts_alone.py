"""Accuracy of each expert of a network by itself, and how far the experts differ.

    python benchmarks/experts_alone.py resnet32_ride_nbn_lr.cifar100_lt --data-dir /data/cifar100_lt \\
        --train-list lists/CIFAR100_LT_if100_train.txt --test-list lists/CIFAR100_LT_test.txt --every 5

A network is a name of timm's registry with pretrained weights, or a checkpoint of train.py. The divergence is
KL(softmax of the mean logits || softmax of an expert's), the mean over images and experts, of plain logits z and of
z + log n.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbn_timm.data import ClassCounts, create_eval_loader
from nbn_timm.datasets import create_splits
from nbn_timm.models.create import create_model
from nbn_timm.models.weight_files import load_weights
from nbn_timm.trained.opening import checkpoint_record
from nbn_timm.training.settings import TrainSettings


def open_network(name: str, num_classes: int) -> Any:
    """A network of several experts in eval mode."""
    if not Path(name).is_file():
        return create_model(name, num_classes, pretrained=True).eval()
    arch, nbn, kwargs = checkpoint_record(name).model_settings(None, None, {}, '--model')
    model = create_model(arch, num_classes, nbn=nbn, model_kwargs=kwargs)
    load_weights(model, name)
    return model.eval()


def divergence(logits: torch.Tensor) -> float:
    """Of logits [N, E, C]."""
    mean = logits.mean(dim=1).log_softmax(dim=1)[:, None]
    return float((mean.exp() * (mean - logits.log_softmax(dim=2))).sum(dim=2).mean())


def shares(logits: torch.Tensor, labels: torch.Tensor, counts: ClassCounts) -> Iterator[str]:
    """Accuracies of all, many-, medium- and few-shot classes, and the share of few-shot answers, in percent."""
    right, answers = logits.argmax(dim=1) == labels, logits.argmax(dim=1)
    yield f'{100 * right.float().mean():.1f}'
    for _, classes in counts.shot_split().items():
        yield f'{100 * right[torch.isin(labels, torch.tensor(classes))].float().mean():.1f}'
    few = torch.tensor(dict(counts.shot_split().items())['few'])
    yield f'{100 * torch.isin(answers, few).float().mean():.1f}'


def main() -> None:
    args = _parse()
    settings = TrainSettings.of({name: getattr(args, name) for name in (
        'dataset', 'data_dir', 'train_list', 'test_list', 'img_size')})
    splits = create_splits(settings.data)
    assert splits.test is not None and splits.class_counts is not None
    test: Any = splits.test
    chosen = np.arange(0, len(test), args.every)
    model = open_network(args.network, splits.num_classes)
    defaults = splits.defaults.for_model(model.pretrained_cfg).as_trained(settings.input)
    loader = create_eval_loader(test.select(chosen), batch_size=100, defaults=defaults, num_workers=0)
    found = []
    with torch.no_grad():
        for images, _ in loader:
            shared = model.forward_shared(images)
            each = [model.forward_expert(shared, expert)[1] for expert in range(model.num_experts)]
            found.append(torch.stack(each, dim=1))
    logits, labels = torch.cat(found), torch.from_numpy(test.targets[chosen])
    print('| | all | many | medium | few | few-shot answers |\n|---|---|---|---|---|---|')
    parts = {'mean': logits.mean(dim=1), **{f'expert {e + 1}': logits[:, e] for e in range(model.num_experts)}}
    for name, part in parts.items():
        print(f'| {name} | {" | ".join(shares(part, labels, splits.class_counts))} |')
    log_counts = splits.class_counts.tensor().clamp(min=1).log().float()
    print(f'divergence of z {divergence(logits):.3f}, of z + log n {divergence(logits + log_counts):.3f}, '
          f'{len(labels):,} images')


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('network', help='name with pretrained weights, or a checkpoint')
    parser.add_argument('--dataset', default='cifar100_lt', help='benchmark')
    parser.add_argument('--data-dir', required=True, help='folder of the images')
    parser.add_argument('--train-list', help='list of the training images, which tells the counts')
    parser.add_argument('--test-list', help='list of the test images')
    parser.add_argument('--img-size', type=int, help='pixels of a side')
    parser.add_argument('--every', type=int, default=1, help='take each so many-th image')
    return parser.parse_args()


if __name__ == '__main__':
    main()
