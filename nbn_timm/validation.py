"""A validation from its settings to its report."""
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from nbn_timm import timm_flags
from nbn_timm.attacks import PixelNetwork, Pixels
from nbn_timm.attacks.settings import AttackSettings
from nbn_timm.computation import PrecisionSettings
from nbn_timm.data import Classes, DataDefaults, Splits, create_eval_loader
from nbn_timm.data.classes import label_names
from nbn_timm.data.dataset import picture_names, pictures_digest
from nbn_timm.data.settings import OF_THE_DRAW, DataSettings, InputSettings, LoaderSettings
from nbn_timm.data.shard_stream import ShardStream
from nbn_timm.data.shift import RATIOS, ClassShift
from nbn_timm.data.splits import Known, by_position
from nbn_timm.data.timm_datasets import part_of
from nbn_timm.datasets import (
    benchmark_of,
    create_splits,
    dataset_choices,
    find_benchmark,
    reason_unused,
    shifted_test,
    with_shifted_test,
)
from nbn_timm.deploy import NOTHING_TO_FOLD, FoldSettings, deployed, foldable
from nbn_timm.errors import InputError
from nbn_timm.evaluation import (
    AttackedLoader,
    EvalResult,
    LabelSetEvaluator,
    LongTailEvaluator,
    Result,
    RobustAccuracy,
    RoutingEvaluator,
    ShiftedAccuracy,
    evaluate,
    logit_offset,
    shifted_accuracy,
)
from nbn_timm.evaluation.label_sets import LabelSetPredictions
from nbn_timm.evaluation.predictions import Predictions, check_format, order_of_split, write_arrays, write_predictions
from nbn_timm.evaluation.settings import AdjustmentSettings, EvalBatchSettings, PostHocSettings, ShotSettings
from nbn_timm.evaluation.temperature import calibrate, temperature_of
from nbn_timm.evaluation.thresholds import THRESHOLDS, Thresholds
from nbn_timm.evaluation.views import MeanOfViews, ViewSettings, view_transform
from nbn_timm.models import RoutedExperts
from nbn_timm.models.create import check_input_size
from nbn_timm.models.run_folder import finished_file
from nbn_timm.models.settings import ModelSettings
from nbn_timm.models.weight_files import DIGEST, digest_of_source
from nbn_timm.second_stages.tau_norm import tau_normalize
from nbn_timm.settings import POSITIVE, SettingGroups, Settings, Values, all_of, flag, not_with, only_with, setting
from nbn_timm.trained.opening import (
    CheckpointSettings,
    TrainedModel,
    checkpoint_record,
    open_trained,
    published_record,
)
from nbn_timm.training.agreement import agree_on_data, agree_on_settings, agree_on_weights
from nbn_timm.training.calibrating import gather_logits, in_words, write_calibration, write_thresholds
from nbn_timm.training.distributed import World

HOW_TO_GIVE_COUNTS = (
    'give --class-counts FILE (JSON counts or a training list), --train-list FILE, or --counts-from none to go without '
    'many, medium and few')


@dataclass(frozen=True)
class WeightSettings(Settings):
    """Which weights are evaluated."""

    title = 'weights'

    checkpoint: str | None = setting(None, 'weights of this package, of timm or of the NBN release, or the folder of a '
                                     'run', metavar='PATH', is_file=True)
    pretrained: bool = setting(False, "the model's published weights")


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """What is evaluated, and where the results go."""

    title = 'evaluation'

    config: str | None = setting(None, 'defaults for all other flags', short='-c', metavar='FILE', kind='place')
    split: str = setting('test', 'which split', choices=('val', 'test'), instead=timm_flags.SPLITS)
    results_file: str | None = setting(None, 'write the result as JSON', metavar='FILE', kind='place')
    per_class_file: str | None = setting(None, 'write the accuracy of each class as CSV', metavar='FILE', kind='place')
    logits_file: str | None = setting(
        None, 'write the float32 logits of all images, in the order of the split, and their labels, as NumPy .npz',
        metavar='FILE', kind='place')
    save_predictions: str | None = setting(
        None, 'write path, label, the five likeliest classes and their probabilities of all images, in the order of '
        'the split, as .csv, .parquet or NumPy .npz', metavar='FILE', kind='place')
    temperature: float | None = setting(
        None, 'divides the logits before the softmax of --save-predictions; 1 leaves them as they are', limits=POSITIVE,
        metavar='T', unset='as fitted on the validation split, if the network records it, else 1',
        effect=only_with('save_predictions'))
    fit_temperature: bool = setting(
        False, 'fit the temperature that makes probabilities of the logits, on the images of --split val, and keep it '
        'in the checkpoint', effect=all_of(only_with('checkpoint'), only_with('split', 'val'), not_with('tau_norm'),
                                           not_with('logit_adjustment'), not_with('test_views')))
    fit_thresholds: bool = setting(
        False, 'of images that can be of several classes: choose the thresholds with the greatest F1 on the images of '
        '--split val, and keep them in the checkpoint', effect=all_of(
            only_with('checkpoint'), only_with('split', 'val'), not_with('test_views')))


