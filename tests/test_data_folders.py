"""Class folders: what is a class, what is a picture, and what is told."""
import os
import random

import pytest
from PIL import Image

from nbn_timm.data import DataSettings, create_splits
from nbn_timm.data.folders import find_split_folder, read_class_folders
from nbn_timm.data.pictures import natural_order
from nbn_timm.errors import InputError

pytestmark = pytest.mark.fast


def fill(root, *files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def read(split):
    """{class: files below the split's folder, in the order of the samples}."""
    samples = split.samples
    found = {name: [] for name in split.names}
    for index, label in enumerate(samples.targets.tolist()):
        found[split.names[label]].append(samples.path(index))
    return found


def relative(root, split):
    return {name: [os.path.relpath(file, root) for file in files] for name, files in read(split).items()}


def test_the_first_level_is_the_class_and_all_below_belongs_to_it(tmp_path):
    fill(tmp_path, 'cat/2023/10.png', 'cat/2023/2.png', 'cat/0.png', 'cat/more/again/1.png', 'dog/images/3.png',
         'dog/4.png', 'bird/images/5.png')
    split = read_class_folders(tmp_path)
    assert relative(tmp_path, split) == {
        'bird': ['bird/images/5.png'], 'cat': ['cat/0.png', 'cat/2023/2.png', 'cat/2023/10.png',
                                               'cat/more/again/1.png'],
        'dog': ['dog/4.png', 'dog/images/3.png']}
    assert split.notes == ()


def test_names_that_tie_have_one_order(tmp_path, monkeypatch):
    names = ['7', '07', '007', 'Rosa', 'rosa', 'ROSA', '10', 'tulip', 'a2', 'a10', '\u00b2']
    fill(tmp_path, *(f'{name}/0.png' for name in names))
    right = ('007', '07', '7', '10', 'a2', 'a10', 'ROSA', 'Rosa', 'rosa', 'tulip', '\u00b2')
    assert read_class_folders(tmp_path).names == right
    scandir = os.scandir

    class Shuffled(list):  # another file system's order
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def shuffled(folder):
        with scandir(folder) as entries:
            return Shuffled(random.Random(3).sample(there := list(entries), len(there)))

    monkeypatch.setattr(os, 'scandir', shuffled)
    assert read_class_folders(tmp_path).names == right
    for seed in range(20):
        mixed = random.Random(seed).sample(names, len(names))
        assert tuple(sorted(mixed, key=natural_order)) == right


def test_what_is_no_class_and_no_picture_is_left_out_and_told_once(tmp_path):
    fill(tmp_path, 'cat/0.png', 'cat/.ipynb_checkpoints/0-checkpoint.png', 'cat/._0.png', 'cat/notes.txt', 'cat/b.TXT',
         'dog/1.png', '.ipynb_checkpoints/5.png', '__MACOSX/cat/._0.png', 'collage.png', 'index.csv')
    split = read_class_folders(tmp_path)
    assert relative(tmp_path, split) == {'cat': ['cat/0.png'], 'dog': ['dog/1.png']}
    assert len(split.notes) == 1
    for part in (f"left out of '{tmp_path}'", "4 hidden files or folders", "2 .txt files (such as", "1 .csv file ('",
                 "1 picture beside the class folders ('collage.png')"):
        assert part in split.notes[0]


def test_every_picture_counts_once_and_links_do_not_lead_round(tmp_path):
    root = fill(tmp_path / 'train', 'cat/0.png', 'cat/1.png', 'dog/2.png')
    fill(tmp_path, 'store/3.png', 'store/deep/4.png', 'one/5.png')
    (root / 'ant').symlink_to(tmp_path / 'store')  # a class that lies elsewhere
    (root / 'ant' / 'up').symlink_to(tmp_path / 'store')
    (root / 'cat' / 'again').symlink_to(root / 'dog')  # pictures of dog stay pictures of dog
    (root / 'cat' / 'round').symlink_to(root)
    (root / 'cat' / 'above').symlink_to(tmp_path)
    (root / 'cat' / '0b.png').symlink_to(root / 'cat' / '0.png')
    (root / 'dog' / 'cat.png').symlink_to(root / 'cat' / '1.png')
    (root / 'dog' / 'one.png').symlink_to(tmp_path / 'one' / '5.png')
    (root / 'dog' / 'one more.png').symlink_to(tmp_path / 'one' / '5.png')
    (root / 'dog' / 'gone.png').symlink_to(tmp_path / 'nothing.png')
    (root / 'dog' / 'self.png').symlink_to(root / 'dog' / 'self.png')
    (root / 'self').symlink_to(root)
    split = read_class_folders(root)
    found = relative(root, split)
    assert {name: len(files) for name, files in found.items()} == {'ant': 2, 'cat': 2, 'dog': 2}
    assert found['cat'] == ['cat/0.png', 'cat/1.png'] and found['ant'] == ['ant/3.png', 'ant/deep/4.png']
    for part in ('5 links to a folder', '3 links to a picture', '2 broken links'):
        assert part in split.notes[0]
    assert split.names == ('ant', 'cat', 'dog')


def test_two_classes_that_are_one_folder_are_refused(tmp_path):
    fill(tmp_path, 'cat/0.png', 'dog/1.png')
    (tmp_path / 'kitten').symlink_to(tmp_path / 'cat')
    with pytest.raises(InputError, match="class folders 'cat' and 'kitten' .* are one folder"):
        read_class_folders(tmp_path)


def test_pipes_are_no_pictures(tmp_path):
    fill(tmp_path, 'cat/0.png', 'dog/1.png')
    os.mkfifo(tmp_path / 'dog' / 'x.png')
    split = read_class_folders(tmp_path)
    assert len(split.samples) == 2 and '1 pipe or device' in split.notes[0]


def test_a_class_without_pictures_is_never_dropped_in_silence(tmp_path):
    fill(tmp_path, 'train/cat/0.png', 'train/dog/1.png', 'train/emu/2.heic', 'train/emu/3.heic', 'test/cat/0.png',
         'test/dog/readme.txt')
    with pytest.raises(InputError, match="class folder 'emu' .* has no pictures: .*remove the folder.*2 .heic files"):
        read_class_folders(tmp_path / 'train', training=True)
    split = read_class_folders(tmp_path / 'train')
    assert split.names == ('cat', 'dog', 'emu')
    test = read_class_folders(tmp_path / 'test', split.names)
    assert test.samples.targets.tolist() == [0]
    told = create_splits(DataSettings('folder', str(tmp_path)), ('test',)).notes
    assert "classes without a picture in the test split: 2 of 3 ('dog', 'emu')" in told
    with pytest.raises(InputError, match="'emu'"):
        create_splits(DataSettings('folder', str(tmp_path)))
    assert create_splits(DataSettings('folder', str(tmp_path)), ('test',)).class_counts.counts == (1, 1, 0)


def test_one_class_alone_cannot_be_learned(tmp_path):
    fill(tmp_path, 'train/cat/0.png', 'train/dog/0.png')  # an archive in a folder of its own name
    with pytest.raises(InputError, match="one class folder only, 'train'"):
        read_class_folders(tmp_path, training=True)


@pytest.mark.parametrize('name', ['val', 'valid', 'validation', 'dev'])
def test_split_folders_of_validation(tmp_path, name):
    fill(tmp_path, f'{name}/cat/0.png')
    assert find_split_folder(tmp_path, 'val') == tmp_path / name
    assert find_split_folder(tmp_path, 'test') is find_split_folder(tmp_path, 'train') is None


def test_two_folders_of_one_split_are_refused(tmp_path):
    fill(tmp_path, 'val/cat/0.png', 'dev/cat/0.png')
    with pytest.raises(InputError, match="'val' and 'dev'.*keep one"):
        find_split_folder(tmp_path, 'val')


def test_unreadable_names_are_told_on_one_line(tmp_path):
    name = os.fsdecode(b'caf\xe9\n')
    fill(tmp_path, f'{name}/0.png', 'dog/1.png', f'x{name}.txt')
    split = read_class_folders(tmp_path)
    assert split.names == (name, 'dog')
    assert r"'xcaf\udce9\n.txt'" in split.notes[0] and '\n' not in split.notes[0]
    split.notes[0].encode('utf-8')
    with pytest.raises(InputError, match='caf') as caught:
        read_class_folders(tmp_path, ('dog',))
    assert '\n' not in str(caught.value)


# Tiny-ImageNet as it comes from the archive --------------------------------------------------------------------------

def tiny_imagenet(root):
    fill(root, 'train/n02/images/a_0.JPEG', 'train/n02/images/a_1.JPEG', 'train/n01/images/b_0.JPEG',
         'train/n01/n01_boxes.txt', 'val/images/val_0.JPEG', 'val/images/val_1.JPEG', 'val/images/val_10.JPEG',
         'val/images/val_2.JPEG', 'test/images/test_0.JPEG', 'wnids.txt')
    (root / 'val' / 'val_annotations.txt').write_text(
        'val_0.JPEG\tn02\t0\t0\t62\t62\nval_10.JPEG\tn01\t0\t0\t62\t62\r\nval_1.JPEG\tn01\t0\t0\t62\t62\n')
    return root


def test_tiny_imagenet_is_read_as_it_is_downloaded(tmp_path):
    tiny_imagenet(tmp_path)
    splits = create_splits(DataSettings('folder', str(tmp_path)))
    assert (splits.class_counts.names, splits.class_counts.counts) == (('n01', 'n02'), (1, 2))
    assert [os.path.basename(splits.val.path(index)) for index in range(3)] == [
        'val_0.JPEG', 'val_1.JPEG', 'val_10.JPEG']
    assert splits.val.targets.tolist() == [1, 0, 0]
    assert splits.test is None
    told = ' '.join(splits.notes)
    assert "1 .txt file ('n01_boxes.txt')" in told and 'not in val_annotations.txt are left out: 1' in told
    assert 'have no labels, so they are not scored' in told


def test_tiny_imagenets_val_may_be_sorted_into_folders_already(tmp_path):
    tiny_imagenet(tmp_path)
    for file, name in (('val_0', 'n02'), ('val_1', 'n01'), ('val_10', 'n01'), ('val_2', 'n01')):
        (tmp_path / 'val' / name).mkdir(exist_ok=True)
        os.rename(tmp_path / 'val' / 'images' / f'{file}.JPEG', tmp_path / 'val' / name / f'{file}.JPEG')
    split = read_class_folders(tmp_path / 'val', ('n01', 'n02'))
    assert split.samples.targets.tolist() == [0, 0, 0, 1]


def test_annotations_that_do_not_fit_are_refused(tmp_path):
    tiny_imagenet(tmp_path)
    with pytest.raises(InputError, match="class 'n01' .* not among the 2 classes"):
        read_class_folders(tmp_path / 'val', ('n03', 'n04'))
    with open(tmp_path / 'val' / 'val_annotations.txt', 'a') as file:
        file.write('val_9.JPEG\tn01\t0\n')
    with pytest.raises(InputError, match="'val_9.JPEG', which is not in folder 'images'"):
        read_class_folders(tmp_path / 'val', ('n01', 'n02'))


def test_a_part_of_its_training_classes_takes_their_part_of_val(tmp_path):
    """Cut to some classes, with the archive's file of labels as it was, and pictures of the others there or not."""
    tiny_imagenet(tmp_path)
    (tmp_path / 'val' / 'images' / 'val_1.JPEG').unlink()
    with open(tmp_path / 'val' / 'val_annotations.txt', 'a') as file:
        file.write('val_2.JPEG\tn03\t0\n')
    split = read_class_folders(tmp_path / 'val', ('n02', 'n04'))
    assert relative(tmp_path / 'val', split) == {'n02': ['images/val_0.JPEG'], 'n04': []}
    assert split.notes == (f"3 pictures of '{tmp_path}/val' are left out: they are of 2 classes that the training "
                           'split does not have',)


@pytest.mark.parametrize('files', [('images/0.png', 'images/1.png'), ('0.png', '1.png')])
def test_pictures_without_class_folders_are_refused_where_classes_are_wanted(tmp_path, files):
    fill(tmp_path / 'train', *files)
    with pytest.raises(InputError, match='no images in class folders.*put them as train/<class>/<image>'):
        read_class_folders(tmp_path / 'train', training=True)
    split = read_class_folders(tmp_path / 'train', ('cat', 'dog'))
    assert split.samples is None and 'not scored' in split.notes[-1]


def test_sample_order_is_that_of_before(tmp_path):
    """timm's folder reader sorts by the whole path; a run of before goes on with the same batches."""
    from timm.data import create_reader
    for name in ('cat', 'cat-1', 'dog10', 'dog9'):
        for index in (0, 2, 10):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new('RGB', (2, 2)).save(tmp_path / name / f'{index}.png')
    samples = read_class_folders(tmp_path).samples
    assert [(samples.path(index), label) for index, label in enumerate(samples.targets.tolist())] == \
        create_reader('', root=str(tmp_path)).samples
