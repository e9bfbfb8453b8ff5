"""nbn-check: every fault of a collection is found once, in words, numbers and a page."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nbn_timm.bars import with_bar_or_lines
from nbn_timm.cli import check
from nbn_timm.cli.train import parse_train
from nbn_timm.data import DataSettings
from nbn_timm.data.classes import look_alikes
from nbn_timm.data.quick_look import quick_look
from nbn_timm.data.tables import read_table
from nbn_timm.datasets import create_splits
from nbn_timm.errors import InputError
from nbn_timm.inspection.facts import facts_of_file, perceptual_hash
from nbn_timm.inspection.repeats import differing_bits, near_pairs

pytestmark = pytest.mark.fast


FIGURES = True

def scene(seed, size=(48, 40)):
    """A picture with large shapes, as photographs have them, unlike those of other seeds."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def save(path, picture, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **more)
    return path


def collection(folder, splits):
    """Scenes as <folder>/<split>/<class>/<number>.png."""
    seed = 0
    for part, counts in splits.items():
        for name, count in counts.items():
            for number in range(count):
                save(folder / part / name / f'{number}.png', scene(seed := seed + 1))
    return folder


@pytest.fixture
def pictures(tmp_path):
    return collection(tmp_path / 'pictures', {
        'train': {'ant': 6, 'bee': 3, 'cow': 1}, 'val': {'ant': 2, 'bee': 2, 'cow': 1},
        'test': {'ant': 2, 'bee': 2, 'cow': 1}})


def checked(folder, *flags):
    """What `--json` says, and whether nothing stops a training."""
    file = folder.parent / 'found.json'
    sound = check.main([str(folder), '-j', '0', '--json', str(file), *flags])
    told = json.loads(file.read_text())
    assert sound is not told['stops']
    return told, {finding['kind']: finding for finding in told['findings']}


def files(finding):
    return [[picture['file'] for picture in group] for group in finding['pictures']]


def test_a_sound_collection(pictures, capsys):
    told, found = checked(pictures)
    assert found.keys() == {'single_pictures'} and found['single_pictures']['names'] == ['cow']
    assert told['splits']['train'] == {'pictures': 10, 'classes': 3, 'largest': 6, 'smallest': 1,
                                       'imbalance_factor': 6.0, 'many': 0, 'medium': 0, 'few': 3}
    assert told['per_class']['bee'] == {'train': 3, 'val': 2, 'test': 2, 'shot': 'few'}
    assert told['files']['formats'] == {'PNG': 20} and told['files']['modes'] == {'RGB': 20}
    assert told['files']['width'] == {'smallest': 48, 'median': 48, 'largest': 48}
    text = capsys.readouterr().out
    assert re.search(r'^train +10 +3 +6 +1 +6 +0/0/3$', text, re.MULTILINE)
    assert re.search(r'^ant +6 +2 +2 +few +#+$', text, re.MULTILINE)
    assert 'Nothing stops a training, nothing to look at.' in text


def test_the_standard_output_may_be_the_file(pictures, capfd):
    assert check.main([str(pictures), '-j', '0', '--json', '/dev/stdout'])
    out, err = capfd.readouterr()
    assert json.loads(out)['splits']['train']['pictures'] == 10
    assert 'ant' in err and err.endswith('written: /dev/stdout\n')


