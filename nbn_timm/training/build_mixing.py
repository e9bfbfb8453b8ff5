"""What mixes the training batches, from its flags."""
import argparse
from typing import Any

from nbn_timm.cli.train_args import build_parser
from nbn_timm.data import DataDefaults, Splits, TrainLoader
from nbn_timm.errors import InputError
from nbn_timm.mixing import ALWAYS, CMO, Mixing, PatchSampler, Remix, TimmMixup, patch_seed
from nbn_timm.samplers import EpochSampler
from nbn_timm.training.batch import BatchPlan
from nbn_timm.training.build import train_loader
from nbn_timm.training.distributed import World


def build_mixing(
        args: argparse.Namespace,
        splits: Splits,
        defaults: DataDefaults,
        batch: BatchPlan,
        world: World,
        loader: TrainLoader,
        num_classes: int,
) -> Mixing | None:
    """What mixes the batches of `loader` on the device, with the label smoothing, or None.

    Raises:
        InputError: Flags contradict each other or would have no effect, or the data does not tell what is rare.
    """
    method = _check_mixing(args)
    if method is None:
        return None
    epochs = range(args.mixup_off_epoch) if args.mixup_off_epoch else ALWAYS
    if method != 'cmo' and batch.size < 2:
        raise InputError(f'--{method} mixes the images of a batch: give a --batch-size of at least 2')
    if method == 'cmo':
        return _build_cmo(args, splits, defaults, batch, world, loader, num_classes, epochs)
    if method == 'remix':
        if splits.class_counts is None:
            raise InputError('--remix needs the training images per class, and this training set cannot be counted: '
                             'give them with --class-counts FILE')
        return Remix(splits.class_counts, num_classes, args.remix, _given(args.remix_kappa, 3.0),
                     _given(args.remix_tau, 0.5), args.smoothing, args.mixup_prob, epochs, world.device)
    return TimmMixup(num_classes, args.smoothing, args.mixup, args.cutmix, args.mixup_prob, args.mixup_switch_prob,
                     args.mixup_mode, epochs)


def _build_cmo(
        args: argparse.Namespace,
        splits: Splits,
        defaults: DataDefaults,
        batch: BatchPlan,
        world: World,
        loader: TrainLoader,
        num_classes: int,
        epochs: range,
) -> CMO:
    sampler = loader.loader.sampler
    if splits.train is None or splits.train_targets is None or not isinstance(sampler, EpochSampler):
        raise InputError(f"--cmo needs the labels of all training images, which '{args.dataset}' does not tell: use a "
                         'list or folder dataset')
    first, last = _given(args.cmo_skip_first, 4), _given(args.cmo_skip_last, 3)
    epochs = range(first, min(args.epochs - last, epochs.stop))
    if not epochs:
        raise InputError(f'--cmo would mix in none of the {args.epochs} epochs, as it leaves out the first {first} and '
                         f'the last {last}: give more --epochs, or smaller --cmo-skip-first and --cmo-skip-last')
    seed = patch_seed(args.seed)
    patches = PatchSampler(splits.train_targets, seed, world.rank, world.size, per_rank=len(sampler),
                           power=_given(args.cmo_power, 1.0))
    return CMO(train_loader(args, defaults, world, splits.train, patches, batch.size, seed), num_classes, args.cmo,
               args.smoothing, _given(args.cmo_prob, 0.5), epochs)


def _check_mixing(args: argparse.Namespace) -> str | None:
    """The one method that is on, by its flag, or None."""
    methods = [name for name in ('mixup', 'cutmix', 'remix', 'cmo') if getattr(args, name)]
    if len(methods) > 1 and methods != ['mixup', 'cutmix']:
        raise InputError(f'--{methods[0]} and --{methods[-1]} cannot mix the same batch: leave one of them out')
    for name, value in vars(args).items():
        owner = name.partition('_')[0]
        if owner in ('remix', 'cmo') and name != owner and value is not None and owner not in methods:
            flag = name.replace('_', '-')
            raise InputError(f'--{flag} is a setting of --{owner}: give --{owner} ALPHA, or leave it out')
    method = methods[0] if methods else None
    timms = ['mixup_mode', 'mixup_switch_prob', *(['mixup_prob'] if method == 'cmo' else [])]
    for name in timms if method in ('remix', 'cmo') else []:
        if getattr(args, name) != build_parser().get_default(name):
            raise InputError(f"--{name.replace('_', '-')} has no effect on --{method}: leave it out")
    return method


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
