"""The room of HTML pages: what is escaped, what is shown how, and that pages fetch nothing."""
import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

from nbn_timm.pages import Card, Table, figure_svg, page, render, thumbnail, write_page
from nbn_timm.pages.figures import SERIES

pytestmark = pytest.mark.fast
FIGURES = True


@pytest.fixture
def templates(monkeypatch):
    """Lets a test write templates of its own beside those of the room."""
    from jinja2 import ChoiceLoader, DictLoader
    texts = {}
    environment = page._environment()
    monkeypatch.setattr(environment, 'loader', ChoiceLoader([DictLoader(texts), environment.loader]))
    return texts


def _parts(templates, macro, value):
    templates[f'{macro}.html'] = f"{{% import 'parts.html' as parts %}}{{{{ parts.{macro}(value) }}}}"
    return render(f'{macro}.html', value=value)


def test_a_page_is_one_document_that_may_fetch_nothing(templates, tmp_path):
    templates['x.html'] = ("{% extends 'base.html' %}{% block title %}{{ name }}{% endblock %}"
                           "{% block content %}<h1>{{ name }}</h1>{% endblock %}")
    write_page(tmp_path / 'x.html', 'x.html', name='<b>&"cats"')
    text = (tmp_path / 'x.html').read_text('utf-8')
    assert '<title>&lt;b&gt;&amp;&#34;cats&#34;</title>' in text and '<h1>&lt;b&gt;' in text
    assert "default-src 'none'" in text and 'viewport' in text and 'prefers-color-scheme: dark' in text
    assert '<script' not in text and not re.search(r'(src|href)="(?!data:)', text)
    assert not re.search(r'url\((?!#)|@import', text)


def test_a_forgotten_value_is_an_error_and_a_name_without_letters_none(templates):
    templates['x.html'] = '{{ name }}'
    with pytest.raises(UndefinedError):
        render('x.html')
    assert render('x.html', name='a\udcff') == 'a\\udcff'


def test_cells_of_tables(templates):
    rows = [['<i>cat</i>', 1234, 12.345, None, True], [Markup('<i>dog</i>'), None, None, None, False]]
    html = _parts(templates, 'table', Table(['name', 'images', 'accuracy', 'nothing', 'known'], rows))
    assert re.findall(r'<td[^>]*>(.*?)</td>', html) == [
        '&lt;i&gt;cat&lt;/i&gt;', '1,234', '12.35', '–', 'yes', '<i>dog</i>', '–', '–', '–', 'no']
    assert re.findall(r'<th( class="num")?>', html) == ['', ' class="num"', ' class="num"', '', '']


def test_cards_and_pictures(templates):
    html = _parts(templates, 'cards', [Card('top-1', 56.789, 'of all'), Card('classes', 100)])
    assert '<b>56.79</b><small>of all</small>' in html and '<b>100</b></div>' in html
    html = _parts(templates, 'pictures', [SimpleNamespace(uri='data:x', alt='"a" cat', lines=['cat', 'dog 99 %'])])
    assert 'alt="&#34;a&#34; cat"' in html and '<b>cat</b><br>dog 99 %' in html


def test_a_figure_takes_the_colours_of_the_page():
    pytest.importorskip('matplotlib')

    def draw(figure):
        axes = figure.add_subplot()
        axes.plot([1, 2], [3, 4], label='$5 < 汉')
        axes.legend()
        axes.set_title('<b>')

    svg = figure_svg(draw, 'say "a"')
    assert svg.startswith('<svg role="img" aria-label="say &#34;a&#34;"') and svg.rstrip().endswith('</svg>')
    assert 'stroke: var(--series-1)' in svg and 'fill: var(--ink)' in svg and SERIES[0] not in svg
    assert '$5 &lt; 汉' in svg and '&lt;b&gt;' in svg
    head = svg[:svg.index('>')]
    assert ' width=' not in head and ' height=' not in head and 'viewBox' in head and '<style' not in svg
    assert figure_svg(draw, 'say "a"') == svg
    ids = re.findall(r'id="([^"]*)"', svg)
    assert not set(ids) & set(re.findall(r'id="([^"]*)"', figure_svg(draw, 'another')))


def test_without_matplotlib_there_is_no_figure(monkeypatch):
    monkeypatch.setattr('nbn_timm.pages.figures.importlib.util.find_spec', lambda name: None)
    assert figure_svg(lambda figure: None, 'x') is None


def _opened(uri):
    mime, data = uri.removeprefix('data:image/').split(';base64,')
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format.lower() == mime
    return image


def test_thumbnails():
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    assert (np.asarray(_opened(thumbnail(small))) == np.asarray(small)).all()
    assert _opened(thumbnail(Image.new('RGB', (400, 200)))).size == (96, 48)
    clear = _opened(thumbnail(Image.new('RGBA', (100, 100), (255, 0, 0, 0))))
    assert clear.getpixel((5, 5)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert [_opened(thumbnail(deep)).getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
    assert _opened(thumbnail(Image.new('P', (9, 9)))).mode == 'RGB'
