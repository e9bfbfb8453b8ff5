"""Flags of timm's train.py, validate.py and inference.py that the commands here do not have, and what to use instead.

Who comes from timm types its flags by habit. Most are there, with timm's names and meanings. Of each other one the
command says in one sentence what takes its place, on the command line as in a config. The same goes for values of
flags that are here.
"""
from collections.abc import Mapping


def _all(names: str, sentence: str) -> dict[str, str]:
    """One sentence for several flags."""
    return dict.fromkeys(names.split(), sentence)


_STREAM_LENGTH = 'the number of images is counted, and a streamed data set is read to its end, so leave it out'
_SIZES = 'all batches of a run have one size: give --img-size and --batch-size, and train on with another --img-size ' \
         'from --initial-checkpoint'
_NAFLEX = 'images of variable size are not read here: use a model with a fixed input and --img-size'
_PLATEAU = 'there is no plateau schedule; --patience ends a run that no longer gets better'
_CYCLES = 'a schedule has one cycle and no noise: choose another --sched'
_KEYS = 'the columns of a Hugging Face data set are taken by their usual names (image, label): rename them there, or ' \
        'use --dataset folder or list'
_FUSERS = 'torch.compile has taken the place of TorchScript and its fusers: give --torchcompile, or nbn-export for a ' \
          'finished network'

_OF_BOTH = {
    'class_map': 'the numbers of the classes come from the lists, or from the folders in the natural order of their '
                 'names (9 before 10), and a network keeps them by name: leave it out',
    'input_img_mode': 'how pictures are read follows from the channels: give --in-chans',
    **_all('input_key target_key', _KEYS),
    'dataset_trust_remote_code': 'code from a data set is never run: convert the data to folders or lists',
    'gp': 'the pooling is an argument of the model: give --model-kwargs global_pool=avg',
    **_all('fuser torchscript', _FUSERS),
    'fast_norm': 'norms are computed as in float32 under autocast: leave it out, or give --amp for speed',
    'torchcompile_mode': 'give the backend with --torchcompile; its mode is the default one',
    'no_prefetcher': 'images are always normalised on the device, with the same result: leave it out',
    **_all('naflex_loader naflex_max_seq_len', _NAFLEX),
}

_OF_TRAIN = {
    **_OF_BOTH,
    **_all('train_num_samples val_num_samples', _STREAM_LENGTH),
    'no_resume_opt': 'to start from weights without the state of the optimizer give --initial-checkpoint in place of '
                     '--resume',
    'start_epoch': 'a run goes on at the epoch of its checkpoint: give --resume',
    'head_init_scale': 'the classifier of an untrained network begins as the model has it, and a new one on trained '
                       'weights at zero: leave it out',
    'head_init_bias': 'for a start at the training prior use --loss balanced_softmax or logit_adjusted; otherwise '
                      'leave it out',
    'no_ddp_bb': 'buffers are never broadcast during an epoch; --dist-bn says what becomes of them at its end',
    'synchronize_step': 'no step waits for the device: leave it out',
    **_all('local_rank', 'torchrun tells each process its rank by the environment: leave it out'),
    'device_modules': 'write a script that imports the module and calls nbn_timm.cli.train.console',
    'opt_eps': 'give --opt-kwargs eps=1e-8',
    'opt_betas': "give --opt-kwargs 'betas=(0.9, 0.999)'",
    'layer_decay_min_scale': 'give --opt-kwargs layer_decay_min_scale=0.01',
    'layer_decay_no_opt_scale': 'give --opt-kwargs layer_decay_no_opt_scale=0.01',
    **_all('lr_noise lr_noise_pct lr_noise_std lr_cycle_mul lr_cycle_decay lr_cycle_limit lr_k_decay', _CYCLES),
    'epoch_repeats': 'give more --epochs, or --sampler repeat_factor to repeat the images of rare classes',
    'cooldown_epochs': 'the schedule ends with the run; --sched wsd has a stretch of falling rate at its end, and '
                       '--min-lr holds the cosine up',
    'patience_epochs': _PLATEAU,
    'train_crop_mode': 'the crop of training follows from the data: a random resized crop, by --scale and --ratio, or '
                       'for small images a padded one',
    'aug_repeats': 'give --sampler repeat_factor, or a --loss that takes several views of an image',
    **_all('aug_splits jsd_loss resplit split_bn', 'splits of a batch and their loss are not here: give --aa '
           'augmix-m5-w4-d2 for AugMix without it, or a --loss that takes several views of an image'),
    **_all('bce_loss bce_sum bce_target_thresh bce_pos_weight', 'give --loss bce or class_balanced_bce, or '
           'cross_entropy, which takes mixed targets too'),
    'cutmix_minmax': 'give --cutmix ALPHA, which draws the area from a Beta distribution',
    'drop_connect': 'give --drop-path, as timm advises too',
    'drop_block': 'give --model-kwargs drop_block_rate=0.1',
    'bn_eps': 'give --model-kwargs bn_eps=1e-3 for EfficientNet and its relatives; other models have it in their code: '
              'leave it out, or set the eps of their layers in a script that registers the model',
    'model_ema_force_cpu': 'the average stays on the device, since it is what is evaluated: leave it out',
    'worker_seeding': 'workers draw from seeds of their own, which --seed decides: leave it out',
    'save_images': 'no pictures of batches are saved: look at nbn_timm.data.create_transform',
    'tta': 'an image is evaluated once in training: give --test-views to nbn-validate for several views',
    'use_multi_epochs_loader': 'workers begin each epoch anew, which makes it reproducible; small images are kept in '
                               'memory by --in-memory',
    **_all('wandb_tags wandb_resume_id', 'a run has the name of its folder in Weights & Biases and goes on under it; '
           'choose it with --experiment'),
    **_all('train_img_sizes train_batch_sizes train_size_probs train_size_schedule train_size_schedule_spread '
           'train_size_random_mix train_batches_per_epoch train_steps_per_epoch variable_batch_loss_scale', _SIZES),
    **_all('naflex_train_seq_lens naflex_patch_sizes naflex_patch_size_probs naflex_loss_scale '
           'naflex_patchify_channels_first', _NAFLEX),
    **_all('kd_distill_type kd_loss_type kd_student_feature_dim kd_teacher_feature_dim kd_token_distill_type',
           'a student learns from the logits of --kd-checkpoint by the Kullback-Leibler divergence; --kd-target says '
           'what of it does'),
    'task_loss_weight': "give --kd-label-weight, which leaves the teacher's weight, --distill-loss-weight, as it is",
}

