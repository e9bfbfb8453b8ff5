"""Every flag of timm's train.py, validate.py and inference.py is there, or says what to use instead."""
import re

import pytest

from nbn_timm import timm_flags
from nbn_timm.cli import demo, predict, probe, train, validate
from nbn_timm.cli.predict import PredictSettings
from nbn_timm.config import build_parser, config_path, read_config
from nbn_timm.errors import InputError
from nbn_timm.probe.settings import ProbeSettings
from nbn_timm.settings import key_of
from nbn_timm.training.settings import TrainSettings
from nbn_timm.validation import ValidateSettings

# All flags of the scripts of timm's commit aa4b5850 (1.0.31).
TRAIN = """
--config --data-dir --dataset --train-split --val-split --train-num-samples --val-num-samples --dataset-download
--class-map --input-img-mode --input-key --target-key --dataset-trust-remote-code --model --pretrained --pretrained-path
--initial-checkpoint --resume --no-resume-opt --num-classes --gp --img-size --in-chans --input-size --crop-pct --mean
--std --interpolation -b --batch-size -vb --validation-batch-size --channels-last --fuser --grad-accum-steps
--grad-checkpointing --fast-norm --model-kwargs --head-init-scale --head-init-bias --torchcompile-mode --torchscript
--torchcompile --device --amp --amp-dtype --model-dtype --no-ddp-bb --synchronize-step --local_rank --device-modules
--opt --opt-eps --opt-betas --momentum --weight-decay --clip-grad --clip-mode --layer-decay --layer-decay-min-scale
--layer-decay-no-opt-scale --opt-kwargs --sched --sched-on-updates --lr --lr-base --lr-base-size --lr-base-scale
--lr-noise --lr-noise-pct --lr-noise-std --lr-cycle-mul --lr-cycle-decay --lr-cycle-limit --lr-k-decay --warmup-lr
--min-lr --epochs --epoch-repeats --start-epoch --decay-milestones --decay-epochs --warmup-epochs --warmup-prefix
--cooldown-epochs --patience-epochs --decay-rate --dr --no-aug --train-crop-mode --scale --ratio --hflip --vflip
--color-jitter --color-jitter-prob --grayscale-prob --gaussian-blur-prob --aa --aug-repeats --aug-splits --jsd-loss
--bce-loss --bce-sum --bce-target-thresh --bce-pos-weight --reprob --remode --recount --resplit --mixup --cutmix
--cutmix-minmax --mixup-prob --mixup-switch-prob --mixup-mode --mixup-off-epoch --smoothing --train-interpolation --drop
--drop-connect --drop-path --drop-block --bn-momentum --bn-eps --sync-bn --dist-bn --split-bn --model-ema
--model-ema-force-cpu --model-ema-decay --model-ema-warmup --seed --worker-seeding --log-interval --val-interval
--recovery-interval --checkpoint-hist -j --workers --save-images --pin-mem --no-prefetcher --output --experiment
--eval-metric --tta --use-multi-epochs-loader --log-wandb --wandb-project --wandb-tags --wandb-resume-id
--train-img-sizes --train-batch-sizes --train-size-probs --train-size-schedule --train-size-schedule-spread
--train-size-random-mix --train-batches-per-epoch --train-steps-per-epoch --variable-batch-loss-scale --naflex-loader
--naflex-train-seq-lens --naflex-max-seq-len --naflex-patch-sizes --naflex-patch-size-probs --naflex-loss-scale
--naflex-patchify-channels-first --kd-model-name --kd-distill-type --kd-loss-type --distill-loss-weight
--task-loss-weight --kd-temperature --kd-student-feature-dim --kd-teacher-feature-dim --kd-token-distill-type -c
""".split()
VALIDATE = """
--data-dir --dataset --split --num-samples --dataset-download --class-map --input-key --input-img-mode --target-key
--dataset-trust-remote-code --model -m --pretrained -j --workers -b --batch-size --img-size --in-chans --input-size
--use-train-size --crop-pct --crop-mode --crop-border-pixels --mean --std --interpolation --num-classes --gp --log-freq
--checkpoint --num-gpu --test-pool --no-prefetcher --pin-mem --channels-last --device --amp --amp-dtype --model-dtype
--tf-preprocessing --use-ema --fuser --fast-norm --reparam --model-kwargs --torchcompile-mode --torchscript
--torchcompile --aot-autograd --results-file --results-format --real-labels --valid-labels --retry --seed --metrics-avg
--naflex-loader --naflex-max-seq-len
""".split()
INFERENCE = """
--data-dir --dataset --split --model -m -j --workers -b --batch-size --img-size --in-chans --input-size
--use-train-size --crop-pct --crop-mode --mean --std --interpolation --num-classes --class-map --log-freq --checkpoint
--pretrained --num-gpu --test-pool --channels-last --device --amp --amp-dtype --model-dtype --fuser --model-kwargs
--torchcompile-mode --torchscript --torchcompile --aot-autograd --results-dir --results-file --results-format
--results-separate-col --topk --fullname --filename-col --index-col --label-col --output-col --output-type --label-type
--include-index --exclude-output --no-console-results
""".split()
COMMANDS: dict[str, tuple] = {
    'train': (TRAIN, TrainSettings, build_parser(TrainSettings, 'nbn-train', ''), train.main),
    'validate': (VALIDATE, ValidateSettings, build_parser(ValidateSettings, 'nbn-validate', ''), validate.main),
    'predict': (INFERENCE, PredictSettings, predict.create_parser(), predict.main),
    'probe': (TRAIN, ProbeSettings, build_parser(ProbeSettings, 'nbn-probe', ''), probe.main),
}
TABLES = {'train': timm_flags.TRAIN, 'validate': timm_flags.VALIDATE, 'predict': timm_flags.INFERENCE,
          'probe': timm_flags.PROBE}


