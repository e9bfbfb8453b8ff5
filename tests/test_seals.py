"""What a run or an export has written and has changed since is told: files with a seal, and two files that agree."""
import json

import pytest
import timm
import yaml

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.cli.push import main as push
from nbn_timm.config import read_mapping
from nbn_timm.errors import InputError
from nbn_timm.models.model_folder import read_folder_config
from nbn_timm.report import read_run
from nbn_timm.seals import SEAL, is_as_written, sealed
from nbn_timm.trained.opening import open_trained
from nbn_timm.trained.results import ResultsFile
from nbn_timm.training.report import config_text
from nbn_timm.training.settings import TrainSettings

pytestmark = pytest.mark.fast
RESULTS = {
    'top1': 50.0, 'num_samples': 4, 'num_classes': 2, 'weights': {'file': 'last.pth.tar'}, 'top5': 100.0,
    'per_class': {'correct': [1, 1], 'total': [2, 2]}}


def test_a_seal_is_of_the_values_and_not_of_their_order_or_kind():
    content = {'a': (1, 2), 'b': {'c': 0.1, 7: None}}
    whole = json.loads(json.dumps(sealed(content), indent=4))
    assert is_as_written(whole) and is_as_written(dict(reversed(whole.items()))) and is_as_written(content)
    for key, value in (('a', [1, 3]), ('d', 1), (SEAL, '0')):
        assert not is_as_written({**whole, key: value})
    assert not is_as_written({key: whole[key] for key in ('a', SEAL)})


def test_a_changed_results_file_is_told(tmp_path, caplog):
    path = tmp_path / 'test.json'
    for content, told in ((sealed(RESULTS), False), (RESULTS | {'top1': 75.0}, False),
                          ({**sealed(RESULTS), 'top1': 75.0}, True)):
        caplog.clear()
        path.write_text(json.dumps(content))
        ResultsFile.read(path)
        ResultsFile.read(path)
        assert caplog.text.count(f"The results file '{path}' is not as it was written: it was edited") == told
    path.write_text(json.dumps({**sealed(RESULTS), 'top5': 99.0}))
    assert read_run(tmp_path).notes == ('test.json is not as it was written: it was edited, or is damaged.',)


def test_changed_settings_of_a_run_are_told(tmp_path, caplog):
    """A file that is cut at the end of a line is YAML still, and the rest of the settings would be defaults."""
    text, path = config_text(TrainSettings()), tmp_path / 'args.yaml'
    for changed, told in ((text, 0), (text[:text.index('\nlr:') + 1], 1), (text.replace('lr: ', 'lr: 1'), 1),
                          (text.replace('#', '# '), 0), ('lr: 0.1\n', 0)):
        caplog.clear()
        path.write_text(changed)
        assert dict(read_mapping(path)) == dict(read_mapping(path)) == yaml.safe_load(changed)
        assert caplog.text.count(f"The config '{path}' is not as it was written: it was edited, or is damaged") == told
        assert len(read_run(tmp_path).notes) == told


def test_a_changed_config_of_a_folder_is_told(tmp_path, caplog):
    """Its names and its format of images decide what is answered, and no digest of weights holds them."""
    folder = tmp_path / 'out'
    push(['resnet20_nbn.digits_lt', '--output', str(folder)])
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    open_trained(str(folder))
    timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert SEAL in config and 'as it was written' not in caplog.text
    config['pretrained_cfg']['interpolation'] = 'nearest'
    path.write_text(json.dumps(config))
    for _ in range(2):
        open_trained(str(folder))
    assert caplog.text.count(f"The config.json of 'local-dir:{folder}' is not as it was written") == 1
    path.write_text(path.read_text().replace(f'"{SEAL}"', '"seal"'))
    assert read_folder_config(f'local-dir:{folder}')['num_classes'] == 10


SUMMARY = 'epoch,train_loss,eval_top1,lr\n0,1.5,,0.1\n1,1.25,50.0,0.05\n'
LOG = ('{"epoch": 0, "train_loss": 1.5, "eval_top1": null, "lr": 0.1, "eval_top5": 9.0}\n'
       '{"epoch": 1, "train_loss": 1.25, "eval_top1": 50.0, "lr": 0.05}\n')


@pytest.mark.parametrize(('name', 'before', 'after'), [
    ('summary.csv', '50.0', '51.0'), ('summary.csv', ',,', ',2,'), ('summary.csv', 'eval_top1', 'eval_tgp1'),
    ('summary.csv', '1,1.25,50.0,0.05\n', ''),
    ('summary.csv', SUMMARY[SUMMARY.index('lr') + 3:], ''), ('log.jsonl', '1.25', '1.35'),
    ('log.jsonl', '"epoch": 1', '"epoch": 3')])
def test_a_report_does_not_take_a_summary_that_its_log_denies(tmp_path, name, before, after):
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    (tmp_path / 'log.jsonl').write_text(LOG)
    assert len(read_run(tmp_path).epochs) == 2
    path = tmp_path / name
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(InputError, match='summary.csv and log.jsonl .* do not agree on epoch'):
        read_run(tmp_path)


def test_a_report_does_not_go_on_without_the_names_of_a_table_that_lost_its_rows(tmp_path):
    header = 'class,name,train_images,shot,test_images,correct\n'
    (tmp_path / 'test.json').write_text(json.dumps(RESULTS))
    table = tmp_path / 'test_per_class.csv'
    table.write_text(header + '0,ant,9,few,2,1\n1,bee,3,few,2,1\n')
    assert read_run(tmp_path).names == ['ant', 'bee']
    table.write_text(header)
    with pytest.raises(InputError, match='test.json and test_per_class.csv .* are of different evaluations'):
        read_run(tmp_path)
    table.unlink()
    assert read_run(tmp_path).names == ['0', '1']


def test_a_report_takes_a_summary_that_is_ahead_of_its_log(tmp_path):
    """As after a kill between the two, or in the middle of a line."""
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    for log in (LOG[:LOG.index('\n') + 1], LOG[:-10], 'no log', ''):
        (tmp_path / 'log.jsonl').write_text(log)
        assert len(read_run(tmp_path).epochs) == 2


@pytest.mark.parametrize('loss', ['nan', 'inf'])
def test_a_loss_that_is_no_number_is_the_same_in_both(tmp_path, loss):
    (tmp_path / 'summary.csv').write_text(SUMMARY.replace('1.25', loss))
    (tmp_path / 'log.jsonl').write_text(LOG.replace('1.25', {'nan': 'NaN', 'inf': 'Infinity'}[loss]))
    assert len(read_run(tmp_path).epochs) == 2
