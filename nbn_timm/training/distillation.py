"""Distillation: training with the help of a finished teacher."""
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from torch import nn

from nbn_timm.data import Classes, DataDefaults
from nbn_timm.errors import InputError
from nbn_timm.models.create import create_model
from nbn_timm.models.run_folder import finished_file
from nbn_timm.models.weight_files import load_weights
from nbn_timm.settings import NOT_NEGATIVE, POSITIVE, Settings, only_with, setting
from nbn_timm.trained.opening import as_tuned, checkpoint_record

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillationSettings(Settings):
    """The teacher, and how much is learned from it."""

    title = 'distillation'
    of_training = True

    kd_checkpoint: str | None = setting(None, 'a finished teacher to distil from, a file or the folder of a run, '
                                        'trained on the same classes', metavar='PATH', is_file=True)
    kd_model_name: str | None = setting(None, "the teacher's model", metavar='NAME', unset='as its checkpoint records',
                                        effect=only_with('kd_checkpoint'))
    kd_model_kwargs: Mapping[str, Any] = setting({}, "for the teacher's constructor", effect=only_with('kd_checkpoint'))
    kd_temperature: float = setting(1.5, 'of both softmaxes', limits=POSITIVE, effect=only_with('kd_checkpoint'))
    kd_power: float = setting(
        1.0, "to which the teacher's probabilities are raised after its softmax; below 1 they are flatter (DiVE)",
        limits=POSITIVE, effect=only_with('kd_checkpoint'))
    distill_loss_weight: float = setting(1.0, 'of the divergence from the teacher', limits=NOT_NEGATIVE,
                                         effect=only_with('kd_checkpoint'))
    kd_label_weight: float = setting(1.0, 'of the loss on the labels', limits=NOT_NEGATIVE,
                                     effect=only_with('kd_checkpoint'))
    kd_target: str = setting(
        'mean', "what learns from the teacher: the experts' mean, once per expert, as in RIDE's code, or each expert",
        choices=('mean', 'experts'), effect=only_with('kd_checkpoint'))
    kd_teacher_mode: str = setting(
        'eval', "'train' lets the teacher normalise by batch statistics, as RIDE's code does",
        choices=('eval', 'train'), effect=only_with('kd_checkpoint'))


