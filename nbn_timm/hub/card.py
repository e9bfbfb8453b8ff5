"""The model card: what a model was trained on and how, how accurate it is, how to load it and whom to cite."""
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult as HubResult
from huggingface_hub import ModelCardData

from nbn_timm.data import Classes, DataSettings
from nbn_timm.data.train_transforms import TRAIN_TRANSFORMS, TrainTransform
from nbn_timm.datasets import DATASETS, describe_draw, find_benchmark, find_dataset
from nbn_timm.layers import RectifiedLinear
from nbn_timm.layers.conversion import nbn_layers
from nbn_timm.mixing import MIXINGS
from nbn_timm.models.ownership import needs_package
from nbn_timm.models.ride import MultiExpert
from nbn_timm.models.settings import ModelSettings
from nbn_timm.trained.opening import FOLDER, TrainedModel
from nbn_timm.trained.record import NetworkRecord
from nbn_timm.trained.results import Results
from nbn_timm.training.batch import BatchSettings
from nbn_timm.training.optim import AverageSettings, ScheduleSettings
from nbn_timm.training.settings import TrainSettings

_METRIC_NAMES = {'top1': 'all', 'top5': 'top-5', 'mean_class': 'mean over classes', 'many': 'many', 'medium': 'medium',
                 'few': 'few'}
_CITATIONS = {
    'nbn': '''@article{bao2024nbn,
  title = {Normalizing Batch Normalization for Long-Tailed Recognition},
  author = {Bao, Yuxiang and Kang, Guoliang and Yang, Linlin and Duan, Xiaoyue and Zhao, Bo and Zhang, Baochang},
  journal = {IEEE Transactions on Image Processing},
  year = {2024},
  note = {arXiv:2501.03122}
}''',
    'ride': '''@inproceedings{wang2021ride,
  title = {Long-tailed Recognition by Routing Diverse Distribution-Aware Experts},
  author = {Wang, Xudong and Lian, Long and Miao, Zhongqi and Liu, Ziwei and Yu, Stella X.},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
  note = {arXiv:2010.01809}
}''',
    'shike': '''@inproceedings{jin2023shike,
  title = {Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation},
  author = {Jin, Yan and Li, Mengke and Lu, Yang and Cheung, Yiu-ming and Wang, Hanzi},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}
}''',
    'timm': '''@misc{rw2019timm,
  title = {PyTorch Image Models},
  author = {Wightman, Ross},
  year = {2019},
  publisher = {GitHub},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}''',
}


def model_card(trained: TrainedModel, location: str, license: str) -> str:
    """README.md of a model repository: metadata for the Hub and text for people, in Markdown.

    Args:
        trained: As `portable` gives it.
        location: The name it is to be loaded by, 'hf-hub:user/name' or 'local-dir:FOLDER'.
        license: Of the weights, an identifier of the Hub's.
    """
    record = trained.record
    data = record.told(DataSettings)
    benchmark = find_benchmark(data.dataset)
    set_name = benchmark.title if benchmark else data.dataset
    trained_on = f', trained on {set_name}' if set_name else ''
    parts = [
        f'# {trained.architecture}{trained_on}',
        _summary(trained),
        '## Model\n\n' + _table(('', ''), _facts(trained)),
        '## Data\n\n' + _data(trained.class_counts, data) if record.arguments or trained.class_counts else '',
        '## Recipe\n\n' + _recipe(record) if record.arguments else '',
        '## Results\n\n' + _results(record.test, trained) if record.test else '',
        '## How to load\n\n' + _loading(trained, location),
        '## Citation\n\n' + '\n\n'.join(f'```bibtex\n{_CITATIONS[key]}\n```' for key in _methods(trained)),
    ]
    return f'---\n{_metadata(trained, license, set_name)}\n---\n' + '\n\n'.join(filter(None, parts)) + '\n'


def _metadata(trained: TrainedModel, license: str, set_name: str | None) -> str:
    dataset, test = trained.record.dataset, trained.record.test
    benchmark = find_benchmark(dataset)
    source = benchmark.hub_id if benchmark else None
    tags = ['image-classification', 'timm', *(['nbn_timm'] if needs_package(trained.architecture) else []),
            *(['long-tailed-recognition'] if trained.class_counts or benchmark else [])]
    results = None
    if test and set_name:
        results = [HubResult(
            task_type='image-classification', dataset_type=source or str(dataset), dataset_name=set_name,
            dataset_split=test.split, metric_type='accuracy', metric_name=f'Accuracy, {_METRIC_NAMES[key]} (%)',
            metric_value=round(value, 2)) for key, value in test.accuracies.items()]
    return ModelCardData(
        license=license, library_name='timm', pipeline_tag='image-classification', tags=tags,
        datasets=[source] if source else None, metrics=['accuracy'] if results else None,
        model_name=trained.architecture if results else None, eval_results=results).to_yaml()


