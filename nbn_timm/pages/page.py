"""Pages from the templates of this room, and the values that their macros show."""
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from nbn_timm.files import write_text_atomic

_NOTHING = '–'


@dataclass(frozen=True)
class Card:
    """A number that stands out, with what it is of and a line below it."""

    label: str
    value: Any
    note: str = ''


class Number(NamedTuple):
    """A number in a table with digits of its own."""

    value: float
    decimals: int = 2
    signed: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under column titles.

    A cell that is a float is shown with `decimals` digits, a `Number` with its own, an int with separators, None as a
    dash; numbers stand on the right. A `markupsafe.Markup` is shown as HTML, any other text as it stands.

    Attributes:
        columns: Titles.
        rows: One cell per column each.
        decimals: Digits after the point of floats.
        tall: The table is long, and scrolls inside a frame of its own.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    decimals: int = 2
    tall: bool = field(default=False, kw_only=True)

    @property
    def numeric(self) -> list[bool]:
        """Per column whether it holds numbers."""
        return [any(_is_number(row[column]) for row in self.rows) for column in range(len(self.columns))]


def render(template: str, **context: Any) -> str:
    """The page of a template in `pages/templates`; text is escaped, `Markup` is not.

    A template extends 'base.html' and fills `title` and `content`; 'parts.html' has macros for cards, tables, figures
    and pictures.
    """
    text = _environment().get_template(template).render(**context)
    return text.encode('utf-8', 'backslashreplace').decode('utf-8')  # file names may hold what no UTF-8 is


def write_page(path: str | Path, template: str, **context: Any) -> None:
    """Render a page and write it, whole or not at all.

    Raises:
        InputError: The file system refused.
    """
    write_text_atomic(path, render(template, **context))


def cell(value: Any, decimals: int = 2) -> Any:
    """A value as a table or a card shows it."""
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, Number):
        return f'{value.value:{"+" if value.signed else ""},.{value.decimals}f}'
    if isinstance(value, float):
        return f'{value:,.{decimals}f}'
    return f'{value:,}' if isinstance(value, int) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Number) and not isinstance(value, bool)


@cache
def _environment() -> Environment:
    environment = Environment(loader=PackageLoader('nbn_timm.pages'), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters['cell'] = cell
    return environment
