"""VOC-MLT (Wu et al., "Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed Datasets", ECCV 2020).
"""
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from nbn_timm.datasets.benchmark import Statistics, register_benchmark
from nbn_timm.datasets.label_set_benchmark import LabelledImage, LabelSetBenchmark
from nbn_timm.errors import InputError, in_words


@register_benchmark('voc_mlt')
class VocMLT(LabelSetBenchmark):
    """20 classes with 775 to 4 images of VOC 2012; the test split is that of VOC 2007.

    A class is a label of an image if an object of it is annotated, difficult ones included.
    """

    title = 'VOC-MLT'
    num_classes = 20
    home = 'http://host.robots.ox.ac.uk/pascal/VOC/'
    images = '`VOC2012` (trainval) and `VOC2007` (test) with `JPEGImages`, `Annotations` and `ImageSets`, which is ' \
             'what `VOCdevkit` holds'
    terms = "Flickr's terms; the list for non-commercial research and education"
    names = ('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable',
             'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')
    list_folder, list_name = 'appendix/VOCdevkit/longtail2012', 'img_id.txt'
    list_blob = '2da2c2c01d61fec539738560090b9694af3b0268'
    digest = '16319ba8967cd57bdb8d2848d71811afdf126c3ebff0edbccca1912d925fa245'
    published = Statistics(1_142, None, 4_952, largest=775, smallest=4, shots=(6, 6, 8))

    def train_images(self, ids: Sequence[str], data_dir: Path) -> list[LabelledImage]:
        return [self._image('VOC2012', name, data_dir) for name in ids]

    def test_images(self, data_dir: Path) -> list[LabelledImage]:
        path = data_dir / 'VOC2007' / 'ImageSets' / 'Main' / 'test.txt'
        if not path.is_file():
            raise InputError(f"'{path}' is missing: obtain {self.images} from {self.home}")
        return [self._image('VOC2007', name, data_dir) for name in path.read_text(encoding='utf-8').split()]

    def _image(self, year: str, name: str, data_dir: Path) -> LabelledImage:
        path = data_dir / year / 'Annotations' / f'{name}.xml'
        try:
            objects = ElementTree.parse(path).getroot().findall('object')
            labels = {self.names.index(str(one.findtext('name'))) for one in objects}
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise InputError(f"the annotation '{path}' cannot be read ({in_words(error)}): obtain {self.images} from "
                             f'{self.home}') from error
        return LabelledImage(f'{year}/JPEGImages/{name}.jpg', tuple(sorted(labels)))
