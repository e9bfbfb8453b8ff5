"""From settings to a run folder: features once, heads side by side, the chosen one in the network."""
import filecmp
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbn_timm.computation import PrecisionSettings
from nbn_timm.config import read_mapping
from nbn_timm.data import Classes, DataDefaults, Splits
from nbn_timm.data.dataset import pictures_digest
from nbn_timm.data.quick_look import quick_look
from nbn_timm.data.splits import Known
from nbn_timm.data.val_split import SPLIT_FILE
from nbn_timm.datasets import HOW_TO_GIVE_ONE, create_splits, draws_validation
from nbn_timm.errors import InputError
from nbn_timm.evaluation import EvalResult, LongTailEvaluator
from nbn_timm.evaluation.predictions import Predictions
from nbn_timm.evaluation.temperature import CALIBRATION, FittedTemperature, calibrate
from nbn_timm.files import write_text_atomic
from nbn_timm.imbalance import target_shares
from nbn_timm.models.create import check_input_size
from nbn_timm.models.run_folder import source_file
from nbn_timm.models.transfer import start_model
from nbn_timm.models.weight_files import DIGEST, weights_digest
from nbn_timm.probe.auto import auto_head
from nbn_timm.probe.comparison import ComparedHead, Comparison, compare_heads
from nbn_timm.probe.features import FeatureFolder, Features, extract_features, feature_key
from nbn_timm.probe.heads import Head, head_logits
from nbn_timm.probe.methods import head_method
from nbn_timm.probe.settings import ProbeSettings
from nbn_timm.second_stages.classifier import linear_classifiers, replace_module, vector_classifiers, write_linear
from nbn_timm.second_stages.ncm import CentroidLinear
from nbn_timm.trained.opening import checkpoint_record
from nbn_timm.trained.record import training_arguments
from nbn_timm.trained.results import EvaluatedWeights
from nbn_timm.training.agreement import agree_on_data, agree_on_published, agree_on_settings
from nbn_timm.training.calibrating import in_words
from nbn_timm.training.distributed import World, seed_everything
from nbn_timm.training.report import REPORT, SETTINGS_FILE, config_text, write_page
from nbn_timm.training.run_checkpoint import BEST, LAST, find_resume, fitted_state, save_checkpoint
from nbn_timm.training.validation_part import settle_validation

HEADS_FILE = 'heads.json'

_logger = logging.getLogger(__name__)


def probe_settings(settings: ProbeSettings, given: Mapping[str, Any]) -> ProbeSettings:
    """The settings with what the record of --checkpoint says where they leave something open.

    Raises:
        InputError: There is no model, no data set, or no weights to take features of.
    """
    weights, values = settings.weights, dict(given)
    if weights.checkpoint:
        values['checkpoint'] = str(source_file(weights.checkpoint))
        record = checkpoint_record(values['checkpoint'])
        values = {**record.inherited_by_training(ProbeSettings, values), **values}
    elif not (weights.pretrained or weights.pretrained_path):
        raise InputError('features of untrained weights are of no use: give --pretrained, --pretrained-path PATH or '
                         '--checkpoint FILE')
    for name in ('model', 'dataset'):
        if not values.get(name):
            raise InputError(f'there is no --{name}: {HOW_TO_GIVE_ONE if name == "dataset" else "give one"}' + (
                ', or a --checkpoint that records it' if not weights.checkpoint else ''))
    return ProbeSettings.of(values)


