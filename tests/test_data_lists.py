"""List files, class folders and images in files."""
import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from nbn_timm.data.dataset import ArraySamples, ImageSamples
from nbn_timm.data.folders import find_split_folder, read_class_folders
from nbn_timm.data.lists import read_image_list
from nbn_timm.errors import InputError

pytestmark = pytest.mark.fast


def write_image(path, color=(0, 0, 0), size=(8, 6), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def write_list(path, text):
    path.write_bytes(text.encode())
    return path


def test_list_paths_may_hold_spaces_and_lines_may_be_empty(tmp_path):
    path = write_list(tmp_path / 'list.txt', 'a/b c.jpg 0\r\n\n  \nd\u2028e\x0c.jpg\t12\nf 1')
    rows = read_image_list(path)
    assert rows.paths == ['a/b c.jpg', 'd\u2028e\x0c.jpg', 'f']
    assert rows.targets.tolist() == [0, 12, 1]
    assert rows.targets.dtype == np.int64


@pytest.mark.parametrize('text, message', [
    ('', 'names no image'),
    (' \n\n', 'names no image'),
    ('a 0\n\nb\nc 1', "line 3 .*'b'"),
    ('a 0\nb one', "line 2 .*'b one'"),
    ('a 0\nb 1.5', "line 2 .*'b 1.5'"),
    ('a 0\nb 99999999999999999999', 'line 2 '),
    ('a 0\n\nb -1', r'label -1 in line 3 .*\(0 to 4\)'),
    ('a 5\nb 0', r'label 5 in line 1 .*\(0 to 4\)'),
])
def test_list_errors_name_file_and_line(tmp_path, text, message):
    path = write_list(tmp_path / 'train.txt', text)
    with pytest.raises(InputError, match=message) as caught:
        read_image_list(path, num_classes=5)
    assert str(path) in str(caught.value)
    assert '\n' not in str(caught.value)


def test_negative_label_is_refused_without_a_class_number(tmp_path):
    with pytest.raises(InputError, match='label -2 in line 1'):
        read_image_list(write_list(tmp_path / 'list.txt', 'a -2'))


def test_missing_list_names_the_remedy(tmp_path):
    with pytest.raises(InputError, match='nbn-prepare'):
        read_image_list(tmp_path / 'absent.txt')


def test_byte_order_mark_and_tabs(tmp_path):
    path = tmp_path / 'list.txt'
    path.write_bytes(b'\xef\xbb\xbfa b.jpg\t1\r\nc.jpg \t 0\r\n')
    rows = read_image_list(path)
    assert (rows.paths, rows.targets.tolist(), rows.notes) == (['a b.jpg', 'c.jpg'], [1, 0], ())
    path.write_bytes('a.jpg 1\n'.encode('utf-16'))
    with pytest.raises(InputError, match='list.txt.*UTF-16: save it as UTF-8'):
        read_image_list(path)


def test_labels_that_begin_at_1_are_told_or_refused(tmp_path):
    path = write_list(tmp_path / 'list.txt', 'a 1\nb 2\nc 3\nd 3')
    assert re.search('labels of list file .*list.txt. are 1 to 3.*subtract 1', read_image_list(path).notes[0])
    with pytest.raises(InputError, match='labels of list file .*list.txt. begin at 1.* 0 to 2: subtract 1'):
        read_image_list(path, num_classes=3)
    assert read_image_list(path, num_classes=4).notes == ()  # a class without images
    assert read_image_list(write_list(path, 'a 1\nb 3')).notes == ()
    assert read_image_list(write_list(path, 'a 1\nb 0')).notes == ()


def test_a_picture_under_two_labels_is_told_by_name(tmp_path):
    path = write_list(tmp_path / 'list.txt', 'a 0\nb 1\na 0\nb 0\nc 1\nc 0')
    note, = read_image_list(path).notes
    assert "'b' under label 1 and under label 0 (and 1 more" in note and 'list.txt' in note


@pytest.mark.parametrize('label', ['10000000', '1000000'])
def test_ids_are_no_labels(tmp_path, label):
    with pytest.raises(InputError, match=f'label {label} of line 2 of list file .*looks like an id'):
        read_image_list(write_list(tmp_path / 'list.txt', f'a 0\nb {label}'))


@pytest.mark.parametrize('label', ['1_0', '\u0661', '0x1', '1.0', '--1', '9' * 5000])
def test_labels_are_plain_digits(tmp_path, label):
    with pytest.raises(InputError, match='line 2 of list file'):
        read_image_list(write_list(tmp_path / 'list.txt', f'a 0\nb {label}'))


def test_pipes_are_no_lists(tmp_path):
    os.mkfifo(tmp_path / 'list.txt')
    for path in (tmp_path / 'list.txt', tmp_path):
        with pytest.raises(InputError, match='cannot be read'):
            read_image_list(path)


def test_one_long_path_does_not_make_all_long():
    paths = ['x' * 100_000 + '.png', *(f'{index}.png' for index in range(20_000))]
    samples = ImageSamples(paths, np.arange(len(paths)) % 7, root='root')
    held = pickle.dumps(samples)
    assert len(held) < 1_000_000  # an array of strings would be 2 GB
    for copy in (samples, pickle.loads(held), samples.select(range(len(paths)))):
        assert copy.path(0) == 'root/' + paths[0] and copy.path(1) == 'root/0.png'
        assert copy.path(20_000) == copy.path(-1) == 'root/19999.png'
    part = samples.select([3, -1, 0])
    assert [part.path(index) for index in range(3)] == ['root/2.png', 'root/19999.png', 'root/' + paths[0]]
    with pytest.raises(IndexError):
        samples.path(20_001)


def test_image_samples_read_what_was_written(tmp_path):
    write_image(tmp_path / 'red one.png', (255, 0, 0))
    write_image(tmp_path / 'grey.png', 7, mode='L')
    samples = ImageSamples(['red one.png', str(tmp_path / 'grey.png')], [1, 0], root=tmp_path)
    (red, label), (grey, _) = samples[0], samples[1]
    assert (red.mode, red.size, red.getpixel((0, 0)), label) == ('RGB', (8, 6), (255, 0, 0), 1)
    assert grey.getpixel((0, 0)) == (7, 7, 7)
    assert [part[1] for part in samples.select([1, 0, 0])] == [0, 1, 1]
    assert samples.select(np.array([1])).path(0) == str(tmp_path / 'grey.png')
    samples.transform = lambda image: image.size
    assert samples[0] == ((8, 6), 1)
    assert samples.select([0])[0] == ((8, 6), 1)


def test_undecodable_file_names_survive(tmp_path):
    name = os.fsdecode(b'caf\xe9.png')
    with open(os.path.join(os.fsencode(tmp_path), os.fsencode(name)), 'wb') as file:
        Image.new('RGB', (2, 2)).save(file, 'png')
    (tmp_path / 'list.txt').write_bytes(b'caf\xe9.png 0\n')
    rows = read_image_list(tmp_path / 'list.txt')
    assert ImageSamples(rows.paths, rows.targets, root=tmp_path)[0][0].size == (2, 2)


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
def test_truncated_image_is_an_error(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f'whole.{suffix}'
    Image.fromarray(noise).save(path)
    samples = ImageSamples([path.name], [0], root=tmp_path)
    assert samples[0][0].size == (64, 64)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(InputError, match=f'whole.{suffix}.*cannot be read.*replace the file'):
        samples[0]


@pytest.mark.parametrize('content', [b'', b'no image at all'])
def test_file_that_is_no_image_is_an_error(tmp_path, content):
    (tmp_path / 'x.jpg').write_bytes(content)
    with pytest.raises(InputError, match='x.jpg.*cannot be read'):
        ImageSamples(['x.jpg'], [0], root=tmp_path)[0]


def test_missing_image_is_an_error_and_never_its_neighbour(tmp_path):
    write_image(tmp_path / 'there.png')
    samples = ImageSamples(['there.png', 'gone.png'], [0, 1], root=tmp_path)
    with pytest.raises(InputError, match='gone.png.*is missing.*--data-dir'):
        samples[1]


def test_labels_and_images_must_match():
    with pytest.raises(InputError, match='2 image paths have 1 labels'):
        ImageSamples(['a', 'b'], [0])
    for images in (np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 4, 4), np.uint8), np.zeros((3, 4, 4, 3), np.uint8)):
        with pytest.raises(InputError, match=r'uint8 \[N, H, W, 3\]'):
            ArraySamples(images, [0, 1])