def test_all_damaged_files_at_once(pictures, monkeypatch, capsys):
    whole = (pictures / 'train/ant/0.png').read_bytes()
    (pictures / 'train/ant/cut.png').write_bytes(whole[:len(whole) // 2])
    (pictures / 'train/bee/text.jpg').write_text('no picture')
    (pictures / 'test/bee/empty.png').touch()
    told, found = checked(pictures)
    assert files(found['damaged']) == [['train/ant/cut.png'], ['train/bee/text.jpg'], ['test/bee/empty.png']]
    assert found['damaged']['severity'] == 'stops' and 'no picture' in found['damaged']['pictures'][1][0]['fault']
    text = capsys.readouterr().out
    assert all(name in text for name in ('cut.png (', 'text.jpg (it is no picture', 'empty.png (the file is empty)'))
    assert '1 thing would stop a training' in text
    monkeypatch.setattr('sys.argv', ['nbn-check', str(pictures), '-j', '0'])
    assert check.console() == 1
    (pictures / 'train/ant/cut.png').unlink(), (pictures / 'train/bee/text.jpg').unlink()
    (pictures / 'test/bee/empty.png').unlink()
    assert check.console() == 0
    with pytest.raises(InputError, match='nbn-check DIR names all damaged files at once'):
        (pictures / 'x.png').write_text('')
        create_splits(DataSettings('list', str(pictures), train_list=_list(pictures, 'x.png 0\n')), ('train',)).train[0]


def _list(folder, text):
    (folder / 'list.txt').write_text(text)
    return str(folder / 'list.txt')


def test_repeats_by_content_whatever_the_file(pictures):
    Image.open(pictures / 'train/ant/0.png').save(pictures / 'train/ant/again.bmp')
    shutil.copy(pictures / 'train/ant/1.png', pictures / 'train/bee/other.png')
    shutil.copy(pictures / 'train/bee/0.png', pictures / 'test/bee/leak.png')
    turned = Image.Exif()
    turned[0x0112] = 6
    stored = Image.open(pictures / 'train/bee/1.png').transpose(Image.Transpose.ROTATE_90)
    save(pictures / 'val/bee/turned.png', stored, exif=turned)  # the same picture when it is upright
    _, found = checked(pictures)
    assert files(found['same_inside_class']) == [['train/ant/0.png', 'train/ant/again.bmp']]
    assert files(found['same_two_classes']) == [['train/ant/1.png', 'train/bee/other.png']]
    assert files(found['same_across_splits']) == [['train/bee/0.png', 'test/bee/leak.png'],
                                                  ['train/bee/1.png', 'val/bee/turned.png']]
    assert files(found['turned']) == [['val/bee/turned.png']] and found['turned']['severity'] == 'note'
    assert not [kind for kind in found if kind.startswith('near')]


def test_pictures_that_are_nearly_the_same(pictures, tmp_path):
    first = Image.open(pictures / 'train/ant/0.png')
    save(pictures / 'test/ant/small.jpg', first.resize((40, 34)), quality=60)
    save(pictures / 'train/bee/grey.png', Image.open(pictures / 'train/ant/1.png').convert('L'))
    save(pictures / 'train/ant/bright.png', Image.open(pictures / 'train/ant/2.png').point(lambda v: v * 0.8 + 40))
    for number in range(5):  # pictures of one colour are alike to any hash, and say nothing
        save(pictures / f'val/ant/plain{number}.png', Image.new('RGB', (48, 40), (40 * number, 99, 7)))
    _, found = checked(pictures, '--groups-file', str(tmp_path / 'groups.csv'))
    assert files(found['near_across_splits']) == [['train/ant/0.png', 'test/ant/small.jpg']]
    assert files(found['near_two_classes']) == [['train/ant/1.png', 'train/bee/grey.png']]
    assert files(found['near_inside_class']) == [['train/ant/2.png', 'train/ant/bright.png']]
    assert found['one_colour']['number'] == 5
    groups = read_table(tmp_path / 'groups.csv', ['file', 'group']).columns
    assert groups['file'][:2] == ['train/ant/0.png', 'test/ant/small.jpg'] and groups['group'] == list('001122')
    parse_train(['--dataset', 'folder', '--model', 'resnet20', '--val-fraction', '0.2', '--val-groups', 'groups.csv'])


def test_classes_and_their_folders(pictures):
    (pictures / 'train/dog').mkdir()
    (pictures / 'train/dog/readme.txt').touch()
    save(pictures / 'test/Ant /0.png', scene(100))
    save(pictures / 'test/eel/0.png', scene(101))
    shutil.rmtree(pictures / 'val/bee')
    told, found = checked(pictures)
    assert found['empty_classes']['names'] == ['dog'] and found['empty_classes']['severity'] == 'stops'
    assert found['unknown_classes']['names'] == ['Ant ', 'eel'] and found['unknown_classes']['severity'] == 'stops'
    assert found['alike_names']['names'] == ["'ant' = 'Ant '"]
    assert found['absent_in_val']['names'] == ['bee', 'dog'] and found['absent_in_test']['names'] == ['dog']
    assert any('1 .txt file' in note for note in told['notes'])


def test_odd_pictures(pictures):
    picture = Image.open(pictures / 'train/ant/0.png')
    save(pictures / 'train/ant/tiny.png', picture.resize((9, 9)))
    save(pictures / 'train/ant/night.png', scene(200).point(lambda value: value // 8))
    save(pictures / 'train/ant/strip.png', scene(201, (300, 40)))
    save(pictures / 'train/ant/wrong.jpg', scene(202), format='PNG')
    save(pictures / 'train/ant/phone.jpg', scene(203), format='MPO')
    _, found = checked(pictures)
    assert {kind: files(found[kind]) for kind in ('small', 'dark', 'long', 'misnamed')} == {
        'small': [['train/ant/tiny.png']], 'dark': [['train/ant/night.png']], 'long': [['train/ant/strip.png']],
        'misnamed': [['train/ant/wrong.jpg']]}


def test_class_folders_without_splits_are_checked_and_trained(tmp_path):
    folder = collection(tmp_path, {'plain': {'ant': 3, 'bee': 2}}) / 'plain'
    told, found = checked(folder)
    assert told['splits'].keys() == {'all'} and told['splits']['all']['few'] == 2
    assert 'no test split' in found['no_validation']['what'] and '--val-fraction' in found['no_validation']['remedy']
    splits = create_splits(DataSettings('folder', str(folder)))
    assert splits.classes.counts == (3, 2) and splits.val is splits.test is None
    assert any('all of it is the training split' in note for note in splits.notes)
    # folders of folders may be splits by other names, so they are no classes
    (folder / 'training').mkdir()
    shutil.move(folder / 'ant', folder / 'training/ant')
    for command in (lambda: create_splits(DataSettings('folder', str(folder))), lambda: checked(folder)):
        with pytest.raises(InputError, match='train/<class>/<'):
            command()


def test_the_archive_of_tiny_imagenet_as_it_is(tmp_path):
    folder = collection(tmp_path / 'tiny', {'train': {'n01/images': 3, 'n02/images': 2}})
    for number in range(3):
        save(folder / f'val/images/val_{number}.JPEG', scene(500 + number))
        save(folder / f'test/images/test_{number}.JPEG', scene(600 + number))
    (folder / 'val/val_annotations.txt').write_text(
        ''.join(f'val_{number}.JPEG\t{name}\t0\t0\t9\t9\n' for number, name in enumerate(('n01', 'n02', 'n01'))))
    told, found = checked(folder)
    assert told['per_class'] == {'n01': {'train': 3, 'val': 2, 'shot': 'few'},
                                 'n02': {'train': 2, 'val': 1, 'shot': 'few'}}
    assert found.keys() == {'unlabelled_test'}


def test_names_that_are_no_utf_8(pictures, tmp_path, capsys):
    strange = 'caf\udce9'
    save(pictures / 'train/ant/x.png', scene(700))
    (pictures / 'train/ant/x.png').rename(pictures / f'train/ant/{strange}.png')
    shutil.copy(pictures / f'train/ant/{strange}.png', pictures / 'train/ant/y.png')
    (pictures / 'train/ant/bad\nline.png').touch()
    (pictures / f'train/ant/{strange}2.png').touch()
    checked(pictures, '--html', str(tmp_path / 'page.html'), '--groups-file', str(tmp_path / 'groups.csv'))
    listed = read_table(tmp_path / 'groups.csv', ['file']).columns['file']
    assert sorted(listed) == [f'train/ant/{strange}.png', 'train/ant/y.png']
    assert 'bad\\nline.png' in capsys.readouterr().out


def test_lists_csv_and_benchmarks(pictures, capsys):
    listed = _list(pictures, 'train/ant/0.png 0\ntrain/bee/0.png 1\ntrain/bee/1.png 1\ntrain/bee/7.png 1\n')
    file = pictures / 'found.json'
    assert not check.main([listed, '-j', '0', '--json', str(file)])
    told = json.loads(file.read_text())
    assert told['per_class'] == {'ant': {'train': 1, 'shot': 'few'}, 'bee': {'train': 3, 'shot': 'few'}}
    assert 'missing' in told['findings'][0]['pictures'][0][0]['fault']
    (pictures / 'x.csv').write_text('file,label,split\ntrain/ant/0.png,a,train\ntrain/bee/0.png,b,train\n'
                                    'train/bee/0.png,b,test\n')
    assert check.main([str(pictures / 'x.csv'), '--split-column', 'split', '-j', '0'])
    assert 'The same picture in two splits: once, 2 pictures' in capsys.readouterr().out
    assert check.main(['--dataset', 'digits_lt', '-j', '0'])
    assert '509 pictures' not in capsys.readouterr().err


def test_several_processes_see_what_one_sees(pictures):
    for number in range(60):
        save(pictures / f'train/ant/more{number}.png', scene(1000 + number))
    assert checked(pictures, '-j', '0') == checked(pictures, '-j', '2')


def test_what_cannot_be_checked_is_refused(tmp_path):
    for argv, sentence in (([], 'nothing to look at'), ([str(tmp_path / 'x')], 'there is no file or folder'),
                           ([str(tmp_path)], 'neither class folders'),
                           ([str(tmp_path), '--val-fraction', '0.1'], '--val-fraction is for training'),
                           ([str(tmp_path), '--train-list', 'x'], 'has no effect on --dataset folder')):
        with pytest.raises(InputError, match=sentence):
            check.main(argv)


def test_the_page(pictures, tmp_path):
    (pictures / 'train/ant/<b>.png').write_text('no picture')
    shutil.copy(pictures / 'train/ant/1.png', pictures / 'train/bee/other.png')
    checked(pictures, '--html', str(tmp_path / 'page.html'))
    page = (tmp_path / 'page.html').read_text('utf-8')
    assert 'train/ant/&lt;b&gt;.png' in page and '<b>.png' not in page and '<script' not in page
    assert page.count('data:image/') == 2
    assert 'The same picture under two classes: once, 2 pictures' in page and 'other.png' in page
    assert 'Training pictures per class' in page


def test_the_page_shows_few_pictures_of_what_is_no_fault(tmp_path):
    upright = collection(tmp_path / 'pictures', {'train': {'ant': 5, 'bee': 4}})
    turned = Image.Exif()
    turned[0x0112] = 6
    for path in upright.rglob('*.png'):
        save(path, Image.open(path), exif=turned)
    checked(upright, '--html', str(tmp_path / 'page.html'))
    page = (tmp_path / 'page.html').read_text('utf-8')
    assert page.count('data:image/') == 6 and '3 more, which --json writes in full' in page


# Hashes


def test_the_hash_is_that_of_imagehash(tmp_path):
    imagehash = pytest.importorskip('imagehash')
    for seed in range(20):
        path = save(tmp_path / f'{seed}.png', scene(seed, (50 + seed, 70)))
        assert facts_of_file(str(path)).hash == int(str(imagehash.phash(Image.open(path))), 16)


def test_the_hash_of_a_wave_has_one_frequency():
    wave = np.rint(127 + 100 * np.cos(np.pi * 2 * (2 * np.arange(32) + 1) / 64)).astype(np.uint8)
    assert perceptual_hash(np.tile(wave, (32, 1))) >> 61 & 1  # row 0, column 2, after 62 for column 1


def test_near_pairs_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2 ** 63, 300, np.uint64)
    for number in range(150):
        flips = rng.choice(64, rng.integers(0, 10), replace=False)
        hashes = np.append(hashes, hashes[number] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
                           if len(flips) else hashes[number])
    for bits in (0, 3, 6):
        first, second = np.triu_indices(len(hashes), 1)
        near = differing_bits(hashes[first], hashes[second]) <= bits
        wanted = {(int(a), int(b)) for a, b in zip(first[near], second[near], strict=True)}
        found = {(min(a, b), max(a, b)) for one, other in near_pairs(hashes, bits)
                 for a, b in zip(one.tolist(), other.tolist(), strict=True)}
        assert found == wanted and len(wanted) > 0


def test_differing_bits():
    one, other = np.array([0, 2 ** 64 - 1, 5], np.uint64), np.array([0, 0, 6], np.uint64)
    assert differing_bits(one, other).tolist() == [0, 64, 2]


# Before a training


def test_a_training_looks_at_what_costs_nothing(pictures):
    def notes(**settings):
        return quick_look(create_splits(DataSettings('folder', str(pictures), **settings)))
    assert notes() == []
    shutil.copy(pictures / 'train/bee/0.png', pictures / 'test/bee/leak.png')
    shutil.copy(pictures / 'train/ant/0.png', pictures / 'train/bee/wrong.png')
    assert [note.partition(',')[0] for note in notes()] == [
        'the same picture in two splits: once', 'the same picture under two classes: once']
    assert f"such as '{pictures}/train/bee/0.png' = '{pictures}/test/bee/leak.png', so" in notes()[0]
    listed = DataSettings('list', str(pictures), train_list=_list(pictures, 'train/ant/1.png 0\ntrain/bee/1.png 1\n'),
                          test_list=str(pictures / 'list.txt'))
    assert quick_look(create_splits(listed))[0].startswith(
        "files in train and test alike: 2, such as 'train/ant/1.png'")
    assert look_alikes(['Ant', 'ant ', 'a n-t', 'bee', 'Bée']) == [['Ant', 'ant ', 'a n-t']]


def test_progress_in_a_file_is_lines(monkeypatch, tmp_path):
    times = iter(range(0, 10_000, 16))
    monkeypatch.setattr('nbn_timm.bars.time.monotonic', lambda: next(times))
    with open(tmp_path / 'log', 'w') as stream:
        assert list(with_bar_or_lines(iter(range(5)), 5, 'pictures', stream)) == list(range(5))
    assert Path(tmp_path / 'log').read_text().splitlines() == [
        '2 of 5 pictures, 0 a second, about 48 s left', '4 of 5 pictures, 0 a second, about 16 s left']
