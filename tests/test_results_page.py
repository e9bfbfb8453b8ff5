"""benchmarks/results_page.py on made-up runs: its numbers, its refusals, and that the repository's page is current."""
import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nbn_timm.errors import InputError
from nbn_timm.seals import SEAL, is_text_as_written, sealed_text

ROOT = Path(__file__).parents[1]
COUNTS = (200, 120, 60, 30, 9, 3)
SHOTS = ('many', 'many', 'medium', 'medium', 'few', 'few')
CONDITIONS = {'network': 'ResNet-20, 1x', 'draw': "LDAM's", 'epochs': 200, 'reported': 'best on test', 'pflop': 0.9}
PUBLISHED = {
    'plain': {'multiply_adds': 68868352}, 'note': 'Another draw.', 'labels': {'ce': 'cross entropy'},
    'entries': [{'method': 'CE', 'all': '38 to 41', 'source': 'a paper', **CONDITIONS,
                 'beside': {'model': ['resnet20'], 'loss': ['cross_entropy']}},
                {'method': 'some experts', 'all': 48.6, 'many': 67.0, 'medium': 49.9, 'few': 25.7, 'source': 'a zoo',
                 **CONDITIONS, 'beside': {'loss': ['ride'], 'num_experts': [2, 3]}},
                {'method': 'another', 'all': 60.0, 'source': 'elsewhere', **CONDITIONS}]}


@pytest.fixture(scope='module')
def results_page():
    import results_page
    return results_page


def write_run(parent: Path, name: str, correct, seed: int, hardware=None, parts=None, **settings) -> Path:
    """A run folder as train.py leaves it, with ten test images per class."""
    folder = parent / name
    folder.mkdir(parents=True)
    settings = {
        'dataset': 'cifar100_lt', 'data_dir': '/home/me/pictures', 'train_list': '/home/me/pictures/lists/a.txt',
        'model': 'resnet20', 'model_kwargs': {}, 'add_nbn': False, 'loss': 'cross_entropy', 'loss_kwargs': {},
        'sampler': 'instance_balanced', 'stage': None, 'initial_checkpoint': None, 'epochs': 2, 'seed': seed,
        'output': '/home/me/runs', 'experiment': name, 'workers': seed, **settings}
    (folder / 'args.yaml').write_text(
        '# Settings of this run.\n' + sealed_text(yaml.safe_dump(settings, sort_keys=False)))
    # 422 training images: 1 s and 2 s, whatever pause lay between the epochs.
    (folder / 'log.jsonl').write_text(''.join(json.dumps(
        {'epoch': epoch, 'time': f'2026-11-2{epoch}T00:00:00+00:00', 'train_loss': 3.0 - epoch + seed,
         'train_images_per_second': rate, 'lr': 0.1}) + '\n' for epoch, rate in enumerate((422.0, 211.0))))
    with open(folder / 'test_per_class.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['class', 'name', 'train_images', 'shot', 'test_images', 'correct', 'accuracy'])
        for label, hits in enumerate(correct):
            writer.writerow([label, f'class{label}', COUNTS[label], SHOTS[label], 10, hits, 10.0 * hits])
    accuracy = {shot: 5.0 * sum(hits for hits, of in zip(correct, SHOTS, strict=True) if of == shot) for shot in SHOTS}
    (folder / 'test.json').write_text(json.dumps(
        {'checkpoint': 'epoch 2 (last.pth.tar), the last one, since there is no validation split to choose by',
         'top1': round(sum(correct) / 0.6, 6), **accuracy}))
    (folder / 'last.pth.tar').write_text('large')
    if hardware or parts:
        (folder / 'hardware.json').write_text(json.dumps({
            **({'parts': parts} if parts else {'hardware': hardware, 'torch': '2.14'}),
            'command': f'python train.py --data-dir /home/me/pictures --seed {seed}'}))
    return folder


@pytest.fixture
def place(results_page, tmp_path) -> dict:
    """Two methods, the first with two seeds, collected; and a page to write them to."""
    runs = [write_run(tmp_path / 'runs', 'ce-s0', (9, 8, 5, 4, 1, 0), 0, 'one core'),
            write_run(tmp_path / 'runs', 'ce-s1', (9, 8, 7, 4, 1, 0), 1, 'one core'),
            write_run(tmp_path / 'runs', 'two_experts-s7', (8, 8, 6, 5, 3, 2), 7, model='resnet32_ride', loss='ride',
                      model_kwargs={'num_experts': 2})]
    for run in runs:
        results_page.collect(run, tmp_path / 'results', '/data/pictures')
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs' / 'zoo.md').write_text(f'# Zoo\n\n{results_page.BEGIN}\nold\n{results_page.END}\n\nThe end.\n')
    return {'results': tmp_path / 'results', 'page': tmp_path / 'docs' / 'zoo.md',
            'images': tmp_path / 'docs' / 'images', 'published': PUBLISHED}


def rows_of(page: Path) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip('|').split('|')]
            for line in page.read_text().splitlines() if line.startswith('|')]


