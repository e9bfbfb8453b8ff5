"""Small pictures that travel inside a page."""
import base64
import io

import numpy as np
from PIL import Image

_SMALL = 48  # up to here a PNG is as small as a JPEG, and exact


def thumbnail(image: Image.Image, size: int = 96) -> str:
    """The image as a data URI, shrunk to `size` pixels at its longer side, never enlarged.

    Transparent parts become white. A few kilobytes: PNG where it is tiny, else JPEG.
    """
    small = image.copy()
    small.thumbnail((size, size))
    if small.mode in ('RGBA', 'LA', 'PA') or 'transparency' in small.info:
        layer = small.convert('RGBA')
        small = Image.new('RGBA', layer.size, 'white')
        small.alpha_composite(layer)
    elif small.mode.startswith(('I', 'F')):
        values = np.asarray(small, np.float64)
        small = Image.fromarray(np.uint8((values - values.min()) * (255 / max(np.ptp(values), 1e-12))))
    small = small.convert('RGB')
    kind, mime = ('PNG', 'png') if max(small.size) <= _SMALL else ('JPEG', 'jpeg')
    file = io.BytesIO()
    small.save(file, kind, **({'optimize': True} if kind == 'PNG' else {'quality': 80}))
    return f'data:image/{mime};base64,{base64.b64encode(file.getvalue()).decode()}'