_OF_SPLITS = {'val_list': 'val', 'val_csv': 'val', 'val_split': 'val', 'test_list': 'test', 'test_csv': 'test',
              'test_split': 'test', 'test_distribution': 'test'}
_OF_DRAWING = {'val_fraction', 'val_seed', 'val_groups', 'group_column'}
_OF_TRAINING_DATA = {'train_list', 'train_split', *OF_THE_DRAW}


@dataclass(frozen=True)
class ValidateSettings(SettingGroups):
    """All settings of a validation."""

    evaluation: EvaluationSettings = EvaluationSettings()
    weights: WeightSettings = WeightSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    model: ModelSettings = ModelSettings()
    form: FoldSettings = FoldSettings()
    adjustment: AdjustmentSettings = AdjustmentSettings()
    post_hoc: PostHocSettings = PostHocSettings()
    views: ViewSettings = ViewSettings()
    attack: AttackSettings = AttackSettings()
    data: DataSettings = DataSettings()
    shots: ShotSettings = ShotSettings()
    input: InputSettings = InputSettings()
    batch: EvalBatchSettings = EvalBatchSettings()
    precision: PrecisionSettings = PrecisionSettings()
    loader: LoaderSettings = LoaderSettings()

    explained = {'dataset': lambda: f': {dataset_choices()}'}
    elsewhere = timm_flags.VALIDATE

    def idle(self, name: str, values: Values) -> str | None:
        """What the data set, the split and the source of the class counts leave unused."""
        if name == 'class_counts' and values.counts_from not in (None, 'file'):
            return f'is not read with --counts-from {values.counts_from}'
        if name in _OF_DRAWING:
            return 'is for training, which writes what it draws to a file: give that as --split-file'
        if _OF_SPLITS.get(name, values.split) != values.split:
            return f'has no effect with --split {values.split}'
        if name in _OF_TRAINING_DATA and values.counts_from not in (None, 'dataset'):
            return (f'has no effect where the training images per class come from the {values.counts_from} '
                    '(--counts-from dataset takes them from there)')
        return reason_unused(name, self.data)


def validation_settings(settings: ValidateSettings, given: Mapping[str, Any]) -> ValidateSettings:
    """The settings with what the record of the network says where they leave something open.

    A network without such a record, as a released one, is evaluated on the benchmark that its pretrained tag names, as
    `resnet50_nbn.imagenet_lt`.

    Raises:
        InputError: Nothing tells what to evaluate, or on what.
    """
    if settings.weights.checkpoint:
        given = {**given, 'checkpoint': finished_file(settings.weights.checkpoint)}
    weights = settings.weights.with_values({key: given[key] for key in ('checkpoint',) if key in given})
    if bool(weights.checkpoint) == weights.pretrained:
        raise InputError('give either --checkpoint FILE or --pretrained: untrained weights are never evaluated')
    if weights.pretrained and not settings.model.model:
        raise InputError('there is no --model whose published weights --pretrained takes: give one '
                         '(timm.list_pretrained() lists them)')
    record = checkpoint_record(weights.checkpoint) if weights.checkpoint else published_record(settings.model.model)
    values = {**record.inherited(ValidateSettings, given), **given}
    if not values.get('dataset'):
        values['dataset'] = _own_benchmark(settings.model.model or record.model, values.get('num_classes'))
    if not values['dataset']:
        raise InputError('give --dataset: neither the checkpoint nor the model says what it was trained on')
    if settings.shots.counts_from is None:
        counted = 'checkpoint' if record.classes is not None else 'dataset'
        values['counts_from'] = 'file' if settings.data.class_counts else counted
    return ValidateSettings.of(values)


