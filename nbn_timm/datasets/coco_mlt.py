"""COCO-MLT (Wu et al., "Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed Datasets", ECCV 2020).
"""
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbn_timm.datasets.benchmark import Statistics, register_benchmark
from nbn_timm.datasets.label_set_benchmark import LabelledImage, LabelSetBenchmark
from nbn_timm.errors import InputError, in_words
from nbn_timm.files import open_regular


@register_benchmark('coco_mlt')
class CocoMLT(LabelSetBenchmark):
    """80 classes with 1128 to 6 images of COCO 2017; the test split is COCO's validation set.

    A class is a label of an image if an object of it is annotated that has an area and is at least a pixel wide and
    high.
    """

    title = 'COCO-MLT'
    num_classes = 80
    home = 'https://cocodataset.org'
    images = '`train2017`, `val2017` and `annotations/instances_{train,val}2017.json`'
    terms = "Flickr's terms, annotations CC BY 4.0; the list for non-commercial research and education"
    names = ('person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train', 'truck', 'boat', 'traffic_light',
             'fire_hydrant', 'stop_sign', 'parking_meter', 'bench', 'bird', 'cat', 'dog', 'horse', 'sheep', 'cow',
             'elephant', 'bear', 'zebra', 'giraffe', 'backpack', 'umbrella', 'handbag', 'tie', 'suitcase', 'frisbee',
             'skis', 'snowboard', 'sports_ball', 'kite', 'baseball_bat', 'baseball_glove', 'skateboard', 'surfboard',
             'tennis_racket', 'bottle', 'wine_glass', 'cup', 'fork', 'knife', 'spoon', 'bowl', 'banana', 'apple',
             'sandwich', 'orange', 'broccoli', 'carrot', 'hot_dog', 'pizza', 'donut', 'cake', 'chair', 'couch',
             'potted_plant', 'bed', 'dining_table', 'toilet', 'tv', 'laptop', 'mouse', 'remote', 'keyboard',
             'cell_phone', 'microwave', 'oven', 'toaster', 'sink', 'refrigerator', 'book', 'clock', 'vase', 'scissors',
             'teddy_bear', 'hair_drier', 'toothbrush')
    list_folder, list_name = 'appendix/coco/longtail2017', 'img_id.pkl'  # which is text
    list_blob = '0bcf8ea1b635257c85835690b08e2bc09fa87198'
    digest = '79515b7fa84097b77bf03b5e6ed5e2c6c7816a7c6bf266b9501f0f6c67f2eba6'
    published = Statistics(1_909, None, 5_000, largest=1_128, smallest=6, shots=(22, 33, 25))

    def train_images(self, ids: Sequence[str], data_dir: Path) -> list[LabelledImage]:
        of_all = {int(Path(image.path).stem): image for image in self._images(data_dir, 'train2017')}
        missing = [name for name in ids if int(name) not in of_all]
        if missing:
            raise InputError(f'the annotations of train2017 have no image {missing[0]}: obtain {self.images} from '
                             f'{self.home}')
        return [of_all[int(name)] for name in ids]

    def test_images(self, data_dir: Path) -> list[LabelledImage]:
        return self._images(data_dir, 'val2017')

    def _images(self, data_dir: Path, part: str) -> list[LabelledImage]:
        path = data_dir / 'annotations' / f'instances_{part}.json'
        try:
            with open_regular(path) as file:
                data = json.load(file)
            label_of = {category['id']: self.names.index(category['name'].replace(' ', '_'))
                        for category in data['categories']}
            labels: dict[int, set[int]] = defaultdict(set)
            for one in data['annotations']:
                if _counts(one):
                    labels[one['image_id']].add(label_of[one['category_id']])
            return [LabelledImage(f'{part}/{image["file_name"]}', tuple(sorted(labels[image['id']])))
                    for image in data['images']]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the annotations '{path}' cannot be read ({in_words(error)}): obtain {self.images} from "
                             f'{self.home}') from error


def _counts(annotation: dict[str, Any]) -> bool:
    _, _, width, height = annotation['bbox']
    return not annotation.get('ignore') and annotation['area'] > 0 and width >= 1 and height >= 1
