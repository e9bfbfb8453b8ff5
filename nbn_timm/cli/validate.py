"""Evaluate a model on a long-tailed benchmark: `python validate.py --help`; with `torchrun`, on several processes."""
import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn

from nbn_timm.config import COUNT, NOT_NEGATIVE, POSITIVE, POSITIVE_INT, PROBABILITY, KeyValues, between, parse_args
from nbn_timm.data import ClassCounts, DataDefaults, DataSettings, create_eval_loader
from nbn_timm.datasets import benchmark_of, create_splits
from nbn_timm.deploy import deployed
from nbn_timm.errors import InputError, run_cli
from nbn_timm.evaluation import LongTailEvaluator, RoutingEvaluator, evaluate, logit_offset, shifted_accuracy
from nbn_timm.models import RoutedExperts
from nbn_timm.models._released import rename_experts
from nbn_timm.models.create import check_input_size, create_model, model_settings, training_arguments
from nbn_timm.models.weight_files import load_weights, read_checkpoint, read_state_dict
from nbn_timm.second_stages import restore_stages
from nbn_timm.second_stages.tau_norm import tau_normalize
from nbn_timm.trained.opening import recorded_training
from nbn_timm.training.distributed import World, close_world, init_world

DATA_FLAGS = (
    'data_dir', 'train_list', 'val_list', 'test_list', 'num_classes', 'imbalance_factor', 'imbalance_profile',
    'imbalance_seed', 'download', 'train_split', 'val_split', 'test_split')
HOW_TO_GIVE_COUNTS = (
    'give --class-counts FILE (JSON counts or a training list), --train-list FILE, or --counts-from none to go without '
    'many, medium and few')