class DistillationTask(ClassificationTask):
    """Train a network, of several experts or one, with the help of a finished teacher.

    With the loss L on the labels, weights u and w, temperature T and D(z) = T^2 KL(q || softmax(z / T)), where q
    are the teacher's probabilities softmax(teacher / T) to the power p, scaled to a sum of 1,

    - target 'mean': E (u L + w D(mean of the experts' logits)), as RIDE's code has it: its loss is added once for each
      expert, and every time with the mean;
    - target 'experts': u L + w times the sum over experts of D(their logits).

    For a single network both are u L + w D. Source: frank-xwang/RIDE-LongTailRecognition, commit ab8be5c.

    DiVE (He et al., "Distilling Virtual Examples for Long-tailed Recognition", ICCV 2021) takes the teacher's
    probabilities for examples of all classes, of which a power below 1 gives rare ones more: balanced softmax for L, a
    teacher trained by it, u = 1 - alpha, w = alpha and p = 1/2. Source: zhangyongshun/BagofTricks-LT, commit ce7859a.

    Args:
        student: The network to train.
        teacher: A finished network with the same classes, which gives logits [B, C].
        criterion: L, called with the student's training output and the targets.
        target: 'mean' or 'experts'.
        weight: w.
        temperature: T.
        power: p.
        label_weight: u.
        train_teacher_statistics: Keep the teacher in training mode, as RIDE's code does by oversight: it then
            normalises by batch statistics. By default it is in eval mode.
        device: Of everything.
    """

    def __init__(
            self,
            student: nn.Module,
            teacher: nn.Module,
            criterion: nn.Module,
            target: str = DistillationSettings.kd_target,
            weight: float = DistillationSettings.distill_loss_weight,
            temperature: float = DistillationSettings.kd_temperature,
            power: float = DistillationSettings.kd_power,
            label_weight: float = DistillationSettings.kd_label_weight,
            train_teacher_statistics: bool = False,
            device: torch.device | None = None,
    ) -> None:
        super().__init__(student, criterion, device=device, verbose=False)
        self.teacher = teacher.requires_grad_(False).to(self.device)
        self.target = target
        self.weight = weight
        self.temperature = temperature
        self.power = power
        self.label_weight = label_weight
        self.train_teacher_statistics = train_teacher_statistics

    def train(self, mode: bool = True) -> 'DistillationTask':
        """Set the student's mode; the teacher's is a setting of its own."""
        super().train(mode)
        self.teacher.train(mode and self.train_teacher_statistics)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        """Compile student and teacher."""
        self.teacher = torch.compile(self.teacher, *args, **kwargs)  # type: ignore[assignment]
        return super().compile(*args, **kwargs)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [B, 3, H, W] and targets to the loss and its two parts."""
        output = self.trainable_module(input)
        task_loss = self.criterion(output, target)
        with torch.no_grad():
            teacher_logits = self.teacher(input)
        experts = output if output.ndim == 3 else output[:, None]
        num_experts = experts.shape[1]
        if self.target == 'mean':
            distill_loss = num_experts * self._divergence(experts.mean(dim=1), teacher_logits)
            task_loss = num_experts * task_loss
        else:
            parts = [self._divergence(experts[:, expert], teacher_logits) for expert in range(num_experts)]
            distill_loss = torch.stack(parts).sum()
        loss = self.label_weight * task_loss + self.weight * distill_loss
        return {'loss': loss, 'output': output, 'task_loss': task_loss, 'distill_loss': distill_loss}

    def _divergence(self, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """D, the mean over the batch."""
        student = F.log_softmax(logits.float() / self.temperature, dim=1)
        # A power of a softmax, scaled to a sum of 1, is the softmax of the logits times that power.
        teacher = F.log_softmax(teacher_logits.float() * (self.power / self.temperature), dim=1)
        return self.temperature ** 2 * F.kl_div(student, teacher, reduction='batchmean', log_target=True)


class SomeClasses(nn.Module):
    """A network that gives the logits of some classes of another one, in an order of their own.

    Args:
        network: Gives logits [B, C].
        labels: Of its classes, for each class here.
    """

    labels: torch.Tensor

    def __init__(self, network: nn.Module, labels: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer('labels', torch.tensor(labels), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)[:, self.labels]


def build_teacher(
        settings: DistillationSettings,
        num_classes: int,
        classes: Classes | None,
        input_format: DataDefaults,
        channels_last: bool = False,
) -> nn.Module:
    """The teacher of --kd-checkpoint with its weights (averaged ones, if it has them), its logits in our order.

    Args:
        settings: Of distillation.
        num_classes: Of the student.
        classes: Of the student, where they are known.
        input_format: Of the images.
        channels_last: Memory format of the weights.

    Raises:
        InputError: It cannot be had, or was trained on other images or classes.
    """
    assert settings.kd_checkpoint is not None
    file = finished_file(settings.kd_checkpoint)
    record = checkpoint_record(file)
    name, nbn, kwargs = record.model_settings(
        settings.kd_model_name, None, dict(settings.kd_model_kwargs), '--kd-model-name')
    theirs = record.classes
    teacher = create_model(name, theirs.num_classes if theirs else num_classes, nbn=nbn, model_kwargs=kwargs,
                           flags=('--kd-model-name', '--kd-model-kwargs'))
    teacher = as_tuned(teacher, name, record)
    load_weights(teacher, file)
    if theirs is not None and classes is not None:
        matching = theirs.match(classes, classes.source, f"teacher '{settings.kd_checkpoint}'")
        matching.require_theirs()
        for note in matching.notes:
            _logger.info('%s', note)
        if matching.reordered or matching.only_ours:
            teacher = SomeClasses(teacher, matching.labels)
    if theirs is None or classes is None:
        whose = f"teacher '{settings.kd_checkpoint}'" if theirs is None else 'data'
        _logger.info('The classes of the %s are not recorded, so they are taken in the order of their numbers.', whose)
    recorded = record.input
    for key, before, now in (('mean', recorded.mean, input_format.mean), ('std', recorded.std, input_format.std)):
        if before is not None and before != now:
            raise InputError(f"the teacher '{settings.kd_checkpoint}' was trained on images of {key} {before}, and "
                             f'these have {now}: give a teacher of the same data')
    return teacher.to(memory_format=torch.channels_last) if channels_last else teacher
