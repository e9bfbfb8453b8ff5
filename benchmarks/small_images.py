"""How fast training batches of small images are: one image at a time against in memory, and beside them the network.

    python benchmarks/small_images.py --threads 1

Random CIFAR-sized pictures in PNG files; the cases take turns, and medians and best rounds are printed. Time is that of
the process on its processor, so that other work on the machine counts little; with more threads or a GPU it is the
clock's.
"""
import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.data import RandomSampler

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.data import AugmentSettings, ImageSamples, create_train_loader, keep_in_memory
from nbn_timm.datasets import find_dataset

BATCH = 128
CIFAR_LT = find_dataset('cifar100_lt').defaults
AUGMENTATIONS = {
    '': AugmentSettings(),
    ', rotation': AugmentSettings(rotation=15),
    ', AutoAugment and Cutout': AugmentSettings(aa='cifar10', cutout=16),
    ', RandAugment': AugmentSettings(aa='rand-m9-mstd0.5'),
    ', colour jitter': AugmentSettings(color_jitter=0.4),
    ', views of SimCLR': AugmentSettings(simclr=True, blur=0.5),
}


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        files = _pictures(Path(folder), args.images)
        start = time.perf_counter()
        memory = keep_in_memory(files, CIFAR_LT, AugmentSettings(), wanted=True)
        print(f'reading {args.images} files once: {args.images / (time.perf_counter() - start):,.0f} images/s')
        cases = {f'training step of {args.model}': _steps(args.model, args.images // 8, device)} if args.model else {}
        for name, augment in AUGMENTATIONS.items():
            few = files.select(range(0, args.images, 8))  # of each case its own, which keeps the transform
            cases[f'one image at a time{name}'] = _epoch(few, augment, device)
            cases[f'in memory{name}'] = _epoch(memory, augment, device)
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(args.repeats):
            for name, run in cases.items():
                seconds[name].append(run())
    for name, times in seconds.items():
        print(f'{name:<52}{1 / statistics.median(times):>10,.0f} images/s{1 / min(times):>10,.0f} at best')


def _pictures(folder: Path, count: int) -> ImageSamples:
    random = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f'{index}.png')
    return ImageSamples([f'{index}.png' for index in range(count)], [0] * count, root=folder)


def _epoch(dataset, augment: AugmentSettings, device: torch.device) -> Callable[[], float]:
    """Seconds per image of an epoch of batches."""
    loader = create_train_loader(dataset, RandomSampler(dataset), batch_size=BATCH, defaults=CIFAR_LT, augment=augment,
                                 num_workers=0, device=device, drop_last=True)

    def run() -> float:
        loader.set_epoch(0)
        start, images = _now(device), 0
        for batch, _ in loader:
            images += len(batch)
        return (_now(device) - start) / images

    return run


def _steps(name: str, images: int, device: torch.device) -> Callable[[], float]:
    """Seconds per image of training steps as the zoo's script runs them."""
    model = timm.create_model(name, num_classes=100).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch = torch.randn(BATCH, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(100, (BATCH,), device=device)

    def run() -> float:
        start = _now(device)
        for _ in range(max(1, images // BATCH)):
            with torch.autocast(device.type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(batch), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return (_now(device) - start) / (max(1, images // BATCH) * BATCH)

    run()
    return run


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.process_time() if device.type == 'cpu' and torch.get_num_threads() == 1 else time.perf_counter()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=4096)
    parser.add_argument('--model', default='resnet32_nbn', help="'' leaves the network out")
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--repeats', type=int, default=5)
    return parser.parse_args()


if __name__ == '__main__':
    main()
