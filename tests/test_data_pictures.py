"""Picture files: which there are, and their pixels as RGB."""
import os
import socket
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, features

from nbn_timm.data.dataset import ImageSamples, UnlabelledImages
from nbn_timm.data.pictures import find_images, is_picture, picture_extensions, read_picture, to_rgb
from nbn_timm.errors import InputError

pytestmark = pytest.mark.fast

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 16-bit levels that are levels of 8 bits


def save(path, image, **settings):
    image.save(path, **settings)
    return str(path)


def test_formats_are_pillows():
    known = picture_extensions()
    assert known >= {'.jpg', '.jpeg', '.jfif', '.png', '.gif', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm', '.jp2'}
    for extension in ('.txt', '.pdf', '.mpg', '.eps', '.h5', '.svg', ''):
        assert extension not in known
    assert is_picture('a.JPG') and is_picture('a.b.png') and not is_picture('png') and not is_picture('a.png.txt')


@pytest.mark.parametrize('extension', ['png', 'bmp', 'tif', 'gif', 'webp', 'jp2', 'ppm', 'tga'])
def test_formats_are_read(tmp_path, extension):
    if extension == 'webp' and not features.check('webp') or extension == 'jp2' and not features.check('jpg_2000'):
        pytest.skip(f'this Pillow has no {extension}')
    flat = Image.new('RGB', (4, 4), (51, 102, 204))
    lossless = {'lossless': True} if extension == 'webp' else {}
    pixel = read_picture(save(tmp_path / f'x.{extension}', flat, **lossless)).getpixel((1, 1))
    assert np.abs(np.subtract(pixel, (51, 102, 204))).max() <= 3


def test_ordinary_pictures_keep_their_bits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    path = save(tmp_path / 'x.png', Image.fromarray(pixels))
    assert np.array_equal(np.asarray(read_picture(path)), pixels)
    path = save(tmp_path / 'x.jpg', Image.fromarray(pixels))
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(read_picture(path)), np.asarray(image.convert('RGB')))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('extension', ['png', 'tif', 'jpg', 'webp'])
def test_pictures_are_turned_as_a_camera_marked_them(tmp_path, orientation, extension):
    if extension == 'webp' and not features.check('webp'):
        pytest.skip('this Pillow has no webp')
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :, 0], upright[:, :8, 1] = 255, 255  # red above, green to the left
    stored = {  # rows and columns of the stored picture by EXIF's definition of the tag
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: upright.transpose(1, 0, 2)[:, ::-1]}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {'jpg': {'quality': 95, 'subsampling': 0}, 'webp': {'lossless': True}}
    path = save(tmp_path / f'x.{extension}', Image.fromarray(np.ascontiguousarray(stored)), exif=exif,
                **quality.get(extension, {}))
    seen = np.asarray(read_picture(path)).astype(int)
    assert seen.shape == upright.shape and np.abs(seen - upright).max() <= 6
    for samples in (ImageSamples([path], [0]), UnlabelledImages([path])):
        samples.transform = np.asarray
        assert np.array_equal(samples[0][0], seen)


def test_damaged_exif_spoils_no_picture(tmp_path):
    blocks = b'II*\0\xff\xff\xff\xff', b'nonsense', b'MM\0*\0\0\0\x08\0\x01'
    for number, block in enumerate(b'Exif\0\0' + block for block in blocks):
        path = save(tmp_path / f'{number}.jpg', Image.new('RGB', (4, 4), (200, 0, 0)), exif=block)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert read_picture(path).getpixel((0, 0))[0] > 190


