"""Small pictures and their list, for tests that need files."""
from pathlib import Path

import numpy as np
from PIL import Image


def write_test_list(folder: Path, count: int, num_classes: int = 6) -> None:
    """`images/<index>.png`, noise of 16 x 20 pixels, and `test.txt` that labels them in turns."""
    rng = np.random.default_rng(0)
    (folder / 'images').mkdir()
    lines = []
    for index in range(count):
        name = f'images/{index}.png'
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(folder / name)
        lines.append(f'{name} {index % num_classes}\n')
    (folder / 'test.txt').write_text(''.join(lines))
