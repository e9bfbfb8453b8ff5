"""timm's own dataset types, each a prefix: 'torch/cifar10', 'hfds/user/name'."""
from collections.abc import Collection

from nbn_timm.data.settings import DataSettings
from nbn_timm.data.splits import Source
from nbn_timm.data.timm_datasets import STREAMED_TYPES, TIMM_TYPES, class_names, open_timm_dataset
from nbn_timm.datasets.named_dataset import NamedDataset, register_dataset
from nbn_timm.errors import InputError


class TimmDataset(NamedDataset):
    """What `timm.data.create_dataset` opens under the name."""

    hint = "timm's"
    needs_folder = False  # some types have a cache of their own

    @property
    def _streamed(self) -> bool:
        return self.name.lower().startswith(STREAMED_TYPES)

    def read(self, settings: DataSettings, parts: Collection[str], count: bool) -> Source:
        split_names = {'train': settings.train_split, 'val': settings.val_split, 'test': settings.test_split}
        source = Source()
        for part, split in split_names.items():
            if not split or not (part in parts or (part == 'train' and count and not self._streamed)):
                continue
            try:
                source.datasets[part] = open_timm_dataset(
                    settings.dataset,
                    split,
                    root=settings.data_dir,
                    is_training=part == 'train',
                    download=settings.download,
                    batch_size=settings.batch_size,
                    seed=settings.seed,
                )
            except InputError:
                if part in parts:
                    raise
        source.names = next((class_names(dataset) for dataset in source.datasets.values()), None)
        return source

    def own_settings(self, settings: DataSettings) -> frozenset[str]:
        own = {'data_dir', 'download', 'train_split', 'val_split', 'test_split'}
        return frozenset(own | {'batch_size', 'seed'} if self._streamed else own)

    def validates(self, settings: DataSettings) -> bool:
        return bool(settings.val_split)


for _prefix in TIMM_TYPES:
    register_dataset(_prefix)(TimmDataset)