# Modes ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode, colour, seen', [
    ('1', 1, (255, 255, 255)),
    ('L', 77, (77, 77, 77)),
    ('LA', (77, 10), (77, 77, 77)),
    ('PA', (3, 10), None),
    ('P', 3, None),
    ('RGBA', (10, 20, 30, 0), (10, 20, 30)),
    ('RGBX', (10, 20, 30, 0), (10, 20, 30)),
    ('CMYK', (0, 0, 0, 0), (255, 255, 255)),
    ('YCbCr', (77, 128, 128), (77, 77, 77)),
    ('HSV', (0, 0, 77), (77, 77, 77)),
    ('LAB', (255, 128, 128), (255, 255, 255)),
    ('I;16', 65535, (255, 255, 255)),
    ('I;16B', 257 * 77, (77, 77, 77)),
])
def test_modes(mode, colour, seen):
    image = Image.new(mode, (3, 2), colour)
    if mode in ('P', 'PA'):
        image.putpalette([0, 0, 0] * 3 + [40, 50, 60])
        seen = (40, 50, 60)
    found = to_rgb(image)
    assert (found.mode, found.size) == ('RGB', (3, 2))
    assert np.abs(np.subtract(found.getpixel((2, 1)), seen)).max() <= 2


@pytest.mark.parametrize('extension', ['png', 'tif', 'pgm'])
def test_grey_of_16_bits_is_scaled(tmp_path, extension):
    seen = np.asarray(read_picture(save(tmp_path / f'x.{extension}', Image.fromarray(RAMP))))
    assert np.array_equal(seen, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))


def tiff(path, bits, photometric, data):
    """A picture of one row and two columns, grey, little-endian, uncompressed."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1),
            (279, len(data))]
    content = b'II*\0' + struct.pack('<I', 8 + len(data) + len(data) % 2) + data + b'\0' * (len(data) % 2)
    content += struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(content + b'\0\0\0\0')
    return str(path)


def test_grey_of_12_bits_and_inverted_grey(tmp_path):
    path = tiff(tmp_path / '12.tif', 12, 1, b'\xff\xf8\x00')  # 4095 and 2048
    assert [read_picture(path).getpixel((x, 0))[0] for x in (0, 1)] == [255, 128]
    path = tiff(tmp_path / 'inverted.tif', 16, 0, struct.pack('<2H', 65535, 0))
    assert [read_picture(path).getpixel((x, 0))[0] for x in (0, 1)] == [0, 255]


@pytest.mark.parametrize('mode', ['I', 'F'])
def test_values_without_a_range_are_refused_by_name_and_mode(tmp_path, mode):
    path = save(tmp_path / 'x.tif', Image.new(mode, (3, 2), 1))
    with pytest.raises(InputError, match=f"x.tif' has 32-bit values .mode '{mode}'.*8 or 16 bits"):
        read_picture(path)


def test_transparency_does_not_warn(tmp_path):
    image = Image.new('P', (2, 2), 3)
    image.putpalette([0, 0, 0] * 3 + [40, 50, 60])
    path = save(tmp_path / 'x.png', image, transparency=b'\xff\xff\xff\x10')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_picture(path).getpixel((0, 0)) == (40, 50, 60)


# What is no picture -------------------------------------------------------------------------------------------------

def test_pipes_sockets_and_folders_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'folder.png').mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # names of sockets are short
        server.bind('socket.png')
        os.chdir(here)
        for name in ('pipe.png', 'folder.png', 'socket.png'):
            with pytest.raises(InputError, match=f"{name}' cannot be read"):
                read_picture(str(tmp_path / name))


def test_any_fault_of_a_reader_is_a_fault_of_the_file(tmp_path, monkeypatch):
    path = save(tmp_path / 'x.png', Image.new('RGB', (2, 2)))

    def fail(*_):
        raise struct.error('unpack requires a buffer\nof 4 bytes')

    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(InputError, match=r'cannot be read \(unpack requires a buffer of 4 bytes\): replace'):
        read_picture(path)


def test_searches_tell_extensions_and_numbers(tmp_path):
    for name in ('a.png', 'b.heic', 'c.HEIC', 'd.txt', '.thumb.png', '__MACOSX/a.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path])
    assert found.files == (str(tmp_path / 'a.png'),)
    assert found.notes[0].startswith(f"left out of '{tmp_path}': ")
    for part in ("2 .heic files (such as 'b.heic')", "1 .txt file ('d.txt')", '2 hidden'):
        assert part in found.notes[0]
