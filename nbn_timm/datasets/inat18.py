"""iNaturalist 2018: Van Horn et al., "The iNaturalist Species Classification and Detection Dataset", CVPR 2018."""
from nbn_timm.data.defaults import DataDefaults
from nbn_timm.datasets.benchmark import Statistics, register_benchmark
from nbn_timm.datasets.list_benchmark import ListBenchmark
from nbn_timm.datasets.list_files import ListFile


@register_benchmark('inat18')
class INaturalist18(ListBenchmark):
    """8142 species with 1000 to 2 images, long-tailed by nature.

    There is no split to select a model on: the published validation list is what the literature tests on. Input format
    as in Kang et al., ICLR 2020, which trains without jitter.
    """

    title = 'iNaturalist 2018'
    num_classes = 8142
    home = 'https://github.com/visipedia/inat_comp/tree/master/2018'
    images = 'archive `train_val2018.tar.gz`, as `train_val2018/<group>/<class>/*.jpg`'
    terms = 'non-commercial research and education'
    zoo = 'imagenet'
    defaults = DataDefaults(mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192), color_jitter=None)
    folder = 'iNaturalist18'
    lists = {
        'train': ListFile('iNaturalist18_train.txt', '4accdb7584d2f0a5106c40a33ed6afa392189bcc'),
        'test': ListFile('iNaturalist18_val.txt', '4c23900857fd0f5adcd4cc0dffef345039eeb05f'),
    }
    shift_ratios = (3, 2)  # of SADE, since a class has three test images
    published = Statistics(437_513, None, 24_426, largest=1000, smallest=2, shots=(842, 4076, 3224))
