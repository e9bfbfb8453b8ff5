"""Each shipped config beside what its authors' code sets: `python benchmarks/published_settings.py > docs/recipes.md`.

Settings are read as train.py reads them, the published ones from published_settings.yaml. The page has a table of all
configs (recipe_table.py), and below it, for each, every setting with the published value and the file that has it.
"""
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from recipe_table import rows

from nbn_timm.config import ASKED_FOR, build_parser, read_config, shipped_configs
from nbn_timm.training.settings import TrainSettings

DATA = Path(__file__).with_name('published_settings.yaml')
PLACES = frozenset({'dataset', 'img_size', 'seed', 'workers', 'experiment', 'kd_checkpoint',
                    'initial_checkpoint', 'more_train'})  # no part of a recipe

HEAD = """# Recipes

Every config that ships, as train.py reads it, beside what its authors' code sets. The page is made by
`python benchmarks/published_settings.py`. Each file says at its head which published recipe it follows and where it
departs from it. Those that this project has run to their end are in [zoo.md](zoo.md) and [frontier.md](frontier.md);
[results.md](results.md) has short runs of others.

| config | benchmark | model | loss, sampler or stage | epochs | batch | learning rate | follows |
|---|---|---|---|---|---|---|---|"""

BEFORE_TABLES = """
## Setting by setting

In the words of this package: epochs from which a decay holds count from 1; a warm-up is so many epochs before the full
rate, and the rate of the first. A setting without a published value is one that the authors' code does not have. A
**bold** value differs from the published one, and the line below says why."""


@dataclass(frozen=True)
class Published:
    """What is published of a recipe: value and place of each setting, 'loss_kwargs.gamma' for parts of a mapping.

    Attributes:
        settings: Value and (source, file) by setting.
        departs: Settings that differ, and the words of the config's comment that say so.
        says: Words that the comment must have.
        ours: Why nothing is published; None where something is.
    """

    settings: dict[str, tuple[Any, tuple[str, str]]] = field(default_factory=dict)
    departs: dict[str, str] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    ours: str | None = None


def read_published() -> tuple[dict[str, Mapping[str, str]], dict[str, Published]]:
    """The sources, and by config what is published of it."""
    data = yaml.safe_load(DATA.read_text(encoding='utf-8'))
    return data['sources'], {name: _merged(entry, data['blocks']) for name, entry in data['recipes'].items()}


def _merged(entry: Mapping[str, Any], blocks: Mapping[str, Any]) -> Published:
    settings: dict[str, tuple[Any, tuple[str, str]]] = {}
    says = []
    parts = [({blocks[name]['source']: blocks[name]['files']}, blocks[name].get('says', ()))
             for name in entry.get('blocks', ())]
    own_file = {source: named[0] for source, files in entry.get('files', {}).items()
                if len(named := [file for file in files if _is_config(file)]) == 1}
    for by_source, words in (*parts, (entry.get('files', {}), entry.get('says', ()))):
        says += words
        for source, files in by_source.items():
            for file, values in files.items():
                for key, value in values.items():
                    if value is None:  # not in this one, of a block
                        settings = {name: found for name, found in settings.items()
                                    if name.partition('.')[0] != key}
                    place = own_file.get(source, file) if _is_config(file) else file
                    settings |= {name: (one, (source, place)) for name, one in flat(key, value)}
    return Published(settings, entry.get('departs', {}), tuple(says), entry.get('ours'))


def _is_config(file: str) -> bool:
    """Whether it is a file of settings, which has all of them: one of `config/` or `configs/`, wherever that lies."""
    return any(part in ('config', 'configs') for part in file.split('/')[:-1])


def flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A setting, or the parts of one that is a mapping."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from flat(f'{key}.{name}', one)
    elif value is not None:
        yield key, list(value) if isinstance(value, tuple | list) else value


def own_settings(name: str) -> dict[str, Any]:
    """What a config sets, flat, without places and seeds."""
    values = read_config(build_parser(TrainSettings, 'published_settings', ''), TrainSettings, shipped_configs()[name])
    return dict(pair for key, value in values.items() if key not in PLACES and value != ASKED_FOR
                for pair in flat(key, value))


@cache
def defaults() -> dict[str, Any]:
    """Default of every setting."""
    return TrainSettings.of({}).values()


def header(name: str) -> str:
    """The comment at the head of a config in one line."""
    lines = shipped_configs()[name].read_text(encoding='utf-8').splitlines()
    return ' '.join(line[1:].strip() for line in lines if line.startswith('#'))


def differing(name: str, published: Published) -> dict[str, tuple[Any, Any]]:
    """Own and published value of the settings that differ."""
    own, usual = own_settings(name), defaults()
    found = {key: (own.get(key, usual.get(key)), value) for key, (value, _) in published.settings.items()}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def departures(name: str) -> str:
    """What the comment of a config says of its departures."""
    return header(name).partition('Departures: ')[2]


def table(name: str, published: Published, sources: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The lines of a config's part of the page."""
    yield f'\n### `{name}`\n'
    if published.ours is not None:
        yield f'No published recipe: {published.ours}.'
        return
    own, other = own_settings(name), differing(name, published)
    used = list(dict.fromkeys(source for _, (source, _) in published.settings.values()))
    yield ', '.join(f'{sources[one]["repository"]} at {sources[one]["commit"]}' for one in used) + '.\n'
    yield '| setting | here | published | where |\n|---|---|---|---|'
    for key in dict.fromkeys((*own, *published.settings)):
        value, (source, file) = published.settings.get(key, ('', ('', '')))
        here = own.get(key, defaults().get(key, ''))
        shown = f'**{text(here)}**' if key in other else text(here)
        where = f'{sources[source]["repository"].partition("/")[2]}: `{file}`' if source else ''
        yield f'| {key} | {shown} | {text(value)} | {where} |'
    told = departures(name)
    yield f'\nDepartures: {told}' if told else ''


def text(value: Any) -> str:
    """A value for a cell."""
    return ' '.join(map(str, value)) if isinstance(value, list) else f'{value:g}' if isinstance(value, float) else (
        str(value).lower() if isinstance(value, bool) else str(value))


def page() -> str:
    """The whole page."""
    sources, recipes = read_published()
    parts = [HEAD, *rows(), BEFORE_TABLES]
    for name in shipped_configs():
        parts += table(name, recipes[name], sources)
    return '\n'.join(parts) + '\n'


if __name__ == '__main__':
    print(page(), end='')
