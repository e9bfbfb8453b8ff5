"""The model card: what a model was trained on and how, how accurate it is, how to load it and whom to cite."""
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from nbn_timm.data import ClassCounts
from nbn_timm.datasets import describe_draw, find_benchmark
from nbn_timm.deploy.timm_folder import needs_package
from nbn_timm.layers import RectifiedLinear
from nbn_timm.layers.conversion import nbn_layers
from nbn_timm.models.ride import MultiExpert
from nbn_timm.trained.opening import FOLDER, TrainedModel
from nbn_timm.trained.record import has_names
from nbn_timm.trained.results import ACCURACIES

_METRIC_NAMES = {'top1': 'all', 'top5': 'top-5', 'mean_class': 'mean over classes', 'many': 'many', 'medium': 'medium',
                 'few': 'few'}
_TRANSFORMS = {'imagenet': 'random resized crop, flip', 'cifar': 'padding, crop, flip', 'digits': 'padding, crop'}
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
        trained: As `portable` gives it; its record may have 'test', see `summarize_results`.
        location: The name it is to be loaded by, 'hf-hub:user/name' or 'local-dir:FOLDER'.
        license: Of the weights, an identifier of the Hub's.
    """
    settings = trained.record.get('settings') or {}
    benchmark = find_benchmark(settings.get('dataset'))
    set_name = benchmark.title if benchmark else settings.get('dataset')
    trained_on = f', trained on {set_name}' if set_name else ''
    parts = [
        f'# {_architecture(trained)}{trained_on}',
        _summary(trained),
        '## Model\n\n' + _table(('', ''), _facts(trained)),
        '## Data\n\n' + _data(trained.class_counts, settings) if settings or trained.class_counts else '',
        '## Recipe\n\n' + _recipe(trained.record) if settings else '',
        '## Results\n\n' + _results(trained.record['test'], trained) if trained.record.get('test') else '',
        '## How to load\n\n' + _loading(trained, location),
        '## Citation\n\n' + '\n\n'.join(f'```bibtex\n{_CITATIONS[key]}\n```' for key in _methods(trained)),
    ]
    return f'---\n{_metadata(trained, license, set_name)}\n---\n' + '\n\n'.join(filter(None, parts)) + '\n'


def _metadata(trained: TrainedModel, license: str, set_name: str | None) -> str:
    settings = trained.record.get('settings') or {}
    dataset = settings.get('dataset')
    benchmark = find_benchmark(dataset)
    source = benchmark.hub_id if benchmark else None
    test = trained.record.get('test')
    tags = ['image-classification', 'timm', *(['nbn_timm'] if needs_package(_architecture(trained)) else []),
            *(['long-tailed-recognition'] if trained.class_counts or benchmark else [])]
    results = None
    if test and set_name:
        results = [EvalResult(
            task_type='image-classification', dataset_type=source or str(dataset), dataset_name=set_name,
            dataset_split=test['split'], metric_type='accuracy', metric_name=f'Accuracy, {_METRIC_NAMES[key]} (%)',
            metric_value=round(test[key], 2)) for key in ACCURACIES if test.get(key) is not None]
    return ModelCardData(
        license=license, library_name='timm', pipeline_tag='image-classification', tags=tags,
        datasets=[source] if source else None, metrics=['accuracy'] if results else None,
        model_name=_architecture(trained) if results else None, eval_results=results).to_yaml()


def _summary(trained: TrainedModel) -> str:
    kind = 'An image classifier'
    if isinstance(trained.model, MultiExpert):
        kind = f'RIDE, an image classifier of {trained.model.num_experts} experts'
    methods = []
    if nbn_layers(trained.model):
        methods.append('normalised batch normalisation (NBN)')
    if any(isinstance(module, RectifiedLinear) for module in trained.model.modules()):
        methods.append('logit rectification')
    owner = '[timm](https://github.com/huggingface/pytorch-image-models)'
    if needs_package(_architecture(trained)):
        owner = f'`nbn_timm`, an extension of {owner}'
    added = f" with {' and '.join(methods)}" if methods else ''
    text = f'{kind}{added}: the architecture `{_architecture(trained)}` of {owner}.'
    if _is_folded(trained):
        text += ('\n\nIt was trained with NBN in its last stage, which is folded here into plain BatchNorm: in '
                 'evaluation it computes the same, up to rounding. Do not train on from these weights.')
    return text


def _facts(trained: TrainedModel) -> list[tuple[str, Any]]:
    model, image = trained.model, trained.input
    arguments = {key: value for key, value in trained.model_args.items() if value is not None}
    return [
        ('architecture', f'`{_architecture(trained)}`'),
        *([('arguments', ', '.join(f'`{key}={value!r}`' for key, value in arguments.items()))] if arguments else []),
        ('parameters', f'{sum(parameter.numel() for parameter in model.parameters()):,}'),
        ('classes', model.num_classes),
        ('image size', ' x '.join(map(str, image.input_size))),
        ('mean, std', f'{_numbers(image.mean)}; {_numbers(image.std)}'),
        ('resampling', f'{image.interpolation}, crop of {image.crop_pct:g}'),
    ]


def _data(counts: ClassCounts | None, settings: Mapping[str, Any]) -> str:
    benchmark = find_benchmark(settings.get('dataset'))
    rows: list[tuple[str, Any]] = []
    if benchmark:
        source = benchmark.hub_id
        rows.append(('set', benchmark.title + (f' (images of [{source}](https://huggingface.co/datasets/{source}))'
                                               if source else f' ({benchmark.home})' if benchmark.home else '')))
        if benchmark.terms:
            rows.append(('terms of the images', benchmark.terms))
    elif settings.get('dataset'):
        rows.append(('set', settings['dataset']))
    draw = describe_draw(settings)
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
    remark = benchmark.remark(settings.get('train_list')) if benchmark else ''
    return '\n\n'.join(filter(None, [_table(('', ''), rows), remark]))


def _images(size: int, counts: ClassCounts) -> str:
    """How many images, and which classes have that many."""
    names = [name for name, count in zip(counts.names, counts.train_images, strict=True) if count == size]
    more = f' and {len(names) - 5} others' if len(names) > 5 else ''
    return f'{size:,} image{"s" if size > 1 else ""} ({", ".join(names[:5])}{more})'


def _recipe(record: Mapping[str, Any]) -> str:
    settings = record['settings']
    epochs, reached = settings.get('epochs'), record.get('epoch')
    milestones = settings.get('decay_milestones') if settings.get('sched') == 'multistep' else None
    schedule = [str(settings['sched'])] if settings.get('sched') else []
    if milestones:
        schedule.append(f'at epochs {", ".join(map(str, milestones))}, times {settings.get("decay_rate"):g} each')
    if settings.get('warmup_epochs'):
        schedule.append(f'{settings["warmup_epochs"]} epochs of warm-up')
    transform = _TRANSFORMS.get(settings.get('train_transform'))
    augmentation = [f'{name} {value}' for name, key in (
        ('rotation of up to', 'rotation'), ('policy', 'aa'), ('colour jitter', 'color_jitter'), ('mixup', 'mixup'),
        ('CutMix', 'cutmix'), ('remix', 'remix'), ('CMO', 'cmo'), ('random erasing', 'reprob'),
        ('label smoothing', 'smoothing')) if (value := settings.get(key))]
    batch = settings.get('global_batch_size') or (settings.get('batch_size') or 0) * (settings.get('world_size') or 1)
    rows = [
        ('config', f'`{settings["config"]}`' if settings.get('config') else None),
        ('loss', _with_arguments(settings.get('loss'), settings.get('loss_kwargs'))),
        ('sampler', settings.get('sampler')),
        ('second stage', _with_arguments(settings.get('stage'), settings.get('stage_kwargs'))),
        ('epochs', f'{reached} of {epochs}' if reached and reached != epochs else epochs),
        ('batch size', batch or None),
        ('optimizer', settings.get('opt')),
        ('learning rate', settings.get('lr')),
        ('schedule', ', '.join(schedule)),
        ('momentum', settings.get('momentum')),
        ('weight decay', settings.get('weight_decay')),
        ('augmentation', 'none' if settings.get('no_aug') else ', '.join(filter(None, [transform, *augmentation]))),
        ('averaged weights', f'decay {settings.get("model_ema_decay")}' if settings.get('model_ema') else None),
        ('starting point', settings.get('initial_checkpoint')
         or ('pretrained weights' if settings.get('pretrained') else None)),
        ('teacher', settings.get('kd_checkpoint')),
        ('precision', f'autocast to {settings.get("amp_dtype")}' if settings.get('amp') else 'float32'),
        ('seed', settings.get('seed')),
        ('hardware', record.get('hardware')),
        ('torch', record.get('torch')),
        ('date', record.get('date')),
    ]
    text = _table(('', ''), [(name, value) for name, value in rows if value not in (None, '', 0)])
    command = record.get('command')
    return text + (f'\n\n    {command}' if command else '') + (
        '\n\nAll settings are in `config.json` under `nbn_timm`.')


def _results(test: Mapping[str, Any], trained: TrainedModel) -> str:
    keys = [key for key in ACCURACIES if test.get(key) is not None]
    precision = f', computed in {test["precision"]}' if test.get('precision') else ''
    text = f'Accuracy in percent on the {test["split"]} split, {test["images"]:,} images{precision}:\n\n'
    text += _table([_METRIC_NAMES[key] for key in keys], [[f'{test[key]:.2f}' for key in keys]])
    counts = trained.class_counts
    if counts is not None and test.get('many') is not None:
        limits, benchmark = test.get('splits'), find_benchmark((trained.record.get('settings') or {}).get('dataset'))
        split = (counts.shot_split(limits['many_above'], limits['few_below']) if limits
                 else counts.shot_split(*benchmark.shot_limits) if benchmark else counts.shot_split())
        text += (f'\n\nMany: {len(split.many)} classes with more than {split.many_above} training images; medium: '
                 f'{len(split.medium)} with {split.few_below} to {split.many_above}; few: {len(split.few)} with less '
                 f'than {split.few_below}.')
    if _is_folded(trained):
        text += ' Measured before folding.'
    return text


def _loading(trained: TrainedModel, location: str) -> str:
    ours = needs_package(_architecture(trained))
    lines = ['import timm', *(['import nbn_timm  # registers the architecture'] if ours else []), '',
             f"model = timm.create_model('{location}', pretrained=True).eval()",
             'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))', '',
             'logits = model(transform(image).unsqueeze(0))  # image: PIL, RGB']
    names = "model.pretrained_cfg['label_names']"
    counts = trained.class_counts
    if counts is not None and has_names(counts):
        lines.append(f'print({names}[logits.argmax().item()])')
    text = '```python\n' + '\n'.join(lines) + '\n```'
    if not ours:
        text += '\n\ntimm alone loads it.'
    if location.startswith(FOLDER):
        text += '\n\nThe name is that of the folder; give its path from where you are.'
    if trained.record.get('settings', {}).get('dataset'):
        text += ('\n\nTo evaluate it on the benchmark, with `nbn_timm`:\n\n'
                 f'    nbn-validate --model {location} --pretrained --data-dir DIR')
    return text


def _architecture(trained: TrainedModel) -> str:
    return trained.model.pretrained_cfg['architecture']


def _is_folded(trained: TrainedModel) -> bool:
    """Whether the model was trained with NBN and has none any more."""
    settings = trained.record.get('settings') or {}
    with_nbn = settings.get('add_nbn') or '_nbn' in str(settings.get('model'))
    return bool(with_nbn) and not nbn_layers(trained.model)


def _methods(trained: TrainedModel) -> list[str]:
    """Keys of the papers to cite."""
    rectified = any(isinstance(module, RectifiedLinear) for module in trained.model.modules())
    nbn = nbn_layers(trained.model) or rectified or _is_folded(trained)
    ride = isinstance(trained.model, MultiExpert)
    return [*(['nbn'] if nbn else []), *(['ride'] if ride else []), 'timm']


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