def _own_benchmark(model: str | None, num_classes: int | None) -> str | None:
    """The benchmark that a model is configured for, unless the network has another number of classes."""
    benchmark = find_benchmark(benchmark_of(model))
    return benchmark.name if benchmark and num_classes in (None, benchmark.num_classes) else None


def validate(settings: ValidateSettings, world: World) -> None:
    """Open the network and the data, evaluate, report.

    Raises:
        InputError: Something given is wrong.
    """
    check_format(settings.evaluation.save_predictions)
    agree_on_settings(world, settings)
    trained = open_alike(settings, world)
    splits, class_counts = open_evaluated_data(settings, trained, world)
    dataset = splits.val if settings.evaluation.split == 'val' else splits.test
    assert dataset is not None
    input_format = resolve_input(settings, splits.defaults, trained)
    check_input_size(trained.model, trained.name, input_format.input_size)
    check_attackable(settings, trained.model, dataset, input_format)
    evaluator = build_evaluator(settings, trained, splits, class_counts, input_format, world.device)
    about = describe(settings, trained, input_format, class_counts)
    digest = digest_of_source(settings.weights.checkpoint, trained.model, settings.checkpoint.use_ema) if (
        settings.evaluation.results_file) else None
    model = prepare_model(trained.model, world.device, settings.form.fuse, settings.precision)
    if settings.views.test_views:
        model = MeanOfViews(model, settings.views.number)
    loader = build_loader(settings, dataset, input_format, world)
    if world.is_primary:
        described = [f'{key:<17}{value}' for key, value in about.items()]
        unfolded = [NOTHING_TO_FOLD] * (settings.form.fuse and not foldable(
            trained.model))
        print('\n'.join([*trained.notes, *splits.notes, *unfolded, *described]), flush=True)
    if isinstance(evaluator, LongTailEvaluator):
        about_probabilities = look_at(settings, trained, evaluator)
        if about_probabilities and world.is_primary:
            print(f"'{settings.evaluation.save_predictions}': {about_probabilities}", flush=True)
    in_turn = not isinstance(dataset, ShardStream)
    start = time.perf_counter()
    result = evaluate(model, loader, evaluator, world.device, settings.precision.autocast,
                      settings.precision.channels_last, world.distributed)
    shifted = None
    if isinstance(evaluator, LabelSetEvaluator):
        keep_label_sets(settings, evaluator, told_names(trained, splits, class_counts), dataset, world)
    else:
        if evaluator.keeps_logits:
            keep_logits(settings, evaluator, world, in_turn)
        if settings.post_hoc.test_agnostic:
            shifted = test_agnostic(settings, dataset, class_counts, evaluator, world)
    rate = result.num_samples / (time.perf_counter() - start)
    robust = None
    if settings.attack.attack:
        assert isinstance(result, EvalResult)  # label sets are refused
        robust = robust_accuracy(settings, trained, model, dataset, result, splits, class_counts, input_format, world)
    if settings.evaluation.save_predictions and isinstance(evaluator, LongTailEvaluator):
        keep_predictions(settings, evaluator, told_names(trained, splits, class_counts), dataset, world, in_turn)
    if isinstance(evaluator, LabelSetEvaluator):
        about = {**about, THRESHOLDS: evaluator.thresholds.to_dict()}
    if digest is not None:
        about = {**about, DIGEST: digest}
    if world.is_primary:
        report_evaluation(settings, result, class_counts, about, shifted, robust)
        print(f'\n{rate:.0f} images/s on {world.size} x {world.device.type}')


def open_alike(settings: ValidateSettings, world: World) -> TrainedModel:
    """The network that is evaluated, with the same weights in all processes.

    Raises:
        InputError: Something given is wrong, or the processes have other weights.
    """
    with world.primary_first():
        trained = open_network(settings)
    agree_on_weights(world, trained.model, trained.name)
    adjust_network(settings, trained.model)
    return trained


def open_network(settings: ValidateSettings) -> TrainedModel:
    """The network as it was trained."""
    file, model = settings.weights.checkpoint, settings.model
    return open_trained(
        file or model.model, use_ema=settings.checkpoint.use_ema, model=(model.model or None) if file else None,
        add_nbn=model.add_nbn, model_kwargs={**model.model_kwargs, **settings.input.as_model_kwargs()},
        num_classes=settings.data.num_classes,
        all_experts=settings.checkpoint.all_experts)