def test_numbers_are_those_of_the_logs(results_page, place):
    pytest.importorskip('matplotlib')
    results_page.build(**place, check=False)
    rows = rows_of(place['page'])
    # 27/60 and 29/60; medium 9/20 and 11/20: the sample deviation of two values is their distance over root two.
    assert ['**cross entropy**', '`resnet20`, 0.59x', 'ours', '2', 'last', '0.00', '2',
            '46.67 ± 2.36', '85.00 ± 0.00', '50.00 ± 7.07', '5.00 ± 0.00', ''] in rows
    below = ['CE, published', 'ResNet-20, 1x', "LDAM's", '200', 'best on test', '0.9', '', '38 to 41', '', '', '', '']
    assert rows[rows.index(below) - 1][0] == '**cross entropy**'
    ours = next(row for row in rows if row[0] == '**two experts**')
    assert ours[6:] == ['1', '53.33', '80.00', '55.00', '25.00', '']
    assert rows[rows.index(ours) + 1][7:] == ['48.6', '67.0', '49.9', '25.7', '']
    assert ['another', 'ResNet-20, 1x', "LDAM's", '200', 'best on test', '0.9', '', '60.0', '', '', '', ''] in rows
    cost = {row[0]: row[1:] for row in rows if len(row) == 8 and row[0] != 'method'}
    assert cost['cross entropy'] == [
        '`resnet20`, cross entropy', '269,462', '40.6 M', '3 s', '0.00083 core-hours', 'one core, float32, torch 2.14',
        '[0](../results/ce-s0), [1](../results/ce-s1)']
    assert cost['two experts'][0] == '`resnet32_ride` (num_experts=2), ride'
    assert cost['two experts'][5:] == ['not recorded, float32', '[7](../results/two_experts-s7)']
    page = place['page'].read_text()
    assert '\npython train.py --data-dir /data/pictures --seed 0\n' in page
    assert '\npython train.py --config results/two_experts-s7/args.yaml\n' in page
    assert page.startswith('# Zoo\n') and page.endswith('The end.\n') and 'old' not in page
    assert '422 training images of 6 classes' in page and '(2 many, 2 medium, 2 few)' in page
    assert 'Another draw.' in page
    for name in results_page.PLOTS.keys() - {results_page.EFFECT}:
        if name.endswith('.png'):
            with Image.open(place['images'] / name) as plot:
                assert plot.width > 1000 and len(plot.convert('L').getcolors()) > 10
        assert f'](images/{name})' in page
    assert not (place['images'] / results_page.EFFECT).exists() and results_page.EFFECT not in page  # nothing compared


