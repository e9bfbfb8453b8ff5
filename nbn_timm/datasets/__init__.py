"""The datasets by name; every module of this folder is imported, and registers what it holds."""
from nbn_timm.datasets.benchmark import (
    Benchmark,
    Statistics,
    benchmark_of,
    benchmarks,
    describe_draw,
    find_benchmark,
    register_benchmark,
)
from nbn_timm.datasets.drawn_benchmark import DrawnBenchmark
from nbn_timm.datasets.list_benchmark import ListBenchmark
from nbn_timm.datasets.list_files import ListFile
from nbn_timm.datasets.named_dataset import (
    CSVS,
    DATASETS,
    HOW_TO_GIVE_ONE,
    LISTS,
    NamedDataset,
    create_splits,
    dataset_choices,
    draws_validation,
    find_dataset,
    has_validation,
    names_of,
    prescribes_format,
    reason_unused,
    register_dataset,
    shifted_test,
    with_shifted_test,
)
from nbn_timm.datasets.val_fraction import draw_split_file
from nbn_timm.registry import import_modules

import_modules(__name__, __path__)

__all__ = [
    'CSVS',
    'DATASETS',
    'HOW_TO_GIVE_ONE',
    'LISTS',
    'Benchmark',
    'DrawnBenchmark',
    'ListBenchmark',
    'ListFile',
    'NamedDataset',
    'Statistics',
    'benchmark_of',
    'benchmarks',
    'create_splits',
    'dataset_choices',
    'describe_draw',
    'draw_split_file',
    'draws_validation',
    'find_benchmark',
    'find_dataset',
    'has_validation',
    'names_of',
    'prescribes_format',
    'reason_unused',
    'register_benchmark',
    'register_dataset',
    'shifted_test',
    'with_shifted_test',
]