def adjust_network(settings: ValidateSettings, model: nn.Module) -> None:
    """Change the classifier as --tau-norm says, in place.

    Raises:
        InputError: The network is none for it.
    """
    if settings.post_hoc.tau_norm is None:
        return
    if isinstance(model, RoutedExperts):
        raise InputError("--tau-norm would change the logits that the router was trained on: add --all-experts")
    tau_normalize(model, settings.post_hoc.tau_norm)


def open_evaluated_data(
        settings: ValidateSettings,
        trained: TrainedModel,
        world: World,
) -> tuple[Splits, Classes | None]:
    """The split to evaluate, and the training images per class.

    Raises:
        InputError: There is no such split, the training images are asked for and not known, or the processes see other
            data.
    """
    source, split = settings.shots.counts_from, settings.evaluation.split
    data = replace(settings.data, batch_size=settings.batch.batch_size)
    whose = f"checkpoint '{settings.weights.checkpoint}'" if settings.weights.checkpoint else f"model '{trained.name}'"
    known = Known(trained.classes, whose) if trained.classes is not None else None
    if source != 'dataset':  # nobody asks for the training images
        data = replace(data, class_counts=data.class_counts if source == 'file' else None,
                       num_classes=data.num_classes or trained.model.num_classes)
        if split == 'test' or not data.split_file:  # which would be a part of them
            data = replace(data, train_list=None, split_file=None)
    with world.primary_first():
        splits = create_splits(data, (split,), known, label_sets=True)
    if known is None:
        splits.notes.extend(by_position(whose, splits.classes))
    if (splits.val if split == 'val' else splits.test) is None:
        raise InputError(f"'{data.dataset}' has no {split} split here: "
                         f"use --split {'test' if split == 'val' else 'val'} or give --{split}-list")
    counts = class_counts_of(settings, trained, splits)
    splits = with_shifted_test(settings.data, splits, counts)
    if counts is None and (settings.post_hoc.test_agnostic or settings.adjustment.logit_adjustment):
        raise InputError('--test-agnostic and --logit-adjustment need the training images per class: give '
                         '--class-counts FILE and leave out --counts-from none')
    agree_on_data(world, splits, counts)
    return splits, counts


def class_counts_of(settings: ValidateSettings, trained: TrainedModel, splits: Splits) -> Classes | None:
    """Training images per class from where --counts-from says; None for 'none'.

    Raises:
        InputError: The source has none.
    """
    source = settings.shots.counts_from
    if source == 'none':
        return None
    if source == 'checkpoint' and trained.class_counts is not None:
        file = settings.weights.checkpoint
        where = f"checkpoint '{file}'" if file else 'record of the weights'
        return replace(trained.class_counts, source=f'{where} ({trained.class_counts.source})')
    if source == 'dataset' or (source == 'file' and settings.data.class_counts):
        if splits.class_counts is not None:
            return splits.class_counts
    reason = {'file': '--class-counts was not given', 'checkpoint': 'the checkpoint records none'}.get(
        str(source), f"the training split of '{settings.data.dataset}' was not found")
    raise InputError(f'the training images per class are not known, since {reason}: {HOW_TO_GIVE_COUNTS}')


def resolve_input(settings: ValidateSettings, published: DataDefaults, trained: TrainedModel) -> DataDefaults:
    """Input format: as given, else as recorded, else as published for the weights or the benchmark."""
    if settings.weights.pretrained:
        published = replace(published, published=False)  # the weights know better than the benchmark
    return published.for_model(trained.model.pretrained_cfg).as_trained(settings.input)


def build_evaluator(
        settings: ValidateSettings,
        trained: TrainedModel,
        splits: Splits,
        class_counts: Classes | None,
        input_format: DataDefaults,
        device: torch.device,
) -> LongTailEvaluator | LabelSetEvaluator:
    """What counts the hits, and of routed experts their number; of label sets, what keeps the logits."""
    model, limits = trained.model, splits.shot_limits
    refuse_another_kind(settings, splits.label_sets)
    offset = logit_offset(class_counts, settings.adjustment.logit_adjustment) if class_counts else None
    shots = settings.shots
    many, few = limits
    many = many if shots.many_shot is None else shots.many_shot
    few = few if shots.few_shot is None else shots.few_shot
    if splits.label_sets:
        if settings.evaluation.fit_thresholds and settings.checkpoint.all_experts:
            raise InputError('--fit-thresholds is for what the network answers by itself: leave out --all-experts')
        thresholds = None if settings.views.test_views else trained.record.thresholds  # which are of one view
        return LabelSetEvaluator(model.num_classes, class_counts, device, None, many, few, thresholds)
    counting = (model.num_classes, class_counts, device, None, many, few, offset)
    if isinstance(model, RoutedExperts):
        if settings.views.test_views:
            raise InputError('--test-views is for one forward pass, and this network asks experts in turn: add '
                             '--all-experts')
        return RoutingEvaluator(model.multiply_adds(input_format.input_size), *counting)
    return LongTailEvaluator(*counting)


