"""`--dataset csv`: delimiters, encodings, labels, splits, and the line of what is wrong."""
import numpy as np
import pytest
from PIL import Image

from nbn_timm.data import DataSettings
from nbn_timm.data.splits import Known
from nbn_timm.data.tables import read_table
from nbn_timm.datasets import create_splits, has_validation
from nbn_timm.errors import InputError

pytestmark = pytest.mark.fast


@pytest.fixture
def pictures(tmp_path):
    """`0.png` to `5.png`, and one whose name has blanks, a comma and a letter beyond ASCII."""
    for name in [*(f'{number}.png' for number in range(6)), 'a, grün.png']:
        Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(tmp_path / name)
    return tmp_path


def read(folder, text, parts=('train',), encoding='utf-8', **settings):
    (folder / 'train.csv').write_bytes(text.encode(encoding))
    data = DataSettings('csv', **{'data_dir': str(folder), 'train_csv': str(folder / 'train.csv'), **settings})
    return create_splits(data, parts)


def labelled(splits, part='train'):
    """(file name, class name) of all pictures."""
    images = getattr(splits, part)
    return [(images.path(index).rpartition('/')[2], splits.classes.names[images.targets[index]])
            for index in range(len(images))]


@pytest.mark.parametrize('text', [
    'file,label\n0.png,cat\n"a, grün.png",dog\n',
    'sep=;\nfile;label\n0.png;cat\na, grün.png;dog\n',  # Excel's, where the decimal sign is a comma
    'file;label\r\n0.png;cat\r\n\r\na, grün.png;dog',
    'id\tLabel\tFile \n1\tcat\t0.png\n2\tdog\ta, grün.png\n',
    'note,file,label\n"two\nlines, and ""quotes""",0.png,cat\n,"a, grün.png", dog \n',
])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
def test_tables_as_programs_write_them(pictures, text, encoding):
    splits = read(pictures, text, encoding=encoding)
    assert labelled(splits) == [('0.png', 'cat'), ('a, grün.png', 'dog')]
    assert splits.classes.counts == (1, 1)
    image, label = splits.train[1]
    assert image.size == (4, 4) and label == 1


def test_labels_may_be_numbers_which_name_the_classes_in_their_order(pictures):
    splits = read(pictures, 'file,label\n0.png,10\n1.png,2\n2.png,2\n3.png,0\n')
    assert splits.classes.names == ('0', '2', '10')
    assert splits.train.targets.tolist() == [2, 1, 1, 0]


def test_other_columns_and_a_split_column(pictures):
    text = 'image,kind,part\n0.png,cat,train\n1.png,dog,Train\n2.png,dog,valid\n3.png,cat,test\n'
    settings = dict(file_column='image', label_column='kind', split_column='part')
    splits = read(pictures, text, ('train', 'val', 'test'), **settings)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [2, 1, 1]
    assert labelled(splits, 'val') == [('2.png', 'dog')] and labelled(splits, 'test') == [('3.png', 'cat')]
    with pytest.raises(InputError, match="line 2 of .* has the split 'exam': write train, val, valid"):
        read(pictures, text.replace('train', 'exam', 1), **settings)
    with pytest.raises(InputError, match='pictures of the val split, and so has --val-csv'):
        read(pictures, text, ('train', 'val'), val_csv='train.csv', **settings)


ALL = 'file,label,{name}\n0.png,cat,{0}\n1.png,dog,{0}\n2.png,dog,{1}\n3.png,cat,{2}\n'


@pytest.mark.parametrize('name', ['split', 'Set', 'x'])
def test_a_column_that_can_only_be_the_splits_is_taken_for_it(pictures, name):
    text = ALL.format('train', 'Valid', 'test', name=name)
    splits = read(pictures, text, ('train', 'val', 'test'))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [2, 1, 1]
    assert sum(f"the column '{name}'" in note and '2 train, 1 val, 1 test' in note for note in splits.notes) == 1
    assert has_validation(DataSettings('csv', train_csv='train.csv')) is None  # so --val-fraction looks first
    splits = read(pictures, text, split_column='none')
    assert len(splits.train) == 4 and splits.val is None and splits.test is None


@pytest.mark.parametrize(('text', 'sentence'), [
    (ALL.format('training', 'valid', 'testing', name='split'), "column 'split' .* of which split.*'training', 'valid'"),
    (ALL.format('False', 'False', 'True', name='is_valid'), "column 'is_valid' .* --split-column none"),
    (ALL.format('train,train', 'val,train', 'test,test', name='split,set'), "columns 'split' and 'set' of splits:"),
    (ALL.format('0', '0', '1', name='isTest'), "column 'isTest' .* of which split"),
    (ALL.format('1', '1', '0', name='is_training_image'), "column 'is_training_image' .* of which split"),
    (ALL.format('0', '0', '1', name='held_out'), "column 'held_out' .* of which split"),
    (ALL.format('0', '1', '2', name='partition'), "column 'partition' .* of which split.*'0', '1', '2'"),
    (ALL.format('1.0', '1.0', '2.0', name='Split'), "column 'Split' .* of which split"),
    (ALL.format('train', '', 'test', name='dataset'), "column 'dataset' .* of which split.*'train', '', 'test'"),
    (ALL.format('training', 'training', 'holdout', name='data'), "column 'data' .* of which split"),
    (ALL.format('test', 'test', 'test', name='split'), "no row of .* is of the split train"),
])
def test_a_column_that_may_be_the_splits_is_refused(pictures, text, sentence):
    with pytest.raises(InputError, match=sentence):
        read(pictures, text)
    assert len(read(pictures, text, split_column='none').train) == 4


