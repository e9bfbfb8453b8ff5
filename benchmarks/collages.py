"""Pictures of several classes out of real pictures of one: collages of up to four, with CSV files for `--dataset csv`.

    python benchmarks/collages.py collages
    python benchmarks/collages.py collages --dataset cifar100_lt --data-dir data

The pictures of a training collage come from the training split, whose long tail they keep, those of the others from the
test split. A collage has two rows and two columns, and some of its places stay black.
"""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from nbn_timm.data.dataset import LabelledImages
from nbn_timm.data.settings import DataSettings
from nbn_timm.data.tables import write_table
from nbn_timm.datasets import create_splits

BETWEEN = ';'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('output', type=Path, help='folder to write')
    parser.add_argument('--dataset', default='digits_lt', help='whose pictures are of one class and of one size')
    parser.add_argument('--data-dir')
    parser.add_argument('--sizes', type=int, nargs=3, default=(600, 200, 200), metavar=('TRAIN', 'VAL', 'TEST'))
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    splits = create_splits(DataSettings(args.dataset, args.data_dir), ('train', 'test'))
    assert splits.classes is not None
    rng = np.random.default_rng(args.seed)
    for part, size in zip(('train', 'val', 'test'), args.sizes, strict=True):
        source = splits.train if part == 'train' else splits.test
        assert isinstance(source, LabelledImages)
        rows = make_collages(source, splits.classes.names, args.output / part, size, rng)
        write_table(args.output / f'{part}.csv', ('file', 'label'), rows)
    print(f'{sum(args.sizes):,} collages of {args.dataset} in {args.output}')


def make_collages(
        source: LabelledImages,
        names: tuple[str, ...],
        folder: Path,
        size: int,
        rng: np.random.Generator,
) -> list[tuple[str, str]]:
    """Write so many collages; returns their files, relative to the folder above, and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(size):
        chosen = rng.choice(len(source), rng.integers(1, 5), replace=False)
        pictures = [source.image(index) for index in chosen]
        width, height = pictures[0].size
        collage = Image.new('RGB', (2 * width, 2 * height))
        for place, picture in zip(rng.permutation(4), pictures, strict=False):
            collage.paste(picture, (width * (int(place) % 2), height * (int(place) // 2)))
        file = folder / f'{number:05d}.png'
        collage.save(file)
        labels = sorted({names[source.targets[index]] for index in chosen})
        rows.append((f'{folder.name}/{file.name}', BETWEEN.join(labels)))
    return rows


if __name__ == '__main__':
    main()
