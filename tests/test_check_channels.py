"""nbn-check of grey and multispectral pictures: what training would read, its faults and repeats."""
import json
import sys

import numpy as np
import pytest
from PIL import Image

from nbn_timm.cli import check
from nbn_timm.data.dataset import ArraySamples
from nbn_timm.errors import InputError
from nbn_timm.inspection.collection import Collection

pytestmark = pytest.mark.fast


def field(seed, channels=6):
    """uint16 [channels, 24, 20] with large shapes, in a small part of the range, as sensors have them."""
    coarse = np.random.default_rng(seed).integers(500, 6000, (channels, 4, 5))
    return np.kron(coarse, np.ones((1, 6, 4), int)).astype(np.uint16)


@pytest.fixture
def fields(tmp_path):
    """A CSV file of sound pictures of six channels in every form."""
    tifffile = pytest.importorskip('tifffile')
    root = tmp_path / 'fields'
    root.mkdir()
    rows = ['file,label,split']
    for index in range(12):
        name = f'{index}.{("tif", "tiff", "npy")[index % 3]}'
        if name.endswith('npy'):
            np.save(root / name, field(index).transpose(1, 2, 0))
        else:
            tifffile.imwrite(root / name, field(index), photometric='minisblack')
        rows.append(f'{name},{"ab"[index % 2]},{"train" if index < 8 else "test"}')
    (root / 'fields.csv').write_text('\n'.join(rows) + '\n')
    return root


def checked(root, *flags):
    file = root.parent / 'found.json'
    sound = check.main([str(root / 'fields.csv'), '--json', str(file), '--workers', '0', *flags])
    found = json.loads(file.read_text())
    return found, {one['kind']: one for one in found['findings']}, sound


def files(finding):
    return [[picture['file'] for picture in group] for group in finding['pictures']]


def add(root, name, values, label='a', split='train'):
    np.save(root / name, values) if isinstance(values, np.ndarray) else (root / name).write_bytes(values)
    with open(root / 'fields.csv', 'a') as file:
        file.write(f'{name},{label},{split}\n')


def test_sound_pictures_of_six_channels(fields, capsys):
    found, kinds, sound = checked(fields, '--in-chans', '6')
    assert sound and set(kinds) == {'no_validation'}, capsys.readouterr().out
    assert found['files']['formats'] == {'TIFF': 8, 'NumPy': 4} and found['files']['modes'] == {'6 bands': 12}
    assert found['files']['width']['median'] == 20 and found['files']['height']['median'] == 24
    training = np.stack([field(index) for index in range(8)]) / 65535
    np.testing.assert_allclose(found['files']['mean'], training.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found['files']['std'], training.std((0, 2, 3)), rtol=1e-5)
    assert '(--mean of nbn-train)' in capsys.readouterr().out


def test_damaged_ones_repeats_and_blank_ones_are_found(fields, capsys, caplog):
    add(fields, 'five.npy', field(20, channels=5))
    add(fields, 'cut.tif', (fields / '0.tif').read_bytes()[:200])
    add(fields, 'same.npy', field(0), 'b')  # of 0.tif, in another form and class
    add(fields, 'leak.npy', field(1), 'b', 'test')
    dimmed = (field(2) * 0.9).astype(np.uint16)
    add(fields, 'near.npy', dimmed)
    add(fields, 'blank.npy', np.full((6, 24, 20), 700, np.uint16))
    found, kinds, sound = checked(fields, '--in-chans', '6', '--html', str(fields.parent / 'page.html'))
    assert not sound and files(kinds['damaged']) == [['five.npy'], ['cut.tif']]
    assert '5 x 24 x 20' in kinds['damaged']['pictures'][0][0]['fault']
    assert files(kinds['same_two_classes']) == [['0.tif', 'same.npy']]
    assert files(kinds['same_across_splits']) == [['1.tiff', 'leak.npy']]
    assert files(kinds['near_inside_class']) == [['2.npy', 'near.npy']]
    assert files(kinds['one_colour']) == [['blank.npy']] and 'dark' not in kinds
    assert 'five.npy (has the shape 5 x 24 x 20, and --in-chans' in capsys.readouterr().out and not caplog.records
    page = (fields.parent / 'page.html').read_text()
    assert page.count('data:image/png') == 7 and '6 bands' in page


def test_what_would_need_the_flag_is_told(fields, tmp_path):
    found, kinds, sound = checked(fields)
    assert not sound and len(files(kinds['damaged'])) == 4
    assert all('one of more than four channels needs --in-chans' in group[0]['fault']
               for group in kinds['damaged']['pictures'])
    assert len(files(kinds['pages'])) == 8  # Pillow reads the first channel alone


def test_without_tifffile_nothing_is_called_damaged(fields, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    with pytest.raises(InputError, match=r"pip install 'nbn_timm\[multispectral\]'"):
        checked(fields, '--in-chans', '6')
    in_memory = Collection('digits', {'train': ArraySamples(np.zeros((2, 4, 4, 3), np.uint8), [0, 1])}, ('a', 'b'), 2)
    with pytest.raises(InputError, match='the pictures of digits have three channels: leave out --in-chans 6'):
        in_memory.read_as(6)


def test_repeats_are_those_of_the_channels_that_are_read(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    for split in ('train', 'test'):
        for name in 'ab':
            (tmp_path / 'pictures' / split / name).mkdir(parents=True)
            Image.effect_noise((40, 40), 80 if split == name else 60).save(tmp_path / f'pictures/{split}/{name}/0.png')
    picture.save(tmp_path / 'pictures/train/a/colour.png')
    picture.convert('L').save(tmp_path / 'pictures/train/b/grey.png')
    kinds = []
    for flags in ([], ['--in-chans', '1']):
        check.main([str(tmp_path / 'pictures'), '--json', str(tmp_path / 'found.json'), '--workers', '0', *flags])
        kinds.append({one['kind'] for one in json.loads((tmp_path / 'found.json').read_text())['findings']})
    assert 'same_two_classes' in kinds[1] - kinds[0]