def test_a_column_of_groups_can_be_the_splits_too(pictures):
    splits = read(pictures, ALL.format('train', 'train', 'test', name='split'), ('train', 'test'), group_column='split')
    assert len(splits.train) == 3 and len(splits.test) == 1


@pytest.mark.parametrize('column', ['fold\n0', 'weight\n1', 'note\ntest', 'set\nmini', 'isBest\n1',
                                    'kind\nvalue', 'from\ndevice'])
def test_other_columns_are_left_alone(pictures, column):
    name, cell = column.split('\n')
    assert len(read(pictures, ALL.format(cell, cell, f'{cell}7', name=name)).train) == 4


def test_a_file_of_all_splits_is_no_test_file(pictures):
    (pictures / 'test.csv').write_text(ALL.format('train', 'val', 'test', name='split'))
    with pytest.raises(InputError, match="as --test-csv, and its column 'split' has 'train', 'val', 'test': give"):
        read(pictures, 'file,label\n0.png,cat\n1.png,dog\n', ('train', 'test'), test_csv='test.csv')
    splits = read(pictures, 'file,label\n0.png,cat\n1.png,dog\n', ('train', 'test'), test_csv='test.csv',
                  split_column='none')
    assert len(splits.test) == 4


def test_files_of_their_own_for_the_splits_and_no_data_folder(pictures):
    (pictures / 'val.csv').write_text('file,label\n2.png,dog\n')
    splits = read(pictures, 'file,label\n0.png,cat\n1.png,dog\n', ('train', 'val'), data_dir=None,
                  val_csv=str(pictures / 'val.csv'))
    assert labelled(splits, 'val') == [('2.png', 'dog')]
    (pictures / 'val.csv').write_text('file,label\n2.png,dog\n3.png,dgo\n')
    with pytest.raises(InputError, match="label 'dgo' in line 3 of .*val.csv.* did you mean 'dog'"):
        read(pictures, 'file,label\n0.png,cat\n1.png,dog\n', ('train', 'val'), val_csv='val.csv')


@pytest.mark.parametrize(('text', 'sentence'), [
    ('file,label\n0.png,cat\n1.png,\n2.png, \n', r"has no label in lines 3, 4: label the picture"),
    ('file,label\n0.png,cat\n,dog\n', r'has no file in line 3: name the picture'),
    ('file,label\n0.png,cat\nx/7.png,dog\n8.png,dog\n', r"'x/7.png' of .* is not in .* missing in lines 3, 4"),
    ('file,label\n0.png,cat\n1.png,dog,3\n', r'line 3 of .* has 3 fields and the header 2'),
    ('bild;tier;fold\n0.png;cat;train\n', r"no column 'file' \(there is 'bild', 'tier', 'fold'\): name it with "
                                          '--file-column$'),
    ('filename,label\n0.png,cat\n', r"no column 'file' .* --file-column; did you mean 'filename'\?"),
    ('file,class\n0.png,cat\n', r"no column 'label' \(there is 'file', 'class'\): name it with --label-column"),
    ('file,label,label\n0.png,cat,dog\n', r"has 2 columns 'label': rename"),
    ('file,label\n', r'has a header and no row'),
    ('', r'is empty: give a header'),
])
def test_what_is_wrong_is_told_with_its_line_in_one_sentence(pictures, text, sentence):
    with pytest.raises(InputError, match=sentence) as told:
        read(pictures, text)
    assert '\n' not in str(told.value)


def test_utf_16_and_a_missing_file_are_told(pictures):
    with pytest.raises(InputError, match='UTF-16: save it as UTF-8'):
        read(pictures, 'file,label\n0.png,cat\n', encoding='utf-16')
    with pytest.raises(InputError, match=r"'other.csv' is neither there nor in .*: correct --train-csv"):
        read(pictures, '', train_csv='other.csv')
    with pytest.raises(InputError, match='give --train-csv'):
        create_splits(DataSettings('csv', data_dir=str(pictures)))


def test_a_picture_that_is_there_twice_is_told(pictures):
    notes = read(pictures, 'file,label\n0.png,cat\n1.png,dog\n0.png,dog\n').notes
    assert any("names 1 pictures more than once, such as '0.png' in lines 2, 4 under the labels 'cat', 'dog'" in note
               for note in notes)


def test_a_checkpoint_orders_the_classes(pictures):
    classes = read(pictures, 'file,label\n0.png,cat\n1.png,dog\n2.png,emu\n').classes
    (pictures / 'test.csv').write_text('file,label\n3.png,emu\n4.png,dog\n')
    splits = create_splits(DataSettings('csv', test_csv=str(pictures / 'test.csv')), ('test',), Known(classes, 'it'))
    assert splits.test.targets.tolist() == [2, 1]


def test_lines_are_counted_after_a_separator_line(tmp_path):
    (tmp_path / 'x.csv').write_text('sep=;\na;b\n1;2\n\n3;4\n')
    table = read_table(tmp_path / 'x.csv', ['b', 'a'])
    assert table.columns == {'b': ['2', '4'], 'a': ['1', '3']} and table.lines == [3, 5]