def probe(settings: ProbeSettings, world: World, folder: Path) -> None:
    """Take features, compare heads, keep one, and report on it.

    Raises:
        InputError: Something given is wrong.
    """
    for name in (*settings.heads.heads, *([settings.heads.keep] if settings.heads.keep else [])):
        head_method(name)
    agree_on_settings(world, settings)
    replaced = _check_folder(settings, folder)
    settings = settle_validation(settings, settings.data, world, folder)
    seed_everything(settings.run.seed)
    splits = _open_data(settings, world)
    agree_on_data(world, splits)
    if settings.imbalance.imbalance and splits.class_counts is not None:
        target_shares(settings.imbalance.target, splits.class_counts)  # a wrong file is told before the features
    model, note = open_backbone(settings, splits, world)
    images = input_format(settings, splits, model)
    precision, slower = _precision(settings.precision, world.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    counts = splits.class_counts
    tell = _logger.info
    tell('\n'.join([
        f'model     {settings.model.model}, {parameters:,} parameters; weights: {note}',
        f'data      {settings.data.dataset}' + ('' if counts is None else
            f': {counts.total:,} training images of {counts.num_classes} classes, '
            f'imbalance factor {counts.imbalance_factor:.4g} ({counts.source})'),
        f'run       {folder}, seed {settings.run.seed}' + (', in place of an equal one' if replaced else ''),
        *(note for note in splits.notes if 'no best epoch' not in note), *slower]))
    model.to(world.device)
    if precision.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features = _all_features(settings, splits, model, images, precision, world)
    if world.is_primary:
        train = features['train'].to(world.device)
        classes = counts or Classes.from_targets(
            train.labels.cpu().numpy(), None, f'train split of {settings.data.dataset}', model.num_classes)
        comparison, kept, chosen_by = _compare(settings, train, features.get('val'), classes, splits, world)
        _keep(settings, folder, comparison, kept, chosen_by, model, features, classes, splits, images, world)
    world.barrier()


def open_backbone(settings: ProbeSettings, splits: Splits, world: World) -> tuple[Any, str]:
    """The network with weights for all but its classifier, which is for the classes of the data, and whence they are.

    Raises:
        InputError: Something given is wrong.
    """
    weights, of_model = settings.weights, settings.model
    file = weights.checkpoint or weights.pretrained_path
    with world.primary_first():
        model, notes = start_model(
            of_model.model, settings.data.num_classes or splits.num_classes, file, (), pretrained=weights.pretrained,
            nbn=of_model.add_nbn, keeps_statistics=True, model_kwargs=of_model.model_kwargs,
            in_chans=settings.input.channels)
    if weights.pretrained:
        agree_on_published(world, model, of_model.model)
    splits.notes.extend(notes)
    return model.eval().requires_grad_(False), f"'{file}'" if file else 'pretrained'


def input_format(settings: ProbeSettings, splits: Splits, model: Any) -> DataDefaults:
    """That of the weights, with what the settings say; the record of a finished run is among these."""
    published = splits.defaults if settings.weights.checkpoint else replace(splits.defaults, published=False)
    images = published.for_model(model.pretrained_cfg).as_trained(settings.input)
    check_input_size(model, settings.model.model, images.input_size)
    return images


@torch.no_grad()
def put_head(model: nn.Module, head: Head) -> None:
    """Give a network a head that was trained on its features.

    Raises:
        InputError: Its classifier is not linear, or not on feature vectors where the head normalises them.
    """
    if isinstance(head, CentroidLinear):
        classifiers = vector_classifiers(model)
        if len(classifiers) != 1:
            raise InputError(f'the classifier of {type(model).__name__} is not on feature vectors, which alone can be '
                             'normalised: keep a linear head')
        replace_module(model, next(iter(classifiers)), head)
        return
    classifier, *others = linear_classifiers(model, 'a linear head').values()
    if others:
        raise InputError(f'{type(model).__name__} has several classifiers, and this is one head')
    write_linear(classifier, head.weight, head.bias)


def _check_folder(settings: ProbeSettings, folder: Path) -> bool:
    """Whether the folder holds a run of the same recipe, which is done again; another run is not overwritten."""
    if not (folder / LAST).exists():
        find_resume(None, folder)
        return False
    there = read_mapping(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    own, given = folder / SPLIT_FILE, settings.data.split_file
    same_split = given is None or (own.is_file() and filecmp.cmp(own, given, shallow=False))
    if draws_validation(settings.data) and same_split:
        settings = settings.with_values(split_file=str(own))
    if 'heads' not in there or ProbeSettings.changed(there, settings.values()):
        raise InputError(f"'{folder}' already holds a run with other settings: give another --experiment")
    return True


def _open_data(settings: ProbeSettings, world: World) -> Splits:
    known, file = None, settings.weights.checkpoint
    if file and (classes := checkpoint_record(file).classes) is not None:
        known = Known(classes, f"checkpoint '{file}'", binding=False)
    with world.primary_first():
        splits = create_splits(replace(settings.data, batch_size=settings.batch.batch_size, seed=settings.run.seed),
                               known=known)
    if splits.train is None:
        raise InputError(f"dataset '{settings.data.dataset}' has no training split here: give --train-list or "
                         '--data-dir')
    splits.notes.extend(quick_look(splits))
    return splits


def _precision(settings: PrecisionSettings, device: torch.device) -> tuple[PrecisionSettings, list[str]]:
    """The precision in which features are computed, and a sentence if it is not the one that was asked for."""
    if settings.advice(device) is None:
        return settings, []
    return replace(settings, amp=False), [f'This processor has no arithmetic for {settings.amp_dtype}, so the features '
                                          'are computed in float32.']


def _all_features(
        settings: ProbeSettings,
        splits: Splits,
        model: Any,
        images: DataDefaults,
        precision: PrecisionSettings,
        world: World,
) -> dict[str, Features]:
    """Features of every split that there is; mirrored views are for training alone."""
    tell = _logger.info if world.is_primary else _nothing
    place = settings.features.features_dir or Path(settings.run.output, 'features')
    store = FeatureFolder(place, world, tell)
    network: Any = torch.compile(model, backend=precision.torchcompile) if precision.torchcompile else model
    found = {}
    for name, dataset in (('train', splits.train), ('val', splits.val), ('test', splits.test)):
        if dataset is None:
            continue
        flips = settings.features.flips and name == 'train'
        key = feature_key(model, dataset, images, flips=flips, precision=precision, device=world.device)
        found[name] = store.get(name, key, lambda dataset=dataset, flips=flips: extract_features(  # type: ignore[misc]
            network, dataset, images, flips=flips, precision=precision, batch_size=settings.batch.batch_size,
            workers=settings.loader.workers, world=world, tell=tell))
    return found


def _compare(
        settings: ProbeSettings,
        train: Features,
        val: Features | None,
        classes: Classes,
        splits: Splits,
        world: World,
) -> tuple[Comparison, ComparedHead, str]:
    """The heads, the one to keep, and who chose it."""
    heads, keep, auto = settings.heads, settings.heads.keep, settings.imbalance.imbalance
    val = None if val is None else val.to(world.device)
    names = list(dict.fromkeys([*heads.heads, *([keep] if keep else [])]))
    if val is None:
        _logger.info('The heads are judged on training images, in %d parts that other heads were trained without.',
                     heads.folds)
    comparison = compare_heads(
        names, train, val, classes, heads, metric=settings.run.eval_metric,
        shot_limits=splits.shot_limits, seed=settings.run.seed, tell=_logger.info)
    lines: list[str] = []
    if auto:
        chosen, choice, strength = auto_head(
            train, val, classes, settings.imbalance, heads, shot_limits=splits.shot_limits, seed=settings.run.seed)
        comparison = replace(comparison, heads=(*comparison.heads, chosen))
        lines = [choice.line(), *strength.lines()]
    where = 'validation split' if val is not None else f'training images, {heads.folds} folds'
    _logger.info('\n%s\n%s', where, comparison.table())
    _logger.info('\n'.join([f'best by {comparison.metric}: {comparison.best.described}', *lines]))
    if auto:
        return comparison, chosen, f'--imbalance {auto}'
    if keep:
        return comparison, comparison.find(keep), 'hand'
    return comparison, comparison.best, f'validation {comparison.metric}'


def _keep(
        settings: ProbeSettings,
        folder: Path,
        comparison: Comparison,
        kept: ComparedHead,
        chosen_by: str,
        model: Any,
        features: Mapping[str, Features],
        classes: Classes,
        splits: Splits,
        images: DataDefaults,
        world: World,
) -> None:
    """Put a head into the network and write the folder of a run."""
    put_head(model, kept.head)
    write_text_atomic(folder / SETTINGS_FILE, config_text(settings))
    arguments = {**training_arguments(settings, world.size, images), **_came_to(settings, kept, features['train'])}
    temperature = _temperature(kept.head, features['val'].to(world.device)) if 'val' in features else None
    state = fitted_state(model.cpu(), settings.model.model, arguments, classes)
    state |= {CALIBRATION: temperature.to_dict()} if temperature is not None else {}
    save_checkpoint(folder, state, is_best=True)
    weights = EvaluatedWeights(BEST, chosen_by=chosen_by, head=kept.described)
    table = {'chosen_by': chosen_by, 'kept': kept.name, 'left_out': comparison.left_out, 'heads': {
        one.name: {'tau': one.tau, 'seconds': round(one.seconds, 3), **one.result.to_dict()}
        for one in comparison.heads}}
    write_text_atomic(folder / HEADS_FILE, json.dumps(table, indent=2) + '\n')
    files = [SETTINGS_FILE, HEADS_FILE, BEST, LAST, *([SPLIT_FILE] if (folder / SPLIT_FILE).is_file() else [])]
    split = 'test' if 'test' in features else 'val'
    if split not in features:
        _logger.info('kept      %s, in %s: %s', kept.described, folder, ', '.join(files))
        return
    result, predictions = _evaluate(
        kept.head, features[split].to(world.device), classes, splits.shot_limits, world.device)
    result.write_json(
        folder / f'{split}.json', model=settings.model.model, dataset=settings.data.dataset, split=split,
        checkpoint=weights.in_words(), weights=weights.to_dict(), use_ema=False,
        precision=settings.precision.amp_dtype if settings.precision.amp else 'float32',
        calibration=None if temperature is None else temperature.to_dict(),
        **{DIGEST: weights_digest(state['state_dict'])})
    result.write_per_class_csv(folder / f'{split}_per_class.csv', classes)
    dataset = splits.test if split == 'test' else splits.val
    replace(predictions, digest=pictures_digest(dataset)).write(folder / f'{split}_predictions.npz')
    files += [f'{split}.json', f'{split}_per_class.csv', f'{split}_predictions.npz']
    if settings.run.report:
        write_page(folder, ProbeSettings, model, dataset, world.size)
        files.append(REPORT)
    told = [] if 'val' not in features else [in_words(temperature, len(features['val'])), '']
    _logger.info('\n'.join(['', *told, f'{split} split, {weights.in_words()}', result.table(), '',
                            result.further_table(), '', f'in {folder}: {", ".join(files)}']))


def _came_to(settings: ProbeSettings, kept: ComparedHead, train: Features) -> dict[str, Any]:
    """How the kept head was trained, by the names that a training has for it."""
    method, heads = kept.method, settings.heads.for_features(len(train), train.size)
    return {
        'probe_head': kept.described, 'loss': method.loss, 'loss_kwargs': dict(method.loss_kwargs),
        'sampler': method.sampler, 'no_aug': True, 'opt': 'adamw', 'lr': heads.head_lr,
        'weight_decay': heads.head_weight_decay, 'decay_1d': False, 'epochs': heads.head_epochs, 'sched': 'cosine',
        'initial_checkpoint': settings.weights.checkpoint or settings.weights.pretrained_path}


def _evaluate(
        head: Head,
        features: Features,
        classes: Classes,
        shot_limits: tuple[int, int],
        device: torch.device,
) -> tuple[EvalResult, Predictions]:
    evaluator = LongTailEvaluator(classes.num_classes, classes, device, None, *shot_limits)
    logits = head_logits(head, features.plain)
    evaluator.update(logits, features.labels)
    lengths = torch.linalg.vector_norm(features.plain, dim=1)
    return evaluator.compute(), Predictions.of_logits(logits, features.labels, lengths)


def _temperature(head: Head, val: Features) -> FittedTemperature | None:
    return calibrate(head_logits(head, val.plain), val.labels, 'val')


def _nothing(line: str) -> None:
    """For processes other than the first."""
