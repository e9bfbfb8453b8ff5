"""What README, CONTRIBUTING and docs/ show works: Python blocks run, and command lines are taken by the commands.

A block that cannot run says so in the line above it, where a reader of the file sees it: `<!-- not run: REASON -->`.
Files that the blocks load are stand-ins: networks of the right kind with random weights.
"""
import configparser
import importlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from released import as_released, checkpoint
from torch.distributed.run import get_args_parser

from nbn_timm.cli import check, convert, demo, export, predict, prepare, push, report, sweep, train
from nbn_timm.config import build_parser, read_given
from nbn_timm.datasets import DATASETS
from nbn_timm.losses import LOSSES
from nbn_timm.mixing import MIXINGS
from nbn_timm.probe.settings import ProbeSettings
from nbn_timm.samplers import SAMPLERS
from nbn_timm.second_stages import SECOND_STAGES
from nbn_timm.settings import SettingGroups
from nbn_timm.validation import ValidateSettings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


def check_flags(groups: type[SettingGroups], create_parser: Callable[[], ArgumentParser], argv: list[str]) -> None:
    """That a command takes its flags, with their values, and that each of them has an effect."""
    given = read_given(groups, create_parser(), argv)
    given.check_effects(given.settings())


# What takes the arguments of each command, or exits; the one place of this file that knows.
PARSE: dict[str, Callable[[list[str]], object]] = {
    'nbn-train': train.parse_train,
    'nbn-validate': partial(check_flags, ValidateSettings, lambda: build_parser(ValidateSettings, 'nbn-validate', '')),
    'nbn-export': partial(check_flags, export.ExportCommand, export.create_parser),
    'nbn-predict': partial(check_flags, predict.PredictSettings, predict.create_parser),
    'nbn-push': partial(check_flags, push.PushCommand, push.create_parser),
    'nbn-check': partial(check_flags, check.CheckSettings, check.create_parser),
    'nbn-probe': partial(check_flags, ProbeSettings, lambda: build_parser(ProbeSettings, 'nbn-probe', '')),
    'nbn-prepare': lambda argv: prepare.create_parser().parse_args(argv),
    'nbn-convert': convert.parse_args,
    'nbn-report': partial(check_flags, report.ReportCommand, report.create_parser),
    'nbn-sweep': sweep.parse_args,
    'nbn-demo': partial(check_flags, demo.DemoSettings, demo.create_parser),
}
SCRIPTS = {'train.py': 'nbn-train', 'validate.py': 'nbn-validate', 'my_train.py': 'nbn-train'}
ELSEWHERE = ('pip', 'pytest', 'ruff', 'mypy', 'mkdocs', 'pre-commit', 'git', 'cd')


class Block(NamedTuple):
    """A Python block, a change of a file, or one command line."""
    page: Path
    line: int
    language: str
    text: str
    not_run: str

    @property
    def file(self) -> str:
        """The path in the comment that a block which is a file begins with, or of the file that a change is of."""
        match = re.match(r'(?:# |--- a/)(\S+\.py)\n', self.text)
        return match[1] if match else ''

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def blocks(page: Path) -> Iterator[Block]:
    """The Python blocks, changes and command lines of a page, in their order."""
    language, not_run, start, held = '', '', 0, []
    for number, line in enumerate(page.read_text(encoding='utf-8').splitlines(), 1):
        mark = re.fullmatch(r'<!-- not run: (.+) -->', line)
        if line.startswith('```') and not language:
            language, start, held = line[3:].strip() or 'text', number + 1, []
        elif line.startswith('```'):
            if language in ('python', 'diff'):
                yield Block(page, start, language, '\n'.join(held) + '\n', not_run)
            language, not_run, held = '', '', []
        elif language in ('python', 'diff'):
            held.append(line)
        elif language in ('', 'bash') and (language or line.startswith('    ')):
            start = start if held else number
            held.append(line.strip().removesuffix('\\'))
            if not line.endswith('\\'):
                yield Block(page, start, 'shell', ' '.join(held), not_run)
                held = []
        elif mark:
            not_run = mark[1]
        elif line and not language:
            not_run = ''