def _summary(trained: TrainedModel) -> str:
    kind = 'An image classifier'
    if isinstance(trained.model, MultiExpert):
        kind = f'{trained.model.method}, an image classifier of {trained.model.num_experts} experts'
    methods = []
    if nbn_layers(trained.model):
        methods.append('normalised batch normalisation (NBN)')
    if any(isinstance(module, RectifiedLinear) for module in trained.model.modules()):
        methods.append('logit rectification')
    owner = '[timm](https://github.com/huggingface/pytorch-image-models)'
    if needs_package(trained.architecture):
        owner = f'`nbn_timm`, an extension of {owner}'
    added = f" with {' and '.join(methods)}" if methods else ''
    text = f'{kind}{added}: the architecture `{trained.architecture}` of {owner}.'
    if _is_folded(trained):
        text += ('\n\nIt was trained with NBN in its last stage, which is folded here into plain BatchNorm: in '
                 'evaluation it computes the same, up to rounding. Do not train on from these weights.')
    return text


def _facts(trained: TrainedModel) -> list[tuple[str, Any]]:
    model, image = trained.model, trained.input
    arguments = {key: value for key, value in trained.model_args.items() if value is not None}
    return [
        ('architecture', f'`{trained.architecture}`'),
        *([('arguments', ', '.join(f'`{key}={value!r}`' for key, value in arguments.items()))] if arguments else []),
        ('parameters', f'{sum(parameter.numel() for parameter in model.parameters()):,}'),
        ('classes', model.num_classes),
        ('image size', ' x '.join(map(str, image.input_size))),
        ('mean, std', f'{_numbers(image.mean)}; {_numbers(image.std)}'),
        ('resampling', f'{image.interpolation}, crop of {image.crop_pct:g}'),
    ]


def _data(counts: Classes | None, data: DataSettings) -> str:
    benchmark = find_benchmark(data.dataset)
    rows: list[tuple[str, Any]] = []
    if benchmark:
        source = benchmark.hub_id
        rows.append(('set', benchmark.title + (f' (images of [{source}](https://huggingface.co/datasets/{source}))'
                                               if source else f' ({benchmark.home})' if benchmark.home else '')))
        if benchmark.terms:
            rows.append(('terms of the images', benchmark.terms))
    elif data.dataset:
        rows.append(('set', data.dataset))
    draw = describe_draw(data)
    if draw:
        rows.append(('draw', draw))
    if counts is not None and counts.counts is not None:
        largest, smallest = max(counts.counts), min(count for count in counts.counts if count)
        rows += [
            ('training images', f'{counts.total:,} in {counts.num_classes} classes'),
            ('imbalance factor', f'{counts.imbalance_factor:.4g}'),
            ('largest class', _images(largest, counts)),
            ('smallest class', _images(smallest, counts)),
        ]
    remark = benchmark.remark(data.train_list) if benchmark else ''
    return '\n\n'.join(filter(None, [_table(('', ''), rows), remark]))


def _images(size: int, counts: Classes) -> str:
    """How many images, and which classes have that many."""
    names = [name for name, count in zip(counts.names, counts.train_images, strict=True) if count == size]
    more = f' and {len(names) - 5} others' if len(names) > 5 else ''
    return f'{size:,} image{"s" if size > 1 else ""} ({", ".join(names[:5])}{more})'


def _recipe(record: NetworkRecord) -> str:
    settings = record.told(TrainSettings)
    optimizer, start, precision = settings.optimizer, settings.start, settings.precision
    rows = [
        ('config', f'`{settings.run.config}`' if settings.run.config else None),
        ('loss', _with_arguments(settings.loss.loss, settings.loss.loss_kwargs)),
        ('sampler', settings.sampler.sampler),
        ('second stage', _with_arguments(settings.second_stage.stage, settings.second_stage.stage_kwargs)),
        ('epochs', _epochs(settings.schedule.epochs, record.epoch)),
        ('batch size', _batch(settings.batch, record.processes)),
        ('optimizer', optimizer.opt),
        ('learning rate', optimizer.lr),
        ('schedule', _schedule(settings.schedule)),
        ('momentum', optimizer.momentum),
        ('weight decay', optimizer.weight_decay),
        ('augmentation', _augmentation(settings, record.train_transform)),
        ('averaged weights', _average(settings.average)),
        ('starting point', start.initial_checkpoint or ('pretrained weights' if start.pretrained else None)),
        ('teacher', settings.distillation.kd_checkpoint),
        ('precision', f'autocast to {precision.amp_dtype}' if precision.amp else 'float32'),
        ('seed', settings.run.seed),
        *((name, record.facts.get(name)) for name in ('hardware', 'torch', 'date')),
    ]
    text = _table(('', ''), [(name, value) for name, value in rows if value not in (None, '', 0)])
    command = record.facts.get('command')
    return text + (f'\n\n    {command}' if command else '') + (
        '\n\nAll settings are in `config.json` under `nbn_timm`.')


def _average(average: AverageSettings) -> str | None:
    if average.model_ema:
        return f'decay {average.model_ema_decay}'
    return f'mean of the last {average.swa_epochs} epochs' if average.swa_epochs else None


