"""Temporary: replaced by the room of benchmarks."""
from nbn_timm.data.settings import DataSettings


def reason_unused(name: str, settings: DataSettings) -> str | None:
    return None


def prescribes_format(dataset: str) -> bool:
    return dataset not in ('list', 'folder') and '/' not in dataset


def benchmark_of(model: str | None) -> str | None:
    import timm

    from nbn_timm.data import DATASETS
    cfg = timm.get_pretrained_cfg(model) if model and timm.is_model(model) else None
    tagged = f'{model}.{cfg.tag}' if cfg and cfg.tag else f'{model}'  # an alias ends in its tag
    return next((dataset for dataset in DATASETS if tagged.endswith((f'.{dataset}', f'_{dataset}'))), None)