def faults_of_form(text: str) -> Iterator[str]:
    """What a careless merge leaves in a page: open blocks, sections that are there twice, rows without a table."""
    opened, headings, lines = 0, set(), ['', *text.splitlines(), '']
    for number, line in enumerate(lines):
        before, behind = lines[number - 1], lines[min(number + 1, len(lines) - 1)]
        if line.startswith('```'):
            if opened and line != '```':
                yield f'line {number} opens a block within that of line {opened}'
            opened = 0 if opened else number
        elif opened:
            continue
        elif re.fullmatch(r'import [\w.]+( as \w+)?|from [\w.]+ import .+|(def|class) .+:', line):
            yield f'line {number} is code outside of a block'
        elif line.startswith('#') and line in headings:
            yield f'line {number} is a heading that is there twice'
        elif line.startswith('|') and not before.startswith('|') and not re.fullmatch(r'[|: -]+', behind):
            yield f'line {number} is a row without the head of a table'
        if line.startswith('#'):
            headings.add(line)
    if opened:
        yield f'the block of line {opened} has no end'


def test_pages_have_whole_blocks_sections_and_tables():
    """Two merges had left an example twice, half of it outside of its block, and a row apart from its table."""
    broken = '# A\n\n| a |\n|---|\n\n| 1 |\n# A\nimport this\n```\nx\n```python\n```\n'
    assert [fault.partition(' is ')[2] or fault for fault in faults_of_form(broken)] == [
        'a row without the head of a table', 'a heading that is there twice', 'code outside of a block',
        'line 11 opens a block within that of line 9', 'the block of line 12 has no end']
    assert {page.name: list(faults_of_form(page.read_text(encoding='utf-8'))) for page in PAGES} == {
        page.name: [] for page in PAGES}


def commands(block: Block, variables: dict[str, list[str]]) -> Iterator[list[str]]:
    """The commands of a line, once for each value of its variables; values that it gives are remembered."""
    if loop := re.fullmatch(r'for (\w+) in (.+); do', block.text):
        variables[loop[1]] = loop[2].split()
    for command in expansions(block.text, variables):
        try:
            words = shlex.split(command)
        except ValueError:  # an apostrophe: a sentence that a command prints
            continue
        while words and (match := re.fullmatch(r'([A-Z_]+)=(.*)', words[0])):
            variables[match[1]] = [match[2]]
            words = words[1:]
        if words and (re.fullmatch(r'python|torchrun|nbn-\w+', words[0]) or words[0] in ELSEWHERE):
            yield words


def expansions(text: str, variables: dict[str, list[str]]) -> Iterator[str]:
    """The parts of a line between `&&`, with each value of each variable."""
    for name, values in variables.items():
        if re.search(rf'\${name}\b', text):
            for value in values:
                yield from expansions(re.sub(rf'\${name}\b', value, text), variables)
            return
    yield from text.split(' && ')


def check_command(words: list[str]) -> None:
    """That a command would start: the script is there, its flags, configs, models and extras exist."""
    program, *arguments = words
    if program == 'torchrun':
        launch = get_args_parser().parse_args(arguments)
        program, arguments = 'python', [launch.training_script, *launch.training_script_args]
    if program == 'pip':
        check_extras(arguments)
    elif program == 'python' and arguments[0].startswith(('benchmarks/', 'tests/')):
        border = arguments.index('--') if '--' in arguments else len(arguments)
        source = (ROOT / arguments[0]).read_text(encoding='utf-8')
        assert all(flag in source for flag in arguments[:border] if flag.startswith('--')), arguments
        if border < len(arguments):  # the rest goes to every train.py
            PARSE['nbn-train'](['--config', 'cifar100_lt/resnet32', *arguments[border + 1:]])
    elif program == 'python' and arguments[0] == '-c':
        exec(compile(arguments[1], 'python -c', 'exec'), {})
    elif program not in ELSEWHERE:
        command = SCRIPTS[arguments.pop(0)] if program == 'python' else program
        provide(arguments)
        PARSE[command](arguments)
        for flag, name in zip(arguments, arguments[1:], strict=False):
            if flag in ('--model', '-m') and '/' not in name:
                assert timm.is_model(name), f'there is no model {name}'


