"""The flags of train.py; names and meanings are timm's wherever timm has the flag."""
import argparse
from argparse import BooleanOptionalAction
from typing import Any

from nbn_timm.config import COUNT, NOT_NEGATIVE, POSITIVE, POSITIVE_INT, PROBABILITY, KeyValues, between
from nbn_timm.datasets import dataset_choices
from nbn_timm.losses import LOSSES
from nbn_timm.samplers import SAMPLERS
from nbn_timm.second_stages import STAGES

EVAL_METRICS = ('top1', 'top5', 'mean_class', 'many', 'medium', 'few', 'loss')


def build_parser() -> argparse.ArgumentParser:
    """The parser; every flag has a destination of its own name, so that it is a config key as well."""
    parser = argparse.ArgumentParser(
        prog='nbn-train',
        description='Train a timm model for long-tailed recognition. Without any argument: the quick start.',
        allow_abbrev=False,
    )
    parser.add_argument('-c', '--config', metavar='YAML',
                        help='defaults for all flags below: a file, or the name of a shipped config')
    _add_data(parser.add_argument_group('data'))
    _add_model(parser.add_argument_group('model'))
    _add_batch(parser.add_argument_group('batch, sampler and loss'))
    _add_stages(parser.add_argument_group('second stage and distillation'))
    _add_optimizer(parser.add_argument_group('optimizer and schedule'))
    _add_augmentation(parser.add_argument_group('augmentation'))
    _add_system(parser.add_argument_group('precision and devices'))
    _add_run(parser.add_argument_group('run, checkpoints and logs'))
    return parser


def _add_data(group: Any) -> None:
    add = group.add_argument
    add('--dataset', metavar='NAME', help=dataset_choices())
    add('--data-dir', metavar='DIR', help='root of the images')
    add('--train-list', metavar='FILE', help="'path label' per line, relative to --data-dir")
    add('--val-list', metavar='FILE')
    add('--test-list', metavar='FILE')
    add('--train-split', default='train', metavar='NAME', help="of timm's dataset types (default: train)")
    add('--val-split', metavar='NAME', help="of timm's dataset types (default: none)")
    add('--test-split', default='validation', metavar='NAME', help="of timm's dataset types (default: validation)")
    add('--num-classes', type=POSITIVE_INT, metavar='N', help='default: as the dataset has')
    add('--imbalance-factor', type=between(1), metavar='X', help='make training long-tailed: largest / smallest class')
    add('--imbalance-profile', choices=['exp', 'step'], default='exp')
    add('--imbalance-seed', type=COUNT, default=0, metavar='N')
    add('--class-counts', metavar='FILE', help='training images per class, where they cannot be counted or to override')
    add('--download', action=BooleanOptionalAction, default=False)
    add('--img-size', type=POSITIVE_INT, metavar='N', help="default: the benchmark's")
    add('-j', '--workers', type=COUNT, default=4, metavar='N', help='loading processes per process (default: 4)')
    add('--in-memory', action=BooleanOptionalAction, default=None, help='read small images once and augment them in '
        'batches, which leaves a small network nothing to wait for (default: where that changes nothing else)')


def _add_model(group: Any) -> None:
    add = group.add_argument
    add('--model', metavar='NAME', help='any timm model, or one of nbn_timm')
    add('--pretrained', action=BooleanOptionalAction, default=False)
    add('--add-nbn', action=BooleanOptionalAction, default=False,
        help='put NBN into the last stage of a timm model with BatchNorm')
    add('--initial-checkpoint', metavar='FILE', help='weights to start from')
    add('--model-kwargs', nargs='*', action=KeyValues, default={}, metavar='KEY=VALUE')
    add('--drop', type=PROBABILITY, metavar='P', help='dropout rate')
    add('--drop-path', type=PROBABILITY, metavar='P', help='drop path rate')
    add('--bn-momentum', type=PROBABILITY, metavar='X', help='momentum of all BatchNorm layers')


def _add_batch(group: Any) -> None:
    add = group.add_argument
    add('-b', '--batch-size', type=POSITIVE_INT, metavar='N', help='images per process and step (default: 128)')
    add('--global-batch-size', type=POSITIVE_INT, metavar='N',
        help='images per update over all processes; with --batch-size it sets the accumulation steps, else it is '
             'divided among the processes')
    add('--grad-accum-steps', type=POSITIVE_INT, metavar='N', help='batches per update (default: 1)')
    add('--validation-batch-size', type=POSITIVE_INT, metavar='N', help='default: --batch-size')
    add('--sampler', choices=sorted(SAMPLERS), default='instance_balanced')
    add('--sampler-kwargs', nargs='*', action=KeyValues, default={}, metavar='KEY=VALUE',
        help="the sampler's own settings")
    add('--loss', choices=sorted(LOSSES), default='cross_entropy')
    add('--smoothing', type=PROBABILITY, default=0.0, metavar='X', help='label smoothing (default: 0)')
    add('--loss-kwargs', nargs='*', action=KeyValues, default={}, metavar='KEY=VALUE', help="the loss's own settings")


