"""The tables of docs/data.md from what the benchmarks declare: `python benchmarks/dataset_tables.py`."""
from pathlib import Path

from nbn_timm.datasets.tables import formats_table, sizes_table, sources_table

PAGE = Path(__file__).parents[1] / 'docs' / 'data.md'
TABLES = {'sizes': sizes_table, 'sources': sources_table, 'formats': formats_table}


def main() -> None:
    page = PAGE.read_text(encoding='utf-8')
    for name, table in TABLES.items():
        begin, end = f'<!-- {name}: made by benchmarks/dataset_tables.py -->\n', f'<!-- end of {name} -->'
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        assert found, name
        page = f'{before}{begin}\n{table()}\n\n{found}{after}'
    PAGE.write_text(page, encoding='utf-8')


if __name__ == '__main__':
    main()