def check_extras(arguments: list[str]) -> None:
    """`pip install '.[extra]'` names extras that setup.cfg has."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    for extras in re.findall(r'\[([\w,]+)\]', ' '.join(arguments)):
        assert set(extras.split(',')) <= set(setup['options.extras_require']), extras


def provide(arguments: list[str]) -> None:
    """A small checkpoint wherever a command begins with a finished network, which it opens while it parses."""
    for flag, file in zip(arguments, arguments[1:], strict=False):
        if flag == '--initial-checkpoint' and not Path(file).exists():
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            model = 'resnet32_ride' if 'ride' in file else 'resnet20'
            torch.save({'arch': model, 'args': {'model': model, 'dataset': 'digits_lt'},
                        'state_dict': timm.create_model(model, num_classes=10).state_dict()}, file)


@pytest.fixture(scope='module')
def stand_ins(tmp_path_factory) -> Path:
    """A folder with the files that the blocks name."""
    folder = tmp_path_factory.mktemp('docs')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    for name in ('resnet50_nbn', 'resnext50_nbn'):
        weights = as_released(timm.create_model(name).state_dict())
        (folder / 'weights').mkdir(exist_ok=True)
        torch.save(checkpoint(weights), folder / 'weights' / f'{name}.pth.tar')
    (folder / 'resnet50_nbn.pth.tar').symlink_to(folder / 'weights' / 'resnet50_nbn.pth.tar')
    (folder / 'output' / 'quickstart').mkdir(parents=True)
    torch.save({'state_dict': timm.create_model('resnet20_nbn', num_classes=10).state_dict()},
               folder / 'output' / 'quickstart' / 'model_best.pth.tar')
    return folder


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers is gone after its test."""
    saved = [(registry, dict(registry)) for registry in (LOSSES, SAMPLERS, SECOND_STAGES, MIXINGS, DATASETS)]
    yield
    for registry, content in saved:
        registry.clear()
        registry.update(content)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_blocks_run_and_commands_are_taken(page, stand_ins, weights_cache, registries, monkeypatch, capsys):
    monkeypatch.chdir(stand_ins)
    monkeypatch.setenv('NBN_TIMM_WEIGHTS', str(stand_ins / 'weights'))
    namespace, variables = {'__name__': 'page'}, {}
    for block in blocks(page):
        if block.not_run or page.name == 'CONTRIBUTING.md':  # which has a test of its own
            continue
        try:
            if block.language == 'python':
                # Padded, so that a traceback has the lines of the page.
                exec(compile('\n' * (block.line - 1) + block.text, str(page), 'exec'), namespace)
            for words in commands(block, variables) if block.language == 'shell' else ():
                check_command(words)
        except (Exception, SystemExit) as error:
            pytest.fail(f'{block}: {block.text.splitlines()[0]}\n{error!r}\n{capsys.readouterr().err}')


def test_flags_in_the_prose_exist(capsys):
    known = {'--nproc-per-node', '--help', '--decay_epoch', '--kwargs'}  # the last two: architecture.md on parsers
    for parse in PARSE.values():
        with pytest.raises(SystemExit):
            parse(['--help'])
    texts = [capsys.readouterr().out, *(path.read_text() for path in (ROOT / 'benchmarks').glob('*.py'))]
    texts += [block.text for block in blocks(ROOT / 'CONTRIBUTING.md') if block.language == 'shell']  # with new flags
    known |= set(re.findall(r'--[a-z][\w-]*', ' '.join(texts)))
    for page in PAGES:
        if page.stem == 'timm_train':  # flags of timm's scripts
            continue
        for number, line in enumerate(page.read_text(encoding='utf-8').splitlines(), 1):
            for span in re.findall(r'`[^`]+`', line):
                unknown = set(re.findall(r'(?<!\S)`?(--[a-z][\w-]*)', span)) - known
                assert not unknown, f'{page.relative_to(ROOT)}:{number}: no command has {unknown}'