def test_plot_of_the_cost_has_ours_and_what_is_published(results_page, place):
    pytest.importorskip('matplotlib')
    import results_plots
    methods = results_page.read_methods(place['results'], PUBLISHED['labels'])
    axes = results_plots.cost([(method, 0.5 + place) for place, method in enumerate(methods)],
                              PUBLISHED['entries']).axes[0]
    assert {text.get_text() for text in axes.texts} == {'CE', 'some experts', 'another'}
    assert axes.get_legend_handles_labels()[1] == ['cross entropy (2)', 'two experts (1)']
    drawn = {(float(x), float(y)) for line in axes.lines
             for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert {(0.9, 48.6), (0.9, 60.0), (0.9, 38.0), (0.9, 41.0)} <= drawn
    assert any(x == 0.5 and y == pytest.approx(100 * 28 / 60) for x, y in drawn)


def test_plots_leave_out_what_stands_in_tables_alone(results_page, place, monkeypatch):
    pytest.importorskip('matplotlib')
    import results_plots
    drawn = []
    splits = results_plots.splits
    monkeypatch.setattr(results_plots, 'splits', lambda methods: drawn.extend(methods) or splits(methods))
    place['published'] = {**PUBLISHED, 'tables_only': ['ce']}
    results_page.build(**place, check=False)
    assert [method.name for method in drawn] == ['two_experts']
    assert {row[0] for row in rows_of(place['page'])} >= {'cross entropy', 'two experts'}
    results_page.build(**place, check=True)
    place['published'] = PUBLISHED
    with pytest.raises(InputError, match='is not what the logs'):
        results_page.build(**place, check=True)


def test_run_of_two_machines_says_so(results_page, tmp_path):
    import results_rows
    parts = [{'hardware': 'NVIDIA X, 4 runs at a time', 'epochs': 1, 'precision': 'bfloat16', 'torch': '2.11'},
             {'hardware': 'EPYC, 2 of 8 cores', 'epochs': 1, 'precision': 'float32', 'torch': '2.14', 'commit': 'abc'}]
    run = results_page.read_run(write_run(tmp_path, 'ce-s0', (9, 8, 5, 4, 1, 0), 0, parts=parts))
    assert run.hardware == ('NVIDIA X, 4 runs at a time, 1 epochs, bfloat16, torch 2.11; then EPYC, 2 of 8 cores, '
                            '1 epochs, float32, torch 2.14')
    # 422 images at 422 and at 211 a second: one second of a quarter of a GPU, two of two cores.
    assert [part.machine_hours * 3600 for part in run.parts] == pytest.approx([0.25, 4])
    assert run.train_seconds == pytest.approx(3)
    assert results_rows.machine_hours(run, gpu=True) == round(0.25 / 3600, 6)
    parts[1]['epochs'] = 2
    with pytest.raises(InputError, match='do not add up to 2 epochs'):
        results_page.read_run(write_run(tmp_path, 'ce-s1', (9, 8, 5, 4, 1, 0), 1, parts=parts))


def test_seeds_of_a_processor_and_of_a_gpu_are_one_method_of_two_costs(results_page, tmp_path):
    """Which the precision does not keep apart, and the mean of a GPU-hour and a core-hour says nothing."""
    machines = ({'hardware': 'EPYC, 1 of 2 cores'}, {'hardware': 'NVIDIA X, 4 runs at a time'})
    for seed, machine in enumerate(machines):
        write_run(tmp_path, f'ce-s{seed}', (9, 8, 5, 4, 1, 0), seed, parts=[{**machine, 'epochs': 2}],
                  amp=bool(seed), amp_dtype='bfloat16')
    (method,) = results_page.read_methods(tmp_path, {})
    assert [run.hardware for run in method.runs] == ['EPYC, 1 of 2 cores, float32',
                                                     'NVIDIA X, 4 runs at a time, bfloat16']
    # 422 images at 422 and at 211 a second: three seconds of a core, or of a quarter of a GPU.
    assert [results_page.machine_time(runs) for runs in results_page.by_machines(method)] == [
        '0.00083 core-hours', '0.00021 GPU-hours']


def keep_predictions(folder: Path, correct, confidence=0.5) -> None:
    """Ten test images per class; the wrong ones are taken for the next class."""
    labels = np.repeat(np.arange(6), 10)
    right = np.concatenate([np.arange(10) < hits for hits in correct])
    first = np.where(right, labels, (labels + 1) % 6)
    top5 = (first[:, None] + np.arange(5)) % 6
    np.savez(folder / 'predictions.npz', labels=labels, top5=top5, confidence=np.full(60, confidence, np.float16),
             label_log_probability=np.zeros(60, np.float16))


def test_numbers_are_counted_from_the_predictions_where_they_are_kept(results_page, place, monkeypatch):
    import results_runs
    monkeypatch.setattr(results_runs, 'ROUNDING', 2.0)  # one of 60 images is told otherwise in float32
    keep_predictions(place['results'] / 'ce-s0', (9, 8, 5, 4, 2, 0), confidence=0.5)
    run = results_page.read_run(place['results'] / 'ce-s0')
    assert run.accuracy() == pytest.approx(28 / 0.6) and run.accuracy('few') == 10.0
    # All 60 images are in the bin of 0.5, of which 28 are right.
    assert results_page.calibration_error(run) == pytest.approx(100 * (0.5 - 28 / 60))
    keep_predictions(place['results'] / 'ce-s0', (9, 8, 5, 6, 2, 0))
    with pytest.raises(InputError, match='two networks'):
        results_page.read_run(place['results'] / 'ce-s0')


def test_calibration_error_is_that_of_torchmetrics(results_page, place):
    from torchmetrics.functional.classification import binary_calibration_error
    folder, hits = place['results'] / 'ce-s0', (9, 8, 5, 4, 1, 0)
    keep_predictions(folder, hits)
    with np.load(folder / 'predictions.npz') as arrays:
        kept = dict(arrays)
    kept['confidence'] = np.random.default_rng(0).uniform(0.2, 1, 60)
    np.savez(folder / 'predictions.npz', **kept)
    run = results_page.read_run(folder)
    right = torch.from_numpy(kept['top5'][:, 0] == kept['labels']).int()
    expected = binary_calibration_error(torch.from_numpy(kept['confidence']), right, n_bins=15, norm='l1')
    assert results_page.calibration_error(run) == pytest.approx(100 * expected.item(), abs=1e-4)


def test_differences_are_taken_seed_by_seed(results_page, place, tmp_path):
    pytest.importorskip('matplotlib')
    for seed, correct in ((0, (9, 8, 6, 4, 2, 0)), (1, (9, 8, 7, 6, 2, 0))):  # 2 and 3 images more than ce
        results_page.collect(write_run(tmp_path / 'more', f'nbn-s{seed}', correct, seed, 'one core', loss='focal'),
                             place['results'], '/data/pictures')
    place['published'] = {**PUBLISHED, 'pairs': [['ce', 'nbn'], ['ce', 'absent']]}
    results_page.build(**place, check=False)
    row = next(row for row in rows_of(place['page']) if row[:3] == ['nbn', 'cross entropy', '2'])
    # 100/60 times 2 and 3: mean 4.17, deviation 1.18, and t of one degree of freedom is 12.706.
    assert row[3] == '+4.17 (-6.42 to +14.76)'
    assert row[4] == '+0.00 (+0.00 to +0.00)'
    written = json.loads((place['results'] / 'rows' / 'ce.json').read_text())
    assert written['seeds'] == [0, 1] and written['accuracy']['all']['values'] == [45.0, 48.3333]
    assert written['training_pflops'] == round(6 * written['multiply_adds'] * 422 * 2 / 1e15, 4)
    assert written['machines'] == [[{'hardware': 'one core', 'epochs': 2, 'precision': 'float32', 'torch': '2.14'}]]
    assert written['published'] == {'method': 'CE', 'all': '38 to 41', 'source': 'a paper', **CONDITIONS}
    import results_plots
    axes = results_plots.effect([(other.label, base.label, spreads) for base, other, spreads in results_page.effects(
        results_page.read_methods(place['results'], PUBLISHED['labels']), place['published'])]).axes[0]
    assert axes.get_title(loc='left') == 'nbn, over cross entropy: 2 pairs'
    assert (place['images'] / results_page.EFFECT).is_file()
    results_page.build(**place, check=True)
    (place['results'] / 'rows' / 'ce.json').write_text('{}')
    with pytest.raises(InputError, match='ce.json'):
        results_page.build(**place, check=True)


def test_check_fails_where_page_or_plots_are_not_what_the_logs_give(results_page, place):
    pytest.importorskip('matplotlib')
    with pytest.raises(InputError, match='zoo.md'):
        results_page.build(**place, check=True)
    results_page.build(**place, check=False)
    written = place['page'].read_text()
    results_page.build(**place, check=True)
    place['page'].write_text(written.replace('46.67', '47.67'))
    with pytest.raises(InputError, match='zoo.md is not what the logs'):
        results_page.build(**place, check=True)
    place['page'].write_text(written)
    # A curve is on a plot only, so the page stays right and the plots do not.
    log = place['results'] / 'ce-s0' / 'log.jsonl'
    log.write_text(log.read_text().replace('"train_loss": 3.0', '"train_loss": 3.5'))
    with pytest.raises(InputError, match='_training.png') as caught:
        results_page.build(**place, check=True)
    assert 'zoo.md is' not in str(caught.value)
    assert place['page'].read_text() == written  # a check writes nothing


def test_collected_logs_name_no_place_on_the_machine(results_page, place):
    folder = place['results'] / 'ce-s1'
    assert sorted(path.name for path in folder.iterdir()) == [
        'args.yaml', 'hardware.json', 'log.jsonl', 'test.json', 'test_per_class.csv']
    assert not any('/home/me' in path.read_text() for path in place['results'].rglob('*') if path.is_file())
    text = (folder / 'args.yaml').read_text()
    assert text.count(SEAL) == 1 and is_text_as_written(text)
    settings = yaml.safe_load(text)
    assert text.startswith('# Settings')
    assert settings['data_dir'] == '/data/pictures' and settings['train_list'] == '/data/pictures/lists/a.txt'
    assert settings['output'] == 'output'


def test_paths_of_first_stages_are_neutral_too(results_page):
    settings = results_page.neutral_settings(
        {'data_dir': '/home/me/pictures', 'output': '/home/me/runs',
         'kd_checkpoint': '/home/me/runs/big-s0/last.pth.tar',
         'class_counts': '/home/me/counts.json', 'epochs': 3, 'model_kwargs': {'file': '/home/me/pictures/w.pth'}},
        '/data/pictures')
    assert settings == {'data_dir': '/data/pictures', 'output': 'output', 'kd_checkpoint': 'output/big-s0/last.pth.tar',
                        'class_counts': 'counts.json', 'epochs': 3, 'model_kwargs': {'file': '/data/pictures/w.pth'}}


@pytest.mark.parametrize('name, settings, message', [
    ('ce-s2', {'seed': 2, 'lr': 0.2}, 'differ in lr'),
    ('ce-s2', {'seed': 1}, 'same seed 1'),
])
def test_runs_that_are_no_repetitions_are_not_averaged(results_page, place, tmp_path, name, settings, message):
    write_run(place['results'], name, (1, 1, 1, 1, 1, 1), settings.pop('seed'), data_dir='/data/pictures',
              train_list='/data/pictures/lists/a.txt', output='output', **settings)
    with pytest.raises(InputError, match=message):
        results_page.build(**place, check=True)


def test_runs_of_another_training_set_are_refused(results_page, place):
    path = write_run(place['results'], 'nbn-s0', (1, 1, 1, 1, 1, 1), 0) / 'test_per_class.csv'
    path.write_text(path.read_text().replace(',120,', ',130,'))
    with pytest.raises(InputError, match='numbers of images per class'):
        results_page.build(**place, check=True)


def spoil(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))


