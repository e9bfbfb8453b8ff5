"""Places-LT: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019."""
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.datasets.benchmark import Statistics, register_benchmark
from nbn_timm.datasets.list_benchmark import ListBenchmark
from nbn_timm.datasets.list_files import ListFile


@register_benchmark('places_lt')
class PlacesLT(ListBenchmark):
    """365 kinds of places with 4980 to 5 images; the test split is Places365's validation set.

    Input format as in Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020.
    """

    title = 'Places-LT'
    num_classes = 365
    home = 'http://places2.csail.mit.edu/download.html'
    images = 'Places365-Standard, small images in easy directory structure, as `train/<class>/*.jpg` and ' \
             '`val/<class>/*.jpg`'
    terms = 'non-commercial research and education'
    zoo = 'imagenet'
    defaults = DataDefaults()
    folder = 'Places_LT'
    lists = {
        'train': ListFile('Places_LT_train.txt', '6392252f8ae867bc8a5e841cc1b29e5b8ef4b636'),
        'val': ListFile('Places_LT_val.txt', 'b93a2ca58ccb7f3b671c176f395a70bf52c95533'),
        'test': ListFile('Places_LT_test.txt', 'e732e58b8aa718a2c1c11933375f5710652c2b93'),
    }
    published = Statistics(62_500, 7_300, 36_500, largest=4980, smallest=5, shots=(131, 163, 71))