_OF_VALIDATE = {
    **_OF_BOTH,
    'num_samples': _STREAM_LENGTH,
    'use_train_size': 'images are read in the size of the training: leave it out, or give --img-size',
    **_all('crop_border_pixels', 'the evaluation takes a centre crop, whose share --crop-pct gives'),
    'log_freq': 'a bar shows how far it is: leave it out',
    'num_gpu': 'several GPUs take one process each: start with torchrun --nproc-per-node N',
    'test_pool': 'give --img-size, and the network pools over what it gets',
    'tf_preprocessing': 'pictures are read by Pillow alone: give --interpolation and --crop-pct',
    'aot_autograd': 'give --torchcompile aot_eager',
    'results_format': '--results-file is JSON, and --per-class-file CSV: leave it out',
    'real_labels': 'give the corrected labels as a --test-list',
    'valid_labels': 'give a --test-list with those classes; a network knows its classes by name',
    'retry': 'give a smaller --batch-size',
    'seed': 'an evaluation draws nothing at random: leave it out',
    'metrics_avg': '--results-file has the hits and images of every class',
}

_RECORDED = 'pictures are read in the format that the network records: leave it out; nbn-validate takes another one'
_NO_DATA_SET = 'pictures come from files and folders, which are given without a flag; nbn-validate takes a data set'
_COLUMNS = 'the columns of --csv and the keys of --json have fixed names: rename them in what is written'

_OF_INFERENCE = {
    'data_dir': 'give pictures, or folders with pictures, without a flag',
    **_all('dataset split', _NO_DATA_SET),
    **_all('img_size in_chans input_size use_train_size crop_pct crop_mode mean std interpolation', _RECORDED),
    'num_classes': 'the network says how many classes it has: leave it out',
    'class_map': 'the network records what its classes are called: leave it out, or give --class-names',
    'log_freq': 'every answer is written as soon as it is there: leave it out',
    'checkpoint': 'give the file or the folder of the run as --model, and the architecture of bare weights as --arch',
    'pretrained': 'a name that is given as --model stands for its published weights: leave it out',
    'num_gpu': 'nbn-predict is one process on one --device: leave it out',
    'test_pool': 'pictures are read in the size that the network records: leave it out',
    **_all('fuser torchscript', _FUSERS),
    'model_kwargs': 'the network records how it is made: leave it out, or name an architecture with --arch',
    'torchcompile_mode': _OF_BOTH['torchcompile_mode'],
    'aot_autograd': _OF_VALIDATE['aot_autograd'],
    'results_dir': 'give the folder as a part of --output',
    'results_file': 'give the file as --output, and its form as --csv or --json',
    'results_format': 'give --csv or --json; without them the answers are lines for people',
    'results_separate_col': '--csv gives every class of --topk columns of its own: leave it out',
    'fullname': 'a picture is called by the path under which it was found: leave it out',
    **_all('filename_col index_col label_col output_col', _COLUMNS),
    'output_type': 'probabilities are what is written; the logits of a data set are written by nbn-validate with its '
                   'flag --logits-file',
    'label_type': 'classes are called as the network records, or as --class-names says: leave it out',
    'include_index': '--csv and --json have the number of every class: leave it out',
    'exclude_output': '--csv and --json always have the probabilities: leave out their columns in what reads them',
    'no_console_results': 'give --output, and the answers go to that file alone',
}

_HEADS_ALONE = 'it is for the training of a network, and nbn-probe trains heads on its features, by --head-lr, ' \
               '--head-epochs, --head-weight-decay and --head-batch-size'

_OF_PROBE = {
    **dict.fromkeys(_OF_TRAIN, _HEADS_ALONE),
    **_OF_BOTH,
    **{name: _OF_TRAIN[name] for name in ('train_num_samples', 'val_num_samples', 'local_rank', 'bn_eps')},
}

TRAIN: Mapping[str, str] = _OF_TRAIN
VALIDATE: Mapping[str, str] = _OF_VALIDATE
INFERENCE: Mapping[str, str] = _OF_INFERENCE  # nbn-predict
PROBE: Mapping[str, str] = _OF_PROBE  # of train.py, since nbn-probe trains too

# Values that flags of timm's have and those here have not.
SCHEDULES: Mapping[str, str] = {
    'plateau': _PLATEAU,
    **_all('tanh poly', 'the courses that fall from the beginning on are cosine and linear: give one of them'),
    'rsqrt': 'what comes next to it is a stretch at one rate with a fall at its end: give --sched wsd',
}
SPLITS: Mapping[str, str] = {
    'validation': "that split is called 'val': give --split val, or leave it out for the test pictures",
    'train': 'the pictures of the training are not evaluated: give --split val or --split test',
}