def test_page_of_flags_has_every_flag_with_its_default(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'docs')
    flag_tables = importlib.import_module('flag_tables')
    for name, (groups, create_parser) in flag_tables.COMMANDS.items():
        rows = re.findall(r'^\| (`-.+?`) \| .+? \| (.+?) \|', flag_tables.command_section(name), re.MULTILINE)
        listed = {flag for names, _ in rows for flag in re.findall(r'`(-.+?)`', names)}
        known = {flag for action in create_parser()._actions for flag in action.option_strings}
        assert listed == known - {'-h', '--help'}, name
        assert [default for _, default in rows] == [
            one.shown_default().replace('<', '&lt;') for one in groups.declared().values()], name
    for name, create_parser in flag_tables.PLAIN.items():
        rows = re.findall(r'^\| `(.+?)` \| .+ \| (.+?) \|$', flag_tables.command_section(name), re.MULTILINE)
        actions = [action for action in create_parser()._actions if '--help' not in action.option_strings]
        names = [', '.join(action.option_strings) or action.dest for action in actions]
        assert [flag for flag, _ in rows] == names, name
        assert all('(default' not in row[1] and row[1] for row in rows), name


def test_page_of_flags_and_readme_have_every_command(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'docs')
    page, readme = importlib.import_module('flag_tables').flags_page(), (ROOT / 'README.md').read_text()
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    for name in re.findall(r'^(nbn-\w+) =', setup['options.entry_points']['console_scripts'], re.MULTILINE):
        assert f'\n## {name}\n' in page and re.search(rf'^\|.*`{name}`', readme, re.MULTILINE), name


def changed(text: str, diff: str) -> str:
    """A text with the changes of a diff without line numbers; what is around each change is there once."""
    for part in diff.split('\n', 2)[2].split('@@\n'):
        lines = part.splitlines(keepends=True)
        before, after = (''.join(line[1:] for line in lines if line[0] in kinds) for kinds in (' -', ' +'))
        assert text.count(before) == 1, f'not there once:\n{before}'
        text = text.replace(before, after)
    return text


def write_clothing(folder: Path) -> None:
    """Stand-ins of Fashion-MNIST's files: noise, 12 training and 2 test images of each class."""
    folder.mkdir(parents=True)
    for name, images in (('train', 120), ('t10k', 20)):
        pixels = np.random.default_rng(0).integers(0, 256, (images, 28, 28), np.uint8)
        for kind, array in (('images-idx3', pixels), ('labels-idx1', np.arange(images, dtype=np.uint8) % 10)):
            head = struct.pack(f'>{array.ndim + 1}I', 0x0800 + array.ndim, *array.shape)
            (folder / f'{name}-{kind}-ubyte').write_bytes(head + array.tobytes())


@pytest.mark.slow
def test_examples_of_contributing_are_all_that_it_takes(tmp_path):
    """Each file and change of CONTRIBUTING, put into a copy of the package, is known to the commands below it."""
    unneeded = shutil.ignore_patterns('__pycache__', '*.safetensors')
    shutil.copytree(ROOT / 'nbn_timm', tmp_path / 'nbn_timm', ignore=unneeded)
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    write_clothing(tmp_path / 'data' / 'FashionMNIST' / 'raw')
    found = list(blocks(ROOT / 'CONTRIBUTING.md'))
    for block in found:
        file = tmp_path / block.file
        if block.language == 'diff':
            file.write_text(changed(file.read_text(), block.text))
        elif block.file:
            assert not file.exists(), f'{block}: {block.file} is there already'
            file.write_text(block.text)
    lines = [words for block in found if block.language == 'shell' for words in commands(block, {})]
    calls = [(words[0].removeprefix('nbn-'), words[1:]) for words in lines if words[0].startswith('nbn-')]
    # One process for all, since importing torch takes longer than the rest.
    script = 'import importlib\n' + ''.join(
        f'importlib.import_module("nbn_timm.cli.{command}").main({arguments!r})\n' for command, arguments in calls)
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    trainings = [arguments for command, arguments in calls if command == 'train']
    assert len(list((tmp_path / 'output').glob('*/test.json'))) == len(trainings) > 6
    for arguments in trainings:  # what they were told is in their records, that of new flags too
        recorded = (tmp_path / 'output' / arguments[-1] / 'args.yaml').read_text()
        for flag, value in zip(arguments, arguments[1:], strict=False):
            if re.match('--[a-z-]+$', flag) and re.fullmatch(r'[\w.]+', value) and flag != '--config':
                assert f'{flag[2:].replace("-", "_")}: {value}\n' in recorded, f'{flag} {value}'