def create_parser() -> argparse.ArgumentParser:
    """Flags carry timm's names; one that is None was not given, so that the checkpoint's record may answer."""
    parser = argparse.ArgumentParser(prog='nbn-validate', description=__doc__, allow_abbrev=False)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML with defaults for these flags')

    group = parser.add_argument_group('model')
    group.add_argument('--model', '-m', metavar='NAME', help="any timm model; default: the checkpoint's")
    group.add_argument('--checkpoint', metavar='FILE', help="weights of this package, of timm or of the NBN release")
    group.add_argument('--pretrained', action='store_true', help="the model's published weights")
    group.add_argument('--use-ema', action='store_true', help="the checkpoint's averaged weights")
    group.add_argument('--model-kwargs', nargs='*', action=KeyValues, metavar='KEY=VALUE', help='for the constructor')
    group.add_argument('--add-nbn', action='store_true', default=None, help='as in training')
    group.add_argument('--num-classes', type=POSITIVE_INT, metavar='N', help='default: as many as class counts')
    group.add_argument('--fuse', '--reparam', action='store_true',
                       help='fold NBN into plain BatchNorm, and the heads of experts into one, first (exact)')
    group.add_argument('--all-experts', action='store_true', help='of a checkpoint with routing, ask every expert')

    group = parser.add_argument_group('post-hoc')
    group.add_argument('--logit-adjustment', type=NOT_NEGATIVE, default=0.0, metavar='TAU',
                       help='subtract TAU times the logarithm of the training prior from the logits')
    group.add_argument('--tau-norm', type=NOT_NEGATIVE, metavar='TAU',
                       help="divide each class's weight vector by its length to the power TAU")
    group.add_argument('--test-agnostic', action='store_true',
                       help='add the accuracy under forward and backward long-tailed class distributions (SADE)')

    group = parser.add_argument_group('data', "Default: the checkpoint's own record of the data it was trained on.")
    group.add_argument('--dataset', metavar='NAME', help="benchmark, 'list', 'folder' or a timm dataset type")
    group.add_argument('--data-dir', metavar='DIR', help='image root')
    group.add_argument('--split', choices=['val', 'test'], default='test')
    for part in ('train', 'val', 'test'):
        group.add_argument(f'--{part}-list', metavar='FILE', help='`path label` per line, relative to --data-dir')
        group.add_argument(f'--{part}-split', metavar='NAME', help="split of one of timm's dataset types")
    group.add_argument('--imbalance-factor', type=between(1), metavar='F')
    group.add_argument('--imbalance-profile', choices=['exp', 'step'])
    group.add_argument('--imbalance-seed', type=COUNT, metavar='N')
    group.add_argument('--download', action='store_true', default=None, help='fetch CIFAR if it is missing')

    group = parser.add_argument_group('many, medium and few shot')
    group.add_argument('--class-counts', metavar='FILE', help='training images per class')
    group.add_argument('--counts-from', choices=['dataset', 'file', 'checkpoint', 'none'],
                       help='source of the training images per class; default: file if --class-counts is given, else '
                            'checkpoint if it has them, else dataset (its training split)')
    group.add_argument('--many-shot', type=COUNT, default=100, metavar='N', help='many: more training images than this')
    group.add_argument('--few-shot', type=COUNT, default=20, metavar='N', help='few: fewer training images than this')

    group = parser.add_argument_group(
        'input', "Default: as recorded in the checkpoint, else the model's own format with --pretrained, else the "
                 "benchmark's published format, else (own images) the model's.")
    group.add_argument('--img-size', type=POSITIVE_INT, metavar='N')
    group.add_argument('--input-size', type=POSITIVE_INT, nargs=3, metavar='N', help='channels height width')
    group.add_argument('--crop-pct', type=POSITIVE, metavar='F')
    group.add_argument('--interpolation', metavar='NAME')
    group.add_argument('--mean', type=PROBABILITY, nargs='+', metavar='F')
    group.add_argument('--std', type=POSITIVE, nargs='+', metavar='F')

    group = parser.add_argument_group('computation')
    group.add_argument('-b', '--batch-size', type=POSITIVE_INT, default=256, metavar='N', help='per process')
    group.add_argument('-j', '--workers', type=COUNT, default=4, metavar='N', help='loading processes')
    group.add_argument('--device', metavar='NAME', help='default: cuda if there is one, else cpu')
    group.add_argument('--amp', action='store_true', help='autocast')
    group.add_argument('--amp-dtype', choices=['float16', 'bfloat16'], default='float16')
    group.add_argument('--channels-last', action='store_true')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND')

    group = parser.add_argument_group('output')
    group.add_argument('--results-file', metavar='FILE', help='write the result as JSON')
    group.add_argument('--per-class-file', metavar='FILE', help='write the accuracy of each class as CSV')
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; see `create_parser`.

    Raises:
        InputError: Something given is wrong.
    """
    args = parse_args(create_parser(), argv)
    if bool(args.checkpoint) == args.pretrained:
        raise InputError('give either --checkpoint FILE or --pretrained: untrained weights are never evaluated')
    world = init_world(args.device)
    try:
        validate(args, world)
        world.barrier()  # see train.py
    finally:
        close_world(world)


def validate(args: argparse.Namespace, world: World) -> None:
    """Build data and model, evaluate, report."""
    checkpoint = read_checkpoint(args.checkpoint) if args.checkpoint else recorded_training(args.model)
    trained_with = training_arguments(checkpoint) or checkpoint.get('settings', {})
    if args.use_ema and 'state_dict_ema' not in checkpoint:
        raise InputError('there are no averaged weights to evaluate: give a checkpoint of a run with --model-ema, '
                         'or leave out --use-ema')
    recorded_model = trained_with.get('model') or checkpoint.get('arch')
    settings = data_settings(vars(args), trained_with, args.model or recorded_model)
    class_counts = None
    counts_from = args.counts_from or default_counts_source(args.class_counts, checkpoint)
    if counts_from != 'dataset':
        class_counts = read_class_counts(counts_from, args.class_counts, args.checkpoint, checkpoint)
        classes = settings.num_classes or (class_counts.num_classes if class_counts else None)
        settings = replace(settings, train_list=None, num_classes=classes)  # nobody asks for the training images
    with world.primary_first():
        splits = create_splits(settings, (args.split,))
    dataset = getattr(splits, args.split)
    if dataset is None:
        raise InputError(f"'{settings.dataset}' has no {args.split} split here: "
                         f"use --split {'test' if args.split == 'val' else 'val'} or give --{args.split}-list")
    if counts_from == 'dataset':
        class_counts = splits.class_counts
        if class_counts is None:
            raise InputError(f'the training images per class are not known, since the training split of '
                             f"'{settings.dataset}' was not found: {HOW_TO_GIVE_COUNTS}")

    if class_counts is None and (args.test_agnostic or args.logit_adjustment):
        raise InputError('--test-agnostic and --logit-adjustment need the training images per class: give '
                         '--class-counts FILE and leave out --counts-from none')
    name, nbn, model_kwargs = model_settings(args.model, args.add_nbn, args.model_kwargs, checkpoint)
    num_classes = args.num_classes or (None if args.pretrained else splits.num_classes)
    with world.primary_first():
        model: Any = create_model(name, num_classes, args.pretrained, nbn=nbn, **model_kwargs)
    input_format = resolve_input(splits.defaults, model.pretrained_cfg, args.pretrained, trained_with, vars(args))
    check_input_size(model, name, input_format.input_size)
    if args.checkpoint:
        weights = rename_experts(read_state_dict(args.checkpoint))
        model = restore_stages(model, weights, without=('routing',) if args.all_experts else ())
    counting = (model.num_classes, class_counts, world.device, None, args.many_shot, args.few_shot,
                logit_offset(class_counts, args.logit_adjustment) if class_counts else None)
    routed = isinstance(model, RoutedExperts)
    evaluator = (RoutingEvaluator(model.multiply_adds(input_format.input_size), *counting) if routed else
                 LongTailEvaluator(*counting))
    about = {
        'model': name,
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'weights': f"checkpoint '{args.checkpoint}'" if args.checkpoint else 'pretrained',
        'use_ema': args.use_ema,
        'folded': args.fuse,
        'routed': routed,
        'tau_norm': args.tau_norm,
        'logit_adjustment': args.logit_adjustment,
        'dataset': settings.dataset,
        'split': args.split,
        'class_counts': class_counts.source if class_counts else 'none',
        **input_format.input_format(),
        'precision': args.amp_dtype if args.amp else 'float32',
    }
    if args.checkpoint:
        load_weights(model, args.checkpoint, use_ema=args.use_ema)
    if args.tau_norm is not None:
        if routed:
            raise InputError("--tau-norm would change the logits that the router was trained on: add --all-experts")
        tau_normalize(model, args.tau_norm)
    model = prepare_model(model, world.device, args.fuse, args.channels_last, args.torchcompile)
    loader = create_eval_loader(
        dataset, batch_size=args.batch_size, defaults=input_format, num_workers=args.workers, device=world.device,
        rank=world.rank, world_size=world.size, pin_memory=world.device.type == 'cuda')

    notes = splits.notes
    if 'state_dict_ema' in checkpoint and not args.use_ema:
        notes = [*notes, 'the checkpoint has averaged weights as well: --use-ema evaluates them']
    if world.is_primary:
        print('\n'.join([*notes, *(f'{key:<14}{value}' for key, value in about.items())]), flush=True)
    start = time.perf_counter()
    result = evaluate(
        model, loader, evaluator, world.device, amp_dtype=getattr(torch, args.amp_dtype) if args.amp else None,
        channels_last=args.channels_last, distributed=world.distributed)
    if world.is_primary:
        rate = result.num_samples / (time.perf_counter() - start)
        table = result.table()
        if args.test_agnostic:
            assert class_counts is not None
            shifted = shifted_accuracy(result, class_counts)
            about['test_agnostic'] = shifted.to_dict()
            table += f'\n\n{shifted.table()}'
        print(f'\n{table}\n\n{rate:.0f} images/s on {world.size} x {world.device.type}')
        if args.results_file:
            result.write_json(args.results_file, **about)
        if args.per_class_file:
            result.write_per_class_csv(args.per_class_file, class_counts)


def data_settings(given: Mapping[str, Any], trained_with: Mapping[str, Any], model: str | None) -> DataSettings:
    """The flags, and for what they leave open the checkpoint's training settings if those are of the same dataset.

    A checkpoint without such a record, as a released one, is evaluated on the benchmark that its model's pretrained
    tag names, as `resnet50_nbn.imagenet_lt`.
    """
    dataset = given['dataset'] or trained_with.get('dataset') or benchmark_of(model)
    if not dataset:
        raise InputError('give --dataset: neither the checkpoint nor the model says what it was trained on')
    known = trained_with if trained_with.get('dataset') == dataset else {}
    values: dict[str, Any] = {name: known.get(name) if given[name] is None else given[name] for name in DATA_FLAGS}
    values = {name: value for name, value in values.items() if value is not None}
    return DataSettings(dataset, batch_size=given['batch_size'], **values)


def default_counts_source(counts_file: str | None, checkpoint: Mapping[str, Any]) -> str:
    """Where the training counts come from if --counts-from does not say."""
    if counts_file:
        return 'file'
    return 'checkpoint' if checkpoint.get('class_counts') else 'dataset'


def read_class_counts(
        source: str,
        counts_file: str | None,
        checkpoint_file: str | None,
        checkpoint: Mapping[str, Any],
) -> ClassCounts | None:
    """Training images per class where --counts-from is 'file', 'checkpoint' or 'none'.

    Raises:
        InputError: `source` has none.
    """
    if source == 'none':
        return None
    if source == 'file' and counts_file:
        return ClassCounts.from_file(counts_file)
    if source == 'checkpoint' and checkpoint.get('class_counts'):
        counts = ClassCounts.from_dict(checkpoint['class_counts'])
        where = f"checkpoint '{checkpoint_file}'" if checkpoint_file else 'record of the weights'
        return replace(counts, source=f'{where} ({counts.source})')
    reason = '--class-counts was not given' if source == 'file' else 'the checkpoint records none'
    raise InputError(f'the training images per class are not known, since {reason}: {HOW_TO_GIVE_COUNTS}')


def resolve_input(
        defaults: DataDefaults,
        pretrained_cfg: Mapping[str, Any],
        pretrained: bool,
        trained_with: Mapping[str, Any],
        given: Mapping[str, Any],
) -> DataDefaults:
    """Input format: the flags, else the checkpoint's, else as published for the weights or the benchmark."""
    if pretrained:
        defaults = replace(defaults, published=False)  # the weights know better than the benchmark
    return defaults.for_model(pretrained_cfg).as_trained(trained_with).as_trained(given)


def prepare_model(
        model: nn.Module,
        device: torch.device,
        fold: bool,
        channels_last: bool,
        compile_backend: str | None,
) -> nn.Module:
    """Put a loaded model into the form in which it is evaluated."""
    model = deployed(model.eval()) if fold else model.eval()
    model = model.to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return torch.compile(model, backend=compile_backend) if compile_backend else model  # type: ignore[return-value]


def console() -> int:
    """Entry point of `nbn-validate`."""
    return run_cli(main, 'nbn-validate')
