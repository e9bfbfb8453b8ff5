"""The shipped configs as the rows of the table that docs/recipes.md begins with; published_settings.py makes the page.

Settings are read as train.py reads them; the last column names the papers that a config's header cites.
"""
import re
from collections.abc import Iterator
from pathlib import Path

from nbn_timm.config import build_parser, read_config, shipped_configs
from nbn_timm.samplers.settings import SamplerSettings
from nbn_timm.second_stages import SECOND_STAGES, FittedSecondStage
from nbn_timm.training.optim import OptimizerSettings, ScheduleSettings
from nbn_timm.training.settings import TrainSettings

VENUES = 'AAAI|ACML|CVPR|ECCV|ICCV|ICLR|ICML|NeurIPS|TIP|TPAMI'
CITATION = re.compile(rf'(\w+ et al\.),? \(?((?:{VENUES}) \d{{4}}|arXiv \d{{4}}\.\d{{5}})')


def rate(optimizer: OptimizerSettings, schedule: ScheduleSettings) -> str:
    """Learning rate and how it changes."""
    shapes = {
        'step': f'x{schedule.decay_rate:g} every {schedule.decay_epochs:g} epochs',
        'linear': 'linear to zero',
        'wsd': f'linear to zero in the last {schedule.wsd_cooldown:.0%}',
        'multistep': f'x{schedule.decay_rate:g} at epoch{"s" * (len(schedule.decay_milestones) > 1)} '
                     f'{" and ".join(map(str, schedule.decay_milestones))}',
    }
    warmup = f'{schedule.warmup_epochs} epochs warm-up, ' if schedule.warmup_epochs else ''
    return f'{optimizer.lr:g}, {warmup}{shapes.get(schedule.sched, schedule.sched)}'


def sources(config: Path) -> str:
    """Papers named in the comment at the head of a config, in that order."""
    comment = ' '.join(line[1:].strip() for line in config.read_text(encoding='utf-8').splitlines() if line[:1] == '#')
    cited = dict.fromkeys(f'{authors}, {venue}' for authors, venue in CITATION.findall(comment))
    return '; '.join(cited) or 'own'


def method(settings: TrainSettings) -> str:
    """What is particular about a recipe's training."""
    stage, chosen, sampler = settings.second_stage.stage, settings.loss, settings.sampler.sampler
    loss = chosen.loss.replace('_', ' ') + (', deferred' if 'start_epoch' in chosen.loss_kwargs else '')
    idle = settings.without_effect(['loss'])
    parts = [f'stage {stage}' if stage else '', '' if idle else loss,
             '' if sampler == SamplerSettings.sampler else f'{sampler.replace("_", " ")} draws']
    return '; '.join(part for part in parts if part)


def rows() -> Iterator[str]:
    """One line of a Markdown table for each config."""
    parser = build_parser(TrainSettings, 'recipe_table', '')
    for name, path in shipped_configs().items():
        settings = TrainSettings.of(read_config(parser, TrainSettings, path))
        stage = settings.second_stage.stage
        fitted = stage is not None and issubclass(SECOND_STAGES[stage], FittedSecondStage)
        batch = settings.batch.global_batch_size or settings.batch.batch_size
        steps = ('', '', '') if fitted else (
            settings.schedule.epochs, batch, rate(settings.optimizer, settings.schedule))
        model = f'`{settings.model.model}`' if settings.model.model else 'the checkpoint\'s'
        yield (f'| [`{name}`](../configs/{name}.yaml) | {settings.data.dataset} | {model} | {method(settings)} | '
               f'{" | ".join(map(str, steps))} | {sources(path)} |')