@pytest.mark.parametrize('file, old, new, message', [
    ('args.yaml', 'epochs: 2', 'epochs: 3', 'logged 2 epochs of 3'),
    ('test.json', 'the last one', 'chosen by validation top1', 'last epochs only'),
    ('test_per_class.csv', '10,9,', '10,8,', 'differ'),
    ('test.json', '"many"', '"most"', 'cannot be read'),
    ('log.jsonl', '{"epoch": 1', '{"epo', 'cannot be read'),
])
def test_logs_that_are_not_in_order_are_refused(results_page, tmp_path, file, old, new, message):
    folder = write_run(tmp_path, 'ce-s0', (9, 8, 5, 4, 1, 0), 0)
    results_page.read_run(folder)
    spoil(folder, file, old, new)
    with pytest.raises(InputError, match=message):
        results_page.read_run(folder)


def test_a_second_stage_counts_its_first(results_page, place, tmp_path):
    for name, more in (('two-s0', {}), ('two_heads-s0', {
            'stage': 'crt', 'initial_checkpoint': '/home/me/runs/two-s0/last.pth.tar'})):
        results_page.collect(write_run(tmp_path / 'more', name, (9, 8, 5, 4, 1, 0), 0, loss='focal', **more),
                             place['results'], '/data/pictures')
    results_page.build(**place, check=False)
    rows = {name: json.loads((place['results'] / 'rows' / f'{name}.json').read_text()) for name in ('two', 'two_heads')}
    images = rows['two']['multiply_adds'] * 422 * 2 / 1e15
    assert rows['two']['training_pflops'] == round(6 * images, 4)
    assert rows['two_heads']['training_pflops'] == round(6 * images + 2 * images, 4)  # forward alone, of frozen layers
    epochs = {row[0]: row[3] for row in rows_of(place['page']) if len(row) == len(results_page.HEAD)}
    assert epochs['**two**'] == '2' and epochs['**two heads**'] == '2 + 2'


