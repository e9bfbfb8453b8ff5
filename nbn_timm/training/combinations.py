"""What cannot go together, as far as the settings tell: refused before any data are read."""
import inspect
from typing import Any

import torch

from nbn_timm.adversarial import ADVERSARIAL
from nbn_timm.errors import InputError
from nbn_timm.losses import (
    balances_classes,
    needed_mixing,
    number_of_views,
    takes_experts,
    takes_features,
    takes_soft_targets,
    takes_streams,
)
from nbn_timm.losses.loss import LOSSES, check_loss_settings
from nbn_timm.mixing import MIXINGS
from nbn_timm.samplers import SAMPLERS
from nbn_timm.samplers.sampler import check_sampler_settings
from nbn_timm.second_stages import FittedSecondStage, SecondStage, TrainedSecondStage
from nbn_timm.settings import flag
from nbn_timm.training.optim import OptimizerSettings, ScheduleSettings
from nbn_timm.training.settings import TrainSettings


def check_combinations(settings: TrainSettings, stage: SecondStage | None) -> None:
    """Refuse settings of which one excludes the other, or that their loss or sampler does not have.

    Args:
        settings: Of the run.
        stage: The second stage, if there is one.

    Raises:
        InputError: There are some.
    """
    if isinstance(stage, FittedSecondStage):  # nothing is trained
        return
    if settings.precision.dtype is torch.float16:
        raise InputError('--model-dtype float16 cannot hold small gradients: give bfloat16, or --amp in its place')
    assert stage is None or isinstance(stage, TrainedSecondStage)
    check_sampler_settings(settings.sampler.sampler, settings.sampler.sampler_kwargs)
    mixing = chosen_mixing(settings, stage)
    name, frozen, epochs = settings.loss.loss, settings.start.freeze_epochs, settings.schedule.epochs
    start, tune = settings.start, settings.tuning.tune
    if tune and not (start.pretrained or start.pretrained_path or start.initial_checkpoint or settings.run.resume):
        raise InputError(f'--tune {tune} trains a small part of a network, and the rest would stay as random as it is: '
                         'give --pretrained, --pretrained-path or --initial-checkpoint')
    if stage is None and frozen >= epochs:
        raise InputError(f'--freeze-epochs {frozen} leaves none of the {epochs} --epochs for the rest of the network: '
                         'give --freeze backbone if the classifier alone is to learn, else fewer, such as '
                         '--freeze-epochs 0, or more --epochs')
    if stage is None or stage.loss() is None:
        check_loss_settings(name, loss_settings(settings, mixing is not None and MIXINGS[mixing].soft))
    if settings.optimizer.sam_rho and settings.precision.autocast is torch.float16:
        raise InputError('--sam-rho does not go with float16, whose scaled gradients have another length: give '
                         '--amp-dtype bfloat16, or leave it out')
    if mixing == 'manifold_mixup':
        for other, given in (('--sam-rho', settings.optimizer.sam_rho), ('--cuda-graphs', settings.gpu.cuda_graphs),
                             ('--torchcompile', settings.precision.torchcompile),
                             ('--grad-checkpointing', settings.start.grad_checkpointing)):
            if given:
                raise InputError(f'--manifold-mixup mixes within the network, once for a batch, which {other} does not '
                                 'allow: leave one of them out')
    if settings.augment.curriculum:
        for other, there in (('--stage', stage), ('--adversarial', settings.adversarial.adversarial)):
            if there:
                raise InputError(f'--curriculum is for the ordinary training of a network, and {other} is another one: '
                                 'leave one of them out')
    if settings.average.swa_epochs > settings.schedule.epochs:
        raise InputError(f'--swa-epochs {settings.average.swa_epochs} is more than the {settings.schedule.epochs} '
                         '--epochs of the run: give fewer')
    if settings.average.swa_epochs and settings.schedule.patience is not None:
        raise InputError('--patience can end a run before the last --swa-epochs, of which the mean is taken: leave one '
                         'of them out')
    if settings.run.kept_epoch == 'last' and settings.schedule.patience is not None:
        raise InputError('--patience waits for a better epoch, and --kept-epoch last keeps every one: give '
                         '--kept-epoch best with it')
    if settings.average.swa_epochs and stage is not None:
        raise InputError('--swa-epochs is for a training of the whole network: leave it out beside --stage, or give '
                         '--model-ema')
    if settings.adversarial.adversarial:
        check_adversarial(settings, stage, mixing)
    taken = ('features' if takes_features(name) else 'several views of an image' if number_of_views(name) > 1 else
             'two streams of images' if takes_streams(name) else None)
    for other, there in (('--stage', stage), ('--kd-checkpoint', settings.distillation.kd_checkpoint)):
        if there and taken:
            raise InputError(f"loss '{name}' takes {taken}, which training with {other} does not hand on: leave out "
                             f'{other}, or give another --loss')


