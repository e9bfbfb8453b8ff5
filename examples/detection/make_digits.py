"""Make a small long-tailed detection set in LVIS's form: scikit-learn's digits pasted onto its two photographs.

    python examples/detection/make_digits.py detection_digits
"""
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detection_data import frequency_of
from faster_coco_eval.core import mask as rle
from PIL import Image

from nbn_timm.datasets.digits_lt import load_digit_images
from nbn_timm.errors import InputError, run_cli
from nbn_timm.files import make_folder, write_text_atomic

SIDE, CELL = 96, 32  # of a picture and of the squares that hold one digit each, in pixels
SMALLEST = 20  # side of a digit
MOST, LEAST = 150, 6  # training pictures that the digits 0 and 9 are in
TRAIN, VAL, VAL_COUNT = 200, 60, 18  # pictures, and how many of the latter each digit is in
SHADE = 0.35  # of the photographs, so that white digits stand out


def training_counts() -> np.ndarray:
    """Training pictures that each digit is in, int64 [10], falling by a constant factor."""
    return np.rint(MOST * (LEAST / MOST) ** (np.arange(10) / 9)).astype(np.int64)


def load_photographs() -> list[np.ndarray]:
    """scikit-learn's two photographs, uint8 [427, 640, 3]."""
    from sklearn.datasets import load_sample_images
    return list(load_sample_images().images)


def draw_split(folder: Path, name: str, counts: Sequence[int], pictures: int, pools: Sequence[np.ndarray],
               random: np.random.Generator) -> dict[str, Any]:
    """Write the pictures of a split, and return its annotations.

    Args:
        folder: The pictures get into a folder of the split's name below it.
        name: Of the split.
        counts: Pictures that each digit is in.
        pictures: How many there are.
        pools: For each digit at least that many of its images [32, 32, 3].
        random: Draws all.
    """
    make_folder(folder / name)
    # Each digit is at most once in a picture, so that its pictures can be counted beforehand.
    members: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(pictures)]
    for digit, (count, pool) in enumerate(zip(counts, pools, strict=True)):
        for picture, image in zip(random.permutation(pictures)[:count], pool[:count], strict=True):
            members[picture].append((digit, image))
    photographs = load_photographs()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, digits in enumerate(members, 1):
        canvas = _background(photographs, random)
        cells = random.permutation((SIDE // CELL) ** 2)
        for cell, (digit, image) in zip(cells[:len(digits)], digits, strict=True):
            mask = _paste(canvas, image, cell, random)
            annotations.append({'id': len(annotations) + 1, 'image_id': number, 'category_id': digit + 1,
                                **_shape(mask)})
        file = f'{name}/{number:05}.png'
        Image.fromarray(canvas).save(folder / file)
        images.append({'id': number, 'file_name': file, 'width': SIDE, 'height': SIDE,
                       'neg_category_ids': sorted(set(range(1, 11)) - {digit + 1 for digit, _ in digits}),
                       'not_exhaustive_category_ids': []})
    return {'images': images, 'annotations': annotations}


def _background(photographs: Sequence[np.ndarray], random: np.random.Generator) -> np.ndarray:
    photograph = photographs[int(random.integers(len(photographs)))]
    top, left = (random.integers(side - SIDE + 1) for side in photograph.shape[:2])
    return (photograph[top:top + SIDE, left:left + SIDE] * SHADE).astype(np.uint8)


def _paste(canvas: np.ndarray, image: np.ndarray, cell: int, random: np.random.Generator) -> np.ndarray:
    """Paste a digit into a cell of the canvas, and return its mask, bool [SIDE, SIDE]."""
    side = int(random.integers(SMALLEST, CELL + 1))
    row, column = divmod(int(cell), SIDE // CELL)
    top, left = (CELL * start + int(random.integers(CELL - side + 1)) for start in (row, column))
    digit = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    inside = digit[..., 0] > 64
    part = canvas[top:top + side, left:left + side]
    part[inside] = digit[inside]
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top:top + side, left:left + side] = inside
    return mask


def _shape(mask: np.ndarray) -> dict[str, Any]:
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = code['counts']
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    return {'bbox': [float(value) for value in box], 'area': float(mask.sum()),
            'segmentation': {'size': [SIDE, SIDE], 'counts': counts.decode() if isinstance(counts, bytes) else counts}}


def make_digits(folder: Path, seed: int = 0) -> None:
    """Write the folder; see the head of this file."""
    random = np.random.default_rng(seed)
    images, labels = load_digit_images()
    pools = [random.permutation(images[labels == digit]) for digit in range(10)]
    counts = training_counts()
    categories = [{'id': digit + 1, 'name': str(digit), 'image_count': int(count), 'frequency': frequency_of(count)}
                  for digit, count in enumerate(counts)]
    train = draw_split(folder, 'train', counts.tolist(), TRAIN, pools, random)
    val = draw_split(folder, 'val', [VAL_COUNT] * 10, VAL, [pool[MOST:] for pool in pools], random)
    for name, content in (('train', train), ('val', val)):
        write_text_atomic(folder / f'{name}.json', json.dumps(content | {'categories': categories}))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        InputError: The folder cannot be written.
    """
    parser = argparse.ArgumentParser(description='Make a small long-tailed detection set in the form of LVIS.')
    parser.add_argument('folder', type=Path, help='where it goes')
    folder = parser.parse_args(argv).folder
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file: choose another folder")
    make_digits(folder)
    print(f'{TRAIN} training and {VAL} validation pictures in {folder}; training pictures of each digit: '
          f'{" ".join(map(str, training_counts()))}')


if __name__ == '__main__':
    sys.exit(run_cli(main, 'make_digits.py'))