def test_passes_of_other_kinds_count_and_a_teacher_has_no_number(results_page, place, tmp_path):
    """SAM takes each step twice, BCL sees three views, and a teacher's passes are not counted."""
    for name, more in (('sam-s0', {'sam_rho': 0.1}), ('views-s0', {'loss': 'bcl'}), ('taught-s0', {
            'kd_checkpoint': '/home/me/runs/ce-s0/last.pth.tar'})):
        results_page.collect(write_run(tmp_path / 'more', name, (9, 8, 5, 4, 1, 0), 0, **{'loss': 'focal', **more}),
                             place['results'], '/data/pictures')
    results_page.build(**place, check=False)
    rows = {name: json.loads((place['results'] / 'rows' / f'{name}.json').read_text())
            for name in ('ce', 'sam', 'views', 'taught')}
    once = rows['ce']['training_pflops']
    assert rows['sam']['training_pflops'] == pytest.approx(2 * once, abs=1e-4)
    assert rows['views']['training_pflops'] == pytest.approx(3 * once, abs=1e-4)
    assert rows['taught']['training_pflops'] is None
    costs = {row[0]: row[5] for row in rows_of(place['page']) if len(row) == len(results_page.HEAD)}
    assert costs['**taught**'] == '' and costs['**sam**'] != ''


