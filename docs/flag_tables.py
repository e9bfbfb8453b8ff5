"""All flags of the commands as one page, from the declarations of the settings: the site's page of flags."""
import re
from argparse import Action, ArgumentParser
from collections.abc import Callable

from nbn_timm.cli import check, convert, demo, export, predict, prepare, probe, push, report, sweep, train, validate
from nbn_timm.config import build_parser
from nbn_timm.probe.settings import ProbeSettings
from nbn_timm.settings import Field, SettingGroups, Settings, fields_of, flag
from nbn_timm.training.settings import TrainSettings
from nbn_timm.validation import ValidateSettings

COMMANDS: dict[str, tuple[type[SettingGroups], Callable[[], ArgumentParser]]] = {
    'nbn-check': (check.CheckSettings, check.create_parser),
    'nbn-train': (TrainSettings, lambda: build_parser(TrainSettings, 'nbn-train', train.DESCRIPTION)),
    'nbn-validate': (ValidateSettings, lambda: build_parser(ValidateSettings, 'nbn-validate', validate.DESCRIPTION)),
    'nbn-probe': (ProbeSettings, lambda: build_parser(ProbeSettings, 'nbn-probe', probe.DESCRIPTION)),
    'nbn-predict': (predict.PredictSettings, predict.create_parser),
    'nbn-report': (report.ReportCommand, report.create_parser),
    'nbn-demo': (demo.DemoSettings, demo.create_parser),
    'nbn-export': (export.ExportCommand, export.create_parser),
    'nbn-push': (push.PushCommand, push.create_parser),
}
# Without settings: their few arguments are declared to argparse.
PLAIN: dict[str, Callable[[], ArgumentParser]] = {
    'nbn-sweep': sweep.create_parser,
    'nbn-prepare': prepare.create_parser,
    'nbn-convert': convert.create_parser,
}

INTRODUCTION = """# Flags

Every flag of every command, made from the declarations in the code. A config takes the same names with underscores:
`--batch-size 64` is `batch_size: 64`.

Of a training, the last column says what a setting decides. A *recipe* setting decides the result, so it is compared
when a run is resumed. A *machine* setting (workers, device) and a *place* (a folder) are not compared, and stay out of
model cards."""


def flags_page() -> str:
    """The page in Markdown."""
    return '\n\n'.join([INTRODUCTION, *(command_section(name) for name in (*COMMANDS, *PLAIN))]) + '\n'


def command_section(name: str) -> str:
    """The part of a command: what it does, and a table for each group of settings."""
    if name in PLAIN:
        return plain_section(name, PLAIN[name]())
    groups, create_parser = COMMANDS[name]
    tables = [group_table(group, with_kind=groups is TrainSettings) for group in groups.group_types().values()]
    return '\n\n'.join([f'## {name}', _cell(create_parser().description or ''), *tables])


def plain_section(name: str, parser: ArgumentParser) -> str:
    """The part of a command without settings; help tells a default that is not None."""
    rows = ['| argument | what it is | default |', '|---|---|---|']
    for action in parser._actions:
        if '--help' not in action.option_strings:
            about, default = _told_default(action)
            rows.append(f'| `{", ".join(action.option_strings) or action.dest}` | {_cell(about)} | {_cell(default)} |')
    return '\n\n'.join([f'## {name}', _cell(parser.description or ''), '\n'.join(rows)])


def _told_default(action: Action) -> tuple[str, str]:
    """The help of an argument without its default, and the default."""
    help = (action.help or '').replace('%%', '%')
    match = re.fullmatch(r'(.*?)(?: \(default: |; default: )(.+?)\)?', help)
    return (match[1], match[2]) if match else (help, 'has to be given' if action.required else 'none')


def group_table(group: type[Settings], with_kind: bool = False) -> str:
    """The flags of a group, perhaps with what they decide."""
    rows = [('flag', 'takes', 'default', 'what it is', 'decides'), ('---',) * 5]
    rows += [(_names(one), _values(one), _cell(one.shown_default()), _cell(one.declaration.help), one.declaration.kind)
             for one in fields_of(group)]
    table = '\n'.join(f'| {" | ".join(row if with_kind else row[:-1])} |' for row in rows)
    title = group.title[:1].upper() + group.title[1:]
    return '\n\n'.join([f'### {title}', *([_cell(group.about)] if group.about else []), table])


def _names(one: Field) -> str:
    short, long = one.declaration.short, [flag(one.name), *one.declaration.also]
    negative = [f'--no-{name[2:]}' for name in long if one.type is bool and not one.name.startswith('no_')]
    return ', '.join(f'`{name}`' for name in (*([short] if short else []), *long, *negative))


def _values(one: Field) -> str:
    """What may follow the flag, in words."""
    limits, choices, nargs = one.declaration.limits, one.choices, one.declaration.nargs
    if one.type is bool:
        return 'nothing'
    if choices is not None:
        return 'one or more of ' * one.many + ', '.join(f'`{choice}`' for choice in choices)
    kind = {int: 'whole number', float: 'number', dict: 'KEY=VALUE ...'}.get(one.type, 'text')
    if one.many:
        kind = f'{nargs or "one or more"} {kind}s'
    elif nargs == '?':
        kind = f'nothing or {kind}'
    return kind + (f', {limits}' if limits is not None else '')


def _cell(text: str) -> str:
    return text.replace('|', r'\|').replace('<', '&lt;').replace('*', r'\*')