def _add_stages(group: Any) -> None:
    add = group.add_argument
    add('--stage', choices=sorted(STAGES),
        help="what to make of the finished network of --initial-checkpoint: 'crt' trains its classifier anew, 'balms' "
             "with a learned sampler, and 'lws' scales of its classes, 'tau_norm' normalises its classifier, 'ncm' "
             "replaces it by class means, 'routing' trains what decides how many experts an image is given")
    add('--stage-kwargs', nargs='*', action=KeyValues, default={}, metavar='KEY=VALUE', help="the stage's settings")
    add('--freeze-bn', action=BooleanOptionalAction,
        help="of a stage that trains a part: keep the rest in eval mode, BatchNorm statistics included (the default); "
             '--no-freeze-bn lets them drift, as in the released codes')
    add('--kd-checkpoint', metavar='FILE', help='a finished teacher to distil from, trained on the same classes')
    add('--kd-model-name', metavar='NAME', help="the teacher's model (default: as the checkpoint records)")
    add('--kd-model-kwargs', nargs='*', action=KeyValues, default={}, metavar='KEY=VALUE')
    add('--kd-temperature', type=POSITIVE, metavar='X', help='(default: 1.5)')
    add('--distill-loss-weight', type=NOT_NEGATIVE, metavar='X', help='(default: 1)')
    add('--kd-target', choices=['mean', 'experts'],
        help="what learns from the teacher: the experts' mean, once per expert, as in RIDE's code (default), or each "
             'expert')
    add('--kd-teacher-mode', choices=['eval', 'train'],
        help="'train' lets the teacher normalise by batch statistics, as RIDE's code does (default: eval)")


def _add_optimizer(group: Any) -> None:
    add = group.add_argument
    add('--opt', default='momentum', metavar='NAME',
        help="any of timm's; 'momentum' is SGD with, 'sgd' with Nesterov momentum (default: momentum)")
    add('--momentum', type=NOT_NEGATIVE, default=0.9, metavar='X')
    add('--weight-decay', type=NOT_NEGATIVE, default=5e-4, metavar='X')
    add('--decay-1d', action=BooleanOptionalAction, default=True,
        help="decay biases and norm parameters too, which NBN needs; --no-decay-1d is timm's default")
    add('--opt-kwargs', nargs='*', action=KeyValues, default={}, metavar='KEY=VALUE')
    add('--clip-grad', type=NOT_NEGATIVE, metavar='X')
    add('--clip-mode', choices=['norm', 'value', 'agc'], default='norm')
    add('--epochs', type=POSITIVE_INT, default=90, metavar='N')
    add('--lr', type=NOT_NEGATIVE, default=0.1, metavar='X')
    add('--sched', choices=['cosine', 'step', 'multistep', 'constant'], default='cosine')
    add('--sched-on-updates', action=BooleanOptionalAction, default=False, help='follow the schedule per update')
    add('--min-lr', type=NOT_NEGATIVE, default=0.0, metavar='X')
    add('--warmup-epochs', type=COUNT, default=0, metavar='N')
    add('--warmup-lr', type=NOT_NEGATIVE, metavar='X',
        help='rate in the first epoch (default: --lr / (warm-up epochs + 1))')
    add('--decay-epochs', type=between(1), default=30, metavar='N', help='step: epochs between decays')
    add('--decay-milestones', type=POSITIVE_INT, nargs='+', default=[60, 80], metavar='N',
        help='multistep: 1-based epochs from which each decay holds')
    add('--decay-rate', type=NOT_NEGATIVE, default=0.1, metavar='X')
    add('--model-ema', action=BooleanOptionalAction, default=False, help='keep, evaluate and save averaged weights')
    add('--model-ema-decay', type=PROBABILITY, default=0.9998, metavar='X')
    add('--model-ema-warmup', action=BooleanOptionalAction, default=False)