def build_loader(settings: ValidateSettings, dataset: Dataset, input_format: DataDefaults, world: World) -> Any:
    """A loader of images in order."""
    return create_eval_loader(
        dataset, batch_size=settings.batch.batch_size, defaults=input_format, num_workers=settings.loader.workers,
        device=world.device, rank=world.rank, world_size=world.size,
        pin_memory=settings.loader.pin_mem or world.device.type == 'cuda', dtype=settings.precision.dtype,
        transform=view_transform(settings.views, input_format), views=settings.views.number)


def check_attackable(
        settings: ValidateSettings,
        model: nn.Module,
        dataset: Dataset,
        input_format: DataDefaults,
) -> None:
    """Refuse an --attack whose gradients would not be those of what is judged, or that has no bound.

    Raises:
        InputError: It is one.
    """
    if not settings.attack.attack:
        return
    if isinstance(model, RoutedExperts):
        raise InputError('--attack needs gradients, and none pass the choice of a router: add --all-experts')
    if torch.float16 in (settings.precision.dtype, settings.precision.autocast):
        raise InputError('--attack in float16 would find no way where small gradients become 0, and the network would '
                         'look robust: give bfloat16, or leave it out')
    if settings.views.test_views:
        raise InputError('--attack changes one view of a picture: leave out --test-views')
    Pixels.of_format(input_format)
    if settings.attack.attack_images and isinstance(dataset, IterableDataset):
        raise InputError(f'{settings.data.dataset} is a stream, of which no part can be taken: leave out '
                         '--attack-images')


def robust_accuracy(
        settings: ValidateSettings,
        trained: TrainedModel,
        model: nn.Module,
        dataset: Any,
        clean: EvalResult,
        splits: Splits,
        class_counts: Classes | None,
        input_format: DataDefaults,
        world: World,
) -> RobustAccuracy:
    """The accuracy on the pictures, or --attack-images of them, and on what each attack makes of these.

    Args:
        settings: Of the validation.
        trained: The network.
        model: It, in the form in which it is evaluated.
        dataset: The split.
        clean: What the network answers to all of its pictures.
        splits: Whose shots are told.
        class_counts: Training images per class.
        input_format: Of the images.
        world: This process.
    """
    chosen, precision = settings.attack, settings.precision
    results = {'clean': clean}
    if chosen.attack_images and chosen.attack_images < len(dataset):
        results.clear()
        indices = np.linspace(0, len(dataset) - 1, chosen.attack_images).round().astype(int)
        dataset = part_of(dataset, indices)
    offset = logit_offset(class_counts, settings.adjustment.logit_adjustment) if class_counts else None
    offset = None if offset is None else offset.to(world.device, torch.float32)
    network = PixelNetwork(
        model, Pixels.of_format(input_format, world.device), precision.dtype, precision.autocast,
        precision.channels_last, None if offset is None else lambda logits: logits + offset)
    loader, attacks = build_loader(settings, dataset, input_format, world), chosen.attacks()
    for name in (one for one in ('clean', *attacks) if one not in results):
        evaluator = build_evaluator(settings, trained, splits, class_counts, input_format, world.device)
        shown = loader if name == 'clean' else AttackedLoader(loader, attacks[name], network, world.rank, world.size)
        result = evaluate(model, shown, evaluator, world.device, precision.autocast, precision.channels_last,
                          world.distributed)
        assert isinstance(result, EvalResult)  # label sets are refused
        results[name] = result
    return RobustAccuracy(chosen.attack_eps, {name: attack.label for name, attack in attacks.items()}, results)


