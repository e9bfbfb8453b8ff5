"""Tar shards: exact draws and evaluations over processes and workers, the index, and what is refused."""
import base64
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from forks import run_ranks
from PIL import Image

from nbn_timm.cli import train
from nbn_timm.data import DataDefaults, DataSettings, create_eval_loader, create_train_loader
from nbn_timm.data.shards import ShardIndex, read_samples
from nbn_timm.datasets import create_splits
from nbn_timm.datasets.wds import shards_of
from nbn_timm.errors import InputError
from nbn_timm.samplers import SAMPLERS, create_sampler

COUNTS = [23, 9, 4, 1]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))
SHARDS = [10, 1, 16, 0, 10]  # pictures of each


def picture(number: int, side: int = 8) -> bytes:
    """A picture whose first value tells its number."""
    file = io.BytesIO()
    Image.new('RGB', (side, side), (number, 0, 0)).save(file, 'png')
    return file.getvalue()


def add(tar, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(folder, labels, sizes, split: str = 'train', label_first: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f'{split}-{shard:04}.tar', 'w') as tar:
            for _ in range(size):
                files = [(f'{number:06}.png', picture(number)), (f'{number:06}.cls', b'%d' % labels[number])]
                for name, content in reversed(files) if label_first else files:
                    add(tar, name, content)
                number += 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    write_shards(tmp_path / 'shards', LABELS, SHARDS)
    write_shards(tmp_path / 'shards', LABELS, SHARDS, 'val', label_first=True)
    return tmp_path / 'shards'


def opened(folder, **settings):
    return create_splits(DataSettings('wds/', str(folder), **{'test_split': 'val', **settings}))


FORMAT = DataDefaults(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


def seen(loader) -> list[tuple[int, int]]:
    """Number and label of each picture, in order."""
    return [(round(255 * float(image[0, 0, 0])), int(label)) for images, labels in loader
            for image, label in zip(images, labels, strict=True)]


def plain(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def epoch_of(folder, name, epoch, rank=0, world_size=1, workers=0, batch_size=4, **kwargs):
    """What a process sees of an epoch, by batches."""
    splits = opened(folder)
    sampler = create_sampler(name, splits.train_targets, splits.class_counts, 7, rank, world_size, 10)
    loader = create_train_loader(splits.train, sampler, batch_size=batch_size, defaults=FORMAT, num_workers=workers,
                                 seed=7, rank=rank, transform=plain, **kwargs)
    loader.set_epoch(epoch)
    batches = [seen([batch]) for batch in loader]
    assert len(batches) == len(loader)
    return batches


def test_labels_and_counts_come_from_the_shards(folder):
    splits = opened(folder)
    assert splits.train_targets.tolist() == LABELS.tolist() and splits.class_counts.counts == tuple(COUNTS)
    index = json.loads((folder / 'train.index.json').read_text())
    assert index['counts'] == COUNTS and [shard['images'] for shard in index['shards']] == SHARDS
    assert ShardIndex.read(folder / 'train.index.json').targets.tolist() == LABELS.tolist()


def test_an_index_is_read_again_and_made_anew_for_other_shards(folder, monkeypatch):
    opened(folder)
    with monkeypatch.context() as patch:
        patch.setattr('nbn_timm.data.shards.read_samples', None)  # nothing reads a shard
        assert opened(folder).train_targets.tolist() == LABELS.tolist()
    write_shards(folder, LABELS[::-1], [12, 25])
    for shard in (2, 3, 4):
        (folder / f'train-{shard:04}.tar').unlink()
    assert opened(folder).train_targets.tolist() == LABELS[::-1].tolist()


def test_an_index_that_cannot_lie_beside_its_shards_is_kept_elsewhere(folder, tmp_path, monkeypatch):
    write = ShardIndex.write

    def refuse(index, path):
        if path.parent == folder:
            raise InputError('no')
        write(index, path)

    monkeypatch.setattr(ShardIndex, 'write', refuse)
    opened(folder)
    assert not list(folder.glob('*.json')) and len(list((tmp_path / 'torch').rglob('train-*.index.json'))) == 1
    monkeypatch.setattr('nbn_timm.data.shards.read_samples', None)
    assert opened(folder).train_targets.tolist() == LABELS.tolist()


@pytest.mark.parametrize('name', sorted(set(SAMPLERS) - {'deferred', 'meta'}))
def test_an_epoch_has_the_pictures_that_the_sampler_draws(folder, name):
    sampler = create_sampler(name, LABELS, opened(folder).class_counts, 7, epochs=10)
    sampler.set_epoch(2)
    drawn = Counter(sampler)
    found = [item for batch in epoch_of(folder, name, 2, drop_last=False) for item in batch]
    assert Counter(number for number, _ in found) == drawn
    assert all(label == LABELS[number] for number, label in found)


@pytest.mark.parametrize('world_size, workers', [(1, 0), (5, 0), (1, 2), (2, 2)])
def test_processes_and_workers_share_an_epoch(folder, world_size, workers):
    sampler = create_sampler('class_balanced', LABELS, None, 7, 0, world_size)
    sampler.set_epoch(3)
    drawn = Counter(sampler.epoch_indices().tolist())
    ranks = [epoch_of(folder, 'class_balanced', 3, rank, world_size, workers, drop_last=False)
             for rank in range(world_size)]
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1  # as many batches, as large
    assert [len(batch) for batch in ranks[0]][:-1] == [4] * (len(ranks[0]) - 1)
    assert Counter(number for batches in ranks for batch in batches for number, _ in batch) == drawn


def test_classes_are_balanced_in_expectation(folder):
    drawn = Counter(label for epoch in range(15) for batch in epoch_of(folder, 'class_balanced', epoch, drop_last=False)
                    for _, label in batch)
    expected = 15 * len(LABELS) / 4
    assert all(abs(drawn[label] - expected) < 4 * (expected * 3 / 4) ** 0.5 for label in range(4))


def test_epochs_differ_and_can_be_had_again(folder):
    first, again = (epoch_of(folder, 'instance_balanced', 4, 1, 2, 2) for _ in range(2))
    other = epoch_of(folder, 'instance_balanced', 5, 1, 2, 2)
    assert first == again != other
    order = [number for batch in epoch_of(folder, 'instance_balanced', 0) for number, _ in batch]
    assert order != sorted(order)


def test_a_smaller_last_batch_can_be_left_out(folder):
    batches = epoch_of(folder, 'instance_balanced', 0, 0, 1, 2, drop_last=True)
    assert [len(batch) for batch in batches] == [4] * 9
    assert len({number for batch in batches for number, _ in batch}) == 36


@pytest.mark.parametrize('world_size, workers', [(1, 0), (7, 0), (2, 2)])
def test_an_evaluation_sees_each_picture_once_and_in_order(folder, world_size, workers):
    found = []
    for rank in range(world_size):
        loader = create_eval_loader(opened(folder).test, batch_size=3, defaults=FORMAT, num_workers=workers, rank=rank,
                                    world_size=world_size)
        part = seen(loader)
        assert len(loader.loader.dataset) == len(part)
        found += part
    assert found == list(enumerate(LABELS.tolist()))


def test_what_is_not_wanted_is_not_read(folder):
    wanted = np.zeros(16, np.int32)
    wanted[[3, 5]] = 1
    found = list(read_samples(str(folder / 'train-0002.tar'), wanted))
    assert [number for number, _, _ in found] == [3, 5]
    assert found[0][2].keys() == {'png', 'cls'} and found[0][2]['png'] == picture(11 + 3)


@pytest.mark.parametrize('how', ['pattern', 'info', 'folder'])
def test_splits_have_three_forms(folder, how):
    split = 'train'
    if how == 'pattern':
        pytest.importorskip('webdataset')
        split = 'train-{0000..0004}.tar|37'
    elif how == 'info':
        split = 'all'
        names = [f'train-{shard:04}.tar' for shard in range(5)]
        (folder / '_info.json').write_text(json.dumps({'splits': {'all': {
            'name': 'all', 'num_samples': 37, 'filenames': names, 'shard_lengths': SHARDS}}}))
    else:
        (folder / 'own').mkdir()
        (folder / 'train-0000.tar').rename(folder / 'own' / 'a.tar')
        assert shards_of(str(folder), 'own') == ['own/a.tar']
        return
    assert opened(folder, train_split=split).train_targets.tolist() == LABELS.tolist()


def test_shards_of_webdataset_and_behind_a_url_are_read(tmp_path, monkeypatch):
    webdataset = pytest.importorskip('webdataset')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    with webdataset.ShardWriter(str(tmp_path / 'train-%d.tar'), maxcount=20, verbose=0) as writer:
        for number, label in enumerate(LABELS):
            writer.write({'__key__': f'a/{number:04}', 'png': picture(number), 'cls': int(label), 'json': {'x': 1}})
    for root in (str(tmp_path), f'file://{tmp_path}'):
        settings = DataSettings('wds/', root, train_split='train-{0..1}.tar', test_split='train-1.tar')
        splits = create_splits(settings)
        assert splits.train_targets.tolist() == LABELS.tolist()
        loader = create_eval_loader(splits.test, batch_size=5, defaults=FORMAT, num_workers=0)
        assert seen(loader) == list(enumerate(LABELS.tolist()))[20:]


def test_timms_reader_reads_the_same(folder):
    pytest.importorskip('webdataset')
    import timm.data
    dataset = timm.data.create_dataset('wds/', root=str(folder), split='train-{0000..0004}.tar|37')
    assert [label for _, label in dataset.reader] == LABELS.tolist()


@pytest.mark.parametrize('fault, message', [
    ('no label', r"'000037' of shard .* has no .cls file"),
    ('words', r"'000037' of shard .* has no .cls file"),
    ('no picture', "'000037' of shard .* has no picture"),
    ('apart', "the files of picture '000001' of shard .* do not follow each other"),
    ('no tar', "train-0009.tar' cannot be read"),
    ('id', r"label 20000000 of picture '000037' of shard .* looks like an id"),
    ('cut', r"train-0009.tar' cannot be read \(\w+ header at byte"),
    ('wrong bit', r"train-0009.tar' cannot be read \(bad checksum at byte"),
])
def test_malformed_shards_are_one_sentence(folder, fault, message):
    with tarfile.open(folder / 'train-0009.tar', 'w') as tar:
        if fault in ('no label', 'words', 'id'):
            add(tar, '000037.png', picture(0))
        if fault in ('words', 'id'):
            add(tar, '000037.cls', b'cat' if fault == 'words' else b'20000000')
        if fault in ('cut', 'wrong bit'):
            for name in ('000037', '000038'):
                add(tar, f'{name}.png', picture(0))
                add(tar, f'{name}.cls', b'0')
        if fault == 'no picture':
            add(tar, '000037.cls', b'0')
        if fault == 'apart':
            for name in ('000001', '000002', '000001'):
                add(tar, f'{name}.png', picture(0))
                add(tar, f'{name}.cls', b'0')
    if fault == 'no tar':
        (folder / 'train-0009.tar').write_bytes(b'nothing' * 500)
    if fault in ('cut', 'wrong bit'):  # of which tarfile makes an end, behind the first picture
        content = bytearray((folder / 'train-0009.tar').read_bytes())
        second = content.index(b'000038.png')
        content[second] ^= fault == 'wrong bit'
        (folder / 'train-0009.tar').write_bytes(content[:second] if fault == 'cut' else content)
    with pytest.raises(InputError, match=message) as caught:
        opened(folder)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('before', 'after'), [
    ('"form": 1', '"form": [[1]]'), ('"images": ', '"images": 1'), ('"images": ', '"images": -'),
    ('"images": ', f'"images": {"9" * 40}'), ('"label_type": "<u2"', '"label_type": "<u4"'),
    ('"labels": "', '"labels": "////'), ('"counts": [', '"counts": [1, '), ('{', '[' * 100_000)])
def test_a_damaged_index_is_one_sentence(folder, before, after):
    opened(folder)
    index = folder / 'train.index.json'
    index.write_text(index.read_text().replace(before, after, 1))
    with pytest.raises(InputError, match="train.index.json' is no index of shards .*: remove it, and it is made anew"):
        opened(folder)


def test_no_memory_is_taken_for_a_label_of_a_damaged_index(tmp_path):
    index = ShardIndex(('a',), (1,), np.int64([2]), np.int64([0, 70_000]))
    index.write(tmp_path / 'x.json')
    text = json.loads((tmp_path / 'x.json').read_text())
    text['labels'] = base64.b64encode(np.array([0, 2 ** 32 - 1], '<u4').tobytes()).decode()  # 32 GiB of counts
    (tmp_path / 'x.json').write_text(json.dumps(text))
    with pytest.raises(InputError, match='its numbers disagree'):
        ShardIndex.read(tmp_path / 'x.json')


def test_shards_that_are_not_as_their_index_says_are_refused(folder):
    splits = opened(folder)
    write_shards(folder, (LABELS + 1) % 4, SHARDS)
    with pytest.raises(InputError, match='is not as its index says: remove'):
        list(splits.train)


def test_a_damaged_picture_ends_the_epoch(folder):
    with tarfile.open(folder / 'train-0004.tar', 'w') as tar:
        add(tar, 'broken.png', picture(0)[:40])
        add(tar, 'broken.cls', b'0')
    with pytest.raises(InputError, match="image 'broken' of shard .* cannot be read"):
        list(opened(folder).train)


@pytest.mark.parametrize('settings, message', [
    (dict(imbalance_factor=4.0), 'is a stream, of which no part can be taken'),
    (dict(train_split='nothing'), "has no shards of split 'nothing'"),
    (dict(data_dir=None), 'give --data-dir'),
])
def test_what_a_stream_cannot_is_refused(folder, settings, message):
    with pytest.raises(InputError, match=message):
        create_splits(DataSettings(**{'dataset': 'wds/', 'data_dir': str(folder), 'test_split': 'val', **settings}))


def flags(folder, output):
    return ['--dataset', 'wds/', '--data-dir', str(folder), '--val-split', 'val', '--test-split', 'val', '--model',
            'resnet20', '--img-size', '8', '--batch-size', '6', '--workers', '1', '--device', 'cpu', '--sampler',
            'class_balanced', '--epochs', '2', '--output', str(output), '--no-aug', '--no-report']


def test_a_run_that_stops_in_the_middle_ends_where_a_whole_one_does(folder, tmp_path, monkeypatch):
    command = flags(folder, tmp_path)
    train.main([*command, '--experiment', 'whole'])
    from nbn_timm.training import run
    train_one_epoch = run.train_one_epoch

    def killed(*args):
        if args[6] == 1:
            raise KeyboardInterrupt
        return train_one_epoch(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, 'train_one_epoch', killed)
        train.main([*command, '--experiment', 'killed'])
    train.main([*command, '--experiment', 'killed', '--resume', 'auto'])
    whole, killed = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=True)['state_dict']
                     for name in ('whole', 'killed'))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    result = json.loads((tmp_path / 'whole' / 'test.json').read_text())
    assert result == json.loads((tmp_path / 'killed' / 'test.json').read_text())


def test_two_processes_train_and_evaluate_exactly(folder, tmp_path):
    run_ranks(train.main, [*flags(folder, tmp_path), '--experiment', 'two', '--epochs', '1'])
    result = json.loads((tmp_path / 'two' / 'test.json').read_text())
    assert result['num_samples'] == len(LABELS)
    with np.load(tmp_path / 'two' / 'test_predictions.npz') as kept:  # in the order of the split
        assert kept['labels'].tolist() == LABELS.tolist()