@pytest.mark.fast
@pytest.mark.parametrize('command', COMMANDS)
def test_every_flag_of_timm_is_there_or_says_what_to_use(command, capsys):
    flags, groups, parser, main = COMMANDS[command]
    known = {option for action in parser._actions for option in action.option_strings}
    for flag in flags:
        if flag in known:
            continue
        with pytest.raises(SystemExit):
            main([flag, '1'])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        if owner := groups.of_others.get(key_of(flag)):
            assert f"unknown argument '{flag}': {owner}" in said
            continue
        assert f"timm's {flag} is not here: {groups.elsewhere[key_of(flag)]}" in said
        assert 'unrecognized' not in said and 'unknown argument' not in said


@pytest.mark.fast
def test_a_flag_of_another_command_and_a_network_without_its_flag_say_where_they_belong(capsys):
    assert TrainSettings.of_others.keys() <= ValidateSettings.declared().keys() - TrainSettings.declared().keys()
    for main, word, said in ((train.main, '--save-predictions', ': nbn-validate has it'),
                             (demo.main, 'output/p1', ': give it with --model if it is the network')):
        with pytest.raises(SystemExit):
            main([word])
        assert f"unknown argument '{word}'{said}" in capsys.readouterr().err


@pytest.mark.fast
@pytest.mark.parametrize('command, table', TABLES.items())
def test_the_table_is_of_timms_flags_alone_and_names_flags_that_there_are(command, table):
    flags, groups, parser, _ = COMMANDS[command]
    assert not table.keys() & groups.declared().keys()
    known = {option for action in parser._actions for option in action.option_strings} | {'--nproc-per-node'}
    of_validate = {option for action in COMMANDS['validate'][2]._actions for option in action.option_strings}
    assert table.keys() <= {key_of(flag) for flag in flags}
    for sentence in table.values():
        named = set(re.findall(r'--[a-z][\w-]*', sentence))
        assert named <= (known | of_validate if 'nbn-validate' in sentence else known), sentence


@pytest.mark.fast
@pytest.mark.parametrize('command, flag, value, said', [
    ('train', '--sched', 'plateau', 'there is no plateau schedule; --patience ends a run'),
    ('validate', '--split', 'validation', "that split is called 'val': give --split val"),
])
def test_values_of_timms_flags_say_what_to_use_instead(command, flag, value, said, capsys):
    _, groups, parser, main = COMMANDS[command]
    with pytest.raises(SystemExit):
        main([flag, value])
    assert said in capsys.readouterr().err
    with pytest.raises(InputError, match=said):
        groups.of({key_of(flag): value})


@pytest.mark.fast
def test_a_config_of_another_command_is_told_its_command():
    path = config_path('linear_probe')
    with pytest.raises(InputError, match="has the key 'freeze': nbn-train has it, which trains a network"):
        read_config(COMMANDS['probe'][2], ProbeSettings, path)


@pytest.mark.fast
def test_keys_of_a_config_are_told_in_the_same_way(tmp_path):
    parser = COMMANDS['train'][2]
    config = tmp_path / 'config.yaml'
    for text, key in (('jsd_loss: false', 'jsd_loss'), ('bn-eps: 0.001', 'bn_eps')):
        config.write_text(text)
        with pytest.raises(InputError, match=f"timm's {key} is not here: "):
            read_config(parser, TrainSettings, config)
    config.write_text('dataset_download: true\ndr: 0.2\nlr_base: 0.05\nval_interval: 2\n')
    assert read_config(parser, TrainSettings, config) == {
        'download': True, 'decay_rate': 0.2, 'lr_base': 0.05, 'val_interval': 2}
    config.write_text('decay_rate: 0.2\ndr: 0.2\n')
    with pytest.raises(InputError, match="sets 'decay_rate' twice"):
        read_config(parser, TrainSettings, config)


@pytest.mark.fast
def test_a_folder_behind_the_command_is_told_its_flag(capsys):
    with pytest.raises(SystemExit):
        train.main(['/data/pictures', '--model', 'resnet20'])
    assert "unknown argument '/data/pictures': a folder of images is given with --data-dir" in capsys.readouterr().err
