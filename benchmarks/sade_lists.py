"""SADE's test lists as bits over the published test lists: `python benchmarks/sade_lists.py SADE LISTS`.

SADE is a checkout of Vanint/SADE-AgnosticLT, LISTS a folder of published lists in `ImageNet_LT/`, `Places_LT/` and
`iNaturalist18/`, as in facebookresearch/classifier-balancing. Writes nbn_timm/datasets/sade_lists.npz, which has an
array `<benchmark>/<direction>_<ratio>` for each list: bit i says whether image i of the benchmark's test list is in it.
"""
import argparse
from pathlib import Path

import numpy as np

from nbn_timm.data.lists import read_image_list
from nbn_timm.datasets.benchmark import find_benchmark
from nbn_timm.datasets.list_benchmark import SADE_LISTS, ListBenchmark

FOLDERS = {'imagenet_lt': 'ImageNet_LT', 'places_lt': 'Places_LT_v2', 'inat18': 'iNaturalist18'}


def bits(benchmark: ListBenchmark, listed: Path, test: Path) -> np.ndarray:
    """Packed bits of one list; images go by file name, since Places-LT's folders differ between the two."""
    everything = read_image_list(test, benchmark.num_classes)
    part = read_image_list(listed, benchmark.num_classes)
    place = {Path(path).name: index for index, path in enumerate(everything.paths)}
    assert len(place) == len(everything.paths)
    chosen = np.zeros(len(place), dtype=bool)
    for path, label in zip(part.paths, part.targets, strict=True):
        index = place[Path(path).name]
        assert everything.targets[index] == label and not chosen[index]
        chosen[index] = True
    return np.packbits(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sade', type=Path)
    parser.add_argument('lists', type=Path)
    args = parser.parse_args()
    found = {}
    for name, folder in FOLDERS.items():
        benchmark = find_benchmark(name)
        assert isinstance(benchmark, ListBenchmark)
        test = args.lists / benchmark.folder / benchmark.lists['test'].name
        for ratio in benchmark.shift_ratios:
            for direction in ('forward', 'backward'):
                stem = folder.removesuffix('_v2')
                listed = args.sade / 'data_txt' / folder / f'{stem}_{direction}{ratio}.txt'
                found[f'{name}/{direction}_{ratio}'] = bits(benchmark, listed, test)
    np.savez_compressed(SADE_LISTS, **found)  # type: ignore[arg-type]


if __name__ == '__main__':
    main()