def refuse_another_kind(settings: ValidateSettings, label_sets: bool) -> None:
    """Refuse what is asked for of images of one class, where they can be of several, or the other way round.

    Raises:
        InputError: There is something.
    """
    evaluation, post_hoc = settings.evaluation, settings.post_hoc
    for_one = {'--fit-temperature': evaluation.fit_temperature,
               '--temperature': evaluation.temperature is not None, '--tau-norm': post_hoc.tau_norm is not None,
               '--test-agnostic': post_hoc.test_agnostic,
               '--logit-adjustment': bool(settings.adjustment.logit_adjustment),
               '--attack': bool(settings.attack.attack)}
    asked = [name for name, given in for_one.items() if given] if label_sets else (
        ['--fit-thresholds'] * evaluation.fit_thresholds)
    if asked:
        kinds = ('of one class', 'of several classes')
        raise InputError(f'{asked[0]} is not for images that can be {kinds[label_sets]}, as those of '
                         f'{settings.data.dataset} here: leave it out')


def look_at(settings: ValidateSettings, trained: TrainedModel, evaluator: LongTailEvaluator) -> str | None:
    """Let an evaluator keep what the settings ask for beside its counts; a sentence on kept probabilities, if any."""
    if settings.evaluation.logits_file or settings.evaluation.fit_temperature:
        evaluator.keep_logits()
    if settings.post_hoc.test_agnostic:
        evaluator.keep_hits()
    if not settings.evaluation.save_predictions:
        return None
    temperature, about = temperature_of(
        trained.record.calibration, settings.evaluation.temperature,
        next((flag(name) for name in ('tau_norm', 'logit_adjustment', 'test_views') if settings.values()[name]), None))
    evaluator.keep_predictions(temperature)
    return about


def describe(
        settings: ValidateSettings,
        trained: TrainedModel,
        input_format: DataDefaults,
        class_counts: Classes | None,
) -> dict[str, Any]:
    """What is evaluated, as plain data for the result and for people."""
    weights = settings.weights
    return {
        'model': trained.name,
        'parameters': sum(parameter.numel() for parameter in trained.model.parameters()),
        'weights': f"checkpoint '{weights.checkpoint}'" if weights.checkpoint else 'pretrained',
        'use_ema': settings.checkpoint.use_ema,
        'folded': settings.form.fuse,
        'routed': isinstance(trained.model, RoutedExperts),
        'tau_norm': settings.post_hoc.tau_norm,
        **({'views': str(settings.views)} if settings.views.test_views else {}),
        'logit_adjustment': settings.adjustment.logit_adjustment,
        'dataset': settings.data.dataset,
        'split': settings.evaluation.split,
        'class_counts': class_counts.source if class_counts else 'none',
        **input_format.input_format(),
        'precision': settings.precision.name,
    }


def told_names(trained: TrainedModel, splits: Splits, class_counts: Classes | None) -> tuple[str, ...]:
    """Names of all classes, of whoever has some; else their numbers."""
    known = [classes.names for classes in (trained.classes, class_counts, splits.classes)
             if classes is not None and classes.named and classes.num_classes == trained.model.num_classes]
    return known[0] if known else label_names(trained.model.num_classes)


def report_evaluation(
        settings: ValidateSettings,
        result: Result,
        class_counts: Classes | None,
        about: dict[str, Any],
        shifted: ShiftedAccuracy | None = None,
        robust: RobustAccuracy | None = None,
) -> None:
    """Print the table, and write the files that were asked for."""
    table = f'{result.table()}\n\n{result.further_table()}'
    if shifted is not None:
        about = {**about, 'test_agnostic': shifted.to_dict()}
        table += f'\n\n{shifted.table()}'
    if robust is not None:
        about = {**about, 'robust': robust.to_dict()}
        table += f'\n\n{robust.table()}'
    print(f'\n{table}')
    if settings.evaluation.results_file:
        result.write_json(settings.evaluation.results_file, **about)
    if settings.evaluation.per_class_file:
        result.write_per_class_csv(settings.evaluation.per_class_file, class_counts)


def test_agnostic(
        settings: ValidateSettings,
        dataset: Dataset,
        class_counts: Classes | None,
        evaluator: LongTailEvaluator,
        world: World,
) -> ShiftedAccuracy | None:
    """The accuracies on SADE's test sets, from an evaluation of all images; None but on the first process."""
    hits, = of_all_images((evaluator.hits(),), world, not isinstance(dataset, ShardStream)) or (None,)
    if hits is None:
        return None
    benchmark = find_benchmark(settings.data.dataset)
    published = settings.evaluation.split == 'test'
    tests = {shift: shifted_test(settings.data, dataset, class_counts, shift, published)[0]
             for ratio in (benchmark.shift_ratios if benchmark else RATIOS)
             for shift in (ClassShift('forward', ratio), ClassShift('backward', ratio))}
    return shifted_accuracy(hits.numpy(), tests)


