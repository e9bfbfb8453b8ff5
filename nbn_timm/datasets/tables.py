"""The benchmarks as tables in Markdown, for the documentation."""
from collections.abc import Iterable, Sequence

from nbn_timm.data.defaults import SQUASH, DataDefaults
from nbn_timm.data.train_transforms import TRAIN_TRANSFORMS
from nbn_timm.datasets.benchmark import Benchmark, benchmarks


def sizes_table() -> str:
    """Classes, images of each split, and how the classes divide."""
    rows = []
    for name, benchmark in benchmarks().items():
        known = benchmark.statistics()
        if known is None:
            rows.append([f'`{name}`', benchmark.title, benchmark.num_classes, *[''] * 5])
            continue
        many, few = benchmark.shot_limits
        limits = '' if benchmark.shot_limits == Benchmark.shot_limits else f' (above {many}, below {few})'
        factor = '' if benchmark.factor is None else f', factor {benchmark.factor:g}'
        rows.append([
            f'`{name}`{factor}', benchmark.title, benchmark.num_classes, f'{known.train:,}',
            'none' if known.val is None else f'{known.val:,}', f'{known.test:,}',
            f'{known.largest} / {known.smallest}', ' / '.join(map(str, known.shots)) + limits])
    return _table(['`--dataset`', 'name', 'classes', 'train', 'val', 'test', 'largest / smallest class',
                   'many / medium / few'], rows)


def sources_table() -> str:
    """Where the images come from, how they lie under the data folder, and on which terms."""
    return _table(['benchmark', 'images', 'from', 'terms'],
                  [[f'`{name}`', benchmark.images, f'<{benchmark.home}>', benchmark.terms]
                   for name, benchmark in benchmarks().items()])


def formats_table() -> str:
    """Transforms and statistics."""
    same: dict[DataDefaults, list[str]] = {}
    for name, benchmark in benchmarks().items():
        same.setdefault(benchmark.defaults, []).append(f'`{name}`')
    rows = []
    for defaults, names in same.items():
        size = defaults.input_size[-1]
        training = TRAIN_TRANSFORMS.find(defaults.train_transform)().in_words(size)
        if defaults.color_jitter:
            training += f', colour jitter {defaults.color_jitter:g}'
        resized = int(size / defaults.crop_pct)
        squashed = ' without the ratio' if defaults.crop_mode == SQUASH else ''
        evaluation = f'resize {resized}{squashed}' + (f', centre crop {size}' if resized != size else '')
        rows.append([', '.join(names), training, evaluation, f'{_numbers(defaults.mean)} / {_numbers(defaults.std)}'])
    return _table(['benchmark', 'training', 'evaluation', 'mean / std'], rows)


def _numbers(values: Sequence[float]) -> str:
    return f'({", ".join(f"{value:g}" for value in values)})' if len(set(values)) > 1 else f'{values[0]:g}'


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in (head, ['---'] * len(head), *rows))
