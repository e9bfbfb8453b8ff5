"""What mkdocs.yml cannot say: pages made from files outside docs/, and one page of the API per room of the package."""
import ast
import re
import sys
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {'index.md': 'README.md', 'contributing.md': 'CONTRIBUTING.md', 'changelog.md': 'CHANGELOG.md'}
COMMANDS = 'cli'  # documented by --help
# Rooms of one module.
SINGLE = ('settings', 'config', 'registry', 'key_values', 'validation', 'errors', 'files', 'computation')

# On GitHub links are relative to the checkout. Folders and files that the site does not have become their text.
INTO_DOCS = re.compile(r'\]\(docs/')
INTO_CONFIGS = re.compile(r'\]\(\.\./configs/')
OUT_OF_DOCS = re.compile(r'\[([^]]+)\]\(\.\./[^)]+\)')
PAGE_OF = {re.compile(rf'\]\((?:\.\./)?{re.escape(source)}'): f']({page}' for page, source in PAGES.items()}

SEVERAL_NAMES = re.compile(r'^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)', re.MULTILINE)


def rooms() -> list[str]:
    """Folders of the package with a public API."""
    folders = sorted(path.parent.name for path in ROOT.glob('nbn_timm/*/__init__.py'))
    return [*SINGLE, *(name for name in folders if name != COMMANDS)]


def api_page(room: str) -> str:
    """The page of a room: what it exports, then everything public in it, one module after the other."""
    if room in SINGLE:
        return f'# nbn_timm.{room}\n\n::: nbn_timm.{room}\n'
    folder = ROOT / 'nbn_timm' / room
    modules = sorted(path.stem for path in folder.glob('*.py') if not path.stem.startswith('_'))
    exports = [ast.literal_eval(node.value) for node in ast.parse((folder / '__init__.py').read_text()).body
               if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__']
    parts = [f'# nbn_timm.{room}', f'::: nbn_timm.{room}\n    options: {{members: false}}']
    if exports:
        names = ', '.join(f'`{name}`' for name in exports[0])
        parts.append(f'Import from `nbn_timm.{room}`: {names}.')
    parts += [f'::: nbn_timm.{room}.{module}\n    options: {{show_root_heading: true}}' for module in modules]
    return '\n\n'.join(parts) + '\n'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The pages of the API, at the end of the navigation."""
    assert config.nav is not None
    config.nav.append({'API': [{f'nbn_timm.{room}': f'api/{room}.md'} for room in rooms()]})
    return config


def flags_page() -> str:
    """The page of all flags of this checkout; torch is imported for it, which a reader of this file need not be."""
    sys.path[:0] = [str(ROOT), str(ROOT / 'docs')]
    import flag_tables
    return flag_tables.flags_page()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/ or is made here."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, 'flags.md', content=flags_page()))
    for room in rooms():
        files.append(File.generated(config, f'api/{room}.md', content=api_page(room)))
    for recipe in sorted((ROOT / 'configs').rglob('*.yaml')):
        files.append(File.generated(config, recipe.relative_to(ROOT).as_posix(), abs_src_path=str(recipe)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the checkout as links of the site."""
    for pattern, target in (PAGE_OF | {INTO_DOCS: '](', INTO_CONFIGS: '](configs/'}).items():
        markdown = pattern.sub(target, markdown)
    return OUT_OF_DOCS.sub(r'\1', markdown)


class SplitNames(Extension):
    """Two arguments in one line of a docstring, `a, b: text`, become two entries with the same text."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = SEVERAL_NAMES.sub(
                lambda match: '\n'.join(f'{match[1]}{name}: {match[3]}' for name in match[2].split(', ')),
                obj.docstring.value)