def check_adversarial(settings: TrainSettings, stage: SecondStage | None, mixing: str | None) -> None:
    """Refuse what --adversarial does not go with.

    Raises:
        InputError: There is something.
    """
    method, loss = settings.adversarial.adversarial, settings.loss.loss
    assert method is not None
    if mixing is not None:
        raise InputError(f'--adversarial {method} attacks the label of a picture, and {flag(mixing)} mixes labels: '
                         'leave one of them out')
    if number_of_views(loss) > 1 or takes_streams(loss):
        taken = 'two streams of images' if takes_streams(loss) else 'several views of an image'
        raise InputError(f"loss '{loss}' takes {taken}, and --adversarial {method} attacks one: give another --loss")
    if takes_experts(loss) and ADVERSARIAL[method].usual_weight is not None:
        raise InputError(f"--adversarial {method} compares the logits of a network, and loss '{loss}' takes those of "
                         'each expert: give --adversarial pgd, or another --loss')
    for other, given in (('--stage', stage), ('--kd-checkpoint', settings.distillation.kd_checkpoint),
                         ('--sam-rho', settings.optimizer.sam_rho), ('--cuda-graphs', settings.gpu.cuda_graphs),
                         ('--swa-epochs', settings.average.swa_epochs)):
        if given:
            raise InputError(f'--adversarial {method} is a training of its own, which has no place for {other}: leave '
                             'one of them out')
    if settings.precision.autocast is torch.float16:
        raise InputError(f'--adversarial {method} in float16 would lose the small gradients of pictures: give '
                         '--amp-dtype bfloat16')


def doubtful(settings: TrainSettings, stage: SecondStage | None) -> list[str]:
    """What goes together, but seldom to anyone's gain: a sentence each, to be told before training."""
    loss, sampler = settings.loss.loss, settings.sampler.sampler
    if isinstance(stage, FittedSecondStage):
        return []
    told = doubtful_rate(settings.optimizer, settings.schedule)
    if isinstance(stage, TrainedSecondStage) and stage.loss() is not None:
        return told
    own, epochs = inspect.signature(LOSSES[loss]).parameters.get('epochs'), settings.schedule.epochs
    over = settings.loss.loss_kwargs.get('epochs', None if own is None else own.default)
    if own is not None and over != epochs:
        told.append(f"Loss '{loss}' goes from its beginning to its end in {over} epochs, and this run has {epochs}: "
                    f'give --loss-kwargs epochs={epochs} to have the whole of it.')
    if not (balances_classes(loss) and SAMPLERS[sampler].balances):
        return told
    return [*told, f"Loss '{loss}' and sampler '{sampler}' both make up for the sizes of classes, so rare ones count "
            'twice and frequent ones may be lost: leave out one of the two.']


def doubtful_rate(optimizer: OptimizerSettings, schedule: ScheduleSettings) -> list[str]:
    """What of the learning rate was hardly meant."""
    told = []
    if optimizer.is_like_adam and not optimizer.lr_base and optimizer.lr == OptimizerSettings.lr:
        told.append(f'The learning rate {optimizer.lr:g} is for SGD, and --opt {optimizer.opt} usually has 0.0001 to '
                    '0.003: give --lr 0.001, or --lr-base, from which the rate follows by the batch.')
    if schedule.warmup_epochs >= schedule.epochs:  # of which linear and wsd have nothing to fall in, and are refused
        told.append(f'The rate only rises, and never gets to its highest, since the warm-up of '
                    f'{schedule.warmup_epochs} epochs is not shorter than the {schedule.epochs} of the run: give fewer '
                    '--warmup-epochs, or more --epochs.')
    return told


def chosen_mixing(settings: TrainSettings, stage: TrainedSecondStage | None = None) -> str | None:
    """Name of the mixing method that is on, None without.

    Raises:
        InputError: Two are on, or the loss takes labels alone.
    """
    chosen = {name: method.switched_on(settings.methods[name]) for name, method in MIXINGS.items()}
    chosen = {name: switches for name, switches in chosen.items() if switches}
    loss = settings.loss.loss
    if takes_streams(loss) and 'second_stream' not in chosen:
        raise InputError(f"loss '{loss}' takes two streams of images: give the sampler of the second one, as "
                         '--second-stream reverse')
    needed = needed_mixing(loss)
    if needed is not None and needed not in chosen:
        raise InputError(f"loss '{loss}' takes images that are mixed for it: give {flag(needed)} 1")
    if not chosen or (stage is not None and not stage.takes_mixing):
        return None
    switches = [flag(on[0]) for on in chosen.values()]
    if len(chosen) > 1:
        raise InputError(f'{switches[0]} and {switches[1]} cannot mix the same batch: leave one of them out')
    if 'second_stream' in chosen:
        if not takes_streams(loss):
            raise InputError(f"--second-stream is for a loss that takes two streams of images, and '{loss}' takes one: "
                             'leave it out, or give --loss bbn')
        return 'second_stream'
    if not takes_soft_targets(loss):
        raise InputError(f"loss '{loss}' takes labels and no mixed targets: leave out {switches[0]}, or "
                         'give another --loss')
    (name,), views = chosen, number_of_views(loss)
    if views == MIXINGS[name].views:
        return name
    if views > 1:
        raise InputError(f"loss '{loss}' takes several views of an image, which are not mixed: leave out "
                         f'{switches[0]}, or give another --loss')
    made_for = ' or '.join(each for each in LOSSES if needed_mixing(each) == name)
    raise InputError(f"{switches[0]} mixes several views of an image, and loss '{loss}' takes one: leave it out, or "
                     f'give --loss {made_for}')


def loss_settings(settings: TrainSettings, mixed: bool) -> dict[str, Any]:
    """The loss's own settings; where targets are mixed, they come smoothed.

    Raises:
        InputError: The label smoothing is given twice.
    """
    own = dict(settings.loss.loss_kwargs)
    if settings.loss.smoothing and not mixed:
        if 'smoothing' in own:
            raise InputError('the label smoothing is given twice, as --smoothing and in --loss-kwargs: keep one')
        own['smoothing'] = settings.loss.smoothing
    return own