def of_all_images(own: tuple[torch.Tensor, ...], world: World, in_turn: bool) -> tuple[torch.Tensor, ...] | None:
    """Numbers [N, ...] of each process's images as those of all images in order; None but on the first process."""
    of_processes = world.gather_to_primary(own)
    if of_processes is None:
        return None
    order = torch.from_numpy(order_of_split([len(parts[0]) for parts in of_processes], in_turn))
    return tuple(torch.cat(parts)[order] for parts in zip(*of_processes, strict=True))


def keep_label_sets(
        settings: ValidateSettings,
        evaluator: LabelSetEvaluator,
        names: Sequence[str],
        dataset: Dataset,
        world: World,
) -> None:
    """Write the logits and answers of all processes' images, and choose thresholds, as far as asked for."""
    asked = settings.evaluation
    logits, sets = gather_logits(evaluator, world, not isinstance(dataset, ShardStream))
    if not world.is_primary:
        return
    kept = LabelSetPredictions(sets.numpy(), logits.numpy(), kept_digest(settings, dataset))
    if asked.logits_file:
        kept.write(asked.logits_file)
    if asked.save_predictions:
        kept.write_table(asked.save_predictions, names, picture_names(dataset, len(kept.sets)),
                         evaluator.thresholds.answers(kept.logits))
    if asked.fit_thresholds:
        assert settings.weights.checkpoint is not None
        found = Thresholds.chosen(kept.logits, kept.sets, asked.split, settings.checkpoint.use_ema)
        write_thresholds(Path(settings.weights.checkpoint), found)
        print(f"Answers: {found.in_words()}; kept in '{settings.weights.checkpoint}'.")


def kept_digest(settings: ValidateSettings, dataset: Dataset) -> str | None:
    """Digest of the pictures for a NumPy file; None, without a look at them, where only tables are asked for."""
    asked = settings.evaluation
    table = not asked.save_predictions or Path(asked.save_predictions).suffix.lower() != '.npz'
    return None if table and not asked.logits_file else pictures_digest(dataset)


def keep_predictions(
        settings: ValidateSettings,
        evaluator: LongTailEvaluator,
        names: Sequence[str],
        dataset: Dataset,
        world: World,
        in_turn: bool,
) -> None:
    """Write what the network says of all processes' images, see `write_predictions`."""
    file, of_processes = settings.evaluation.save_predictions, world.gather_to_primary(evaluator.predictions())
    if file and of_processes is not None:
        predictions = replace(Predictions.in_order(of_processes, in_turn), digest=kept_digest(settings, dataset))
        write_predictions(file, predictions, names, picture_names(dataset, len(predictions)))


def keep_logits(settings: ValidateSettings, evaluator: LongTailEvaluator, world: World, in_turn: bool) -> None:
    """Write `logits` [N, C] and `labels` [N] of all processes' images, and fit a temperature, as far as asked for."""
    logits, labels = gather_logits(evaluator, world, in_turn)
    path, file = settings.evaluation.logits_file, settings.weights.checkpoint
    if not world.is_primary:
        return
    if path:
        write_arrays(path, logits=logits.numpy(), labels=labels.numpy())
    if settings.evaluation.fit_temperature:
        assert file is not None
        found = calibrate(logits, labels, settings.evaluation.split, settings.checkpoint.use_ema)
        if found is not None and settings.checkpoint.all_experts:
            raise InputError('--fit-temperature is for what the network answers by itself: leave out --all-experts')
        if found is not None:
            write_calibration(Path(file), found)
        print(in_words(found, len(labels)) + (f" It is kept in '{file}'." if found else ''))


def prepare_model(model: nn.Module, device: torch.device, fold: bool, precision: PrecisionSettings) -> nn.Module:
    """Put a loaded model into the form in which it is evaluated."""
    model = deployed(model.eval()) if fold else model.eval()
    model = model.to(device, precision.dtype)
    if precision.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if precision.torchcompile:
        return torch.compile(model, backend=precision.torchcompile)  # type: ignore[return-value]
    return model
