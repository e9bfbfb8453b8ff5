"""All settings of a training: the groups that stand beside the code which uses them, and those of the run itself."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from nbn_timm import timm_flags
from nbn_timm.adversarial.settings import AdversarialSettings
from nbn_timm.computation import PrecisionSettings
from nbn_timm.data.class_strength import CurriculumSettings
from nbn_timm.data.more_train import MoreTrainSettings
from nbn_timm.data.settings import (
    AugmentSettings,
    DataSettings,
    DecodingSettings,
    InputSettings,
    LoaderSettings,
    MemorySettings,
)
from nbn_timm.data.train_transforms import TRAIN_TRANSFORMS
from nbn_timm.datasets import dataset_choices, find_dataset, has_validation, reason_unused
from nbn_timm.evaluation import label_sets
from nbn_timm.evaluation.result import FURTHER_METRICS, METRICS
from nbn_timm.evaluation.settings import LabelSetSettings
from nbn_timm.imbalance.settings import ImbalanceSettings
from nbn_timm.losses import number_of_views
from nbn_timm.losses.settings import LossSettings
from nbn_timm.mixing import MIXINGS, MixingSettings, mixing_settings
from nbn_timm.models.settings import ModelSettings, StartSettings
from nbn_timm.models.tuning import TuneSettings
from nbn_timm.samplers.settings import SamplerSettings
from nbn_timm.second_stages import SECOND_STAGES, FittedSecondStage
from nbn_timm.second_stages.settings import SecondStageSettings
from nbn_timm.settings import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    Limits,
    SettingGroups,
    Settings,
    Tolerated,
    Values,
    not_with,
    only_with,
    setting,
)
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.training.batch import BatchSettings
from nbn_timm.training.distillation import DistillationSettings
from nbn_timm.training.gpu import GpuSettings
from nbn_timm.training.optim import AverageSettings, OptimizerSettings, ScheduleSettings
from nbn_timm.training.progressive import ProgressiveSettings


@dataclass(frozen=True)
class ProcessSettings(Settings):
    """What several processes share."""

    title = 'several processes'
    of_training = True

    sync_bn: bool = setting(False, 'batch statistics over all GPUs', effect=not_with('keep_bn_stats'))
    dist_bn: str = setting('reduce', "running statistics after each epoch: all processes' mean, or the first one's",
                           choices=('reduce', 'broadcast'))


@dataclass(frozen=True)
class RunSettings(Settings):
    """The run: its folder, and what it is judged by."""

    title = 'run'

    config: str | None = setting(None, 'defaults for all other flags: a file, or the name of a shipped config',
                                 short='-c', metavar='YAML', kind='place', is_file=True)
    seed: int = setting(42, 'of all random draws', limits=NOT_NEGATIVE)
    output: str = setting('output', 'parent of all run folders', metavar='DIR', kind='place')
    experiment: str | None = setting(
        None, "the run's folder", metavar='NAME', kind='place',
        unset='<model>-<dataset>-s<seed>, with the loss, sampler, mixing, stage and attack if unusual')
    resume: str | None = setting(None, "a checkpoint or the folder of a run to go on from, or 'auto': the last one of "
                                 "this run's own folder, if any", metavar='PATH', kind='place')
    eval_metric: str = setting('top1', 'chooses the best checkpoint; of pictures of several classes map is the default',
                               choices=tuple(dict.fromkeys((*METRICS, *FURTHER_METRICS, *label_sets.METRICS))))
    kept_epoch: str = setting(
        'best', 'of the evaluated ones, which the run ends with: the best by --eval-metric on the validation split, or '
        'the last, where rare classes have too few validation pictures to choose by', choices=('best', 'last'))
    watch_test: bool = setting(False, 'without a validation split, log the test accuracy of every epoch; it never '
                               'chooses a checkpoint', kind='machine')
    report: bool = setting(True, 'write report.html when the run ends', kind='machine')


@dataclass(frozen=True)
class KeepingSettings(Settings):
    """What is kept and told of the epochs of a training."""

    title = 'checkpoints and logs'
    of_training = True

    checkpoint_hist: int = setting(2, 'how many of the latest checkpoints are kept', limits=Limits(1, 1000),
                                   kind='machine')
    recovery_interval: int = setting(
        0, 'updates between checkpoints in the middle of an epoch, from which --resume auto goes on; 0 writes none '
        "before an epoch's end", limits=NOT_NEGATIVE, kind='machine')
    val_interval: int = setting(1, 'epochs between evaluations; the last epoch is always evaluated, and the best one '
                                'is the best of those that were', limits=AT_LEAST_1)
    log_interval: int = setting(50, 'updates between progress lines', limits=AT_LEAST_1, kind='machine')
    profile: bool = setting(
        False, 'tell how long input, forward and backward pass, optimizer and evaluation take in an epoch',
        kind='machine', effect=not_with('cuda_graphs'))
    log_tensorboard: bool = setting(False, 'write events for TensorBoard', kind='machine')
    log_wandb: bool = setting(False, 'send to Weights & Biases', kind='machine')
    wandb_project: str = setting('nbn_timm', 'of Weights & Biases', metavar='NAME', kind='machine',
                                 effect=only_with('log_wandb'))


@dataclass(frozen=True)
class TrainSettings(SettingGroups):
    """All settings of a training."""

    run: RunSettings = RunSettings()
    keeping: KeepingSettings = KeepingSettings()
    data: DataSettings = DataSettings()
    more_train: MoreTrainSettings = MoreTrainSettings()
    input: InputSettings = InputSettings()
    model: ModelSettings = ModelSettings()
    start: StartSettings = StartSettings()
    tuning: TuneSettings = TuneSettings()
    batch: BatchSettings = BatchSettings()
    imbalance: ImbalanceSettings = ImbalanceSettings()
    sampler: SamplerSettings = SamplerSettings()
    loss: LossSettings = LossSettings()
    answers: LabelSetSettings = LabelSetSettings()
    second_stage: SecondStageSettings = SecondStageSettings()
    distillation: DistillationSettings = DistillationSettings()
    adversarial: AdversarialSettings = AdversarialSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    average: AverageSettings = AverageSettings()
    augment: AugmentSettings = AugmentSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    progressive: ProgressiveSettings = ProgressiveSettings()
    mixing: MixingSettings = MixingSettings()
    methods: Mapping[str, Settings] = field(default_factory=dict)  # of mixing, by name
    precision: PrecisionSettings = PrecisionSettings()
    gpu: GpuSettings = GpuSettings()
    processes: ProcessSettings = ProcessSettings()
    loader: LoaderSettings = LoaderSettings()
    memory: MemorySettings = MemorySettings()
    decoding: DecodingSettings = DecodingSettings()

    MORE: ClassVar[str] = 'methods'
    explained = {'dataset': lambda: f': {dataset_choices()}'}
    elsewhere = timm_flags.TRAIN
    of_others = {name: 'nbn-validate has it, for the --checkpoint of a finished run' for name in (
        'save_predictions', 'results_file', 'per_class_file')}

    @classmethod
    def more_groups(cls) -> dict[str, type[Settings]]:
        """Settings of the mixing methods."""
        return {name: method.settings for name, method in MIXINGS.items()}

    def idle(self, name: str, values: Values) -> str | None:
        """What the data set, the loss, the second stage and the number of processes leave unused."""
        if name == 'other_views' and number_of_views(values.loss) == 1:
            return f"has no effect on loss '{values.loss}', which takes one view of each image"
        if name in ('dist_bn', 'sync_bn') and values.world_size == 1:
            return Tolerated('has no effect on one process')  # one command line serves for one and for many
        if name == 'thresholds' and self.data.dataset and not find_dataset(self.data.dataset).label_sets(self.data):
            return f'is for pictures of several classes, and those of --dataset {self.data.dataset} are of one here'
        if name == 'imbalance' and values.stage:
            return f'has no effect on --stage {values.stage}'
        if values.device == 'cpu' and self.group_of(name) is GpuSettings:
            return 'has no effect with --device cpu'
        if name in ('color_jitter_prob', 'force_color_jitter') and (
                values.color_jitter is None and self._without_jitter()):
            return f'has no effect on --dataset {self.data.dataset}, which is not jittered, without --color-jitter'
        resampled = values.aa or values.simclr or values.scale or values.ratio  # by policies and by resized crops
        if name == 'train_interpolation' and not resampled and self._keeps_size():
            return (f'has no effect on --dataset {self.data.dataset}, whose images are padded and cropped in their own '
                    'size')
        stage = SECOND_STAGES.get(values.stage) if values.stage else None
        if stage is not None and name == 'bn_momentum' and (values.freeze_bn or 'freeze_bn' in stage.unused):
            return f'has no effect where BatchNorm is frozen, as --stage {values.stage} has it'
        if stage is None:
            return reason_unused(name, self.data) or self._unwatched(name)
        if issubclass(stage, FittedSecondStage) and self.group_of(name).of_training:
            return Tolerated(f'--stage {values.stage} trains nothing')
        if name in stage.unused or not stage.takes_mixing and name in mixing_settings():
            return f'would have no effect on --stage {values.stage}'
        fitted = issubclass(stage, FittedSecondStage)  # it has uses of its own for a metric and a test split
        return reason_unused(name, self.data) or (None if fitted else self._unwatched(name))

    def _without_jitter(self) -> bool:
        return bool(self.data.dataset) and not find_dataset(self.data.dataset).defaults.color_jitter

    def _keeps_size(self) -> bool:
        """Whether training takes the images of a benchmark in the size that all of them have."""
        if not self.data.dataset or self.data.lists or self.input.img_size or self.input.input_size:
            return False
        published = find_dataset(self.data.dataset).defaults
        return published.published and not TRAIN_TRANSFORMS.find(published.train_transform).resizes

    def _unwatched(self, name: str) -> str | None:
        """Why what is evaluated after every epoch leaves a setting unused, where that is known without the data."""
        if name not in ('watch_test', 'eval_metric', 'kept_epoch', 'patience', 'val_interval') or not self.data.dataset:
            return None
        validated = has_validation(self.data)
        if name == 'watch_test' and validated:
            return 'has no effect where there is a validation split'
        if validated is not False:
            return None
        if name in ('eval_metric', 'kept_epoch'):
            return 'has no effect without a validation split to choose a checkpoint by'
        if name == 'patience':
            return 'has no effect without a validation split, by which alone a run may end early'
        if name == 'val_interval' and not self.run.watch_test:
            return 'has no effect without a validation split or --watch-test'
        return None

    def default_experiment(self) -> str:
        """Name of a run by what it trains: model, data, what is unusual about it, seed."""
        unusual = [
            *([self.imbalance.imbalance] if self.imbalance.imbalance else
              (name for name in (self.loss.loss, self.sampler.sampler) if name not in _USUAL)),
            *(name for name, method in MIXINGS.items() for name in method.switched_on(self.methods[name])),
            *([self.second_stage.stage] if self.second_stage.stage else []),
            *([self.tuning.tune] if self.tuning.tune else []),
            *(['distilled'] if self.distillation.kd_checkpoint else []),
            *([f'adv-{self.adversarial.adversarial}'] if self.adversarial.adversarial else []),
        ]
        parts = [self.model.model, self.data.dataset, *unusual, f's{self.run.seed}']
        return '-'.join(parts).replace('/', '_')


_USUAL = (LossSettings.loss, SamplerSettings.sampler)


# The machine's part of what timm's own script records.
_OF_TIMM = ('data', 'no_prefetcher', 'local_rank')


def public_record(record: NetworkRecord) -> NetworkRecord:
    """A record without paths and without what is the machine's."""
    return record.public(TrainSettings, private=_OF_TIMM)
