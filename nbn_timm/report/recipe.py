"""The settings of a run as a reader wants them: what is unusual first, and the command that repeats it."""
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from nbn_timm.data.val_split import SPLIT_FILE
from nbn_timm.errors import InputError
from nbn_timm.report.run import FinishedRun
from nbn_timm.settings import Field, SettingGroups, flag, plain

_PLACES = ('config', 'resume', 'output', 'experiment')


def changed_settings(values: Mapping[str, Any], groups: type[SettingGroups]) -> list[tuple[str, Any, Any]]:
    """Name, value and default of the settings that differ from their defaults, without places."""
    return [(name, _shown(values[name]), _shown(plain(one.default))) for name, one in groups.declared().items()
            if name in values and name not in _PLACES and _differs(one, values[name])]


def other_settings(values: Mapping[str, Any], groups: type[SettingGroups]) -> list[tuple[str, Any]]:
    """Name and value of all the others, those of other programs and versions among them."""
    changed = {name for name, _, _ in changed_settings(values, groups)}
    return [(name, _shown(value)) for name, value in values.items() if name not in changed]


def differing_settings(runs: Sequence[FinishedRun]) -> list[tuple[str, list[Any]]]:
    """Name and values, one per run, of the settings in which runs differ, without places."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _PLACES)
    return [(name, [_shown(run.settings.get(name)) for run in runs]) for name in names
            if any(_meant(run, name) != _meant(runs[0], name) for run in runs)]


def _meant(run: FinishedRun, name: str) -> Any:
    """The value of a setting; of the split file, which lies in the folder of the run, what is in it."""
    value = run.settings.get(name)
    if name == 'split_file' and value:
        with suppress(OSError):
            return (run.folder / SPLIT_FILE).read_bytes()
    return value


def repeating_command(
        values: Mapping[str, Any],
        groups: type[SettingGroups],
        name: str,
        processes: int = 1,
) -> str | None:
    """The command line that repeats a run; None for one of another program or of an earlier version.

    Args:
        values: Of its settings.
        groups: Of the command.
        name: Of the run; the new one is called after it.
        processes: That trained together.
    """
    known = groups.declared()
    if not values or not values.keys() <= known.keys():
        return None
    try:
        typed = _effective({setting: values[setting] for setting, one in known.items() if setting in values
                            and setting not in _PLACES and _differs(one, values[setting])}, groups, processes)
    except InputError:  # an earlier version took what this one does not
        return None
    words = [groups.command] if processes == 1 else [
        'torchrun', '--nproc-per-node', str(processes), '-m', groups.command.replace('nbn-', 'nbn_timm.cli.')]
    for setting, value in typed.items():
        words += _typed(known[setting], value)
    return shlex.join([*words, '--experiment', f'{name}-again'])


def _effective(values: dict[str, Any], groups: type[SettingGroups], processes: int) -> dict[str, Any]:
    """Those of the values that have an effect.

    What has none may switch others on or off, as --split-file does --val-fraction and this --val-groups: so it is left
    out, and they are asked again.
    """
    while idle := groups.of(values).without_effect(list(values), values.keys(), world_size=processes):
        values = {setting: value for setting, value in values.items() if setting not in idle}
    return values


def _differs(one: Field, value: Any) -> bool:
    return value is not None and value != plain(one.default)


def _typed(one: Field, value: Any) -> list[str]:
    """A value as it is typed."""
    if one.type is bool:
        return [flag(one.name) if value else flag(f'no_{one.name}')]
    if one.type is dict:
        return [flag(one.name), *(f'{key}={entry}' for key, entry in value.items())]
    return [flag(one.name), *map(str, value if isinstance(value, list) else [value])]


def _shown(value: Any) -> Any:
    """For a table: numbers with the digits that they were given."""
    if isinstance(value, dict):
        return ' '.join(f'{key}={entry}' for key, entry in value.items()) or None
    if isinstance(value, list | tuple):
        return ' '.join(map(str, value))
    return value if value is None else {True: 'on', False: 'off'}[value] if isinstance(value, bool) else str(value)
