"""Average precision of boxes and masks, over all classes and over rare, common and frequent ones."""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detection_data import Annotations
from faster_coco_eval import COCO
from faster_coco_eval.core import mask as rle
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

NAMES = {'AP': None, 'APr': 'r', 'APc': 'c', 'APf': 'f'}


def as_results(found: Mapping[str, torch.Tensor], image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections of an image in the form of COCO's result files.

    Args:
        found: Boxes, scores, labels from 1 on, and perhaps masks [N, 1, H, W] from 0 to 1, as torchvision gives them.
        image_id: Of the image.
        category_ids: Of the classes with label 1, 2, ...
    """
    results = []
    for index, (left, top, right, bottom) in enumerate(found['boxes'].tolist()):
        one: dict[str, Any] = {
            'image_id': image_id, 'category_id': category_ids[int(found['labels'][index]) - 1],
            'score': float(found['scores'][index]), 'bbox': [left, top, right - left, bottom - top]}
        if 'masks' in found:
            code = rle.encode(np.asfortranarray((found['masks'][index, 0] > 0.5).cpu().numpy().astype(np.uint8)))
            counts = code['counts']
            one['segmentation'] = code | {'counts': counts.decode() if isinstance(counts, bytes) else counts}
        results.append(one)
    return results


def average_precision(annotations: Annotations, frequencies: Sequence[str], results: Sequence[Mapping[str, Any]],
                      kind: str, detections: int = 300) -> dict[str, float]:
    """AP over overlaps of .5 to .95, in percent, of all classes and of those of each frequency.

    Where the annotations are federated, as in LVIS, a detection of a class that its image was not searched for does not
    count, nor does a false one of a class that the image was not searched through for. faster-coco-eval does all of it.

    Args:
        annotations: The truth.
        frequencies: 'r', 'c' or 'f' of each class.
        results: See `as_results`.
        kind: 'bbox' or 'segm'.
        detections: Per image and class that count.

    Returns:
        AP, APr, APc and APf; NaN where no class of a kind is in the images.
    """
    wanted = ('image_id', 'category_id', 'score', {'bbox': 'bbox', 'segm': 'segmentation'}[kind])
    truth = COCO(as_truth(annotations, frequencies))
    # The library leaves out the same, but 1.8.0 fails on masks of an image of which nothing remains.
    counting = annotations.searched if annotations.federated else None
    found = truth.loadRes([{key: one[key] for key in wanted} for one in results
                           if counting is None or one['category_id'] in counting[one['image_id']]])
    evaluation = COCOeval_faster(truth, found, kind, lvis_style=annotations.federated,
                                 print_function=lambda *_: None)
    evaluation.params.maxDets = [detections]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = np.asarray(evaluation.eval['precision'])[:, :, :, 0, -1]  # overlaps, recalls, classes; -1 for none
    letters = np.asarray(frequencies)
    return {name: _mean(precision if letter is None else precision[:, :, letters == letter])
            for name, letter in NAMES.items()}


def as_truth(annotations: Annotations, frequencies: Sequence[str]) -> dict[str, Any]:
    """The annotations as faster-coco-eval needs them.

    It asks for a frequency of each class where they are federated, takes an object with the id 0 for one that was not
    found, and leaves out objects whose area is outside of its ranges, though only the range of all sizes counts here.
    """
    labels = annotations.labels
    categories = [one | {'frequency': frequencies[labels[one['id']] - 1]} for one in annotations.content['categories']]
    objects = [one | {'id': number, 'area': one['bbox'][2] * one['bbox'][3]}
               for number, one in enumerate(annotations.content['annotations'], 1)]
    return {'images': annotations.content['images'], 'categories': categories, 'annotations': objects}


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(100 * known.mean()) if known.size else float('nan')


def known(figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """The figures with None for NaN, which JSON has not."""
    return {kind: {name: None if np.isnan(value) else value for name, value in values.items()}
            for kind, values in figures.items()}


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of each kind, one line each, for people."""
    lines = ['       ' + ''.join(f'{name:>8}' for name in NAMES)]
    for kind, values in figures.items():
        lines.append(f'  {kind:<5}' + ''.join(f'{"n/a" if np.isnan(values[name]) else f"{values[name]:.2f}":>8}'
                                              for name in NAMES))
    return '\n'.join(lines)
