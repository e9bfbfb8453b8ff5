"""CSV tables as spreadsheets and pandas write them: their columns by name, and the line that a row begins in."""
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbn_timm.errors import InputError, nearest, quoted
from nbn_timm.files import open_regular, write_bytes_atomic

DELIMITERS = (',', ';', '\t', '|')  # Excel writes ';' where ',' is the decimal sign
_SEPARATOR_LINE = 'sep='  # Excel's own line before the header
_LINES_NAMED = 3
_LIKE = 0.6  # 'filename' is like 'file', 'tier' is not


@dataclass(frozen=True)
class Table:
    """Columns of a CSV file.

    Attributes:
        what: The file, in words for people.
        columns: Cells by column, without blanks around them.
        lines: Number of the line that each row ends in, from 1.
        others: The columns that nobody asked for, likewise.
    """

    what: str
    columns: dict[str, list[str]]
    lines: list[int]
    others: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.lines)

    def require(self, column: str, remedy: str) -> None:
        """Refuse blank cells.

        Raises:
            InputError: There is one; the first lines are named.
        """
        blank = [line for line, cell in zip(self.lines, self.columns[column], strict=True) if not cell]
        if blank:
            raise InputError(f'{self.what} has no {column} in {in_lines(blank)}: {remedy}')


def in_lines(lines: Sequence[int]) -> str:
    """Line numbers for a sentence: 'line 3', 'lines 3, 4, 9 and 12 more'."""
    shown = ', '.join(map(str, lines[:_LINES_NAMED]))
    more = f' and {len(lines) - _LINES_NAMED:,} more' if len(lines) > _LINES_NAMED else ''
    return f'line{"s" * (len(lines) > 1)} {shown}{more}'


def read_table(path: str | Path, wanted: Iterable[str], flag_of: Callable[[str], str] | None = None) -> Table:
    """Read some columns of a CSV file with a header.

    The delimiter is that of `DELIMITERS` at which the header falls into the wanted columns. Capitals and blanks in
    column names do not matter. A byte order mark, quotes, line breaks within quotes and empty lines are as in Excel.

    Args:
        path: The file, UTF-8; other bytes are kept as they are, since names of files may have them.
        wanted: Columns.
        flag_of: What names a column, for the sentence; None where nothing does.

    Raises:
        InputError: The file cannot be read, lacks a column, or has a row of another length than its header.
    """
    what, wanted = f'CSV file {quoted(str(path))}', list(wanted)
    text = _decode(_content(path, what), what)
    skipped = 0
    if text[:len(_SEPARATOR_LINE)].lower() == _SEPARATOR_LINE:
        text, skipped = text.partition('\n')[2], 1
    rows = max((_rows(text, delimiter, what) for delimiter in DELIMITERS),
               key=lambda found: (_has(found, wanted), len(found[0][1]) if found else 0))
    if not rows:
        raise InputError(f'{what} is empty: give a header and one picture per line')
    header = rows[0][1]
    places = {column: _place(column, header, what, flag_of) for column in wanted}
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise InputError(f'line {line + skipped} of {what} has {len(row)} fields and the header {len(header)}: '
                             'correct it, and put fields with a delimiter in them in quotes')
    unasked = {name: place for place, name in enumerate(header) if place not in places.values()}
    columns, others = ({name: [row[place] for _, row in rows[1:]] for name, place in chosen.items()}
                       for chosen in (places, unasked))
    return Table(what, columns, [line + skipped for line, _ in rows[1:]], others)


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file that `read_table` reads, whole or not at all.

    Raises:
        InputError: The file system refused.
    """
    text = io.StringIO(newline='')
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes_atomic(path, text.getvalue().encode('utf-8', errors='surrogateescape'))


def _content(path: str | Path, what: str) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise InputError(f'{what} cannot be read ({getattr(error, "strerror", None) or error}): correct the path or '
                         'its permissions') from error


def _decode(content: bytes, what: str) -> str:
    if content[:2] in (b'\xff\xfe', b'\xfe\xff'):
        raise InputError(f'{what} is written in UTF-16: save it as UTF-8 (in Excel: CSV UTF-8)')
    return content.removeprefix(b'\xef\xbb\xbf').decode('utf-8', errors='surrogateescape')


def _rows(text: str, delimiter: str, what: str) -> list[tuple[int, list[str]]]:
    """Rows that are not empty, each with the line that it ends in."""
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter)
    try:
        return [(reader.line_num, cells) for row in reader if any(cells := [cell.strip() for cell in row])]
    except csv.Error as error:
        raise InputError(f'line {reader.line_num} of {what} is no CSV ({error}): save the table as CSV again'
                         ) from error


def _has(rows: list[tuple[int, list[str]]], wanted: Sequence[str]) -> int:
    header = {cell.lower() for cell in rows[0][1]} if rows else set()
    return len(header & {column.strip().lower() for column in wanted})


def _place(column: str, header: Sequence[str], what: str, flag_of: Callable[[str], str] | None) -> int:
    name = column.strip()
    found = [place for place, cell in enumerate(header) if cell == name] or [
        place for place, cell in enumerate(header) if cell.lower() == name.lower()]
    if len(found) == 1:
        return found[0]
    remedy = f'name it with {flag_of(column)}' if flag_of else 'add it'
    if found:
        raise InputError(f'{what} has {len(found)} columns {quoted(name)}: rename all but one')
    there = ', '.join(map(quoted, header[:10])) + (', ...' if len(header) > 10 else '')
    raise InputError(f'{what} has no column {quoted(name)} (there is {there}): {remedy}'
                     f'{nearest(name, header, cutoff=_LIKE)}')