def test_array_samples_select():
    images = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    part = ArraySamples(images, [4, 5, 6]).select([2, 0])
    assert part.targets.tolist() == [6, 4]
    assert np.array_equal(np.asarray(part[0][0]), images[2])


def test_class_folders_agree_with_torchvision(tmp_path):
    for name in ('cat', 'ant', 'dog'):
        for index in range(3):
            write_image(tmp_path / 'train' / name / f'{index}.png')
    split = read_class_folders(tmp_path / 'train')
    samples, names = split.samples, split.names
    expected = ImageFolder(str(tmp_path / 'train'))
    assert list(names) == expected.classes
    assert [(samples.path(index), label) for index, label in enumerate(samples.targets.tolist())] == expected.samples


def test_evaluation_folders_take_the_labels_of_training(tmp_path):
    for part, names in dict(train=('ant', 'bee', 'cat'), validation=('cat', 'ant')).items():
        for name in names:
            write_image(tmp_path / part / name / 'x.png')
    assert find_split_folder(tmp_path, 'val') == tmp_path / 'validation'
    assert find_split_folder(tmp_path, 'test') is None
    names = read_class_folders(tmp_path / 'train').names
    split = read_class_folders(tmp_path / 'validation', names)
    samples = split.samples
    assert split.names == names
    assert {os.path.basename(os.path.dirname(samples.path(i))): int(samples.targets[i]) for i in range(2)} == {
        'ant': 0, 'cat': 2}
    write_image(tmp_path / 'validation' / 'emu' / 'x.png')
    with pytest.raises(InputError, match="'emu'.*not among the 3 classes"):
        read_class_folders(tmp_path / 'validation', names)


def test_empty_class_folder_is_an_error(tmp_path):
    (tmp_path / 'train' / 'ant').mkdir(parents=True)
    with pytest.raises(InputError, match='has no images'):
        read_class_folders(tmp_path / 'train')