def _add_augmentation(group: Any) -> None:
    add = group.add_argument
    add('--no-aug', action='store_true', help='resize and centre crop only')
    add('--scale', type=POSITIVE, nargs=2, metavar=('MIN', 'MAX'), help='area of the random crop')
    add('--ratio', type=POSITIVE, nargs=2, metavar=('MIN', 'MAX'), help='aspect ratio of the random crop')
    add('--hflip', type=PROBABILITY, metavar='P')
    add('--rotation', type=NOT_NEGATIVE, default=0.0, metavar='DEG', help='rotate by up to so many degrees')
    add('--vflip', type=PROBABILITY, default=0.0, metavar='P')
    add('--color-jitter', type=NOT_NEGATIVE, metavar='X', help="default: the benchmark's")
    add('--aa', metavar='POLICY', help="AutoAugment's policy 'cifar10', or one of timm's, as rand-m9-mstd0.5")
    add('--force-color-jitter', action=BooleanOptionalAction, default=False, help='jitter beside --aa too')
    add('--train-interpolation', metavar='NAME')
    add('--reprob', type=PROBABILITY, default=0.0, metavar='P', help='random erasing')
    add('--remode', choices=['const', 'rand', 'pixel'], default='pixel')
    add('--recount', type=POSITIVE_INT, default=1, metavar='N')
    add('--cutout', type=COUNT, default=0, metavar='N', help='blacken a square of N pixels, cut off at the border')
    add('--mixup', type=NOT_NEGATIVE, default=0.0, metavar='ALPHA')
    add('--cutmix', type=NOT_NEGATIVE, default=0.0, metavar='ALPHA')
    add('--mixup-prob', type=PROBABILITY, default=1.0, metavar='P')
    add('--mixup-switch-prob', type=PROBABILITY, default=0.5, metavar='P')
    add('--mixup-mode', choices=['batch', 'pair', 'elem'], default='batch')
    add('--mixup-off-epoch', type=COUNT, default=0, metavar='N', help='no mixing from this epoch on; 0: never off')
    add('--remix', type=NOT_NEGATIVE, default=0.0, metavar='ALPHA', help='mixup whose labels favour the rarer class')
    add('--remix-kappa', type=between(1), metavar='X', help='so many times rarer is rare (default: 3)')
    add('--remix-tau', type=PROBABILITY, metavar='X', help='share of the image below which it is (default: 0.5)')
    add('--cmo', type=NOT_NEGATIVE, default=0.0, metavar='ALPHA',
        help='CutMix with patches from a second stream of images, in which rare classes are frequent')
    add('--cmo-prob', type=PROBABILITY, metavar='P', help='that a batch is mixed (default: 0.5)')
    add('--cmo-power', type=NOT_NEGATIVE, metavar='R',
        help='the second stream draws class c in proportion to n_c ** -R (default: 1, inverse frequency)')
    add('--cmo-skip-first', type=COUNT, metavar='N', help='epochs without CMO at the beginning (default: 4)')
    add('--cmo-skip-last', type=COUNT, metavar='N', help='and at the end (default: 3)')


def _add_system(group: Any) -> None:
    add = group.add_argument
    add('--device', metavar='NAME', help='default: a GPU if there is one')
    add('--amp', action=BooleanOptionalAction, default=False)
    add('--amp-dtype', choices=['float16', 'bfloat16'], default='float16')
    add('--channels-last', action=BooleanOptionalAction, default=False)
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND')
    add('--sync-bn', action=BooleanOptionalAction, default=False, help='batch statistics over all GPUs')
    add('--dist-bn', choices=['reduce', 'broadcast'], default='reduce',
        help="running statistics after each epoch: all processes' mean, or the first one's")
    add('--pin-mem', action=BooleanOptionalAction, default=False)


def _add_run(group: Any) -> None:
    add = group.add_argument
    add('--seed', type=COUNT, default=42, metavar='N')
    add('--output', default='output', metavar='DIR', help='parent of all run folders (default: output)')
    add('--experiment', metavar='NAME',
        help="the run's folder (default: <model>-<dataset>-s<seed>, with the loss, sampler, mixing and stage if "
             'unusual)')
    add('--resume', metavar='FILE', help="a checkpoint to go on from, or 'auto': the folder's last one, if any")
    add('--eval-metric', choices=EVAL_METRICS, default='top1', help='chooses the best checkpoint (default: top1)')
    add('--watch-test', action=BooleanOptionalAction, default=False,
        help='without a validation split, log the test accuracy of every epoch; it never chooses a checkpoint')
    add('--log-interval', type=POSITIVE_INT, default=50, metavar='N', help='updates between progress lines')
    add('--log-tensorboard', action=BooleanOptionalAction, default=False)
    add('--log-wandb', action=BooleanOptionalAction, default=False)
    add('--wandb-project', default='nbn_timm', metavar='NAME')
