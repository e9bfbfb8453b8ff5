"""Settings of cached features and of the heads on them."""
from dataclasses import dataclass, replace

from nbn_timm import timm_flags
from nbn_timm.computation import PrecisionSettings
from nbn_timm.data.settings import DataSettings, InputSettings, LoaderSettings
from nbn_timm.datasets import dataset_choices, reason_unused
from nbn_timm.evaluation.result import METRICS
from nbn_timm.evaluation.settings import EvalBatchSettings
from nbn_timm.imbalance.settings import ImbalanceSettings
from nbn_timm.models.settings import ModelSettings
from nbn_timm.probe.methods import METHODS
from nbn_timm.settings import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    Limits,
    SettingGroups,
    Settings,
    Values,
    key_of,
    not_with,
    setting,
)
from nbn_timm.training.settings import TrainSettings


@dataclass(frozen=True)
class ProbeRunSettings(Settings):
    """The run: its folder, and what it is judged by."""

    title = 'run'

    config: str | None = setting(None, 'defaults for all other flags: a file, or the name of a shipped config',
                                 short='-c', metavar='YAML', kind='place', is_file=True)
    seed: int = setting(42, 'of all random draws', limits=NOT_NEGATIVE)
    output: str = setting('output', 'parent of all run folders', metavar='DIR', kind='place')
    experiment: str | None = setting(None, "the run's folder", metavar='NAME', kind='place',
                                     unset='<model>-<dataset>-probe-s<seed>, with the head of --keep')
    eval_metric: str = setting('mean_class', 'of the validation, by which a head is chosen', choices=METRICS)
    report: bool = setting(True, 'write report.html when the run ends', kind='machine')


@dataclass(frozen=True)
class BackboneSettings(Settings):
    """From which weights the features come."""

    title = 'weights'

    pretrained: bool = setting(False, "the model's published weights", effect=not_with('checkpoint'))
    pretrained_path: str | None = setting(
        None, 'weights in a file or a folder, whose classifier may be for other classes', metavar='PATH', is_file=True,
        effect=not_with('checkpoint'))
    checkpoint: str | None = setting(
        None, 'of a finished run, a file or its folder, which also tells model, data and input format where they are '
        'not given', metavar='PATH', is_file=True)


@dataclass(frozen=True)
class FeatureSettings(Settings):
    """What is kept of the images."""

    title = 'features'

    features_dir: str | None = setting(None, 'folder of the cached features', metavar='DIR', kind='place',
                                       unset='features in --output')
    flips: bool = setting(False, 'see every training image mirrored as well, in twice the time')


@dataclass(frozen=True)
class HeadSettings(Settings):
    """How heads are trained and chosen."""

    title = 'heads'

    heads: tuple[str, ...] = setting(
        tuple(METHODS), 'which heads: of these, or the name of a loss for a linear head', nargs=0, metavar='NAME')
    keep: str | None = setting(None, 'the head that the network gets', metavar='NAME',
                               unset='the best of the validation by --eval-metric', effect=not_with('imbalance'))
    folds: int = setting(5, 'where there is no validation split, parts of the training images of which each is judged '
                         'by heads that were trained on the others', limits=Limits(2, 100))
    head_epochs: int | None = setting(None, 'passes over the features', limits=AT_LEAST_1,
                                      unset='30, or more where these make less than 500 updates')
    head_lr: float | None = setting(None, 'learning rate of AdamW, falling by a cosine to zero', limits=POSITIVE,
                                    unset='1.28 / length of the feature vectors, at most 0.05')
    head_weight_decay: float | None = setting(None, 'of AdamW', limits=NOT_NEGATIVE,
                                              unset='length of the feature vectors / 256')
    head_batch_size: int | None = setting(None, 'images per update', limits=Limits(2),
                                          unset='a twentieth of the images, from 16 to 512')

    def for_features(self, images: int, size: int) -> 'HeadSettings':
        """With numbers for what is not given.

        Logits are sums over a vector, in which AdamW moves every weight by its rate: the longer the vector, the smaller
        the rate for the same logits (Yang et al., "Tensor Programs V", 2022), and the stronger the decay beside it.

        Args:
            images: Of an epoch.
            size: Length of a feature vector.
        """
        batch_size = self.head_batch_size or min(max(images // 20, 16), 512)
        updates = max(images // batch_size, 1)
        return replace(
            self, head_batch_size=batch_size, head_epochs=self.head_epochs or max(30, -(-500 // updates)),
            head_lr=self.head_lr or min(1.28 / size, 0.05),
            head_weight_decay=size / 256 if self.head_weight_decay is None else self.head_weight_decay)


_OF_TRAINING = dict.fromkeys(
    (key_of(name) for one in TrainSettings.declared().values()
     for name in (one.name, one.declaration.short or one.name, *one.declaration.also)),
    'nbn-train has it, which trains a network; nbn-probe trains heads on its features, by --head-lr, --head-epochs, '
    '--head-weight-decay and --head-batch-size')


@dataclass(frozen=True)
class ProbeSettings(SettingGroups):
    """All settings of heads on cached features."""

    run: ProbeRunSettings = ProbeRunSettings()
    data: DataSettings = DataSettings()
    input: InputSettings = InputSettings()
    model: ModelSettings = ModelSettings()
    weights: BackboneSettings = BackboneSettings()
    features: FeatureSettings = FeatureSettings()
    heads: HeadSettings = HeadSettings()
    imbalance: ImbalanceSettings = ImbalanceSettings()
    batch: EvalBatchSettings = EvalBatchSettings()
    precision: PrecisionSettings = PrecisionSettings()
    loader: LoaderSettings = LoaderSettings()

    command = 'nbn-probe'
    explained = {'dataset': lambda: f': {dataset_choices()}'}
    elsewhere = timm_flags.PROBE
    of_others = _OF_TRAINING

    def idle(self, name: str, values: Values) -> str | None:
        """What the data set leaves unused."""
        return reason_unused(name, self.data)

    def default_experiment(self) -> str:
        """Name of a run by its model, data, the head that is asked for, and seed."""
        chosen = self.imbalance.imbalance or self.heads.keep
        keep = f'-{chosen}' if chosen else ''
        name = f'{self.model.model}-{self.data.dataset}-probe{keep}-s{self.run.seed}'
        return name.replace('/', '_').replace(':', '_')
