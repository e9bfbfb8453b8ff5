"""HTML pages of one file each: no script, nothing fetched, readable on a phone and a desk, in light and dark."""
from nbn_timm.pages.figures import can_draw, figure_svg, how_to_draw, matrix
from nbn_timm.pages.page import Card, Number, Table, render, write_page
from nbn_timm.pages.thumbnails import thumbnail

__all__ = ['Card', 'Number', 'Table', 'can_draw', 'figure_svg', 'how_to_draw', 'matrix', 'render', 'thumbnail',
           'write_page']
