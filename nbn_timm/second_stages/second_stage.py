"""The second stages by name: one file in this folder with one `@register_second_stage` line. Here 'stage' means these.

A stage takes a finished network and gives a network again. Some train a part of it by gradient, through the ordinary
training loop (`TrainedSecondStage`); others look at the data once and compute what they need (`FittedSecondStage`).
"""
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

from nbn_timm.data import Splits, TrainLoader
from nbn_timm.evaluation import LongTailEvaluator
from nbn_timm.key_values import check_types, key_values, refuse_unknown
from nbn_timm.registry import Registry

FLAG = '--stage-kwargs'


class SecondStage:
    """What all second stages share.

    Attributes:
        unused: Settings of train.py that have no effect on this stage: refused if their flags are typed.
        takes_mixing: Mixed images and soft targets are of use to it.
        keeps_classifier: The classes stay those of the network; else they may be others, and the classifier of another
            kind: its weights are taken where they fit.
    """

    unused: ClassVar[tuple[str, ...]] = ('drop', 'drop_path', 'kd_checkpoint', 'classifier_lr')
    takes_mixing: ClassVar[bool] = True
    keeps_classifier: bool = True

    @classmethod
    def restore(cls, model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
        """The model in the form that a checkpoint of this stage needs; no weights are loaded.

        A stage whose result is an ordinary model of the same architecture has nothing to do here, and neither has one
        whose traces are not in the checkpoint.

        Args:
            model: Of the checkpoint's architecture.
            state_dict: The checkpoint's, with this package's names.
        """
        return model


@dataclass(frozen=True)
class SecondStageRun:
    """What a stage that trains may use of its run.

    Attributes:
        splits: The data.
        loader: Of training batches.
        create_loader: Makes another loader, with the augmentation of training, from a dataset whose transform it sets,
            a sampler, the images of a batch per process, and a seed.
        criterion: The loss.
        optimizer: Of what is trained; its learning rate follows the schedule.
        device: Of the network.
        rank: Of this process.
        world_size: Number of processes.
        seed: Of the run.
    """

    splits: Splits
    loader: TrainLoader
    create_loader: Callable[[Dataset, Sampler, int, int], TrainLoader]
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int = 0
    world_size: int = 1
    seed: int = 0


class TrainedSecondStage(SecondStage, ABC):
    """A stage that trains a part of the network through the ordinary loop.

    One that learns something beside the network implements `connect`, `set_epoch`, `batch` and its state.

    Attributes:
        needs: Flags of train.py, as keys of a config, and the values that they must have for this stage.
        goes_on: Whether a checkpoint in the middle of an epoch holds all that it needs to go on there.
    """

    needs: ClassVar[Mapping[str, Any]] = {}
    goes_on: ClassVar[bool] = True

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """The network changed for its training, in place or wrapped.

        Raises:
            InputError: The stage does not know what to do with this network.
        """

    @abstractmethod
    def trained(self, model: nn.Module) -> nn.Module:
        """The part of what `prepare` gave that is trained; all else is frozen."""

    def freeze(self, model: nn.Module) -> None:
        """Put what is not trained into eval mode, BatchNorm and dropout included; the model is in training mode."""
        model.eval()
        self.trained(model).train()

    def rates(self, model: nn.Module) -> dict[nn.Module, float]:
        """Parts of what is trained whose learning rate is a multiple of the run's, and these multiples."""
        return {}

    def loss(self) -> nn.Module | None:
        """The stage's own loss; None trains with that of `--loss`."""
        return None

    def finished(self, model: nn.Module) -> nn.Module:
        """What is evaluated and saved: the model itself, or a copy of it as an ordinary model."""
        return model

    def connect(self, run: SecondStageRun) -> None:
        """Get to know the run, once, before its first epoch and before a checkpoint is resumed.

        Raises:
            InputError: The stage does not know what to do with this run.
        """

    def set_epoch(self, epoch: int) -> None:
        """Be told that `epoch` (0-based) begins."""

    def batch(self, model: nn.Module, target: torch.Tensor) -> AbstractContextManager[None]:
        """Surround the forward pass of a training batch through what `prepare` gave; its backward pass comes later."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of the stage itself, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; empty if the checkpoint has none.

        Raises:
            InputError: The state is of something else.
        """


# From the steps by which an evaluation resizes and crops a PIL image, and the size [H, W] that comes out, to a view's.
ViewSteps = Callable[[Sequence[Any], tuple[int, int]], Sequence[Any]]


@dataclass(frozen=True)
class FitData:
    """What a fitted stage may look at.

    Attributes:
        splits: The data.
        classifier_inputs: Maps the network, some of its modules and a dataset to batches of what these modules are
            given and the labels: one float32 tensor [B, ...] per module, and int64 [B]. The images come in order, under
            the evaluation transform, each exactly once over all processes.
        evaluator: Makes an evaluator for the network's logits.
        device: Where the network is.
        metric: Of `EvalResult.metrics`, by which to choose.
        distributed: Sums go over all processes of the default group.
        watch_test: The test split may be looked at, though never to choose by.
        seed: Of the run.
        two_views: Maps a dataset, the steps of a view, a batch size and an epoch to batches of two views
            [2, B, 3, H, W] on the device, all images in every process.
    """

    splits: Splits
    classifier_inputs: Callable[[nn.Module, Collection[nn.Module], Dataset],
                                Iterator[tuple[list[torch.Tensor], torch.Tensor]]]
    evaluator: Callable[[], LongTailEvaluator]
    device: torch.device
    metric: str
    distributed: bool = False
    watch_test: bool = False
    seed: int = 0
    two_views: Callable[[Dataset, ViewSteps, int, int], Iterator[torch.Tensor]] | None = None


@dataclass(frozen=True)
class FitReport:
    """What a fitted stage has to tell."""

    lines: list[str]  # for people
    files: dict[str, str] = field(default_factory=dict)  # text by file name, for the run's folder
    pictures: Iterable[tuple[str, bytes]] = ()  # names and contents of others, made one by one where they are written


class FittedSecondStage(SecondStage, ABC):
    """A stage that is computed in one pass over data, without gradients: no setting of training has an effect on it."""

    takes_mixing = False
    unused = (*SecondStage.unused, 'freeze_bn', 'bn_momentum', 'grad_accum_steps', 'drop_last', 'torchcompile',
              'log_tensorboard', 'log_wandb')

    @abstractmethod
    def fit(self, model: nn.Module, data: FitData) -> FitReport:
        """Change the network, which is in eval mode, in place.

        Raises:
            InputError: The stage does not know what to do with this network or these data.
        """


SECOND_STAGES: Registry[SecondStage] = Registry('second stage')


def register_second_stage(name: str) -> Callable[[type[SecondStage]], type[SecondStage]]:
    """Class decorator: make the stage available to `create_second_stage` and `train.py --stage` under `name`."""
    return SECOND_STAGES.register(name)


def create_second_stage(name: str, **kwargs: Any) -> SecondStage:
    """Create a stage by name with its own settings.

    Raises:
        InputError: Unknown name or setting.
    """
    check_second_stage_settings(name, kwargs)
    return SECOND_STAGES[name](**kwargs)


def check_second_stage_settings(name: str, given: Mapping[str, Any]) -> None:
    """Refuse settings that a stage does not have, and values of another type than they have.

    Raises:
        InputError: There is one, or no stage of that name.
    """
    stage_class = SECOND_STAGES.find(name)
    has_settings = stage_class.__init__ is not object.__init__
    settings = inspect.signature(stage_class).parameters if has_settings else {}
    refuse_unknown(f'--stage {name}', given, list(settings))
    check_types(f'--stage {name}', key_values(FLAG, given), settings)


def restore_second_stages(
        model: nn.Module,
        state_dict: Mapping[str, torch.Tensor],
        without: Collection[str] = (),
) -> nn.Module:
    """The model in the form that a checkpoint of whichever stage needs, see `SecondStage.restore`.

    Args:
        model: Of the checkpoint's architecture.
        state_dict: The checkpoint's, with this package's names.
        without: Names of stages that are left out.
    """
    for name, stage in SECOND_STAGES.items():
        if name not in without:
            model = stage.restore(model, state_dict)
    return model