def _epochs(epochs: int, reached: int | None) -> int | str:
    return f'{reached} of {epochs}' if reached and reached != epochs else epochs


def _batch(batch: BatchSettings, processes: int) -> int | None:
    """Images of an update, as far as they are recorded."""
    steps = batch.grad_accum_steps or 1
    return batch.global_batch_size or (batch.batch_size or 0) * processes * steps or None


def _schedule(schedule: ScheduleSettings) -> str:
    parts = [schedule.sched]
    if schedule.sched == 'multistep':
        epochs = ', '.join(map(str, schedule.decay_milestones))
        parts.append(f'at epochs {epochs}, times {schedule.decay_rate:g} each')
    if schedule.sched == 'wsd':
        parts.append(f'falling in the last {schedule.wsd_cooldown:.0%} of the run')
    if schedule.warmup_epochs:
        parts.append(f'{schedule.warmup_epochs} epochs of warm-up')
    return ', '.join(parts)


def _augmentation(settings: TrainSettings, transform: str | None) -> str:
    augment = settings.augment
    if augment.no_aug:
        return 'none'
    told = [
        ('rotation of up to', augment.rotation), ('policy', augment.aa), ('colour jitter', augment.color_jitter),
        *((switch.replace('_', ' '), getattr(settings.methods[name], switch))
          for name, method in MIXINGS.items() for switch in method.switched_on(settings.methods[name])),
        ('random erasing', augment.reprob), ('Cutout', augment.cutout), ('label smoothing', settings.loss.smoothing),
        ('other views with', ' '.join(f'{name}={value}' for name, value in augment.other_views.items()))]
    steps = [f'{name} {value}' for name, value in told if value]
    known = TrainTransform if augment.area or augment.aspect else TRAIN_TRANSFORMS.get(transform or '')
    return ', '.join([*([known().in_words()] if known else []), *steps])


def _results(test: Results, trained: TrainedModel) -> str:
    precision = f', computed in {test.precision}' if test.precision else ''
    text = f'Accuracy in percent on the {test.split} split, {test.images:,} images{precision}:\n\n'
    text += _table([_METRIC_NAMES[key] for key in test.accuracies], [[f'{value:.2f}' for value in
                                                                     test.accuracies.values()]])
    counts = trained.class_counts
    if counts is not None and 'many' in test.accuracies:
        benchmark = find_benchmark(trained.record.dataset)
        limits = test.shot_limits or (benchmark.shot_limits if benchmark else ())
        split = counts.shot_split(*limits)
        text += (f'\n\nMany: {len(split.many)} classes with more than {split.many_above} training images; medium: '
                 f'{len(split.medium)} with {split.few_below} to {split.many_above}; few: {len(split.few)} with less '
                 f'than {split.few_below}.')
    if _is_folded(trained):
        text += ' Measured before folding.'
    return text


def _loading(trained: TrainedModel, location: str) -> str:
    ours = needs_package(trained.architecture)
    lines = ['import timm', *(['import nbn_timm  # registers the architecture'] if ours else []), '',
             f"model = timm.create_model('{location}', pretrained=True).eval()",
             'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))', '',
             'logits = model(transform(image).unsqueeze(0))  # image: PIL, RGB']
    names = "model.pretrained_cfg['label_names']"
    counts = trained.class_counts
    if counts is not None and counts.named:
        lines.append(f'print({names}[logits.argmax().item()])')
    text = '```python\n' + '\n'.join(lines) + '\n```'
    if not ours:
        text += '\n\ntimm alone loads it.'
    if location.startswith(FOLDER):
        text += '\n\nThe name is that of the folder; give its path from where you are.'
    if dataset := trained.record.dataset:
        data = '' if dataset in DATASETS and not find_dataset(dataset).needs_folder else ' --data-dir DIR'
        text += ('\n\nTo evaluate it on the benchmark, with `nbn_timm`:\n\n'
                 f'    nbn-validate --model {location} --pretrained{data}')
    return text


def _is_folded(trained: TrainedModel) -> bool:
    """Whether the model was trained with NBN and has none any more."""
    model = trained.record.told(ModelSettings)
    return (model.add_nbn or '_nbn' in model.model) and not nbn_layers(trained.model)


def _methods(trained: TrainedModel) -> list[str]:
    """Keys of the papers to cite."""
    rectified = any(isinstance(module, RectifiedLinear) for module in trained.model.modules())
    nbn = nbn_layers(trained.model) or rectified or _is_folded(trained)
    experts = [trained.model.method.lower()] if isinstance(trained.model, MultiExpert) else []
    return [*(['nbn'] if nbn else []), *experts, 'timm']


def _with_arguments(name: str | None, arguments: Mapping[str, Any] | None) -> str | None:
    if not name or not arguments:
        return name
    shown = ', '.join(f'{key}={value}' for key, value in arguments.items())
    return f'{name} ({shown})'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in line) + ' |' for line in lines)


def _numbers(values: Iterable[float]) -> str:
    return ', '.join(f'{value:g}' for value in values)