def test_a_second_stage_without_its_first_is_refused(results_page, place, tmp_path):
    run = write_run(tmp_path / 'more', 'heads-s0', (9, 8, 5, 4, 1, 0), 0, stage='crt',
                    initial_checkpoint='/home/me/runs/two-s0/last.pth.tar')
    results_page.collect(run, place['results'], '/data/pictures')
    with pytest.raises(InputError, match="second stage of 'two-s0', which is not there: collect"):
        results_page.build(**place, check=False)


def test_without_its_checkpoint_a_run_keeps_its_own_predictions(results_page, tmp_path):
    from results_rows import keep_predictions
    run = write_run(tmp_path, 'ce-s0', (9, 8, 5, 4, 1, 0), 0)
    (run / 'test_predictions.npz').write_bytes(b'of the run')
    (run / 'last.pth.tar').unlink()
    (tmp_path / 'kept').mkdir()
    keep_predictions(run, tmp_path / 'kept', '/data/pictures')
    assert (tmp_path / 'kept' / 'predictions.npz').read_bytes() == b'of the run'


def test_folder_without_runs_is_refused(results_page, tmp_path):
    with pytest.raises(InputError, match='collect'):
        results_page.read_methods(tmp_path, {})
    with pytest.raises(InputError, match='args.yaml'):
        results_page.read_run(tmp_path)


def test_page_without_markers_is_refused(results_page, place):
    place['page'].write_text('# Zoo\n')
    with pytest.raises(InputError, match='no lines'):
        results_page.build(**place, check=False)


@pytest.mark.parametrize('change, expected', [
    ({}, 'CE'), ({'loss': 'focal'}, None), ({'stage': 'crt'}, None), ({'mixup': 0.2}, None),
    ({'sampler': 'class_aware'}, None), ({'model': 'resnet20_nbn'}, None)])
def test_published_numbers_stand_beside_their_own_recipe_only(results_page, change, expected):
    settings = {'model': 'resnet20', 'loss': 'cross_entropy', 'sampler': 'instance_balanced', **change}
    assert (results_page.published_beside(settings, PUBLISHED) or {}).get('method') == expected


def test_published_file_fits_the_shipped_recipes(results_page):
    """Each entry that stands beside a run of ours does so for the config of that recipe."""
    from nbn_timm.cli.train import parse_train
    from nbn_timm.config import shipped_configs

    published = results_page.read_published(ROOT / 'benchmarks' / 'published.yaml')
    expected = {
        'resnet32': 'cross entropy', 'resnet32_balanced_softmax': 'balanced softmax',
        'resnet32_ldam_drw': 'LDAM-DRW', 'resnet32_logit_adjusted': 'logit adjustment',
        'resnet32_ride': 'RIDE, 3 experts, with routing',
        'resnet32_ride_balanced_softmax': 'RIDE, 3 experts, with routing',
        'resnet32_shike': None, 'resnet32_nbn': None, 'resnet32_ride_nbn_lr': None, 'resnet32_cmo': None,
        'resnet32_ldam': None}
    for name, method in expected.items():
        path = str(shipped_configs()[f'cifar100_lt/{name}'])
        settings = parse_train(['--config', path]).values()
        assert (results_page.published_beside(settings, published) or {}).get('method') == method, name


