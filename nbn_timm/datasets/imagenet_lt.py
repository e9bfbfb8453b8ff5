"""ImageNet-LT: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019."""
from timm.data import ImageNetInfo

from nbn_timm.data.defaults import DataDefaults
from nbn_timm.datasets.benchmark import Statistics, register_benchmark
from nbn_timm.datasets.list_benchmark import ListBenchmark
from nbn_timm.datasets.list_files import ListFile


@register_benchmark('imagenet_lt')
class ImageNetLT(ListBenchmark):
    """1000 classes of ImageNet with 1280 to 5 images; the test split is ImageNet's validation set.

    Input format as in Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020.
    """

    title = 'ImageNet-LT'
    num_classes = 1000
    home = 'https://image-net.org/download'
    images = 'ILSVRC 2012 as `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`'
    terms = 'non-commercial research and education, on registration'
    hub_id = 'ILSVRC/imagenet-1k'
    zoo, zoo_default = 'imagenet', True
    defaults = DataDefaults()
    folder = 'ImageNet_LT'
    lists = {
        'train': ListFile('ImageNet_LT_train.txt', 'a063f095fcd475db4cf8b0658c4b73955535bbf9'),
        'val': ListFile('ImageNet_LT_val.txt', '3ed3188b2f44829ce2dec1cc27040d8d40984088'),
        'test': ListFile('ImageNet_LT_test.txt', '76a2fb9749d6cd29e765cc4f8c270f2504131e2f'),
    }
    published = Statistics(115_846, 20_000, 50_000, largest=1280, smallest=5, shots=(385, 479, 136))

    def class_names(self) -> tuple[str, ...]:
        return tuple(ImageNetInfo().label_descriptions())
