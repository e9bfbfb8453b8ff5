"""What README, CONTRIBUTING and docs/ show works: Python blocks run, and command lines are taken by the commands.

A block that cannot run says so in the line above it, where a reader of the file sees it: `<!-- not run: REASON -->`.
Files that the blocks load are stand-ins: networks of the right kind with random weights.
"""
import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from released import as_released, checkpoint
from torch.distributed.run import get_args_parser

from nbn_timm import config
from nbn_timm.cli import convert, export, predict, prepare, push, train, validate
from nbn_timm.losses import LOSSES
from nbn_timm.samplers import SAMPLERS
from nbn_timm.second_stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]

# What takes the arguments of each command, or exits; the one place of this file that knows.
PARSE = {
    'nbn-train': train.parse_train,
    'nbn-validate': lambda argv: config.read_given(
        validate.ValidateSettings, config.build_parser(validate.ValidateSettings, 'nbn-validate', ''), argv),
    'nbn-export': lambda argv: config.read_given(export.ExportCommand, export.create_parser(), argv),
    'nbn-predict': lambda argv: config.read_given(predict.PredictSettings, predict.create_parser(), argv),
    'nbn-push': lambda argv: config.read_given(push.PushCommand, push.create_parser(), argv),
    'nbn-prepare': lambda argv: prepare._parser().parse_args(argv),
    'nbn-convert': convert.parse_args,
}
SCRIPTS = {'train.py': 'nbn-train', 'validate.py': 'nbn-validate', 'my_train.py': 'nbn-train'}
ELSEWHERE = ('pip', 'pytest', 'ruff', 'mypy', 'mkdocs', 'pre-commit', 'git', 'cd')


class Block(NamedTuple):
    """A Python block, or one command line."""
    page: Path
    line: int
    language: str
    text: str
    not_run: str

    @property
    def file(self) -> str:
        """The path in the comment that a block which is a file begins with."""
        match = re.match(r'# (\S+\.py)\n', self.text)
        return match[1] if match else ''

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def blocks(page: Path) -> Iterator[Block]:
    """The Python blocks and command lines of a page, in their order."""
    language, not_run, start, held = '', '', 0, []
    for number, line in enumerate(page.read_text(encoding='utf-8').splitlines(), 1):
        mark = re.fullmatch(r'<!-- not run: (.+) -->', line)
        if line.startswith('```') and not language:
            language, start, held = line[3:].strip() or 'text', number + 1, []
        elif line.startswith('```'):
            if language == 'python':
                yield Block(page, start, language, '\n'.join(held) + '\n', not_run)
            language, not_run, held = '', '', []
        elif language == 'python':
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
        source = (ROOT / arguments[0]).read_text(encoding='utf-8')
        assert all(flag in source for flag in arguments if flag.startswith('--')), arguments
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
            torch.save({'arch': model, 'state_dict': timm.create_model(model, num_classes=10).state_dict()}, file)


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
    saved = [(registry, dict(registry)) for registry in (LOSSES, SAMPLERS, STAGES)]
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
    known = {'--nproc-per-node', '--help'}
    for parse in PARSE.values():
        with pytest.raises(SystemExit):
            parse(['--help'])
    texts = [capsys.readouterr().out, *(path.read_text() for path in (ROOT / 'benchmarks').glob('*.py'))]
    known |= set(re.findall(r'--[a-z][\w-]*', ' '.join(texts)))
    for page in PAGES:
        if page.stem == 'timm_train':  # flags of timm's scripts
            continue
        for number, line in enumerate(page.read_text(encoding='utf-8').splitlines(), 1):
            for span in re.findall(r'`[^`]+`', line):
                unknown = set(re.findall(r'(?<!\S)`?(--[a-z][\w-]*)', span)) - known
                assert not unknown, f'{page.relative_to(ROOT)}:{number}: no command has {unknown}'


def test_examples_of_contributing_are_all_that_it_takes(tmp_path):
    """Each file of CONTRIBUTING, put into a copy of the package, is found by the commands below it."""
    unneeded = shutil.ignore_patterns('__pycache__', '*.safetensors')
    shutil.copytree(ROOT / 'nbn_timm', tmp_path / 'nbn_timm', ignore=unneeded)
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    found = list(blocks(ROOT / 'CONTRIBUTING.md'))
    for block in found:
        if block.file:
            assert not (tmp_path / block.file).exists(), f'{block}: {block.file} is there already'
            (tmp_path / block.file).write_text(block.text)
    lines = [words for block in found if block.language == 'shell' for words in commands(block, {})]
    calls = [(words[0].removeprefix('nbn-'), words[1:]) for words in lines if words[0].startswith('nbn-')]
    # One process for all, since importing torch takes longer than the rest.
    script = 'import importlib\n' + ''.join(
        f'importlib.import_module("nbn_timm.cli.{command}").main({arguments!r})\n' for command, arguments in calls)
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / 'output').glob('*/test.json'))) == len(calls) > 3