def test_rows_of_the_repository_fit_the_schema():
    import jsonschema

    schema = json.loads((ROOT / 'results' / 'row.schema.json').read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    rows = sorted((ROOT / 'results').glob('*/rows/*.json'))
    for path in rows:
        row = json.loads(path.read_text())
        jsonschema.validate(row, schema)
        assert row['n'] == len(row['seeds']) == len(row['settings']) == len(row['predictions_sha256'])
        assert all((path.parents[1] / name).is_file() for name in row['settings'])
        assert row['data']['train']['draw'], 'every row says which draw it is'
    broken = {**json.loads(rows[0].read_text()), 'epochs': 'many'}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_published_conditions_are_whole(results_page):
    for entry in results_page.read_published(ROOT / 'benchmarks' / 'published.yaml')['entries']:
        assert {'method', 'all', 'network', 'draw', 'epochs', 'reported', 'source'} <= entry.keys(), entry['method']


def test_what_collecting_keeps_of_the_data(results_page, tmp_path):
    """Digests of the lists that the run names, where the images lie now, and which draw it is."""
    import results_rows
    run = write_run(tmp_path / 'runs', 'ce-s0', (1,) * 6, 0, test_list=None)
    lists = tmp_path / 'moved' / 'lists'
    lists.mkdir(parents=True)
    with pytest.raises(InputError, match='--images'):
        results_rows.keep_data_digests(run, run, str(tmp_path / 'moved'))
    (lists / 'a.txt').write_text('train/a/x.png 0\ntrain/b/y.png 1\n')
    results_rows.keep_data_digests(run, run, str(tmp_path / 'moved'))
    found = json.loads((run / 'data.json').read_text())
    assert found['train']['images'] == 2 and 'test' not in found
    assert found['train']['labels_sha256'] == hashlib.sha256(b'0\n1').hexdigest()
    assert found['train']['published_draw'] is False and 'no such numbers' in found['train']['draw']


def test_kept_logits_are_in_half_precision_and_known_by_their_digest(results_page, tmp_path, monkeypatch):
    import results_rows
    run = write_run(tmp_path / 'runs', 'ce-s0', (1,) * 6, 0, train_list=None, test_list=None)
    logits = np.random.RandomState(0).randn(4, 6).astype(np.float32)

    def evaluate(argv):
        np.savez(argv[argv.index('--logits-file') + 1], logits=logits, labels=np.arange(4))

    monkeypatch.setattr(results_rows.validate, 'main', evaluate)
    (tmp_path / 'logits').mkdir()
    results_rows.keep_predictions(run, run, 'images', tmp_path / 'logits')
    results_rows.keep_data_digests(run, run, 'images', tmp_path / 'logits')
    path = tmp_path / 'logits' / 'ce-s0.npz'
    with np.load(path) as kept:
        assert kept['logits'].dtype == np.float16 and np.array_equal(kept['logits'], logits.astype(np.float16))
        assert kept['labels'].tolist() == [0, 1, 2, 3]
    digest = {'file': 'ce-s0.npz', 'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}
    assert json.loads((run / 'data.json').read_text()) == {'logits': digest}
    results_rows.keep_data_digests(run, run, 'images')  # without them it still knows of them
    assert json.loads((run / 'data.json').read_text()) == {'logits': digest}


def test_a_run_is_trained_again_by_its_command(results_page, tmp_path):
    """One that went on elsewhere has that machine's settings in args.yaml."""
    import retrain
    (tmp_path / 'hardware.json').write_text(json.dumps(
        {'command': 'python train.py --config cifar100_lt/x --seed 3 --amp --device cuda', 'parts': []}))
    assert retrain.flags_of(tmp_path) == ['--seed', '3', '--amp', '--device', 'cuda']
    assert retrain.flags_of(tmp_path / 'without') == []


def test_networks_of_the_figures_are_files_or_names(results_page, tmp_path):
    import norm_figures
    assert norm_figures.is_zoo_name('resnet32_nbn.cifar100_lt')
    assert not norm_figures.is_zoo_name(str(tmp_path)) and not norm_figures.is_zoo_name('absent.pth.tar')


def test_page_of_the_repository_is_current(results_page):
    if not (ROOT / 'results' / 'cifar100_lt').is_dir():
        pytest.skip('no results have been collected')
    results_page.main(['build', '--check'])
